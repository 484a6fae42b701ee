"""Gradients through reparameterised latents: exact zeros at the posterior, equal means, signal-to-noise, and layers."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal, Poisson

from fspace.errors import DataError, OptionError
from fspace.inference.amortized import (
    Bernoulli,
    Chain,
    DiagonalGaussian,
    Estimate,
    LatentModel,
    LogTerms,
    Proposal,
    annealed_importance,
    backward,
    dreg,
    elbo,
    iwae,
    log_likelihood,
    log_terms,
    log_weights,
    pathwise,
    renyi,
    stl,
    vimco,
)


def gradients(estimate, parameters, group="encoder"):
    return torch.autograd.grad(getattr(estimate, group).mean(), parameters, retain_graph=True)


def replicated(model, x, K, R, seed=0):
    """R independent draws for one datum, each with an encoder mean and log-std of its own: terms, and these leaves."""
    with torch.no_grad():
        q = model.encode(x)
        mean, log_std = q.mean.expand(R, -1).clone(), q.std.log().expand(R, -1).clone()
    mean.requires_grad_(), log_std.requires_grad_()

    class Replicated:
        def encode(self, x):
            return DiagonalGaussian(mean, log_std.exp())

        def log_joint(self, x, z):
            return model.log_joint(x, z)

    return log_terms(Replicated(), x.expand(R, -1), K, torch.Generator().manual_seed(seed)), [mean, log_std]


def per_replicate(surrogate, leaves):
    return torch.cat(torch.autograd.grad(surrogate.sum(), leaves, retain_graph=True), dim=-1)


def test_fixture_answers_the_protocols(ppca):
    assert isinstance(ppca(), LatentModel)
    assert isinstance(ppca().encode(ppca().data(2)), Proposal)


def test_terms_are_what_they_say(ppca):
    model = ppca(off=0.2)
    terms = log_terms(model, model.data(3), 4)
    torch.testing.assert_close(terms.proposal, terms.stopped)
    torch.testing.assert_close(terms.weights, terms.path)
    assert not terms.score.any()
    # The score's gradient is that of log q at a fixed z.
    x = model.data(3)
    z = model.encode(x).sample(4, torch.Generator().manual_seed(0)).detach()
    expected = torch.autograd.grad(model.encode(x).log_prob(z).sum(), model.encoder)
    terms = log_terms(model, x, 4, torch.Generator().manual_seed(0))
    for a, b in zip(torch.autograd.grad(terms.score.sum(), model.encoder), expected):
        torch.testing.assert_close(a, b)


def test_stl_and_dreg_vanish_at_the_exact_encoder(ppca):
    model = ppca()
    terms = log_terms(model, model.data(6), 8)
    for estimator in (stl, dreg, partial(stl, bound=elbo)):
        for gradient in gradients(estimator(terms), model.encoder):
            assert gradient.abs().max() < 1e-12
    assert (
        max(g.abs().max() for g in gradients(pathwise(terms, elbo), model.encoder)) > 0.01
    )  # has only mean zero
    assert max(g.abs().max() for g in gradients(pathwise(terms), model.encoder)) > 0.01
    moved = log_terms(ppca(off=0.1), model.data(6), 8)
    assert moved.path.std() > 0.05


def test_every_estimator_reports_the_bound_and_keeps_the_decoder_right(ppca):
    """The decoder's gradient is that of IWAE with the same noise; the encoder's surrogate would be wrong for it."""
    model = ppca(off=0.2)
    terms = log_terms(model, model.data(3), 5)
    expected = torch.autograd.grad(iwae(terms.weights).mean(), model.decoder, retain_graph=True)[0]
    for estimator in (pathwise, stl, dreg):
        estimate = estimator(terms)
        assert not estimate.bound.requires_grad
        torch.testing.assert_close(estimate.bound, iwae(terms.weights).detach())
        torch.testing.assert_close(gradients(estimate, model.decoder, "decoder")[0], expected)
    assert (gradients(dreg(terms), model.decoder, "encoder")[0] - expected).abs().max() > 0.1  # twin


def test_pathwise_of_any_bound_is_its_own_gradient(ppca):
    model = ppca(off=0.2)
    terms = log_terms(model, model.data(3), 5)
    for bound in (elbo, partial(renyi, alpha=0.5)):
        expected = torch.autograd.grad(bound(terms.weights).mean(), model.encoder, retain_graph=True)
        for a, b in zip(gradients(pathwise(terms, bound), model.encoder), expected):
            torch.testing.assert_close(a, b)


def test_dreg_has_the_mean_of_iwae_and_stl_has_not(ppca, scores):
    """Common noise, 100,000 replicates, K = 5: paired differences within four standard errors of zero."""
    model = ppca(off=0.3)
    terms, leaves = replicated(model, model.data(1), 5, 100_000)
    plain = per_replicate(pathwise(terms).encoder, leaves)
    difference = per_replicate(dreg(terms).encoder, leaves) - plain
    assert scores(difference, 0.0).abs().max() < 4
    biased = per_replicate(stl(terms).encoder, leaves) - plain
    assert scores(biased, 0.0).abs().max() > 20
    wrong = (
        per_replicate((terms.path.detach().softmax(0) * terms.path).sum(0), leaves) - plain
    )  # unsquared: STL
    torch.testing.assert_close(wrong, biased)
    one = per_replicate(stl(terms, elbo).encoder, leaves) - per_replicate(
        pathwise(terms, elbo).encoder, leaves
    )
    assert scores(one, 0.0).abs().max() < 4  # under the ELBO it is unbiased


def test_signal_to_noise_falls_for_iwae_and_grows_for_dreg(ppca):
    """Slope of the encoder's log signal-to-noise in log K: about -1/2 and +1/2. 40,000 replicates, K = 4 to 64.

    From K = 4: below, the asymptotics that give the slopes have not begun. The slopes of two halves of
    the replicates agree within 0.15.
    """
    model = ppca(off=0.3)
    x, R, ladder = model.data(1), 40_000, [4, 8, 16, 32, 64]
    found = {"iwae": [], "dreg": []}
    for K in ladder:
        terms, leaves = replicated(model, x, K, R, seed=K)
        for name, estimator in (("iwae", pathwise), ("dreg", dreg)):
            g = per_replicate(estimator(terms).encoder, leaves)
            halves = [part.mean(0).abs() / g.std(0) for part in g.chunk(2)]
            found[name].append([part.log().mean().item() for part in halves])
    slopes = {name: np.polyfit(np.log(ladder), np.array(values), 1)[0] for name, values in found.items()}
    for name, expected in (("iwae", -0.5), ("dreg", 0.5)):
        assert abs(slopes[name].mean() - expected) < 0.15, slopes
        assert np.ptp(slopes[name]) < 0.15, slopes


# ---------------------------------------------------------------- several stochastic layers


class Affine(nn.Module):
    """Rows of z (and x) to a Gaussian: mean a z + c x + b, one dimension."""

    def __init__(self, a, c, std):
        super().__init__()
        self.a, self.c = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (a, c))
        self.log_std = nn.Parameter(torch.tensor(math.log(std), dtype=torch.float64))

    def forward(self, z, x):
        mean = self.a * z + self.c * x
        return DiagonalGaussian(mean, self.log_std.exp().expand_as(mean))


class TwoLayers:
    """z2 ~ N(0, 1), z1 | z2 ~ N(0.8 z2, 1), x | z1 ~ N(z1, 0.5^2); q goes from x to z1 to z2 and can be exact."""

    def __init__(self, off=0.0):
        s2, a = 0.25, 0.8
        prior = 1 + a * a  # of z1
        gain, left = prior / (prior + s2), prior * s2 / (prior + s2)
        up, up_var = a / prior, 1 / prior  # z2 given z1
        self.first = Affine(0.0, gain + off, math.sqrt(left) * math.exp(off))
        self.second = Affine(up + off, off, math.sqrt(up_var) * math.exp(-off))
        self.encoder = [self.first.c, self.first.log_std, *self.second.parameters()]

    def encode(self, x):
        return Chain(self.first(torch.zeros_like(x), x), [self.second], context=x)

    def log_joint(self, x, z):
        z1, z2 = z
        top = Normal(torch.zeros_like(z2), 1.0).log_prob(z2) + Normal(0.8 * z2, 1.0).log_prob(z1)
        return (top + Normal(z1, 0.5).log_prob(x)).sum(-1)


def test_chain_density_is_the_product_of_its_layers():
    model, x = TwoLayers(off=0.1), torch.tensor([[0.7], [-1.1]], dtype=torch.float64)
    q = model.encode(x)
    z1, z2 = q.sample(3, torch.Generator().manual_seed(0))
    assert z1.shape == z2.shape == (3, 2, 1)
    first, second = model.first, model.second
    direct = Normal(first.c * x, first.log_std.exp()).log_prob(z1)
    direct = direct + Normal(second.a * z1 + second.c * x, second.log_std.exp()).log_prob(z2)
    torch.testing.assert_close(q.log_prob((z1, z2)), direct.sum(-1))
    torch.testing.assert_close(q.stopped().log_prob((z1, z2)), direct.sum(-1))
    with pytest.raises(DataError, match="1 parts; the chain has 2"):
        q.log_prob((z1,))
    with pytest.raises(DataError, match="must be a torch module, not function"):
        Chain(q.first, [lambda z: q.first]).stopped()


def test_two_layers_vanish_at_the_exact_encoder():
    model, x = TwoLayers(), torch.tensor([[0.7], [-1.1]], dtype=torch.float64)
    terms = log_terms(model, x, 6)
    evidence = Normal(torch.zeros_like(x), math.sqrt(1 + 0.64 + 0.25)).log_prob(x)[:, 0]
    torch.testing.assert_close(terms.weights.detach(), evidence.expand(6, -1), atol=1e-10, rtol=0)
    for estimator in (stl, dreg):
        assert max(g.abs().max() for g in gradients(estimator(terms), model.encoder)) < 1e-12
    assert max(g.abs().max() for g in gradients(pathwise(terms), model.encoder)) > 0.01


def test_two_layers_dreg_has_the_mean_of_iwae_and_a_cut_chain_has_not():
    """Blocks of 500 replicates share parameters; 400 blocks. The twin cuts z1 off the density of z2."""
    model = TwoLayers(off=0.3)
    x = torch.full((500, 1), 0.9, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    good, cut = [], []
    for _ in range(400):
        q = model.encode(x)
        z = q.sample(4, g)
        held = q.stopped()
        joint, proposal = model.log_joint(x, z), q.log_prob(z)
        terms = LogTerms(joint, proposal, held.log_prob(z))
        severed = (
            held.first.log_prob(z[0])
            + held.log_prob((z[0].detach(), z[1]))
            - held.first.log_prob(z[0].detach())
        )
        twin = LogTerms(joint, proposal, severed)
        torch.testing.assert_close(twin.stopped, terms.stopped)
        plain = torch.stack(gradients(pathwise(terms), model.encoder))
        good.append(torch.stack(gradients(dreg(terms), model.encoder)) - plain)
        cut.append(torch.stack(gradients(dreg(twin), model.encoder)) - plain)
    z_score = [torch.stack(d).mean(0) / (torch.stack(d).std(0) / 20) for d in (good, cut)]
    assert z_score[0].abs().max() < 4, z_score[0]
    assert z_score[1].abs().max() > 20, z_score[1]


# ---------------------------------------------------------------- backward


def test_backward_gives_each_group_its_own_surrogate(ppca):
    model = ppca(off=0.2)
    for estimator in (pathwise, stl, dreg):
        estimate = estimator(log_terms(model, model.data(3), 5))
        expected = [
            *gradients(estimate, model.decoder, "decoder"),
            *gradients(estimate, model.encoder, "encoder"),
        ]
        for p in (*model.decoder, *model.encoder):
            p.grad = torch.ones_like(p)  # what is there is added to
        backward(estimate, model.decoder, model.encoder)
        for p, g in zip((*model.decoder, *model.encoder), expected):
            torch.testing.assert_close(p.grad, 1.0 - g)


def test_backward_of_one_group_only(ppca):
    model = ppca(off=0.2)
    backward(dreg(log_terms(model, model.data(3), 5)), [], model.encoder)
    assert model.W.grad is None and model.A.grad is not None
    backward(dreg(log_terms(model, model.data(3), 5)), model.decoder, [])
    assert model.W.grad is not None
    with pytest.raises(OptionError, match="in both groups"):
        backward(dreg(log_terms(model, model.data(3), 5)), model.decoder, model.decoder)


def test_backward_refuses_what_would_train_nothing(ppca):
    model = ppca(off=0.2)
    with torch.no_grad():
        blind = dreg(log_terms(model, model.data(3), 5))
    with pytest.raises(
        OptionError, match=r"decoder's surrogate has no gradient. Was it made under torch.no_grad"
    ):
        backward(blind, model.decoder, model.encoder)
    with pytest.raises(OptionError, match="Tensor 1 of the encoder's parameters has requires_grad=False"):
        backward(dreg(log_terms(model, model.data(3), 5)), [], [model.A, model.b.detach()])
    with pytest.raises(OptionError, match="encoder's surrogate depends on none of the encoder's parameters"):
        backward(dreg(log_terms(model, model.data(3), 5)), [], ppca().encoder)
    p = torch.zeros(2, requires_grad=True)  # one of several that is not used is no error
    backward(dreg(log_terms(model, model.data(3), 5)), [], [*model.encoder, p])
    assert p.grad is None and model.A.grad is not None


def test_reparameterised_estimators_refuse_discrete_latents():
    """They would leave the encoder where it is, without a word."""
    logits, theta = torch.zeros(3, 2, requires_grad=True), torch.ones(2, requires_grad=True)

    class Bits:
        def encode(self, x):
            return Bernoulli(logits)

        def log_joint(self, x, z):
            return -(x[:, 0] - (z * theta).sum(-1)).square()

    for estimator in (stl, dreg):
        with pytest.raises(OptionError, match="Discrete latents need an estimator of score.py"):
            backward(estimator(log_terms(Bits(), torch.ones(3, 1), 4)), [theta], [logits])
    backward(vimco(log_terms(Bits(), torch.ones(3, 1), 4)), [theta], [logits])
    assert logits.grad.abs().sum() > 0


def test_a_proposal_that_is_another_at_every_call_is_refused():
    """Dropout in a layer of a Chain: the density would not be that which z was drawn from."""

    class Dropped(Affine):
        def forward(self, z, x):
            return super().forward(nn.functional.dropout(z, 0.5, self.training), x)

    model, x = TwoLayers(off=0.1), torch.ones(50, 1, dtype=torch.float64)
    model.second = Dropped(0.3, 0.1, 0.5)
    with pytest.raises(DataError, match=r"log q of sample \d of datum \d+ is .* Is there dropout in a layer"):
        log_terms(model, x, 4)
    model.second.eval()
    assert dreg(log_terms(model, x, 4)).bound.isfinite().all()


def test_a_model_whose_distributions_refuse_the_data_is_named(ppca):
    """torch.distributions raises ValueError; it becomes a DataError that says whose, wherever the model is asked."""

    class Counts(ppca):
        def encode(self, x):
            return super().encode(x.nan_to_num())

        def log_joint(self, x, z):
            fit = Poisson((z @ self.W.T).exp()).log_prob(x)
            return fit.sum(-1) + Normal(0.0, 1.0).log_prob(z).sum(-1)

    model = Counts(off=0.1)
    x = torch.ones(4, 5, dtype=torch.float64)
    assert iwae(log_terms(model, x, 3).weights).isfinite().all()
    calls = (
        lambda: log_terms(model, x, 3),
        lambda: log_weights(model, x, 3),
        lambda: log_likelihood(model, x, 3),
        lambda: annealed_importance(model, x, 3, 2, 2),
    )
    x[2, 1] = -1.0
    for call in calls:
        with pytest.raises(
            DataError, match="model.log_joint refused its values. Is a datum outside .* Poisson"
        ):
            call()
    x[2, 1] = math.nan
    for call in calls:
        with pytest.raises(DataError, match="Row 2 of the data is not finite"):
            call()


def test_ascent_with_dreg_reaches_the_evidence(ppca):
    """Training any torch module by the surrogates: the encoder finds the posterior of a fixed decoder."""
    model = ppca(off=0.3)
    x = model.data(64)
    start = (model.evidence(x) - iwae(log_terms(model, x, 8).weights)).mean().item()
    optimiser = torch.optim.Adam(model.encoder, lr=0.02)
    g = torch.Generator().manual_seed(0)
    for _ in range(300):
        optimiser.zero_grad()
        backward(dreg(log_terms(model, x, 8, g)), [], model.encoder)
        optimiser.step()
    gap = (model.evidence(x) - elbo(log_terms(model, x, 8).weights)).mean().item()
    assert start > 0.05 and 0 <= gap < 1e-3


def test_a_sample_of_weight_zero_leaves_gradients_finite(ppca):
    class Cut(ppca):
        """A prior that is zero for positive z."""

        def log_joint(self, x, z):
            return torch.where((z > 0).any(-1), -math.inf, super().log_joint(x, z))

    model = Cut(off=0.1)
    x = -model.data(1, seed=4).abs()
    terms = log_terms(model, x, 64)
    assert (terms.joint == -math.inf).any() and terms.joint.isfinite().any()
    for estimator in (pathwise, stl, dreg):
        backward(estimator(terms), [], model.encoder)
        assert all(p.grad.isfinite().all() for p in model.encoder)
        terms = log_terms(model, x, 64)


def test_estimate_is_per_datum(ppca):
    """Batch of two = two singles, in value and in gradient, with the same noise."""
    model = ppca(off=0.2)
    x = model.data(2)
    terms = log_terms(model, x, 5)
    for estimator in (pathwise, stl, dreg):
        whole = estimator(terms)
        assert isinstance(whole, Estimate)
        for b in range(2):
            alone = estimator(LogTerms(*(t[:, b : b + 1] for t in terms)))
            torch.testing.assert_close(alone.bound, whole.bound[b : b + 1])
            for a, c in zip(
                torch.autograd.grad(alone.encoder.sum(), model.encoder, retain_graph=True),
                torch.autograd.grad(whole.encoder[b], model.encoder, retain_graph=True),
            ):
                torch.testing.assert_close(a, c)


def test_float32_and_devices(ppca, device):
    model = ppca(off=0.2, dtype=torch.float32, device=device)
    x = model.data(4)
    generator = torch.Generator(device=device).manual_seed(0)
    estimate = dreg(log_terms(model, x, 5, generator))
    backward(estimate, model.decoder, model.encoder)
    assert estimate.bound.dtype == torch.float32 and estimate.bound.device.type == device.type
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.encoder)
