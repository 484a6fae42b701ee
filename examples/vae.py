"""Digits as 10 bits or 10 numbers: what each keeps of an image, what each makes from its prior, and what each is worth.

The VAE with bits is trained on relaxed (Concrete) bits; its bound with hard bits is what counts, and both are printed.
Run: python examples/vae.py vae.png
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

from fspace.inference.amortized import VAE

images = (load_digits().images > 7.5).astype(np.float32)[:, None]  # [1797, 1, 8, 8], values 0 and 1
train, test = images[:1500], images[1500:]

models = {
    "10 numbers": VAE(10, objective="dreg", samples=5),
    "10 bits": VAE(10, latent="bits", objective="concrete"),
}
rows = [("test digits", test[:12])]
for name, model in models.items():
    model.fit(train, epochs=60, batch_size=50, learning_rate=3e-3, progress=False)
    bounds = ", ".join(f"{bound} {values.mean():.2f}" for bound, values in model.bounds(test).items())
    print(f"{name}: log p of a test digit {model.log_likelihood(test, 1000).mean():.2f} nats ({bounds})")
    rows += [(f"kept by {name}", model.reconstruct(test[:12]).numpy())]
    rows += [(f"made from {name}", model.sample(12, seed=0, noise=False).numpy())]

figure, axes = plt.subplots(len(rows), 12, figsize=(9, 4), layout="constrained")
for line, (name, pictures) in zip(axes, rows):
    for ax, picture in zip(line, pictures):
        ax.imshow(picture[0], cmap="gray_r", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
    line[0].set_ylabel(name, rotation=0, ha="right", va="center")
where = sys.argv[1] if len(sys.argv) > 1 else "vae.png"
figure.savefig(where, dpi=110)
print(f"open {where}")
