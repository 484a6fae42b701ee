"""The picture of the README: data, the posterior's mean and interval, and functions drawn from it.

Run: python examples/picture.py docs/picture.png
"""

import sys

import matplotlib.pyplot as plt
import numpy as np

import fspace

rng = np.random.default_rng(3)
x = np.concatenate([rng.uniform(-4, -1, 25), rng.uniform(1.5, 4, 20)])
y = np.sin(2 * x) + 0.3 * x + 0.15 * rng.standard_normal(len(x))
model = fspace.GPRegressor(kernel="matern").fit(x[:, None], y)
grid = np.linspace(-5.5, 5.5, 400)[:, None]
predictive = model.predictive(grid)
lower, upper = predictive.interval(0.9)
_, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
axes.fill_between(grid[:, 0], lower, upper, color="#cfe3f5", label="90% of observations")
for function in model.posterior_.draw(8, seed=0):
    axes.plot(grid[:, 0], function(grid), color="#5b9bd5", lw=0.9, alpha=0.7)
axes.plot(grid[:, 0], predictive.mean, color="#1f3b5c", lw=2, label="mean")
axes.plot(x, y, "o", color="#d1495b", ms=4, label="data")
axes.set(xlabel="x", ylabel="y", xlim=(-5.5, 5.5))
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, ncols=3, loc="upper left")
plt.savefig(sys.argv[1], dpi=110)
