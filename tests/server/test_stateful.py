"""Any order of messages, restarts and epochs, against a model of plain dictionaries: nothing lost, nothing twice."""

import math
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fspace.errors import OptionError, SiteRefused
from fspace.inference.basis import Site
from fspace.server import PosteriorServer, WeightBasis
from fspace.server.natural import Total

M = 3
NAMES = ["a", "b", "c"]
FIELDS = ("precision", "shift", "log_scale")
BASES = [
    WeightBasis.of(torch.nn.Linear(M, 1, bias=False), prior_scale=1.0 + k, diagonal=False) for k in range(5)
]


def made(seed, kind, basis_id, name, incarnation, version):
    """A site: of two rows (positive semi-definite), mildly indefinite, or one that must be refused."""
    random = np.random.default_rng(seed)
    a = random.normal(size=(M, 2)) * 10.0 ** random.integers(-2, 5)
    precision, shift = a @ a.T, random.normal(size=M)
    if kind == "indefinite":
        precision = a @ a.T / max(1.0, np.abs(a).max() ** 2) - 0.2 * np.eye(M)
    elif kind == "negative":
        precision = -1e7 * np.eye(M)
    elif kind == "nan":
        shift[1] = np.nan
    elif kind == "infinite":
        precision[0, 0] = np.inf
    elif kind == "lopsided":
        precision[0, 1] += 1.0 + abs(precision[0, 1])
    elif kind == "huge":
        shift[0] = 1e30
    parts = (torch.from_numpy(v.copy())[None] for v in (0.5 * (precision + precision.T), shift))
    matrix, vector = parts
    if kind == "lopsided":
        matrix = torch.from_numpy(precision.copy())[None]
    if kind == "float32":
        vector = vector.float()
    log_scale = torch.tensor([float(random.normal())]).double()
    count = int(random.integers(1, 50))
    return Site(basis_id, matrix, vector, log_scale, count, name, incarnation, version)


GOOD = ("rows", "rows", "rows", "indefinite")
POISON = ("nan", "infinite", "lopsided", "huge", "float32", "negative")


def proper(matrix):
    try:
        np.linalg.cholesky(np.eye(M) + matrix)
    except np.linalg.LinAlgError:
        return False
    return True


