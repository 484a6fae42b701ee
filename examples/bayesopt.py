"""Bayesian optimisation in BoTorch: find the top of a noisy function in 15 evaluations.

Run: python examples/bayesopt.py
"""

import numpy as np
import torch
from botorch.acquisition import qLogNoisyExpectedImprovement
from botorch.optim import optimize_acqf

import fspace

rng = np.random.default_rng(0)


def measure(x: np.ndarray) -> np.ndarray:
    """An experiment on [n, 2] settings between 0 and 1; the best is 1, at (0.3, 0.7)."""
    return np.exp(-10 * ((x - [0.3, 0.7]) ** 2).sum(axis=1)) + 0.02 * rng.standard_normal(len(x))


X = rng.random((6, 2))
y = measure(X)
bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
for _ in range(9):
    model = fspace.GPRegressor(kernel="matern").fit(X, y).posterior_.as_botorch()
    gain = qLogNoisyExpectedImprovement(model, torch.from_numpy(X))
    candidate, _ = optimize_acqf(gain, bounds, q=1, num_restarts=4, raw_samples=64)
    X = np.vstack([X, candidate.numpy()])
    y = np.append(y, measure(X[-1:]))
    print(f"tried {X[-1].round(3)}: {y[-1]:.3f}; best so far {y.max():.3f}")
