"""Coregionalised outputs: Cov[f_s(x), f_t(x')] = B_st k(x, x'), with noise of covariance Sigma between the outputs.

One invertible W diagonalises both: W B W' = I and W Sigma W' = diag(noise). In the rotated outputs W y everything is
independent, so the posterior of independent outputs is exact for them and costs O(t m^3), not O((t m)^3). W and the
noise are learned by the collapsed bound of y, which is that of W y plus n log |det W|.
Sources: Bonilla, Chai and Williams (2008) for B, Rakitsch et al. (2013) for Sigma and the rotation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from gpytorch.likelihoods import GaussianLikelihood
from jaxtyping import Float
from torch import Tensor

from fspace.inference.basis import Basis
from fspace.inference.collapsed import Statistics, gather_whitened
from fspace.inference.numerics import cholesky, solve_lower
from fspace.inference.optimise import MIN_NOISE, gaussian_likelihood, lbfgs
from fspace.inference.source import Inputs

STEPS = 200  # of L-BFGS; each costs O(t^2 m)
B_ROWS = (
    1.0  # how many rows' worth of belief pulls B to no correlation; for the noise it is one more than outputs
)


@dataclass(frozen=True)
class Rotation:
    """Outputs turned until they are independent: rotated = unmixing y (standardised), with these noise variances.

    Shapes: unmixing [t, t] (W), noise [t].
    """

    unmixing: Float[Tensor, "t t"]
    noise: Float[Tensor, " t"]

    @classmethod
    def none(cls, likelihood: GaussianLikelihood) -> Rotation:
        """Where learning starts: the outputs as they are."""
        noise = likelihood.noise.detach()[..., 0].clone()
        return cls(torch.eye(len(noise), dtype=noise.dtype, device=noise.device), noise)

    @property
    def mixing(self) -> Float[Tensor, "t t"]:
        """From rotated outputs to standardised y: the inverse of W."""
        return torch.linalg.solve(self.unmixing, torch.eye(len(self.noise)).to(self.unmixing))

    @property
    def log_det(self) -> float:
        """log |det W|: what a row's log density gains on the way from rotated outputs to standardised y."""
        return torch.linalg.slogdet(self.unmixing)[1].item()

    def rotated(self, y: Float[Tensor, "n t"]) -> Float[Tensor, "n t"]:
        """Standardised y in rotated outputs."""
        return y @ self.unmixing.mT

    def likelihood(self) -> GaussianLikelihood:
        """The noise of the rotated outputs, to go on learning from."""
        return gaussian_likelihood(len(self.noise), self.noise, self.noise.device)


@torch.no_grad()
def learn_rotation(basis: Basis, x: Inputs, y: Float[Tensor, "n t"], start: Rotation) -> Rotation | None:
    """The rotation that maximises the penalised bound of all rows at a fixed kernel. The basis' noise is not used.

    None where the bound gains less, over outputs as they are, than a nat for each of the t^2 - 1 numbers more that are
    learned (Akaike 1974): of outputs that do not go together, correlations learned from few rows predict worse.
    Raises NumericalError where no factorisation succeeds.
    """
    spectrum = Spectrum.of(gather_whitened(basis, x, y), y.mT @ y)
    found = maximise(spectrum, start)
    gain = spectrum.bound(found.unmixing, found.noise) - spectrum.bound(start.unmixing, start.noise)
    return found if gain > y.shape[1] ** 2 - 1 else None


