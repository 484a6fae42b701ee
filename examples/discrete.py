"""Discrete latents three ways: relaxed with a falling temperature, straight through, and sparse with nothing sampled.

Run: python examples/discrete.py discrete.png    (needs the package entmax: pip install 'fspace[amortized]')
"""

import math
import sys

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from fspace.inference.amortized import (
    Concrete,
    exponential_temperature,
    iwae,
    relaxed_log_weights,
    sparse_elbo,
    sparse_probabilities,
    straight_through,
)

VARIABLES, CATEGORIES = 3, 10
generator = torch.Generator().manual_seed(0)
pixels = (torch.as_tensor(load_digits().data, dtype=torch.float32) > 7.5).float()
train, test = pixels[:1500], pixels[1500:]


class DigitVae(nn.Module):
    """Three categorical latents with ten values each, a uniform prior, and a network to decode them."""

    def __init__(self, inputs=VARIABLES * CATEGORIES):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, inputs))
        self.decoder = nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64))

    def log_likelihood(self, x, latents):
        logits = self.decoder(latents.flatten(2))
        return -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)

    def log_weights(self, x, temperature, samples, through):
        """Relaxed and hard; with `through` the likelihood is that of the hard values in both."""
        q = Concrete(self.encoder(x).unflatten(-1, (VARIABLES, CATEGORIES)), temperature)
        prior = Concrete(torch.zeros(1, VARIABLES, CATEGORIES), temperature)

        def fit(s):
            if through:
                s = straight_through(s, F.one_hot(s.argmax(-1), CATEGORIES).to(s.dtype))
            return self.log_likelihood(x, s)

        return relaxed_log_weights(q, prior, fit, samples, generator)


STEPS, SAMPLES = 1200, 5  # with one sample the latents would stay unused
curves = {}
for name, through in (("Concrete", False), ("straight through", True)):
    torch.manual_seed(0)
    vae = DigitVae()
    optimiser = torch.optim.Adam(vae.parameters(), lr=1e-2)
    curves[name] = []
    for i in range(STEPS + 1):
        temperature = exponential_temperature(i, start=1.0, end=0.3, rate=1.2e-3)
        if i % 100 == 0:
            with torch.no_grad():
                both = vae.log_weights(test, temperature, SAMPLES, through)
            curves[name].append([i, *(iwae(w).mean().item() for w in both)])
        batch = train[torch.randint(1500, (100,), generator=generator)]
        optimiser.zero_grad()
        (-iwae(vae.log_weights(batch, temperature, SAMPLES, through).relaxed).mean()).backward()
        optimiser.step()
    print(f"{name}: relaxed {curves[name][-1][1]:.2f}, hard {curves[name][-1][2]:.2f} nats a test digit")
    if not through:
        concrete_vae = vae

# One latent of 200 values: sparsemax leaves so few of them that the bound is an exact sum.
VALUES = 200
torch.manual_seed(0)
vae = DigitVae(VALUES)
optimiser = torch.optim.Adam(vae.parameters(), lr=3e-3)


def sparse_bound(x):
    q = sparse_probabilities(vae.encoder(x), alpha=2.0)
    decoded = vae.decoder(torch.eye(VALUES))

    def log_joint(rows, values):
        fit = -F.binary_cross_entropy_with_logits(decoded[values], x[rows], reduction="none").sum(-1)
        return fit - math.log(VALUES)

    return sparse_elbo(log_joint, q), (q > 0).sum(-1)


curves["sparsemax"] = []
for i in range(STEPS + 1):
    if i % 100 == 0:
        with torch.no_grad():
            value, support = sparse_bound(test)
        curves["sparsemax"].append([i, support.float().mean().item(), value.mean().item()])
    optimiser.zero_grad()
    (-sparse_bound(train[torch.randint(1500, (100,), generator=generator)])[0].mean()).backward()
    optimiser.step()
print(
    f"sparsemax of {VALUES} values: {value.mean():.2f} nats a test digit, {support.float().mean():.1f} values with mass"
)

figure = plt.figure(figsize=(11, 4), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=[1.3, 1])
axes = left.subplots()
for (name, curve), colour in zip(curves.items(), ["#1f6f8b", "#d1622b", "#5a8f3c"]):
    steps, relaxed, hard = zip(*curve)
    axes.plot(steps, hard, color=colour, label=f"{name}: the discrete model")
    if name != "sparsemax":
        axes.plot(steps, relaxed, ":", color=colour, label=f"{name}: what is climbed")
axes.set(
    xlabel="steps",
    ylabel="nats a test digit",
    title="The bound that is climbed, and what it is worth",
    ylim=(-32, None),
)
axes.legend(fontsize=8, loc="lower right")
codes = torch.eye(CATEGORIES)
with torch.no_grad():
    q = Concrete(concrete_vae.encoder(test[:1]).unflatten(-1, (VARIABLES, CATEGORIES)), 0.3)
    code = q.hard(q.logits[None])[
        0, 0
    ]  # of one digit; each row of pictures changes one of its three variables
    for row, axis in enumerate(right.subplots(VARIABLES, 1)):
        codes = code.expand(CATEGORIES, VARIABLES, CATEGORIES).clone()
        codes[:, row] = torch.eye(CATEGORIES)
        strip = concrete_vae.decoder(codes.flatten(1)).sigmoid().reshape(CATEGORIES, 8, 8)
        axis.imshow(F.pad(strip, (0, 1)).permute(1, 0, 2).reshape(8, -1), cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[], title=f"variable {row + 1} from value 0 to 9")
picture = sys.argv[1] if len(sys.argv) > 1 else "discrete.png"
plt.savefig(picture, dpi=110)
print(f"open {picture}")
