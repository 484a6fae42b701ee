"""Bayesian optimisation: BoTorch's own values, conditioning against refits, spaces of all kinds, a killed process."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from botorch.acquisition import qLogExpectedImprovement, qLogNoisyExpectedImprovement, qUpperConfidenceBound
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.models import SingleTaskGP
from botorch.models.model import ModelList
from botorch.sampling.get_sampler import get_sampler
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ZeroMean

import fspace
from fspace.decisions import Optimizer, Space, optimize
from fspace.decisions.acquisitions import acquisition, candidates
from fspace.decisions.space import parse_constraint
from fspace.errors import DataError, InfeasibleError, ModelFileError, OptionError
from fspace.inference.numerics import seeded
from fspace.posterior import FunctionDraws, FunctionPosterior, MixturePosterior
from fspace.predictive import Samples


def rows(n, d=2, seed=0):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed)).double()


def botorch_gp(x, y, lengthscale=0.3, scale=1.0, noise=0.1):
    """BoTorch's own exact GP of the same parameters."""
    kernel = ScaleKernel(MaternKernel(nu=2.5))
    kernel.outputscale, kernel.base_kernel.lengthscale = scale, lengthscale
    likelihood = GaussianLikelihood()
    likelihood.noise = noise
    model = SingleTaskGP(
        x,
        y[:, None],
        likelihood=likelihood,
        covar_module=kernel,
        mean_module=ZeroMean(),
        outcome_transform=None,
    )
    return model.double().eval()


@pytest.fixture
def both(known_gp):
    x = rows(9)
    y = torch.sin(5 * x[:, 0]) + x[:, 1]
    return x, y, known_gp(x, y, kernel="matern"), botorch_gp(x, y)


@pytest.mark.parametrize("name", ["qLogNEI", "qLogEI", "qUCB"])
@pytest.mark.parametrize("q", [1, 3])
def test_acquisition_values_equal_botorch(both, name, q):
    x, y, ours, theirs = both
    candidates = rows(20 * q, seed=3).reshape(20, q, 2)
    function = acquisition(name, [ours], x, y[:, None], 1, pending=rows(1, seed=9), seed=4)
    options = {
        "model": theirs,
        "sampler": get_sampler(theirs.posterior(x[:1]), torch.Size([128]), seed=4),
        "X_pending": rows(1, seed=9),
    }
    want = {
        "qLogNEI": lambda: qLogNoisyExpectedImprovement(
            X_baseline=x, prune_baseline=True, cache_root=False, **options
        ),
        "qLogEI": lambda: qLogExpectedImprovement(best_f=y.max(), **options),
        "qUCB": lambda: qUpperConfidenceBound(beta=4.0, **options),
    }[name]
    with seeded(4):
        want = want()
    values, right = function(candidates), want(candidates)
    assert torch.allclose(values, right, atol=1e-5)
    other = botorch_gp(x, y, lengthscale=0.33)  # the twin: a GP that is not the same
    options["model"] = other
    twin = qUpperConfidenceBound(beta=4.0, **options) if name == "qUCB" else None
    assert twin is None or not torch.allclose(values, twin(candidates), atol=1e-3)


def test_hypervolume_equals_botorch(known_gp):
    x = rows(8)
    y = torch.stack([x[:, 0], -x[:, 0] + torch.sin(4 * x[:, 1])], -1)
    ours = [known_gp(x, y[:, k], kernel="matern") for k in range(2)]
    theirs = ModelList(*(botorch_gp(x, y[:, k]) for k in range(2)))
    point = torch.tensor([-0.5, -1.5]).double()
    function = acquisition("qLogNEHVI", ours, x, y, 2, reference_point=point, seed=4)
    sampler = get_sampler(theirs.posterior(x[:1]), torch.Size([128]), seed=4)
    with seeded(4):
        want = qLogNoisyExpectedHypervolumeImprovement(
            theirs, point, x, sampler=sampler, prune_baseline=True, cache_root=False
        )
    candidates = rows(10, seed=3)[:, None]
    assert torch.allclose(function(candidates), want(candidates), atol=1e-5)


