"""Rows that come day by day: each day is a site, a spoilt day is forgotten, and old days fade where the world drifts.

Run: python examples/stream.py stream.png
"""

import sys

import matplotlib.pyplot as plt
import numpy as np

import fspace

rng = np.random.default_rng(0)


def day(shift, n=60):
    """Readings of a sine whose phase has moved by `shift`."""
    x = rng.uniform(0, 10, (n, 1))
    return x, np.sin(x[:, 0] + shift) + 0.1 * rng.standard_normal(n)


model = fspace.GPRegressor(kernel="rbf", progress=False).fit(*day(0.0))
model.partial_fit(*day(0.0), site="Monday")
x, y = day(0.0)
model.partial_fit(x, y + 3.0, site="Tuesday")  # a sensor was set wrong
grid = np.linspace(0, 10, 200)[:, None]
error = {"with the spoilt day": np.abs(model.predict(grid) - np.sin(grid[:, 0])).mean()}
model.forget("Tuesday")
error["after forgetting it"] = np.abs(model.predict(grid) - np.sin(grid[:, 0])).mean()
for k in range(1, 6):  # the world drifts; what is older counts half as much each day
    model.partial_fit(*day(0.3 * k), site=f"day {k}", discount=0.5)
error["after five days of drift"] = np.abs(model.predict(grid) - np.sin(grid[:, 0] + 1.5)).mean()
for words, value in error.items():
    print(f"mean error {words}: {value:.3f}")
print("rows behind each site:", model.sites_)

mean, std = model.predict(grid, return_std=True)
plt.figure(figsize=(7, 4), layout="constrained")
plt.fill_between(grid[:, 0], mean - 1.64 * std, mean + 1.64 * std, color="#a9c8de", label="90% of y")
plt.plot(grid, mean, color="#1f2933", label="mean after five days of drift")
plt.plot(grid, np.sin(grid + 1.5), "--", color="#d1622b", label="the function today")
plt.plot(grid, np.sin(grid), ":", color="#8a94a0", label="the function at first")
plt.legend(loc="lower left", fontsize=8)
picture = sys.argv[1] if len(sys.argv) > 1 else "stream.png"
plt.savefig(picture, dpi=110)
print(f"open {picture}")
