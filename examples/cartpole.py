"""Hold a pole up on gymnasium's cart with dynamics learned by a GP: posterior sampling, the mean, and no model at all.

Needs gymnasium: pip install 'fspace[control]'. Run: python examples/cartpole.py cartpole.png
"""

import sys

import matplotlib.pyplot as plt
import numpy as np

import fspace
from fspace.decisions import GymCartPole, learn_to_control


def fit(X, change):
    return fspace.GPRegressor(kernel="rbf", inference="collapsed", inducing=60, progress=False).fit(X, change)


runs = {
    planner: learn_to_control(GymCartPole(), fit, planner, episodes=4, steps=100)
    for planner in ("psrl", "mean", "random")
}
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
for (planner, run), colour, style in zip(runs.items(), ("#2f6690", "#d1622b", "#8a94a0"), ("-", "--", "-")):
    print(f"{planner}: steps held {run.steps}")
    left.plot(range(1, 5), run.steps, "o" + style, color=colour, label=planner)
    right.plot(np.degrees(run.states[:, 2]), style, color=colour, label=planner)
left.set(title="steps that the pole was held (at most 100)", xlabel="episode", xticks=range(1, 5))
right.axhspan(-12, 12, color="0.95")
right.set(title="last episode: angle of the pole", xlabel="step of 0.02 s", ylabel="degrees (12 is failure)")
left.legend(fontsize=9)
right.legend(fontsize=9)
picture = sys.argv[1] if len(sys.argv) > 1 else "cartpole.png"
plt.savefig(picture, dpi=110)
print(f"open {picture}")
