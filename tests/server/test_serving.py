"""`fspace serve`, `token`, `worker`, `fetch` in processes of their own; TLS; the status page in a browser."""

import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest
import torch

import fspace
from fspace import GPClassifier, GPRegressor, cli
from fspace.errors import OptionError, ServerError
from fspace.inference.collapsed import fit_site
from fspace.inference.nongaussian import posterior_of
from fspace.inference.sites import converge
from fspace.server import PosteriorServer, RemoteServer, Tokens
from fspace.server.natural import Form
from fspace.server.page import page
from fspace.server.serving import Address, Listening, heaviest, register_model, table_rows, work

ROOT = Path(fspace.__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NAMES = ("UA", "AA")


def command(folder, *args, status=0):
    """What a command prints."""
    done = subprocess.run(
        [sys.executable, "-m", "fspace.cli", *map(str, args)],
        capture_output=True, text=True, cwd=folder, env=ENVIRONMENT, timeout=300,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


class Served:
    """`fspace serve` in a process."""

    def __init__(self, folder, *args):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fspace.cli", "serve", "--store", "server.db", "--port", "0", *args],
            cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        line = self.process.stdout.readline()
        found = re.search(r"https?://\S+", line)
        assert found, line + self.process.stdout.read()
        self.url = found.group()

    def end(self):
        """Ctrl-C; what it printed since, and its exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.communicate(timeout=60)[0], self.process.returncode


def flights(rows=160, seed=0):
    rng = np.random.default_rng(seed)
    x, plane = rng.uniform(-2, 2, rows), rng.choice(["jet", "prop"], rows)
    y = 10 * np.sin(2 * x) + 5 * (plane == "jet") + rng.normal(0, 1, rows)
    return pd.DataFrame({"x": x, "plane": plane, "delay": y, "late": np.where(y > 2, "late", "in time")})


@pytest.fixture(params=["regression", "classification"])
def trip(request, tmp_path):
    """A folder with a model, a table for each of two workers, and a table to predict."""
    target = {"regression": "delay", "classification": "late"}[request.param]
    table = flights()[["x", "plane", target]]
    levels = pd.CategoricalDtype(["jet", "prop"])
    estimator = {"regression": GPRegressor, "classification": GPClassifier}[request.param]
    model = estimator(kernel="matern", inducing=20, progress=False)
    model.fit(table.iloc[:60, :2].astype({"plane": levels}), table.iloc[:60, 2:].squeeze())
    model.save(tmp_path / "model.fspace")
    for k, name in enumerate(NAMES):
        table[60 + k :: 2].to_csv(tmp_path / f"{name}.csv", index=False)
    table[60:].to_csv(tmp_path / "all.csv", index=False)
    return tmp_path, model, request.param


def test_serve_workers_fetch_and_predict(trip):
    folder, model, task = trip
    for name in NAMES:
        printed = command(folder, "token", "--site", name, "--rights", "put,read", "--days", "30")
        (folder / f"{name}.token").write_text(printed)
    served = Served(folder, "--model", "model.fspace")
    try:
        # Gaussian: a put each. Else they go on until neither is moved by the other.
        for name in NAMES if task == "regression" else NAMES * 6:
            about = ["--server", served.url, "--token-file", f"{name}.token"]
            if task == "regression":
                printed = command(folder, "worker", *about, "--site", name, "--data", f"{name}.csv")
            else:  # here, which is quicker
                said: list[str] = []
                where = Address(served.url, str(folder / f"{name}.token"))
                work(where, str(folder / f"{name}.csv"), name, 30, said.append)
                printed = "\n".join(said)
            assert "accepted" in printed and "Log evidence" in printed
        printed = command(folder, "worker", *about, "--site", "UA", "--data", "AA.csv", status=2)
        assert "is for site 'AA'" in printed.replace("\n", " ") and "Traceback" not in printed
        about = ["--server", served.url, "--token-file", "UA.token"]
        assert "100 rows" in command(folder, "fetch", *about, "--out", "new.fspace")
        assert "exists" in command(folder, "fetch", *about, "--out", "new.fspace", status=2)
        if task == "regression":
            assert "right" in command(folder, "forget", *about, "--site", "AA", status=2)
            (folder / "admin.token").write_text(command(folder, "token", "--rights", "read,admin"))
            about = ["--server", served.url, "--token-file", "admin.token"]
            assert "no site" in command(folder, "forget", *about, "--site", "DL", status=2)
            assert "'AA' is gone" in command(folder, "forget", *about, "--site", "AA")
            assert "50 rows" in command(folder, "fetch", *about, "--out", "less.fspace")
    finally:
        printed, status = served.end()
    assert status == 0 and "Ended" in printed and "Traceback" not in printed
    command(folder, "predict", "new.fspace", "all.csv", "--out", "out.csv")
    found = pd.read_csv(folder / "out.csv")
    member = heaviest(model)
    x, y = table_rows(model, member.basis, member.scaling, str(folder / "all.csv"))
    if task == "regression":
        pooled = fit_site(member.basis, x, y)
    else:
        pooled = converge(member.basis, x, y, tolerance=1e-12)[0]
    expected = posterior_of(member.basis, replace(pooled, site_id="all"), member.scaling, True)
    inputs = pd.read_csv(folder / "all.csv")[["x", "plane"]]
    model.posterior_ = expected
    if task == "regression":
        mean, std = model.predict(inputs, return_std=True)
        np.testing.assert_allclose(found["mean"], mean, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(found["std"], std, rtol=1e-9)
    else:
        np.testing.assert_allclose(found["p_late"], model.predict_proba(inputs)[:, 1], atol=1e-4)


@pytest.mark.parametrize("name", ["first", "first/model", "first/model.fspace"])
def test_a_model_is_named_as_for_predict(trip, name):
    folder, model, _ = trip
    (folder / "first").mkdir()
    (folder / "model.fspace").rename(folder / "first" / "model.fspace")
    with PosteriorServer() as server:
        assert register_model(server, str(folder / name)) == heaviest(model).basis.id
        assert server.attachment("model") == (folder / "first" / "model.fspace").read_bytes()


def test_a_store_goes_on_without_the_model_file(trip):
    folder, model, _ = trip
    with PosteriorServer(folder / "server.db") as server:
        register_model(server, str(folder / "model.fspace"))
    token = Tokens(folder / "tokens.json").issue(["read"])
    served = Served(folder)
    try:
        with RemoteServer(served.url, token) as remote:
            assert remote.basis()[0].id == heaviest(model).basis.id
            assert remote.attachment("model") == (folder / "model.fspace").read_bytes()
    finally:
        served.end()


@pytest.mark.parametrize("where, words", [
    (Listening("0.0.0.0"), "--certificate"),
    (Listening("192.0.2.1"), "--insecure"),
    (Listening("example.org"), "--certificate"),
    (Listening("::"), "--certificate"),
    (Listening(certificate="a.pem"), "together"),
    (Listening(certificate="a.pem", key="b.pem"), "no such file"),
])  # fmt: skip
def test_where_it_does_not_listen(where, words):
    with pytest.raises(OptionError, match=words):
        where.check()


def test_where_it_listens():
    for where in (Listening(), Listening("localhost"), Listening("::1"), Listening("0.0.0.0", insecure=True)):
        where.check()


@pytest.mark.parametrize("args, words", [
    (["serve", "--store", "s.db"], "has no basis"),
    (["serve", "--store", "s.db", "--host", "0.0.0.0"], "unencrypted"),
    (["serve", "--store", "s.db", "--model", "none.fspace"], "There is no model 'none.fspace'"),
    (["serve", "--store", "s.db", "--model", "m.fspace", "--rate", "0"], "--rate 0 must be above 0"),
    (["token"], "for one site"),
    (["token", "--revoke", "abc"], "no token"),
    (["fetch", "--server", "https://x", "--token-file", "none", "--out", "a"], "cannot be read"),
    (["worker", "--server", "https://x", "--token-file", "none", "--site", "a", "--data", "a.csv", "--rounds", "0"],
     "at least 1"),
])  # fmt: skip
def test_refusals_are_one_line(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(sys, "argv", ["fspace", *args])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    assert words in printed.err and printed.err.count("\n") == 1
    assert not (tmp_path / "s.db").exists()


@pytest.fixture
def certificate(tmp_path):
    """A certificate of 127.0.0.1 that signs itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl on the PATH to make a certificate")
    files = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-out", files[0], "-keyout", files[1]],
        check=True, capture_output=True,
    )  # fmt: skip
    return tuple(map(str, files))


def test_tls(gaussian, certificate, tmp_path):
    with PosteriorServer(tmp_path / "server.db") as server:
        server.register_basis(gaussian.basis)
    token = Tokens(tmp_path / "tokens.json").issue(["put", "read"], "a")
    served = Served(tmp_path, "--certificate", certificate[0], "--key", certificate[1])
    try:
        assert served.url.startswith("https://")
        with RemoteServer(served.url, token, verify=certificate[0]) as worker:
            site = fit_site(gaussian.basis, gaussian.x, gaussian.y, site_id="a")
            assert worker.put(site).status == "accepted"
            assert torch.equal(worker.total().shift, site.shift)
        with RemoteServer(served.url, token) as worker, pytest.raises(ServerError, match="not trusted"):
            worker.total()
        with RemoteServer(served.url.replace("https", "http"), token, tries=1) as worker:
            with pytest.raises(ServerError):
                worker.total()
        assert isinstance(ssl.create_default_context(cafile=certificate[0]), ssl.SSLContext)
    finally:
        served.end()


def test_the_page_takes_nothing_from_elsewhere(front):
    html, policy = page()
    assert "default-src 'none'" in policy and policy.count("sha256-") == 2 and "unsafe" not in policy
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|localStorage|cookie", html
    )
    assert re.findall(r"https?://[^\"']+", html) == ["http://www.w3.org/2000/svg"]
    answer = httpx.get(front(PosteriorServer()).url + "/", trust_env=False)
    assert answer.text == html and answer.headers["content-security-policy"] == policy


