"""A contextual bandit on the wheel: Thompson sampling on a sparse GP and on lines, with rewards that come late.

Run: python examples/bandit.py bandit.png
"""

import sys

import matplotlib.pyplot as plt
import numpy as np

import fspace
from fspace.decisions import ArmPosterior, Bandit, NeuralLinear, Wheel, linear_basis, plots, simulate

STEPS = 1500
problem = Wheel(delta=0.5)
rng = np.random.default_rng(0)
contexts = np.array([problem.context(rng) for _ in range(300)])  # rewards of one arm teach the kernel
rewards = [problem.reward(context, 0, rng) for context in contexts]
taught = fspace.GPRegressor(kernel="matern", inference="collapsed", inducing=60, progress=False).fit(
    contexts, rewards
)
basis = taught.posterior_.basis  # standardised contexts: the wheel's spread is 1/2 in each direction
scale = float(np.std(rewards))


class Scaled(Wheel):
    """Contexts as the basis sees them."""

    def context(self, rng):
        return super().context(rng) / 0.5

    def means(self, context):
        return super().means(context * 0.5)


agents = {
    "Thompson, GP": Bandit(ArmPosterior(basis, 5, mean=float(np.mean(rewards)), reward_scale=scale)),
    "Thompson, lines": Bandit(ArmPosterior(linear_basis(2), 5, reward_scale=scale)),
    "LinUCB": Bandit(ArmPosterior(linear_basis(2), 5, reward_scale=scale), "ucb"),
    "NeuralLinear": Bandit(NeuralLinear(2, 5)),
    "uniform": Bandit(ArmPosterior(linear_basis(2), 5), "uniform"),
}
curves = {}
for name, agent in agents.items():
    curves[name] = simulate(agent, Scaled(0.5), STEPS, batch=10, delay=20)
    print(
        f"{name}: regret {curves[name].sum():,.0f}, {agent.told} rewards told, {len(agent.pending)} still to come"
    )

plots.regrets(curves)
picture = sys.argv[1] if len(sys.argv) > 1 else "bandit.png"
plt.savefig(picture, dpi=110)
print(f"open {picture}")
