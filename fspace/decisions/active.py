"""Which rows of a pool to label next: those that tell most about the function, not those whose noise is largest.

Criteria (K: latent covariance, s2: noise variance, both of a candidate; picks so far are taken as observed):
- variance: the largest latent variance left. eig: the largest information gain, log(1 + K / s2) / 2 nats.
- nipv: the most latent variance removed from reference rows (negative integrated posterior variance).
- bald: mutual information of each row's y and the function, the k largest, blind to what the picks share.
- batchbald: joint mutual information of all picks' labels and the function; of Gaussian y that is eig.
The pool is streamed: a first pass keeps a shortlist, half of it the rows that are best by themselves and half a random
sample of the others (the best are often neighbours), and the batch is chosen in it. For
all criteria but nipv, picks never gain by other picks, so where no gain in the batch falls below the best row that was
left out, the shortlist has cost nothing; `Selection.exact` says whether that is so.
Sources: Houlsby et al. (2011), BALD; Kirsch et al. (2019), BatchBALD; Krause et al. (2008), greedy information gain;
Seo et al. (2000), integrated variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fspace.decisions.sources import parts_of, posterior_of, rows_of
from fspace.errors import DataError, OptionError
from fspace.posterior import FunctionPosterior
from fspace.predictive import Categorical, Gaussian, Mixture, Predictive, Samples
from fspace.predictive_base import check_seed, check_whole

CRITERIA = ("bald", "variance", "eig", "batchbald", "nipv")
PART = 8192  # rows scored at once
SHORTLIST = 1024  # rows among which a batch is chosen
REFERENCE = 256  # rows whose variance nipv lowers, where none are given
FUNCTIONS = 256  # drawn, of class probabilities
CONFIGURATIONS = 4096  # of a batch's labels that batchbald enumerates; beyond, as many are drawn


@dataclass(frozen=True)
class Selection:
    """Chosen rows, in the order chosen. Shapes: index [k] (position in the pool), x [k, d] (as the posterior takes
    them), gain [k] (what each added, in the criterion's units). exact: no better greedy batch is in the pool; None
    where that is not known."""

    index: Int[Tensor, " k"]
    x: Float[Tensor, "k d"]
    gain: Float[Tensor, " k"]
    exact: bool | None


@torch.no_grad()
def select(
    model: Any,
    pool: Any,
    k: int,
    criterion: Any = "variance",
    reference: Any = None,
    duplicates: Any = "error",
    shortlist: int = SHORTLIST,
    seed: int = 0,
) -> Selection:
    """k rows of a pool to label next, chosen together. Memory does not grow with the pool.

    model: a FunctionPosterior or a fitted estimator. pool: [n, d], a table, or an iterable of such parts (it is read
    once; nipv without reference reads it twice). criterion: see above. reference [r, d]: the rows nipv is about.
    duplicates: "error" refuses candidates that are equal, "drop" keeps the first of them. Several outputs: their
    variances and gains are summed. Raises DataError for an empty pool, fewer rows than k, NaN, other columns,
    duplicates; OptionError for what does not exist.
    """
    if not isinstance(criterion, str) or criterion not in CRITERIA:
        raise OptionError(f"criterion={criterion!r} does not exist; choose one of {', '.join(CRITERIA)}.")
    if not isinstance(duplicates, str) or duplicates not in ("error", "drop"):
        raise OptionError(f"duplicates={duplicates!r} does not exist; choose 'error' or 'drop'.")
    if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 1:
        raise OptionError(f"k={k!r}: how many rows to choose is a whole number of at least 1.")
    check_seed(seed)
    shortlist = max(check_whole("shortlist", shortlist), 2 * k)
    posterior = posterior_of(model)
    if criterion == "nipv":
        if reference is None and not (hasattr(pool, "shape") or isinstance(pool, list | tuple)):
            raise OptionError("nipv of a stream needs reference rows; give reference=[r, d].")
        about = _some_rows(model, pool, seed) if reference is None else rows_of(model, reference, "reference")
        score = _integrated(posterior, about)
    else:
        about = None
        score = _score_of(posterior, criterion)
    index, x, scores, left_out = _shortlist(model, pool, score, shortlist, duplicates == "drop", seed)
    if len(index) < k:
        raise DataError(f"k={k}: the pool has {len(index)} candidates.")
    if criterion == "bald":
        chosen, gain = torch.arange(k), scores[:k]
        return Selection(index[:k], x[:k], gain, True)
    predictive = posterior.observed(x)
    if isinstance(predictive, Categorical):
        if criterion == "nipv":
            raise OptionError("nipv is for numbers; for classes take bald or batchbald.")
        if criterion == "variance":
            probs = predictive._draw(FUNCTIONS, seed).cpu()
            centred = (probs - probs.mean(0)).to(torch.float64)
            covariance = torch.einsum("snc,smc->cnm", centred, centred) / len(probs)
            noise = (probs * (1 - probs)).mean(0).mT.to(torch.float64)
            chosen, gain = _greedy(covariance, noise, k, "variance", None)
        else:
            chosen, gain = _batchbald(predictive._draw(FUNCTIONS, seed).to("cpu", torch.float64), k, seed)
    else:
        points = x if about is None else torch.cat([x, about])
        covariance = _covariance(posterior.latent(points), points)
        noise = predictive.aleatoric.reshape(len(x), -1).mT.cpu()
        chosen, gain = _greedy(covariance, noise, k, criterion, len(x) if about is not None else None)
    whole = left_out == -math.inf  # the pool is no longer than the shortlist
    exact = True if whole else None if criterion == "nipv" else bool(gain.min() >= left_out)
    return Selection(index[chosen], x[chosen], gain, exact)


def _score_of(posterior: FunctionPosterior, criterion: str) -> Callable[[Tensor], Tensor]:
    """What one row gains by itself, for rows [c, d] -> [c]."""

    def score(rows: Tensor) -> Tensor:
        predictive = posterior.observed(rows)
        if isinstance(predictive, Categorical):
            if criterion != "variance":
                return predictive.mutual_information
            spread = torch.einsum("s,snc->nc", predictive.weights, predictive.samples.square())
            return (spread - predictive.probs.square()).sum(-1).clamp(min=0.0)
        latent = posterior.latent(rows).variance.reshape(len(rows), -1)
        if criterion == "variance":
            return latent.sum(-1)
        return 0.5 * torch.log1p(latent / predictive.aleatoric.reshape(len(rows), -1)).sum(-1)

    return score


def _integrated(posterior: FunctionPosterior, about: Float[Tensor, "r d"]) -> Callable[[Tensor], Tensor]:
    """Variance that one row removes from the rows `about`, on average."""

    def score(rows: Tensor) -> Tensor:
        predictive = posterior.observed(rows[:1])
        if isinstance(predictive, Categorical):
            raise OptionError("nipv is for numbers; for classes take bald or batchbald.")
        scores = []
        for part in rows.split(1024):
            noise = posterior.observed(part).aleatoric.reshape(len(part), -1).mT.cpu()
            points = torch.cat([part, about])
            covariance = _covariance(posterior.latent(points), points)
            c = len(part)
            own = covariance[:, :c, :c].diagonal(dim1=-2, dim2=-1)
            scores.append((covariance[:, :c, c:].square().mean(-1) / (own + noise)).sum(0))
        return torch.cat(scores)

    return score


def _covariance(latent: Predictive, points: Tensor) -> Float[Tensor, "t n n"]:
    """Joint latent covariance of every output."""
    if isinstance(latent, Samples):
        values = latent.values.to(torch.float64)
        values = (values - values.mean(0)).reshape(len(values), len(points), -1)
        return (torch.einsum("snt,smt->tnm", values, values) / len(values)).cpu()
    if isinstance(latent, Gaussian | Mixture):
        covariance = latent.covariance.cpu()
        return covariance if covariance.ndim == 3 else covariance[None]
    raise OptionError(
        f"Batches need a joint latent covariance, which {type(latent).__name__} has not; take bald."
    )


def _greedy(
    covariance: Float[Tensor, "t n n"],
    noise: Float[Tensor, "t c"],
    k: int,
    criterion: str,
    candidates: int | None,
) -> tuple[Int[Tensor, " k"], Float[Tensor, " k"]]:
    """Greedy batch; each pick is taken as observed, with its noise. Rows from `candidates` on are reference rows."""
    left, count = covariance.clone(), noise.shape[1]
    level = covariance.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    noise = noise.clamp(min=1e-10 * level.clamp(min=1e-300))  # a noiseless row is known once it is seen
    chosen: list[int] = []
    gains = []
    for _ in range(k):
        own = left.diagonal(dim1=-2, dim2=-1)[:, :count].clamp(min=0.0)
        if criterion == "variance":
            gain = own.sum(0)
        elif criterion == "nipv":
            gain = (left[:, :count, candidates:].square().mean(-1) / (own + noise)).sum(0)
        else:
            gain = 0.5 * torch.log1p(own / noise).sum(0)
        gain = gain.index_fill(0, torch.tensor(chosen, dtype=torch.long), -math.inf)
        best = int(gain.argmax())
        chosen.append(best)
        gains.append(gain[best])
        row = left[:, best, :]
        scale = (row[:, best].clamp(min=0.0) + noise[:, best]).sqrt()
        row = row / scale[:, None]
        left = left - row[:, :, None] * row[:, None, :]
    return torch.tensor(chosen), torch.stack(gains)


def _batchbald(
    probs: Float[Tensor, "s n c"], k: int, seed: int
) -> tuple[Int[Tensor, " k"], Float[Tensor, " k"]]:
    """Greedy joint mutual information: H(y_1..y_k) - E H(y_1..y_k | f). Source: Kirsch et al. (2019), algorithm 1."""
    s, n, c = probs.shape
    generator = torch.Generator().manual_seed(seed)
    conditional = torch.special.entr(probs).sum(-1).mean(0)  # E H(y_i | f)
    joint = torch.ones(s, 1, dtype=probs.dtype)  # p(configuration | f) of the picks so far
    weight = torch.ones(
        1, dtype=probs.dtype
    )  # 1 where configurations are enumerated, else 1 / (m p): importance
    chosen: list[int] = []
    gains, known, before = [], 0.0, 0.0
    for _ in range(k):
        entropy = torch.empty(n, dtype=probs.dtype)
        for rows in torch.arange(n).split(max(1, 2**22 // (joint.shape[1] * c))):
            both = torch.einsum("sm,snc->nmc", joint, probs[:, rows]) / s
            entropy[rows] = (weight[:, None] * torch.special.entr(both)).sum((-2, -1))
        gain = entropy - conditional - known - before
        gain = gain.index_fill(0, torch.tensor(chosen, dtype=torch.long), -math.inf)
        best = int(gain.argmax())
        chosen.append(best)
        gains.append(gain[best])
        known += float(conditional[best])
        before += float(gain[best])
        joint = (joint[:, :, None] * probs[:, best, None, :]).flatten(1)
        weight = weight.repeat_interleave(c)
        if joint.shape[1] > CONFIGURATIONS:  # draw configurations from their distribution instead
            mean = joint.mean(0) * weight
            pick = torch.multinomial(mean, CONFIGURATIONS, replacement=True, generator=generator)
            weight = weight[pick] / (CONFIGURATIONS * mean[pick] / mean.sum())
            joint = joint[:, pick]
    return torch.tensor(chosen), torch.stack(gains)


def _shortlist(
    model: Any, pool: Any, score: Callable[[Tensor], Tensor], size: int, drop: bool, seed: int
) -> tuple[Int[Tensor, " m"], Float[Tensor, "m d"], Float[Tensor, " m"], float]:
    """Rows of the pool among which to choose, best first by their own score, and the best score that was left out."""
    generator = torch.Generator().manual_seed(seed)
    kept: tuple[Tensor, ...] | None = None  # index, rows, scores, random keys
    left_out, seen = -math.inf, 0
    for part in parts_of(model, pool, PART):
        new = (
            torch.arange(seen, seen + len(part)),
            part,
            score(part).to("cpu", torch.float64),
            torch.rand(len(part), generator=generator, dtype=torch.float64),
        )
        seen += len(part)
        joined = new if kept is None else tuple(torch.cat(pair) for pair in zip(kept, new, strict=True))
        first = _first_of_each(joined[1], joined[0], drop)
        joined = tuple(column[first] for column in joined)
        order = joined[2].argsort(descending=True, stable=True)
        rest = order[size // 2 :]
        rest = rest[joined[3][rest].argsort(descending=True)]
        dropped = rest[size - size // 2 :]
        if len(dropped):
            left_out = max(left_out, float(joined[2][dropped].max()))
        chosen = torch.cat([order[: size // 2], rest[: size - size // 2]])
        kept = tuple(column[chosen] for column in joined)
    assert kept is not None
    index, x, scores, _ = kept
    order = scores.argsort(descending=True, stable=True)
    return index[order], x[order], scores[order], left_out


def _first_of_each(x: Float[Tensor, "m d"], index: Int[Tensor, " m"], drop: bool) -> Int[Tensor, " k"]:
    """Positions of rows without those equal to an earlier one. Raises DataError where there are such and `drop` is
    False."""
    _, group = torch.unique(x, dim=0, return_inverse=True)
    first = torch.full((int(group.max()) + 1,), len(x)).scatter_reduce(0, group, torch.arange(len(x)), "amin")
    keep = first.sort().values
    if len(keep) < len(x) and not drop:
        again = torch.ones(len(x), dtype=torch.bool)
        again[keep] = False
        second = int(again.nonzero()[0])
        raise DataError(
            f"Candidates {int(index[first[group[second]]])} and {int(index[second])} of the pool are equal; remove "
            "duplicates, or give duplicates='drop'."
        )
    return keep


def _some_rows(model: Any, pool: Any, seed: int) -> Float[Tensor, "r d"]:
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randperm(len(pool), generator=generator)[:REFERENCE].sort().values.numpy()
    if isinstance(pool, list | tuple):
        return rows_of(model, [pool[i] for i in pick], "the pool")
    return rows_of(model, pool.iloc[pick] if hasattr(pool, "iloc") else pool[pick], "the pool")
