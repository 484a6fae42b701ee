"""A training step asks the device for nothing: the host would wait for the numbers, and every step with it.

Counted on the CPU, which has all numbers at hand, are the calls that would wait, or copy, on a GPU. Steps that look
at held-out rows or choose inducing rows anew may wait: they come once in many. Rows that are read from disk
(`RowSource`, a memory-mapped array) are copied to the device batch by batch: that is what they are for.
"""

import sys
from collections import Counter
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from gpytorch.likelihoods import BernoulliLikelihood, BetaLikelihood, SoftmaxLikelihood, StudentTLikelihood
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from fspace.errors import NumericalError
from fspace.inference import inducing, numerics
from fspace.inference.candidates import deep_kernel, named_kernel
from fspace.inference.inducing import greedy_variance
from fspace.inference.likelihoods import PoissonLikelihood, with_offset
from fspace.inference.network import fit_network, fit_network_sites
from fspace.inference.optimise import gaussian_likelihood, lbfgs
from fspace.inference.site_training import fit_sites
from fspace.inference.source import RowSource, placed

WAITING = {
    "_local_scalar_dense": "item",  # also float(), int() and bool() of a tensor
    "nonzero": "nonzero",
    "masked_select": "nonzero",
    "equal": "equal",
    "bincount": "bincount",
    "_linalg_check_errors": "linalg",  # torch.linalg's functions that raise
    "lift_fresh": "torch.tensor",  # made on the host
}
METHODS = ("cpu", "cuda", "numpy", "tolist", "to")


