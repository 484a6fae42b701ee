"""Make an image that is not there: find what a VAE of digits can write that looks most like the letter C.

How alike two images are (their correlation) is measured on the decoded image, as an experiment would be; 40 are made.
Beside it: random latents, random digits, and the best of all 1797 digits, which costs 1797 measurements.
Run: python examples/latent_optimisation.py latent.png
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits

from fspace.decisions import optimize_latent
from fspace.inference.amortized import VAEKernelGP

LETTER = ["...####.", "..######", ".###....", ".##.....", ".##.....", ".###....", "..######", "...####."]
letter = torch.tensor([[float(c == "#") for c in row] for row in LETTER])
digits = (load_digits().images / 16).astype(np.float32)[:, None]  # [1797, 1, 8, 8]


def alike(images: torch.Tensor) -> torch.Tensor:
    """Correlation of images [n, 1, 8, 8] with the letter."""
    flat = images.flatten(1)
    centred, wanted = flat - flat.mean(1, keepdim=True), letter.flatten() - letter.mean()
    return (centred @ wanted) / (centred.norm(dim=1) * wanted.norm()).clamp(min=1e-9)


runs, found = {}, {}
for name, weighting in {
    "latent BO, weighted training": 1e-3,
    "latent BO, plain training": float("inf"),
}.items():
    model = VAEKernelGP(8, (128,), likelihood="bernoulli")
    options = {"initial": 15, "weighting": weighting, "epochs": 30, "learning_rate": 3e-3}
    optimizer = optimize_latent(alike, digits, 40, model=model, **options)
    runs[name], found[name] = optimizer.values, optimizer.best[0]

generator = torch.Generator().manual_seed(0)  # the VAE of the last run saw all digits alike
made = optimizer.decode(torch.randn(40, 8, generator=generator))
some = torch.from_numpy(digits)[torch.randperm(len(digits), generator=generator)[:40]]
for name, images in {"random latents": made, "random digits": some}.items():
    runs[name], found[name] = alike(images), images[alike(images).argmax()]
everything = alike(torch.from_numpy(digits))
found["best of all digits"] = torch.from_numpy(digits)[everything.argmax()]
best = {name: float(values.max()) for name, values in runs.items()} | {
    "best of all digits": float(everything.max())
}
for name, value in best.items():
    print(f"{name}: {value:.3f}")

figure = plt.figure(figsize=(9, 5.2), layout="constrained")
grid = figure.add_gridspec(2, len(found) + 1, height_ratios=(2.2, 1))
ax = figure.add_subplot(grid[0, :])
for name, values in runs.items():
    line = "--" if "plain" in name else "-"
    ax.plot(np.arange(1, 41), np.maximum.accumulate(values.numpy()), line, label=name, drawstyle="steps-post")
ax.axhline(best["best of all digits"], color="0.5", ls=":", label="best of all 1797 digits")
ax.axvline(15, color="0.85", zorder=0)
ax.set(xlabel="images measured (the first 15 are digits)", ylabel="best correlation with the letter")
ax.legend(loc="lower right", fontsize=8)
for k, (name, image) in enumerate({"the letter": letter[None], **found}.items()):
    small = figure.add_subplot(grid[1, k])
    small.imshow(image[0], cmap="gray_r", vmin=0, vmax=1)
    small.set(xticks=[], yticks=[])
    small.set_title(name.replace(", ", ",\n") + (f"\n{best[name]:.3f}" if name in best else ""), fontsize=8)
where = sys.argv[1] if len(sys.argv) > 1 else "latent_optimisation.png"
figure.savefig(where, dpi=110)
print(f"open {where}")
