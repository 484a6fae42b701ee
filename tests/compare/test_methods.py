"""Every method that has a name can be built, and does what a study asks of it."""

import numpy as np
import pytest

from fspace.compare import Budget, InBetween, Table, named_methods
from fspace.compare.cells import Cell, run_cell
from fspace.compare.methods import DEFAULT, METHODS, NETWORKS
from fspace.errors import OptionError
from fspace.inference import weights


def test_names_are_those_of_the_networks_and_defaults_are_among_them():
    assert set(NETWORKS) == set(weights.METHODS) and set(DEFAULT) <= set(METHODS)
    found = named_methods(list(METHODS))
    assert len({method.name for method in found}) == len(METHODS)
    assert {method.space for method in found} == {"function", "weights", ""}
    with pytest.raises(OptionError, match="'enesemble'.*ensemble"):
        named_methods(["enesemble"])


rng = np.random.default_rng(0)
X = rng.normal(size=(60, 2))
FLOWERS = Table(
    "flowers", X, np.where(X[:, 0] > 0.3, "a", np.where(X[:, 1] > 0, "b", "c")), "classification", 1
)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_measured_on_both_tasks(name):
    """Better than guessing within two minutes, and known as functions unless it has none."""
    (method,) = named_methods([name])
    row = run_cell(Cell(InBetween(), 0, method, Budget(120), 0))
    assert row["status"] in ("ok", "stopped"), row["reason"]
    assert ("probe_mean" in row["functions"]) == (name != "linear")
    assert row["scores"]["log_likelihood"] > -1.7  # of a Gaussian with the moments of y: about -1.3
    if method.classifier is not None:
        row = run_cell(Cell(FLOWERS, 0, method, Budget(120), 0))
        assert row["status"] in ("ok", "stopped"), row["reason"]
        assert row["scores"]["accuracy"] > 0.6 and row["scores"]["log_likelihood"] > -1.1
