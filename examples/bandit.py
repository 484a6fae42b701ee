"""A contextual bandit on the wheel: GPs that learn their kernel, lines and a network, with rewards that come late.

Run: python examples/bandit.py bandit.png
"""

import sys

import matplotlib.pyplot as plt

from fspace.decisions import ArmPosterior, Bandit, GPArms, NeuralLinear, Wheel, linear_basis, plots, simulate

STEPS = 1500
problem = Wheel(delta=0.5)
lines = lambda: ArmPosterior(linear_basis(2), 5, reward_scale=50.0)  # noqa: E731
agents = {
    "UCB, GP": Bandit(GPArms(2, 5, reward_scale=50.0), "ucb", width=1.0),
    "Thompson, GP": Bandit(GPArms(2, 5, reward_scale=50.0)),
    "Thompson, lines": Bandit(lines()),
    "LinUCB": Bandit(lines(), "ucb", width=1.0),
    "NeuralLinear": Bandit(NeuralLinear(2, 5)),
    "uniform": Bandit(lines(), "uniform"),
}
curves = {}
for name, agent in agents.items():
    curves[name] = simulate(agent, problem, STEPS, batch=10, delay=20)
    print(
        f"{name}: regret {curves[name].sum():,.0f}, {agent.told} rewards told, {len(agent.pending)} still to come"
    )

plots.regrets(curves)
picture = sys.argv[1] if len(sys.argv) > 1 else "bandit.png"
plt.savefig(picture, dpi=110)
print(f"open {picture}")
