"""Is a network's Gaussian process unsure far from the data? A plain network may not be; one that keeps distances is.

Run: python examples/far.py far.png
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from sklearn.datasets import make_moons

import fspace
from fspace.kernels import MLP, ResidualMLP

X, y = make_moons(400, noise=0.1, random_state=0)
grid = np.linspace(-6, 7, 120)
places = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
far = np.abs(places).max(1) > 4

torch.manual_seed(0)
networks = {
    "plain network": MLP(2, hidden=(64, 64), out_features=4),
    "spectrally normalised residual network": ResidualMLP(2, width=64, depth=3, out_features=None),
}
_, axes = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained", sharey=True)
for ax, (name, network) in zip(axes, networks.items()):
    base = ScaleKernel(MaternKernel(2.5))
    base.base_kernel.lengthscale = 4.0
    model = fspace.GPClassifier(kernel=fspace.DeepKernel(network, base), members=1, progress=False).fit(X, y)
    with torch.no_grad():
        doubt = model.predictive(places).mutual_information.numpy()
    share = (doubt[far] > 0.1).mean()
    print(f"{name}: accuracy {model.score(X, y):.3f}; unsure on {share:.0%} of the places far from all data")
    shown = ax.contourf(grid, grid, doubt.reshape(120, 120), levels=np.linspace(0, 0.3, 13), cmap="Blues")
    ax.scatter(*X.T, c=np.where(y, "#d1622b", "#1f2933"), s=6)
    ax.set_title(f"{name}\nunsure on {share:.0%} of the places far away", loc="left", fontsize=10)
plt.colorbar(shown, ax=axes, label="mutual information (nats): what more data would tell")
picture = sys.argv[1] if len(sys.argv) > 1 else "far.png"
plt.savefig(picture, dpi=110)
print(f"open {picture}")
