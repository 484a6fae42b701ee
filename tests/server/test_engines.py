"""Shards over engines: the pooled posterior, whoever does the work."""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch

from fspace.errors import DataError, OptionError, ServerError
from fspace.inference.collapsed import fit_site, log_evidence
from fspace.inference.sites import converge
from fspace.server import LocalEngine, PosteriorServer, TableShard, Update, fit
from fspace.server.engines import by_name, require_server
from fspace.server.natural import divergence


def engine_of(name):
    if name == "ray":
        from fspace.server.ray_engine import RayEngine

        return RayEngine()
    return LocalEngine(threads=int(name))


ENGINES = ["1", "4", pytest.param("ray", marks=pytest.mark.slow)]


@pytest.mark.parametrize("engine", ENGINES)
def test_gaussian_shards_equal_the_pooled_posterior(gaussian, engine):
    found = fit([gaussian.shard(k, 5) for k in range(5)], gaussian.basis, engine_of(engine))
    pooled = fit_site(gaussian.basis, gaussian.x, gaussian.y)
    for name in ("precision", "shift"):
        expected = getattr(pooled, name)
        assert (getattr(found.server.total(), name) - expected).abs().max() < 1e-10 * expected.abs().max()
    assert found.log_evidence == pytest.approx(log_evidence([pooled]), rel=1e-10)
    assert found.rounds == {f"shard {k}": 1 for k in range(5)}


@pytest.mark.parametrize("engine", ENGINES)
def test_bernoulli_shards_reach_the_pooled_posterior(binary, engine):
    """Within 1e-3 nats, and with fewer than ten puts a worker. (Processes of Ray start one after the other, and those
    that run go on meanwhile: there the last to start has few, the others more.)"""
    pooled, _ = converge(binary.basis, binary.x, binary.y, tolerance=1e-9)
    found = fit([binary.shard(k, 8) for k in range(8)], binary.basis, engine_of(engine))
    assert divergence(found.server.total(), pooled) < 1e-3
    assert (min if engine == "ray" else max)(found.rounds.values()) < 10
    assert not found.failures


@pytest.mark.slow
def test_ray_says_when_there_is_no_place(gaussian):
    from fspace.server.ray_engine import RayEngine

    with pytest.raises(ServerError, match="found no place within 3 s.*'num_gpus': 64"):
        fit([gaussian.shard(0, 2)], gaussian.basis, RayEngine(options={"num_gpus": 64}, patience=3.0))
    with pytest.raises(OptionError, match="Ray does not take"):
        fit([gaussian.shard(0, 2)], gaussian.basis, RayEngine(options={"num_cores": 2}))


@dataclass
class _Deadly:
    """Rows, once a file exists; a process that dies on its first call, by SIGKILL."""

    rows: tuple
    mark: Path

    def __call__(self):
        if not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.rows


@pytest.mark.slow
def test_ray_starts_a_killed_worker_again(gaussian, tmp_path):
    from fspace.server.ray_engine import RayEngine

    shards = [
        _Deadly(gaussian.shard(k, 3), tmp_path / str(k)) if k else gaussian.shard(k, 3) for k in range(3)
    ]
    found = fit(shards, gaussian.basis, RayEngine())
    assert not found.failures and (tmp_path / "1").exists() and (tmp_path / "2").exists()
    pooled = fit_site(gaussian.basis, gaussian.x, gaussian.y)
    assert (found.server.total().shift - pooled.shift).abs().max() < 1e-10 * pooled.shift.abs().max()
    assert found.server.total().count == len(gaussian.x)
    with pytest.raises(ServerError, match="died more than 0 times"):
        fit({"a": _Deadly(gaussian.shard(0, 1), tmp_path / "again")}, gaussian.basis, RayEngine(restarts=0))


def test_sorted_shards_reach_the_pooled_posterior_too(binary):
    order = binary.x[:, 0].argsort()
    shards = [(binary.x[part], binary.y[part]) for part in order.chunk(8)]
    pooled, _ = converge(binary.basis, binary.x, binary.y, tolerance=1e-9)
    found = fit(shards, binary.basis, LocalEngine(4), update=Update(steps=1))
    assert divergence(found.server.total(), pooled) < 1e-3


