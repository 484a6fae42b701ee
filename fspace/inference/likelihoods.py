"""What observations say about function values: any gpytorch likelihood, its expectations and their derivatives.

Function values are Gaussian with mean m and variance v wherever an expectation is taken here. Over one function it
is taken by Gauss-Hermite quadrature, over the functions of several classes by a fixed set of quasi-random points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from gpytorch import likelihoods
from gpytorch.constraints import Positive
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    BetaLikelihood,
    GaussianLikelihood,
    LaplaceLikelihood,
    Likelihood,
    SoftmaxLikelihood,
    StudentTLikelihood,
)
from gpytorch.likelihoods.likelihood import _OneDimensionalLikelihood
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from torch import Tensor, distributions, nn

from fspace.errors import ModelFileError
from fspace.inference.dirichlet import DirichletLikelihood

NODES = 20  # of the quadrature over one function
POINTS = 64  # over the functions of several classes
LARGEST = 345.0  # of |f| under exp: e^345 is about 1e150, beyond which no y is taken, and its square is still finite
LEVEL_SPREAD = 10.0  # standard deviation of the prior of a constant, before the link


class PoissonLikelihood(_OneDimensionalLikelihood):
    """Counts with mean exp(f)."""

    def forward(self, function_samples: Tensor, *args: Any, **kwargs: Any) -> distributions.Poisson:
        return distributions.Poisson(_bounded(function_samples).exp(), validate_args=False)


def _bounded(f: Tensor) -> Tensor:
    """f where exp(f), 1 / exp(f) and their squares are numbers."""
    return f.clamp(-LARGEST, LARGEST)


class _Shaped(_OneDimensionalLikelihood):
    """A likelihood with one positive parameter that says how concentrated y is around its mean exp(f)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("raw_concentration", nn.Parameter(torch.ones(1, dtype=torch.float64)))
        self.register_constraint("raw_concentration", Positive(transform=torch.exp, inv_transform=torch.log))

    @property
    def concentration(self) -> Float[Tensor, " 1"]:
        """The shape parameter; the larger, the closer y stays to its mean."""
        return self.raw_concentration_constraint.transform(self.raw_concentration)


class NegativeBinomialLikelihood(_Shaped):
    """Counts with mean mu = exp(f) and variance mu + mu^2 / concentration."""

    def forward(self, function_samples: Tensor, *args: Any, **kwargs: Any) -> distributions.NegativeBinomial:
        total = self.concentration
        return distributions.NegativeBinomial(
            total, logits=_bounded(function_samples) - total.log(), validate_args=False
        )


class GammaLikelihood(_Shaped):
    """Positive numbers with mean mu = exp(f) and variance mu^2 / concentration."""

    def forward(self, function_samples: Tensor, *args: Any, **kwargs: Any) -> distributions.Gamma:
        shape = self.concentration
        return distributions.Gamma(shape, shape * torch.exp(-_bounded(function_samples)), validate_args=False)


NAMED: dict[str, Callable[[], Likelihood]] = {
    "student_t": StudentTLikelihood,
    "laplace": LaplaceLikelihood,
    "poisson": PoissonLikelihood,
    "negative_binomial": NegativeBinomialLikelihood,
    "gamma": GammaLikelihood,
    "beta": BetaLikelihood,
    "bernoulli": BernoulliLikelihood,
}
REAL = (StudentTLikelihood, LaplaceLikelihood)  # y is f and noise: it is standardised as for Gaussian noise


class OffsetLikelihood(nn.Module):
    """A gpytorch likelihood of functions that vary around constants: y has the distribution inner(f + offset).

    Shapes: offset [t], one a function: t outputs, or t classes where inner is a SoftmaxLikelihood.
    """

    def __init__(self, inner: Likelihood, offset: Float[Tensor, " t"]):
        super().__init__()
        self.inner = inner.double()
        self.offset = nn.Parameter(offset.detach().clone().to(torch.float64))

    @property
    def classes(self) -> int:
        """Number of classes where every one has a function of its own, else 0."""
        return self.inner.num_classes if isinstance(self.inner, SoftmaxLikelihood) else 0

    def log_density(self, y: Float[Tensor, "n t"], f: Float[Tensor, "*s t n"]) -> Float[Tensor, "*s t n"]:
        """log p(y | f) of every output; offset included here. Not for several classes."""
        f = f + self.offset[:, None]
        if isinstance(
            self.inner, BernoulliLikelihood
        ):  # its own is minus infinity where the normal cdf rounds to 0
            return torch.special.log_ndtr(f * (2.0 * y.mT - 1.0))
        return _log_prob(self.inner, y.mT, f)

    def row_log_density(self, y: Float[Tensor, "n t"], f: Float[Tensor, "n u"]) -> Float[Tensor, "n 1"]:
        """log p(y | f) of every row, outputs summed; offset included here. Of several classes too."""
        if self.classes:
            logs = torch.log_softmax(f + self.offset, dim=-1)
            return logs.gather(-1, y.long())
        return self.log_density(y, f.mT).sum(0)[:, None]


