"""The basis learned from shards: bound and gradient of the pooled rows, and the change of epoch that follows."""

import copy
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel

from fspace import GPRegressor
from fspace.errors import LearningStopped, NumericalError, OptionError, ServerError
from fspace.inference.basis import FIRST_JITTER, Basis
from fspace.inference.collapsed import (
    Statistics,
    backward_bound,
    bound_of_whitened,
    fit_site,
    log_evidence,
)
from fspace.inference.gp import Scaling
from fspace.inference.noise import NoiseFunction
from fspace.inference.numerics import cholesky, solve_lower
from fspace.inference.optimise import gaussian_likelihood, lbfgs
from fspace.kernels.deep import DeepKernel, embed
from fspace.kernels.evaluate import covariance, diagonal
from fspace.kernels.extractors import MLP, ResidualMLP, SoftSpectralLinear
from fspace.server import (
    LocalEngine,
    PosteriorServer,
    RemoteServer,
    TableShard,
    Update,
    fit,
    learn_basis,
    serving,
)
from fspace.server.engines import start
from fspace.server.learning import PooledBound
from fspace.server.serving import Address, heaviest, register_model, table_rows, work
from fspace.server.workers import Worker


def thirds(problem):
    return {name: problem.shard(k, 3) for k, name in enumerate("abc")}


def deep_basis(x, outputs=1, dtype=torch.float64, extractor=None, inducing=25):
    torch.manual_seed(3)
    extractor = MLP(x.shape[1], (16,), 3) if extractor is None else extractor
    base = ScaleKernel(MaternKernel(nu=1.5, ard_num_dims=extractor.out_features)).double()
    kernel = DeepKernel(extractor.to(dtype), base)
    kernel.fix_statistics(x)
    kernel.eval().requires_grad_(False)
    with torch.no_grad():
        z = embed(kernel, x[:inducing]).clone()
    return Basis(kernel, z, gaussian_likelihood(outputs, 0.1, torch.device("cpu")).requires_grad_(False))


def pooled(basis, x, y):
    """Value and gradients (inducing inputs, kernel, noise) of the bound by `backward_bound` on all rows at once."""
    kernel = copy.deepcopy(basis.kernel).eval().requires_grad_(True)
    likelihood = copy.deepcopy(basis.likelihood).requires_grad_(True)
    z = basis.inducing_inputs.clone().requires_grad_()
    value = backward_bound(kernel, z, likelihood.noise[..., 0], x, y)
    return value, [p.grad for p in (z, *kernel.parameters(), *likelihood.parameters())]


def assert_same_total(server, basis, x, y, tolerance=1e-10):
    """The server's total is the pooled site on the basis."""
    total, expected = server.total(), fit_site(basis, x, y)
    assert total.basis_id == basis.id and total.count == len(x)
    for name in ("precision", "shift"):
        one, other = getattr(total, name), getattr(expected, name)
        assert (one - other).abs().max() < tolerance * other.abs().max()
    assert server.log_evidence() == pytest.approx(log_evidence([expected]), rel=1e-10)


def assert_same_losses(bounds, expected, problem):
    """What is minimised, minus the bound a value, is the same at every evaluation to 1e-8."""
    losses, others = (torch.tensor(b).double() / problem.y.numel() for b in (bounds, expected))
    assert losses.shape == others.shape and (losses - others).abs().max() < 1e-8


