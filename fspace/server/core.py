"""The posterior server: a table of sites on one basis, whose product with the prior is the posterior.

Nothing is ever added to anything: a site is put in place of what the same contributor put before, so that a message
that comes twice, late or out of order cannot be counted twice. What `put` has answered is on the disk.
Source: Hasenclever et al. (2017), distributed Bayesian learning with the posterior server; the keyed replacement in
place of their differences is ours.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fspace.errors import OptionError, ServerError, SiteRefused
from fspace.inference.basis import Basis, Site
from fspace.inference.gp import Scaling
from fspace.inference.likelihoods import OffsetLikelihood, functions
from fspace.inference.nongaussian import posterior_of
from fspace.kernels.deep import DeepKernel
from fspace.server.names import name_trouble
from fspace.server.natural import (
    Form,
    Total,
    between,
    contribution,
    log_normaliser,
    nonnegative,
    proper_factor,
)
from fspace.server.store import BasisRow, SiteRow, Store
from fspace.server.weights import WeightBasis
from fspace.server.wire import (
    basis_bytes,
    basis_from_bytes,
    check_site,
    digest,
    site_bytes,
    site_from_bytes,
)

HALVINGS = 10  # of a step towards a site that would leave no Gaussian
EVIDENCE_EVERY = 1.0  # seconds between two notes of the log evidence


class Receipt(NamedTuple):
    """What became of a site: `accepted`, or `unchanged` where it was there already. step: how much of the way from the
    contributor's last site to the new one was gone (1, unless the product would have been no Gaussian)."""

    status: str
    site_id: str
    incarnation: str
    version: int
    step: float


@dataclass
class _Served:
    """A basis in memory."""

    basis: Basis | WeightBasis
    scaling: Scaling | None
    form: Form
    state: str
    total: Total