class Crossings(TorchDispatchMode):
    """What would have crossed between host and device, by kind and place, step by step of the optimisers."""

    def __init__(self):
        super().__init__()
        self.steps = [Counter()]

    def note(self, kind):
        frame, place = sys._getframe(1), "elsewhere"
        while frame is not None:
            name = frame.f_globals.get("__name__", "")
            if (name.startswith("fspace.") or name == __name__) and frame.f_globals is not globals():
                place = f"{name}:{frame.f_lineno}"
                break
            frame = frame.f_back
        self.steps[-1][f"{kind} at {place}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in WAITING:
            self.note(WAITING[name])
        elif name in ("index", "index_put", "index_put_"):
            if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
                self.note("mask")
        elif name == "_to_copy" and kwargs.get("device") not in (None, args[0].device):
            self.note("copy")
        return func(*args, **kwargs)


@contextmanager
def counted():
    """Counts as on a GPU inside the block: `to(device)` within fspace counts, as it may copy."""
    mode, patch = Crossings(), pytest.MonkeyPatch()

    def watched(name):
        original = getattr(torch.Tensor, name)

        def method(self, *args, **kwargs):
            ours = sys._getframe(1).f_globals.get("__name__", "").startswith("fspace.")
            moves = name != "to" or "device" in kwargs or any(_is_device(a) for a in args)
            if ours and moves:
                mode.note(f".{name}()")
            return original(self, *args, **kwargs)

        return method

    hook = register_optimizer_step_post_hook(lambda *_: mode.steps.append(Counter()))
    try:
        for name in METHODS:
            patch.setattr(torch.Tensor, name, watched(name))
        for module in (numerics, inducing):
            patch.setattr(module, "host_may_look", lambda device: False)
        with mode:
            yield mode
    finally:
        patch.undo()
        hook.remove()


def _is_device(value):
    return isinstance(value, torch.device | str) or (isinstance(value, torch.Tensor) and value.dim() > 0)


def quiet(mode):
    """Steps in which nothing crossed, and what crossed in the others."""
    inner = mode.steps[1:-1]  # the first is with the start, the last with the end
    return sum(not step for step in inner) / len(inner), [dict(step) for step in inner if step]


def table(n=600, d=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x, torch.sin(2 * x[:, :1]) + 0.1 * torch.randn(n, 1, generator=generator, dtype=torch.float64)


def target(likelihood, y):
    if isinstance(likelihood, BernoulliLikelihood):
        return (y > 0).double()
    if isinstance(likelihood, SoftmaxLikelihood):
        return (y > -0.5).double() + (y > 0.5).double()
    if isinstance(likelihood, BetaLikelihood):
        return torch.sigmoid(y)
    return y.exp().round() if isinstance(likelihood, PoissonLikelihood) else y


def silent(**entry):
    pass


def generator():
    return torch.Generator().manual_seed(0)


def test_steps_of_sites_ask_for_nothing_where_noise_is_gaussian():
    x, y = table()
    with counted() as mode:
        likelihood = gaussian_likelihood(1, 0.1, y.device)
        fit_sites(named_kernel("matern", 3), likelihood, x, y, 32, 20, 60, generator(), silent)
    share, others = quiet(mode)
    assert share > 0.88, others  # an epoch has ten steps, and once an epoch the loss is looked at
    assert max(sum(step.values()) for step in others) <= 4, others


@pytest.mark.parametrize(
    "inner",
    [
        PoissonLikelihood,
        BernoulliLikelihood,
        StudentTLikelihood,
        BetaLikelihood,
        lambda: SoftmaxLikelihood(num_classes=3, mixing_weights=False),
    ],
)
def test_steps_of_sites_ask_once_whether_the_bound_rose_where_noise_is_not_gaussian(inner):
    """A natural step that lowers the bound is halved: the host has to know whether it was, once a try."""
    x, y = table()
    inner = inner()
    y = target(inner, y)
    likelihood = with_offset(inner, y)
    with counted() as mode:
        fit_sites(named_kernel("matern", 3), likelihood, x, y, 32, 10, 60, generator(), silent)
    counts = [dict(step) for step in mode.steps[1:-1]]
    asked = [sum(n for what, n in step.items() if "site_training" in what) for step in counts]
    assert sum(n == 1 for n in asked) > 0.85 * len(asked)
    assert sum(len(step) > 1 for step in counts) < 0.15 * len(counts), counts


@pytest.mark.parametrize("poisson", [False, True])
def test_steps_of_networks_ask_for_nothing(poisson):
    x, y = table(1200)
    kernel = deep_kernel(3, "silu", torch.float32)
    rows, held_out = torch.arange(1000), torch.arange(1000, 1200)
    with counted() as mode:
        if poisson:
            y = target(PoissonLikelihood(), y)
            likelihood = with_offset(PoissonLikelihood(), y)
            fit_network_sites(kernel, likelihood, x, y, None, rows, held_out, silent, "deep", generator())
        else:
            likelihood = gaussian_likelihood(1, 0.1, y.device)
            fit_network(kernel, likelihood, x, y, held_out, silent, "deep", generator())
    share, others = quiet(mode)
    asked = Counter("once" if sum(step.values()) == 1 else "more" for step in others)
    if poisson:  # whose last phase are the sites of the test above
        assert asked["more"] < 0.1 * len(mode.steps), others
    else:
        assert share > 0.95, others


def test_an_evaluation_of_lbfgs_crosses_once_each_way():
    start = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def loss():
        mode.steps.append(Counter())
        value = (start - torch.arange(3.0, device=start.device)).square().sum()
        value.backward()
        return value.detach()

    with counted() as mode:
        lbfgs(loss, [start], 20, lambda value: None)
    assert torch.allclose(start, torch.arange(3.0, dtype=torch.float64), atol=1e-4)
    for step in mode.steps[1:-1]:
        assert Counter(what.split(" ")[0] for what in step) == {
            ".to()": 1,  # the parameters, together, from numpy
            "torch.tensor": 1,
            ".cpu()": 1,  # value and gradient, together, to numpy
            ".numpy()": 1,
        }


def test_greedy_choice_looks_once_in_many_rows():
    x, kernel = table(400)[0], named_kernel("matern", 3)
    with counted() as mode:
        chosen = greedy_variance(kernel, x, 200)
    assert len(chosen) == 200
    assert sum(sum(step.values()) for step in mode.steps) <= 200 // 64 + 1


@pytest.mark.parametrize("tolerance", [0.0, 0.05])
def test_greedy_choice_is_the_same_however_often_it_looks(tolerance):
    x = torch.cat([table(150)[0], table(150)[0]])  # every row twice: there is an end to what can be taken
    kernel = named_kernel("rbf", 3)
    with counted():
        seldom = greedy_variance(kernel, x, 300, tolerance)
    assert torch.equal(seldom, greedy_variance(kernel, x, 300, tolerance))
    assert len(seldom) <= 150


@pytest.mark.parametrize("rank", [20, 8])
def test_an_unseen_factorisation_takes_the_same_jitter(rank):
    root = torch.randn(20, rank, dtype=torch.float64)
    matrix = root @ root.mT
    factor, jitter = numerics.cholesky(matrix, "matrix")
    with counted() as mode:
        unseen, same = numerics.cholesky_unseen(matrix, "matrix")
    assert float(same) == jitter and torch.equal(unseen, factor)
    assert not any(mode.steps), mode.steps


@pytest.mark.parametrize(
    "spoil", [lambda m: m.fill_diagonal_(-1.0), lambda m: m.index_fill(0, m[0, :1].long(), torch.nan)]
)
def test_an_unseen_factorisation_that_fails_is_nan(spoil):
    matrix = spoil(torch.eye(4, dtype=torch.float64))
    with counted():
        assert numerics.cholesky_unseen(matrix, "matrix", 1e-10)[0].isnan().any()
    with pytest.raises(NumericalError):
        numerics.cholesky_unseen(matrix, "matrix", 1e-10)


def test_training_that_goes_wrong_unseen_ends_with_a_name_at_the_end_of_its_epoch():
    x, y = table(100)
    x[0] = torch.nan
    likelihood = gaussian_likelihood(1, 0.1, y.device)
    with counted(), pytest.raises(NumericalError, match="loss became nan in epoch 1"):
        fit_sites(named_kernel("matern", 3), likelihood, x, y, 8, 2, 10, generator(), silent)


def test_a_loop_that_asks_is_seen():
    """The twin: the same counter over loops that do what steps must not."""
    weight = torch.ones(3, requires_grad=True)
    optimiser = torch.optim.AdamW([weight], fused=True)
    for ask in (
        lambda loss: loss.item(),
        lambda loss: float(loss.detach()),
        lambda loss: bool(loss > 0),
        lambda loss: weight.detach()[weight.detach() > 0],
        lambda loss: weight.detach().nonzero(),
        lambda loss: torch.equal(weight, weight + 1),
        lambda loss: torch.tensor([1.0, 2.0]),
        lambda loss: torch.linalg.cholesky(torch.eye(2)),
        lambda loss: placed(RowSource.of(np.ones((3, 2)), torch.device("cpu")), torch.arange(2)),
    ):
        with counted() as mode:
            for _ in range(4):
                loss = weight.square().sum()
                loss.backward()
                ask(loss)
                optimiser.step()
        share, others = quiet(mode)
        assert share == 0 and len(others) == 3


def test_training_is_the_same_whether_the_host_looks_or_not():
    x, y = table()
    states = []
    for block in (counted, nullcontext):
        kernel, likelihood = named_kernel("matern", 3), gaussian_likelihood(1, 0.1, y.device)
        with block():
            fit_sites(kernel, likelihood, x, y, 32, 3, 60, generator(), silent)
        states.append({**kernel.state_dict(), **likelihood.state_dict()})
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], rtol=1e-10), name


