"""Topics that rise and fall: a simulated corpus of 1987 to 2015 with known shares, and the shares that are found.

Run: python examples/topics.py topics.png
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import linear_sum_assignment

from fspace.inference.amortized.topics import TopicsOverTime

NAMES = ["networks", "kernels", "graphical models", "theory", "vision"]
YEARS = np.arange(1987, 2016)


def true_log_shares(t):
    """Networks fall and come back, kernels peak in 2002, graphical models in 2007, theory stays, vision rises."""
    u = (np.asarray(t) - 1987) / 28
    return np.stack(
        [
            1.5 - 5.0 * u + 5.5 * u**2, 2.0 * np.exp(-0.5 * ((u - 0.53) / 0.15) ** 2) - 0.5,
            1.8 * np.exp(-0.5 * ((u - 0.7) / 0.18) ** 2) - 0.5, 0.0 * u, 2.0 * u - 1.0,
        ],
        axis=-1,
    )  # fmt: skip


def true_shares(t, spread=1.2):
    """Mean shares among documents of a time."""
    around = spread * np.random.default_rng(0).standard_normal((4000, 5))
    parts = np.exp(true_log_shares(t)[:, None] + around)
    return (parts / parts.sum(-1, keepdims=True)).mean(1)


def corpus(documents=1200, vocabulary=250, words=60, seed=0, spread=1.2):
    """Counts [n, v], years [n] (more documents in later ones) and the topics [5, v]: Zipf's law, and in each topic some
    words are many times as frequent."""
    fixed, rng = np.random.default_rng(1), np.random.default_rng(seed)
    topics = np.exp(2.0 * fixed.standard_normal((5, vocabulary))) / np.arange(1, vocabulary + 1)
    topics /= topics.sum(1, keepdims=True)
    t = rng.choice(YEARS, documents, p=np.linspace(1, 3, 29) / 58)
    parts = np.exp(true_log_shares(t) + spread * rng.standard_normal((documents, 5)))
    chances = parts / parts.sum(1, keepdims=True) @ topics
    lengths = rng.poisson(words, documents) + 1
    counts = np.stack([rng.multinomial(n, p / p.sum()) for n, p in zip(lengths, chances)])
    return counts, t, topics


def matched(model, topics):
    """Which of the model's topics is which of the true ones: those whose words agree."""
    found = model.word_probabilities.detach().cpu().numpy()
    return linear_sum_assignment(-np.sqrt(topics) @ np.sqrt(found).T)[1]


if __name__ == "__main__":
    counts, t, topics = corpus()
    model = TopicsOverTime(5).fit((counts, t), epochs=40, learning_rate=1e-2, progress=False)
    order = matched(model, topics)
    found, truth = model.shares(YEARS), true_shares(YEARS)
    low, high = (end[:, order].cpu() for end in found.interval(0.9))
    mean = found.mean[:, order].cpu()
    print("correlation of shares:", [f"{np.corrcoef(mean[:, k], truth[:, k])[0, 1]:.3f}" for k in range(5)])
    inside = (low.numpy() <= truth) & (truth <= high.numpy())
    print(f"truth within the 90% bands: {inside.mean():.0%}")
    print(f"perplexity of new documents: {model.perplexity(corpus(300, seed=1)[:2], 200):.1f}")
    plt.figure(figsize=(8, 4.5), layout="constrained")
    for k, name in enumerate(NAMES):
        plt.fill_between(YEARS, low[:, k], high[:, k], alpha=0.3, color=f"C{k}", lw=0)
        plt.plot(YEARS, mean[:, k], color=f"C{k}", label=name)
        plt.plot(YEARS, truth[:, k], ":", color=f"C{k}")
    plt.xlabel("year")
    plt.ylabel("share of the topic (dotted: truth)")
    plt.legend(ncols=3, fontsize=8)
    picture = sys.argv[1] if len(sys.argv) > 1 else "topics.png"
    plt.savefig(picture, dpi=110)
    print(f"open {picture}")
