"""The posterior over states in coordinates in which every prior is N(0, 1), for samplers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.inference.weights.problem import Problem
from fspace.inference.weights.train import negative_log_joint, train


@dataclass(frozen=True, eq=False)
class Whitened:
    """Coordinates u [q]: theta = prior mean + prior scale * precondition * u. Energies are minus the log joint density
    of all rows, up to a constant."""

    problem: Problem
    precondition: Float[Tensor, " q"]

    @cached_property
    def centre(self) -> Float[Tensor, " q"]:
        """The state at u = 0."""
        return self.problem.prior_means

    @cached_property
    def scales(self) -> Float[Tensor, " q"]:
        """How far a state moves with u."""
        return self.problem.prior_scales * self.precondition

    def theta(self, u: Float[Tensor, "*s q"]) -> Float[Tensor, "*s q"]:
        """States at coordinates."""
        return self.centre + self.scales * u

    def coordinates(self, theta: Float[Tensor, "*s q"]) -> Float[Tensor, "*s q"]:
        """Coordinates of states."""
        return (theta - self.centre) / self.scales

    def energy(self, u: Float[Tensor, "s q"], rows: Tensor) -> Float[Tensor, " s"]:
        """Energies, from some rows for all."""
        problem = self.problem
        density = problem.log_likelihood(self.theta(u), problem.x[rows], problem.y[rows])
        return 0.5 * (self.precondition * u).square().sum(-1) - density.sum(-1) * (problem.n / len(rows))

    def gradient(self, u: Float[Tensor, "s q"], rows: Tensor) -> Float[Tensor, "s q"]:
        """Slopes of the energies."""
        return self.energy_and_gradient(u, rows)[1]

    def energy_and_gradient(
        self, u: Float[Tensor, "s q"], rows: Tensor
    ) -> tuple[Float[Tensor, " s"], Float[Tensor, "s q"]]:
        """Energies and their slopes."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            energy = self.energy(u, rows)
            return energy.detach(), torch.autograd.grad(energy.sum(), u)[0]

    def squares(self, u: Float[Tensor, " q"], rows: Tensor) -> Float[Tensor, "b q"]:
        """Slope of the log density of each row (empirical Fisher: the sum of squares is about the curvature)."""

        def of_row(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return self.problem.log_likelihood(self.theta(v)[None], x[None], y[None])[0, 0]

        x, y = self.problem.x[rows], self.problem.y[rows]
        gradient = torch.func.grad(of_row)
        if x.ndim == 3:  # networks for sequences look at the lengths of rows, which vmap cannot
            return torch.stack([gradient(u, a, b) for a, b in zip(x, y)])
        return torch.func.vmap(gradient, in_dims=(None, 0, 0))(u, x, y)

    def stiffness(self, u: Float[Tensor, " q"], rows: Tensor) -> float:
        """The largest curvature of the energy, by twenty steps of the power method (on Hessian-vector products)."""
        generator = self.problem.generator_cpu(7)
        v = torch.randn(u.shape, generator=generator, dtype=torch.float64).to(u)
        value = 1.0
        with torch.enable_grad():
            at = u.detach().requires_grad_()
            slope = torch.autograd.grad(self.energy(at[None], rows)[0], at, create_graph=True)[0]
            for _ in range(20):
                v = v / v.norm()
                product = torch.autograd.grad(slope, at, v, retain_graph=True)[0]
                value, v = product.norm().item(), product
        return max(value, 1.0)


def settled(problem: Problem, s: int, stage: str) -> Float[Tensor, "s q"]:
    """Where samplers start: states from different random starts, trained to their modes."""
    return train(problem, problem.start(s), negative_log_joint(problem), f"{stage}: start").theta


def preconditioned(problem: Problem, theta: Float[Tensor, " q"]) -> Whitened:
    """Coordinates in which the curvature at a state has about a unit diagonal (of 1,024 rows, scaled to all)."""
    plain = Whitened(problem, torch.ones_like(theta))
    rows = torch.randperm(problem.n, generator=problem.generator_cpu(8))[:1024].to(theta.device)
    with torch.no_grad():
        total = sum(plain.squares(plain.coordinates(theta), part).square().sum(0) for part in rows.split(256))
    curvature = 1.0 + torch.as_tensor(total) * (problem.n / len(rows))
    return Whitened(problem, curvature.rsqrt())
