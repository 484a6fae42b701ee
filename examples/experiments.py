"""Propose experiments by ask and tell: a mixed space, a constraint on an outcome, and a state that survives a kill.

Run: python examples/experiments.py experiments.png
"""

import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from fspace.decisions import Optimizer, plots

rng = np.random.default_rng(0)


def experiment(c):
    """Yield of a reaction (noisy) and how hot it becomes; the best catalyst is B, and full power overheats."""
    kind = {"A": 0.0, "B": 0.25, "C": 0.1}[c["catalyst"]]
    gain = kind + np.exp(-8 * (c["power"] - 0.8) ** 2) * (1 - 0.05 * (c["stages"] - 4) ** 2)
    return {"yield": gain + 0.01 * rng.standard_normal(), "heat": 90 * c["power"] + 5 * c["stages"]}


space = {"power": (0.0, 1.0), "stages": range(1, 8), "catalyst": ["A", "B", "C"]}
with tempfile.TemporaryDirectory() as folder:
    options = {
        "objectives": {"yield": "maximize"},
        "constraints": ["heat <= 85"],
        "state": Path(folder) / "state.json",
    }
    options["initial"] = 6
    optimizer = Optimizer(space, **options)
    while len(optimizer.told) < 16:
        (configuration,) = optimizer.ask()
        optimizer.tell(configuration, experiment(configuration))
        if len(optimizer.told) == 10:  # as after a kill: what was told is in the file
            optimizer = Optimizer(space, **options)
best = optimizer.best
print(f"best: {best.configuration}, {best.values}")
plots.convergence(optimizer)
picture = sys.argv[1] if len(sys.argv) > 1 else "experiments.png"
plt.savefig(picture, dpi=110)
print(f"open {picture}")
