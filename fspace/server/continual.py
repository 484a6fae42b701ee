"""Task after task: of each its site stays on a posterior server, and its rows are let go (but for inducing inputs).

Nothing is learned anew when a task comes: its site is put beside the others, so what earlier tasks have said stays as
it was. What can be lost is lost where the inducing inputs outgrow their budget, and that is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import add
from typing import Any, NamedTuple

import torch

from fspace.errors import DataError, OptionError, ServerError
from fspace.inference.basis import Basis, Site
from fspace.inference.gp import GPPosterior, Scaling
from fspace.inference.inducing import greedy_variance
from fspace.inference.nongaussian import posterior_of
from fspace.inference.sites import moved
from fspace.inference.streaming import faded, read_off, unexplained
from fspace.kernels.deep import embedded_kernel
from fspace.server.core import PosteriorServer, form_of
from fspace.server.names import name_trouble
from fspace.server.natural import divergence


class TaskLearned(NamedTuple):
    """A task that has become a site. inducing: inducing inputs there are now; lost: nats (KL divergence, all functions
    together) by which what was known before has changed because inducing inputs were dropped."""

    task: str
    rows: int
    inducing: int
    lost: float


@dataclass(frozen=True, eq=False)
class Tasks:
    """The basis that serves and the site of every task on it."""

    basis: Basis
    scaling: Scaling
    sites: dict[str, Site]

    @staticmethod
    def on(server: PosteriorServer) -> Tasks:
        """What the server holds. Raises ServerError where it has no basis, or one of weights."""
        serving = server.status()["bases"]
        if not serving:
            raise ServerError("The server has no basis yet; register one.")
        basis, scaling = server.basis(serving[0]["basis_id"])
        if not isinstance(basis, Basis) or scaling is None:
            raise ServerError(
                "The server's basis is one of network weights; tasks are learned on inducing values."
            )
        names = [about["site_id"] for about in serving[0]["sites"]]
        sites = {name: site for name in names if (site := server.get(name, basis.id)) is not None}
        return Tasks(basis, scaling, sites)

    @cached_property
    def total(self) -> Site:
        """The product of all sites."""
        return reduce(add, self.sites.values(), form_of(self.basis).empty(self.basis.id, "none"))

    @cached_property
    def posterior(self) -> GPPosterior:
        """What all tasks together say of the functions."""
        return posterior_of(self.basis, self.total, self.scaling, vector=False)

    def with_room_for(self, x: Any, inducing: int) -> tuple[Tasks, float]:
        """The same on inducing inputs that also cover x, at most so many, and the nats that were lost.

        Rows that are badly explained join the inducing inputs: exact, as old sites say nothing about new inducing
        values. Beyond the budget those that the others explain best are dropped, and sites are read off the rest.
        """
        basis = self.basis
        with torch.no_grad():
            new = unexplained(basis, self.posterior.embedded(x), inducing)
        wide = basis.grown(new) if len(new) else basis
        if len(wide.inducing_inputs) <= inducing:
            kept = {name: site.padded(wide) for name, site in self.sites.items()}
            return replace(self, basis=wide, sites=kept), 0.0
        chosen = greedy_variance(embedded_kernel(basis.kernel), wide.inducing_inputs, inducing)
        small = replace(wide, inducing_inputs=wide.inducing_inputs[chosen])
        across = read_off(basis, small)
        sites = {name: replace(moved(s, across), basis_id=small.id) for name, s in self.sites.items()}
        found = replace(self, basis=small, sites=sites)
        # over the inducing values of both: given these, what else there is follows from the prior in either
        both = basis.grown(wide.inducing_inputs[chosen[chosen >= len(basis.inducing_inputs)]])
        return found, divergence(self.total.padded(both), moved(found.total, read_off(small, both)))


def learn_task(
    server: PosteriorServer, x: Any, y: Any, task: Any, inducing: Any = None, discount: Any = 1.0
) -> TaskLearned:
    """Make rows of a new task a site beside those of earlier tasks; the rows are not needed again.

    x [n, d] (or images, sequences), y [n] or [n, t] (classes: positions), in the units of the data. inducing: most
    inducing inputs, to which rows of the task are added (None: they stay as they are); discount: what older sites say
    is multiplied by it, so that below 1 old tasks fade. For Gaussian observations (and `DirichletLikelihood`) on
    inducing inputs that stay, the posterior is that of all rows together, in whatever order tasks come. Other sites
    are found against those that are there, once: the order matters, and the result is near the joint one, not at it.

    New inducing inputs are a new basis, whose epoch this call opens and completes: a process that dies meanwhile leaves
    the server as it was, and the same call again goes on. (Where the inducing inputs stay and the process dies while
    older sites fade, those that had not yet faded stay as they were.) `server.remove(task)` takes a task out: exact
    for Gaussian observations at a fixed basis. For others it is not: their sites were found in its presence. It is no
    certified unlearning: inducing inputs are rows, and with the kernel may stay from the task that is gone.
    Raises OptionError for a task that has been learned and options that do not exist, DataError for rows that do not
    fit; the server is then as it was. Source: Bui, Nguyen and Turner (2017), streaming sparse GP approximations.
    """
    return learn_onto(server, Tasks.on(server), x, y, task, inducing, discount)


def learn_onto(
    server: PosteriorServer,
    tasks: Tasks,
    x: Any,
    y: Any,
    task: Any,
    inducing: Any,
    discount: Any,
    note: Callable[[Basis], None] = lambda basis: None,
) -> TaskLearned:
    """`learn_task` where the server's sites have first become those of `tasks`, on whatever basis; `note` is told the
    basis on which they will be before any is there."""
    _check(tasks, task, inducing, discount)
    x = tasks.posterior.numbers(x, "x")
    if len(x) == 0:
        raise DataError(f"Task {task!r} has no rows.")
    tasks.posterior.embedded(x[:1])  # raises for another shape
    lost = 0.0
    if inducing is not None:
        tasks, lost = tasks.with_room_for(x, inducing)
    if discount < 1:
        tasks = replace(tasks, sites={name: faded(site, discount) for name, site in tasks.sites.items()})
    site = tasks.posterior.site_of(x, y, task)
    note(tasks.basis)
    _publish(server, tasks, site)
    return TaskLearned(task, len(x), len(tasks.basis.inducing_inputs), lost)


def _check(tasks: Tasks, task: Any, inducing: Any, discount: Any) -> None:
    trouble = "it is empty." if task == "" else name_trouble("it", task)
    if trouble is not None:
        raise OptionError(f"task={task!r} cannot be the name of a task: {trouble}")
    if task in tasks.sites:
        raise OptionError(f"Task {task!r} has been learned already; forget it first, or give another name.")
    if inducing is not None and (type(inducing) is not int or inducing < 1):
        raise OptionError(f"inducing={inducing!r} must be a whole number of at least 1, or None.")
    if isinstance(discount, bool) or not isinstance(discount, int | float) or not 0 < discount <= 1:
        raise OptionError(f"discount={discount!r} must be a number above 0 and at most 1.")


def _publish(server: PosteriorServer, tasks: Tasks, new: Site) -> None:
    """Put the site of a new task, then what has become of the others: on a new basis the last of them ends the epoch,
    and all serve at once."""
    served = list(server.forms())
    if len(served) > 1 and served[1] != tasks.basis.id:  # of a call that did not come to its end
        server.abandon_epoch()
    server.register_basis(tasks.basis, tasks.scaling)
    server.put(replace(new, incarnation=server.join(new.site_id), version=0))
    for name, site in tasks.sites.items():
        known = server.get(name, tasks.basis.id)
        if served[:1] == [tasks.basis.id] and known is not None and known.version == site.version:
            continue  # nothing has become of it
        server.put(site if known is None else replace(site, version=known.version + 1))
