"""Greedy inducing inputs against a pivoted Cholesky factorisation that holds the whole matrix."""

import pytest
import torch
from gpytorch.kernels import LinearKernel, MaternKernel, RBFKernel, ScaleKernel

from fspace.inference.inducing import greedy_variance


def dense_pivots(k, most):
    """Full pivoting on the Schur complement, step by step, and tr(K - Q) after every step."""
    left, pivots, traces = k.clone(), [], [k.trace().item()]
    for _ in range(most):
        j = int(left.diagonal().argmax())
        left = left - torch.outer(left[:, j], left[j]) / left[j, j]
        pivots.append(j)
        traces.append(left.trace().item())
    return pivots, traces


@pytest.fixture
def rows():
    return torch.randn(80, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    "kernel",
    [ScaleKernel(RBFKernel()), ScaleKernel(MaternKernel(1.5)), ScaleKernel(RBFKernel()) + LinearKernel()],
)
def test_the_order_is_that_of_pivoted_cholesky(rows, kernel):
    kernel = kernel.double()
    k = kernel(rows).to_dense().detach()
    assert greedy_variance(kernel, rows, 25).tolist() == dense_pivots(k, 25)[0]


@pytest.mark.parametrize("tolerance", [0.5, 0.2, 0.05])
def test_it_stops_at_the_first_step_within_tolerance(rows, tolerance):
    kernel = ScaleKernel(RBFKernel()).double()
    _, traces = dense_pivots(kernel(rows).to_dense().detach(), 79)
    chosen = greedy_variance(kernel, rows, 80, tolerance=tolerance)
    assert traces[len(chosen)] <= tolerance * traces[0] < traces[len(chosen) - 1]


def test_at_most_as_many_as_asked_for_or_as_there_are(rows):
    kernel = MaternKernel(0.5).double()
    assert len(greedy_variance(kernel, rows, 7)) == 7
    assert sorted(greedy_variance(kernel, rows, 500).tolist()) == list(range(80))


def test_duplicated_rows_are_taken_once(rows):
    kernel = MaternKernel(0.5).double()
    chosen = greedy_variance(kernel, rows.repeat(3, 1), 240)
    assert sorted((chosen % 80).tolist()) == list(range(80))


def test_a_kernel_of_low_rank_needs_no_more_rows_than_its_rank(rows):
    assert len(greedy_variance(LinearKernel().double(), rows, 80)) == 3
    constant = torch.zeros_like(rows)
    assert len(greedy_variance(RBFKernel().double(), constant, 80)) == 1


def test_the_scale_of_the_kernel_changes_nothing(rows):
    picks = []
    for scale in (1e-12, 1.0, 1e12):
        kernel = ScaleKernel(RBFKernel()).double()
        kernel.outputscale = scale
        picks.append(greedy_variance(kernel, rows, 40, tolerance=0.05).tolist())
    assert picks[0] == picks[1] == picks[2]
