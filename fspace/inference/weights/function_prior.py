"""A Gaussian process prior over the functions that a network is to be, at finitely many points."""

from __future__ import annotations

import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float
from torch import Tensor

from fspace.errors import OptionError
from fspace.inference.candidates import named_kernel
from fspace.inference.optimise import fit_exact, gaussian_likelihood
from fspace.inference.weights.likelihoods import GaussianNoise
from fspace.inference.weights.problem import Problem
from fspace.kernels.evaluate import covariance

ROWS = 400  # from which kernel and noise are learned
KERNELS = ("matern", "rbf", "neural")


def check_kernel_name(name: str) -> None:
    """Raises OptionError for a kernel that is not known."""
    if name not in KERNELS:
        raise OptionError(f"kernel={name!r} does not exist; choose one of {', '.join(KERNELS)}.")


def learned_kernel(problem: Problem, name: str, stage: str) -> tuple[Kernel, Float[Tensor, " t"] | None]:
    """A kernel by name on the flattened, standardised inputs, and the log noise variances learned with it. For numbers
    both have the greatest evidence of (some) rows; for classes the kernel stays where it starts, as there is no exact
    evidence, and there is no noise."""
    x = problem.x.flatten(1).double()
    kernel = named_kernel(name, x.shape[1], link=not isinstance(problem.likelihood, GaussianNoise))
    kernel = kernel.double().to(x.device)
    if isinstance(problem.likelihood, GaussianNoise):
        rows = torch.randperm(problem.n, generator=problem.generator_cpu(15))[:ROWS].to(x.device)
        noise = gaussian_likelihood(problem.y.shape[1], 0.1, x.device)
        if not fit_exact(
            kernel, noise, x[rows], problem.y[rows].double(), 50, problem.record, f"{stage}: prior"
        ):
            problem.report.interrupted = stage
        return kernel.requires_grad_(False), noise.noise.detach()[:, 0].log()
    return kernel.requires_grad_(False), None


def prior_covariance(kernel: Kernel, x: Tensor) -> Float[Tensor, "m m"]:
    """Covariance of the functions at rows x [m, *row]."""
    return covariance(kernel, x.flatten(1).double())


def measurement_points(problem: Problem, m: int, generator: torch.Generator) -> Tensor:
    """Where functions are compared: half of them rows, half uniform in the box of the rows, a tenth wider."""
    rows = torch.randint(problem.n, (m,), generator=generator, device=problem.x.device)
    x = problem.x[rows].clone()
    if problem.x.ndim == 3:  # sequences end where they end
        return x
    low, high = problem.x.amin(0), problem.x.amax(0)
    wide = 0.1 * (high - low)
    uniform = torch.rand(x[: m // 2].shape, generator=generator, device=x.device, dtype=x.dtype)
    x[: m // 2] = low - wide + (high - low + 2 * wide) * uniform
    return x
