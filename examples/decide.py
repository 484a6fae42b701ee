"""Act on the posterior: what to order, what to hand to a person, and what acting on the mean would have cost.

Run: python examples/decide.py decide.png
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_breast_cancer

import fspace
from fspace.decisions import Newsvendor, Reject, best_action, conformal_threshold, plots, risk_coverage
from fspace.decisions.rejecting import expected_loss, losses_of

rng = np.random.default_rng(0)
day = rng.uniform(0, 28, 400)
demand = (
    60 + 15 * np.sin(2 * np.pi * day / 7) + rng.normal(0, 4 + 4 * (day % 7 > 4), 400)
)  # weekends vary more
model = fspace.GPRegressor(kernel="rbf", likelihood="heteroscedastic", progress=False).fit(
    day[:200, None], demand[:200]
)
shop = Newsvendor(underage=4.0, overage=1.0)  # a missing loaf costs four times one left over
order = best_action(model, day[200:, None], None, shop).action.numpy()
mean = model.predict(day[200:, None])
cost = {
    name: -shop(torch.tensor(action), torch.tensor(demand[200:])).mean().item()
    for name, action in (("the posterior", order), ("the mean", mean))
}
for name, value in cost.items():
    print(f"ordering by {name} loses {value:.2f} a day")

X, y = load_breast_cancer(return_X_y=True)
shuffled = rng.permutation(len(y))
train, held, test = np.split(shuffled, [120, 340])
classifier = fspace.GPClassifier(kernel="rbf", progress=False).fit(X[train], y[train])


def doubts(rows):
    """What the model expects to lose at these rows, and what it loses."""
    predictive = classifier.predictive(X[rows])
    return expected_loss(predictive), losses_of(predictive, y[rows])


threshold = conformal_threshold(*doubts(held), target=0.02)
doubt, losses = doubts(test)
kept = Reject(threshold).keep(doubt)
print(
    f"kept {kept.double().mean():.0%}; wrong and kept {(losses * kept).mean():.1%} of all (promised: 2% on average)"
)

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
grid = np.linspace(0, 28, 300)[:, None]
left.scatter(day[200:], demand[200:], s=8, color="#a9c8de", label="demand")
left.plot(grid, model.predict(grid), color="#1f2933", lw=1.5, label="mean")
left.plot(grid, best_action(model, grid, None, shop).action, color="#d1622b", lw=1.8, label="order")
left.set(
    title=f"ordering loses {cost['the posterior']:.1f} a day, by the mean {cost['the mean']:.1f}",
    xlabel="day",
)
left.legend(fontsize=8, ncols=3, loc="upper center")
left.set_ylim(top=115)
plots.risk_coverage({"Gaussian process": risk_coverage(doubt, losses)}, ax=right)
right.axvline(kept.double().mean(), color="#d1622b", lw=1.2, ls="--")
picture = sys.argv[1] if len(sys.argv) > 1 else "decide.png"
plt.savefig(picture, dpi=110)
print(f"open {picture}")
