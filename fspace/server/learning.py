"""Kernel, network, inducing inputs and noise learned from the rows of many workers, none of which sees another's.

The collapsed bound of all rows depends on the rows through sums (`collapsed.Statistics`) alone. So an evaluation is two
messages to every worker: parameters, for the sums over its shard; and the bound's gradient in the sums, for its part of
the gradient in inducing inputs and parameters of the kernel. What goes through K_uu and the noise is added here. The
whole is the bound and the gradient of the pooled rows, up to rounding. A message holds O(m^2) numbers and the
parameters, whatever the rows. The factor of K_uu travels with the parameters, so that sums are whitened where they are
made: whitened here, they would lose as many digits as K_uu's condition number has, and more with more rows.
Source: Titsias (2009), eq. 9; split over machines as in Gal et al. (2014).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from gpytorch.likelihoods import GaussianLikelihood
from jaxtyping import Float
from torch import Tensor

from fspace.errors import FspaceError, LearningStopped, NumericalError, OptionError, ServerError
from fspace.inference.basis import FIRST_JITTER, Basis
from fspace.inference.collapsed import Statistics, bound_of_whitened
from fspace.inference.gp import Scaling
from fspace.inference.numerics import cholesky, solve_lower
from fspace.inference.optimise import lbfgs
from fspace.kernels.deep import DeepKernel, embedded_kernel
from fspace.kernels.evaluate import covariance
from fspace.kernels.extractors import SoftSpectralLinear
from fspace.server.core import PosteriorServer, unit_scaling
from fspace.server.engines import Engine, asynchronous, by_name, join, require_server, start
from fspace.server.local_updates import Update
from fspace.server.workers import Shard, Worker, state_of

RATE, NETWORK_RATE = 5e-2, 3e-3  # of Adam: of kernel, noise and inducing inputs; of a network
SPECTRAL = 20  # power iterations an evaluation; they go on from those of the last one


@dataclass
class Learned:
    """What `learn_basis` found. bounds: the collapsed bound of all rows (nats) at every evaluation, in order
    (L-BFGS may take several a step); that of `basis` is the largest. message_bytes: of one message of each kind, its
    tensors alone. interrupted: before its end (by Ctrl-C, an error), and then the basis is not on the server."""

    basis: Basis
    scaling: Scaling
    server: PosteriorServer
    bounds: list[float]
    message_bytes: dict[str, int]
    interrupted: bool

    @property
    def bound(self) -> float:
        """The collapsed bound (nats) of all rows on the basis."""
        return max(self.bounds)

    @property
    def waiting(self) -> list[str]:
        """Contributors whose sites on the basis are missing before it serves."""
        serving, *opened = self.server.status()["bases"]
        have = {site["site_id"] for basis in opened for site in basis["sites"]}
        return [site["site_id"] for site in serving["sites"] if site["site_id"] not in have] if opened else []

    @property
    def posterior(self) -> Any:
        """The posterior over functions that the server gives."""
        return self.server.posterior()


def learn_basis(
    shards: Sequence[Shard] | Mapping[str, Shard],
    basis: Basis,
    engine: str | Engine = "local",
    *,
    scaling: Scaling | None = None,
    server: PosteriorServer | None = None,
    steps: int = 300,
    optimiser: Literal["lbfgs", "adam"] | None = None,
    without: Collection[str] = (),
) -> Learned:
    """Learn inducing inputs, kernel (a deep one's network too) and noise by the collapsed bound of all rows, then put
    all sites on the new basis.

    shards, engine: as in `fit`. basis: where learning starts; statistics that a network keeps of its features stay as
    they are there. scaling: None takes that of the server's basis, if it has one. server: where the new basis opens an
    epoch (None: one in memory); what serves goes on serving until every contributor has a site on the new basis. steps:
    of the optimiser (None: L-BFGS, for a deep kernel Adam); a result's basis, or that of an error's `learned`, is where
    to go on. without: names of contributors whose rows may be missing; where they have a site, the epoch waits for
    theirs, or for `server.remove`.
    A network learned by the bound of few rows overfits (Ober et al. 2021): score it on rows of none of the shards.
    Learning is not done over HTTP: its workers put their sites on a learned basis (`RemoteServer.register_basis`
    opens the epoch there), but the rows behind them do not shape it.
    Raises OptionError for noise that is not Gaussian or varies over the inputs, for contributors without a shard, and
    while an epoch is open; LearningStopped, naming it, for a worker that cannot go on (no rows are left out unasked);
    NumericalError where the bound cannot be computed at the start.
    """
    named = {name: shard for name, shard in by_name(shards).items() if name not in without}
    if steps < 1:
        raise OptionError(f"steps={steps!r} must be at least 1; `fit` puts sites on a basis as it is.")
    if optimiser is None:  # on networks L-BFGS stays far behind
        optimiser = "adam" if isinstance(basis.kernel, DeepKernel) else "lbfgs"
    if optimiser not in ("lbfgs", "adam"):
        raise OptionError(f"optimiser={optimiser!r} does not exist; choose 'lbfgs' or 'adam'.")
    _require_constant_gaussian_noise(basis)
    server = require_server(server)
    _require_all_rows(server, named, shards, without)
    scaling = scaling if scaling is not None else _scaling_of(server) or unit_scaling(basis)
    runs = start(
        engine, {name: Worker(name, shard, basis, scaling, Update()) for name, shard in named.items()}
    )
    try:
        pooled = PooledBound(runs, sorted(named), basis)
        found = Learned(basis, scaling, server, pooled.bounds, pooled.message_bytes, True)
        try:
            found.interrupted = not pooled.maximise(steps, optimiser)
        except ServerError as error:
            raise LearningStopped(
                f"{error} Nothing has changed on the server. Go on from the basis of this error's `learned` once the "
                "worker is back, or name it in without= to learn without its rows.",
                found,
            ) from error
        finally:
            found.basis = pooled.basis()
        if not found.interrupted:
            _open_epoch(runs, pooled.names, found)
        return found
    finally:
        runs.stop()


def _open_epoch(runs: Engine, names: list[str], found: Learned) -> None:
    """Register the learned basis and put the workers' sites on it. Raises LearningStopped where that is not done."""
    try:
        found.server.register_basis(found.basis, found.scaling)
        incarnations = join(found.server, names)
        put = asynchronous(runs, found.server, found.basis.id, incarnations, 1, 1.0, (found.basis,))
        failures = put.failures
        trouble = " ".join(f"{name!r}: {said}" for name, said in failures.items())
    except FspaceError as error:
        trouble = str(error)
    if trouble:
        raise LearningStopped(
            f"The basis is learned, but some sites are not on it, and what served before goes on. {trouble} `fit` with "
            "basis, scaling and server of this error's `learned` puts them.",
            found,
        )


def _scaling_of(server: PosteriorServer) -> Scaling | None:
    """The scaling of what serves, if anything does."""
    return server.basis()[1] if server.forms() else None


def _require_constant_gaussian_noise(basis: Basis) -> None:
    if not isinstance(basis.likelihood, GaussianLikelihood):
        raise OptionError(
            "learn_basis needs Gaussian noise: other likelihoods have no collapsed bound that is a function of sums. "
            "Fit an estimator on the rows of one worker, and give the basis of its posterior to `fit`."
        )
    if basis.noise_function is not None:
        raise OptionError(
            "The noise of this basis varies over the inputs, as it was found for the kernel as it is; learn_basis "
            "moves the kernel. Give it dataclasses.replace(basis, noise_function=None)."
        )


def _require_all_rows(
    server: PosteriorServer, named: Mapping[str, Shard], shards: Any, without: Collection[str]
) -> None:
    """Raises OptionError where rows would be missing from the bound that nobody said may be missing."""
    bases = server.status()["bases"]
    if len(bases) > 1:
        raise OptionError(
            f"The epoch of basis {bases[-1]['basis_id'][:8]} is not complete: `fit` with `server.basis()` completes it,"
            " `server.abandon_epoch` closes it."
        )
    if not named:
        raise OptionError("There is no shard to learn from: without= names all of them.")
    contributors = {site["site_id"] for each in bases for site in each["sites"]}
    unknown = sorted(set(without) - contributors - set(by_name(shards)))
    if unknown:
        raise OptionError(f"without={unknown[0]!r} names no shard and no contributor of the server.")
    missing = sorted(contributors - set(named) - set(without))
    if missing:
        raise OptionError(
            f"The server has a site of {missing[0]!r}, whose rows are in no shard ({len(missing)} such): pass its "
            "shard under this name, or name it in without= to learn without its rows."
        )


class PooledBound:
    """The collapsed bound of the rows of all workers, at parameters that move."""

    def __init__(self, runs: Engine, names: list[str], basis: Basis):
        self.runs, self.names = runs, names  # sums are taken in the order of the names, whoever answers first
        self.kernel = copy.deepcopy(basis.kernel).eval().requires_grad_(True)
        assert isinstance(basis.likelihood, GaussianLikelihood)
        self.likelihood: GaussianLikelihood = copy.deepcopy(basis.likelihood).requires_grad_(True)
        self.inducing = basis.inducing_inputs.detach().clone().requires_grad_()
        self.bounds: list[float] = []
        self.message_bytes: dict[str, int] = {}
        self._best: list[Tensor] = []

    @property
    def parameters(self) -> list[Tensor]:
        """All that is learned."""
        return [self.inducing, *self.kernel.parameters(), *self.likelihood.parameters()]

    def basis(self) -> Basis:
        """The basis at the parameters as they are."""
        kernel, likelihood = copy.deepcopy(self.kernel), copy.deepcopy(self.likelihood)
        for module in (kernel, likelihood):
            module.eval().requires_grad_(False)
            for p in module.parameters():
                p.grad = None
        return Basis(kernel, self.inducing.detach().clone(), likelihood)

    def loss(self) -> Float[Tensor, ""]:
        """Minus the bound, a value (row and output); its gradients are added to `.grad` of all parameters.

        Raises NumericalError where it cannot be computed, ServerError for workers that do not answer."""
        for part in self.kernel.modules():  # so that the norm holds, and depends on the weights alone
            if isinstance(part, SoftSpectralLinear):
                part.power_iteration(SPECTRAL)
        kuu = covariance(embedded_kernel(self.kernel), self.inducing)
        factor, _ = cholesky(kuu, "kernel matrix of the inducing inputs", FIRST_JITTER)
        sent = [t.detach() for t in (factor, self.inducing, *state_of(self.kernel))]
        first, *rest = self._ask("statistics", sent)
        whole: Statistics = sum(rest, first)
        values = whole.count * whole.cross.shape[1]
        leaves = [t.requires_grad_() for t in (whole.outer, whole.cross, whole.trace)]
        moving = solve_lower(factor, factor.detach())  # the identity, whose derivative is that of L^-1
        sums = replace(whole, outer=moving @ leaves[0] @ moving.mT, cross=moving @ leaves[1], trace=leaves[2])
        bound = bound_of_whitened(sums, self.likelihood.noise[..., 0])
        loss = -bound / values
        loss.backward()
        for part in self._ask("gradient", [*(leaf.grad for leaf in leaves), *sent]):
            for p, slope in zip((self.inducing, *self.kernel.parameters()), part, strict=True):
                p.grad = slope if p.grad is None else p.grad + slope
        self._note(bound.item())
        return loss.detach()

    def _note(self, bound: float) -> None:
        if not math.isfinite(bound):
            raise NumericalError(f"The bound of all rows is {bound}: scale the inputs, or start elsewhere.")
        if not self.bounds or bound > max(self.bounds):
            self._best = [t.detach().clone() for t in self._everything()]
        self.bounds.append(bound)

    def _everything(self) -> list[Tensor]:
        return [self.inducing, *state_of(self.kernel), *self.likelihood.parameters()]

    def _ask(self, what: str, arguments: list[Any]) -> list[Any]:
        """What each worker answers, in the order of their names."""
        for name in self.names:
            self.runs.submit(name, what, *arguments)
        answers = dict(self.runs.wait() for _ in self.names)
        silent = {name: said for name in self.names if isinstance(said := answers[name], Exception)}
        if silent:
            kind = (
                NumericalError if all(isinstance(e, NumericalError) for e in silent.values()) else ServerError
            )
            raise kind(" ".join(f"Worker {name!r}: {type(e).__name__}: {e}" for name, e in silent.items()))
        for name in self.names:
            if not all(bool(t.isfinite().all()) for t in _tensors(answers[name])):
                raise NumericalError(
                    f"The {what} of worker {name!r} are not finite: its inputs are too large."
                )
        answer = answers[self.names[0]]
        self.message_bytes |= {f"ask {what}": _bytes(arguments), what: _bytes(_tensors(answer))}
        return [answers[name] for name in self.names]

    def maximise(self, steps: int, optimiser: str) -> bool:
        """Move the parameters; the best stay. Returns False after Ctrl-C. Raises NumericalError where there is no
        bound at the start."""
        try:
            if optimiser == "lbfgs":
                done = lbfgs(self.loss, self.parameters, steps, lambda loss: None)
            else:
                done = self._adam(steps)
        finally:
            with torch.no_grad():
                for now, best in zip(self._everything(), self._best):
                    now.copy_(best)
        if not self.bounds:
            if not done:
                raise KeyboardInterrupt
            self.loss()  # says why there is none
        return done

    def _adam(self, steps: int) -> bool:
        network = list(self.kernel.extractor.parameters()) if isinstance(self.kernel, DeepKernel) else []
        ids = {id(p) for p in network}
        groups = [{"params": [p for p in self.parameters if id(p) not in ids], "lr": RATE}]
        if network:
            groups.append({"params": network, "lr": NETWORK_RATE})
        optimiser = torch.optim.Adam(groups)
        try:
            for step in range(steps + 1):
                optimiser.zero_grad()
                self.loss()
                if step < steps:
                    optimiser.step()
        except KeyboardInterrupt:
            return False
        except NumericalError:  # the best until then stays
            pass
        return True


def _tensors(answer: Any) -> list[Tensor]:
    parts: Iterable[Any] = (
        [getattr(answer, f.name) for f in fields(answer)] if isinstance(answer, Statistics) else answer
    )
    return [part for part in parts if isinstance(part, Tensor)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
