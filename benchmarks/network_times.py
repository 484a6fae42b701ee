"""What a posterior over weights costs: ours against laplace-torch, posteriors and pyro, doing the same job.

    python benchmarks/network_times.py                          all jobs
    python benchmarks/network_times.py --tables yacht --jobs hamiltonian     one of them, into the results of the others

One hidden layer of 50 relu units on the first published split of UCI tables, standardised by its training rows; every
weight N(0, 1), noise of variance 0.01 in units of standardised y that is given to all, float32 and one thread. Sides
take turns; seconds are of the processor. Where pyro, posteriors or laplace-torch is not installed its jobs are left
out, and the result says so; docs/compare.md says how to have laplace-torch.

laplace      at the same mode: full, last layer and Kronecker factors, and the deviation of f at every test row
mode         that mode itself: as many steps of Adam on as many rows, against a plain loop in torch
mean field   as many steps on as many rows: ours draws outputs, posteriors' vi.diag and pyro's AutoNormal weights
langevin     SGLD and SGHMC from the same starts: two chains of as many steps, all rows in a step, steps of the same
             share of what is stable; ours in preconditioned coordinates, side by side; posteriors' one after the other
hamiltonian  our HMC and pyro's NUTS: seconds for each hundred effective draws, of the worst function value
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import common
import numpy as np
import torch
from peers_networks import (
    autonormal,
    langevin_of_posteriors,
    laplace_torch,
    mode_by_torch,
    nuts_of_pyro,
    vi_of_posteriors,
)
from torch import Tensor

from fspace.data import load_uci
from fspace.inference.gp import Scaling
from fspace.inference.weights import HMC, MFVI, SGHMC, SGLD, Laplace
from fspace.inference.weights.chains import effective_size, r_hat
from fspace.inference.weights.likelihoods import GaussianNoise
from fspace.inference.weights.network import Network
from fspace.inference.weights.posterior import LinearisedPosterior, posterior_of
from fspace.inference.weights.priors import GaussianPrior
from fspace.inference.weights.problem import Problem, Report, Training
from fspace.inference.weights.train import Trained, negative_log_joint, train
from fspace.inference.weights.whitened import Whitened, settled
from fspace.kernels import MLP

warnings.simplefilter("ignore")
NOISE = 0.01
EPOCHS, BATCH = 100, 32
CHAINS, STEPS, BURN, KEPT = 2, 600, 200, 20
JOBS = ("mode", "laplace", "mean field", "langevin", "hamiltonian")
Side = tuple[float, float, dict[str, float]]  # seconds, test log-likelihood, other figures


class Case:
    """A table's rows, as problem and test rows."""

    def __init__(self, table: str):
        X, y, X_test, y_test = load_uci(table, 0)
        shift, scale = X.mean(0), X.std(0)
        scale = np.where(scale > 0, scale, 1.0)
        rows = lambda a: torch.as_tensor((a - shift) / scale, dtype=torch.float32)  # noqa: E731
        target = lambda a: torch.as_tensor((a - y.mean()) / y.std(), dtype=torch.float32)[:, None]  # noqa: E731
        self.x_test, self.y_test = rows(X_test), target(y_test)
        torch.manual_seed(0)
        network = Network.of(MLP(X.shape[1], (50,), 1, "relu"))
        self.problem = Problem(
            network=network,
            scales=GaussianPrior(1.0, 1.0, scaled=False).scales(network),
            likelihood=GaussianNoise(1, torch.tensor([NOISE]).double().log()),
            x=rows(X),
            y=target(y),
            temperature=1.0,
            seed=0,
            training=Training(EPOCHS, BATCH),
            record=lambda **_: None,
            report=Report(),
        )

    def fresh(self, seed: int) -> Problem:
        """The problem with another seed and an empty report."""
        return replace(self.problem, seed=seed, report=Report())

    def log_likelihood(self, f: Tensor) -> float:
        """Mean test log-likelihood of the mixture over functions f [s, n, 1], of standardised y."""
        density = self.problem.likelihood.log_prob(f.double(), f.new_zeros(len(f), 0), self.y_test)
        return (torch.logsumexp(density, 0) - math.log(len(f))).mean().item()

    def of_gaussian(self, mean: Tensor, variance: Tensor) -> float:
        """Mean test log-likelihood of Gaussians of f [n], noise added."""
        total = torch.distributions.Normal(mean.double(), (variance.double() + NOISE).sqrt())
        return total.log_prob(self.y_test[:, 0].double()).mean().item()

    def of_states(self, states: Tensor) -> float:
        """The same of weights [s, p]."""
        return self.log_likelihood(self.problem.network.many(states, self.x_test))

    def functions(self, states: Tensor) -> Tensor:
        """Values [c, n, rows] at 64 training rows, of chains of weights [c, n, p]."""
        c, n = states.shape[:2]
        f = self.problem.network.many(states.flatten(0, 1), self.problem.x[:64])[..., 0]
        return f.reshape(c, n, -1).double()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the processor."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def mode(case: Case, seed: int) -> dict[str, Side]:
    """Training alone."""
    problem = case.fresh(seed)
    start = problem.start(1)
    seconds, found = timed(lambda: train(problem, start, negative_log_joint(problem), "mode").theta)
    theirs, weights = timed(lambda: mode_by_torch(problem, start[0]))
    return {
        "fspace": (seconds, case.of_states(found), {}),
        "torch loop": (theirs, case.of_states(weights[None]), {}),
    }


