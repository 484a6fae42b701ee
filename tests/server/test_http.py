"""The network front, over real sockets: what comes in any order is the pooled posterior, what is wrong is refused."""

import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import save as write_tensors

from fspace.errors import AccessRefused, OptionError, ServerError, SiteRefused
from fspace.inference.collapsed import fit_site, log_evidence
from fspace.server import Limits, PosteriorServer, RemoteServer, Tokens
from fspace.server.natural import Form
from fspace.server.wire import most_bytes, site_bytes

ROOT = Path(__file__).resolve().parents[2]


def sites_of(problem, k=4, order=None):
    return [
        replace(fit_site(problem.basis, *problem.shard(i, k)), site_id=f"s{i}") for i in (order or range(k))
    ]


def assert_same(one, other, tolerance=1e-10):
    for name in ("precision", "shift", "log_scale"):
        a, b = getattr(one, name), getattr(other, name)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.fixture
def served(gaussian, front):
    """A front that has two of four sites."""
    server = PosteriorServer()
    server.register_basis(gaussian.basis)
    made = front(server)
    for site in sites_of(gaussian)[:2]:
        server.put(site)
    return made


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_shards_in_any_order_give_the_pooled_posterior(gaussian, front, order, tmp_path):
    with PosteriorServer(tmp_path / "server.db") as server:
        made = front(server)
        with made.client() as admin:
            assert admin.register_basis(gaussian.basis) == gaussian.basis.id
            for site in sites_of(gaussian, 4, order):
                with made.client(site.site_id) as worker:
                    basis, _ = worker.basis()
                    assert basis.id == gaussian.basis.id
                    assert worker.put(site).status == "accepted"
                    assert worker.put(site).status == "unchanged"
            pooled = fit_site(gaussian.basis, gaussian.x, gaussian.y)
            assert_same(admin.total(), pooled)
            assert admin.log_evidence() == pytest.approx(log_evidence([pooled]), rel=1e-10)
            x = gaussian.x[:5]
            assert torch.equal(admin.posterior().latent(x).mean, server.posterior().latent(x).mean)


def test_what_the_embedded_server_answers_the_remote_one_answers(served, gaussian):
    own, name = served.server, "a/b c?#ü"
    with served.client() as admin, served.client(name) as worker:
        for here, there in ((own.total(), admin.total()), (own.cavity("s0"), admin.cavity("s0"))):
            assert_same(here, there, 0.0)
        assert_same(own.get("s1"), admin.get("s1"), 0.0)
        assert admin.get("absent") is None
        site = replace(sites_of(gaussian)[2], site_id=name)
        site = replace(site, incarnation=worker.join(name), version=3)
        receipt = worker.put(site)
        assert receipt == (receipt.status, name, site.incarnation, 3, 1.0)
        assert_same(worker.get(name), own.get(name), 0.0)
        for call in (
            lambda s: s.put(replace(site, version=2)),
            lambda s: s.put(replace(site, shift=2 * site.shift)),
        ):
            with pytest.raises(SiteRefused) as here:
                call(own)
            with pytest.raises(SiteRefused) as there:
                call(worker)
            assert (here.value.reason, str(here.value)) == (there.value.reason, str(there.value))
        admin.remove(name)
        with pytest.raises(SiteRefused) as refused:
            worker.put(replace(site, version=9))
        assert refused.value.reason == "removed"
        with pytest.raises(OptionError, match="no site"):
            admin.remove("nobody")
        with pytest.raises(SiteRefused) as refused:
            admin.total("0" * 64)
        assert refused.value.reason == "basis"
        status, mine = admin.status(contributions=True), own.status(contributions=True)
        assert status["bases"] == mine["bases"]
        assert admin.basis()[0] is admin.basis()[0]  # fetched once
        assert admin.attachment("model") is None


@pytest.mark.parametrize("change, reason", [
    (lambda s: replace(s, shift=s.shift * float("nan")), "values"),
    (lambda s: replace(s, precision=s.precision + float("inf")), "values"),
    (lambda s: replace(s, shift=s.shift + 1e16), "values"),
    (lambda s: replace(s, shift=s.shift.float()), "dtype"),
    (lambda s: replace(s, precision=s.precision[:, :-1, :-1], shift=s.shift[:, :-1]), "shape"),
    (lambda s: replace(s, basis_id="0" * 64), "basis"),
    (lambda s: replace(s, version=-1), "values"),
    (lambda s: replace(s, count=10**20), "values"),
    (lambda s: replace(s, incarnation="a\nb"), "name"),
    (lambda s: replace(s, incarnation="a" * 300), "name"),
    (lambda s: replace(s, site_id="s9"), "name"),
    (lambda s: replace(s, precision=-1e6 * s.precision), "indefinite"),
])  # fmt: skip
def test_poisoned_sites_are_refused_with_a_reason(served, gaussian, change, reason):
    before, site = served.server.total(), sites_of(gaussian)[2]
    answer = send(served, site_bytes(change(site)))
    assert answer.json()["reason"] == reason and answer.json()["message"]
    assert 400 <= answer.status_code < 500
    assert_same(served.server.total(), before, 0.0)


