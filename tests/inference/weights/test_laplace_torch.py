"""Laplace's approximation against laplace-torch, at the same weights, prior precision and noise.

laplace-torch asks for torchvision, which must fit torch to the build; docs/compare.md says how to have it without.
"""

import copy
import math
import warnings

import pytest
import torch

from fspace.inference.gp import Scaling
from fspace.inference.weights import FunctionalLaplace, Laplace
from fspace.inference.weights.likelihoods import Classes, GaussianNoise
from fspace.inference.weights.posterior import LinearisedPosterior, posterior_of
from fspace.inference.weights.priors import GaussianPrior
from fspace.inference.weights.problem import Problem, Training

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        laplace = pytest.importorskip(
            "laplace",
            reason="laplace-torch is not installed: docs/compare.md, 'Checked against other libraries'",
        )
except RuntimeError as error:  # torchmetrics imports a torchvision that is of another torch
    pytest.skip(f"laplace-torch does not import: {error}", allow_module_level=True)

NOISE, PRIOR = 0.04, 0.7  # variances, of noise and of every weight
KINDS = {
    "numbers": {},
    "two outputs": {"outputs": 2},
    "two classes": {"classes": 2},
    "four classes": {"classes": 4},
}
NAMES = {"full": "full", "kronecker": "kron", "diagonal": "diag"}


def ours(problem: Problem, method: Laplace | FunctionalLaplace) -> LinearisedPosterior:
    """The posterior on rows as they are."""
    distribution, likelihood = method.fit(problem)
    d, t = problem.x.shape[1], likelihood.outputs
    one, zero = torch.ones(d).double(), torch.zeros(d).double()
    scaling = Scaling(one, one, zero, one, torch.zeros(t).double(), torch.ones(t).double())
    return posterior_of(problem.network, distribution, likelihood, scaling, False, method.name)


def theirs(
    problem: Problem, weights: torch.Tensor, layers: str, structure: str, precision: float = 1 / PRIOR
):
    """laplace-torch's, fitted at these weights of the same network, on batches of 16 rows."""
    module = copy.deepcopy(problem.network.module).requires_grad_(True)
    torch.nn.utils.vector_to_parameters(weights.clone(), module.parameters())
    classes = isinstance(problem.likelihood, Classes)
    if classes and problem.likelihood.count == 2:
        module = Paired(module)
    y = problem.y[:, 0].long() if classes else problem.y
    found = laplace.Laplace(
        module,
        "classification" if classes else "regression",
        subset_of_weights={"all": "all", "last": "last_layer"}[layers],
        hessian_structure=structure,
        prior_precision=precision,
        **({} if classes else {"sigma_noise": math.sqrt(NOISE)}),
        **({"n_subset": problem.n} if structure == "gp" else {}),
    )
    found.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(problem.x, y), batch_size=16))
    return found


class Paired(torch.nn.Module):
    """Logits (0, f): laplace-torch has two classes as two logits, we as one."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f = self.module(x)
        return torch.cat([torch.zeros_like(f), f], 1)


@pytest.fixture
def case(small, made):
    """Makes a problem with noise and prior that are known; biases=False: of a network without them."""

    def make(kind: str, biases: bool = True) -> Problem:
        options: dict = {"training": Training(epochs=150), "prior": GaussianPrior(PRIOR, PRIOR, scaled=False)}
        targets = KINDS[kind].get("outputs", 1)
        if "classes" not in KINDS[kind]:
            options["likelihood"] = GaussianNoise(targets, torch.full((targets,), NOISE).double().log())
        problem = small(**KINDS[kind], **options)
        if biases:
            return problem
        first, last = (
            torch.nn.Linear(a, b, bias=False) for a, b in ((2, 5), (5, problem.likelihood.outputs))
        )
        module = torch.nn.Sequential(first, torch.nn.Tanh(), last)
        return made(module, problem.x, problem.y, **(options | {"likelihood": problem.likelihood}))

    return make


PROBES = torch.randn(9, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 1.5


def their_moments(found, layers: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [n, o] and covariance [n o, n o] of the network's outputs at the probes."""
    backend = found.backend
    j, f = backend.last_layer_jacobians(PROBES) if layers == "last" else backend.jacobians(PROBES)
    return f.detach(), found.functional_covariance(j).detach()


