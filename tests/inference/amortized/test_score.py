"""Score-function estimators against enumeration of every draw, with biased twins that the same test rejects."""

import math

import pytest
import torch
from torch.distributions import Normal

from fspace.errors import DataError, NumericalError, OptionError
from fspace.inference.amortized import (
    Bernoulli,
    BinaryConcrete,
    Concrete,
    LogTerms,
    backward,
    elbo,
    iwae,
    log_terms,
    pathwise,
    reinforce,
    reinforce_loo,
    stl,
    straight_through,
    vimco,
    wake_sleep,
    wake_wake,
)
from fspace.inference.amortized.score import leave_one_out

R = 50_000


def drawn(enumerable, estimator, K, **options):
    """Encoder and decoder gradients of R replicates, [R, ...] each, and the reported bounds."""
    model = enumerable.replicates(R)
    estimate = estimator(log_terms(model, model.x, K, torch.Generator().manual_seed(K)), **options)
    phi = torch.autograd.grad(estimate.encoder.sum(), model.logits, retain_graph=True)[0]
    return phi, torch.autograd.grad(estimate.decoder.sum(), model.theta)[0], estimate.bound


@pytest.mark.parametrize(
    ("estimator", "K", "objective"),
    [
        (reinforce, 1, iwae),
        (reinforce, 2, iwae),
        (reinforce, 3, iwae),
        (vimco, 2, iwae),
        (vimco, 3, iwae),
        (reinforce_loo, 2, elbo),
        (reinforce_loo, 3, elbo),
    ],
)
def test_unbiased_by_enumeration(enumerable, scores, estimator, K, objective):
    phi, theta, bound = drawn(enumerable, estimator, K)
    true_phi, true_theta = enumerable.exact(K, objective)
    assert scores(phi, true_phi).abs().max() < 4
    assert scores(theta, true_theta).abs().max() < 4
    assert not bound.requires_grad
    # Twin: the objective of another number of samples is another gradient, and this test sees it.
    if objective is iwae:
        assert scores(phi, enumerable.exact(1 if K > 1 else 3)[0]).abs().max() > 6


def test_a_baseline_lowers_the_variance_and_leaves_the_mean(enumerable, scores):
    """A variance of 50,000 replicates has a standard error near 1%."""
    plain, _, bound = drawn(enumerable, reinforce, 2)
    based, _, _ = drawn(enumerable, reinforce, 2, baseline=torch.full((R,), bound.mean().item()).double())
    truth = enumerable.exact(2)[0]
    assert scores(based, truth).abs().max() < 4
    assert based.var(0).sum() < 0.9 * plain.var(0).sum()
    assert drawn(enumerable, vimco, 2)[0].var(0).sum() < 0.9 * plain.var(0).sum()


@pytest.mark.parametrize("through", [False, True], ids=["concrete", "straight-through"])
def test_concrete_and_straight_through_are_biased(enumerable, scores, through):
    """The same test rejects them: relaxed samples, or hard ones with relaxed gradients, in the discrete densities."""
    model = enumerable.replicates(R)
    kind = BinaryConcrete if enumerable.kind == "binary" else Concrete
    q = kind(model.logits, 1.0)
    y = q.sample(1, torch.Generator().manual_seed(0))
    b = straight_through(q.relaxed(y), q.hard(y)) if through else q.relaxed(y)
    if enumerable.kind == "binary":
        log_q = (b * model.logits - torch.nn.functional.softplus(model.logits)).sum(-1)
    else:
        log_q = (b * model.logits.log_softmax(-1)).sum((-1, -2))
    value = enumerable.log_joint_with(model.theta, b) - log_q
    phi = torch.autograd.grad(value.sum(), model.logits)[0]
    assert scores(phi, enumerable.exact(1)[0]).abs().max() > 20


def test_pathwise_and_stl_lose_the_gradient_of_discrete_latents(enumerable, scores):
    for estimator in (pathwise, stl):
        model = enumerable.replicates(2000)
        encoder = estimator(log_terms(model, model.x, 3)).encoder
        if estimator is pathwise:
            phi = torch.autograd.grad(encoder.sum(), model.logits)[0]
            assert scores(phi, enumerable.exact(3)[0]).abs().max() > 8
        else:  # z has no gradient at all
            assert torch.autograd.grad(encoder.sum(), model.logits, allow_unused=True)[0] is None