def test_conditioning_equals_a_refit_at_fixed_parameters(known_gp):
    x, new, at = rows(10), rows(4, seed=1), rows(30, seed=2)
    f = lambda z: torch.cos(4 * z[:, 0]) * z[:, 1]  # noqa: E731
    whole = known_gp(torch.cat([x, new]), f(torch.cat([x, new])), kernel="matern")
    grown = known_gp(x, f(x), kernel="matern")
    for row in new:
        grown = grown.condition(row[None], f(row[None]))
    assert torch.allclose(grown.latent(at).mean, whole.latent(at).mean, atol=1e-8, rtol=0)
    assert torch.allclose(grown.latent(at).covariance, whole.latent(at).covariance, atol=1e-8, rtol=0)
    everything = torch.cat([x, new])
    values = [
        acquisition("qLogNEI", [p], everything, f(everything)[:, None], 1, seed=1)(at[:, None])
        for p in (grown, whole)
    ]
    assert torch.allclose(values[0], values[1], atol=1e-5)


def test_the_optimiser_conditions_between_fits(known_gp):
    """With parameters that never move, its model equals a fit to everything, whenever it was fitted last."""
    fits = []

    def model(z, y):
        fits.append(len(z))
        return known_gp(z, y, kernel="matern")

    optimizer = Optimizer({"a": (0.0, 1.0), "b": (0.0, 1.0)}, model=model, refit=2.0, objectives="maximize")
    z = rows(12)
    for i, row in enumerate(z.tolist()):
        optimizer.tell({"a": row[0], "b": row[1]}, row[0] - row[1])
        if i:
            posterior = optimizer.posteriors()["y"]
    assert fits == [2, 4, 8]
    whole = known_gp(z, z[:, 0] - z[:, 1], kernel="matern")
    at = rows(20, seed=5)
    assert torch.allclose(posterior.latent(at).mean, whole.latent(at).mean, atol=1e-8, rtol=0)
    assert torch.allclose(posterior.latent(at).variance, whole.latent(at).variance, atol=1e-8, rtol=0)


def bowl(c):
    return (c["x"] - 0.3) ** 2 + (c["z"] - 0.8) ** 2


BOX = {"x": (0.0, 1.0), "z": (0.0, 1.0)}


@pytest.mark.parametrize(
    "name", ["qLogNEI", "thompson", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qLogEI", "qUCB"))]
)
def test_a_bowl_is_found(name):
    found = optimize(bowl, BOX, 12, acquisition=name, progress=False)
    random = min(bowl(c) for c in found.space.decode(found.space.sample(12, 0)))
    assert found.best.values["y"] < min(0.003, random)
    assert len(found.seconds) == 12


def test_searches_start_near_all_that_none_is_better_than():
    """Steps from both ends of the front and from nothing else, beside random ones; in the space, none tried before."""
    space = Space({"x": (0.0, 1.0), "z": (0.0, 1.0)}, ["x + z <= 1.2"])
    x = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.5, 0.5]]).double()
    y = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]).double()
    found = candidates(space, x, y, 2, [], x, seed=0)
    assert bool(space.feasible(found).all()) and not bool((torch.cdist(found, x) < 1e-9).any())
    near = (torch.cdist(found, x) < 0.01).sum(0)
    assert near[0] > 50 and near[1] > 50 and near[2] < 10
    only = candidates(space, x, y, 2, [(torch.tensor([1.0, 0.0]).double(), 0.5)], x, seed=0)
    near = (torch.cdist(only, x) < 0.01).sum(0)
    assert near[0] < 10 and near[1] > 100


def test_a_mixed_space():
    """The best is x = 0.2 with n = 3 of kind b."""

    def f(c):
        return (c["x"] - 0.2) ** 2 + 0.3 * (c["n"] - 3) ** 2 + (0.0 if c["kind"] == "b" else 0.5)

    space = {"x": (0.0, 1.0), "n": range(6), "kind": ["a", "b", "c"]}
    best = optimize(f, space, 18, progress=False).best.configuration
    assert (best["n"], best["kind"]) == (3, "b") and abs(best["x"] - 0.2) < 0.15
    assert isinstance(best["n"], int)


@pytest.mark.slow
def test_constraints_on_settings_and_on_outcomes():
    """Without them the best is (0.3, 0.8); x + z <= 0.9 and heat = z <= 0.6 leave (0.3, 0.6)."""
    measured = lambda c: {"y": bowl(c), "heat": c["z"]}  # noqa: E731
    found = optimize(measured, BOX, 11, constraints=["x + z <= 0.9", "heat <= 0.6"], progress=False)
    assert all(t.configuration["x"] + t.configuration["z"] <= 0.9 + 1e-9 for t in found.told)
    best = found.best
    assert best.values["heat"] <= 0.6
    assert best.values["y"] < 0.04 + 0.02