@pytest.mark.parametrize("kind, tolerance", [("matern", 1e-10), ("float64", 1e-10), ("float32", 2e-5)])
def test_bound_and_gradient_are_those_of_the_pooled_rows(gaussian, kind, tolerance):
    """Networks in float32 to float32's accuracy: their matrix products are rounded otherwise for other batches."""
    dtype = torch.float32 if kind == "float32" else torch.float64
    basis = gaussian.basis if kind == "matern" else deep_basis(gaussian.x, 2, dtype)
    shards = {"a": (gaussian.x[:50], gaussian.y[:50]), "b": (gaussian.x[50:51], gaussian.y[50:51])}
    shards["c"] = (gaussian.x[51:], gaussian.y[51:])
    scaling = fit([gaussian.shard(0, 1)], basis).server.basis()[1]
    runs = start(LocalEngine(2), {n: Worker(n, s, basis, scaling, Update()) for n, s in shards.items()})
    summed = PooledBound(runs, list("abc"), basis)
    loss = summed.loss().item()
    runs.stop()
    value, gradients = pooled(basis, gaussian.x, gaussian.y)
    assert summed.bounds == [pytest.approx(value, rel=tolerance)]
    assert loss == pytest.approx(-value / gaussian.y.numel(), rel=tolerance)
    assert len(gradients) == (4 if kind == "matern" else 8)
    for parameter, expected in zip(summed.parameters, gradients, strict=True):
        found = -gaussian.y.numel() * parameter.grad
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_inducing_inputs_close_together_cost_no_digits(gaussian):
    """Where whitening the sums, in place of the rows, would cost all of them: K_uu's condition number is over 1e9."""
    kernel = ScaleKernel(RBFKernel(ard_num_dims=2)).double()
    kernel.base_kernel.lengthscale = 3.0
    x, y = gaussian.x.repeat(50, 1), gaussian.y.repeat(50, 1)
    basis = replace(gaussian.basis, kernel=kernel.requires_grad_(False))
    assert torch.linalg.cond(basis.factor) ** 2 > 1e9
    found = learn_basis([(x[k::2], y[k::2]) for k in range(2)], basis, steps=1)
    expected = log_evidence([fit_site(basis, x, y)])
    assert found.bounds[0] == pytest.approx(expected, rel=1e-11)
    with pytest.raises(NumericalError, match="not positive definite"):
        pooled(basis, x, y)


def bound_in_one_graph(kernel, z, noise, x, y):
    """The bound of all rows in one automatic derivative, through the factor of K_uu too."""
    factor, _ = cholesky(covariance(kernel, z), "K_uu", FIRST_JITTER)
    v = solve_lower(factor, covariance(kernel, z, x))
    sums = Statistics(v @ v.mT, v @ y, y.square().sum(0), diagonal(kernel, x).sum(), len(x))
    return bound_of_whitened(sums, noise)


def test_the_iterates_are_those_of_pooled_training(gaussian):
    kernel = copy.deepcopy(gaussian.basis.kernel).requires_grad_(True)
    likelihood = copy.deepcopy(gaussian.basis.likelihood).requires_grad_(True)
    z = gaussian.basis.inducing_inputs.clone().requires_grad_()
    expected = []

    def loss():
        value = bound_in_one_graph(kernel, z, likelihood.noise[..., 0], gaussian.x, gaussian.y)
        expected.append(value.item())
        (-value / gaussian.y.numel()).backward()
        return -value.detach() / gaussian.y.numel()

    lbfgs(loss, [z, *kernel.parameters(), *likelihood.parameters()], 20, lambda value: None)
    found = learn_basis(thirds(gaussian), gaussian.basis, steps=20)
    assert len(expected) > 20 and found.bound > found.bounds[0] + 50
    assert_same_losses(found.bounds, expected, gaussian)
    assert (found.basis.inducing_inputs - z.detach()).abs().max() < 1e-8
    learned = [*found.basis.kernel.parameters(), *found.basis.likelihood.parameters()]
    for one, other in zip(learned, [*kernel.parameters(), *likelihood.parameters()], strict=True):
        assert (one - other).abs().max() < 1e-8
    assert found.server.log_evidence() == pytest.approx(found.bound, abs=1e-6)
    assert_same_total(found.server, found.basis, gaussian.x, gaussian.y)


def test_learning_ends_where_nothing_can_be_gained(gaussian):
    found = learn_basis(thirds(gaussian), gaussian.basis, steps=500)
    largest, before = (
        max(gradient.abs().max() for gradient in pooled(basis, gaussian.x, gaussian.y)[1])
        for basis in (found.basis, gaussian.basis)
    )
    assert largest < 1e-3 * before
    again = learn_basis(thirds(gaussian), found.basis, steps=20)
    assert again.bound - found.bound < 1.0


