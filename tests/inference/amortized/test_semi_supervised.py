"""Rows of which some have labels: the bound by hand, what unlabelled rows are worth, files, refusals."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch.distributions import Independent, Normal, kl_divergence

from fspace.errors import DataError, NotFittedError, OptionError
from fspace.inference.amortized.model import load
from fspace.inference.amortized.semi_supervised import SemiSupervisedVAE

QUIET = {"progress": False}


def rows(n=80, seed=0):
    """Bits of two kinds, half of them with the name of their kind."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 2, n)
    x = (rng.random((n, 6)) < np.where(kind[:, None] == 1, 0.8, 0.3)).astype(np.float32)
    labels = np.where(kind == 1, "many", "few").astype(object)
    labels[n // 2 :] = None
    return x, labels


def small(**options):
    model = SemiSupervisedVAE(2, (8,), device="cpu", **options)
    return model.fit(*rows(), epochs=3, batch_size=20, **QUIET)


def test_the_bound_by_enumeration_is_that_by_hand():
    """A decoder that does not look at z: every expectation is exact, and the sum over classes is a loop."""
    model = small()
    with torch.no_grad():
        model.decoder.layers[0].weight[:, :2] = 0.0
    x, labels = rows()
    x = torch.tensor(x)
    by_hand, evidence = torch.zeros(80), []
    with torch.no_grad():
        logs = model.classifier(x - model.observations.shift).log_softmax(-1)
        for k, _ in enumerate(model.classes_):
            one = torch.eye(2)[k].expand(80, -1)
            out = model.decoder(torch.cat([torch.zeros(80, 2), one], 1))
            fits = -torch.nn.functional.binary_cross_entropy_with_logits(out, x, reduction="none").sum(1)
            numbers = model.encoder(torch.cat([x - model.observations.shift, one], 1))
            std = torch.nn.functional.softplus(numbers[:, 2:] + math.log(math.e - 1)) + 1e-5
            q = Independent(Normal(numbers[:, :2], std), 1)
            kl = kl_divergence(q, Independent(Normal(torch.zeros(80, 2), torch.ones(80, 2)), 1))
            joint = fits + model.log_prior[k]
            by_hand += logs[:, k].exp() * (joint - kl - logs[:, k])
            evidence.append(joint)
            mine = np.full(80, model.classes_[k], dtype=object)
            torch.testing.assert_close(model.bounds((x, mine))["elbo"], joint - kl)
            torch.testing.assert_close(model.log_likelihood((x, mine), 5000).float(), joint, rtol=0, atol=0.2)
    torch.testing.assert_close(model.bounds(x)["elbo"], by_hand)
    exact = torch.stack(evidence).logsumexp(0)
    assert bool((by_hand <= exact + 1e-5).all())
    found = model.evaluate(x, 4000)
    assert bool(((found.log_likelihood - exact).abs() < 4 * found.standard_error + 1e-4).all())
    wrong = model.log_prior.exp() @ torch.stack(evidence)  # a mean of logs in place of the log of a mean
    assert bool(((found.log_likelihood - wrong).abs() > 4 * found.standard_error + 1e-4).any())
    # what a step climbs: known rows at their label, others summed, and the classifier's own term
    y = model.prepare((x, labels))[1]
    model.weight = torch.tensor(7.0)
    score = model.score((x, y), torch.Generator().manual_seed(0))
    torch.testing.assert_close(score[40:], by_hand[40:])
    each = torch.stack([model.bounds((x, np.full(80, c, dtype=object)))["elbo"] for c in model.classes_], 1)
    picked = torch.arange(40), y[:40]
    torch.testing.assert_close(score[:40], each[picked] + 7.0 * logs[picked])


def test_unlabelled_rows_are_worth_something():
    """Ten labels a class: better than logistic regression on these by more than 3 standard errors of the paired
    difference; the same model without the unlabelled rows is not."""
    x, y = load_digits(return_X_y=True)
    x, rng = (x / 16).astype(np.float32), np.random.default_rng(2)
    known = np.concatenate([rng.permutation(np.flatnonzero(y == k))[:10] for k in range(10)])
    labels = np.full(len(y), np.nan)
    labels[known] = y[known]
    rest = np.setdiff1d(np.arange(len(y)), known)
    alone = LogisticRegression(max_iter=2000).fit(x[known], y[known]).predict(x[rest]) == y[rest]
    options = {"widths": (100,), "likelihood": "gaussian", "alpha": 5.0, "device": "cpu"}
    plan = {"epochs": 30, "learning_rate": 3e-3, **QUIET}

    def gain(model):
        difference = (model.predict(x[rest]) == y[rest]).astype(float) - alone
        return difference.mean() / (difference.std() / len(rest) ** 0.5)

    model = SemiSupervisedVAE(8, **options).fit(x, labels, **plan)
    assert gain(model) > 3
    few = plan | {"epochs": 200, "batch_size": 20}
    assert gain(SemiSupervisedVAE(8, **options).fit(x[known], y[known], **few)) < 3
    proba = model.predict_proba(x[rest])
    assert proba.shape == (len(rest), 10) and torch.allclose(proba.sum(1), torch.ones(len(rest)))
    drawn = model.sample(200, seed=0, label=3.0, noise=False)  # and what is drawn of a class is taken for it
    assert (model.predict(drawn) == 3.0).mean() > 0.8


def test_all_answers_and_a_file_in_a_new_process(tmp_path):
    model, (x, labels) = small(), rows()
    assert model.classes_ == ["few", "many"] and set(model.predict(x)) <= {"few", "many"}
    assert model.latent_means(x).shape == (80, 2) and model.reconstruct((x, labels)).shape == (80, 6)
    assert model.sample(5, seed=1).shape == (5, 6)
    path = model.save(tmp_path / "m.amortized")
    np.save(tmp_path / "x.npy", x)
    code = (
        "import numpy as np; from fspace.inference.amortized.model import load;"
        f"m = load({str(path)!r}, 'cpu'); x = np.load({str(tmp_path / 'x.npy')!r});"
        "print(repr(m.log_likelihood(x, 20).sum().item()), m.classes_, repr(m.predict_proba(x).sum(0)[0].item()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = model.log_likelihood(x, 20).sum().item(), model.predict_proba(x).sum(0)[0].item()
    assert done.stdout.strip() == f"{here[0]!r} ['few', 'many'] {here[1]!r}"
    numbers = np.where(labels[:40] == "many", 1.0, 0.0)
    again = SemiSupervisedVAE(2, (8,), device="cpu").fit(x[:40], numbers, epochs=1, **QUIET)  # all known
    assert again.classes_ == [0.0, 1.0] and load(again.save(tmp_path / "n"), "cpu").classes_ == [0.0, 1.0]


def test_refusals():
    x, labels = rows()
    with pytest.raises(NotFittedError):
        SemiSupervisedVAE().predict_proba(x)
    for bad in (None, np.full(80, np.nan), np.full(80, "one")):
        with pytest.raises(DataError, match="at least two classes"):
            SemiSupervisedVAE().fit(x, bad)
    with pytest.raises(DataError, match="79 labels for 80 rows"):
        SemiSupervisedVAE().fit(x, labels[:79])
    with pytest.raises(DataError, match="(?s)Row 3 .*NaN"):
        SemiSupervisedVAE().fit(np.where(np.arange(80)[:, None] == 3, np.nan, x), labels)
    model = small()
    with pytest.raises(DataError, match="Row 1 has the label 'none'"):
        model.bounds((x[:2], ["few", "none"]))
    with pytest.raises(DataError, match="fitted on"):
        model.predict(x[:, :4])
    with pytest.raises(OptionError, match="label"):
        model.sample(1, label="none")
    for options in ({"latents": 0}, {"samples": 0}, {"alpha": -1.0}, {"likelihood": "poisson"}):
        with pytest.raises(OptionError):
            SemiSupervisedVAE(**options).fit(x, labels)