def shown(url, *options):
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", *options, url],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="needs chromium on the PATH")
def test_the_status_page_in_a_browser(gaussian, front, monkeypatch, tmp_path):
    monkeypatch.setattr("fspace.server.core.EVIDENCE_EVERY", -1.0)
    server = PosteriorServer()
    server.register_basis(gaussian.basis)
    evil = "<img src=x onerror=document.title='evil'>"
    for k, name in enumerate(("UA", "AA", evil)):
        server.put(fit_site(gaussian.basis, *gaussian.shard(k, 4), site_id=name))
    served = front(server)
    html = shown(f"{served.url}/#token={served.admin}", "--dump-dom")
    assert "<td>UA</td>" in html and "<td>AA</td>" in html and "prior" in html
    assert "<img" not in html and "&lt;img src=x" in html and "<title>fspace posterior server</title>" in html
    assert "polyline" in html and html.count("<circle") == 3
    freedom = [float(text) for text in re.findall(r'class="figure">([\d.]+)<', html)]
    assert len(freedom) == 4 and abs(sum(freedom) - 60) < 0.3  # three sites and the prior: all that there is
    assert served.admin not in html
    assert "fspace-" not in shown(f"{served.url}/", "--dump-dom")
    assert "not known here" in shown(f"{served.url}/#token=wrong", "--dump-dom")


def test_status_is_plain_json(front):
    empty = front(PosteriorServer())
    with empty.client() as admin:
        assert json.dumps(admin.status(contributions=True)["bases"]) == "[]"
    assert Form(1, 2).shapes["shift"] == (1, 2)