def test_shards_in_any_order_and_number(gaussian):
    shards = thirds(gaussian)
    one = learn_basis(shards, gaussian.basis, steps=10)
    other = learn_basis(dict(reversed(shards.items())), gaussian.basis, LocalEngine(3), steps=10)
    assert one.basis.id == other.basis.id and one.bounds == other.bounds
    for split in ([gaussian.shard(0, 1)], [gaussian.shard(k, 7) for k in (3, 6, 0, 1, 5, 2, 4)]):
        found = learn_basis(split, gaussian.basis, steps=10)
        assert_same_losses(found.bounds, one.bounds, gaussian)
        assert (found.basis.inducing_inputs - one.basis.inducing_inputs).abs().max() < 1e-8


def test_files_and_functions_as_shards(gaussian, tmp_path):
    shards = thirds(gaussian)
    table = pd.DataFrame(torch.cat(shards["a"], 1).numpy(), columns=["p", "q", "y1", "y2"])
    table.to_parquet(tmp_path / "a.parquet")
    mixed = shards | {"a": TableShard(tmp_path / "a.parquet", ("y1", "y2")), "b": lambda: shards["b"]}
    expected = learn_basis(shards, gaussian.basis, steps=3)
    assert_same_losses(learn_basis(mixed, gaussian.basis, steps=3).bounds, expected.bounds, gaussian)


def test_messages_do_not_grow_with_the_rows(gaussian):
    m, d, t, kernel = 30, 2, 2, 3
    for rows in (400, 90):
        x, y = gaussian.x[:rows], gaussian.y[:rows]
        found = learn_basis({"a": (x[::2], y[::2]), "b": (x[1::2], y[1::2])}, gaussian.basis, steps=2)
        state = found.message_bytes["ask statistics"]
        assert 0 <= state - 8 * (m * m + m * d + kernel) < 100  # and gpytorch's constants
        assert found.message_bytes["statistics"] == 8 * (m * m + m * t + t + 1)
        assert found.message_bytes["ask gradient"] == 8 * (m * m + m * t + 1) + state
        assert found.message_bytes["gradient"] == 8 * (m * d + kernel)


# -- networks ------------------------------------------------------------------------------------------------------