@pytest.mark.slow
def test_two_objectives_and_batches():
    f = lambda c: {"near": -abs(c["x"] - 0.2), "far": abs(c["x"] - 0.7) + c["z"]}  # noqa: E731
    found = optimize(f, BOX, 12, 3, False, objectives={"near": "maximize", "far": "minimize"}, initial=6)
    front = found.pareto
    assert len(found.told) == 12 and not found.pending
    for one in front:
        for other in found.told:
            better = other.values["near"] >= one.values["near"] and other.values["far"] < one.values["far"]
            assert not better
    assert min(t.configuration["z"] for t in front) < 0.05
    with pytest.raises(OptionError, match="pareto"):
        found.best  # noqa: B018


@pytest.mark.slow
def test_mixtures_drive_it(known_gp):
    model = lambda z, y: MixturePosterior(  # noqa: E731
        [known_gp(z, y, lengthscale=s, kernel="matern", noise=1e-3) for s in (0.2, 0.6)]
    )
    assert optimize(bowl, BOX, 12, model=model, progress=False).best.values["y"] < 0.02


class Ensemble(FunctionPosterior):
    """Quadratic fits to resampled rows: predicts samples, and cannot be conditioned, like networks."""

    num_inputs = 2

    def __init__(self, x, y):
        generator = torch.Generator().manual_seed(len(x))
        self.weights = []
        for _ in range(16):
            rows = torch.randint(len(x), (len(x),), generator=generator)
            h = self.features(x[rows])
            self.weights.append(torch.linalg.solve(h.mT @ h + 1e-3 * torch.eye(5), h.mT @ y[rows]))

    def features(self, x):
        return torch.cat([torch.ones(len(x), 1), x, x.square()], 1).double()

    def latent(self, x):
        return Samples(torch.stack([self.features(x) @ w for w in self.weights]))

    def observed(self, x):
        return Samples(self.latent(x).values, 1e-4)

    def draw(self, n=1, seed=None):
        pick = torch.randint(16, (n,), generator=torch.Generator().manual_seed(seed or 0))
        return FunctionDraws([lambda x, w=self.weights[i]: self.features(x) @ w for i in pick])


def test_a_posterior_of_samples_drives_thompson_sampling():
    fits = []

    def model(x, y):
        fits.append(len(x))
        return Ensemble(x, y)

    found = optimize(bowl, BOX, 14, model=model, acquisition="thompson", refit=2.0, progress=False)
    assert found.best.values["y"] < 0.003
    assert len(fits) == 10  # anew at every step, since it cannot be conditioned


def test_pending_ones_are_not_asked_again():
    optimizer = Optimizer({"n": range(3), "k": ["a", "b"]}, initial=2)
    asked = optimizer.ask(6)
    assert len({(c["n"], c["k"]) for c in asked}) == 6
    with pytest.raises(InfeasibleError, match="All 6 settings"):
        optimizer.ask()


@pytest.mark.slow
def test_all_of_a_small_space_is_tried_once():
    optimizer = optimize(lambda c: c["n"], {"n": range(4), "k": ["a", "b"]}, 8, progress=False, initial=3)
    assert len({(t.configuration["n"], t.configuration["k"]) for t in optimizer.told}) == 8
    assert optimizer.best.values["y"] == 0


def test_a_state_goes_on_as_if_nothing_had_happened(tmp_path):
    options = {"objectives": "minimize", "seed": 3, "state": tmp_path / "state.json"}
    first = Optimizer(BOX, **options)
    for configuration in first.ask(5):
        first.tell(configuration, bowl(configuration))
    waiting = first.ask(1)
    second = Optimizer(BOX, **options)
    assert second.told == first.told and second.pending == waiting
    assert second.ask() == first.ask()
    with pytest.raises(OptionError, match="another space"):
        Optimizer({"x": (0.0, 2.0), "z": (0.0, 1.0)}, **options)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ModelFileError, match="no state"):
        Optimizer(BOX, **options)


