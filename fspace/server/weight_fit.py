"""One Gaussian over the weights of a module from the rows of many workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from fspace.errors import OptionError
from fspace.inference.basis import Site
from fspace.predictive_base import check_seed
from fspace.server.core import PosteriorServer, form_of
from fspace.server.engines import (
    Engine,
    ServerFit,
    asynchronous,
    by_name,
    join,
    require_server,
    start,
    synchronous,
)
from fspace.server.pvi import Pvi, PviWorker
from fspace.server.snep import Snep, SnepWorker
from fspace.server.weight_workers import GaussianNoise, Softmax, WeightLikelihood, WeightWorker
from fspace.server.weights import WeightBasis
from fspace.server.workers import Shard


def fit_weights(
    shards: Sequence[Shard] | Mapping[str, Shard],
    module: nn.Module,
    likelihood: WeightLikelihood,
    engine: str | Engine = "local",
    *,
    prior_scale: float = 1.0,
    diagonal: bool = True,
    update: Snep | Pvi | None = None,
    rounds: int = 100,
    synchronous_rounds: bool = False,
    start_variance: float = 0.01,
    server: PosteriorServer | None = None,
    seed: int = 0,
) -> ServerFit:
    """A posterior over the weights of a module from the rows of many workers, none of which sees another's rows.

    shards, engine and server as in `fit`. likelihood: `Softmax(classes)` or `GaussianNoise(variance)`, in the units of
    y. prior_scale: standard deviation of every weight under the prior. update: `Snep(...)` (None: with its defaults)
    or `Pvi(...)`. rounds: of every worker; nobody waits for anybody unless synchronous_rounds, where the result is the
    same on every engine. The first posterior of a new server is around the module's weights, with variance
    start_variance (of the prior's), so that all workers look near the same weights. The module is not changed.
    `posterior` of the result is a `WeightPosterior`; its log evidence estimates the evidence lower bound.
    Raises OptionError; ServerError where no worker could do its part (one that fails leaves its last site, and its
    words in `failures`).
    Sources: Hasenclever et al. (2017); Ashman et al. (2022).
    """
    named = by_name(shards)
    update = Snep() if update is None else update
    if not isinstance(likelihood, Softmax | GaussianNoise):
        raise OptionError(
            f"likelihood={likelihood!r} is not known; choose Softmax(classes) or GaussianNoise(variance)."
        )
    if not isinstance(update, Snep | Pvi):
        raise OptionError(f"update={update!r} is not known; choose Snep(...) or Pvi(...).")
    if rounds < 1 or not 0 < start_variance < 1:
        raise OptionError(
            f"rounds={rounds!r} must be at least 1, start_variance={start_variance!r} between 0 and 1."
        )
    basis = weight_basis(module, likelihood, prior_scale, diagonal)
    server = require_server(server)
    server.register_basis(basis)
    workers: dict[str, WeightWorker] = {}
    for name, shard in named.items():
        rest = (name, shard, basis, module, likelihood, check_seed(seed))
        workers[name] = SnepWorker(*rest, update) if isinstance(update, Snep) else PviWorker(*rest, update)
    new = not server.status()["bases"][-1]["sites"]
    runs = start(engine, workers)
    try:
        incarnations = join(server, named)
        if new:
            for name, incarnation in incarnations.items():
                site = _first_site(basis, module, start_variance, len(named))
                server.put(replace(site, site_id=name, incarnation=incarnation))
        if synchronous_rounds:
            return synchronous(runs, server, basis.id, incarnations, rounds)
        return asynchronous(runs, server, basis.id, incarnations, rounds, 0.0)
    finally:
        runs.stop()


def weight_basis(
    module: nn.Module, likelihood: WeightLikelihood, prior_scale: float = 1.0, diagonal: bool = True
) -> WeightBasis:
    """The basis of a module and a likelihood, which its id tells from others. Raises OptionError for parameters that
    are not all of one type, float32 or float64."""
    basis = WeightBasis.of(module, prior_scale, diagonal)
    types = {p.dtype for p in module.parameters()}
    if len(types) > 1 or types.isdisjoint({torch.float32, torch.float64}):
        raise OptionError(
            f"The module's parameters are {', '.join(sorted(map(str, types)))}; make them float32 (module.float()): "
            "gradients of a log likelihood over all rows overflow or vanish in less."
        )
    return replace(basis, architecture=f"{basis.architecture}\n{likelihood!r}")


def _first_site(basis: WeightBasis, module: nn.Module, variance: float, workers: int) -> Site:
    """One of so many equal sites whose product with the prior has the module's weights as mean, and this variance."""
    precision = torch.full((basis.size,), (1.0 / variance - 1.0) / workers, dtype=torch.float64)
    empty = form_of(basis).empty(basis.id, "start")
    shift = (basis.coordinates(module).cpu() / (variance * workers))[None]
    return replace(empty, precision=(precision if basis.diagonal else precision.diag())[None], shift=shift)
