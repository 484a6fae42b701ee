"""Digits that were never learned: does a classifier notice, and what is left to a person?

Eight classes are fitted; 8 and 9 come only later. Rows are refused above the entropy that 95% of known digits stay
below.

Run: python examples/reject.py reject.png
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
import torch

import fspace
from fspace.compare import digits
from fspace.compare.selective import augrc, auroc, losses, risk_coverage

problem = digits().problem(0)
models = {
    "GP, deep kernel": fspace.GPClassifier(kernel="deep", members=1, progress=False),
    "network (MAP)": fspace.BNNClassifier("map", hidden=(50,), epochs=60, progress=False),
    "deep ensemble": fspace.BNNClassifier("ensemble", hidden=(50,), epochs=60, progress=False),
}
_, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
for (name, model), colour in zip(models.items(), ("#2f6690", "#8a94a0", "#d1622b")):
    model.fit(problem.x_train, problem.y_train)
    with torch.no_grad():
        known, unknown = model.predictive(problem.x_test), model.predictive(problem.outside)
    doubt, strange = known.entropy.numpy(), unknown.entropy.numpy()
    threshold = np.quantile(doubt, 0.95)
    loss = losses(np.searchsorted(model.classes_, problem.y_test), known)
    refused = f"refuses 5% of them and {(strange > threshold).mean():.0%} of the unknown"
    areas = f"AUROC {auroc(doubt, strange):.3f}, AUGRC {augrc(loss, doubt):.5f}"
    print(f"{name}: {1 - loss.mean():.1%} of known digits right; {refused} ({areas})")
    # everything that comes, known and unknown: an answer about an unknown digit is always wrong
    everything = np.r_[loss, np.ones(len(strange))], np.r_[doubt, strange]
    answered, risk = risk_coverage(*everything)
    left.plot(answered, risk, color=colour, label=name)
    bins = np.linspace(0, 2.1, 30)
    right.hist(strange, bins, color=colour, histtype="step", lw=1.8, density=True, label=f"{name}, unknown")
    right.hist(doubt, bins, color=colour, histtype="step", lw=1, ls=":", density=True, label=f"{name}, known")
share = len(problem.y_test) / (len(problem.y_test) + len(problem.outside))
left.axvline(share, color="#1f2933", lw=0.8, ls=":")
left.text(share, 0.45, "share of known\ndigits ", ha="right", fontsize=8)
left.set(xlabel="share answered, the surest first", ylabel="share of answers that are wrong")
left.legend(fontsize=8)
right.set(xlabel="entropy (nats)", ylabel="density", yscale="log")
right.legend(fontsize=7)
picture = sys.argv[1] if len(sys.argv) > 1 else "reject.png"
plt.savefig(picture, dpi=110)
print(f"open {picture}")