@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 2))])
def test_killing_loses_nothing_that_was_told(tmp_path, seed):
    path = tmp_path / "state.json"
    script = Path(__file__).with_name("killed_optimizer.py")
    process = subprocess.Popen([sys.executable, str(script), str(path)], stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(3)]
    time.sleep(0.02 + 0.031 * seed)
    os.kill(process.pid, signal.SIGKILL)
    lines += process.stdout.read().splitlines()
    process.wait()
    told = [float(line) for line in lines if line.strip()][: len(lines) - 1]  # the last line may be cut
    kept = [t.values["y"] for t in Optimizer({"x": (0.0, 1.0), "n": range(5)}, state=path).told]
    assert len(told) >= 2
    assert kept[: len(told)] == told
    assert len(kept) <= len(told) + 2
    assert json.loads(path.read_text())["optimizer"] == 1


def test_noise_may_be_told_twice():
    optimizer = Optimizer(BOX)
    optimizer.tell([{"x": 0.5, "z": 0.5}] * 2, [1.0, 1.1])
    optimizer.tell({"x": 0.1, "z": 0.5}, 0.2)
    assert len(optimizer.posteriors()["y"].sites) == 1
    optimizer.initial = 0
    optimizer.ask()


def test_what_failed_is_dropped():
    optimizer = Optimizer(BOX)
    (asked,) = optimizer.ask()
    optimizer.drop(asked)
    assert not optimizer.pending
    with pytest.raises(DataError, match="not pending"):
        optimizer.drop(asked)


@pytest.mark.parametrize(
    "text, terms, bound",
    [
        ("a <= 3", {"a": 1.0}, 3.0),
        ("2*a - b >= -1.5", {"a": -2.0, "b": 1.0}, 1.5),
        ("a + 1e-1 b + a <= 0", {"a": 2.0, "b": 0.1}, 0.0),
    ],
)
def test_constraints_are_read(text, terms, bound):
    assert parse_constraint(text) == (terms, bound)


def test_encoding_goes_there_and_back():
    space = Space({"x": (-2.0, 3.0), "n": range(-1, 4), "k": ["a", 2]})
    z = space.sample(40, 0)
    assert torch.allclose(space.encode(space.decode(z)), z, atol=1e-12)
    assert Space.from_state(json.loads(json.dumps(space.state()))).settings == space.settings
    counts = np.unique([c["n"] for c in space.decode(space.sample(1024, 1))], return_counts=True)[1]
    assert len(counts) == 5 and counts.min() > 0.8 * 1024 / 5


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda o: Optimizer(BOX, constraints=["x + z >= 3"]), InfeasibleError, "No setting"),
        (
            lambda o: Optimizer({"n": range(3)}, constraints=["2 n <= 1", "2 n >= 1"]),
            InfeasibleError,
            "random settings",
        ),
        (lambda o: Optimizer(BOX, constraints=["x + heat <= 3"]), OptionError, "mixes"),
        (lambda o: Optimizer(BOX, constraints=["x < 3"]), OptionError, "write it"),
        (lambda o: Optimizer(BOX, constraints=["x * z <= 3"]), OptionError, "number times a name"),
        (lambda o: Optimizer(BOX, acquisition="EI"), OptionError, "does not exist"),
        (lambda o: Optimizer(BOX, acquisition="qLogNEHVI"), OptionError, "does not fit"),
        (lambda o: Optimizer(BOX, "best"), OptionError, "no goal"),
        (lambda o: Optimizer({}), OptionError, "no settings"),
        (lambda o: Optimizer({"x": (1.0, 0.0)}), OptionError, "x=\\(1.0"),
        (lambda o: Optimizer({"k": ["a", "a"]}), OptionError, "differ"),
        (lambda o: o.tell({"x": 0.5, "z": 0.5}, math.nan), DataError, "drop"),
        (lambda o: o.tell({"x": 0.5}, 1.0), DataError, "but the space"),
        (lambda o: o.tell({"x": 1.5, "z": 0.5}, 1.0), DataError, "outside"),
        (lambda o: o.tell({"x": 0.5, "z": 0.5}, {"loss": 1.0}), DataError, "outcomes"),
        (lambda o: o.tell([], []), DataError, "0 results"),
        (lambda o: o.best, DataError, "Nothing"),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call(Optimizer(BOX))


def test_nothing_feasible_is_said():
    optimizer = Optimizer(BOX, constraints=["heat <= 1"])
    optimizer.tell({"x": 0.5, "z": 0.5}, {"y": 1.0, "heat": 2.0})
    with pytest.raises(InfeasibleError, match="None of 1"):
        optimizer.best  # noqa: B018
    optimizer.tell({"x": 0.4, "z": 0.5}, {"y": 1.0, "heat": 3.0})
    optimizer.initial = 0
    optimizer.ask()  # goes where it may be fulfilled


