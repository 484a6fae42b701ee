"""Processes that are killed (SIGKILL) in the middle of things: what was acknowledged is there, and is counted once."""

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fspace.errors import SiteRefused
from fspace.inference.basis import Site
from fspace.server import PosteriorServer, WeightBasis
from fspace.server.core import form_of
from fspace.server.wire import site_bytes, site_from_bytes

CHILD = Path(__file__).with_name("killed_server.py")
BASIS = WeightBasis.of(torch.nn.Linear(3, 1, bias=False), diagonal=False)
LATER = WeightBasis.of(torch.nn.Linear(3, 1, bias=False), prior_scale=2.0, diagonal=False)


def site(name="s0", version=0, number=1.0, basis=BASIS):
    precision = number * torch.tensor([[[2.0, 0.5, 0.0], [0.5, 1.0, 0.25], [0.0, 0.25, 3.0]]]).double()
    shift = number * torch.tensor([[1.0, -2.0, 0.5]]).double()
    return Site(basis.id, precision, shift, torch.tensor([-number]).double(), 10, name, "first", version)


@pytest.fixture(scope="module")
def child():
    """Run a server in a process of its own; whether it was killed, and what it said before.

    One process imports torch, which takes longer than all else, and forks those that are killed.
    """
    process = subprocess.Popen(
        [sys.executable, str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def run(path, *what):
        print(path, *what, file=process.stdin, flush=True)
        said = []
        while not (line := process.stdout.readline().split())[:1] == ["ended"]:
            assert line, "the process that forks has ended"
            said.append(line)
        assert line[1] in ("0", str(int(signal.SIGKILL))), said
        return line[1] != "0", said

    yield run
    process.kill()
    process.wait()


def assert_total(server, sites):
    """The total is exactly the sum of these sites (their numbers are sums of powers of two)."""
    total = server.total()
    for name in ("precision", "shift", "log_scale"):
        expected = sum((getattr(s, name) for s in sites), torch.zeros_like(getattr(total, name)))
        torch.testing.assert_close(getattr(total, name), expected, rtol=0, atol=0)
    assert total.count == sum(s.count for s in sites)


@pytest.fixture
def path(tmp_path):
    """A server's file with a basis and one site."""
    with PosteriorServer(tmp_path / "server.db") as server:
        server.register_basis(BASIS)
        server.put(site("earlier"))
    return tmp_path / "server.db"


def test_killed_after_the_commit_and_before_the_reply(child, path):
    """The sender does not know, sends again, and is counted once."""
    killed, said = child(path, "after-commit")
    assert killed and said == [["putting"]]  # and no reply
    with PosteriorServer(path) as server:
        assert_total(server, [site("earlier"), site("new", number=2.0)])
        assert server.put(site("new", number=2.0)).status == "unchanged"
        assert_total(server, [site("earlier"), site("new", number=2.0)])


@pytest.mark.parametrize("statement", ["BEGIN", "incarnation", "INSERT", "COMMIT"])
def test_killed_inside_the_transaction(child, path, statement):
    """As if it had never come; sent again, it is counted once."""
    killed, said = child(path, "inside", statement)
    assert killed and said == [["putting"]]
    with PosteriorServer(path) as server:
        assert server.get("new") is None
        assert_total(server, [site("earlier")])
        assert server.put(site("new", number=2.0)).status == "accepted"
        assert_total(server, [site("earlier"), site("new", number=2.0)])


@pytest.mark.parametrize(
    "when, after",
    [("insert", False), ("closing", False), ("closed", False), ("COMMIT", False), ("committed", True)],
)
def test_killed_during_the_change_of_epoch(child, path, when, after):
    """The last put on the new basis and the switch are one: wholly before or wholly after."""
    killed, said = child(path, "epoch", when)
    assert killed and said == [["registered"], ["putting"]]
    with PosteriorServer(path) as server:
        states = [basis["state"] for basis in server.status()["bases"]]
        new = site("earlier", number=4.0, basis=LATER)
        if after:
            assert states == ["serving"] and server.total().basis_id == LATER.id
            assert server.put(new).status == "unchanged"
        else:
            assert states == ["serving", "open"] and server.total().basis_id == BASIS.id
            assert_total(server, [site("earlier")])
            assert server.total(LATER.id).count == 0
            assert server.put(new).status == "accepted"
        assert server.total().basis_id == LATER.id
        assert_total(server, [new])
    with PosteriorServer(path) as server:
        assert_total(server, [new])


def _send_half(connection):
    data = site_bytes(site("new"))
    os.write(connection.fileno(), data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_killed_while_it_sends():
    """Half of a site is no site."""
    server = PosteriorServer()
    server.register_basis(BASIS)
    server.put(site("earlier"))
    receive, send = multiprocessing.get_context("fork").Pipe(duplex=False)
    worker = multiprocessing.get_context("fork").Process(target=_send_half, args=(send,))
    worker.start()
    send.close()
    worker.join(30)
    assert worker.exitcode == -signal.SIGKILL
    data = b""
    while part := os.read(receive.fileno(), 4096):
        data += part
    assert 0 < len(data) == len(site_bytes(site("new"))) // 2
    with pytest.raises(SiteRefused) as refused:
        server.put(site_from_bytes(data, form_of(BASIS)))
    assert refused.value.reason == "format"
    assert_total(server, [site("earlier")])


def test_many_kills_at_random_times(child, tmp_path):
    """15 processes, each killed while it puts and removes; the seed fixes after how many SQL statements. What was
    acknowledged is there, what was sent last may be or not, and nothing else is."""
    path = tmp_path / "server.db"
    with PosteriorServer(path) as server:
        server.register_basis(BASIS)
    generator = torch.Generator().manual_seed(5)
    acknowledged: dict[str, tuple[int, float] | None] = {}
    for kill in range(15):
        killed, said = child(path, "random", kill, int(torch.randint(3, 120, (), generator=generator)))
        assert killed
        pending = None
        for verb, name, version, number in said:
            state = None if verb.endswith("removal") else (int(version), float(number))
            if verb.startswith("ack"):
                acknowledged[name], pending = state, None
            else:
                pending = (name, state)
        with PosteriorServer(path) as server:
            found = {}
            for about in server.status()["bases"][0]["sites"]:
                kept = server.get(about["site_id"])
                found[kept.site_id] = (kept.version, -kept.log_scale.item())
                assert torch.equal(kept.precision, site(number=found[kept.site_id][1]).precision)
            expected = {k: v for k, v in acknowledged.items() if v is not None}
            if found != expected:
                assert pending is not None
                acknowledged[pending[0]] = pending[1]
                expected = {k: v for k, v in acknowledged.items() if v is not None}
            assert found == expected
            assert_total(server, [site(k, version, number) for k, (version, number) in found.items()])
    assert len(acknowledged) > 3


def test_a_file_of_a_killed_server_is_not_in_use(child, path):
    child(path, "after-commit")
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


@pytest.mark.parametrize("on_disk", [False, True])
def test_eight_threads_at_once(on_disk, tmp_path):
    """50 puts each, versions of the same and of other sites; the total is exact, and 8 threads read meanwhile."""
    server = PosteriorServer(tmp_path / "server.db" if on_disk else None)
    server.register_basis(BASIS)
    errors = []

    def worker(k):
        try:
            for version in range(50):
                name = f"{k}-{version % 5}"
                server.put(site(name, version, float(k + 1 + version)))
                server.put(site(name, version, float(k + 1 + version)))
                with pytest.raises(SiteRefused):
                    server.put(replace(site(name, version - 1, 0.5), version=max(version - 1, 0), count=1))
                if version % 10 == 0:
                    server.total()
                    server.cavity(name)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=worker, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    expected = [site(f"{k}-{v % 5}", v, float(k + 1 + v)) for k in range(8) for v in range(45, 50)]
    assert_total(server, expected)
    server.close()
    if on_disk:
        with PosteriorServer(tmp_path / "server.db") as again:
            assert_total(again, expected)


def test_eight_threads_with_versions_of_one_site():
    """In whatever order they come, the highest version is what stays."""
    server = PosteriorServer()
    server.register_basis(BASIS)

    def worker(k):
        for version in range(k, 400, 8):
            try:
                server.put(site("one", version, float(version + 1)))
            except SiteRefused as refused:
                assert refused.reason == "stale"

    threads = [threading.Thread(target=worker, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_total(server, [site("one", 399, 400.0)])


def test_an_interrupt_between_the_commit_and_the_total_is_not_counted_twice(monkeypatch):
    """Ctrl-C just after the commit: the site is in the table, and the total had been left without it, so that the next
    put took away what had never been added."""
    server = PosteriorServer()
    server.register_basis(BASIS)
    server.put(site("earlier"))
    wrapped = server._store.transaction

    class Interrupted:
        def __init__(self):
            self.inner = wrapped()

        def __enter__(self):
            return self.inner.__enter__()

        def __exit__(self, *details):
            self.inner.__exit__(*details)
            raise KeyboardInterrupt

    for change in (
        lambda: server.put(site("new", 0, 2.0)),
        lambda: server.remove("earlier"),
    ):
        monkeypatch.setattr(server._store, "transaction", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            change()
        monkeypatch.undo()
    server.put(site("new", 1, 4.0))
    assert_total(server, [site("new", 1, 4.0)])