def test_leave_one_out_is_the_bound_with_a_geometric_mean_in_its_place():
    lw = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = leave_one_out(lw)
    for k in range(4):
        replaced = lw.clone()
        replaced[k] = torch.cat([lw[:k], lw[k + 1 :]]).exp().prod(0).pow(1 / 3).log()
        torch.testing.assert_close(found[k], iwae(replaced))
    far = leave_one_out(torch.tensor([[900.0], [-900.0], [0.0]], dtype=torch.float64))  # by hand
    torch.testing.assert_close(far[:, 0], torch.tensor([0.0, 900.0, 900.0]).double() - math.log(3))


def test_wake_wake_goes_down_the_forward_divergence(enumerable, scores):
    """With many samples, the encoder's gradient is minus that of KL(p(z | x) || q), by enumeration."""
    logits = enumerable.logits.clone().requires_grad_()
    log_q = enumerable.proposal(logits[None]).log_prob(enumerable.states[:, None])[:, 0]
    posterior = enumerable.log_joint_with(enumerable.theta, enumerable.states).softmax(0)
    truth = torch.autograd.grad((posterior * log_q).sum(), logits)[0]
    model = enumerable.replicates(1000)
    estimate = wake_wake(log_terms(model, model.x, 1000, torch.Generator().manual_seed(0)))
    phi = torch.autograd.grad(estimate.encoder.sum(), model.logits, retain_graph=True)[0]
    torch.testing.assert_close(phi.mean(0), truth, atol=0.01, rtol=0)
    assert (phi.mean(0) - enumerable.exact(1)[0]).abs().max() > 0.05  # twin: the ELBO's is another
    theta = torch.autograd.grad(estimate.decoder.sum(), model.theta)[0]
    leaf = enumerable.theta.clone().requires_grad_()
    evidence = enumerable.log_joint_with(leaf, enumerable.states).logsumexp(0)
    torch.testing.assert_close(theta.mean(0), torch.autograd.grad(evidence, leaf)[0], atol=0.01, rtol=0)


def test_wake_sleep_learns_from_dreams(enumerable):
    """The encoder's surrogate is log q(z' | x'), the decoder's is IWAE."""
    model = enumerable.replicates(8)
    terms = log_terms(model, model.x, 3)
    z = enumerable.states[[0, 1, 2, 3, 3, 2, 1, 0]]
    dreams = enumerable.proposal(model.logits).log_prob(z[None])[0]
    estimate = wake_sleep(terms, dreams)
    phi = torch.autograd.grad(estimate.encoder.mean(), model.logits, retain_graph=True)[0]
    torch.testing.assert_close(phi, torch.autograd.grad(dreams.mean(), model.logits, retain_graph=True)[0])
    torch.testing.assert_close(estimate.bound, iwae(terms.weights).detach())
    with pytest.raises(NumericalError, match=r"dreams\[0\] is nan"):
        wake_sleep(terms, torch.full((3,), math.nan).double())


def test_estimators_for_discrete_latents_take_gaussians_too(ppca, scores):
    """REINFORCE and VIMCO of a Gaussian agree in mean with the pathwise gradient: blocks of 200, 300 of them."""
    model = ppca(off=0.2)
    x = model.data(1).expand(200, -1)
    g = torch.Generator().manual_seed(0)
    for estimator, bound in ((reinforce, iwae), (vimco, iwae), (reinforce_loo, elbo)):
        differences = []
        for _ in range(300):
            terms = log_terms(model, x, 3, g)
            pair = [e.encoder.mean() for e in (estimator(terms), pathwise(terms, bound))]
            parts = [torch.autograd.grad(s, [model.b, model.log_std], retain_graph=True) for s in pair]
            differences.append(torch.cat(parts[0]) - torch.cat(parts[1]))
        assert scores(torch.stack(differences), 0.0).abs().max() < 4


