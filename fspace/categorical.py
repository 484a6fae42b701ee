"""Class probabilities of an ensemble (or of sampled functions) as a predictive."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fspace.errors import DataError, OptionError
from fspace.normal import as_tensor
from fspace.predictive import Predictive


class Categorical(Predictive):
    """Labels 0..c-1 at n points, from the class probabilities of s sampled functions.

    members: `[s, n, c]`, or `[n, c]` for one; rows sum to 1. Attribute `members` is always `[s, n, c]`.
    Labels have no order: mean, variance, cdf and quantile raise OptionError; ask probs, entropy, mode.
    Uncertainties are in nats: entropy = mutual_information (epistemic) + expected entropy (aleatoric), Houlsby et al. 2011.
    Raises DataError for probabilities that are negative, NaN or do not sum to 1.
    """

    outputs = None

    def __init__(self, probs: Float[Tensor, "..."]) -> None:
        if probs.ndim not in (2, 3) or 0 in probs.shape[:1] or probs.shape[-1] == 0:
            raise DataError(f"Categorical: probs have shape {tuple(probs.shape)}; give [n, c] or [s, n, c].")
        members = probs[None] if probs.ndim == 2 else probs
        total = members.sum(-1)
        wrong = ~((members >= 0).all(-1) & ((total - 1).abs() <= 1e-3))
        if bool(wrong.any()):
            s, n = (int(i) for i in wrong.nonzero()[0])
            raise DataError(
                f"Categorical: the probabilities of row {n} (member {s}) are negative, NaN or sum to {float(total[s, n]):.6g}; "
                "apply softmax first."
            )
        # Float32 softmax sums to 1 within 1e-6 or so; entropies should not see the difference.
        self.members = members / total[..., None]

    @property
    def probs(self) -> Float[Tensor, "n c"]:
        """Class probabilities, averaged over the members."""
        return self.members.mean(0)

    @property
    def mode(self) -> Int[Tensor, " n"]:
        """The most probable label of each point."""
        return self.probs.argmax(-1)

    @property
    def entropy(self) -> Float[Tensor, " n"]:
        """Entropy of the averaged probabilities, in nats."""
        return torch.special.entr(self.probs).sum(-1)

    @property
    def aleatoric(self) -> Float[Tensor, " n"]:
        """Expected entropy of the members, in nats: what remains when the function is known."""
        return torch.special.entr(self.members).sum(-1).mean(0)

    @property
    def mutual_information(self) -> Float[Tensor, " n"]:
        """Information, in nats, that the label of a point carries about the function (BALD); at least zero."""
        return (self.entropy - self.aleatoric).clamp_min(0)

    @property
    def epistemic(self) -> Float[Tensor, " n"]:
        return self.mutual_information

    @property
    def shape(self) -> torch.Size:
        return self.members.shape[1:2]

    @property
    def device(self) -> torch.device:
        return self.members.device

    def log_prob(self, y: Any) -> Float[Tensor, "..."]:
        """Log probability of each label under the averaged probabilities, `[n]` (leading axes allowed); -inf for impossible ones."""
        labels = self._labels(y, "log_prob")
        probs = self.probs.expand(*labels.shape, -1)
        return probs.gather(-1, labels[..., None]).squeeze(-1).log()

    def joint_log_prob(self, y: Any) -> Float[Tensor, "..."]:
        """Log probability of all labels together: log of the members' average of the product over points."""
        labels = self._labels(y, "joint_log_prob")
        picked = self.members.log().expand(*labels.shape[:-1], *self.members.shape)
        index = labels[..., None, :, None].expand(*picked.shape[:-1], 1)
        return torch.logsumexp(picked.gather(-1, index).squeeze(-1).sum(-1), -1) - torch.tensor(float(len(self.members))).log()

    def _rsample(self, n: int, generator: torch.Generator) -> Int[Tensor, "n points"]:
        # One member per joint sample; given the function, labels of different points are independent.
        chosen = torch.randint(len(self.members), (n,), generator=generator, device=self.device)
        rows = self.members[chosen].flatten(0, 1)
        return torch.multinomial(rows, 1, generator=generator).view(n, -1)

    def rsample(self, n: int = 1, seed: int | None = None) -> Int[Tensor, "n points"]:
        """Draw n joint samples of the labels, `[n, points]`; labels have no gradient."""
        return super().rsample(n, seed)

    @property
    def mean(self) -> Tensor:
        self._no_order("mean")

    @property
    def variance(self) -> Tensor:
        self._no_order("variance")

    @property
    def covariance(self) -> Tensor:
        self._no_order("covariance")

    def cdf(self, y: Any) -> Tensor:
        self._no_order("cdf")

    def _quantile(self, levels: Tensor) -> Tensor:
        self._no_order("quantile")

    def affine(self, loc: Any, scale: Any) -> Predictive:
        self._no_order("affine")

    def _no_order(self, name: str) -> NoReturn:
        raise OptionError(f"{name}: class labels are not numbers; ask probs, mode, entropy or mutual_information.")

    def _labels(self, y: Any, name: str) -> Int[Tensor, "..."]:
        values = as_tensor(y, torch.float64, self.device)
        n, c = self.members.shape[1:]
        if values.ndim < 1 or values.shape[-1] != n:
            raise DataError(f"{name}: labels have shape {tuple(values.shape)}, the predictive has {n} points.")
        wrong = ~((values >= 0) & (values < c) & (values == values.floor()))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, -1])
            found = float(values[wrong][0])
            raise DataError(f"{name}: the label of row {row} is {found:g}; labels are the whole numbers 0 to {c - 1}.")
        return values.long()