def copies(run):
    """How often memory was copied between host and device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
    return Counter(e.name for e in profile.events() if "Memcpy DtoH" in e.name or "Memcpy HtoD" in e.name)


@pytest.mark.gpu
def test_three_times_the_steps_copy_nothing_more_between_host_and_device():
    """One epoch each, with the same choices of inducing rows: what the steps add between them is nothing."""
    device = torch.device("cuda")
    x, y = (part.to(device) for part in table(3000))

    def run(batch):
        likelihood = gaussian_likelihood(1, 0.1, device)
        fit_sites(named_kernel("matern", 3).to(device), likelihood, x, y, 64, 1, batch, generator(), silent)

    run(100)  # libraries are loaded, constants copied
    few, many = copies(lambda: run(100)), copies(lambda: run(34))
    assert few and few == many


@pytest.mark.gpu
def test_a_network_s_steps_copy_far_less_often_than_they_are():
    device = torch.device("cuda")
    x, y = (part.to(device) for part in table(3000))
    kernel, steps, looks = deep_kernel(3, "silu", torch.float32).to(device), [], []
    likelihood, held_out = gaussian_likelihood(1, 0.1, device), torch.arange(2500, 3000, device=device)

    def run():
        steps.clear(), looks.clear()
        fit_network(kernel, likelihood, x, y, held_out, lambda **_: looks.append(1), "deep", generator())

    hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        run()
        found = copies(run)
    finally:
        hook.remove()
    assert found and found.total() <= 12 * len(looks) + len(steps) // 10, found
