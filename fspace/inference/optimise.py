"""Kernel and noise by L-BFGS, where the loss is deterministic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.module import Module
from gpytorch.priors import Prior
from jaxtyping import Float
from scipy.optimize import minimize
from torch import Tensor

from fspace.errors import NumericalError
from fspace.inference.exact import log_marginal_likelihood
from fspace.kernels.deep import embedded_kernel
from fspace.kernels.evaluate import covariance

MIN_NOISE = 1e-6  # of the variance of y: below it the noise cannot be told from rounding in the data
Record = Callable[..., None]


def gaussian_likelihood(
    outputs: int, noise: float | Tensor, device: torch.device, prior: Prior | None = None
) -> GaussianLikelihood:
    """Gaussian noise with one variance an output, in units of standardised y; noise: one for all, or [t]."""
    likelihood = GaussianLikelihood(
        noise_prior=prior, noise_constraint=GreaterThan(MIN_NOISE), batch_shape=torch.Size([outputs])
    )
    likelihood = likelihood.to(device=device, dtype=torch.float64)
    start = torch.as_tensor(noise, dtype=torch.float64, device=device).clamp(min=1.001 * MIN_NOISE)
    likelihood.noise = start.expand(outputs)[:, None]
    return likelihood


def lbfgs(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], steps: int, record: Callable[[float], None]
) -> bool:
    """Minimise a deterministic loss in place; the best parameters stay. Returns False after Ctrl-C.

    loss: returns its value, a tensor on the device of the parameters, and adds its gradients to `.grad` of these, which
    is empty before. A point at which the factorisation fails counts as infinitely bad, so the line search turns back.
    The search is scipy's: every evaluation moves the parameters to the device, and value and gradient back, each at
    once.
    """
    best = (math.inf, [p.detach().clone() for p in parameters])

    def assign(vector: np.ndarray) -> None:
        values = torch.from_numpy(vector).to(parameters[0].device)
        for p in parameters:
            head, values = values[: p.numel()], values[p.numel() :]
            with torch.no_grad():
                p.copy_(head.reshape(p.shape))

    def evaluate(vector: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best
        assign(vector)
        for p in parameters:
            p.grad = None
        try:
            value = loss().reshape(1).double()
        except NumericalError:
            return 1e12, np.zeros_like(vector)
        slopes = [
            (torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).double() for p in parameters
        ]
        found = torch.cat([value, *slopes]).cpu().numpy()
        number, gradient = float(found[0]), found[1:]
        if not np.isfinite(found).all():
            return 1e12, np.zeros_like(vector)
        if number < best[0]:
            best = (number, [p.detach().clone() for p in parameters])
        record(number)
        return number, gradient

    start = torch.cat([p.detach().reshape(-1) for p in parameters]).double().cpu().numpy()
    try:
        with np.errstate(divide="ignore", invalid="ignore"):  # slopes of zero, where a step has failed
            minimize(
                evaluate, start, jac=True, method="L-BFGS-B", options={"maxiter": steps, "maxfun": 2 * steps}
            )
    except KeyboardInterrupt:
        return False
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, best[1]):
                p.copy_(value)
    return True


def log_prior(module: Module) -> Tensor:
    """Log density of the priors registered on the parameters of a kernel or a likelihood; zero where there are none."""
    terms = [prior.log_prob(value(part)).sum().double() for _, part, prior, value, _ in module.named_priors()]
    return torch.stack(terms).sum() if terms else torch.zeros((), dtype=torch.float64)


def kernel_penalty(kernel: Kernel) -> Tensor:
    """Minus `log_prior`, and a weak log-normal pull on every lengthscale that has no prior of its own: an input that
    does nothing would otherwise drift without end."""
    own = {id(part) for name, part, *_ in kernel.named_priors() if name.endswith("lengthscale_prior")}
    terms = []
    for part in kernel.modules():
        lengthscale = getattr(part, "lengthscale", None) if isinstance(part, Kernel) else None
        if lengthscale is not None and id(part) not in own:
            centre = 0.5 * math.log(lengthscale.shape[-1])
            terms.append(0.125 * (lengthscale.log() - centre).square().sum().double())
    return (torch.stack(terms).sum() if terms else 0.0) - log_prior(kernel)


def _variance_penalty(k: Float[Tensor, "n n"]) -> Tensor:
    """Pull back from prior variances over 100 times that of y: jitter, which is relative to them, would drown a small
    noise. Noise-free targets drive kernels without end there, for next to no evidence."""
    return (k.diagonal().mean() / 100.0).log().clamp(min=0.0).square()


def fit_exact(
    kernel: Kernel,
    likelihood: GaussianLikelihood,
    z: Float[Tensor, "n p"],
    y: Float[Tensor, "n t"],
    steps: int,
    record: Record,
    stage: str,
) -> bool:
    """Kernel and noise by L-BFGS on the exact log evidence of embedded rows z (maximum a posteriori).

    Returns False after Ctrl-C, with the best parameters so far.
    """
    inner = embedded_kernel(kernel)
    parameters = [p for p in (*inner.parameters(), *likelihood.parameters()) if p.requires_grad]
    if not parameters:
        return True

    def loss() -> Tensor:
        k = covariance(inner, z)
        evidence = log_marginal_likelihood(k, y, likelihood.noise[..., 0])
        penalty = kernel_penalty(inner) + _variance_penalty(k)
        value = (penalty - log_prior(likelihood) - evidence) / y.numel()
        value.backward()
        return value.detach()

    done = lbfgs(loss, parameters, steps, lambda value: record(stage=stage, loss=value))
    if not done:
        record(stage=stage, interrupted=True)
    return done
