"""Which rows to label: the learning curves of chosen and of random labels on a lopsided pool.

Run: python examples/labels.py labels.png
"""

import sys

import matplotlib.pyplot as plt
import numpy as np

import fspace
from fspace.decisions import learning_curve, plots

rng = np.random.default_rng(0)
X = np.concatenate([rng.normal(0, 0.25, (900, 2)), rng.uniform(-2, 2, (100, 2))])  # most rows are alike
truth = lambda x: np.sin(3 * x[:, 0]) * np.cos(2 * x[:, 1])  # noqa: E731
y = truth(X) + 0.05 * rng.standard_normal(len(X))
places = rng.uniform(-2, 2, (400, 2))


def fit(X, y):
    return fspace.GPRegressor(kernel="rbf", inference="exact", progress=False).fit(X, y)


def score(model):
    return -np.sqrt(np.mean((model.predict(places) - truth(places)) ** 2))


curves = {
    criterion: [learning_curve(fit, X, y, score, criterion, 6, 6, 60, seed) for seed in range(3)]
    for criterion in ("variance", "nipv", "bald", "random")
}
for criterion, runs in curves.items():
    print(f"{criterion}: RMSE {-np.mean([run[-1]['score'] for run in runs]):.3f} with 60 labels")
plots.learning_curves(curves, "minus RMSE on a grid")
picture = sys.argv[1] if len(sys.argv) > 1 else "labels.png"
plt.savefig(picture, dpi=110)
print(f"open {picture}")
