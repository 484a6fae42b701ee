"""Mean-field variational inference: independent Gaussians over all weights and log noise variances.

Linear layers draw their outputs, not their weights (local reparameterisation); convolutions draw weights whose signs
are flipped row by row (Flipout). Both leave the bound as it is and lower the variance of its gradient.
Sources: Blundell et al. (2015); Kingma, Salimans and Welling (2015, eq. 6); Wen et al. (2018, eq. 3 and 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import OptionError
from fspace.inference.weights.distributions import Diagonal
from fspace.inference.weights.layer_calls import Call, by_row
from fspace.inference.weights.likelihoods import NetworkLikelihood
from fspace.inference.weights.problem import Problem
from fspace.inference.weights.train import Loss, train

# passes and learning rate, as factors of what networks are trained with
FASTER, LONGER = 3.0, 2.5
WARM = 0.3  # share of the steps in which the divergence comes to count in full


@dataclass(frozen=True)
class MFVI:
    """Bayes by backprop. Where weights are correlated in the posterior, as they are, its variances are those of each
    weight given the others (1 / the diagonal of the precision), hence too small.

    It is trained at three times the learning rate of a network, and for 2.5 times as many passes where `epochs` is
    None: with fewer its bound is still rising. Over the first three tenths of the steps the divergence comes to
    count in full (Sonderby et al. 2016); in full from the start, units are lost before they have learned anything.

    tune: one factor on the prior variances of each layer by the bound, of which the best is known at every step: the
        mean square of the layer's whitened weights under q. On few rows that bound may be best where nothing has been
        learned: all weights at the prior. False: the prior as it is given.
    start_scale: deviations at the start, as a share of the prior's. The evidence lower bound (over all rows, of
    standardised y; the last of 32 averaged draws) is in the figures.
    """

    tune: bool = False
    start_scale: float = 0.1
    name: ClassVar[str] = "mfvi"

    def __post_init__(self) -> None:
        if not 0 < self.start_scale <= 1:
            raise OptionError(f"start_scale={self.start_scale!r} must be above 0 and at most 1.")

    def fit(self, problem: Problem) -> tuple[Diagonal, NetworkLikelihood]:
        """The Gaussian of greatest bound."""
        centre = (problem.start(1) - problem.prior_means) / problem.prior_scales
        start = torch.cat([centre, torch.full_like(centre, math.log(self.start_scale))], dim=1)
        steps = problem.steps if problem.training.epochs else round(LONGER * problem.steps)
        rate = FASTER * problem.training.learning_rate
        loss = negative_bound(problem, self.tune, round(WARM * steps))
        found = train(problem, start, loss, self.name, steps=steps, learning_rate=rate).theta[0]
        mean, log_scale = found.split(problem.size)
        q = Diagonal(
            problem.prior_means + problem.prior_scales * mean, problem.prior_scales * log_scale.exp()
        )
        problem.report.figures["elbo"] = _bound(problem, q, found, self.tune)
        return q, problem.likelihood


def negative_bound(problem: Problem, tuned: bool = False, warm: int = 0) -> Loss:
    """Minus the bound a row, of states (whitened mean, log of whitened scale); with temperature T the entropy of q
    counts T times, and in the first `warm` steps the divergence less than once."""
    generator = problem.generator(5)

    def loss(state: Tensor, rows: Tensor, step: Tensor) -> Tensor:
        mean, log_scale = state[0].split(problem.size)
        x, y = problem.x[rows], problem.y[rows]
        f, tail = drawn_outputs(problem, mean, log_scale.exp(), x, generator)
        density = problem.likelihood.log_prob(f, tail, y).mean()
        share = min(1.0, (int(step) + 1) / warm) if warm else 1.0
        return (
            -density[None]
            + share * divergence(problem, mean, log_scale, tuned, problem.temperature) / problem.n
        )

    return loss


def divergence(
    problem: Problem, mean: Tensor, log_scale: Tensor, tuned: bool, temperature: float
) -> Float[Tensor, "1"]:
    """KL of N(mean, scale^2) from N(0, 1), with the entropy times the temperature (then up to a constant).

    tuned: from N(0, c) for each layer with the c that makes it least, the mean square under N(mean, scale^2)."""
    square = mean.square() + (2 * log_scale).exp()
    entropy = -temperature * log_scale.sum()
    if not tuned:
        return (0.5 * (square - 1.0).sum() + entropy)[None]
    total = 0.5 * (square[problem.network.size :] - 1.0).sum()  # the noise keeps its prior
    for layer in problem.network.layers:
        own = torch.cat([square[slice(*ends)] for ends in (layer.weight, layer.bias) if ends is not None])
        total = total + 0.5 * len(own) * own.mean().log()
    return (total + entropy)[None]


def drawn_outputs(
    problem: Problem,
    mean: Float[Tensor, " q"],
    scale: Float[Tensor, " q"],
    x: Tensor,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "n o"], Float[Tensor, " r"]]:
    """Outputs at x [n, *row] and tail under a draw of whitened N(mean, scale^2), of which every row has its own
    weights: each row's output is distributed as under one draw, and rows are (nearly) uncorrelated."""
    network = problem.network
    m, tail_mean = problem.split(problem.prior_means + problem.prior_scales * mean)
    s, tail_scale = problem.split(problem.prior_scales * scale)
    own = network.parameters(s)

    def white(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)

    def signs(*shape: int) -> Tensor:
        return 2.0 * torch.randint(2, shape, generator=generator, device=x.device).to(x.dtype) - 1.0

    def draw(k: int, call: Call, value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        layer = network.layers[k]
        prefix = f"{layer.name}." if layer.name else ""
        deviation = own[f"{prefix}weight"]
        bias_deviation = own[f"{prefix}bias"] if bias is not None else None
        if weight.ndim == 2 and value.ndim == 2:
            square = None if bias_deviation is None else bias_deviation.square()
            variance = call(value.square(), deviation.square(), square)
            return call(value, weight, bias) + (variance + 1e-16).sqrt() * white(*variance.shape)
        if weight.ndim == 2:
            raise OptionError("network: mfvi is for linear layers on rows, not on positions of sequences.")
        n, c = value.shape[:2]
        moved = call(value * by_row(signs(n, c), value), deviation * white(*deviation.shape), None)
        out = call(value, weight, bias) + moved * by_row(signs(n, len(weight)), moved)
        if bias_deviation is not None:
            out = out + by_row(bias_deviation * white(n, len(weight)), out)
        return out

    f = network.watched(m, x, draw)
    return f, tail_mean + tail_scale * white(*tail_scale.shape)


@torch.no_grad()
def _bound(problem: Problem, q: Diagonal, state: Tensor, tuned: bool) -> float:
    """The bound over all rows, by 32 draws of the weights."""
    states = q.sample(32, problem.generator_cpu(6))
    total = 0.0
    for rows in torch.arange(problem.n, device=problem.x.device).split(1024):
        total += (
            problem.log_likelihood(states, problem.x[rows], problem.y[rows]).mean(0).double().sum().item()
        )
    mean, log_scale = state.split(problem.size)
    return total - divergence(problem, mean, log_scale, tuned, 1.0).item()
