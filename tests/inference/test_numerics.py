"""Jitter, devices, dtypes and TF32: the policy that all inference shares."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fspace.errors import DeviceError, NumericalError, OptionError
from fspace.inference.numerics import (
    MAX_JITTER,
    cholesky,
    full_precision,
    pick_device,
    pick_dtype,
    seeded,
    solve_lower,
)


def with_eigenvalues(values):
    """A symmetric matrix with these eigenvalues and mean diagonal 1 (if they average to 1)."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.mT


def test_a_sound_matrix_is_factorised_as_it_is():
    matrix = with_eigenvalues([0.5, 1.0, 1.5])
    factor, jitter = cholesky(matrix, "a")
    assert jitter == 0.0
    assert np.allclose(factor.numpy(), np.linalg.cholesky(matrix.numpy()), atol=1e-15)


@pytest.mark.parametrize("low, want", [(-5e-11, 1e-10), (-5e-9, 1e-8), (-5e-7, 1e-6), (-5e-5, 1e-4)])
def test_jitter_is_the_first_power_of_ten_that_is_enough(low, want):
    matrix = with_eigenvalues([low, 1.0, 2.0 - low])
    factor, jitter = cholesky(matrix, "a")
    assert jitter == pytest.approx(want)
    assert torch.allclose(factor @ factor.mT, matrix + want * torch.eye(3, dtype=torch.float64), atol=1e-14)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_jitter_is_relative_to_the_diagonal(scale):
    matrix = with_eigenvalues([-5e-7, 1.0, 2.0])
    factor, jitter = cholesky(scale * matrix, "a")
    assert jitter == pytest.approx(1e-6)
    level = scale * matrix.diagonal().mean()
    want = scale * matrix + 1e-6 * level * torch.eye(3, dtype=torch.float64)
    assert torch.allclose(factor @ factor.mT, want, rtol=1e-9, atol=0.0)


def test_a_first_jitter_is_added_in_any_case_and_reported():
    matrix = with_eigenvalues([0.5, 1.0, 1.5])
    factor, jitter = cholesky(matrix, "a", first_jitter=1e-7)
    assert jitter == 1e-7
    assert torch.allclose(factor @ factor.mT - matrix, 1e-7 * torch.eye(3, dtype=torch.float64), atol=1e-14)


def test_one_bad_matrix_of_a_batch_decides_for_all():
    batch = torch.stack([with_eigenvalues([0.5, 1.0, 1.5]), with_eigenvalues([-5e-7, 1.0, 2.0])])
    factor, jitter = cholesky(batch, "a")
    assert jitter == pytest.approx(1e-6)
    assert torch.allclose(factor @ factor.mT, batch, atol=2e-6)


def test_the_gradient_of_a_repaired_factor_is_that_of_the_repaired_matrix():
    matrix = with_eigenvalues([-5e-7, 1.0, 2.0])
    left, right = matrix.clone().requires_grad_(), matrix.clone().requires_grad_()
    cholesky(left, "a")[0].diagonal().log().sum().backward()
    shifted = right + 1e-6 * matrix.diagonal().mean() * torch.eye(3, dtype=torch.float64)
    torch.linalg.cholesky(shifted).diagonal().log().sum().backward()
    assert torch.allclose(left.grad, right.grad, rtol=1e-9)


def test_the_refusal_says_what_how_large_how_bad_and_what_to_do():
    batch = with_eigenvalues([-0.25, 1.0, 2.25]).expand(2, 3, 3)
    with pytest.raises(NumericalError) as caught:
        cholesky(batch, "kernel matrix of the inducing inputs")
    text = str(caught.value)
    assert text.startswith("kernel matrix of the inducing inputs (2 x 3 x 3)")
    assert "jitter 0.0001" in text
    assert "-0.25" in text and "2.25" in text  # the ends of the spectrum
    assert "duplicated rows" in text and "noise" in text and "fewer inducing inputs" in text
    assert caught.value.__cause__ is None


def test_no_repair_beyond_the_stated_limit():
    low = -2.0 * MAX_JITTER
    with pytest.raises(NumericalError, match="not positive definite"):
        cholesky(with_eigenvalues([low, 1.0, 2.0 - low]), "a")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named_and_not_repaired(bad):
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[1, 2] = bad
    with pytest.raises(NumericalError, match=r"the matrix \(4 x 4\) holds NaN or infinite.*learning rate"):
        cholesky(matrix, "the matrix")


def test_solve_lower_is_the_inverse_of_multiplying_and_broadcasts():
    factor = torch.linalg.cholesky(with_eigenvalues([0.5, 1.0, 1.5]))
    right = torch.arange(24.0, dtype=torch.float64).reshape(2, 3, 4)
    assert torch.allclose(factor @ solve_lower(factor, right), right, atol=1e-13)


def test_auto_is_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")


def test_named_devices_pass_if_they_are_there(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(DeviceError, match="torch sees 2 CUDA devices"):
        pick_device("cuda:2")


def test_devices_that_are_not_there_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="'cuda'.*torch sees 0 CUDA devices.*'cpu'"):
        pick_device("cuda")
    with pytest.raises(DeviceError, match="'abacus' is not a torch device"):
        pick_device("abacus")
    with pytest.raises(DeviceError, match="float64"):  # a device without storage
        pick_device("fpga")


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_dtypes_by_name_and_by_value(name):
    assert pick_dtype(name) is getattr(torch, name)
    assert pick_dtype(getattr(torch, name)) is getattr(torch, name)


@pytest.mark.parametrize("bad", ["float16", torch.bfloat16, "double"])
def test_other_dtypes_are_refused(bad):
    with pytest.raises(OptionError, match="'float32' or 'float64'"):
        pick_dtype(bad)


@pytest.mark.parametrize("before", [True, False])
def test_tf32_is_off_inside_and_as_before_after(before):
    flags = torch.backends.cuda.matmul
    saved = flags.allow_tf32
    try:
        flags.allow_tf32 = before
        with full_precision():
            assert not flags.allow_tf32
            with full_precision():
                pass
            assert not flags.allow_tf32
        assert flags.allow_tf32 is before
        with pytest.raises(ZeroDivisionError), full_precision():
            raise ZeroDivisionError
        assert flags.allow_tf32 is before
    finally:
        flags.allow_tf32 = saved


def test_networks_made_in_threads_are_those_made_one_after_the_other():
    def made(seed):
        with seeded(seed):
            first = torch.randn(20000)
            return first, torch.randn(20000)

    alone = [made(seed) for seed in range(8)]
    before = torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(made, range(8)))
    assert all(torch.equal(a, b) for one, other in zip(alone, together) for a, b in zip(one, other))
    assert torch.equal(torch.get_rng_state(), before)