def test_a_worker_that_fails_leaves_the_others_to_it(gaussian):
    def broken():
        raise OSError("disk on fire")

    shards = {"good": gaussian.shard(0, 2), "bad": broken}
    found = fit(shards, gaussian.basis)
    assert "disk on fire" in found.failures["bad"]
    assert found.server.total().count == 200
    with pytest.raises(ServerError, match="disk on fire"):
        fit({"bad": broken}, gaussian.basis)


@pytest.mark.parametrize("how", ["huge", "exit"])
def test_a_site_that_is_refused_and_a_worker_that_ends_leave_the_others_to_it(gaussian, how):
    """Neither an end of `fit` for all, nor an answer that never comes."""
    x, y = gaussian.shard(0, 2)
    spoilt = {"huge": (x, 1e200 * y), "exit": lambda: sys.exit("no such option")}[how]
    found = fit({"bad": spoilt, "good": gaussian.shard(1, 2)}, gaussian.basis)
    assert {"huge": "beyond 1e+15", "exit": "no such option"}[how] in found.failures["bad"]
    assert found.rounds == {"bad": 0, "good": 1}
    pooled = fit_site(gaussian.basis, *gaussian.shard(1, 2))
    assert (found.server.total().shift - pooled.shift).abs().max() < 1e-10 * pooled.shift.abs().max()


def test_workers_go_on_from_their_sites_in_a_file(binary, tmp_path):
    shards = [binary.shard(k, 4) for k in range(4)]
    with PosteriorServer(tmp_path / "s.db") as server:
        fit(shards, binary.basis, server=server)
    with PosteriorServer(tmp_path / "s.db") as server:
        again = fit(shards, binary.basis, server=server)
        assert max(again.rounds.values()) == 1
        assert max(again.moved) < 1e-5


def test_files_as_shards(gaussian, tmp_path):
    shards = []
    for k in range(2):
        x, y = gaussian.shard(k, 2)
        table = pd.DataFrame(torch.cat([x, y], 1).numpy(), columns=["a", "b", "y1", "y2"])
        path = tmp_path / (f"part{k}.csv" if k else "part0.parquet")
        table.to_csv(path, index=False) if k else table.to_parquet(path)
        shards.append(TableShard(path, ("y1", "y2")))
    found = fit(shards, gaussian.basis)
    pooled = fit_site(gaussian.basis, gaussian.x, gaussian.y)
    assert (found.server.total().shift - pooled.shift).abs().max() < 1e-9 * pooled.shift.abs().max()
    with pytest.raises(DataError, match="no column"):
        TableShard(path, ("y3",))()
    with pytest.raises(DataError, match="targets is empty; name the columns"):
        TableShard(path, ())()
    assert all((a == b).all() for a, b in zip(TableShard(path, "y1")(), TableShard(path, ("y1",))()))
    with pytest.raises(OptionError, match=r"server='store.db' is no server; pass PosteriorServer"):
        require_server("store.db")
    for wrong in (None, "a.csv", (1, 2, 3)):
        with pytest.raises(OptionError, match="Shard 'shard 1' is a .*; give a pair"):
            by_name([lambda: None, wrong])


@pytest.mark.parametrize("what", ["nan", "columns", "short", "outputs"])
def test_bad_shards_are_named(gaussian, what):
    x, y = (part.clone() for part in gaussian.shard(0, 4))
    if what == "nan":
        x[3, 1] = float("nan")
    elif what == "columns":
        x = x[:, :1]
    elif what == "short":
        y = y[:-1]
    else:
        y = y[:, :1]
    with pytest.raises(ServerError, match="x") as refused:
        fit({"theirs": (x, y)}, gaussian.basis)
    assert "theirs" in str(refused.value)


def test_options(gaussian):
    with pytest.raises(OptionError, match="no shard"):
        fit([], gaussian.basis)
    with pytest.raises(OptionError, match="does not exist"):
        fit([gaussian.shard(0, 2)], gaussian.basis, "spark")
    for wrong in ({"rounds": 0}, {"tolerance": 0.0}):
        with pytest.raises(OptionError):
            fit([gaussian.shard(0, 2)], gaussian.basis, **wrong)
    for wrong in ({"steps": 0}, {"damping": 0.0}, {"damping": 1.5}):
        with pytest.raises(OptionError):
            Update(**wrong)
