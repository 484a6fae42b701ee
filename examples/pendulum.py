"""Swing a pendulum up with dynamics learned by a GP: posterior sampling, the mean, and no model at all.

Run: python examples/pendulum.py pendulum.png
"""

import sys

import matplotlib.pyplot as plt
import numpy as np

import fspace
from fspace.decisions import Pendulum, learn_to_control


def fit(X, change):
    return fspace.GPRegressor(kernel="rbf", inference="collapsed", inducing=60, progress=False).fit(X, change)


runs = {
    planner: learn_to_control(Pendulum(), fit, planner, episodes=5, steps=80)
    for planner in ("psrl", "mean", "random")
}
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
for (planner, run), colour in zip(runs.items(), ("#2f6690", "#d1622b", "#8a94a0")):
    print(f"{planner}: returns {np.round(run.returns, 0).tolist()}")
    left.plot(range(1, 6), run.returns, "o-", color=colour, label=planner)
    right.plot(0.05 * np.arange(81), np.cos(run.states[:, 0]), color=colour, label=planner)
left.set(title="return of every episode", xlabel="episode", xticks=range(1, 6))
right.set(title="last episode: height (1 is upright)", xlabel="seconds")
left.legend(fontsize=9)
right.legend(fontsize=9)
picture = sys.argv[1] if len(sys.argv) > 1 else "pendulum.png"
plt.savefig(picture, dpi=110)
print(f"open {picture}")
