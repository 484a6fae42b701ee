"""Rejecting and detecting: against scikit-learn, enumeration of all orders, and closed forms."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from fspace.compare import selective, uncertainty
from fspace.errors import DataError, OptionError
from fspace.predictive import Categorical, Gaussian, Samples

rng = np.random.default_rng(0)


def test_auroc_and_fpr95_equal_scikit_learn():
    inside, outside = (
        np.round(rng.normal(size=200), 1),
        np.round(rng.normal(0.7, 1.2, size=150), 1),
    )  # with ties
    truth = np.r_[np.zeros(200), np.ones(150)]
    scores = np.r_[inside, outside]
    assert selective.auroc(inside, outside) == pytest.approx(roc_auc_score(truth, scores))
    fpr, tpr, _ = roc_curve(
        1 - truth, -scores, drop_intermediate=False
    )  # "inside" is what should be let through
    assert selective.fpr95(inside, outside) == pytest.approx(fpr[np.argmax(tpr >= 0.95)])


def test_risk_of_equal_doubt_is_the_mean_over_all_orders():
    loss, doubt = np.array([1.0, 0.0, 3.0, 2.0]), np.array([0.5, 0.5, 0.1, 0.5])
    orders = []
    for order in itertools.permutations([0, 1, 3]):
        cumulative = np.cumsum(loss[[2, *order]])
        orders.append((cumulative / np.arange(1, 5), cumulative / 4))
    area, general = (np.mean([o[k] for o in orders]) for k in (0, 1))
    assert selective.aurc(loss, doubt) == pytest.approx(area)
    assert selective.augrc(loss, doubt) == pytest.approx(general)


def test_augrc_of_useless_doubt_is_half_the_error():
    """With doubt that says nothing the expected area is the error rate times (n + 1) / (2 n)."""
    loss = (rng.random(1000) < 0.2).astype(float)
    assert selective.augrc(loss, np.zeros(1000)) == pytest.approx(loss.mean() * 1001 / 2000)
    assert selective.aurc(loss, np.zeros(1000)) == pytest.approx(loss.mean())
    assert selective.aurc(loss, loss) < selective.aurc(loss, np.zeros(1000)) < selective.aurc(loss, -loss)


def test_losses_and_doubt_of_numbers_and_classes():
    gaussian = Gaussian(
        torch.zeros(3).double(), torch.tensor([1.0, 2.0, 3.0]).double(), aleatoric=torch.ones(3).double()
    )
    assert selective.losses(np.array([1.0, 2.0, 0.0]), gaussian).tolist() == [1, 4, 0]
    assert selective.doubt(gaussian).tolist() == [1, 2, 3]
    assert selective.doubt(gaussian, "epistemic variance").tolist() == [0, 1, 2]
    classes = Categorical(torch.tensor([[0.9, 0.1], [0.4, 0.6]]).double())
    assert selective.losses(np.array([0, 0]), classes).tolist() == [0, 1]
    assert np.allclose(selective.doubt(classes), [0.1, 0.4])
    with pytest.raises(OptionError, match="of numbers"):
        selective.doubt(gaussian, "entropy")
    with pytest.raises(OptionError, match="of classes"):
        selective.doubt(classes, "variance")


def test_what_is_refused():
    with pytest.raises(DataError, match="outside is NaN in row 1"):
        selective.auroc([0.0, 1.0], [0.0, np.nan])
    with pytest.raises(DataError, match="at least one"):
        selective.fpr95([], [1.0])
    with pytest.raises(DataError, match="2 losses for 3"):
        selective.aurc([0.0, 1.0], [0.0, 1.0, 2.0])


# ---- epistemic and aleatoric -------------------------------------------------------------------------


def test_splits_add_up_and_equal_enumeration():
    probs = rng.dirichlet(np.ones(3), (4, 6))
    classes = Categorical(torch.as_tensor(probs))
    mean = probs.mean(0)
    for rule, entropy, divergence in (
        ("entropy", lambda p: -(p * np.log(p)).sum(-1), lambda p, q: (p * np.log(p / q)).sum(-1)),
        ("brier", lambda p: 1 - (p**2).sum(-1), lambda p, q: ((p - q) ** 2).sum(-1)),
    ):
        split = uncertainty.uncertainty(classes, rule)
        assert np.allclose(split.total, entropy(mean)) and np.allclose(
            split.aleatoric, entropy(probs).mean(0)
        )
        assert np.allclose(split.epistemic, divergence(probs, mean).mean(0))  # not by subtraction


def test_variances_follow_the_law_of_total_variance():
    """Against draws of y: 200,000 of them, so that the variance of y has a relative standard error of 0.3%."""
    means, noise = (
        torch.tensor([[0.0, 1.0], [2.0, 1.0]]).double(),
        torch.tensor([[1.0, 0.5], [3.0, 0.5]]).double(),
    )
    made = Samples(means, noise)
    split = uncertainty.uncertainty(made)
    assert split.epistemic.tolist() == [1, 0] and split.aleatoric.tolist() == [2, 0.5]
    drawn = made.rsample(200_000, seed=0).numpy()
    assert np.allclose(drawn.var(0), split.total, rtol=0.015)


def test_crps_split_of_draws_and_of_a_gaussian():
    made = Samples(torch.tensor([[0.0], [2.0]]).double(), torch.tensor([[1.0], [4.0]]).double())
    split = uncertainty.uncertainty(made, "crps")
    drawn = made.rsample(400_000, seed=0).numpy()[:, 0]
    apart = np.abs(drawn[::2] - drawn[1::2])
    assert abs(split.total[0] - apart.mean() / 2) < 3 * apart.std() / 2 / np.sqrt(200_000)
    assert split.aleatoric[0] == pytest.approx((1 + 2) / 2 / np.sqrt(np.pi))
    gaussian = Gaussian(
        torch.zeros(1).double(), torch.full((1,), 4.0).double(), aleatoric=torch.ones(1).double()
    )
    split = uncertainty.uncertainty(gaussian, "crps")
    assert np.allclose([split.total[0], split.epistemic[0]], [2 / np.sqrt(np.pi), 1 / np.sqrt(np.pi)])
    with pytest.raises(OptionError, match="choose one of variance, crps"):
        uncertainty.uncertainty(gaussian, "entropy")


def test_draws_without_noise_and_text_are_refused_in_words():
    bare = Samples(torch.zeros(4, 3, dtype=torch.float64))
    with pytest.raises(OptionError, match="samples with noise"):
        uncertainty.uncertainty(bare, "crps")
    with pytest.raises(DataError, match="inside must hold numbers"):
        selective.auroc(["high"], [1.0])
