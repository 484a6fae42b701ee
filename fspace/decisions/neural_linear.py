"""NeuralLinear: a network learns features from rewards, Bayesian linear regression on its last layer explores.

Source: Riquelme, Tucker and Snoek (2018), section 3. It keeps all it has seen, to train again on.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fspace.decisions.bandits import Moments
from fspace.inference.numerics import seeded, solve_lower
from fspace.predictive_base import check_seed, check_whole


class NeuralLinear:
    """Knowledge about arms for a `Bandit`: two hidden layers of `hidden` units, retrained every `every` rewards.

    The noise variance of every arm has the conjugate inverse-gamma prior IG(6, 6), in standardised rewards.
    """

    def __init__(
        self, width: int, arms: int, hidden: int = 50, every: int = 50, steps: int = 100, seed: int = 0
    ):
        check_whole("width", width), check_whole("hidden", hidden), check_whole("every", every)
        check_whole("steps", steps), check_seed(seed)
        self.arms, self.every, self.steps = check_whole("arms", arms, 2), every, steps
        with seeded(seed):
            self.body = nn.Sequential(
                nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
            )
            self.head = nn.Linear(hidden, arms)
        self._generator = torch.Generator().manual_seed(seed)
        self._x, self._arm, self._r = torch.empty(0, width), torch.empty(0, dtype=torch.long), torch.empty(0)
        self._trained_at, self._shift, self._scale = 0, 0.0, 1.0
        self._size = hidden + 1
        self._linear()

    def _features(self, x: Tensor) -> Float[Tensor, "n h"]:
        with torch.no_grad():
            h = self.body(x.float()).double()
        return torch.cat([h, torch.ones_like(h[:, :1])], 1)

    def _linear(self) -> None:
        """Normal-inverse-gamma regression of every arm, prior N(0, 4 s2 I)."""
        eye = torch.eye(self._size, dtype=torch.float64)
        self._precision = (0.25 * eye).repeat(self.arms, 1, 1)
        self._cross = torch.zeros(self.arms, self._size, dtype=torch.float64)
        self._squares = torch.zeros(self.arms, dtype=torch.float64)
        self._count = torch.zeros(self.arms, dtype=torch.float64)
        if len(self._r):
            self._add(self._x, self._arm, self._r)

    def _add(self, x: Tensor, arm: Tensor, r: Tensor) -> None:
        h, target = self._features(x), ((r - self._shift) / self._scale).double()
        for a in arm.unique().tolist():
            mine = arm == a
            self._precision[a] += h[mine].mT @ h[mine]
            self._cross[a] += h[mine].mT @ target[mine]
            self._squares[a] += target[mine].square().sum()
            self._count[a] += mine.sum()

    def moments(self, contexts: Float[Tensor, "n d"]) -> Moments:
        """Mean and standard deviation of the expected reward of every arm, noise variance at its posterior mean."""
        factor = torch.linalg.cholesky(self._precision)
        mean = torch.cholesky_solve(self._cross[..., None], factor)[..., 0]
        scale = 6.0 + 0.5 * (self._squares - (mean * self._cross).sum(-1)).clamp(min=0.0)
        noise = scale / (6.0 + 0.5 * self._count - 1.0)
        h = self._features(contexts)
        w = solve_lower(factor, h.mT.expand(self.arms, *h.mT.shape))
        stddev = (noise[:, None] * w.square().sum(-2)).sqrt().mT
        return Moments(h @ mean.mT * self._scale + self._shift, stddev * self._scale)

    def update(
        self, contexts: Float[Tensor, "n d"], arms: Int[Tensor, " n"], rewards: Float[Tensor, " n"]
    ) -> None:
        """Take in rewards; train the network again when `every` more have come."""
        self._x, self._arm = torch.cat([self._x, contexts.float()]), torch.cat([self._arm, arms])
        self._r = torch.cat([self._r, rewards.float()])
        if len(self._r) - self._trained_at >= self.every:
            self._train()
            self._linear()
        else:
            self._add(contexts, arms, rewards)

    def _train(self) -> None:
        self._trained_at = len(self._r)
        self._shift, self._scale = float(self._r.mean()), max(float(self._r.std()), 1e-6)
        target = (self._r - self._shift) / self._scale
        optimiser = torch.optim.Adam([*self.body.parameters(), *self.head.parameters()], lr=3e-3)
        for _ in range(self.steps):
            rows = torch.randint(len(self._r), (min(512, len(self._r)),), generator=self._generator)
            guess = self.head(self.body(self._x[rows])).gather(1, self._arm[rows][:, None])[:, 0]
            optimiser.zero_grad()
            (guess - target[rows]).square().mean().backward()
            optimiser.step()
