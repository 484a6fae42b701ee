"""Hidden intensities behind counts: learn the dynamics with a particle filter, then look back with its smoother.

Forty sensors count events, each for a different time. The log intensity wanders: z_t = c + a (z_t-1 - c) + q e_t.
The bound that is climbed (FIVO) is the filter's log evidence; without resampling it is the IWAE bound, which falls
apart as series get longer.

Run: python examples/particles.py particles.png
"""

import sys

import matplotlib.pyplot as plt
import torch

from fspace.inference.amortized import smc
from fspace.inference.amortized.smoothing import backward_simulation

T, B, N = 120, 40, 64
torch.manual_seed(0)
lengths = torch.randint(30, T + 1, (B,))
lengths[0] = T

truth = torch.empty(T, B)
for t in range(T):
    truth[t] = 1.0 + (0.9 * (truth[t - 1] - 1.0) if t else 0.0) + 0.4 * torch.randn(B)
counts = torch.poisson(truth.exp())
counts[torch.arange(T)[:, None] >= lengths] = torch.nan  # nothing was recorded after a series' end

centre = torch.tensor(0.0, requires_grad=True)
raw_a = torch.tensor(0.0, requires_grad=True)
log_q = torch.tensor(0.0, requires_grad=True)


def log_poisson(x, z):
    return x * z - z.exp() - torch.lgamma(x + 1)


def init(particles, x, noise):
    z = centre + log_q.exp() * noise
    return z, log_poisson(x, z)


def step(z, x, t, noise):
    z = centre + raw_a.sigmoid() * (z - centre) + log_q.exp() * noise
    return z, log_poisson(x, z)


def run(particles=N, **options):
    return smc.filter(init, step, counts, lengths, particles, noise=torch.randn(T, particles, B), **options)


optimiser = torch.optim.Adam([centre, raw_a, log_q], lr=0.08)
climbed = []
for _ in range(90):
    optimiser.zero_grad()
    bound = run().surrogate.sum() / lengths.sum()
    (-bound).backward()
    optimiser.step()
    climbed.append(bound.item())

with torch.no_grad():
    found = run(500)
    iwae = run(500, criterion="never")
    per_step = [value.log_evidence.sum().item() / lengths.sum().item() for value in (found, iwae)]
a, q = raw_a.sigmoid().item(), log_q.exp().item()
print(f"learned: c = {centre.item():.2f} (1.00), a = {a:.2f} (0.90), q = {q:.2f} (0.40)")
print(f"log evidence a step, 500 particles: {per_step[0]:.3f}; never resampled (IWAE) {per_step[1]:.3f}")


def log_transition(z, following, t):
    return torch.distributions.Normal(centre + a * (z - centre), q).log_prob(following)


paths = backward_simulation(found, log_transition, 200, torch.Generator().manual_seed(0))
held = torch.arange(T)[:, None] < lengths
low, high = paths.quantile(0.05, dim=1), paths.quantile(0.95, dim=1)
inside = ((truth > low) & (truth < high))[held].double().mean().item()
print(f"true log intensities inside the 90% band of the smoother: {inside:.1%}")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=[2, 1])
time = torch.arange(T)
left.fill_between(time, low[:, 0].exp(), high[:, 0].exp(), color="#a9c8de", label="smoother, 90%")
left.plot(time, truth[:, 0].exp(), color="#1f2933", lw=1.2, label="true intensity")
left.plot(time, counts[:, 0], ".", color="#d1622b", ms=4, label="counts")
left.set(xlabel="step", title="One sensor: the intensity behind its counts")
left.legend(frameon=False, fontsize=9)
shortest = int(lengths.argmin())
for b, colour in ((0, "#2f6690"), (shortest, "#d1622b")):
    for result, style in ((found, "-"), (iwae, ":")):
        end = int(lengths[b])
        name = f"{end} steps, {'resampled' if style == '-' else 'never resampled'}"
        right.semilogy(time[:end], result.ess[:end, b], style, color=colour, lw=1.2, label=name)
right.set(xlabel="step", title="Effective sample size of 500", ylim=(0.9, 600))
right.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 0.26))
picture = sys.argv[1] if len(sys.argv) > 1 else "particles.png"
plt.savefig(picture, dpi=110)
print(f"open {picture}")
