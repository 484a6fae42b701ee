"""How tight is a bound? A variational autoencoder of digits, scored by every bound, by 5000 samples and by annealing.

Run: python examples/bounds.py bounds.png
"""

import sys

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from fspace.inference.amortized import (
    DiagonalGaussian,
    annealed_importance,
    backward,
    elbo,
    iwae,
    log_likelihood,
    log_terms,
    log_weights,
    miwae,
    pathwise,
    renyi,
    tvo,
)


class Vae(nn.Module):
    """Any module with `encode` and `log_joint` will do."""

    def __init__(self, latent=4):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, 64), nn.Tanh(), nn.Linear(64, 64))

    def encode(self, x):
        mean, log_std = self.encoder(x).chunk(2, dim=-1)
        return DiagonalGaussian(mean, log_std.exp())

    def log_joint(self, x, z):
        logits = self.decoder(z)
        fit = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
        return fit + torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)


torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)
pixels = (torch.as_tensor(load_digits().data, dtype=torch.float32) > 7.5).float()  # 8 x 8, fixed binarisation
pixels = pixels[torch.randperm(len(pixels), generator=generator)]
train, test = pixels[:1500], pixels[1500:1600]

vae = Vae()
optimiser = torch.optim.Adam(vae.parameters(), lr=3e-3)
for _ in range(1500):
    batch = train[torch.randint(len(train), (100,), generator=generator)]
    estimate = pathwise(log_terms(vae, batch, 1, generator), elbo)  # one sample: the plain ELBO
    optimiser.zero_grad()
    backward(estimate, vae.decoder.parameters(), vae.encoder.parameters())
    optimiser.step()

scored = log_likelihood(vae, test, samples=5000, generator=generator)
annealed = annealed_importance(vae, test, chains=16, temperatures=60, leapfrog=5, generator=generator)
truth = scored.log_likelihood.mean().item()
print(
    f"log-likelihood by 5000 samples: {truth:.2f} nats, by annealing: {annealed.log_evidence.mean().item():.2f}"
)
print(
    f"effective sample size of 5000: median {scored.ess.median().item():.0f}, least {scored.ess.min().item():.0f}"
)
print(f"Pareto k above 0.7: {(scored.pareto_k > 0.7).sum().item()} of {len(test)} digits")

bounds = {
    "IWAE": iwae,
    "Rényi, alpha 0.5": lambda w: renyi(w, 0.5),
    "TVO, 10 temperatures": lambda w: tvo(w, [(i / 10) ** 2 for i in range(11)]),
    "MIWAE of 2": lambda w: miwae(w.unflatten(0, (2, -1))) if len(w) > 1 else elbo(w),
    "ELBO": elbo,
}
ladder = [1, 2, 4, 8, 16, 32, 64, 128, 256]
with torch.no_grad():
    weights = torch.stack([log_weights(vae, test, ladder[-1], generator) for _ in range(10)])
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
colours = ["#1f6f8b", "#d1622b", "#5a8f3c", "#8a5fa8", "#8a94a0"]
for (name, bound), colour in zip(bounds.items(), colours):
    means = [torch.stack([bound(w[:k]) for w in weights]).mean().item() for k in ladder]
    left.semilogx(ladder, means, "o-", ms=3, base=2, color=colour, label=name)
left.axhline(truth, color="#1f2933", lw=1, label="5000 samples")
left.axhline(annealed.log_evidence.mean().item(), color="#1f2933", lw=1, ls=":", label="annealing")
left.set(xlabel="samples", ylabel="nats a test digit", title="Bounds of one model")
left.set_ylim(bottom=truth - 0.8)
left.legend(fontsize=8, ncols=2, loc="lower right")
right.scatter(scored.ess, scored.pareto_k, s=12, color="#1f6f8b")
right.axhline(0.7, color="#d1622b", lw=1)
right.set(
    xscale="log",
    xlabel="effective sample size of 5000",
    ylabel="Pareto k",
    title="Whom to believe: above 0.7, no one",
)
picture = sys.argv[1] if len(sys.argv) > 1 else "bounds.png"
plt.savefig(picture, dpi=110)
print(f"open {picture}")
