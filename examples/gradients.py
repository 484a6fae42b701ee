"""Which gradient estimator? Signal-to-noise of the encoder's gradient, and training with latents that are bits.

Run: python examples/gradients.py gradients.png
"""

import math
import sys

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from fspace.inference.amortized import (
    Bernoulli,
    DiagonalGaussian,
    backward,
    couple_binary,
    dreg,
    log_likelihood,
    log_terms,
    pathwise,
    rebar,
    reinforce,
    reinforce_loo,
    stl,
    vimco,
)

generator = torch.Generator().manual_seed(0)
BITS = 20


class Line:
    """z ~ N(0, 1), x ~ N(z, 0.5); the encoder is near the posterior, not at it. One datum, many replicates of q."""

    def __init__(self, replicates):
        self.mean = torch.full((replicates, 1), 0.7, requires_grad=True)

    def encode(self, x):
        return DiagonalGaussian(self.mean, torch.full_like(self.mean, 0.6))

    def log_joint(self, x, z):
        return (-0.5 * z.square() - (x - z).square()).sum(-1)


ladder = [1, 2, 4, 8, 16, 32, 64]
ratios = {"IWAE": (pathwise, []), "sticking the landing (biased)": (stl, []), "DReG": (dreg, [])}
for estimator, found in ratios.values():
    for samples in ladder:
        line = Line(20_000)
        estimate = estimator(log_terms(line, torch.full((20_000, 1), 1.2), samples, generator))
        slope = torch.autograd.grad(estimate.encoder.sum(), line.mean)[0]
        found.append((slope.mean().abs() / slope.std()).item())


class BitVae(nn.Module):
    """Digits from bits: nothing here can be reparameterised."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, BITS))
        self.decoder = nn.Sequential(nn.Linear(BITS, 64), nn.Tanh(), nn.Linear(64, 64))

    def encode(self, x):
        return Bernoulli(self.encoder(x))

    def log_joint(self, x, b):  # also of relaxed bits, for REBAR: the prior is one half whatever b is
        logits = self.decoder(b)
        fit = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
        return fit - BITS * math.log(2.0)


def rebar_step(vae, x):
    """One sample a datum; the same f for hard and relaxed bits."""
    logits = vae.encoder(x)
    u, v = torch.rand((2, 1, *logits.shape), generator=generator)

    def f(b):
        log_q = -F.binary_cross_entropy_with_logits(logits.expand_as(b), b, reduction="none").sum(-1)
        return (vae.log_joint(x, b) - log_q)[0]

    return rebar(f, couple_binary(logits, u, v), temperature=0.5)


pixels = (torch.as_tensor(load_digits().data, dtype=torch.float32) > 7.5).float()
steps = {  # all see about as many decoded samples a step
    "REINFORCE, 4 samples": lambda vae, x: reinforce(log_terms(vae, x, 4, generator)),
    "leave-one-out, 4 samples": lambda vae, x: reinforce_loo(log_terms(vae, x, 4, generator)),
    "VIMCO, 4 samples": lambda vae, x: vimco(log_terms(vae, x, 4, generator)),
    "REBAR, 1 sample (3 decoded)": rebar_step,
}
curves = {}
for name, step in steps.items():
    torch.manual_seed(0)
    vae = BitVae()
    optimiser = torch.optim.Adam(vae.parameters(), lr=3e-3)
    curves[name] = []
    for i in range(901):
        if i % 100 == 0:
            curves[name].append(
                log_likelihood(vae, pixels[1500:], 100, generator=generator).log_likelihood.mean().item()
            )
        batch = pixels[torch.randint(1500, (100,), generator=generator)]
        optimiser.zero_grad()
        backward(step(vae, batch), vae.decoder.parameters(), vae.encoder.parameters())
        optimiser.step()
    print(f"{name}: {curves[name][-1]:.2f} nats a test digit")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
colours = ["#1f6f8b", "#d1622b", "#5a8f3c", "#8a5fa8"]
for (name, (_, found)), colour in zip(ratios.items(), colours):
    left.loglog(ladder, found, "o-", base=2, ms=4, color=colour, label=name)
left.set(xlabel="samples", ylabel="signal to noise", title="Encoder's gradient, Gaussian latents")
left.legend(fontsize=8)
for (name, curve), colour in zip(curves.items(), colours):
    right.plot(range(0, 901, 100), curve, "o-", ms=3, color=colour, label=name)
right.set_ylim(bottom=min(curve[1] for curve in curves.values()) - 1)  # the first is far below
right.set(xlabel="steps", ylabel="nats a test digit", title=f"Training with {BITS} bits")
right.legend(fontsize=8, loc="lower right")
picture = sys.argv[1] if len(sys.argv) > 1 else "gradients.png"
plt.savefig(picture, dpi=110)
print(f"open {picture}")