def test_an_estimator_is_the_model():
    model = fspace.GPRegressor(kernel="rbf", progress=False)
    assert optimize(bowl, BOX, 10, model=model, progress=False).best.values["y"] < 0.05
    assert not hasattr(model, "posterior_")


NETWORKS = ("ensemble", "laplace", "functional_laplace", "hmc", "swag")


@pytest.mark.parametrize(
    "name",
    [
        "neural",
        "ensemble",
        "laplace",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("deep", *NETWORKS[2:])),
    ],
)
def test_models_by_name_find_the_bowl(name):
    """After 12 random values the best of the mean is in the better tenth of the square, and what is asked is new."""
    optimizer = Optimizer(BOX, model=name, initial=12)
    for configuration in optimizer.ask(12):
        optimizer.tell(configuration, bowl(configuration))
    at = optimizer.space.sample(200, 9)
    values = torch.tensor([bowl(c) for c in optimizer.space.decode(at)])
    best = optimizer.posteriors()["y"].latent(at).mean.argmax()
    assert values[best] < values.sort().values[20]
    asked = optimizer.ask(2)
    assert torch.cdist(optimizer.space.encode(asked), optimizer._data()[0]).min() > 1e-4
    with pytest.raises(OptionError, match="'guess' does not exist; choose one of matern"):
        Optimizer(BOX, model="guess")


def test_networks_under_constraints_and_with_thompson_sampling():
    """Two outcomes by networks, which are not conditioned but fitted anew at each step."""
    model = fspace.BNNRegressor(
        "ensemble", hidden=(16,), epochs=300, likelihood="gaussian", batch_size=64, progress=False
    )
    measured = lambda c: {"y": bowl(c), "heat": c["z"]}  # noqa: E731
    optimizer = Optimizer(BOX, constraints=["heat <= 0.6"], model=model, initial=10)
    for configuration in optimizer.ask(10):
        optimizer.tell(configuration, measured(configuration))
    (first,) = optimizer.ask()
    assert first["z"] < 0.75
    before = optimizer.posteriors()["y"]
    optimizer.tell(first, measured(first))
    assert optimizer.posteriors()["y"] is not before
    optimizer.acquisition = "thompson"
    assert optimizer.ask()[0] != first


def _noisy(seed, **options):
    """60 settings x in [0, 1] with outcomes (x - 0.3)^2 + noise of deviation 0.1, and c = x + noise."""
    rng = np.random.default_rng(seed)
    optimizer = Optimizer({"x": (0.0, 1.0)}, {"y": "minimize"}, seed=seed, **options)
    for x in np.linspace(0.0, 1.0, 60):
        values = {"y": (x - 0.3) ** 2 + 0.1 * rng.standard_normal(), "c": x + 0.05 * rng.standard_normal()}
        optimizer.tell({"x": float(x)}, {name: values[name] for name in optimizer.outcomes})
    return optimizer


def test_what_is_recommended_is_the_best_expected_and_not_the_luckiest():
    from scipy.stats import ttest_rel

    lucky, recommended = [], []
    for seed in range(8):
        optimizer = _noisy(seed)
        lucky.append((optimizer.best.configuration["x"] - 0.3) ** 2)
        found = optimizer.recommended
        recommended.append((found.configuration["x"] - 0.3) ** 2)
        assert found.values["y"] > optimizer.best.values["y"]  # the luckiest is below what is to be expected
        x, y = optimizer._data()
        mean = optimizer.posteriors()["y"].latent(x).mean.reshape(-1)
        assert found.values["y"] == pytest.approx(-float(mean.max()), abs=1e-12)
    assert ttest_rel(lucky, recommended, alternative="greater").pvalue < 0.05


def test_what_is_recommended_is_expected_to_fulfil_the_constraints():
    found = _noisy(0, constraints=["c >= 0.6"]).recommended
    assert 0.55 < found.configuration["x"] < 0.68
    assert found.values["c"] >= 0.6
    with pytest.raises(InfeasibleError, match="None of 60 configurations is expected to fulfil 'c >= 2'"):
        _ = _noisy(0, constraints=["c >= 2"]).recommended
    with pytest.raises(DataError, match="Nothing was told"):
        _ = Optimizer({"x": (0.0, 1.0)}).recommended
    with pytest.raises(OptionError, match="pareto"):
        _ = Optimizer({"x": (0.0, 1.0)}, {"a": "minimize", "b": "minimize"}).recommended