def our_moments(posterior: LinearisedPosterior) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of ours, outputs of a row side by side."""
    j = torch.cat(list(posterior._jacobians(PROBES))).flatten(0, 1)
    f = posterior.outputs(posterior.distribution.mean[None], PROBES)[0]
    return f, posterior.distribution.covariance(j, j)


def same(ours, theirs) -> bool:
    return torch.allclose(ours[0], theirs[0], atol=1e-4, rtol=0) and torch.allclose(
        ours[1], theirs[1], atol=1e-4 * ours[1].abs().max().item(), rtol=0
    )


@pytest.mark.parametrize("structure", ["full", "diagonal", "kronecker"])
@pytest.mark.parametrize("layers", ["all", "last"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "two classes"])
def test_moments_of_outputs_and_evidence_are_laplace_torchs(case, kind, layers, structure):
    """laplace-torch's Kronecker factors keep weights and biases apart, ours a layer together, so that they are compared
    without biases."""
    problem = case(kind, biases=structure != "kronecker")
    found = ours(problem, Laplace(structure, layers, tune=False))
    peer = theirs(problem, found.distribution.mean, layers, NAMES[structure])
    assert same(our_moments(found), their_moments(peer, layers))
    evidence = problem.report.figures["log_evidence"]
    assert evidence == pytest.approx(peer.log_marginal_likelihood().item(), abs=1e-4)
    other = theirs(problem, found.distribution.mean, layers, NAMES[structure], 1.1 / PRIOR)
    assert not same(our_moments(found), their_moments(other, layers))


def test_predictives_of_numbers_are_laplace_torchs(case):
    """By their own ways in: latent, and observed with the noise."""
    problem = case("numbers")
    found = ours(problem, Laplace("full", "all", tune=False))
    peer = theirs(problem, found.distribution.mean, "all", "full")
    mean, variance = peer(PROBES)
    latent, observed = found.latent(PROBES), found.observed(PROBES)
    torch.testing.assert_close(latent.mean, mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(latent.variance, variance[..., 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(observed.variance, variance[..., 0] + NOISE, atol=1e-4, rtol=0)
    together = peer(PROBES, joint=True)[1]
    torch.testing.assert_close(latent.covariance[0], together, atol=1e-4, rtol=0)


def test_two_classes_by_one_logit_are_laplace_torchs_by_two(case):
    problem = case("two classes")
    found = ours(problem, Laplace("full", "all", tune=False))
    mean, covariance = their_moments(theirs(problem, found.distribution.mean, "all", "full"), "all")
    mine = our_moments(found)
    assert same(mine, (mean[:, 1:], covariance.reshape(9, 2, 9, 2)[:, 1, :, 1]))


def test_probabilities_of_classes_are_laplace_torchs(case):
    """Both average over draws of the linearised network."""
    problem = case("four classes")
    found = ours(problem, Laplace("full", "all", tune=False))
    peer = theirs(problem, found.distribution.mean, "all", "full")
    many = 20_000
    probs = peer(PROBES, link_approx="mc", n_samples=many)
    drawn = found.observed(PROBES)
    error = drawn.samples.var(0).sqrt() * (1 / len(drawn.samples) + 1 / many) ** 0.5
    assert ((drawn.probs - probs).abs() < 5 * error).all()
    at_mode = torch.softmax(found.outputs(found.distribution.mean[None], PROBES)[0], -1)
    assert not ((at_mode - probs).abs() < 5 * error).all()


def test_functional_laplace_is_laplace_torchs_process(case):
    problem = case("numbers")
    found = ours(problem, FunctionalLaplace(tune=False))
    peer = theirs(problem, found.distribution.mean, "all", "gp")
    mean, variance = peer(PROBES)
    latent = found.latent(PROBES)
    torch.testing.assert_close(latent.mean, mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(latent.variance, variance.reshape(9, 1), atol=1e-4, rtol=0)
