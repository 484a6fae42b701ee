"""A film with frames missing: a VAE whose latents are Gaussian processes along time fills them, and says how sure.

A spot moves over 10 x 10 pixels; the middle of one film, and a third of its other frames, were not recorded.
Run: python examples/frames.py frames.png
"""

import sys

import matplotlib.pyplot as plt
import numpy as np

from fspace.inference.amortized import GPPriorVAE

SIZE, STEPS = 10, 50


def film(seed):
    """Times [T] and frames [T, 10, 10] of a spot on a smooth path."""
    rng, t = np.random.default_rng(seed), np.linspace(0, 1, STEPS)
    path = sum(
        rng.normal(0, 1 / k, (2, 1)) * np.sin(2 * np.pi * k * t + rng.uniform(0, 6, (2, 1))) for k in (1, 2)
    )
    y, x = SIZE / 2 + SIZE / 4 * np.tanh(path)
    pixels = np.arange(SIZE)
    square = (pixels[None, :, None] - y[:, None, None]) ** 2 + (pixels - x[:, None, None]) ** 2
    return t, np.exp(-0.3 * square) + 0.05 * rng.standard_normal((STEPS, SIZE, SIZE))


films = [film(seed) for seed in range(30)]
t, frames = film(100)
gone = (np.random.default_rng(0).random(STEPS) < 1 / 3) | ((t > 0.4) & (t < 0.55))
shown = np.where(gone[:, None, None], np.nan, frames)

model = GPPriorVAE(3, "matern", inducing=25, widths=(64,))
model.fit(films, epochs=120, batch_size=10, learning_rate=5e-3, progress=False)
filled = model.reconstruct((t, shown)).numpy().reshape(frames.shape)
mean_frame = np.mean([x for _, x in films], axis=(0, 1))
for name, guess in (("filled", filled[gone]), ("mean frame", mean_frame)):
    print(f"{name}: RMS error of a missing pixel {np.sqrt(np.mean((guess - frames[gone]) ** 2)):.3f}")

latents = model.encode((t, shown)).latent(t)
lower, upper = latents.interval(0.9)
figure, axes = plt.subplot_mosaic([["z"] * 12, *[[f"{row}{k}" for k in range(12)] for row in "abc"]],
                                  figsize=(10, 6), layout="constrained", height_ratios=[3, 1, 1, 1])  # fmt: skip
for k in range(3):
    axes["z"].fill_between(t, lower[:, k], upper[:, k], alpha=0.25, color=f"C{k}", lw=0)
    axes["z"].plot(t, latents.mean[:, k], color=f"C{k}", label=f"latent {k}")
axes["z"].plot(t[gone], np.full(gone.sum(), float(lower.min())), "k|", label="frame missing")
axes["z"].legend(ncols=4, fontsize=8)
axes["z"].set(xlabel="time", ylabel="latent functions, 90% bands")
some = np.linspace(15, 30, 12).astype(int)
for row, (name, pictures) in zip("abc", (("recorded", shown), ("filled", filled), ("truth", frames))):
    for k, frame in enumerate(some):
        axes[f"{row}{k}"].imshow(pictures[frame], cmap="gray", vmin=0, vmax=1)
        axes[f"{row}{k}"].set(xticks=[], yticks=[])
    axes[f"{row}0"].set_ylabel(name)
where = sys.argv[1] if len(sys.argv) > 1 else "frames.png"
figure.savefig(where, dpi=110)
print(f"open {where}")
