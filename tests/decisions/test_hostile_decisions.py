"""What a tired person or an unkind one gives the optimisers: refused by name, and nothing that was told is lost."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression

import fspace
from fspace.decisions import (
    LatentOptimizer,
    Optimizer,
    Pendulum,
    Space,
    learn_to_control,
    optimize,
    optimize_latent,
)
from fspace.decisions.journal import Journal
from fspace.errors import DataError, InfeasibleError, ModelFileError, OptionError
from fspace.inference.amortized import VAEKernelGP

BOX = {"x": (0.0, 1.0), "n": range(3), "kind": ["a", "b"]}
AT = {"x": 0.5, "n": 1, "kind": "a"}
POOL = np.random.default_rng(0).random((40, 6)).astype(np.float32)


def latent(pool=POOL, **options):
    settings = {"model": VAEKernelGP(2, (8,), device="cpu"), "initial": 4, "epochs": 2, "batch_size": 40}
    return LatentOptimizer(pool, **settings | options)


# ---- spaces


def test_both_ends_of_whole_numbers_in_a_file_are_of_the_space():
    space = Space.from_state({"settings": {"n": {"whole": [1, 10]}, "x": {"between": [0, 1]}}})
    assert space.settings["n"] == range(1, 11)
    assert space.state()["settings"]["n"] == {"whole": [1, 10]}
    assert {c["n"] for c in space.decode(space.sample(400, 0))} == set(range(1, 11))


@pytest.mark.parametrize(
    "setting",
    [
        {"between": [0, 1], "whole": [1, 3]},
        {"between": [0, 1], "scale": "log"},
        {"betwen": [0, 1]},
        {"choices": "abc"},
        {"whole": [1]},
        {"whole": [1, 10.5]},
        [0, 1],
        None,
    ],
)
def test_what_describes_no_setting_is_refused(setting):
    with pytest.raises(OptionError, match="describes no space"):
        Space.from_state({"settings": {"n": setting}})


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"x": (0, 10**400)}, "low, high"),
        ({"x": ("0", "1")}, "low, high"),
        ({"x": [(1, 2), (3, 4)]}, "must be a text, a number"),  # a state file would not know it again
        ({"x": [math.nan, 2.0]}, "must be a text, a number"),
    ],
)
def test_settings_that_are_none(settings, words):
    with pytest.raises(OptionError, match=words):
        Optimizer(settings)


def test_numbers_of_numpy_are_numbers(tmp_path):
    space = {"x": (np.float32(0), np.int64(1)), "k": list(np.array([1, 2]))}
    first = Optimizer(space, state=tmp_path / "s.json")
    first.tell(first.ask(3), [1.0, 2.0, 3.0])
    assert Optimizer(space, state=tmp_path / "s.json").told == first.told


def test_constraints_with_odd_numbers():
    assert Space({"x": (0.0, 1.0)}, [".5*x <= .25"]).feasible(
        torch.tensor([[0.4], [0.6]]).double()
    ).tolist() == [
        True,
        False,
    ]
    for text in ("x <= 1e999", "1e999*x <= 1"):
        with pytest.raises(OptionError, match="too large"):
            Optimizer(BOX, constraints=[text])


# ---- ask and tell


@pytest.mark.parametrize(
    "configuration, value",
    [
        ({**AT, "n": math.nan}, 1.0),
        ({**AT, "n": math.inf}, 1.0),
        ({**AT, "x": 10**400}, 1.0),
        ({**AT, "kind": np.array([1, 2])}, 1.0),
        (AT, 10**400),
        (AT, 1e300),  # taken in, no model could ever be fitted again
        ([AT, AT], 1.0),
        ([AT], {"y": 1.0}),
    ],
)
def test_what_cannot_be_told(configuration, value):
    optimizer = Optimizer(BOX)
    with pytest.raises(DataError):
        optimizer.tell(configuration, value)
    assert optimizer.told == []


@pytest.mark.parametrize(
    "options, words",
    [
        ({"model": None}, "model=None"),
        ({"model": 3}, "model=3"),
        ({"model": fspace.GPRegressor}, "pass a name"),
        ({"acquisition": "qUCB", "constraints": ["heat <= 1"]}, "no constraints"),
    ],
)
def test_options_are_refused_before_experiments_are_made(options, words):
    with pytest.raises(OptionError, match=words):
        Optimizer(BOX, **options)


@pytest.mark.parametrize("model", [lambda z, y: None, LinearRegression()])
def test_a_model_without_a_posterior(model):
    optimizer = Optimizer(BOX, model=model, initial=2)
    optimizer.tell(optimizer.ask(2), [1.0, 2.0])
    with pytest.raises(OptionError, match="no posterior"):
        optimizer.ask()
    assert optimizer.pending == []


def test_a_batch_beyond_a_finite_space():
    """What nobody was given is not pending: the two that are left can be asked for."""
    optimizer = Optimizer({"n": range(3), "kind": ["a", "b"]}, initial=10)
    optimizer.ask(4)
    with pytest.raises(InfeasibleError, match="All 6 settings"):
        optimizer.ask(3)
    assert len(optimizer.pending) == 4
    assert len(optimizer.ask(2)) == 2


@pytest.mark.parametrize("batch", [1, 10])
def test_the_loop_ends_when_all_was_tried(batch):
    space = {"n": range(3), "kind": ["a", "b"]}
    found = optimize(lambda c: c["n"] + (c["kind"] == "a"), space, 9, batch, progress=False, initial=10)
    assert len(found.told) == 6 and found.best.values == {"y": 0.0}


def test_an_interrupted_loop_gives_back_what_was_told(capsys):
    count = 0

    def f(_):
        nonlocal count
        count += 1
        if count in (1, 4):
            raise KeyboardInterrupt
        return torch.ones(1)

    with pytest.raises(KeyboardInterrupt):  # nothing was told
        optimize(f, BOX, 6, progress=False)
    assert len(optimize(f, BOX, 6, progress=False).told) == 2
    count = 1
    assert len(optimize_latent(f, POOL, 6, initial=6).values) == 2
    assert "Interrupted after 2 of 6" in capsys.readouterr().err


# ---- state files


def test_what_could_not_be_written_was_not_told(tmp_path):
    """Told again, it would count twice."""
    optimizer = Optimizer(BOX, state=tmp_path / "none" / "state.json")
    with pytest.raises(ModelFileError, match="cannot be written"):
        optimizer.tell(AT, 1.0)
    with pytest.raises(ModelFileError, match="cannot be written"):
        optimizer.ask()
    assert optimizer.told == [] and optimizer.pending == []
    (tmp_path / "none").mkdir()
    optimizer.tell(AT, 1.0)
    assert len(Optimizer(BOX, state=tmp_path / "none" / "state.json").told) == 1


@pytest.mark.parametrize(
    "edit",
    [
        lambda s: s["told"][0]["values"].update(y=math.nan),
        lambda s: s["told"][0].update(values={"z": 1.0}),
        lambda s: s["told"][0]["configuration"].update(x=7.0),
        lambda s: s["pending"].append({"x": 0.5}),
        lambda s: s.update(asked=-5),
        lambda s: s.update(told=None),
    ],
)
def test_a_damaged_state_is_said_at_once(tmp_path, edit):
    path = tmp_path / "state.json"
    Optimizer(BOX, state=path).tell(AT, 1.0)
    state = json.loads(path.read_text())
    edit(state)
    path.write_text(json.dumps(state))
    with pytest.raises(ModelFileError, match=r"state\.json"):
        Optimizer(BOX, state=path)


def test_a_journal_on_a_full_disk_keeps_whole_lines(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.append({"a": 1})
    file = journal._file

    class Full:
        """Takes three bytes."""

        def __getattr__(self, name):
            return getattr(file, name)

        def write(self, content):
            return file.write(content[:3])

    journal._file = Full()
    with pytest.raises(ModelFileError, match="No space left"):
        journal.append({"b": 2})
    journal._file = file
    journal.append({"c": 3})
    assert Journal(tmp_path / "j").entries == [{"a": 1}, {"c": 3}]


# ---- objects


def test_a_latent_search_goes_on_from_its_state(tmp_path):
    path = tmp_path / "latent.jsonl"
    first = latent(state=path)
    asked = first.ask(5)
    first.tell(asked[[3, 1]], [0.1 + 0.2, -1.0])
    path.write_bytes(path.read_bytes() + b'{"objects": [[0.1')  # killed while it wrote
    second = latent(state=path)
    assert torch.equal(second.objects, first.objects) and torch.equal(second.values, first.values)
    assert torch.equal(second.pending, first.pending) and len(second.pending) == 3
    assert second.best[1] == 0.1 + 0.2
    decoded = second.ask()  # trained anew
    second.tell(decoded, [2.0])
    assert torch.equal(latent(state=path).best[0], decoded[0])
    with pytest.raises(OptionError, match="another file"):
        latent(state=path, objective="minimize")
    with pytest.raises(OptionError, match="another file"):
        latent(POOL[:, :4], state=path)
    path.write_text(path.read_text() + '{"objects": [[1, 2]], "values": [1]}\n')
    with pytest.raises(ModelFileError, match="damaged"):
        latent(state=path)


def test_killing_loses_no_object_that_was_told(tmp_path):
    path, script = tmp_path / "l", Path(__file__).with_name("killed_latent.py")
    process = subprocess.Popen([sys.executable, str(script), str(path)], stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(20)]
    process.kill()
    lines += process.stdout.read().splitlines(keepends=True)
    process.wait()
    told = [float(line) for line in lines if line.endswith("\n")]
    pool = np.random.default_rng(0).random((10_000, 3))
    kept = LatentOptimizer(pool, state=path)
    assert len(told) >= 20 and kept.values[: len(told)].tolist() == told
    assert len(kept.values) <= len(told) + 1 and len(kept.pending) <= 1
    assert torch.equal(kept.objects.double().sum(1), kept.values)


def test_a_killed_latent_loop_evaluates_what_was_pending_first(tmp_path):
    options = {"state": tmp_path / "l", "initial": 6}
    seen = []

    def f(objects):
        seen.append(objects)
        if len(seen) == 2:
            raise ZeroDivisionError
        return objects.sum(1)

    with pytest.raises(ZeroDivisionError):
        optimize_latent(f, POOL, 6, 3, **options)
    found = optimize_latent(f, POOL, 6, 3, **options)
    assert torch.equal(seen[2], seen[1]) and len(found.values) == 6 and len(found.pending) == 0


@pytest.mark.parametrize(
    "pool", [None, "abc", 3.0, np.arange(20.0), [[1, 2], [3]], np.array([["a"]] * 20), np.ones((20, 0))]
)
def test_pools_that_are_none(pool):
    with pytest.raises(DataError, match="pool"):
        latent(pool)


@pytest.mark.parametrize(
    "objects, values",
    [
        (POOL[:4], None),
        (POOL[:4], list("abcd")),
        (POOL[:4], [[1], [2, 3], [1], [1]]),
        (POOL[:4], np.ones((2, 2))),
        (POOL[:4], [1j] * 4),
        (POOL[:4], [1e300, 1.0, 2.0, 3.0]),
        (None, [1.0]),
        (POOL[0], 1.0),
    ],
)
def test_what_cannot_be_told_of_objects(objects, values):
    optimizer = latent()
    with pytest.raises(DataError):
        optimizer.tell(objects, values)
    assert len(optimizer.values) == 0


def test_tensors_with_gradients_and_equal_scores():
    optimizer = latent(torch.tensor(POOL, requires_grad=True))
    optimizer.tell(optimizer.ask(4), torch.ones(4, 1, requires_grad=True))
    assert optimizer.ask(2).shape == (2, 6)  # constant scores say nothing, and break nothing


# ---- control


@pytest.mark.parametrize(
    "options, words",
    [
        ({"horizon": 0}, "horizon=0"),
        ({"steps": 0}, "steps=0"),
        ({"seed": -1}, "seed=-1"),
        ({"fit": lambda x, y: None}, "neither a posterior"),
        ({"fit": lambda x, y: fspace.GPRegressor()}, "neither a posterior"),
        (
            {"fit": lambda x, y: fspace.GPRegressor(kernel="rbf", progress=False).fit(x, y[:, 0])},
            "1 outputs for the changes of 2 states",
        ),
    ],
)
def test_control_refuses(options, words):
    settings = {"task": Pendulum(), "fit": lambda x, y: None, "episodes": 2, "steps": 6, "horizon": 3}
    with pytest.raises(OptionError, match=words):
        learn_to_control(**settings | options)


# ---- what the types forbid: a user has no checker of types


UNTYPED = """
import numpy as np
from fspace.decisions import LatentOptimizer, Optimizer, Pendulum, learn_to_control
from fspace.errors import FspaceError

box, pool = {"x": (0.0, 1.0)}, np.random.default_rng(0).random((20, 3))
for call in (
    lambda: Optimizer(None),
    lambda: Optimizer("x"),
    lambda: Optimizer([("x", (0, 1))]),
    lambda: Optimizer(box, None),
    lambda: Optimizer(box, ["y"]),
    lambda: Optimizer(box, refit="2"),
    lambda: Optimizer(box).tell(None, 1.0),
    lambda: Optimizer(box).tell([1, 2], [1.0, 2.0]),
    lambda: Optimizer(box).drop(None),
    lambda: LatentOptimizer(pool, model=3),
    lambda: LatentOptimizer(pool, retrain="2"),
    lambda: LatentOptimizer(pool, objective=["maximize"]),
    lambda: learn_to_control("Pendulum-v1", None),
    lambda: learn_to_control(Pendulum, None),
    lambda: learn_to_control(Pendulum(), None, horizon=2.5),
    lambda: learn_to_control(Pendulum(), None, episodes="3"),
):
    try:
        call()
    except FspaceError as error:
        print(error)
"""


def test_without_a_checker_of_types():
    done = subprocess.run([sys.executable, "-c", UNTYPED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 16