def test_training_discrete_latents_reaches_the_posterior(enumerable):
    """VIMCO by `backward`, any optimiser: the ELBO of the fitted q is close to the best, found by exact gradients."""

    def exact_elbo(logits):
        log_q = enumerable.proposal(logits[None]).log_prob(enumerable.states[:, None])[:, 0]
        return (log_q.exp() * (enumerable.log_joint_with(enumerable.theta, enumerable.states) - log_q)).sum()

    def climb(step):
        logits = enumerable.logits.clone().requires_grad_()
        optimiser = torch.optim.Adam([logits], lr=0.03)
        for _ in range(400):
            optimiser.zero_grad()
            step(logits)
            optimiser.step()
        return exact_elbo(logits).item()

    g = torch.Generator().manual_seed(0)

    class Shared:
        def __init__(self, logits):
            self.logits = logits

        def encode(self, x):
            return enumerable.proposal(self.logits.expand(len(x), *self.logits.shape))

        def log_joint(self, x, b):
            return enumerable.log_joint_with(enumerable.theta, b)

    def by_samples(logits):
        x = torch.zeros(50, 1, dtype=torch.float64)
        backward(reinforce_loo(log_terms(Shared(logits), x, 4, g)), [], [logits])

    best = climb(lambda logits: (-exact_elbo(logits)).backward())
    assert best - exact_elbo(enumerable.logits).item() > 0.3
    assert best - climb(by_samples) < 0.02


def test_batch_of_two_is_two_singles(enumerable):
    model = enumerable.replicates(2)
    terms = log_terms(model, model.x, 3)
    for estimator in (reinforce, reinforce_loo, vimco, wake_wake):
        whole = estimator(terms)
        for b in range(2):
            alone = estimator(LogTerms(*(t[:, b : b + 1] for t in terms)))
            torch.testing.assert_close(alone.bound, whole.bound[b : b + 1])
            pair = [
                torch.autograd.grad(s, model.logits, retain_graph=True)[0][b]
                for s in (alone.encoder.sum(), whole.encoder[b])
            ]
            torch.testing.assert_close(pair[0], pair[1])


def test_refusals(enumerable):
    model = enumerable.replicates(2)
    single = log_terms(model, model.x, 1)
    for estimator in (vimco, reinforce_loo):
        with pytest.raises(OptionError, match=f"{estimator.__name__} needs at least two samples"):
            estimator(single)
    terms = log_terms(model, model.x, 3)
    with pytest.raises(DataError, match="baseline has shape"):
        reinforce(terms, torch.zeros(3, 2))
    with pytest.raises(NumericalError, match=r"baseline\[1\] is inf"):
        reinforce(terms, torch.tensor([0.0, math.inf]).double())
    for wrong in (torch.zeros(3, 2), torch.tensor(0.0), torch.zeros(0)):
        with pytest.raises(DataError, match=r"dreams must be log q of one pair or more, \[S\]"):
            wake_sleep(terms, wrong)
    for value, what in ((math.nan, "NaN"), (-math.inf, "-inf")):
        joint = terms.joint.detach().clone()
        joint[1, 1] = value
        bad = LogTerms(joint, terms.proposal, terms.stopped)
        for estimator in (vimco, reinforce_loo):
            with pytest.raises(NumericalError, match=rf"\[1, 1\] is {what}.*sample 1 of datum 1"):
                estimator(bad)
    # One weight of zero is no obstacle where no mean of log-weights is taken.
    for estimator in (reinforce, wake_wake):
        assert torch.autograd.grad(estimator(bad).encoder.sum(), model.logits)[0].isfinite().all()
        bad = LogTerms(joint, *log_terms(model, model.x, 3)[1:])


def test_float32_and_devices(device):
    class Tiny:
        def __init__(self):
            self.logits = torch.zeros(4, 3, device=device, requires_grad=True)

        def encode(self, x):
            return Bernoulli(self.logits)

        def log_joint(self, x, b):
            return Normal(b.sum(-1), 1.0).log_prob(x[:, 0])

    model = Tiny()
    generator = torch.Generator(device=device).manual_seed(0)
    estimate = vimco(log_terms(model, torch.ones(4, 1, device=device), 5, generator))
    backward(estimate, [], [model.logits])
    assert model.logits.grad.dtype == torch.float32 and model.logits.grad.isfinite().all()