@dataclass(frozen=True)
class Spectrum:
    """Whitened statistics in the eigenvectors of A, which serve every W and every noise that is tried.

    Shapes: values [m], cross [m, t], products [t, t] (sums of y_s y_t over rows), unexplained [] (kappa - tr A).
    """

    values: Float[Tensor, " m"]
    cross: Float[Tensor, "m t"]
    products: Float[Tensor, "t t"]
    unexplained: Float[Tensor, ""]
    count: int

    @classmethod
    def of(cls, whitened: Statistics, products: Float[Tensor, "t t"]) -> Spectrum:
        """By one eigendecomposition."""
        values, vectors = torch.linalg.eigh(whitened.outer)
        unexplained = (whitened.trace - whitened.outer.diagonal().sum()).clamp(min=0.0)
        return cls(values.clamp(min=0.0), vectors.mT @ whitened.cross, products, unexplained, whitened.count)

    def bound(self, unmixing: Float[Tensor, "t t"], noise: Float[Tensor, " t"]) -> Float[Tensor, ""]:
        """The collapsed bound (nats) of standardised y, differentiable."""
        cross = self.cross @ unmixing.mT
        spread = noise + self.values[:, None]  # [m, t]
        quadratic = ((unmixing @ self.products) * unmixing).sum(-1) - (cross.square() / spread).sum(0)
        value = (
            -0.5 * self.count * torch.log(2.0 * math.pi * noise)
            - 0.5 * torch.log(spread / noise).sum(0)
            - 0.5 * (quadratic + self.unexplained) / noise
        )
        return value.sum() + self.count * torch.linalg.slogdet(unmixing)[1]

    def split(self, at: Rotation) -> Rotation:
        """One step of expectation maximisation for B and Sigma, and the rotation that diagonalises both.

        From outputs as they are, whose noise may be alike, gradients alone would not find the axes: there every
        orthogonal W is as good as another.
        """
        w = at.unmixing
        cross = (self.cross @ w.mT).mT
        shrink = at.noise[:, None] / (at.noise[:, None] + self.values)  # posterior variances [t, m]
        mean = shrink * cross / at.noise[:, None]
        signal = (mean @ mean.mT + torch.diag(shrink.sum(-1))) / len(self.values)
        explained = mean @ cross.mT
        residual = w @ self.products @ w.mT - explained - explained.mT + (mean * self.values) @ mean.mT
        residual = residual + torch.diag((shrink * self.values).sum(-1) + self.unexplained)
        root, _ = cholesky(signal, "covariance of the outputs' functions")
        noise, axes = torch.linalg.eigh(solve_lower(root, solve_lower(root, residual).mT) / self.count)
        return Rotation(axes.mT @ solve_lower(root, w), noise.clamp(min=1.001 * MIN_NOISE))


def maximise(spectrum: Spectrum, start: Rotation) -> Rotation:
    """The rotation of the highest bound, less a pull towards outputs that are not correlated.

    The pull is that of t + 1 more rows in which the noise, and of one in which the functions, had the variances of the
    start and no correlation: without it few rows, or outputs that are copies of each other, have no maximum. (In
    simulations less for the noise predicts worse, the more outputs the more; for B, of which t by t numbers are
    learned from whole functions, more hides the correlation and gains little.)
    """
    mixing = start.mixing
    b = mixing.square().sum(-1)
    sigma = (mixing.square() * start.noise).sum(-1)
    first = spectrum.split(start)
    with torch.enable_grad():
        turn = torch.eye(len(b), dtype=b.dtype, device=b.device, requires_grad=True)
        level = first.noise.log().requires_grad_()

        def loss() -> Tensor:
            unmixing, noise = turn @ first.unmixing, level.exp()
            log_det = torch.linalg.slogdet(unmixing)[1]
            of_b = (unmixing.square() @ b).sum() - 2.0 * log_det
            of_sigma = (unmixing.square() @ sigma / noise + level).sum() - 2.0 * log_det
            pull = 0.5 * (B_ROWS * of_b + (len(b) + 1) * of_sigma)
            value = (pull - spectrum.bound(unmixing, noise)) / spectrum.count
            value.backward()
            return value.detach()

        lbfgs(loss, [turn, level], STEPS, lambda value: None)
    return Rotation(turn.detach() @ first.unmixing, level.detach().exp().clamp(min=1.001 * MIN_NOISE))
