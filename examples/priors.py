"""A prior over weights is a prior over functions: which one, and do the data agree with it?

Left: functions of networks that differ in nothing but the variance of their weights, beside their infinitely wide
limit. Right: how probable data are under each limit, which the exact evidence says without fitting any network.

Run: python examples/priors.py priors.png
"""

import sys

import matplotlib.pyplot as plt
import numpy as np

from fspace.compare import InBetween
from fspace.compare.wide import WideNetworkGP, limit_prior_draws, network_prior_draws
from fspace.inference.weights import GaussianPrior

x = np.linspace(-2, 2, 101)[:, None]
variances = [0.5, 2.0, 8.0, 32.0]
problem = InBetween().problem(0)
figure, axes = plt.subplots(2, 4, figsize=(12, 5), layout="constrained")
for (above, below), variance in zip(axes.T, variances):
    prior = GaussianPrior(weight_variance=variance, bias_variance=variance)
    networks = network_prior_draws(x, (50,), "relu", prior)
    limit = limit_prior_draws(x, 1, "relu", prior)
    model = WideNetworkGP(prior=prior).fit(problem.x_train, problem.y_train)
    deviation = model.posterior_.latent(np.zeros((1, 1))).stddev.item()
    before = f"{networks[:, 50].std():.2f} (50 units), {limit[:, 50].std():.2f} (infinitely many)"
    evidence = f"log evidence {model.log_evidence_:.1f}"
    print(
        f"weight variance {variance:g}: deviation of f(0) before {before}, after the data {deviation:.2f}; {evidence}"
    )
    for draws, colour, label in ((networks, "#2f6690", "50 units"), (limit, "#d1622b", "infinitely many")):
        above.plot(x, draws[20:28].T, color=colour, lw=0.8, alpha=0.7, label=[label, *[None] * 7])
    above.set_title(f"prior, weight variance {variance:g}", loc="left", fontsize=10)
    predictive = model.predictive(x)
    lower, upper = model.posterior_.latent(x).interval(0.9)
    below.fill_between(x[:, 0], lower, upper, color="#a9c8de")
    below.plot(x, predictive.mean, color="#1f2933")
    below.plot(problem.x_train, problem.y_train, ".", color="#d1622b", ms=4)
    below.set_title(f"posterior; log evidence {model.log_evidence_:.0f}", loc="left", fontsize=10)
    below.set_ylim(-3, 3)
axes[0, 0].legend(fontsize=8, loc="upper left")
picture = sys.argv[1] if len(sys.argv) > 1 else "priors.png"
plt.savefig(picture, dpi=110)
print(f"open {picture}")
