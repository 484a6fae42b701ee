"""Laplace's approximation: a Gaussian around the most probable weights, with the Gauss-Newton curvature.

Predictions are those of the network linearised in its weights there, which is the model whose curvature this is.
Sources: MacKay (1992); Immer, Korzepa and Bauer (2021, the linearised predictive); Immer et al. (2021, the evidence).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import OptionError
from fspace.inference.weights import curvature
from fspace.inference.weights.curvature import Factors, Region, region_of
from fspace.inference.weights.distributions import (
    DiagonalPrecision,
    KroneckerPrecision,
    LowRankPrecision,
    StateDistribution,
)
from fspace.inference.weights.evidence import Spectrum, Tuned, tune
from fspace.inference.weights.likelihoods import GaussianNoise, NetworkLikelihood
from fspace.inference.weights.problem import Problem
from fspace.inference.weights.train import negative_log_joint, train
from fspace.predictive_base import check_whole

STRUCTURES = ("full", "kronecker", "diagonal")
LARGEST = 5000  # of a matrix whose eigenvalues are taken


@dataclass(frozen=True)
class Laplace:
    """Laplace's approximation of the posterior over all weights, or those of the last layer.

    structure: of the curvature, "full" (all weights with each other), "kronecker" (within layers, factored) or
        "diagonal". layers: "all" or "last".
    tune: prior precisions (one factor for each layer; "full": for all) and the noise variance by the evidence;
        False: the prior as it is given, noise at its mode. rounds: how often training and tuning alternate.
    log_evidence, and the factors on precisions and noise, are in the figures of the fit.
    """

    structure: str = "kronecker"
    layers: str = "all"
    tune: bool = True
    rounds: int = 3
    name: ClassVar[str] = "laplace"

    def __post_init__(self) -> None:
        if self.structure not in STRUCTURES:
            raise OptionError(
                f"structure={self.structure!r} does not exist; choose one of {', '.join(STRUCTURES)}."
            )
        if self.layers not in ("all", "last"):
            raise OptionError(f"layers={self.layers!r} does not exist; choose 'all' or 'last'.")
        check_whole("rounds", self.rounds)

    def fit(self, problem: Problem) -> tuple[StateDistribution, NetworkLikelihood]:
        """The Gaussian, and the likelihood with its noise as tuned."""
        problem.require_curvature(self.name)
        region = region_of(problem.network, self.layers)
        if self.structure == "full":
            check_size(region.size, problem.n * problem.likelihood.outputs)
        rows = torch.arange(problem.n, device=problem.x.device)
        return mode_and_factors(problem, self, region, rows, self.structure, self.name)


def check_size(weights: int, numbers: int) -> None:
    """Raises OptionError where the full curvature has too many eigenvalues."""
    if min(weights, numbers) > LARGEST:
        raise OptionError(
            f"structure='full' needs the eigenvalues of a matrix of {min(weights, numbers):,} rows (the lesser of "
            f"{weights:,} weights and {numbers:,} outputs of all rows); at most {LARGEST:,} are taken. Choose "
            "structure='kronecker', or layers='last'."
        )


def mode_and_factors(
    problem: Problem, method: Laplace, region: Region, rows: Tensor, structure: str, name: str
) -> tuple[StateDistribution, NetworkLikelihood]:
    """Training and tuning in turns; the last tuning is the posterior's."""
    steps = problem.steps
    theta = train(problem, problem.start(1), negative_log_joint(problem), f"{name}: mode", steps=steps).theta
    rounds = method.rounds if method.tune else 1
    for k in range(rounds):
        problem, theta = _noise_apart(problem, theta)
        found = _curvature(problem, theta[0], region, rows, structure)
        tuned = _tuned(problem, theta[0], found, region, structure, method.tune, rows)
        if k + 1 == rounds or problem.report.interrupted or problem.report.diverged:
            break
        problem = _with_factors(problem, tuned, region, structure)
        theta = train(
            problem,
            theta,
            negative_log_joint(problem),
            f"{name}: mode",
            steps=max(1, steps // 2),
            stream=3 + k,
        ).theta
    problem.report.figures |= {
        "log_evidence": tuned.log_evidence,
        "precision_factors": list(tuned.precision),
        "noise_factor": tuned.noise,
    }
    return _gaussian(problem, theta[0], found, tuned, region, structure)


def _noise_apart(problem: Problem, theta: Float[Tensor, "1 q"]) -> tuple[Problem, Float[Tensor, "1 p"]]:
    """The noise of the mode as the likelihood's own, no longer a part of the state."""
    likelihood = problem.likelihood
    if not isinstance(likelihood, GaussianNoise) or likelihood.log_variance is not None:
        return problem, theta
    w, tail = problem.split(theta)
    fixed = likelihood.log_noise(tail[0].double()).detach()
    return replace(problem, likelihood=_Learned(likelihood.targets, fixed)), w.clone()


@dataclass(frozen=True, eq=False)
class _Learned(GaussianNoise):
    """Noise that is held for now, but was not given."""


Found = tuple[Tensor, Tensor] | list[Factors] | Tensor


def _curvature(problem: Problem, theta: Tensor, region: Region, rows: Tensor, structure: str) -> Found:
    if structure == "full":
        return curvature.full(problem, theta, region, rows)
    if structure == "diagonal":
        return curvature.diagonal(problem, theta, region)
    return curvature.kronecker(problem, theta, _layers(problem, region))


def _layers(problem: Problem, region: Region):  # type: ignore[no-untyped-def]
    return [layer for layer in problem.network.layers if layer.weight[0] >= region.first]


def _groups(problem: Problem, region: Region, structure: str) -> list[list[tuple[int, int]]]:
    """Flat ranges of the weights that share a factor on their prior precision."""
    if structure == "full":
        return [[(region.first, region.last)]]
    return [
        [layer.weight] + ([] if layer.bias is None else [layer.bias]) for layer in _layers(problem, region)
    ]


@torch.no_grad()
def _tuned(
    problem: Problem, theta: Tensor, found: Found, region: Region, structure: str, wanted: bool, rows: Tensor
) -> Tuned:
    white = (problem.split(theta)[0].double() / problem.scales).cpu()
    spectra: list[Tensor]
    groups = _groups(problem, region, structure)
    if isinstance(found, list):
        spectra = [torch.outer(f.output_values, f.input_values).flatten() for f in found]
    elif isinstance(found, tuple):
        spectra = [found[0]]
    else:
        spectra = [
            torch.cat([found[a - region.first : b - region.first] for a, b in group]) for group in groups
        ]
    squares = [sum(white[a:b].square().sum().item() for a, b in group) for group in groups]
    parts = [Spectrum(values.cpu(), square) for values, square in zip(spectra, squares)]
    total, error = 0.0, 0.0
    for part in rows.split(4096):
        x, y = problem.x[part], problem.y[part]
        total += problem.log_likelihood(theta[None], x, y).double().sum().item()
        if isinstance(problem.likelihood, GaussianNoise):
            w, tail = problem.split(theta)
            residual = (y - problem.network(w, x)).double()
            error += (residual.square() / problem.likelihood.log_noise(tail.double()).exp()).sum().item()
    learned = isinstance(problem.likelihood, _Learned)
    log_noises = problem.likelihood.log_variance if isinstance(problem.likelihood, _Learned) else None
    numbers = len(rows) * problem.y.shape[1] if isinstance(problem.likelihood, GaussianNoise) else 0
    with torch.enable_grad():
        return tune(
            parts,
            total,
            error,
            torch.zeros(0, dtype=torch.float64) if log_noises is None else log_noises.cpu(),
            numbers,
            noise=learned and wanted,
            precision=wanted,
        )


def _with_factors(problem: Problem, tuned: Tuned, region: Region, structure: str) -> Problem:
    """The problem with prior and noise as tuned."""
    scales = problem.scales.clone()
    for group, factor in zip(_groups(problem, region, structure), tuned.precision):
        for a, b in group:
            scales[a:b] /= factor**0.5
    return replace(problem, scales=scales, likelihood=_with_noise(problem.likelihood, tuned.noise))


def _with_noise(likelihood: NetworkLikelihood, factor: float) -> NetworkLikelihood:
    if not isinstance(likelihood, _Learned):
        return likelihood
    assert likelihood.log_variance is not None
    shift = torch.tensor(factor, dtype=torch.float64).log().to(likelihood.log_variance)
    return _Learned(likelihood.targets, likelihood.log_variance + shift)


def _gaussian(
    problem: Problem, theta: Tensor, found: Found, tuned: Tuned, region: Region, structure: str
) -> tuple[StateDistribution, NetworkLikelihood]:
    """The posterior: precision of whitened weights = curvature / noise factor + precision factor."""
    likelihood = problem.likelihood
    if isinstance(likelihood, _Learned):
        noise = _with_noise(likelihood, tuned.noise)
        assert isinstance(noise, GaussianNoise)
        likelihood = GaussianNoise(noise.targets, noise.log_variance)
    scale = problem.scales[region.first : region.last]
    temperature = problem.temperature
    if isinstance(found, tuple):
        values, vectors = found
        factor = tuned.precision[0]
        return LowRankPrecision(
            theta, scale, vectors, values / tuned.noise, factor, region.first, temperature
        ), likelihood
    if isinstance(found, Tensor):
        precision = found / tuned.noise
        for group, factor in zip(_groups(problem, region, structure), tuned.precision):
            for a, b in group:
                precision[a - region.first : b - region.first] += factor
        return DiagonalPrecision(theta, scale * (temperature / precision).sqrt(), region.first), likelihood
    rotated, columns, places = [], [], []
    for layer, f, factor in zip(_layers(problem, region), found, tuned.precision):
        precision = torch.outer(f.output_values, f.input_values) / tuned.noise + factor
        rotated.append((temperature / precision).sqrt())
        column = problem.scales[layer.weight[0]].expand(len(f.input_values)).clone()
        if layer.bias is not None:
            column[-1] = problem.scales[layer.bias[0]]
        columns.append(column)
        places.append(
            (layer.weight[0] - region.first, -1 if layer.bias is None else layer.bias[0] - region.first)
        )
    return KroneckerPrecision(
        theta,
        tuple(f.input_vectors for f in found),
        tuple(f.output_vectors for f in found),
        tuple(rotated),
        tuple(columns),
        tuple(places),
        region.first,
        region.size,
    ), likelihood
