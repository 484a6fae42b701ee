"""What decisions.py minimises, and how BoTorch's own recipes do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

EVALUATIONS = {
    "branin": 25,
    "hartmann6": 40,
    "ackley10": 100,
    "noisy branin": 25,
    "ackley20": 120,
    "constrained gramacy": 20,
    "mixed ackley10": 40,
}
NOISE = 5.0  # of the noisy Branin, whose values are between 0.4 and 300
MIXED_OPTIMUM = (1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.3, 0.6, 0.8)  # of seven switches and three numbers


@dataclass
class SearchProblem:
    """A function of settings x to minimise, where all slacks are at least zero; some settings are 0 or 1."""

    f: Callable[[list[float]], float]
    least: float
    box: list[tuple[float, float]]
    slacks: Callable[[list[float]], list[float]] = lambda x: []
    switches: list[int] = field(default_factory=list)

    @property
    def d(self) -> int:
        return len(self.box)

    def settings(self) -> dict[str, Any]:
        """As an fspace space."""
        named = {f"x{i}": ends for i, ends in enumerate(self.box)}
        return named | {f"x{i}": range(2) for i in self.switches}


def problem(case: str) -> SearchProblem:
    """The problem of this name."""
    from botorch.test_functions import Ackley, Branin, Hartmann
    from botorch.test_functions.synthetic import AckleyMixed, ConstrainedGramacy

    kinds: dict[str, Any] = {
        "branin": Branin,
        "noisy branin": Branin,
        "hartmann6": Hartmann,
        "ackley10": lambda: Ackley(10),
        "ackley20": lambda: Ackley(20),
        "constrained gramacy": ConstrainedGramacy,
        "mixed ackley10": lambda: AckleyMixed(10),
    }
    f = kinds[case]()
    if case == "mixed ackley10":
        f.x_opt = torch.tensor(MIXED_OPTIMUM, dtype=torch.float64)
    row = lambda x: torch.tensor(x, dtype=torch.float64)[None]  # noqa: E731
    found = SearchProblem(
        lambda x: float(f(row(x))),
        float(f.optimal_value),
        [(float(a), float(b)) for a, b in f.bounds.T.tolist()],
        switches=list(getattr(f, "discrete_inds", [])),
    )
    if case.startswith("constrained"):
        found.slacks = lambda x: f.evaluate_slack(row(x))[0].tolist()
    return found


def random_points(case: SearchProblem, n: int, seed: int, sobol: bool) -> Tensor:
    """n points of the box, Sobol's or independent; switches are rounded."""
    from botorch.utils.sampling import draw_sobol_samples

    bounds = torch.tensor(case.box, dtype=torch.float64).T
    if sobol:
        x = draw_sobol_samples(bounds, n=n, q=1, seed=seed)[:, 0]
    else:
        generator = torch.Generator().manual_seed(seed)
        x = bounds[0] + (bounds[1] - bounds[0]) * torch.rand(n, case.d, generator=generator).double()
    x[:, case.switches] = x[:, case.switches].round()
    return x


def botorch_model(case: SearchProblem, x: Tensor, y: Tensor) -> Any:
    """A SingleTaskGP of one outcome [n, 1] as BoTorch fits it."""
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.transforms import Normalize, Standardize
    from gpytorch.mlls import ExactMarginalLogLikelihood

    bounds = torch.tensor(case.box, dtype=torch.float64).T
    scaled = Normalize(case.d, bounds=bounds)
    model = SingleTaskGP(x, y, input_transform=scaled, outcome_transform=Standardize(1))
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model


def expected_best(case: SearchProblem, x: Tensor, y: Tensor) -> list[float]:
    """That of x [n, d] whose outcome [n, 1] BoTorch's SingleTaskGP expects to be largest."""
    expected = botorch_model(case, x, y).posterior(x).mean[:, 0]
    return x[int(expected.argmax())].tolist()


def botorch_recipe(
    case: SearchProblem, observe: Callable[[list[float]], list[float]], initial: int, n: int, seed: int
) -> tuple[Tensor, Tensor]:
    """BoTorch's own loop: a SingleTaskGP an outcome, normalised and standardised, refitted at each step, qLogEI.

    observe gives the value to minimise and the slacks; what comes back is all x [n, d] and outcomes [n, 1 + slacks],
    the first with its sign turned. Constraints as in its tutorial "closed-loop constrained optimisation"; switches by
    optimize_acqf_mixed_alternating.
    """
    from botorch.acquisition import qLogExpectedImprovement
    from botorch.acquisition.objective import GenericMCObjective
    from botorch.models import ModelListGP
    from botorch.optim import optimize_acqf
    from botorch.optim.optimize_mixed import optimize_acqf_mixed_alternating

    torch.manual_seed(seed)
    bounds = torch.tensor(case.box, dtype=torch.float64).T
    sign = lambda row: [-row[0], *row[1:]]  # noqa: E731
    x = random_points(case, initial, seed, sobol=True)
    y = torch.tensor([sign(observe(row)) for row in x.tolist()], dtype=torch.float64)
    while len(x) < n:
        models = [botorch_model(case, x, y[:, k : k + 1]) for k in range(y.shape[1])]
        good = (y[:, 1:] >= 0).all(1)
        best = y[good, 0].max() if good.any() else y[:, 0].min()
        options: dict[str, Any] = {}
        if len(models) > 1:
            options = {
                "objective": GenericMCObjective(_first),
                "constraints": [lambda samples, k=k: -samples[..., k] for k in range(1, y.shape[1])],
            }
        gain = qLogExpectedImprovement(
            models[0] if len(models) == 1 else ModelListGP(*models), best_f=best, **options
        )
        if case.switches:
            new, _ = optimize_acqf_mixed_alternating(
                gain,
                bounds,
                discrete_dims={i: [0.0, 1.0] for i in case.switches},
                q=1,
                num_restarts=10,
                raw_samples=512,
            )
        else:
            new, _ = optimize_acqf(gain, bounds, q=1, num_restarts=10, raw_samples=512)
        x = torch.cat([x, new])
        y = torch.cat([y, torch.tensor([sign(observe(new[0].tolist()))], dtype=torch.float64)])
    return x, y


def _first(samples: Tensor, X: Tensor | None = None) -> Tensor:
    return samples[..., 0]