def laplace(case: Case, seed: int, structure: str, layers: str) -> dict[str, Side]:
    """Curvature and predictions, at a mode that both are given."""
    problem = case.fresh(seed)
    theta = train(problem, problem.start(1), negative_log_joint(problem), "mode").theta

    def ours() -> tuple[Tensor, Tensor]:
        given = Trained(theta, torch.full((1,), torch.nan), True)
        with mock.patch("fspace.inference.weights.laplace.train", return_value=given):
            q, likelihood = Laplace(structure, layers, tune=False).fit(problem)
        one, zero = torch.ones(problem.x.shape[1]).double(), torch.zeros(problem.x.shape[1]).double()
        scaling = Scaling(one, one, zero, one, torch.zeros(1).double(), torch.ones(1).double())
        found = posterior_of(problem.network, q, likelihood, scaling, True, "laplace")
        assert isinstance(found, LinearisedPosterior)
        latent = found.latent(case.x_test.double())
        return latent.mean, latent.variance

    seconds, moments = timed(ours)
    sides: dict[str, Side] = {"fspace": (seconds, case.of_gaussian(*moments), {})}
    if importlib.util.find_spec("laplace"):
        theirs, other = timed(lambda: laplace_torch(problem, theta[0], case.x_test, structure, layers, NOISE))
        sides["laplace-torch"] = (theirs, case.of_gaussian(*other), {})
    return sides


def mean_field(case: Case, seed: int) -> dict[str, Side]:
    """Mean-field inference."""
    problem = case.fresh(seed)
    draws = lambda q: q.sample(128, torch.Generator().manual_seed(0))  # noqa: E731
    seconds, (q, _) = timed(lambda: MFVI().fit(problem))
    sides: dict[str, Side] = {"fspace": (seconds, case.of_states(draws(q)), {})}
    longer = replace(case.fresh(seed), training=Training(2 * EPOCHS, BATCH))
    more, (q, _) = timed(lambda: MFVI().fit(longer))
    sides["fspace, twice the passes"] = (more, case.of_states(draws(q)), {})
    for name, package, work in (
        ("posteriors", "posteriors", vi_of_posteriors),
        ("pyro", "pyro", autonormal),
    ):
        if importlib.util.find_spec(package):
            theirs, states = timed(partial(work, problem, seed))
            sides[name] = (theirs, case.of_states(states), {})
    return sides


def langevin(case: Case, seed: int, kind: str) -> dict[str, Side]:
    """Chains of SGLD or SGHMC from modes that both are given."""
    problem = case.fresh(seed)
    starts = settled(problem, CHAINS, "start")
    thinning = STEPS // KEPT
    sampler: SGLD | SGHMC = (SGLD if kind == "sgld" else SGHMC)(
        samples=CHAINS * KEPT, chains=CHAINS, thinning=thinning, warmup=BURN / (BURN + STEPS)
    )

    def ours() -> Tensor:
        with mock.patch("fspace.inference.weights.sgmcmc.settled", return_value=starts):
            return sampler.fit(problem)[0].states

    seconds, states = timed(ours)
    chains = states.reshape(CHAINS, KEPT, -1)
    sides: dict[str, Side] = {"fspace": (seconds, case.of_states(states), _mixing(case, chains))}
    if importlib.util.find_spec("posteriors"):
        plain = Whitened(
            problem, torch.ones_like(problem.prior_scales)
        )  # prior deviations are 1: the plain weights
        rows = torch.arange(problem.n)
        stiffness = max(plain.stiffness(start, rows) for start in starts)
        theirs, other = timed(
            lambda: langevin_of_posteriors(
                problem, starts, kind, sampler.step_size, stiffness, BURN, STEPS, thinning, seed
            )
        )
        sides["posteriors"] = (theirs, case.of_states(other.flatten(0, 1)), _mixing(case, other))
    return sides