def diagonal_rows(n, seed):
    """A wave along a diagonal, which a kernel with a lengthscale an input is not good at."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    f = torch.sin(2 * (x[:, 0] + x[:, 1] - x[:, 2]))
    return x, (f + 0.1 * torch.randn(n, generator=generator, dtype=torch.float64))[:, None]


def held_out_density(found):
    """Mean log density (nats) of 500 rows that no worker has."""
    x, y = diagonal_rows(500, 1)
    return found.posterior.observed(x).log_prob(y[:, 0]).mean().item()


def test_a_learned_network_predicts_better(gaussian):
    """Than it did at the start, and than the learned kernel without a network."""
    x, y = diagonal_rows(300, 0)
    shards = [(x[k::3], y[k::3]) for k in range(3)]
    basis = deep_basis(x, dtype=torch.float32, extractor=MLP(4, (32, 32), 2))
    matern = ScaleKernel(MaternKernel(nu=2.5, ard_num_dims=4)).double()
    plain = Basis(matern, x[:25].clone(), gaussian_likelihood(1, 0.1, torch.device("cpu")))
    start, flat = fit(shards, basis), learn_basis(shards, plain, steps=50)
    deep = learn_basis(shards, basis, LocalEngine(1), steps=100)
    assert held_out_density(deep) > max(held_out_density(start), held_out_density(flat)) + 1.0
    assert next(deep.basis.kernel.extractor.parameters()).dtype == torch.float32
    assert_same_total(deep.server, deep.basis, x, y, 1e-5)


def test_a_network_of_bounded_spectral_norm_keeps_it():
    x, y = diagonal_rows(300, 0)
    extractor = ResidualMLP(4, width=8, depth=2)
    basis = deep_basis(x, extractor=extractor)
    found = learn_basis([(x[::2], y[::2]), (x[1::2], y[1::2])], basis, steps=40)
    moved = 0.0
    for one, before in zip(found.basis.kernel.modules(), basis.kernel.modules()):
        if isinstance(one, SoftSpectralLinear):
            assert torch.linalg.matrix_norm(one.normalized_weight(), 2) < 0.96
            moved = max(moved, (one.weight - before.weight).norm().item())
    assert moved > 0.1
    assert found.server.log_evidence() == pytest.approx(found.bound, rel=1e-8)


# -- epochs --------------------------------------------------------------------------------------------------------


class Watching(LocalEngine):
    """Notes what the server says whenever a worker is asked."""

    def __init__(self, server):
        super().__init__(1)
        self.server, self.seen = server, []

    def submit(self, name, method, *arguments):
        self.seen.append((method, self.server.total()))
        super().submit(name, method, *arguments)

    def wait(self):
        self.seen.append(("wait", self.server.total()))
        return super().wait()


def test_the_old_posterior_serves_until_the_last_site_is_there(gaussian, tmp_path):
    with PosteriorServer(tmp_path / "server.db") as server:
        before = fit(thirds(gaussian), gaussian.basis, server=server).server.total()
        engine = Watching(server)
        found = learn_basis(thirds(gaussian), gaussian.basis, engine, server=server, steps=5)
        assert {method for method, _ in engine.seen} == {"statistics", "gradient", "step", "wait"}
        for _, total in engine.seen:  # the last of them before the last site is put
            assert total.basis_id == gaussian.basis.id and torch.equal(total.shift, before.shift)
        assert found.waiting == []
        assert_same_total(server, found.basis, gaussian.x, gaussian.y)
        assert [basis["state"] for basis in server.status()["bases"]] == ["serving"]
    with PosteriorServer(tmp_path / "server.db") as server:
        assert_same_total(server, found.basis, gaussian.x, gaussian.y)


@pytest.mark.parametrize("puts", [0, 2])
def test_killed_between_registration_and_the_last_site(gaussian, tmp_path, puts):
    path, shards = tmp_path / "server.db", thirds(gaussian)
    with PosteriorServer(path) as server:
        before = fit(shards, gaussian.basis, server=server).server.total()
    rows = {f"{kind} {name}": part for name, pair in shards.items() for kind, part in zip("xy", pair)}
    torch.save(rows, tmp_path / "rows")
    child = Path(__file__).with_name("killed_learning.py")
    done = subprocess.run(
        [sys.executable, str(child), str(path), str(tmp_path / "rows"), str(puts)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL and done.stdout == "", done.stderr
    with PosteriorServer(path) as server:
        serving_now, opened = server.status()["bases"]
        assert serving_now["basis_id"] == gaussian.basis.id and len(opened["sites"]) == puts
        assert torch.equal(server.total().shift, before.shift)
        with pytest.raises(OptionError, match="is not complete"):
            learn_basis(shards, gaussian.basis, server=server)
        basis, scaling = server.basis()
        assert basis.id == opened["basis_id"] != gaussian.basis.id
        fit(shards, basis, server=server, scaling=scaling)
        assert_same_total(server, basis, gaussian.x, gaussian.y)
        assert server.log_evidence() > before_evidence(gaussian) + 1
    with PosteriorServer(path) as server:
        assert_same_total(server, basis, gaussian.x, gaussian.y)


def before_evidence(problem):
    return log_evidence([fit_site(problem.basis, problem.x, problem.y)])


def test_units_of_the_data_are_those_of_the_server(gaussian):
    """Rows in other units, which the server knows: no scaling need be given again."""
    one = torch.ones(2, dtype=torch.float64)
    scaling = Scaling(one, one, 3 * one, 2 * one, 5 * one, 4 * one)
    shards = {name: (2 * x + 3, 4 * y + 5) for name, (x, y) in thirds(gaussian).items()}
    server = fit(shards, gaussian.basis, scaling=scaling).server
    found = learn_basis(shards, gaussian.basis, server=server, steps=3)
    assert found.scaling is scaling and server.basis()[1] is scaling
    assert_same_total(server, found.basis, gaussian.x, gaussian.y)
    fit(shards, found.basis, server=server)
    assert_same_total(server, found.basis, gaussian.x, gaussian.y)
    assert learn_basis(shards, found.basis, server=server, steps=1).bounds[0] > found.bounds[-2]
    alone = learn_basis(thirds(gaussian), gaussian.basis, steps=3)
    assert_same_losses(found.bounds, alone.bounds, gaussian)


# -- what goes wrong -----------------------------------------------------------------------------------------------


class Failing(LocalEngine):
    """Answers for one worker with an error, once it has answered so often."""

    def __init__(self, name, answers, error):
        super().__init__(1)
        self.name, self.left, self.error = name, answers, error

    def wait(self):
        name, answer = super().wait()
        if name == self.name:
            self.left -= 1
            if self.left < 0:
                if isinstance(self.error, KeyboardInterrupt):
                    raise self.error
                return name, self.error
        return name, answer


def test_a_worker_that_is_gone_is_named_and_learning_goes_on_from_there(gaussian):
    server = fit(thirds(gaussian), gaussian.basis).server
    engine = Failing("b", 21, ServerError("The actor of 'b' died"))
    with pytest.raises(LearningStopped, match="'b'.*died.*without=") as stopped:
        learn_basis(thirds(gaussian), gaussian.basis, engine, server=server)
    reached = stopped.value.learned
    assert len(reached.bounds) == 10 and [b["state"] for b in server.status()["bases"]] == ["serving"]
    assert server.total().basis_id == gaussian.basis.id
    assert pooled(reached.basis, gaussian.x, gaussian.y)[0] == pytest.approx(max(reached.bounds), abs=1e-6)
    rest = learn_basis(thirds(gaussian), reached.basis, server=server, steps=60)
    whole = learn_basis(thirds(gaussian), gaussian.basis, steps=60)
    assert rest.bounds[0] == pytest.approx(max(reached.bounds), rel=1e-12)
    assert abs(rest.bound - whole.bound) < 0.01 * (whole.bound - whole.bounds[0])


def test_a_worker_that_is_gone_after_learning(gaussian):
    server = fit(thirds(gaussian), gaussian.basis).server
    counted = learn_basis(thirds(gaussian), gaussian.basis, steps=5)
    engine = Failing("b", 2 * len(counted.bounds), OSError("no disk"))
    with pytest.raises(LearningStopped, match="'b'.*no disk") as stopped:
        learn_basis(thirds(gaussian), gaussian.basis, engine, server=server, steps=5)
    assert stopped.value.learned.basis.id == counted.basis.id
    assert server.total().basis_id == gaussian.basis.id and server.total().count == 400
    fit(thirds(gaussian), stopped.value.learned.basis, server=server)
    assert_same_total(server, counted.basis, gaussian.x, gaussian.y)


def test_an_epoch_that_somebody_opens_meanwhile_does_not_lose_what_is_learned(gaussian):
    server = fit(thirds(gaussian), gaussian.basis).server
    other = replace(gaussian.basis, inducing_inputs=gaussian.basis.inducing_inputs + 0.1)

    class Meanwhile(LocalEngine):
        def wait(self):
            server.register_basis(other)
            return super().wait()

    with pytest.raises(LearningStopped, match="is learned.*not complete") as stopped:
        learn_basis(thirds(gaussian), gaussian.basis, Meanwhile(), server=server, steps=2)
    server.abandon_epoch()
    fit(thirds(gaussian), stopped.value.learned.basis, server=server)
    assert_same_total(server, stopped.value.learned.basis, gaussian.x, gaussian.y)


def test_rows_are_not_left_out_unless_it_is_said(gaussian):
    shards = thirds(gaussian)
    server = fit(shards, gaussian.basis).server
    two = {name: shards[name] for name in "ac"}
    with pytest.raises(OptionError, match="site of 'b'.*without="):
        learn_basis(two, gaussian.basis, server=server)
    with pytest.raises(OptionError, match="'z' names no shard"):
        learn_basis(shards, gaussian.basis, server=server, without=["z"])
    with pytest.raises(OptionError, match="names all"):
        learn_basis(two, gaussian.basis, server=server, without=["a", "b", "c"])
    found = learn_basis(shards, gaussian.basis, server=server, steps=5, without=["b"])
    alone = learn_basis(two, gaussian.basis, steps=5)
    assert found.bounds == alone.bounds
    assert found.waiting == ["b"] and server.total().basis_id == gaussian.basis.id
    assert server.total(found.basis.id).count == len(two["a"][0]) + len(two["c"][0])
    server.remove("b")
    assert found.waiting == [] and server.total().basis_id == found.basis.id


def test_ctrl_c_leaves_the_best_basis_and_the_server_alone(gaussian):
    server = fit(thirds(gaussian), gaussian.basis).server
    found = learn_basis(
        thirds(gaussian), gaussian.basis, Failing("b", 12, KeyboardInterrupt()), server=server
    )
    assert found.interrupted and len(found.bounds) == 6
    assert [basis["basis_id"] for basis in server.status()["bases"]] == [gaussian.basis.id]
    assert pooled(found.basis, gaussian.x, gaussian.y)[0] == pytest.approx(found.bound, abs=1e-6)
    assert not learn_basis(thirds(gaussian), gaussian.basis, steps=1).interrupted


def test_a_worker_whose_numbers_overflow_is_a_step_too_far(gaussian):
    """Once: the search turns back. At the start: an error that names it."""
    found = learn_basis(thirds(gaussian), gaussian.basis, Overflowing("b", 6), steps=10)
    assert found.bound > found.bounds[0] + 10 and found.bound == max(found.bounds)
    with pytest.raises(NumericalError, match="worker 'b'"):
        learn_basis(thirds(gaussian), gaussian.basis, Overflowing("b", 0))
    with pytest.raises(NumericalError, match="worker 'b'"):
        learn_basis(thirds(gaussian), gaussian.basis, Overflowing("b", 0), optimiser="adam")


class Overflowing(LocalEngine):
    """Answers for one worker hold an infinite number: one of them, or all from the start."""

    def __init__(self, name, which):
        super().__init__(1)
        self.name, self.which, self.count = name, which, 0

    def wait(self):
        name, answer = super().wait()
        if name == self.name:
            self.count += 1
            if hasattr(answer, "outer") and (self.which == 0 or self.count - 1 == self.which):
                answer.outer[0, 0] = math.inf
        return name, answer


@pytest.mark.parametrize("what, words", [("nan", "row 3 of x"), ("empty", "no rows"), ("columns", "shape")])
def test_bad_rows_are_named_and_change_nothing(gaussian, what, words):
    server = fit(thirds(gaussian), gaussian.basis).server
    shards = thirds(gaussian)
    x, y = (part.clone() for part in shards["b"])
    if what == "nan":
        x[3, 0] = math.nan
    elif what == "empty":
        x, y = x[:0], y[:0]
    else:
        x = x[:, :1]
    with pytest.raises(LearningStopped, match=f"'b'.*{words}") as stopped:
        learn_basis(shards | {"b": (x, y)}, gaussian.basis, server=server)
    assert stopped.value.learned.bounds == [] and stopped.value.learned.basis.id == gaussian.basis.id
    assert [basis["basis_id"] for basis in server.status()["bases"]] == [gaussian.basis.id]


def test_options(gaussian, binary):
    with pytest.raises(OptionError, match="Gaussian noise.*`fit`"):
        learn_basis([binary.shard(0, 1)], binary.basis)
    function = NoiseFunction(gaussian.x[:5].clone(), torch.zeros(5, dtype=torch.float64))
    with pytest.raises(OptionError, match="varies over the inputs"):
        learn_basis([gaussian.shard(0, 1)], replace(gaussian.basis, noise_function=function))
    with pytest.raises(OptionError, match="at least 1"):
        learn_basis([gaussian.shard(0, 1)], gaussian.basis, steps=0)
    with pytest.raises(OptionError, match="no shard"):
        learn_basis([], gaussian.basis)
    with pytest.raises(OptionError, match="does not exist"):
        learn_basis([gaussian.shard(0, 1)], gaussian.basis, "spark")


# -- Ray -----------------------------------------------------------------------------------------------------------


def killing_ray(name, gradients, restarts):
    """An engine that kills the actor of a worker with its so many-th gradient asked for."""
    from fspace.server.ray_engine import RayEngine

    class Killing(RayEngine):
        left = gradients

        def submit(self, worker, method, *arguments):
            super().submit(worker, method, *arguments)
            if worker == name and method == "gradient":
                self.left -= 1
                if self.left == 0:
                    self._ray.kill(self._actors[worker], no_restart=False)

    return Killing(restarts=restarts)


@pytest.mark.slow
def test_ray_learns_the_same_through_the_death_of_a_worker(gaussian):
    basis = deep_basis(gaussian.x, 2)
    server = fit(thirds(gaussian), basis).server
    expected = learn_basis(thirds(gaussian), basis, steps=8)
    engine = killing_ray("b", 4, 3)
    found = learn_basis(thirds(gaussian), basis, engine, server=server, steps=8)
    assert engine.left < 0
    assert found.bounds == pytest.approx(expected.bounds, rel=1e-8)
    assert_same_total(server, found.basis, gaussian.x, gaussian.y)


@pytest.mark.slow
def test_ray_names_a_worker_that_is_gone_for_good(gaussian):
    with pytest.raises(LearningStopped, match="actor of 'b' died more than 0 times") as stopped:
        learn_basis(thirds(gaussian), gaussian.basis, killing_ray("b", 4, 0))
    assert len(stopped.value.learned.bounds) == 3


# -- HTTP ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trip(tmp_path, front):
    """A server with a model of 60 rows behind HTTP, and two tables of 30 more; rows of each in the basis' units."""
    generator = torch.Generator().manual_seed(4)
    x = 4 * torch.rand(120, 1, generator=generator) - 2
    y = 10 * torch.sin(2 * x) + torch.randn(120, 1, generator=generator)
    table = pd.DataFrame(torch.cat([x, y], 1).double().numpy(), columns=["x", "y"])
    model = GPRegressor(kernel="matern", inducing=12, inference="collapsed", progress=False)
    model.fit(table[["x"]][:60], table["y"][:60])
    model.save(tmp_path / "model.fspace")
    server = PosteriorServer()
    register_model(server, str(tmp_path / "model.fspace"))
    served = front(server)
    member = heaviest(model)
    basis = replace(member.basis, noise_function=None)
    addresses, rows = {}, {}
    for k, name in enumerate(("UA", "AA")):
        table[60 + k :: 2].to_csv(tmp_path / f"{name}.csv", index=False)
        (tmp_path / f"{name}.token").write_text(served.token(name))
        addresses[name] = Address(served.url, str(tmp_path / f"{name}.token")), str(tmp_path / f"{name}.csv")
        rows[name] = table_rows(model, member.basis, member.scaling, addresses[name][1])
    return server, served, basis, member.scaling, addresses, rows


