"""Hares and lynxes: the law that moves two populations as a Gaussian process, and what they will do next.

Twelve short noisy records of the logarithms of both populations, from Lotka and Volterra's equations. Each path of the
forecast is moved by one function throughout, so that doubt about the law adds up along it.
Run: python examples/populations.py populations.png
"""

import sys

import matplotlib.pyplot as plt
import numpy as np

from fspace.inference.amortized import GPStateSpace


def record(seed, steps=30):
    """Log populations [T, 2] of hares and lynxes, relative to their balance, observed with noise 0.1."""
    rng = np.random.default_rng(seed)
    hares, lynxes = rng.uniform(-0.7, 0.7, 2)
    rows = []
    for _ in range(steps):
        for _ in range(20):
            hares, lynxes = hares + 0.03 * (1 - np.exp(lynxes)), lynxes + 0.03 * (np.exp(hares) - 1)
        rows.append((hares, lynxes))
    return np.array(rows) + 0.1 * rng.standard_normal((steps, 2))


model = GPStateSpace(2, inducing=20, particles=4, hidden=16)
model.fit([record(seed) for seed in range(12)], epochs=200, batch_size=12, learning_rate=3e-2, progress=False)
fresh = [record(seed, 60) for seed in range(100, 110)]
inside, errors = [], []
for y in fresh:
    forecast = model.forecast(y[:30], 30)
    lower, upper = (end.numpy() for end in forecast.interval(0.9))
    inside.append((lower <= y[30:]) & (y[30:] <= upper))
    errors.append(np.square(forecast.mean.numpy() - y[30:]).mean() / y.var())
print(f"log p of a step of new records: {model.log_likelihood(fresh, 200).mean() / 60:.2f} nats")
print(
    f"30 steps ahead: squared error {np.mean(errors):.2f} of the variance, 90% bands hold {np.mean(inside):.0%}"
)

y = fresh[0]
forecast = model.forecast(y[:30], 30)
lower, upper = (end.numpy() for end in forecast.interval(0.9))
figure, (ax, plane) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=[2, 1], layout="constrained")
for k, name in enumerate(("hares", "lynxes")):
    ax.plot(y[:, k], ".", color=f"C{k}", label=f"{name}, observed")
    ax.fill_between(np.arange(30, 60), lower[:, k], upper[:, k], color=f"C{k}", alpha=0.25, lw=0)
    ax.plot(np.arange(30, 60), forecast.mean[:, k], color=f"C{k}", label=f"{name}, forecast and 90%")
ax.axvline(29.5, color="0.6", lw=1)
ax.set(xlabel="step", ylabel="log population, from its balance")
ax.legend(ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
for path in model.sample(3, seed=0, steps=40).numpy():
    plane.plot(path[:, 0], path[:, 1], lw=1)
plane.set(xlabel="hares", ylabel="lynxes", title="three new records")
where = sys.argv[1] if len(sys.argv) > 1 else "populations.png"
figure.savefig(where, dpi=110)
print(f"open {where}")
