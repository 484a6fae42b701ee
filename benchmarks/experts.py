"""One posterior from eight contributors: sites, lifted sites and products of experts, against exact regression.

    python benchmarks/experts.py

10,000 rows of a draw of the prior (2 columns), and kin8nm (published split 0; kernel and noise from 1,500 training
rows). Rows go to 8 contributors at random, or sorted (by the first column; kin8nm: by column 0, 1, 2 for the seeds).
Kernel and noise are the same for everybody. Products of experts combine f of exact experts; `rbcm of y` is the same
rule with the noise in every expert. Last, how much lifted sites lose as contributors have fewer inducing inputs, beside
the product of the very same experts.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import common
import numpy as np
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from torch import Tensor

from fspace.inference.basis import Basis
from fspace.inference.collapsed import fit_site
from fspace.inference.gp import GPPosterior
from fspace.inference.inducing import greedy_variance
from fspace.inference.numerics import cholesky, solve_lower
from fspace.inference.optimise import fit_exact, gaussian_likelihood
from fspace.kernels.evaluate import covariance
from fspace.server import combine, lift
from fspace.server.combining import POINTWISE, PointwisePosterior, combined, prior_of
from fspace.server.core import unit_scaling
from fspace.server.lifting import THRESHOLD

EXPERTS, ROWS, TEST = 8, 10_000, 1_000
NOISE = 0.04
LEARNING_ROWS = 1_500
SEEDS = (0, 1, 2)
Moments = tuple[Tensor, Tensor]


class Problem:
    """Rows in the units of the model, and the test rows. scale: of the model's unit of y, in the table's."""

    def __init__(
        self, x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, kernel: Any, noise: float, scale: float
    ):
        self.x, self.y, self.x_test, self.y_test = x, y, x_test, y_test
        self.kernel, self.scale = kernel.requires_grad_(False), scale
        self.likelihood = gaussian_likelihood(1, noise, torch.device("cpu")).requires_grad_(False)
        self.noise = noise

    def basis(self, inducing_inputs: Tensor) -> Basis:
        """A basis with the kernel and noise that all share."""
        return Basis(self.kernel, inducing_inputs, self.likelihood)

    def score(self, latent: Moments) -> dict[str, float]:
        """Negative log predictive density and root mean squared error on the test rows, in the table's units."""
        mean, variance = latent[0], latent[1] + self.noise
        error = self.y_test - mean
        density = 0.5 * (2 * math.pi * variance).log() + 0.5 * error.square() / variance
        return {
            "nlpd": density.mean().item() + math.log(self.scale),
            "rmse": self.scale * error.square().mean().sqrt().item(),
        }

    def moments(self, posterior: Any) -> Moments:
        """Mean and variance of f at the test rows."""
        latent = posterior.latent(self.x_test)
        return latent.mean, latent.variance

    def exact(self) -> Moments:
        """Exact regression on all rows."""
        gram = covariance(self.kernel, self.x)
        gram.diagonal().add_(self.noise)
        factor, _ = cholesky(gram, "covariance of the observations")
        white = solve_lower(factor, torch.cat([covariance(self.kernel, self.x, self.x_test), self.y], dim=1))
        cross, target = white[:, :-1], white[:, -1]
        prior = covariance(self.kernel, self.x_test[:1])[0, 0]
        return cross.mT @ target, prior - cross.square().sum(0)


def kernel_of(columns: int, lengthscale: float) -> ScaleKernel:
    """RBF with a lengthscale a column, unit variance."""
    made = ScaleKernel(RBFKernel(ard_num_dims=columns)).double()
    made.base_kernel.lengthscale = torch.full((1, columns), lengthscale, dtype=torch.float64)
    made.outputscale = torch.tensor(1.0, dtype=torch.float64)
    return made


def synthetic(seed: int) -> Problem:
    """A draw of the prior over a square of 10 lengthscales, by random Fourier features."""
    generator = torch.Generator().manual_seed(seed)
    x = 10 * torch.rand(ROWS + TEST, 2, generator=generator, dtype=torch.float64)
    kernel = kernel_of(2, 1.0)
    likelihood = gaussian_likelihood(1, NOISE, torch.device("cpu"))
    basis = Basis(kernel, x[:1], likelihood.requires_grad_(False))
    f = prior_of(basis, unit_scaling(basis)).draw(1, seed)[0](x).detach()
    y = f + math.sqrt(NOISE) * torch.randn(len(x), generator=generator, dtype=torch.float64)
    return Problem(x[:ROWS], y[:ROWS, None], x[ROWS:], y[ROWS:], kernel, NOISE, 1.0)


def kin8nm() -> Problem:
    """The published split 0, standardised by the training rows."""
    from fspace.data import load_uci

    x, y, x_test, y_test = (torch.as_tensor(np.asarray(part)).double() for part in load_uci("kin8nm", 0))
    centre, spread, level, scale = x.mean(0), x.std(0), y.mean(), y.std()
    x, x_test = ((part - centre) / spread for part in (x, x_test))
    y, y_test = ((part - level) / scale for part in (y, y_test))
    kernel = kernel_of(x.shape[1], 2.0)
    likelihood: GaussianLikelihood = gaussian_likelihood(1, 0.1, torch.device("cpu"))
    few = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:LEARNING_ROWS]
    fit_exact(kernel, likelihood, x[few], y[few, None], 25, lambda **_: None, "kin8nm")
    return Problem(x, y[:, None], x_test, y_test, kernel, likelihood.noise.item(), scale.item())