def _log_prob(
    inner: Likelihood, y: Float[Tensor, "t n"], f: Float[Tensor, "*s t n"]
) -> Float[Tensor, "*s t n"]:
    """log p(y | f). gpytorch's own distributions check their parameters at every call, for which the host waits."""
    if type(inner) is StudentTLikelihood:
        freedom, scale = inner.deg_free, inner.noise.sqrt()
        constant = torch.lgamma(0.5 * (freedom + 1.0)) - torch.lgamma(0.5 * freedom)
        constant = constant - 0.5 * (math.pi * freedom).log() - scale.log()
        return constant - 0.5 * (freedom + 1.0) * torch.log1p(((y - f) / scale).square() / freedom)
    if type(inner) is LaplaceLikelihood:
        width = inner.noise.sqrt()
        return -(2.0 * width).log() - (y - f).abs() / width
    if type(inner) is BetaLikelihood:
        first = torch.sigmoid(f) * inner.scale
        return distributions.Beta(first + 1.0, inner.scale - first + 1.0, validate_args=False).log_prob(y)
    return inner(f).log_prob(y)


AnyLikelihood: TypeAlias = GaussianLikelihood | OffsetLikelihood


def with_offset(
    inner: Likelihood, y: Float[Tensor, "n t"], weight: Float[Tensor, " n"] | None = None
) -> OffsetLikelihood:
    """The likelihood with the constants that are most probable given y [n, t] (for a softmax: labels [n, 1]), where
    row i counts weight[i] times, under a wide Gaussian prior: counts that are all zero alone would have none."""
    inner = inner.double()
    weight = torch.ones(len(y), dtype=torch.float64, device=y.device) if weight is None else weight
    if isinstance(inner, SoftmaxLikelihood):
        counts = torch.bincount(y[:, 0].long(), weight, minlength=inner.num_classes)
        logits = (counts + 1.0).log()
        return OffsetLikelihood(inner, logits - logits.mean()).to(y.device)
    likelihood = OffsetLikelihood(inner, torch.zeros(y.shape[1])).to(y.device)
    if isinstance(inner, REAL):
        return likelihood
    stride = max(1, len(y) // 5000)
    some, weight = y[::stride], weight[::stride]

    def loss(level: float, t: int) -> float:
        with torch.no_grad():
            likelihood.offset[t] = level
            f = torch.zeros(y.shape[1], len(some), dtype=torch.float64, device=y.device)
            value = -(likelihood.log_density(some, f)[t] * weight).mean().item()
            value += 0.5 * (level / LEVEL_SPREAD) ** 2 / len(some)
        return value if math.isfinite(value) else 1e300

    for t in range(y.shape[1]):
        best = float(minimize_scalar(loss, bracket=(-1.0, 1.0), args=(t,)).x)
        loss(best, t)
    return likelihood


_KNOWN: dict[str, Any] = {
    "PoissonLikelihood": PoissonLikelihood,
    "NegativeBinomialLikelihood": NegativeBinomialLikelihood,
    "GammaLikelihood": GammaLikelihood,
    "gpytorch.StudentTLikelihood": StudentTLikelihood,
    "gpytorch.LaplaceLikelihood": LaplaceLikelihood,
    "gpytorch.BetaLikelihood": BetaLikelihood,
    "gpytorch.BernoulliLikelihood": BernoulliLikelihood,
    "gpytorch.PoissonLikelihood": likelihoods.PoissonLikelihood,
    "gpytorch.NegativeBinomialLikelihood": likelihoods.NegativeBinomialLikelihood,
    "gpytorch.SoftmaxLikelihood": SoftmaxLikelihood,
    "DirichletLikelihood": DirichletLikelihood,
}


def likelihood_to_spec(likelihood: Likelihood) -> dict[str, Any]:
    """How a likelihood is built, as JSON; its parameters are in `state_dict()`. Raises ModelFileError for a kind that
    cannot be built from that."""
    for name, kind in _KNOWN.items():
        if type(likelihood) is kind:
            spec = {"likelihood": name, "classes": getattr(likelihood, "num_classes", None)}
            if _parametrisation(likelihood) == _parametrisation(likelihood_from_spec(spec)):
                return spec
    raise ModelFileError(
        f"The likelihood {type(likelihood).__module__}.{type(likelihood).__name__} cannot be saved; use one of "
        f"{', '.join(sorted(_KNOWN))}, with their own constraints and no priors."
    )


def _parametrisation(likelihood: Likelihood) -> tuple[list[str], list[Any]]:
    """What a state is read with: names (priors have some too), and how raw parameters become those that count."""
    constraints = [(name, type(c), repr(c._transform)) for name, c in likelihood.named_constraints()]
    return sorted(likelihood.state_dict()), constraints


def likelihood_from_spec(spec: dict[str, Any]) -> Likelihood:
    """The likelihood that `likelihood_to_spec` described, with its first parameters."""
    if spec["likelihood"] not in _KNOWN:
        raise ModelFileError(
            f"The file holds a likelihood {spec['likelihood']!r} that this version does not know."
        )
    kind = _KNOWN[spec["likelihood"]]
    if kind is SoftmaxLikelihood:
        return SoftmaxLikelihood(num_classes=int(spec["classes"]), mixing_weights=False)
    if kind is DirichletLikelihood:  # its concentration comes with the state
        return DirichletLikelihood(int(spec["classes"]))
    return kind()


def functions(likelihood: AnyLikelihood) -> int:
    """How many latent functions it is a likelihood of."""
    if isinstance(likelihood, OffsetLikelihood):
        return likelihood.offset.shape[0]
    return likelihood.noise.shape[0]


def expected_log_density(
    likelihood: AnyLikelihood,
    y: Float[Tensor, "n u"],
    mean: Float[Tensor, "t n"],
    variance: Float[Tensor, "t n"],
) -> Float[Tensor, "t n"]:
    """E log p(y_i | f_i), differentiable in mean, variance and the likelihood's parameters; of several classes, which
    share one term a row, each gets its part."""
    if isinstance(likelihood, GaussianLikelihood):
        return _expected_gaussian(y.mT, likelihood.noise, mean, variance)
    if isinstance(likelihood.inner, DirichletLikelihood):
        target, noise = likelihood.inner.pseudo_observations(y)
        return _expected_gaussian(target, noise, mean + likelihood.offset[:, None], variance)
    if likelihood.classes:
        chosen = _class_log_probs(likelihood, mean, variance).gather(
            1, y.mT.long().expand(POINTS, 1, -1)
        )  # [s, 1, n]
        return chosen.mean(0).expand_as(mean) / len(mean)
    if isinstance(likelihood.inner, LaplaceLikelihood):  # a kink is more than quadrature can do
        return _expected_laplace(likelihood.inner, y.mT - mean - likelihood.offset[:, None], variance)
    nodes, weights = _hermite(mean.device)
    f = mean + variance.sqrt() * nodes[:, None, None]
    return torch.tensordot(weights, likelihood.log_density(y, f), dims=1)


def _expected_gaussian(target: Tensor, noise: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * (torch.log(2.0 * math.pi * noise) + ((target - mean).square() + variance) / noise)


def _expected_laplace(
    inner: LaplaceLikelihood, error: Float[Tensor, "t n"], variance: Float[Tensor, "t n"]
) -> Float[Tensor, "t n"]:
    """In closed form: E|e + s z| is the mean of a folded normal."""
    width, s = inner.noise.sqrt(), variance.sqrt()
    ratio = error / s
    folded = s * math.sqrt(2.0 / math.pi) * (-0.5 * ratio.square()).exp() + error * torch.erf(
        ratio / math.sqrt(2.0)
    )
    return -(2.0 * width).log() - folded / width


def local_terms(
    likelihood: AnyLikelihood,
    y: Float[Tensor, "n u"],
    mean: Float[Tensor, "t n"],
    variance: Float[Tensor, "t n"],
) -> tuple[Float[Tensor, "t n"], Float[Tensor, "t n"], Float[Tensor, "t n"]]:
    """E log p(y_i | f_i), its slope in the mean, and beta = -2 times its slope in the variance, without a graph.

    beta is at least 0: where a likelihood is not log-concave such a row says nothing. For several classes these are
    the terms of independent functions: beta = E p (1 - p). Source: Khan and Lin (2017), eq. 10; Opper and
    Archambeau (2009), eq. 13.
    """
    mean, variance = mean.detach(), variance.detach()
    if isinstance(likelihood, GaussianLikelihood):
        noise = likelihood.noise.detach()
        value = expected_log_density(likelihood, y, mean, variance).detach()
        return value, (y.mT - mean) / noise, (1.0 / noise).expand_as(mean)
    if isinstance(likelihood.inner, DirichletLikelihood):
        target, noise = likelihood.inner.pseudo_observations(y)
        value = expected_log_density(likelihood, y, mean, variance).detach()
        return value, (target - mean - likelihood.offset.detach()[:, None]) / noise, 1.0 / noise
    if likelihood.classes:
        with torch.no_grad():
            logs = _class_log_probs(likelihood, mean, variance)
            labels = y.mT.long()
            value = logs.gather(1, labels.expand(POINTS, 1, -1)).mean(0).expand_as(mean) / len(mean)
            probs = logs.exp()
            slope = -probs.mean(0)
            slope.scatter_add_(0, labels, torch.ones_like(slope[:1]))
            return value, slope, (probs * (1.0 - probs)).mean(0)
    with torch.enable_grad():
        m, v = mean.clone().requires_grad_(), variance.clone().requires_grad_()
        value = expected_log_density(likelihood, y, m, v)
        slope, in_variance = torch.autograd.grad(value.sum(), (m, v))
    return value.detach(), slope, (-2.0 * in_variance).clamp(min=0.0)


def predictive_log_density(
    likelihood: AnyLikelihood,
    y: Float[Tensor, "n u"],
    mean: Float[Tensor, "t n"],
    variance: Float[Tensor, "t n"],
) -> Float[Tensor, " n"]:
    """log E p(y_i | f_i), summed over outputs: what a prediction made from these moments gives the observations."""
    if isinstance(likelihood, GaussianLikelihood):
        total = variance + likelihood.noise
        return (-0.5 * (2.0 * math.pi * total).log() - 0.5 * (y.mT - mean).square() / total).sum(0)
    if likelihood.classes:
        logs = _class_log_probs(likelihood, mean, variance).gather(1, y.mT.long().expand(POINTS, 1, -1))
        return torch.logsumexp(logs[:, 0], dim=0) - math.log(POINTS)
    if isinstance(likelihood.inner, LaplaceLikelihood):
        width, s = likelihood.inner.noise.sqrt(), variance.sqrt()
        error = y.mT - mean - likelihood.offset[:, None]
        sides = [
            sign * error / width + torch.special.log_ndtr(-(s / width + sign * error / s)) for sign in (1, -1)
        ]
        density = torch.logaddexp(*sides) + 0.5 * (s / width).square() - (2.0 * width).log()
        return density.sum(0)
    nodes, weights = _hermite(mean.device)
    f = mean + variance.sqrt() * nodes[:, None, None]
    return torch.logsumexp(likelihood.log_density(y, f) + weights.log()[:, None, None], dim=0).sum(0)


def _class_log_probs(
    likelihood: OffsetLikelihood, mean: Float[Tensor, "c n"], variance: Float[Tensor, "c n"]
) -> Float[Tensor, "s c n"]:
    points = _points_on(mean.device, len(mean))
    f = mean + likelihood.offset[:, None] + variance.sqrt() * points[:, :, None]
    return torch.log_softmax(f, dim=1)


@lru_cache(maxsize=32)
def normal_points(count: int, dimensions: int) -> Float[Tensor, "s d"]:
    """Quasi-random standard normal points, the same at every call."""
    uniform = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=0).draw(
        count, dtype=torch.float64
    )
    return torch.special.ndtri(uniform.clamp(1e-10, 1.0 - 1e-10))


@lru_cache(maxsize=32)
def _points_on(device: torch.device, dimensions: int) -> Float[Tensor, "s d"]:
    return normal_points(POINTS, dimensions).to(device)


@lru_cache(maxsize=8)
def _hermite(device: torch.device) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    return (
        torch.from_numpy(nodes).to(device),
        torch.from_numpy(weights / weights.sum()).to(device),
    )