class Messages(RuleBasedStateMachine):
    server_class = PosteriorServer

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "server.db"
        self.server = self.server_class(self.path)
        self.next_basis = 0
        self.bases: list[str] = []  # the one that serves, and the open one
        self.tables: dict[
            str, dict[str, tuple[Site, dict]]
        ] = {}  # basis -> name -> what was sent, what is kept
        self.incarnations: dict[str, list[str]] = {name: [] for name in NAMES}
        self.removed: set[str] = set()
        self.sent: list[Site] = []
        self.queue: list[Site] = []
        self.versions = 0
        self.register()

    def teardown(self):
        self.server.close()
        shutil.rmtree(self.folder)

    # -- the model

    def complete(self):
        if len(self.bases) == 2 and set(self.tables[self.bases[0]]) <= set(self.tables[self.bases[1]]):
            del self.tables[self.bases[0]]
            self.bases = self.bases[1:]

    def expected(self, site):
        """What should become of a site that is in itself one: a reason of refusal, unchanged, or accepted."""
        if site.basis_id not in self.bases:
            return "basis"
        if site.site_id in self.removed:
            return "removed"
        known = self.incarnations[site.site_id]
        if site.incarnation in known and site.incarnation != known[-1]:
            return "incarnation"
        row = self.tables[site.basis_id].get(site.site_id)
        if row is None or row[0].incarnation != site.incarnation:
            return "accepted"
        old = row[0]
        if site.version == old.version:
            same = all(torch.equal(getattr(site, f), getattr(old, f)) for f in FIELDS)
            return "unchanged" if same and site.count == old.count else "conflict"
        return "stale" if site.version < old.version else "accepted"

    def deliver(self, site):
        expected = self.expected(site)
        try:
            receipt = self.server.put(site)
        except SiteRefused as refused:
            assert refused.reason in (expected, "indefinite"), (refused.reason, expected)
            assert refused.reason == expected or expected == "accepted"
            return
        assert receipt.status == expected
        if expected == "accepted":
            row = self.tables[site.basis_id].get(site.site_id)
            new = {f: getattr(site, f).numpy()[0] for f in FIELDS}
            start = row[1] if row else {f: np.zeros_like(new[f]) for f in FIELDS}
            step = receipt.step
            kept = new if step == 1.0 else {f: start[f] + step * (new[f] - start[f]) for f in FIELDS}
            self.tables[site.basis_id][site.site_id] = (site, {**kept, "count": site.count})
            if site.incarnation not in self.incarnations[site.site_id]:
                self.incarnations[site.site_id].append(site.incarnation)
            self.complete()

    # -- the messages

    @rule(name=st.sampled_from(NAMES))
    def join(self, name):
        self.incarnations[name].append(self.server.join(name))
        self.removed.discard(name)

    @rule(
        name=st.sampled_from(NAMES),
        which=st.integers(0, 1),
        kind=st.sampled_from(GOOD),
        seed=st.integers(0, 10**6),
        late=st.booleans(),
    )
    def put_or_queue(self, name, which, kind, seed, late):
        incarnation = (self.incarnations[name] or ["first"])[-1]
        self.versions += 1
        basis_id = self.bases[min(which, len(self.bases) - 1)]
        site = made(seed, kind, basis_id, name, incarnation, self.versions)
        self.sent.append(site)
        self.queue.append(site)
        if not late:
            self.deliver(self.queue.pop())

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def from_the_queue(self, data):
        self.deliver(self.queue.pop(data.draw(st.integers(0, len(self.queue) - 1))))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def again(self, data):
        self.deliver(self.sent[-1 - data.draw(st.integers(0, len(self.sent) - 1))])

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), seed=st.integers(0, 10**6))
    def same_version_other_content(self, data, seed):
        old = self.sent[-1 - data.draw(st.integers(0, len(self.sent) - 1))]
        site = made(seed, "rows", old.basis_id, old.site_id, old.incarnation, old.version)
        self.deliver(site)

    @rule(name=st.sampled_from(NAMES), kind=st.sampled_from(POISON), which=st.integers(0, 1))
    def poison(self, name, kind, which):
        incarnation = (self.incarnations[name] or ["first"])[-1]
        basis_id = self.bases[min(which, len(self.bases) - 1)]
        site = made(1, kind, basis_id, name, incarnation, 10**9)
        if kind == "negative" and self.expected(site) == "accepted":
            self.versions += 1
            self.deliver(replace(site, version=self.versions))  # a small step may be taken
            return
        with pytest.raises(SiteRefused):
            self.server.put(site)

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name):
        if not self.incarnations[name]:
            with pytest.raises(OptionError):
                self.server.remove(name)
            return
        try:
            self.server.remove(name)
        except SiteRefused as refused:
            assert refused.reason == "indefinite"
            return
        self.removed.add(name)
        for table in self.tables.values():
            table.pop(name, None)
        self.complete()

    @precondition(lambda self: self.next_basis < len(BASES))
    @rule()
    def register(self):
        basis = BASES[self.next_basis]
        if len(self.bases) == 2:
            with pytest.raises(OptionError):
                self.server.register_basis(basis)
            return
        self.server.register_basis(basis)
        self.next_basis += 1
        self.bases.append(basis.id)
        self.tables[basis.id] = {}
        self.complete()

    @rule()
    def abandon(self):
        if len(self.bases) < 2:
            with pytest.raises(OptionError):
                self.server.abandon_epoch()
            return
        self.server.abandon_epoch()
        del self.tables[self.bases.pop()]

    @rule()
    def restart(self):
        self.server.close()
        self.server = self.server_class(self.path)

    # -- what holds after every one of them

    @invariant()
    def total_is_the_prior_and_the_table(self):
        found = {b["basis_id"]: b for b in self.server.status()["bases"]}
        assert list(found) == self.bases  # the first serves until the other is complete
        assert self.server.total().basis_id == self.bases[0]
        for basis_id, table in self.tables.items():
            rows = {s["site_id"]: (s["incarnation"], s["version"]) for s in found[basis_id]["sites"]}
            assert rows == {n: (s.incarnation, s.version) for n, (s, _) in table.items()}
            total = self.server.total(basis_id)
            kept = [row for _, row in table.values()]
            assert total.count == sum(row["count"] for row in kept)
            for field in FIELDS:
                value = getattr(total, field).numpy()[0]
                parts = [np.broadcast_to(row[field], value.shape) for row in kept]
                sums = np.array([math.fsum(p.flat[k] for p in parts) for k in range(value.size)])
                scale = max([1e-300] + [np.abs(p).max() for p in parts])
                np.testing.assert_allclose(value.ravel(), sums, rtol=1e-12, atol=1e-12 * scale)
            assert proper(total.precision.numpy()[0])
            for name in table:
                cavity = self.server.cavity(name, basis_id)
                assert proper(cavity.precision.numpy()[0])


class Adding(PosteriorServer):
    """The twin: what is put is added to what is there, as a server of differences does."""

    def put(self, site):
        receipt = super().put(site)
        if receipt.status == "unchanged":  # it came again, and it is counted again
            served = self._find(site.basis_id)
            served.total = served.total.changed(None, site)
        return receipt


class Forgetting(PosteriorServer):
    """The twin: a removed site stays in the total."""

    def remove(self, site_id):
        before = {name: served.total for name, served in self._served.items()}
        super().remove(site_id)
        for name, served in self._served.items():
            served.total = before[name]


QUICK = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_any_order_of_messages():
    run_state_machine_as_test(Messages, settings=QUICK)


@pytest.mark.slow
def test_any_order_of_messages_for_long():
    run_state_machine_as_test(Messages, settings=settings(QUICK, max_examples=1000, stateful_step_count=60))


@pytest.mark.parametrize("twin", [Adding, Forgetting])
def test_the_machine_catches_a_server_that_does_not_replace(twin):
    machine = type("Twin", (Messages,), {"server_class": twin})
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=settings(QUICK, phases=[_generate()]))


def _generate():
    from hypothesis import Phase

    return Phase.generate


def test_the_sum_itself_is_not_a_running_sum():
    """`Total` gives what math.fsum gives after large sites have come and gone."""
    sites = [made(k, "rows", BASES[0].id, str(k), "i", 0) for k in range(40)]
    from fspace.server.core import form_of

    total = Total(form_of(BASES[0]), BASES[0].id)
    for site in sites:
        total.add(site)
    for site in sites[5:]:
        total.add(site, -1)
    for field in FIELDS:
        values = [getattr(s, field).flatten().tolist() for s in sites[:5]]
        expected = [math.fsum(column) for column in zip(*values)]
        np.testing.assert_allclose(getattr(total.site(), field).flatten(), expected, rtol=1e-12)