def shards(problem: Problem, split: str, column: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """The rows of every contributor."""
    if split == "sorted":
        order = problem.x[:, column].argsort()
    else:
        order = torch.randperm(len(problem.x), generator=torch.Generator().manual_seed(seed))
    return [(problem.x[part], problem.y[part]) for part in order.chunk(EXPERTS)]


def part(problem: Problem, x: Tensor, y: Tensor, inducing: int) -> tuple[Basis, Any]:
    """A contributor's basis, on rows of its own that explain the others best, and its site."""
    basis = problem.basis(x[greedy_variance(problem.kernel, x, inducing)])
    return basis, fit_site(basis, x, y)


def compare(problem: Problem, parts: list[tuple[Tensor, Tensor]], inducing: int, own: int) -> dict[str, Any]:
    """Every way to combine, on one split of the rows."""
    found: dict[str, Any] = {}
    shared = problem.basis(problem.x[greedy_variance(problem.kernel, problem.x, inducing)])
    sites = [(shared, fit_site(shared, x, y)) for x, y in parts]
    found["sites"] = problem.score(problem.moments(combine(sites, "sites")))
    bring = [part(problem, x, y, own) for x, y in parts]
    lifts = [lift(site, basis, shared) for basis, site in bring]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # how many stay experts is in the figures
        lifted = combine(bring, "lifted", shared)
    stay = sum(each.shortfall > THRESHOLD for each in lifts)
    assert isinstance(lifted, PointwisePosterior) == (stay > 0)
    shortfalls = [each.shortfall for each in lifts]
    found["lifted"] = problem.score(problem.moments(lifted)) | {
        "stay_experts": stay,
        "shortfall": max(shortfalls),
    }
    never = combine(bring, "lifted", shared, math.inf)
    found["lifted, no fallback"] = problem.score(problem.moments(never))
    exact = [problem.basis(x) for x, _ in parts]
    experts = [GPPosterior(b, fit_site(b, x, y), unit_scaling(b)) for b, (x, y) in zip(exact, parts)]
    means, variances = (torch.stack(each) for each in zip(*(problem.moments(expert) for expert in experts)))
    prior = prior_of(exact[0], unit_scaling(exact[0])).latent(problem.x_test).variance
    priors = prior.expand_as(variances)
    for method in POINTWISE:
        found[method] = problem.score(combined(means, variances, priors, prior, method))
    mean, noisy = combined(
        means, variances + problem.noise, priors + problem.noise, prior + problem.noise, "rbcm"
    )
    found["rbcm of y"] = problem.score((mean, noisy - problem.noise))
    return found


def sweep(problem: Problem, parts: list[tuple[Tensor, Tensor]], inducing: int, owns: tuple[int, ...]) -> Any:
    """Lifted without a fallback, and products of the same experts, by how many inducing inputs these have."""
    shared = problem.basis(problem.x[greedy_variance(problem.kernel, problem.x, inducing)])
    found = {}
    for own in owns:
        bring = [part(problem, x, y, own) for x, y in parts]
        row = {"shortfall": max(lift(site, basis, shared).shortfall for basis, site in bring)}
        lifted = combine(bring, "lifted", shared, math.inf)
        row["lifted"] = problem.score(problem.moments(lifted))["nlpd"]
        for method in ("gpoe", "rbcm"):
            row[method] = problem.score(problem.moments(combine(bring, method)))["nlpd"]
        found[own] = row
    return found


def gathered(runs: list[Any]) -> Any:
    """The same nest of dictionaries, with the list of all runs' numbers in place of a number."""
    if isinstance(runs[0], dict):
        return {str(key): gathered([run[key] for run in runs]) for key in runs[0]}
    return runs


def run(
    make: Callable[[int], Problem], inducing: int, own: int, sorts_by_seed: bool, owns: tuple[int, ...]
) -> Any:
    """One table: all seeds, both splits."""
    runs = []
    for seed in SEEDS:
        start, problem = time.perf_counter(), make(seed)
        found: dict[str, Any] = {"exact": problem.score(problem.exact())}
        common.say(f"seed {seed}: exact after {time.perf_counter() - start:.0f} s", found["exact"])
        for split in ("random", "sorted"):
            split_rows = shards(problem, split, seed if sorts_by_seed else 0, seed)
            found[split] = compare(problem, split_rows, inducing, own)
            common.say(split, {name: round(score["nlpd"], 4) for name, score in found[split].items()})
        found["sweep"] = sweep(problem, shards(problem, "random", 0, seed), inducing, owns)
        common.say("sweep", {m: [round(v, 3) for v in row.values()] for m, row in found["sweep"].items()})
        runs.append(found)
    table = {"rows": len(problem.x), "columns": problem.x.shape[1], "noise": problem.noise * problem.scale**2}
    return {**table, "inducing": inducing, "own_inducing": own, **gathered(runs)}


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    start = time.perf_counter()
    table = kin8nm()
    tables = {
        "prior draw": run(synthetic, 400, 100, False, (10, 25, 50, 75, 100, 150)),
        "kin8nm": run(lambda _: table, 1000, 300, True, (50, 100, 200, 300, 500)),
    }
    result = {"command": "python benchmarks/experts.py", "machine": common.machine(), "experts": EXPERTS}
    result |= {
        "threshold": THRESHOLD,
        "seeds": list(SEEDS),
        "seconds": time.perf_counter() - start,
        "tables": tables,
    }
    common.write("experts", result)


if __name__ == "__main__":
    main()