def test_http_workers_follow_to_a_learned_basis(trip):
    server, served, basis, scaling, addresses, rows = trip
    for name, (address, data) in addresses.items():
        work(address, data, name, 1, lambda _: None)
    old = server.total()
    learned = learn_basis(rows, basis, steps=10)
    with RemoteServer(served.url, served.admin) as admin:
        admin.register_basis(learned.basis, scaling)
    said = []
    for name, (address, data) in addresses.items():
        assert torch.equal(server.total().shift, old.shift)
        assert work(address, data, name, 1, said.append).basis_id == learned.basis.id
    assert not any("anew" in line for line in said)
    x, y = (torch.cat([rows[name][k] for name in ("UA", "AA")]) for k in (0, 1))
    assert_same_total(server, learned.basis, x, y, 1e-9)


@pytest.mark.parametrize("when", ["opens", "ends"])
def test_a_http_worker_notices_a_change_while_it_works(trip, monkeypatch, when):
    """An epoch opens: its site goes to both bases. One ends (without it, which had no site): only to the new one."""
    server, _, basis, scaling, addresses, rows = trip
    work(*addresses["UA"], "UA", 1, lambda _: None)
    first = server.basis()[0]
    learned = learn_basis({"UA": rows["UA"]}, basis, steps=3).basis
    made = []

    def meanwhile(on, *arguments):
        if not made:
            server.register_basis(learned, scaling)
            if when == "ends":
                server.put(fit_site(learned, *rows["UA"], site_id="UA"))
        made.append(on.id)
        return new_site(on, *arguments)

    new_site = serving.new_site
    monkeypatch.setattr(serving, "new_site", meanwhile)
    said = []
    site = work(*addresses["AA"], "AA", 1, said.append)
    assert made == [first.id, learned.id] and site.basis_id == learned.id
    assert sum("anew" in line for line in said) == 1
    assert server.get("AA", learned.id) is not None
    if when == "opens":
        assert server.total().basis_id == first.id and server.get("AA", first.id) is not None
        server.put(fit_site(learned, *rows["UA"], site_id="UA"))
    x, y = (torch.cat([rows[name][k] for name in ("UA", "AA")]) for k in (0, 1))
    assert_same_total(server, learned, x, y, 1e-9)