class PosteriorServer:
    """Holds bases and sites, and answers for their product; embedded in the process, safe to call from many threads.

    path: an SQLite file that keeps everything (made where there is none); None: memory only. modules: as in
    `fspace.load`, for kernels with a module that fspace cannot describe. Raises ServerError for a file that is
    damaged or in use.
    """

    def __init__(self, path: str | Path | None = None, modules: Mapping[str, torch.nn.Module] | None = None):
        self._lock = threading.RLock()
        self._store = Store(path)
        self._served: dict[str, _Served] = {}
        self._noted = -math.inf  # of the monotonic clock
        try:
            for row in self._store.bases():
                if row.state != "closed":
                    self._load(row, modules)
        except BaseException:
            self._store.close()
            raise

    def _load(self, row: BasisRow, modules: Mapping[str, torch.nn.Module] | None) -> None:
        if row.content is None or digest(row.content) != row.hash:
            raise ServerError(f"{self._store.path} is damaged: basis {row.id[:8]} is not what was written.")
        basis: Basis | WeightBasis
        scaling: Scaling | None
        if WeightBasis.is_in(row.content):
            basis, scaling = WeightBasis.from_bytes(row.content), None
        else:
            basis, scaling = basis_from_bytes(row.content, modules)
        if basis.id != row.id:
            raise ServerError(
                f"{self._store.path} is damaged: basis {row.id[:8]} has the content of another."
            )
        served = _Served(basis, scaling, form_of(basis), row.state, Total(form_of(basis), basis.id))
        for site in self._store.sites(row.id):
            served.total.add(self._read(site, served.form))
        self._served[row.id] = served

    def _read(self, row: SiteRow, form: Form) -> Site:
        if digest(row.content) != row.hash:
            raise ServerError(
                f"{self._store.path} is damaged: site {row.site_id!r} is not what was written. Restore the file from "
                "a copy, or start with a new one and let the workers send their sites again."
            )
        site = site_from_bytes(row.content, form)
        kept = row.basis_id, row.site_id, row.incarnation, row.version, row.row_count
        if kept != (site.basis_id, site.site_id, site.incarnation, site.version, site.count):
            raise ServerError(
                f"{self._store.path} is damaged: the row of site {row.site_id!r} holds another site. Restore the file "
                "from a copy, or start with a new one and let the workers send their sites again."
            )
        return site

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Around a transaction and what follows it in memory: where it breaks off (an interrupt just after the commit
        too), memory is read again from the table, so that both always say the same."""
        try:
            yield
        except BaseException:
            before, self._served = self._served, {}
            for row in self._store.bases():
                if row.state != "closed" and row.id in before:
                    served = replace(
                        before[row.id], state=row.state, total=Total(before[row.id].form, row.id)
                    )
                    for site in self._store.sites(row.id):
                        served.total.add(self._read(site, served.form))
                    self._served[row.id] = served
            raise

    # -- bases -------------------------------------------------------------------------------------------------

    def register_basis(self, basis: Basis | WeightBasis, scaling: Scaling | None = None) -> str:
        """Make a basis known; its id.

        The first serves at once. A later one opens an epoch: its sites are gathered while the earlier basis goes on
        serving, and it takes over when every contributor of the earlier one has put its site on it. The same basis
        again changes nothing. scaling: from the units of the data to those of the basis (None: they are the same).
        Raises OptionError for a basis with another scaling than before, or one whose epoch has passed, and while
        another epoch is open.
        """
        if isinstance(basis, Basis) and scaling is None:
            scaling = unit_scaling(basis)
        with self._lock:
            content = self._basis_content(basis, scaling)
            for row in self._store.bases():
                if row.id != basis.id:
                    continue
                if row.state == "closed":
                    raise OptionError(f"Basis {basis.id[:8]} has had its epoch; register another.")
                if content is not None and row.hash != digest(content):
                    raise OptionError(f"Basis {basis.id[:8]} is here already, with another scaling.")
                return basis.id
            if len(self._served) > 1:
                raise OptionError(
                    f"The epoch of basis {self._open_id()[:8]} is not complete; `abandon_epoch` it first, or wait."
                )
            state = "open" if self._served else "serving"
            served = _Served(basis, scaling, form_of(basis), state, Total(form_of(basis), basis.id))
            with self._changing():
                self._served[basis.id] = served
                with self._store.transaction():
                    content_hash = None if content is None else digest(content)
                    self._store.write_basis(BasisRow(basis.id, content, content_hash, state, time.time()))
                    complete = self._complete(basis.id)
                    if complete:
                        self._switch(basis.id)
                if complete:
                    self._switched(basis.id)
            return basis.id

    def _basis_content(self, basis: Basis | WeightBasis, scaling: Scaling | None) -> bytes | None:
        if isinstance(basis, WeightBasis):
            return basis.to_bytes()
        assert scaling is not None
        if self._store.path is None:  # a kernel that cannot be described may serve from memory
            return None
        return basis_bytes(basis, scaling)

    def basis(self, basis_id: str | None = None) -> tuple[Basis | WeightBasis, Scaling | None]:
        """A basis and its scaling; the one to put sites on (the open epoch's if there is one) unless one is named."""
        with self._lock:
            served = self._find(basis_id if basis_id is not None else self._open_id())
            return served.basis, served.scaling

    def forms(self) -> dict[str, Form]:
        """What sites of every basis look like, by the basis' id."""
        with self._lock:
            return {name: served.form for name, served in self._served.items()}

    def _open_id(self) -> str:
        if not self._served:
            raise ServerError("The server has no basis yet; register one.")
        return list(self._served)[-1]

    def _serving_id(self) -> str:
        if not self._served:
            raise ServerError("The server has no basis yet; register one.")
        return next(iter(self._served))

    def _find(self, basis_id: str) -> _Served:
        if basis_id not in self._served:
            known = ", ".join(name[:8] for name in self._served) or "none"
            raise SiteRefused(
                "basis", f"Basis {basis_id[:8]!r} is not served here (served: {known}); fetch it anew."
            )
        return self._served[basis_id]

    def abandon_epoch(self) -> None:
        """Close the open epoch; the basis that serves goes on, the sites of the other one are dropped."""
        with self._lock:
            if len(self._served) < 2:
                raise OptionError("There is no open epoch to abandon.")
            name = self._open_id()
            with self._changing():
                with self._store.transaction():
                    self._store.set_state(name, "closed")
                del self._served[name]

    def _complete(self, basis_id: str) -> bool:
        """Whether an open basis has a site of every contributor of the one that serves."""
        serving = self._serving_id() if self._served else basis_id
        if basis_id == serving:
            return False
        have = {row[0] for row in self._store.site_names(basis_id)}
        return {row[0] for row in self._store.site_names(serving)} <= have

    def _switch(self, basis_id: str) -> None:
        self._store.set_state(self._serving_id(), "closed")
        self._store.set_state(basis_id, "serving")

    def _switched(self, basis_id: str) -> None:
        self._served = {basis_id: self._served[basis_id]}
        self._served[basis_id].state = "serving"

    # -- sites -------------------------------------------------------------------------------------------------

    def join(self, site_id: str) -> str:
        """A new incarnation for a contributor that starts or starts again: what earlier ones send is refused from now
        on, so that their late messages cannot replace what the new one says. Needed after `remove`. Raises SiteRefused
        for a name that no site can have (name)."""
        trouble = name_trouble("site_id", site_id) if site_id else "site_id is empty; name the contributor."
        if trouble is not None:
            raise SiteRefused("name", trouble)
        incarnation = uuid.uuid4().hex
        with self._lock, self._store.transaction():
            self._store.write_incarnation(site_id, incarnation)
        return incarnation

    def put(self, site: Site) -> Receipt:
        """Put a site in place of the contributor's last one; when this returns, it is durable.

        Keyed by (site_id, incarnation, version): the same site again is `unchanged`. Where I + total or a cavity would
        not be positive definite, the step from the last site is halved until they are.
        Raises SiteRefused, leaving all as it was: an older version (reason stale), the same version with other content
        (conflict), an earlier incarnation (incarnation), a removed site (removed), an unknown basis (basis), another
        shape or dtype, NaN, infinite or huge values, and a site no part of which leaves a Gaussian (indefinite).
        """
        with self._lock:
            served = self._find(site.basis_id)
            site = check_site(site, served.form)
            content = site_bytes(site)
            sent = digest(content)
            known = self._may_put(site)
            row = self._store.site(site.basis_id, site.site_id)
            old = None
            if row is not None:
                old = self._read(row, served.form)
                if row.incarnation == site.incarnation:
                    if (site.version, sent) == (row.version, row.sent_hash):
                        return Receipt("unchanged", site.site_id, site.incarnation, row.version, row.step)
                    if site.version < row.version:
                        raise SiteRefused(
                            "stale",
                            f"Site {site.site_id!r} is at version {row.version}; {site.version} is older.",
                        )
                    if site.version == row.version:
                        raise SiteRefused(
                            "conflict",
                            f"Site {site.site_id!r} has a version {row.version} of other content; raise the version.",
                        )
            kept, step, indefinite = self._admissible(served, old, site)
            total = served.total.changed(old, kept)
            if kept is not site:
                content = site_bytes(kept)
            with self._changing():
                with self._store.transaction():
                    if not known:
                        self._store.write_incarnation(site.site_id, site.incarnation)
                    self._store.write_site(
                        SiteRow(
                            site.basis_id,
                            site.site_id,
                            site.incarnation,
                            site.version,
                            site.count,
                            sent,
                            step,
                            int(indefinite),
                            content,
                            digest(content),
                            time.time(),
                        )  # fmt: skip
                    )
                    complete = served.state == "open" and self._complete(site.basis_id)
                    if complete:
                        self._switch(site.basis_id)
                served.total = total
                if complete:
                    self._switched(site.basis_id)
            self._note_evidence()
            return Receipt("accepted", site.site_id, site.incarnation, site.version, step)

    def _may_put(self, site: Site) -> bool:
        """Whether the incarnation is known already. Raises SiteRefused for an earlier or a removed one."""
        seen = self._store.incarnations(site.site_id)
        names = [name for name, _ in seen]
        if seen and seen[-1][1]:
            raise SiteRefused(
                "removed",
                f"Site {site.site_id!r} was removed; only a contributor that joins again may put it.",
            )
        if site.incarnation in names and site.incarnation != names[-1]:
            raise SiteRefused(
                "incarnation",
                f"Site {site.site_id!r} has started again since (incarnation {names[-1][:8]!r}); "
                f"what {site.incarnation[:8]!r} still sends is not taken.",
            )
        return site.incarnation in names

    def _admissible(self, served: _Served, old: Site | None, new: Site) -> tuple[Site, float, bool]:
        """The site to keep, how much of the way to it that is, and whether it is indefinite."""
        diagonal = served.form.diagonal
        if nonnegative(new.precision, diagonal) and self._store.indefinite(new.basis_id) == 0:
            return new, 1.0, False  # a sum of such sites is such a site, with any of them taken away
        start = old if old is not None else served.form.empty(new.basis_id, new.site_id)
        step = 1.0
        for _ in range(HALVINGS + 1):
            kept = new if step == 1.0 else between(start, new, step)
            if self._proper(served, old, kept):
                return kept, step, not nonnegative(kept.precision, diagonal)
            step *= 0.5
        raise SiteRefused(
            "indefinite",
            f"Site {new.site_id!r} leaves no Gaussian: I + total or the cavity of a site is not positive definite, "
            f"even a step of {step:g} towards it.",
        )

    def _proper(self, served: _Served, old: Site | None, new: Site) -> bool:
        """Whether total and all cavities stay positive definite; a factorisation for every site."""
        total = served.total.changed(old, new).site()
        diagonal = served.form.diagonal
        if proper_factor(total.precision, diagonal) is None:
            return False
        if proper_factor(total.precision - new.precision, diagonal) is None:
            return False
        for row in self._store.sites(new.basis_id):
            if row.site_id != new.site_id:
                other = self._read(row, served.form)
                if proper_factor(total.precision - other.precision, diagonal) is None:
                    return False
        return True

    def get(self, site_id: str, basis_id: str | None = None) -> Site | None:
        """A contributor's site as it is kept (None: it has none), on the basis that serves unless one is named."""
        with self._lock:
            served = self._find(basis_id if basis_id is not None else self._serving_id())
            row = self._store.site(served.basis.id, site_id)
            return None if row is None else self._read(row, served.form)

    def remove(self, site_id: str) -> None:
        """Take a contributor's site out of every basis, as if its rows had never come; what it sends late is refused.

        Exact for Gaussian observations at a fixed basis. Sites of other likelihoods were found in its presence, and
        the basis may have been learned from its rows: neither is undone. Raises OptionError for an unknown site,
        SiteRefused where what is left would be no Gaussian.
        """
        with self._lock:
            found = {
                name: self._read(row, served.form)
                for name, served in self._served.items()
                if (row := self._store.site(name, site_id)) is not None
            }
            if not found and not self._store.incarnations(site_id):
                raise OptionError(f"There is no site {site_id!r}.")
            totals = {name: self._served[name].total.changed(site, None) for name, site in found.items()}
            for name, total in totals.items():
                self._require_proper_without(name, total, site_id)
            with self._changing():
                with self._store.transaction():
                    self._store.delete_site(site_id)
                    self._store.bury(site_id)
                    newest = self._open_id() if self._served else ""
                    complete = len(self._served) > 1 and self._complete(newest)
                    if complete:
                        self._switch(newest)
                for name, total in totals.items():
                    self._served[name].total = total
                if complete:
                    self._switched(newest)
            self._note_evidence()

    def _require_proper_without(self, basis_id: str, total: Total, site_id: str) -> None:
        if self._store.indefinite(basis_id) == 0:
            return
        served = self._served[basis_id]
        rest = total.site()
        others = [rest.precision] + [
            rest.precision - self._read(row, served.form).precision
            for row in self._store.sites(basis_id)
            if row.site_id != site_id
        ]
        if any(proper_factor(precision, served.form.diagonal) is None for precision in others):
            raise SiteRefused(
                "indefinite", f"Without site {site_id!r} the rest is no Gaussian; put other sites anew first."
            )

    # -- what the sites say together ---------------------------------------------------------------------------

    def total(self, basis_id: str | None = None) -> Site:
        """The product of all sites, as one; on the basis that serves unless one is named."""
        with self._lock:
            return self._find(basis_id if basis_id is not None else self._serving_id()).total.site()

    def cavity(self, site_id: str, basis_id: str | None = None) -> Site:
        """The product of all sites but one: what the others say to a contributor, which may have no site yet."""
        with self._lock:
            served = self._find(basis_id if basis_id is not None else self._serving_id())
            own = self.get(site_id, served.basis.id)
            total = served.total if own is None else served.total.changed(own, None)
            return replace(total.site(), site_id=f"all but {site_id}")

    def posterior(self, basis_id: str | None = None) -> Any:
        """The posterior over functions in units of the data (over weights: mean and variance), on the basis that
        serves unless one is named."""
        with self._lock:
            served = self._find(basis_id if basis_id is not None else self._serving_id())
            total = served.total.site()
            if isinstance(served.basis, WeightBasis):
                return served.basis.posterior(total)
            assert served.scaling is not None
            return posterior_of(served.basis, total, served.scaling)

    def log_evidence(self, basis_id: str | None = None) -> float:
        """Log evidence (nats) of the product of prior and sites: for Gaussian observations the collapsed bound of all
        rows together."""
        return log_normaliser(self.total(basis_id))

    def _note_evidence(self) -> None:
        """The log evidence of the basis that serves, into its history, not more than once a second."""
        now = (
            time.monotonic()
        )  # the other clock may be set back, and nothing would be noted until it has caught up
        if now - self._noted < EVIDENCE_EVERY or not self._served:
            return
        served = self._served[self._serving_id()]
        total = served.total.site()
        names = self._store.site_names(served.basis.id)
        with self._store.transaction():
            self._store.write_evidence(
                time.time(), served.basis.id, len(names), total.count, log_normaliser(total)
            )
        self._noted = now

    def status(self, contributions: bool = False) -> dict[str, Any]:
        """What is here, as plain numbers and text: bases and epochs, and of every site its incarnation, version, rows,
        step, when it came and, if asked for, its contribution (degrees of freedom of the posterior it determines)."""
        with self._lock:
            bases = []
            for name, served in self._served.items():
                total = served.total.site()
                sites: list[dict[str, Any]] = [
                    dict(zip(("site_id", "incarnation", "version", "rows", "step", "at"), row))
                    for row in self._store.site_names(name)
                ]
                if contributions:
                    for about in sites:
                        own = self.get(about["site_id"], name)
                        assert own is not None
                        about["contribution"] = contribution(total, own)
                bases.append(
                    {
                        "basis_id": name,
                        "state": served.state,
                        "functions": served.form.functions,
                        "size": served.form.size,
                        "rows": total.count,
                        "log_evidence": log_normaliser(total),
                        "sites": sites,
                    }
                )
            history = [
                dict(zip(("at", "basis_id", "sites", "rows", "log_evidence"), row))
                for row in self._store.evidence(500)
            ]
            return {"bases": bases, "evidence": history, "at": time.time()}

    def attach(self, name: str, content: bytes) -> None:
        """Keep bytes beside the table, durably."""
        with self._lock, self._store.transaction():
            self._store.attach(name, content)

    def attachment(self, name: str) -> bytes | None:
        """Bytes that were attached, or None."""
        with self._lock:
            return self._store.attachment(name)

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._store.close()

    def __enter__(self) -> PosteriorServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def form_of(basis: Basis | WeightBasis) -> Form:
    """What sites of a basis look like."""
    if isinstance(basis, WeightBasis):
        return Form(1, basis.size, basis.diagonal)
    return Form(functions(basis.likelihood), basis.inducing_inputs.shape[0])


def unit_scaling(basis: Basis) -> Scaling:
    """Data in the units of the basis; rows of as many columns as the inducing inputs have (of any number before a deep
    kernel, whose extractor knows)."""
    t = functions(basis.likelihood)
    level = torch.zeros(t, dtype=torch.float64)
    if isinstance(basis.likelihood, OffsetLikelihood):  # whose functions vary around constants
        level = basis.likelihood.offset.detach().clone()
    width = 1 if isinstance(basis.kernel, DeepKernel) else basis.inducing_inputs.shape[1]
    one, zero = torch.ones(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    return Scaling(one, one, zero, one, level, torch.ones_like(level))
