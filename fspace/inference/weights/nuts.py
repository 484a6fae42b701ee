"""Hamiltonian Monte Carlo with no U-turns (Hoffman and Gelman 2014), by pyro, for small networks: the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fspace.errors import NumericalError, OptionError
from fspace.inference.numerics import seeded
from fspace.inference.weights.chains import watch
from fspace.inference.weights.distributions import Points
from fspace.inference.weights.likelihoods import NetworkLikelihood
from fspace.inference.weights.problem import Problem
from fspace.inference.weights.whitened import Whitened
from fspace.predictive_base import check_whole

LARGEST = 5000  # weights
ROWS = 20_000


@dataclass(frozen=True)
class NUTS:
    """The posterior itself, but for the length of the chains: all rows in every step, float64 where dtype is.

    samples: kept over all chains; chains: one after the other, from random starts; warmup: steps of each chain in
    which step size and (diagonal) mass are adapted. R-hat and effective sample size of function values (the worst of
    64 rows), and how many steps diverged, are in the figures: do not believe a chain with R-hat above 1.05.
    """

    samples: int = 400
    chains: int = 2
    warmup: int = 200
    max_tree_depth: int = 8
    name: ClassVar[str] = "nuts"

    def __post_init__(self) -> None:
        for name in ("samples", "chains", "warmup", "max_tree_depth"):
            check_whole(name, getattr(self, name))

    def fit(self, problem: Problem) -> tuple[Points, NetworkLikelihood]:
        """The kept states of all chains."""
        try:
            import pyro.infer
        except ImportError as error:
            raise OptionError("inference='nuts' needs pyro: pip install 'fspace[bnn]'.") from error
        if problem.size > LARGEST or problem.n > ROWS:
            raise OptionError(
                f"inference='nuts' is for at most {LARGEST:,} weights and {ROWS:,} rows, and this fit has "
                f"{problem.size:,} and {problem.n:,}; take a smaller network (hidden=(20,)), or inference='sghmc'."
            )
        space = Whitened(problem, torch.ones_like(problem.prior_scales))
        everything = torch.arange(problem.n, device=problem.x.device)
        starts = space.coordinates(problem.start(self.chains))
        kept = -(-self.samples // self.chains)
        found: list[list[Tensor]] = [[] for _ in range(self.chains)]
        divergences, done = 0, 0
        total = self.chains * (self.warmup + kept)

        def energy(parameters: dict[str, Tensor]) -> Tensor:
            return space.energy(parameters["u"][None], everything)[0] / problem.temperature

        if not all(bool(energy({"u": start}).isfinite()) for start in starts):
            raise NumericalError(
                "inference='nuts': the log density is not finite where the chains start. Take prior, noise_variance "
                "and temperature nearer to 1 (in units of standardised x and y), or dtype='float64'."
            )

        def after(kernel: Any, parameters: dict[str, Tensor], stage: str, step: int) -> None:
            nonlocal done
            done += 1
            if stage == "Sample":
                found[chain].append(parameters["u"].detach().clone())
            problem.record(stage=self.name, done=done, total=total)

        try:
            for chain, start in enumerate(starts):
                kernel = pyro.infer.NUTS(potential_fn=energy, max_tree_depth=self.max_tree_depth)
                runs = pyro.infer.MCMC(
                    kernel,
                    num_samples=kept,
                    warmup_steps=self.warmup,
                    initial_params={"u": start},
                    disable_progbar=True,
                    hook_fn=after,
                )
                with seeded(int(torch.randint(2**31, (1,), generator=problem.generator_cpu(12 + chain)))):
                    runs.run()
                divergences += len(runs.diagnostics()["divergences"]["chain 0"])
        except KeyboardInterrupt:
            problem.record(stage=self.name, interrupted=True)
            problem.report.interrupted = self.name
        whole = [states for states in found if len(states) == kept]
        problem.report.figures["divergences"] = divergences
        if whole:
            watch(problem, torch.stack([space.theta(torch.stack(states)) for states in whole]))
        states = [u for chain in found for u in chain] or list(starts)
        return Points(space.theta(torch.stack(states))), problem.likelihood