def hamiltonian(case: Case, seed: int) -> dict[str, Side]:
    """HMC and NUTS, by what an effective draw costs."""
    problem = case.fresh(seed)
    sampler = HMC(samples=480, chains=16, warmup=60)
    seconds, (points, _) = timed(lambda: sampler.fit(problem))
    chains = points.states.reshape(sampler.chains, -1, points.states.shape[1])
    sides: dict[str, Side] = {
        "fspace": (seconds, case.of_states(points.states), _mixing(case, chains, seconds))
    }
    if importlib.util.find_spec("pyro"):
        theirs, other = timed(
            lambda: nuts_of_pyro(problem, seed, draws=30, warmup=30, chains=2, max_tree_depth=7)
        )
        sides["pyro"] = (theirs, case.of_states(other.flatten(0, 1)), _mixing(case, other, theirs))
    return sides


def _mixing(case: Case, chains: Tensor, seconds: float | None = None) -> dict[str, float]:
    f = case.functions(chains)
    ess = effective_size(f).min().item()
    found = {"rhat": r_hat(f).max().item(), "ess": ess}
    return found if seconds is None else found | {"seconds_per_100_effective": 100 * seconds / ess}


def work(job: str) -> dict[str, Callable[[Case, int], dict[str, Side]]]:
    """The lines of a job, by what the page calls them."""
    if job == "mode":
        return {"mode (MAP)": mode}
    if job == "laplace":
        return {
            "Laplace, full": partial(laplace, structure="full", layers="all"),
            "Laplace, last layer": partial(laplace, structure="full", layers="last"),
            "Laplace, Kronecker": partial(laplace, structure="kronecker", layers="all"),
        }
    if job == "mean field":
        return {"mean field": mean_field}
    if job == "langevin":
        return {kind.upper(): partial(langevin, kind=kind) for kind in ("sgld", "sghmc")}
    if job == "hamiltonian":
        return {"HMC, against NUTS": hamiltonian}
    raise SystemExit(f"--jobs: there is no job {job!r}; choose of {', '.join(JOBS)}.")


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": float(np.median(values)), "least": min(values), "most": max(values)}


def summarise(rounds: list[dict[str, Side]]) -> dict[str, Any]:
    """Each side's seconds and log-likelihood over repeats, and the ratio to ours within each."""
    sides: dict[str, Any] = {}
    for name in rounds[0]:
        sides[name] = {
            "seconds": spread([r[name][0] for r in rounds]),
            "log_likelihood": spread([r[name][1] for r in rounds]),
        }
        for key in rounds[0][name][2]:
            sides[name][key] = spread([r[name][2][key] for r in rounds])
        if name != "fspace":
            key = "seconds_per_100_effective"
            cost = lambda side, key=key: side[2].get(key, side[0])  # noqa: E731
            sides[name]["ratio"] = spread([cost(r[name]) / cost(r["fspace"]) for r in rounds])
    return {"repeats": len(rounds), "sides": sides}


def main() -> None:
    """Run the jobs asked for, and write them over those of an earlier run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", default="yacht,energy")
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--long", type=int, default=1, help="repeats of the hamiltonian job")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = common.RESULTS / "network_times.json"
    earlier = json.loads(path.read_text())["tables"] if path.exists() else {}
    peers = {name: common._version(name) for name in ("laplace-torch", "posteriors", "pyro-ppl")}
    result: dict[str, Any] = {
        "machine": common.machine() | {"threads": 1}, "peers": peers, "epochs": EPOCHS, "batch": BATCH,
        "langevin": {"chains": CHAINS, "steps": BURN + STEPS, "kept": CHAINS * KEPT}, "noise": NOISE, "tables": earlier,
    }  # fmt: skip
    for table in args.tables.split(","):
        case = Case(table)
        lines: dict[str, Any] = earlier.get(table, {}).get("lines", {})
        earlier[table] = {"rows": case.problem.n, "columns": case.problem.x.shape[1], "lines": lines}
        for job in args.jobs.split(","):
            for name, run in work(job).items():
                if job != "hamiltonian":
                    run(case, 100)  # what is loaded at the first call is no part of the work
                count = args.long if job == "hamiltonian" else args.repeats
                lines[name] = summarise([run(case, seed) for seed in range(count)])
                common.say(
                    table,
                    name,
                    {k: round(v["seconds"]["median"], 2) for k, v in lines[name]["sides"].items()},
                )
                common.write("network_times", result)


if __name__ == "__main__":
    main()
