"""Bounds: against direct formulas and a model of known evidence; axes; what is refused."""

import itertools
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch.distributions import kl_divergence

from fspace.errors import DataError, NumericalError, OptionError
from fspace.inference import amortized
from fspace.inference.amortized import ciwae, elbo, elbo_with_kl, iwae, log_weights, miwae, piwae, renyi, tvo
from fspace.inference.amortized.bounds import as_repeats

FLAT = {
    "elbo": elbo,
    "iwae": iwae,
    "ciwae": partial(ciwae, beta=0.3),
    "renyi": partial(renyi, alpha=0.5),
    "renyi of 2": partial(renyi, alpha=2.0),
    "tvo": partial(tvo, partition=(0.0, 0.1, 0.4, 1.0)),
}


@pytest.fixture
def lw():
    """Log-weights [6, 4]."""
    return 2.0 * torch.randn(6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_every_bound_is_its_formula(lw):
    w = lw.numpy()
    K = len(w)
    iw = logsumexp(w, axis=0) - np.log(K)
    np.testing.assert_allclose(elbo(lw), w.mean(0), atol=1e-13)
    np.testing.assert_allclose(iwae(lw), iw, atol=1e-13)
    np.testing.assert_allclose(ciwae(lw, 0.3), 0.3 * w.mean(0) + 0.7 * iw, atol=1e-13)
    for alpha in (-1.0, 0.5, 2.0):
        direct = np.log(np.mean(np.exp(w) ** (1 - alpha), axis=0)) / (1 - alpha)
        np.testing.assert_allclose(renyi(lw, alpha), direct, atol=1e-12)
    parts = w.reshape(2, 3, 4)
    mi = (logsumexp(parts, axis=1) - np.log(3)).mean(0)
    np.testing.assert_allclose(miwae(as_repeats(lw, 2)), mi, atol=1e-13)
    np.testing.assert_allclose(piwae(as_repeats(lw, 2)).encoder, mi, atol=1e-13)
    np.testing.assert_allclose(piwae(as_repeats(lw, 2)).decoder, iw, atol=1e-13)
    direct = 0.0
    for a, b in itertools.pairwise((0.0, 0.1, 0.4, 1.0)):
        weights = np.exp(a * w)
        direct = direct + (b - a) * (weights * w).sum(0) / weights.sum(0)
    np.testing.assert_allclose(tvo(lw, (0.0, 0.1, 0.4, 1.0)), direct, atol=1e-12)


def test_limits_and_order(lw):
    torch.testing.assert_close(renyi(lw, 0.0), iwae(lw))
    torch.testing.assert_close(renyi(lw, 1.0), elbo(lw))
    torch.testing.assert_close(renyi(lw, 1.0 + 1e-7), elbo(lw), atol=1e-5, rtol=0)
    torch.testing.assert_close(renyi(lw, math.inf), lw.amin(0))
    torch.testing.assert_close(renyi(lw, -math.inf), lw.amax(0))
    torch.testing.assert_close(tvo(lw, (0.0, 1.0)), elbo(lw))
    torch.testing.assert_close(ciwae(lw, 0.0), iwae(lw))
    torch.testing.assert_close(ciwae(lw, 1.0), elbo(lw))
    ordered = torch.stack([renyi(lw, alpha) for alpha in (-math.inf, -2.0, 0.0, 0.5, 1.0, 3.0, math.inf)])
    assert (ordered.diff(dim=0) < 0).all()


def test_gradient_of_iwae_is_the_normalised_weights(lw):
    lw.requires_grad_()
    iwae(lw).sum().backward()
    torch.testing.assert_close(lw.grad, lw.detach().softmax(0))


# ---------------------------------------------------------------- probabilistic PCA


def test_exact_encoder_gives_constant_log_weights(ppca):
    model = ppca()
    x = model.data(7)
    lw = log_weights(model, x, 12).detach()
    evidence = model.evidence(x)
    torch.testing.assert_close(lw, evidence.detach().expand_as(lw), atol=1e-10, rtol=0)
    for name, bound in FLAT.items():
        torch.testing.assert_close(bound(lw), evidence.detach(), atol=1e-10, rtol=0, msg=name)
    off = log_weights(ppca(off=0.2), x, 12).detach()
    assert off.std(0).min() > 0.1  # what the test would see


def test_elbo_is_evidence_less_divergence(ppca):
    """By the closed form with analytic KL, and by Monte Carlo, against log p - KL(q || posterior)."""
    model, exact = ppca(off=0.2), ppca()
    x = model.data(3)
    q, posterior = model.encode(x), exact.encode(x)
    normal = torch.distributions.Normal
    to_posterior = kl_divergence(normal(q.mean, q.std), normal(posterior.mean, posterior.std)).sum(-1)
    truth = (model.evidence(x) - to_posterior).detach()
    K = 40_000
    z = q.sample(K, torch.Generator().manual_seed(0))
    prior = normal(torch.zeros_like(q.mean), torch.ones_like(q.mean))
    fit = (model.log_joint(x, z) - prior.log_prob(z).sum(-1)).detach()
    kl = kl_divergence(normal(q.mean, q.std), prior).sum(-1).detach()
    error = fit.std(0) / math.sqrt(K)
    assert ((elbo_with_kl(fit, kl) - truth).abs() < 4 * error).all()
    assert ((elbo_with_kl(fit, kl, beta=2.0) - (truth - kl)).abs() < 4 * error).all()
    lw = (model.log_joint(x, z) - q.log_prob(z)).detach()
    assert ((elbo(lw) - truth).abs() < 4 * lw.std(0) / math.sqrt(K)).all()
    by_samples = (q.log_prob(z) - prior.log_prob(z).sum(-1)).detach()
    torch.testing.assert_close(elbo_with_kl(fit, by_samples), elbo(lw))
    # Twin: the other direction of the divergence is another number.
    other = kl_divergence(normal(posterior.mean, posterior.std), normal(q.mean, q.std)).sum(-1)
    assert ((elbo(lw) - (model.evidence(x) - other).detach()).abs() > 20 * lw.std(0) / math.sqrt(K)).all()


def test_bounds_grow_with_samples_and_stay_below_the_evidence(ppca):
    """Paired over 20,000 repeats: each step of K raises the mean by more than four standard errors."""
    model = ppca(off=0.25)
    x = model.data(1)
    R, ladder = 20_000, [1, 2, 4, 8, 16, 32]
    lw = log_weights(model, x.expand(R, -1), 32, torch.Generator().manual_seed(0)).detach()
    found = torch.stack([iwae(lw[:K]) for K in ladder])
    steps = found.diff(dim=0)
    error = steps.std(1) / math.sqrt(R)
    assert (steps.mean(1) > 4 * error).all()
    assert (found.mean(1) < model.evidence(x).item()).all()
    gap = model.evidence(x).item() - found.mean(1)
    assert gap[-1] < 0.2 * gap[0]
    # Renyi with alpha in (0, 1) lies between ELBO and IWAE, MIWAE of 4 x 8 between K = 8 and K = 32.
    assert found[0].mean() < renyi(lw, 0.5).mean() < found[-1].mean()
    mean = miwae(as_repeats(lw, 4))
    assert abs(mean.mean() - found[3].mean()) < 4 * (mean - found[3]).std() / math.sqrt(R)


def test_tvo_tightens_to_the_evidence(ppca):
    model = ppca(off=0.15)
    x = model.data(3)
    lw = log_weights(model, x, 100_000, torch.Generator().manual_seed(0)).detach()
    found = torch.stack([tvo(lw, np.linspace(0, 1, n + 1).tolist()) for n in (1, 2, 5, 50)])
    assert (found.diff(dim=0) > 0).all() and (found < model.evidence(x)).all()
    assert (found[-1] - model.evidence(x)).abs().max() < 0.1 * (found[0] - model.evidence(x)).abs().min()


def test_independent_evidence_of_the_fixture(ppca):
    """The evidence that everything here leans on, by quadrature over z."""
    model = ppca(d=1, big=2)
    x = model.data(2)
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    joint = model.log_joint(x, z[:, None, None].expand(-1, 2, 1))
    by_grid = joint.logsumexp(0) + math.log(z[1] - z[0])
    torch.testing.assert_close(by_grid, model.evidence(x))


# ---------------------------------------------------------------- axes


@pytest.mark.parametrize("name", FLAT)
def test_batch_of_two_is_two_singles(name, lw):
    bound = FLAT[name]
    whole = bound(lw)
    assert whole.shape == (4,)
    for b in range(4):
        torch.testing.assert_close(bound(lw[:, b : b + 1]), whole[b : b + 1])
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(bound(lw[:, order]), whole[order])
    torch.testing.assert_close(bound(lw.flip(0)), whole)  # samples are exchangeable


def test_repeats_and_samples_are_different_axes(lw):
    """(M = 1, K) is IWAE and (M = K, 1) the ELBO; exchanging the axes, as one public library does, exchanges them."""
    one, many = lw[None], lw[:, None]
    torch.testing.assert_close(miwae(one), iwae(lw))
    torch.testing.assert_close(miwae(many), elbo(lw))
    assert (miwae(one) - miwae(many) > 0.1).all()

    def swapped(given):
        return (given.logsumexp(0) - math.log(given.shape[0])).mean(0)

    assert (swapped(one) - iwae(lw)).abs().min() > 0.1  # the twin fails
    both = torch.stack([lw, lw + 1])
    torch.testing.assert_close(miwae(both[..., :1]), miwae(both)[:1])


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", FLAT)
def test_bad_weights_are_named(name, lw):
    bound = FLAT[name]
    for value, what in ((math.nan, "NaN"), (math.inf, r"\+inf")):
        bad = lw.clone()
        bad[3, 2] = value
        with pytest.raises(NumericalError, match=rf"\[3, 2\] is {what}.*sample 3 of datum 2"):
            bound(bad)
    bad = lw.clone()
    bad[:, 1] = -math.inf
    with pytest.raises(NumericalError, match="All 6 log-weights of datum 1"):
        bound(bad)
    for wrong in (lw[0], lw[None], torch.ones(3, 2, dtype=torch.int64), lw[:0]):
        with pytest.raises(DataError, match="log_weights"):
            bound(wrong)


def test_a_few_weights_of_zero_are_no_error(lw):
    lw[2, 1] = -math.inf
    kept = torch.cat([lw[:2], lw[3:]])[:, 1:2]
    torch.testing.assert_close(iwae(lw)[1:2], iwae(kept) + math.log(5 / 6))
    assert elbo(lw)[1] == -math.inf  # which is its value
    torch.testing.assert_close(ciwae(lw, 0.0), iwae(lw))
    assert elbo(lw)[[0, 2, 3]].isfinite().all()
    for name, bound in FLAT.items():
        if name != "renyi of 2":  # whose value is all that of the weight of zero
            leaf = lw.clone().requires_grad_()
            assert torch.autograd.grad(bound(leaf).sum(), leaf)[0].isfinite().all(), name


def test_bad_weights_of_repeats_are_named(lw):
    bad = as_repeats(lw, 2).clone()
    bad[1, 2, 3] = math.nan
    with pytest.raises(NumericalError, match=r"repeat 1, sample 2 of datum 3"):
        miwae(bad)
    bad[1, :, 3] = -math.inf
    with pytest.raises(NumericalError, match="All 3 log-weights of datum 3"):
        piwae(bad)
    with pytest.raises(DataError, match=r"\[repeats, samples, data\]"):
        miwae(lw)
    with pytest.raises(DataError, match="6 samples cannot be parted into 4"):
        as_repeats(lw, 4)


def test_bad_options_are_named(lw):
    for call in (
        lambda: ciwae(lw, 1.5),
        lambda: ciwae(lw, math.nan),
        lambda: renyi(lw, math.nan),
        lambda: elbo_with_kl(lw, lw[0], beta=-1.0),
        *(
            lambda p=p: tvo(lw, p)
            for p in ((0.0,), (0.0, 0.5), (0.1, 1.0), (0.0, 0.5, 0.5, 1.0), (0.0, math.nan, 1.0))
        ),
    ):
        with pytest.raises(OptionError):
            call()
    with pytest.raises(DataError, match="kl has shape"):
        elbo_with_kl(lw, lw[:1])
    bad = lw[0].clone()
    bad[2] = math.nan
    with pytest.raises(NumericalError, match=r"kl\[2\] is nan"):
        elbo_with_kl(lw, bad)


def test_model_with_wrong_axes_is_named(ppca):
    class Late(ppca):
        def log_joint(self, x, z):
            return super().log_joint(x, z).mT

    class Summed(ppca):
        def log_joint(self, x, z):
            return (
                super().log_joint(x, z).sum(1, keepdim=True)
            )  # over the batch, before the log-sum: one weight for all

    for wrong in (Late(), Summed()):
        for call in (amortized.log_weights, amortized.log_terms):
            with pytest.raises(DataError, match=r"model.log_joint has shape .* must be \[3, 4\]"):
                call(wrong, wrong.data(4), 3)
    with pytest.raises(OptionError, match="samples=0"):
        log_weights(ppca(), ppca().data(4), 0)


def test_public_names_are_there():
    for name in amortized.__all__:
        assert getattr(amortized, name) is not None
    assert set(amortized.__all__) == set(dir(amortized))
    found = subprocess.run(  # in a process of its own, where no other import has brought the module in
        [sys.executable, "-c", "import fspace.inference.amortized as a; print(a.smc.filter.__name__)"],
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == "filter", found.stderr
    with pytest.raises(AttributeError):
        amortized.nonsense  # noqa: B018


def test_devices_and_types(device):
    lw = torch.randn(5, 3, device=device)
    for bound in FLAT.values():
        found = bound(lw)
        assert found.dtype == torch.float32 and found.device.type == device.type
        torch.testing.assert_close(found.cpu().double(), bound(lw.cpu().double()), atol=1e-5, rtol=1e-5)
