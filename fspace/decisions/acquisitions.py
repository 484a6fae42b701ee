"""BoTorch's acquisition functions on posteriors over functions, and their search in mixed spaces.

Outcomes are told so that larger objectives are better; constraints are (a, b) with a'y <= b over all outcomes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from botorch.acquisition import (
    AcquisitionFunction,
    qLogExpectedImprovement,
    qLogNoisyExpectedImprovement,
    qUpperConfidenceBound,
)
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.acquisition.multi_objective.objective import GenericMCMultiOutputObjective
from botorch.acquisition.objective import GenericMCObjective
from botorch.models.model import ModelList
from botorch.optim import optimize_acqf
from botorch.sampling.get_sampler import get_sampler
from botorch.utils.multi_objective.hypervolume import infer_reference_point
from botorch.utils.multi_objective.pareto import is_non_dominated
from botorch.utils.sampling import sample_simplex
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fspace.decisions.space import Space
from fspace.errors import InfeasibleError, OptionError
from fspace.inference.numerics import seeded
from fspace.posterior import FunctionPosterior

ACQUISITIONS = ("qLogNEI", "qLogEI", "qUCB", "qLogNEHVI", "thompson")
SAMPLES = 128
BETA = 4.0  # of qUCB: two standard deviations
CANDIDATES = 1024  # random configurations that a search starts from, and as many near the best so far
COMBINATIONS = 4  # of discrete settings at which continuous ones are searched
RESTARTS = 4

Constraint = tuple[Float[Tensor, " t"], float]


def fulfilled(y: Float[Tensor, "*b t"], constraints: Sequence[Constraint]) -> Bool[Tensor, "*b"]:
    """Which outcomes fulfil all constraints."""
    good = torch.ones(y.shape[:-1], dtype=torch.bool, device=y.device)
    for a, b in constraints:
        good &= y @ a <= b
    return good


def acquisition(
    name: str,
    posteriors: Sequence[FunctionPosterior],
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n t"],
    objectives: int,
    constraints: Sequence[Constraint] = (),
    pending: Float[Tensor, "p d"] | None = None,
    reference_point: Float[Tensor, " o"] | None = None,
    seed: int = 0,
) -> AcquisitionFunction:
    """The acquisition function of this name; the first `objectives` outcomes are to be made large.

    posteriors: one an outcome. x, y: what was observed. Raises OptionError where the name does not fit the outcomes.
    """
    with seeded(seed):  # baselines are pruned by random samples
        return _acquisition(name, posteriors, x, y, objectives, constraints, pending, reference_point, seed)


def _acquisition(
    name: str,
    posteriors: Sequence[FunctionPosterior],
    x: Tensor,
    y: Tensor,
    objectives: int,
    constraints: Sequence[Constraint],
    pending: Tensor | None,
    reference_point: Tensor | None,
    seed: int,
) -> AcquisitionFunction:

    def _goals(samples: Tensor, X: Tensor | None = None) -> Tensor:
        return samples[..., :objectives]

    def _goal(samples: Tensor, X: Tensor | None = None) -> Tensor:
        return samples[..., 0]

    models = [posterior.as_botorch() for posterior in posteriors]
    model: Any = models[0] if len(models) == 1 else ModelList(*models)
    sampler = get_sampler(model.posterior(x[:1]), torch.Size([SAMPLES]), seed=seed)
    limits: Any = [lambda values, X=None, a=a, b=b: values @ a - b for a, b in constraints]
    common: dict[str, Any] = {"model": model, "sampler": sampler, "X_pending": pending}
    if objectives > 1:
        if name != "qLogNEHVI":
            raise OptionError(
                f"acquisition={name!r} is for one objective; for {objectives} take 'qLogNEHVI'."
            )
        good = y[fulfilled(y, constraints)][:, :objectives]
        values = good if len(good) else y[:, :objectives]
        if reference_point is None:
            reference_point = infer_reference_point(values[is_non_dominated(values)])
        return qLogNoisyExpectedHypervolumeImprovement(
            ref_point=reference_point,
            X_baseline=x,
            objective=GenericMCMultiOutputObjective(_goals),
            constraints=limits or None,
            prune_baseline=True,
            cache_root=False,
            **common,
        )
    if len(models) > 1:
        common["objective"] = GenericMCObjective(_goal)
        common["constraints"] = limits or None
    if name == "qLogNEI":
        return qLogNoisyExpectedImprovement(X_baseline=x, prune_baseline=True, cache_root=False, **common)
    if name == "qLogEI":
        good = y[fulfilled(y, constraints)][:, 0]
        return qLogExpectedImprovement(best_f=(good if len(good) else y[:, 0]).max(), **common)
    if name == "qUCB":
        if constraints:
            raise OptionError("acquisition='qUCB' knows no constraints; take 'qLogNEI'.")
        return qUpperConfidenceBound(beta=BETA, **common)
    raise OptionError(f"acquisition={name!r} does not exist; choose one of {', '.join(ACQUISITIONS)}.")


def search(
    function: AcquisitionFunction,
    space: Space,
    candidates: Float[Tensor, "m d"],
    taken: Float[Tensor, "n d"],
    seed: int,
) -> Float[Tensor, " d"]:
    """The encoded configuration of the largest value: from the best of the candidates, continuous settings by
    gradients, at the combinations of discrete ones that promise most; never one of `taken` where that can be told
    apart."""
    with torch.no_grad():
        values = torch.cat([function(part[:, None, :]) for part in candidates.split(256)])
    order = values.argsort(descending=True)
    best, best_value = candidates[order[0]], values[order[0]]
    if len(space.discrete) == len(space.settings):
        return best
    discrete = torch.tensor([c for name in space.discrete for c in space.columns[name]], dtype=torch.long)
    combinations = candidates[order][:, discrete]
    for values_there in _first_distinct(combinations, COMBINATIONS):
        here = order[(combinations == values_there).all(1)][:RESTARTS]
        with seeded(seed), warnings.catch_warnings():
            # a line search that ends early is no loss: what it found is compared with where it started
            warnings.filterwarnings("ignore", "Optimization failed", RuntimeWarning)
            found, value = optimize_acqf(
                function,
                space.bounds,
                q=1,
                num_restarts=len(here),
                batch_initial_conditions=candidates[here][:, None, :],
                fixed_features=dict(zip(discrete.tolist(), values_there.tolist(), strict=True)) or None,
                inequality_constraints=_inequalities(space),
                options={"batch_limit": RESTARTS, "maxiter": 100},
                retry_on_optimization_warning=False,
            )
        row = space.rounded(found.clamp(0.0, 1.0))
        if (
            value is not None
            and bool(value > best_value)
            and bool(space.feasible(row)[0])
            and not _among(row, taken)[0]
        ):
            best, best_value = row[0], value
    return best


def _first_distinct(rows: Float[Tensor, "n k"], most: int) -> list[Float[Tensor, " k"]]:
    """The first rows that differ from each other."""
    found: dict[tuple[float, ...], Tensor] = {}
    for row in rows:
        found.setdefault(tuple(row.tolist()), row)
        if len(found) == most or rows.shape[1] == 0:
            break
    return list(found.values())


def candidates(
    space: Space,
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n t"],
    objectives: int,
    constraints: Sequence[Constraint],
    taken: Float[Tensor, "p d"],
    seed: int,
) -> Float[Tensor, "m d"]:
    """Random configurations, and steps from the best so far, that fulfil the constraints of the space and were not
    tried. In many dimensions random ones alone are too far from what is good. Raises InfeasibleError."""
    found = torch.cat([fresh(space, taken, seed), _near_best(space, x, y, objectives, constraints, seed)])
    return found[space.feasible(found) & ~_among(found, taken)]


def fresh(space: Space, taken: Float[Tensor, "n d"], seed: int) -> Float[Tensor, "m d"]:
    """Random configurations that fulfil the constraints and were not tried. Raises InfeasibleError where none is
    left."""
    candidates = space.sample(CANDIDATES, seed)
    left = candidates[~_among(candidates, taken)]
    if len(left) == 0:
        count = len(candidates.unique(dim=0))
        raise InfeasibleError(f"All {count} settings of the space have been tried, or asked for.")
    return left


def thompson(
    posteriors: Sequence[FunctionPosterior],
    y: Float[Tensor, "n t"],
    objectives: int,
    constraints: Sequence[Constraint],
    candidates: Float[Tensor, "m d"],
    seed: int,
) -> Float[Tensor, " d"]:
    """The best of the candidates under one function drawn for every outcome.

    Where none fulfils the constraints under the draw, the one that breaks them least. Several objectives are weighed
    by a random point of the simplex (augmented Chebyshev). Sources: Thompson (1933); Eriksson and Poloczek (2021).
    """
    with torch.no_grad():
        drawn = torch.stack(
            [
                p.draw(1, (seed + 7919 * k) % 2**32)[0](candidates).reshape(-1)
                for k, p in enumerate(posteriors)
            ],
            -1,
        )
    goal = drawn[:, 0]
    if objectives > 1:
        weights = sample_simplex(objectives, 1, seed=seed, dtype=torch.float64)[0]
        low, high = y[:, :objectives].amin(0), y[:, :objectives].amax(0)
        scaled = weights * (drawn[:, :objectives] - low) / (high - low).clamp(min=1e-12)
        goal = scaled.amin(-1) + 0.05 * scaled.sum(-1)
    if constraints:
        excess = torch.stack([(drawn @ a - b).clamp(min=0.0) for a, b in constraints], -1).sum(-1)
        goal = torch.where(excess > 0, goal.min() - 1.0 - excess, goal)
    return candidates[goal.argmax()]


def _near_best(
    space: Space, x: Tensor, y: Tensor, objectives: int, constraints: Sequence[Constraint], seed: int
) -> Float[Tensor, "m d"]:
    """Steps of many sizes, in some of the columns, from the observed configurations that none is better than."""
    generator, count = torch.Generator().manual_seed(seed), CANDIDATES
    good = fulfilled(y, constraints)
    rows = (good | ~good.any()).nonzero()[:, 0]
    rows = rows[is_non_dominated(y[rows, :objectives])]
    width = 10.0 ** -(0.5 + 2.5 * torch.rand(count, 1, generator=generator, dtype=torch.float64))
    steps = width * torch.randn(count, space.width, generator=generator, dtype=torch.float64)
    moved = torch.rand(count, space.width, generator=generator) < max(0.5, 3.0 / space.width)
    centre = x[rows[torch.randint(len(rows), (count,), generator=generator)]]
    return space.rounded((centre + torch.where(moved, steps, 0.0)).clamp(0.0, 1.0))


def _among(z: Float[Tensor, "n d"], taken: Float[Tensor, "m d"]) -> Bool[Tensor, " n"]:
    if len(taken) == 0:
        return torch.zeros(len(z), dtype=torch.bool)
    return (torch.cdist(z, taken, p=torch.inf) < 1e-9).any(1)


def _inequalities(space: Space) -> list[tuple[Int[Tensor, " k"], Tensor, float]] | None:
    """BoTorch's form: sum_i c_i z_i >= b."""
    found = []
    for a, b in space.inequalities:
        columns = a.nonzero()[:, 0]
        found.append((columns, -a[columns], -b))
    return found or None