def test_the_client_refuses_what_is_not_symmetric_before_half_of_it_is_sent(served, gaussian):
    site = sites_of(gaussian)[2]
    crooked = site.precision.clone()
    crooked[0, 0, 1] += 1.0
    with served.client("s2") as worker, pytest.raises(SiteRefused, match="symmetric"):
        worker.put(replace(site, precision=crooked))
    # a whole matrix, symmetric or not, is no message
    about = {n: getattr(site, n) for n in ("basis_id", "site_id", "incarnation", "version", "count")}
    tensors = {"precision": crooked, "shift": site.shift.contiguous(), "log_scale": site.log_scale}
    answer = send(served, write_tensors(tensors, metadata={"fspace site 1": json.dumps(about)}))
    assert answer.json()["reason"] in ("shape", "size")


class Bomb:
    """What unpickling would set off."""

    def __reduce__(self):
        return os.abort, ()


@pytest.mark.parametrize("spoil, reasons", [
    (lambda data: data[:-8], {"format"}),
    (lambda data: data[:50], {"format"}),
    (lambda data: b"", {"format"}),
    (lambda data: pickle.dumps(Bomb()), {"format"}),
    (lambda data: data + b"\0" * 8, {"format"}),
    (lambda data: data + bytes(10**6), {"size"}),
    (lambda data: struct.pack("<Q", 2**62) + data[8:], {"format"}),
    (lambda data: data[:8] + b"{" * (len(data) - 8), {"format"}),
    (lambda data: data.replace(b'"F64"', b'"F32"'), {"dtype"}),
    (lambda data: data.replace(b"data_offsets", b"data_offsetx"), {"format"}),
])  # fmt: skip
def test_poisoned_bytes_are_refused_with_a_reason(served, gaussian, spoil, reasons):
    before = served.server.total()
    answer = send(served, spoil(site_bytes(sites_of(gaussian)[2])))
    assert answer.json()["reason"] in reasons and answer.status_code in (400, 413, 422)
    assert_same(served.server.total(), before, 0.0)


def test_overlapping_tensors(served, gaussian):
    data = site_bytes(sites_of(gaussian)[2])
    (size,) = struct.unpack("<Q", data[:8])
    layout = json.loads(data[8 : 8 + size])
    first, last = layout["shift"]["data_offsets"]
    layout["shift"]["data_offsets"] = [0, last - first]
    header = json.dumps(layout).encode()
    answer = send(served, struct.pack("<Q", len(header)) + header + data[8 + size :])
    assert answer.status_code == 400 and answer.json()["reason"] == "format"


def send(front, content, site="s2", token=None):
    headers = {"Authorization": f"Bearer {front.token(site) if token is None else token}"}
    return httpx.put(f"{front.url}/sites/{site}", content=content, headers=headers, trust_env=False)


def raw(front, head, body=b"", finish=True):
    """Bytes as they are on the wire; the status and the reason of the answer."""
    where = front.url.removeprefix("http://").split(":")
    with socket.create_connection((where[0], int(where[1])), timeout=20) as line:
        lines = ["PUT /sites/s2 HTTP/1.1", "Host: x", f"Authorization: Bearer {front.token('s2')}", *head]
        line.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        if finish:
            line.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while chunk := line.recv(65536):
                answer += chunk
                if b"}" in answer:
                    break
        except ConnectionError:
            pass
    text = answer.decode()
    return (int(text.split()[1]), text) if text else (0, "")


def test_lengths_that_lie(served, gaussian):
    before, data = served.server.total(), site_bytes(sites_of(gaussian)[2])
    most = most_bytes(Form(2, 30))
    # refused before a byte of it is there
    assert raw(served, [f"Content-Length: {most + 1}"], finish=False)[0] == 413
    assert raw(served, ["Content-Length: 99999999999999999999"], finish=False)[0] in (400, 413)
    for wrong in ("-5", "ten", "5, 7"):
        assert raw(served, [f"Content-Length: {wrong}"], data, finish=False)[0] == 400
    # shorter than what comes: cut off, and no site
    assert raw(served, [f"Content-Length: {len(data) - 8}"], data, finish=False)[0] == 400
    # longer than what comes: never complete
    assert raw(served, [f"Content-Length: {len(data) + 8}"], data)[0] in (0, 400)
    # without a length
    chunk = lambda part: f"{len(part):x}\r\n".encode() + part + b"\r\n"  # noqa: E731
    endless = b"".join(chunk(bytes(65536)) for _ in range(2 + most // 65536))
    assert raw(served, ["Transfer-Encoding: chunked"], endless, finish=False)[0] == 413
    assert_same(served.server.total(), before, 0.0)
    status, text = raw(served, ["Transfer-Encoding: chunked"], chunk(data) + b"0\r\n\r\n", finish=False)
    assert status == 200 and "accepted" in text


def test_a_body_that_does_not_come(gaussian, front):
    server = PosteriorServer()
    server.register_basis(gaussian.basis)
    slow = front(server, Limits(body_seconds=0.2))
    assert raw(slow, ["Content-Length: 500"], b"x", finish=False)[0] == 408


def test_slow_bodies_of_one_token_leave_places_to_others(gaussian, front):
    server = PosteriorServer()
    server.register_basis(gaussian.basis)
    slow = front(server, Limits(concurrent=4, body_seconds=20.0))
    mine, other = slow.token("s2"), slow.token("s3")
    where = slow.url.removeprefix("http://").split(":")
    lines = []
    try:
        for _ in range(2):
            line = socket.create_connection((where[0], int(where[1])), timeout=20)
            lines.append(line)
            head = [
                "PUT /sites/s2 HTTP/1.1",
                "Host: x",
                f"Authorization: Bearer {mine}",
                "Content-Length: 500",
            ]
            line.sendall("\r\n".join([*head, "", ""]).encode() + b"x")
        deadline = time.monotonic() + 10
        while (answer := send(slow, b"y", token=mine)).status_code != 429 and time.monotonic() < deadline:
            time.sleep(0.02)  # until both have arrived
        assert answer.status_code == 429 and answer.json()["reason"] == "busy"
        site = replace(sites_of(gaussian)[2], site_id="s3")
        assert send(slow, site_bytes(site), "s3", other).json()["status"] == "accepted"
    finally:
        for line in lines:
            line.close()
    deadline = time.monotonic() + 10
    while (answer := send(slow, b"y", token=mine)).status_code == 429 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert answer.status_code == 400  # the places are free again; "y" is no site


def test_tokens_are_asked_for_everything_but_the_page(served, gaussian):
    before, data = served.server.total(), site_bytes(sites_of(gaussian)[2])
    ask = lambda method, path, token: httpx.request(  # noqa: E731
        method, served.url + path, headers=token and {"Authorization": f"Bearer {token}"}, trust_env=False
    )
    paths = [
        ("GET", "/sites/s0"), ("DELETE", "/sites/s0"), ("POST", "/sites/s0/join"), ("PUT", "/sites/s0"),
        ("GET", "/cavity/s0"), ("GET", "/total"), ("GET", "/basis"), ("GET", f"/basis/{gaussian.basis.id}"),
        ("POST", "/basis"), ("GET", "/log_evidence"), ("GET", "/status"), ("GET", "/model"),
    ]  # fmt: skip
    for method, path in paths:
        for token in (None, "wrong"):
            answer = ask(method, path, token)
            assert (answer.status_code, answer.json()["reason"]) == (401, "token"), path
            assert answer.headers["www-authenticate"] == "Bearer"
    assert ask("GET", "/", None).status_code == 200
    worker, reader = served.token("s2"), served.tokens.issue(["read"])
    for method, path, token in (
        ("DELETE", "/sites/s0", worker), ("POST", "/basis", worker), ("POST", "/sites/s0/join", worker),
        ("PUT", "/sites/s0", worker), ("PUT", "/sites/s2", reader), ("POST", "/sites/s2/join", reader),
        ("PUT", "/sites/s0", served.admin), ("GET", "/total", served.tokens.issue(["put"], "s2")),
    ):  # fmt: skip
        assert ask(method, path, token).status_code == 403, (method, path)
    assert send(served, data, site="s1", token=worker).json()["reason"] == "site"
    served.tokens.revoke(worker)
    answer = send(served, data, token=worker)
    assert (answer.status_code, answer.json()["reason"]) == (401, "revoked")
    answer = send(served, data, token=served.tokens.issue(["put"], "s2", days=1e-9))
    assert (answer.status_code, answer.json()["reason"]) == (401, "expired")
    answer = ask("GET", "/nowhere", served.admin)
    assert (answer.status_code, answer.json()["reason"]) == (404, "address")
    assert_same(served.server.total(), before, 0.0)
    with RemoteServer(served.url, worker) as client, pytest.raises(AccessRefused) as refused:
        client.total()
    assert refused.value.reason == "revoked"


def test_a_basis_is_limited_and_checked(gaussian, front):
    small = front(PosteriorServer(), Limits(basis_bytes=1000))
    with small.client() as admin, pytest.raises(SiteRefused) as refused:
        admin.register_basis(gaussian.basis)
    assert refused.value.reason == "size"
    headers = {"Authorization": f"Bearer {small.admin}"}
    answer = httpx.post(small.url + "/basis", content=pickle.dumps(Bomb()), headers=headers, trust_env=False)
    assert (answer.status_code, answer.json()["reason"]) == (400, "format")


def test_rate_limit_says_how_long_to_wait_and_the_client_waits(gaussian, front):
    server = PosteriorServer()
    server.register_basis(gaussian.basis)
    strict = front(server, Limits(rate=2.0, burst=2))
    headers = {"Authorization": f"Bearer {strict.admin}"}
    answers = [httpx.get(strict.url + "/status", headers=headers, trust_env=False) for _ in range(8)]
    limited = [answer for answer in answers if answer.status_code == 429]
    assert limited and all(int(answer.headers["retry-after"]) >= 1 for answer in limited)
    assert limited[0].json()["reason"] == "rate"
    with RemoteServer(strict.url, strict.admin) as client:
        assert [client.log_evidence() for _ in range(3)] == [0.0] * 3


def test_a_thousand_requests_at_once(served, gaussian):
    """Each is answered or told to come again; the posterior is that of what was accepted."""
    sites = sites_of(gaussian)
    tokens = {site.site_id: served.token(site.site_id) for site in sites}
    bad = replace(sites[0], shift=sites[0].shift * float("nan"), version=1)
    messages = [(site, site_bytes(site)) for site in [*sites, bad]]
    limits = httpx.Limits(max_connections=200)
    with httpx.Client(trust_env=False, timeout=60, limits=limits) as http, ThreadPoolExecutor(200) as pool:

        def one(k):
            site, content = messages[k % len(messages)]
            headers = {"Authorization": f"Bearer {tokens[site.site_id]}"}
            return http.put(f"{served.url}/sites/{site.site_id}", content=content, headers=headers)

        answers = list(pool.map(one, range(1000)))
    kinds = Counter((answer.status_code, answer.json().get("reason", "taken")) for answer in answers)
    assert set(kinds) <= {(200, "taken"), (422, "values"), (503, "busy")}, kinds
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 503)
    for site in sites:
        with served.client(site.site_id) as worker:
            worker.put(site)
    assert_same(served.server.total(), fit_site(gaussian.basis, gaussian.x, gaussian.y))


def test_a_server_that_is_not_there(gaussian):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with RemoteServer(f"http://127.0.0.1:{port}", "token", tries=2) as client:
        with pytest.raises(ServerError, match="See that it runs"):
            client.total()
    for url, words in (("http://example.org", "unencrypted"), ("ftp://x", "https"), ("nowhere", "https")):
        with pytest.raises(OptionError, match=words):
            RemoteServer(url, "token")


DIES = """
import os, signal, sys
sys.path.insert(0, {root!r})
from fspace.server import PosteriorServer
from fspace.server import serving

class Dies(PosteriorServer):
    def put(self, site):
        receipt = super().put(site)
        if os.path.exists("armed"):
            os.unlink("armed")
            os.kill(os.getpid(), signal.SIGKILL)  # written, not answered
        return receipt

serving.PosteriorServer = Dies
where = serving.Listening(port={port})
serving.serve_store("server.db", "tokens.json", None, where, lambda text: print(text, flush=True))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_retry_after_the_server_was_killed_between_write_and_reply_counts_once(gaussian, tmp_path):
    with PosteriorServer(tmp_path / "server.db") as server:
        server.register_basis(gaussian.basis)
    token = Tokens(tmp_path / "tokens.json").issue(["put", "read"], "s0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    site = sites_of(gaussian)[0]

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", DIES.format(root=str(ROOT), port=port)],
            cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert "Serving" in process.stdout.readline()
        return process

    (tmp_path / "armed").touch()
    first = start()
    again = []

    def replace_it():
        first.wait()
        again.append(start())

    watcher = threading.Thread(target=replace_it)
    watcher.start()
    try:
        with RemoteServer(f"http://127.0.0.1:{port}", token, tries=12) as worker:
            receipt = worker.put(site)
            assert first.wait() == -signal.SIGKILL
            assert receipt.status == "unchanged"  # the first try had been kept
            assert_same(worker.total(), site, 1e-14)
            assert worker.total().count == 100
    finally:
        watcher.join()
        for process in [first, *again]:
            process.send_signal(signal.SIGINT) if process.poll() is None else None
            process.wait()
            process.stdout.close()
