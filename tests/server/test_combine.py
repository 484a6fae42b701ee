"""Sites of other bases and products of experts: against dense algebra, exact regression and closed forms."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from gpytorch.kernels import LinearKernel, MaternKernel, RBFKernel, ScaleKernel

from fspace.errors import DataError, FspaceError, NumericalError, OptionError, ServerError, SiteRefused
from fspace.inference.basis import Basis
from fspace.inference.collapsed import fit_site, log_evidence
from fspace.inference.gp import GPPosterior
from fspace.inference.inducing import greedy_variance
from fspace.inference.likelihoods import BernoulliLikelihood, PoissonLikelihood, with_offset
from fspace.inference.nongaussian import posterior_of
from fspace.inference.optimise import gaussian_likelihood
from fspace.inference.sites import converge
from fspace.kernels.deep import DeepKernel
from fspace.server import PointwisePosterior, PosteriorServer, WeightBasis, combine, lift, put_lifted
from fspace.server.core import unit_scaling

F64 = torch.float64


def kernel(lengthscale=0.5, scale=1.0, base=RBFKernel, d=1):
    made = ScaleKernel(base(ard_num_dims=d)).double()
    made.base_kernel.lengthscale, made.outputscale = (
        torch.tensor(v, dtype=F64) for v in (lengthscale, scale)
    )
    return made.requires_grad_(False)


def likelihood(noise=0.04, outputs=1):
    made = gaussian_likelihood(outputs, noise, torch.device("cpu"))
    made.noise = torch.full((outputs, 1), noise, dtype=F64)
    return made.requires_grad_(False)


def rows(n, seed=0, outputs=1, width=5.0):
    g = torch.Generator().manual_seed(seed)
    x = width * torch.rand(n, 1, generator=g, dtype=F64)
    f = torch.cat([torch.sin(2 * x + t) for t in range(outputs)], dim=1)
    return x, f + 0.2 * torch.randn(n, outputs, generator=g, dtype=F64)


def expert(basis, x, y):
    """The part that rows make."""
    return basis, fit_site(basis, x, y)


def exact_part(k, x, y, noise=0.04):
    """A part whose inducing inputs are its rows: exact regression."""
    return expert(Basis(k, x, likelihood(noise, y.shape[1])), x, y)


def exact(k, x, y, at, noise=0.04):
    """Mean [n, t] and variance [n] of exact regression with plain inverses, in numpy."""
    gram = lambda a, b: k(a, b).to_dense().detach().numpy()  # noqa: E731
    inner = np.linalg.inv(gram(x, x) + noise * np.eye(len(x)))
    cross = gram(at, x)
    return cross @ inner @ y.numpy(), np.diag(gram(at, at)) - np.sum(cross @ inner * cross, axis=1)


def moments(posterior, at):
    latent = posterior.latent(at)
    return latent.mean, latent.variance


def assert_same_posterior(one, other, at, tolerance=1e-8):
    for a, b in zip(moments(one, at), moments(other, at)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def nlpd(posterior, x, y):
    return -posterior.observed(x).log_prob(y).mean().item()


# -- lifting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["after", "before", "between"])
def test_nothing_is_lost_where_the_target_holds_all_inducing_inputs(gaussian, order):
    basis, site = expert(gaussian.basis, gaussian.x, gaussian.y)
    more = gaussian.x[100:120]
    z = torch.cat([basis.inducing_inputs, more])
    if order == "before":
        z = torch.cat([more, basis.inducing_inputs])
    if order == "between":
        z = z[torch.randperm(len(z), generator=torch.Generator().manual_seed(0))]
    target = replace(basis, inducing_inputs=z)
    lifted = lift(site, basis, target)
    assert lifted.site.basis_id == target.id
    assert lifted.site.count == 400
    assert (lifted.lost, lifted.trace, lifted.kernel_gap) == pytest.approx((0, 0, 0), abs=1e-8)
    assert log_evidence([lifted.site]) == pytest.approx(log_evidence([site]), abs=1e-8)
    before, after = (GPPosterior(b, s, unit_scaling(b)) for b, s in ((basis, site), (target, lifted.site)))
    assert_same_posterior(after, before, gaussian.x[200:230])


def test_lifting_to_a_grown_basis_is_padding(gaussian):
    basis, site = expert(gaussian.basis, gaussian.x, gaussian.y)
    target = basis.grown(gaussian.x[100:110])
    found, padded = lift(site, basis, target).site, site.padded(target)
    scale = site.precision.abs().max().item()
    torch.testing.assert_close(found.precision, padded.precision, rtol=0, atol=1e-10 * scale)
    torch.testing.assert_close(found.shift, padded.shift, rtol=0, atol=1e-10 * scale)


def test_nothing_is_lost_where_the_kernel_matrix_needs_its_jitter():
    """The jitter belongs to the values that both bases share; the twin, which leaves it out, does lose."""
    x, y = rows(300)
    k = kernel(0.5)
    own = Basis(k, x[:25], likelihood())
    target = Basis(k, x[:50].flip(0), own.likelihood)
    assert torch.linalg.cond(k(own.inducing_inputs).to_dense()) > 1e10
    site = fit_site(own, x, y)
    lifted = lift(site, own, target)
    assert lifted.lost == pytest.approx(0, abs=1e-5)
    assert log_evidence([lifted.site]) == pytest.approx(log_evidence([site]), abs=1e-4)
    bare = torch.linalg.solve_triangular(
        target.factor, k(target.inducing_inputs, own.inducing_inputs).to_dense(), upper=False
    ).mT
    across = torch.linalg.solve_triangular(own.factor, bare, upper=False)
    eye = torch.eye(25, dtype=F64)
    twin = 0.5 * (site.precision[0] * (eye - across @ across.mT)).sum().item()
    assert abs(lifted.trace) < 1e-4 and twin > 0.5


def test_the_same_basis_is_the_identity(gaussian):
    basis, site = expert(gaussian.basis, gaussian.x, gaussian.y)
    lifted = lift(site, basis, replace(basis, inducing_inputs=basis.inducing_inputs.clone()))
    assert lifted.site is site
    assert (lifted.lost, lifted.trace, lifted.kernel_gap) == (0.0, 0.0, 0.0)


def test_a_lifted_site_is_that_of_the_dense_formulas():
    """Another kernel and fewer inducing inputs, in unwhitened coordinates with plain inverses (numpy)."""
    x, y = rows(80, outputs=2)
    own = Basis(kernel(0.5, 1.2, MaternKernel), x[:12], likelihood(0.04, 2))
    target = Basis(
        kernel(0.8, 0.9, MaternKernel), torch.linspace(0.2, 4.8, 7, dtype=F64)[:, None], own.likelihood
    )
    site = fit_site(own, x, y)
    lifted = lift(site, own, target)

    inverse_own = np.linalg.inv(own.factor.numpy())
    gram = lambda a, b: target.kernel(a, b).to_dense().numpy()  # noqa: E731
    z, u = own.inducing_inputs, target.inducing_inputs
    kuu, kau, kaa = (gram(*pair) for pair in ((u, u), (z, u), (z, z)))
    kuu, kaa = (m + 1e-10 * 0.9 * np.eye(len(m)) for m in (kuu, kaa))  # the jitter is part of the values
    a = kau @ np.linalg.inv(kuu)
    evidence, lost, information, trace = 0.0, 0.0, 0.0, 0.0
    for t in range(2):
        precision = inverse_own.T @ site.precision[t].numpy() @ inverse_own  # T of the notes, in the values a
        shift = inverse_own.T @ site.shift[t].numpy()
        inner = np.linalg.inv(kuu) + a.T @ precision @ a
        mean = np.linalg.solve(inner, a.T @ shift)
        at = torch.linspace(0, 5, 9, dtype=F64)[:, None]
        weights = gram(at, u) @ np.linalg.inv(kuu)
        variance = np.diag(gram(at, at) - weights @ gram(u, at) + weights @ np.linalg.inv(inner) @ weights.T)
        found = GPPosterior(target, lifted.site, unit_scaling(target)).latent(at)
        np.testing.assert_allclose(found.mean[:, t], weights @ mean, rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(found.variance[:, t], variance, rtol=1e-6, atol=1e-7)
        own_trace = 0.5 * np.trace(precision @ (kaa - a @ kau.T))
        trace += own_trace
        _, logdet = np.linalg.slogdet(kuu @ inner)
        evidence += site.log_scale[t].item() - own_trace - 0.5 * logdet + 0.5 * shift @ a @ mean
        information += 0.5 * np.linalg.slogdet(np.eye(12) + kaa @ precision)[1]
        lost += 0.5 * np.linalg.slogdet(np.eye(12) + kaa @ precision)[1] - 0.5 * logdet
    assert log_evidence([lifted.site]) == pytest.approx(evidence, abs=1e-5)
    assert (lifted.information, lifted.lost, lifted.trace) == pytest.approx(
        (information, lost, trace), rel=1e-6
    )


def test_what_is_lost_falls_as_targets_grow():
    x, y = rows(200)
    own = Basis(kernel(0.4), x[:15], likelihood())
    site = fit_site(own, x, y)
    found = [lift(site, own, replace(own, inducing_inputs=x[20 : 20 + m])) for m in (1, 2, 4, 8, 16, 32)]
    found.append(lift(site, own, replace(own, inducing_inputs=torch.cat([x[20:52], x[:15]]))))
    lost = [each.lost for each in found]
    trace = [each.trace for each in found]
    evidence = [log_evidence([each.site]) for each in found]
    assert lost == sorted(lost, reverse=True)
    assert trace == sorted(trace, reverse=True)
    assert evidence == sorted(evidence)
    assert lost[0] > 10 and lost[-1] == pytest.approx(0, abs=1e-6)
    assert all(-1e-6 < a <= b + 1e-6 for a, b in zip(lost, trace))


def test_the_evidence_of_a_lifted_site_is_a_bound():
    """The twin, which keeps the site's constant as it was, claims more than the evidence."""
    x, y = rows(60, seed=3)
    k, noise = kernel(0.4), 0.04
    gram = k(x, x).to_dense().numpy() + noise * np.eye(60)
    truth = -0.5 * (y[:, 0].numpy() @ np.linalg.solve(gram, y[:, 0].numpy()))
    truth += -0.5 * np.linalg.slogdet(gram)[1] - 30 * math.log(2 * math.pi)
    own, target = Basis(k, x[:12], likelihood(noise)), Basis(k, x[12:18], likelihood(noise))
    site = fit_site(own, x, y)
    lifted = lift(site, own, target).site
    assert log_evidence([lifted]) < log_evidence([site]) < truth
    exact_own, own_site = exact_part(k, x, y)
    flat = lift(own_site, exact_own, target)
    assert log_evidence([flat.site]) < truth == pytest.approx(log_evidence([own_site]), abs=1e-6)
    constant = replace(flat.site, log_scale=own_site.log_scale)
    calm = np.zeros(60)  # y = 0 fits any basis: what is left of the bound are determinants and the constant
    zero = exact_part(k, x, torch.zeros(60, 1, dtype=F64))[1]
    lifted_zero = lift(zero, exact_own, target).site
    truth_zero = -0.5 * np.linalg.slogdet(gram)[1] - 30 * math.log(2 * math.pi) - calm.sum()
    assert log_evidence([lifted_zero]) < truth_zero
    assert log_evidence([replace(lifted_zero, log_scale=zero.log_scale)]) > truth_zero
    assert log_evidence([constant]) > log_evidence([flat.site])


def test_the_shortfall_is_what_the_evidence_lacks_on_average():
    """The mean over y of log evidence minus bound, exactly, lies between once and twice the shortfall."""
    x, _ = rows(50, seed=4)
    k, noise = kernel(0.6), 0.04
    own, target = Basis(k, x[:9], likelihood(noise)), Basis(k, x[9:15], likelihood(noise))
    site = fit_site(own, x, torch.zeros(50, 1, dtype=F64))
    lifted = lift(site, own, target)
    gram = k(x, x).to_dense().numpy()
    # the bound is log N(y; 0, Q + noise) minus the shortfall, with Q through both sets of inducing values
    a = np.linalg.solve(own.factor.numpy(), k(own.inducing_inputs, x).to_dense().numpy())
    b = np.linalg.solve(
        target.factor.numpy(), k(target.inducing_inputs, own.inducing_inputs).to_dense().numpy()
    )
    q = a.T @ np.linalg.solve(own.factor.numpy(), b.T)
    first, second = gram + noise * np.eye(50), q @ q.T + noise * np.eye(50)
    logdet = lambda m: np.linalg.slogdet(m)[1]  # noqa: E731
    lacking = 0.5 * (np.trace(np.linalg.solve(second, first)) - 50 + logdet(second) - logdet(first))
    lacking += lifted.unexplained + lifted.trace
    assert lifted.unexplained > 1 and lifted.trace > 1
    assert 50 * lifted.shortfall <= lacking <= 2 * 50 * lifted.shortfall
    assert lacking > 2 * lifted.unexplained  # the twin: the site's own part alone would not do


def test_what_own_inducing_inputs_left_open_is_read_off_the_site():
    x, y = rows(120, outputs=2)
    basis = Basis(kernel(0.3, 1.7), x[:10], likelihood(0.04, 2))
    basis.likelihood.noise = torch.tensor([[0.04], [0.09]], dtype=F64)
    site = fit_site(basis, x, y)
    left = 1.7 - basis.whiten(x).square().sum(0)
    expected = 0.5 * sum((left / noise).sum().item() for noise in (0.04, 0.09))
    assert lift(site, basis, basis).unexplained == pytest.approx(expected, rel=1e-9)
    linear = Basis(ScaleKernel(LinearKernel()).double().requires_grad_(False), x[:2], likelihood())
    assert lift(fit_site(linear, x, y[:, :1]), linear, linear).unexplained is None
    assert lift(site, basis, basis).shortfall == pytest.approx(
        expected / 240, rel=1e-9
    )  # 120 rows of 2 outputs
    twice = replace(site, precision=40 * site.precision)  # more than its count of rows can have said
    assert lift(twice, basis, basis).unexplained is None


def test_another_kernel_is_exact_where_the_site_is_at_its_rows():
    """The site then is the likelihood itself, and the target's posterior that of exact regression with its kernel."""
    x, y = rows(40)
    own, site = exact_part(kernel(0.3, base=MaternKernel), x, y)
    other = kernel(1.1, 2.0, base=MaternKernel)
    target = Basis(other, torch.cat([x, x[:1] + 7]), likelihood())
    lifted = lift(site, own, target)
    at = torch.linspace(-1, 6, 30, dtype=F64)[:, None]
    mean, variance = exact(other, x, y, at)
    found = GPPosterior(target, lifted.site, unit_scaling(target)).latent(at)
    np.testing.assert_allclose(found.mean, mean[:, 0], atol=1e-6)
    np.testing.assert_allclose(found.variance, variance, atol=1e-6)
    assert lifted.kernel_gap > 0.1


def test_the_kernel_gap_grows_with_the_difference_and_so_does_the_error():
    x, y = rows(400, seed=5)
    at = torch.linspace(0, 5, 50, dtype=F64)[:, None]
    own = Basis(kernel(0.5, base=MaternKernel), torch.linspace(0, 5, 14, dtype=F64)[:, None], likelihood())
    site = fit_site(own, x, y)
    gaps, errors = [], []
    for lengthscale in (0.5, 0.7, 1.0, 2.0):
        target = replace(own, kernel=kernel(lengthscale, base=MaternKernel))
        lifted = lift(site, own, target)
        made = fit_site(target, x, y)
        one, other = (GPPosterior(target, s, unit_scaling(target)) for s in (lifted.site, made))
        gaps.append(lifted.kernel_gap)
        errors.append((moments(one, at)[0] - moments(other, at)[0]).abs().max().item())
    assert gaps == sorted(gaps) and gaps[0] == 0.0
    assert errors == sorted(errors) and errors[0] == pytest.approx(0, abs=1e-8) and errors[1] > 1e-4


def test_the_kernel_gap_is_a_divergence():
    """Of the dense posteriors over the values at the inducing inputs, in numpy."""
    x, y = rows(30)
    own, site = exact_part(kernel(0.4, base=MaternKernel), x[:8], y[:8])
    other = kernel(0.9, 1.5, base=MaternKernel)
    lifted = lift(site, own, replace(own, kernel=other))
    z = own.inducing_inputs

    def posterior(k):
        gram = k(z, z).to_dense().numpy()
        weights = gram @ np.linalg.inv(gram + 0.04 * np.eye(8))
        return weights @ y[:8, 0].numpy(), gram - weights @ gram

    (m1, s1), (m2, s2) = posterior(other), posterior(own.kernel)
    kl = np.trace(np.linalg.solve(s2, s1)) - 8 + (m2 - m1) @ np.linalg.solve(s2, m2 - m1)
    kl = 0.5 * (kl + np.linalg.slogdet(s2)[1] - np.linalg.slogdet(s1)[1])
    assert lifted.kernel_gap == pytest.approx(kl, rel=1e-5)


def test_lift_on_the_device(gaussian, device):
    basis = Basis(
        gaussian.basis.kernel.to(device), gaussian.x[:30].to(device), gaussian.basis.likelihood.to(device)
    )
    site = fit_site(basis, gaussian.x.to(device), gaussian.y.to(device))
    lifted = lift(site, basis, basis.grown(gaussian.x[50:60].to(device)))
    assert lifted.site.shift.device.type == device.type
    assert lifted.trace == pytest.approx(0, abs=1e-7)


def test_lift_refuses(gaussian, binary):
    basis, site = expert(gaussian.basis, gaussian.x, gaussian.y)
    other = replace(basis, inducing_inputs=basis.inducing_inputs + 1)
    with pytest.raises(OptionError, match="belongs to basis"):
        lift(site, other, basis)
    with pytest.raises(OptionError, match="must be of one kind"):
        lift(site, basis, binary.basis)
    one = replace(basis, likelihood=likelihood(0.04, 1))
    with pytest.raises(OptionError, match="about 2 functions"):
        lift(site, basis, one)
    with pytest.raises(SiteRefused, match="NaN"):
        lift(replace(site, shift=site.shift * math.nan), basis, other)
    wide = Basis(kernel(d=3), torch.randn(4, 3, dtype=F64), basis.likelihood)
    with pytest.raises(OptionError, match="embedding"):
        lift(site, basis, wide)
    deep = [DeepKernel(torch.nn.Linear(2, 2), kernel(d=2)).eval().requires_grad_(False) for _ in range(2)]
    first, second = (Basis(k, basis.inducing_inputs, basis.likelihood) for k in deep)
    deep_site = replace(site, basis_id=first.id)
    with pytest.raises(OptionError, match="not the network"):
        lift(deep_site, first, second)
    assert lift(deep_site, first, first.grown(gaussian.x[50:52])).trace == pytest.approx(0, abs=1e-6)
    y = (gaussian.y[:, :1] > 1.5).double()
    moved = replace(binary.basis, likelihood=with_offset(BernoulliLikelihood(), y).requires_grad_(False))
    bernoulli = converge(binary.basis, binary.x, binary.y)[0]
    with pytest.raises(OptionError, match="offset"):
        lift(bernoulli, binary.basis, moved)


# -- combining sites ---------------------------------------------------------------------------------------------


def test_sites_of_one_basis_are_the_pooled_posterior(gaussian):
    parts = [expert(gaussian.basis, *gaussian.shard(k, 4)) for k in range(4)]
    pooled = fit_site(gaussian.basis, gaussian.x, gaussian.y)
    for method in ("sites", "lifted"):
        found = combine(parts, method, threshold=math.inf)
        assert isinstance(found, GPPosterior)
        scale = pooled.precision.abs().max().item()
        torch.testing.assert_close(found.site.precision, pooled.precision, rtol=0, atol=1e-12 * scale)
        torch.testing.assert_close(found.site.shift, pooled.shift, rtol=0, atol=1e-12 * scale)
        assert log_evidence([found.site]) == pytest.approx(log_evidence([pooled]), rel=1e-12)
        assert found.site.count == 400 and len(found.sites) == 4
        assert found.draw(2, seed=0)(gaussian.x[:3]).shape == (2, 3, 2)


def test_lifted_exact_experts_are_exact_regression_on_all_rows():
    x, y = rows(90, outputs=2)
    k = kernel(0.5, base=MaternKernel)
    parts = [exact_part(k, x[part], y[part]) for part in torch.arange(90).chunk(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = combine(parts, "lifted")
    at = torch.linspace(-1, 6, 40, dtype=F64)[:, None]
    mean, variance = exact(k, x, y, at)
    np.testing.assert_allclose(found.latent(at).mean, mean, atol=1e-6)
    np.testing.assert_allclose(found.latent(at).variance[:, 1], variance, atol=1e-6)
    assert len(found.basis.inducing_inputs) == 90
    again = combine(
        [parts[0], exact_part(k, x[:40], y[:40]), *parts], "lifted"
    )  # shared inputs are there once
    assert len(again.basis.inducing_inputs) == 90


def test_classes_and_counts_are_lifted_too(binary):
    half = [binary.shard(k, 2) for k in range(2)]
    parts = [(binary.basis, converge(binary.basis, x, y)[0]) for x, y in half]
    bigger = binary.basis.grown(binary.x[100:105])
    found = combine(parts, "lifted", target=bigger)
    summed = combine(parts, "sites")
    assert_same_posterior(found, summed, binary.x[200:220], 1e-7)
    torch.testing.assert_close(found.observed(binary.x[:5]).probs, summed.observed(binary.x[:5]).probs)
    assert lift(parts[0][1], binary.basis, bigger).unexplained is None


def toy(inducing, seed=0):
    """A draw of the prior over a square, 200 rows in each of 8 random shards, on few inducing inputs of their own."""
    g = torch.Generator().manual_seed(seed)
    k = kernel(0.8, d=2)
    x = 4 * torch.rand(2000, 2, generator=g, dtype=F64)
    made = Basis(k, 4 * torch.rand(150, 2, generator=g, dtype=F64), likelihood())
    f = made.whiten(x).T @ torch.randn(150, 1, generator=g, dtype=F64)
    y = f + 0.2 * torch.randn(2000, 1, generator=g, dtype=F64)
    counts = inducing if isinstance(inducing, list) else [inducing] * 8
    parts = []
    for shard, m in zip(torch.arange(1600).chunk(8), counts):
        few = x[shard][greedy_variance(k, x[shard], m)]
        parts.append(expert(Basis(k, few, likelihood()), x[shard], y[shard]))
    return parts, x[1600:], y[1600:, 0]


def test_sites_on_too_few_inducing_inputs_stay_experts():
    """The toy: sites on 8 inducing inputs each, lifted to all 64, are worse than the product of their experts. The
    twin, told never to fall back, is the worse one, by more than three standard errors over 6 draws (over 10 draws
    the gain was 1.1 nats a row, standard error 0.18)."""
    gains = []
    for seed in range(6):
        parts, x, y = toy(8, seed)
        with pytest.warns(
            UserWarning, match=r"8 of 8 sites fall more than threshold=1 nats an observation short"
        ) as told:
            found = combine(parts, "lifted")
        worst = max(each.shortfall for each in found.lifts)
        assert f"{worst:.3g} nats" in str(told[0].message) and worst > 3
        assert isinstance(found, PointwisePosterior) and len(found.experts) == 8
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            never = combine(parts, "lifted", threshold=math.inf)
        assert isinstance(never, GPPosterior)
        gains.append(nlpd(never, x, y) - nlpd(found, x, y))
    assert np.mean(gains) > 3 * np.std(gains, ddof=1) / math.sqrt(6)


def test_sites_stay_experts_where_the_target_is_too_small():
    parts, x, y = toy(60)
    target = replace(parts[0][0], inducing_inputs=parts[0][0].inducing_inputs[:12])
    with pytest.warns(UserWarning, match="robust Bayesian committee machine"):
        found = combine(parts, "lifted", target)
    never = combine(parts, "lifted", target, threshold=math.inf)
    assert nlpd(found, x, y) < nlpd(never, x, y) - 0.5
    enough = combine(parts, "lifted")  # on the inducing inputs of all, nobody falls back
    assert isinstance(enough, GPPosterior)
    assert nlpd(enough, x, y) < nlpd(found, x, y) + 0.02


def test_a_single_site_that_falls_short_stays_as_it_is():
    (part, *_), x, _ = toy(8)
    target = replace(part[0], inducing_inputs=x[:30])
    with pytest.warns(UserWarning, match="1 of 1 sites"):
        found = combine([part], "lifted", target)
    assert_same_posterior(found, GPPosterior(*part, unit_scaling(part[0])), x)


def test_only_the_sites_that_fall_short_stay_experts():
    parts, x, y = toy([60] * 6 + [8] * 2)
    with pytest.warns(UserWarning, match="2 of 8 sites"):
        found = combine(parts, "lifted")
    assert len(found.experts) == 3 and len(found.lifts) == 8
    assert found.experts[0].site.count == 1200
    assert nlpd(found, x, y) < nlpd(combine(parts, "lifted", threshold=math.inf), x, y) - 0.01
    assert nlpd(found, x, y) < nlpd(combine(parts, "rbcm"), x, y)


# -- products of experts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["poe", "gpoe", "bcm", "rbcm"])
def test_products_of_exact_experts_are_those_of_numpy(method):
    x, y = rows(60, outputs=2)
    k = kernel(0.6, 1.4, MaternKernel)
    shards = [(x[part], y[part]) for part in torch.arange(60).chunk(3)]
    found = combine([exact_part(k, *shard) for shard in shards], method)
    at = torch.linspace(-3, 8, 60, dtype=F64)[:, None]
    each = [exact(k, xk, yk, at) for xk, yk in shards]
    mean, variance = (part.numpy() for part in moments(found, at))
    for i in range(60):
        fall = [0.5 * math.log(1.4 / v[i]) for _, v in each]
        weights = {"poe": [1] * 3, "bcm": [1] * 3, "rbcm": fall, "gpoe": [h / sum(fall) for h in fall]}[
            method
        ]
        precision = sum(w / v[i] for w, (_, v) in zip(weights, each))
        if method in ("bcm", "rbcm"):
            precision += (1 - sum(weights)) / 1.4
        for t in range(2):
            total = sum(w * m[i, t] / v[i] for w, (m, v) in zip(weights, each))
            assert variance[i, t] == pytest.approx(1 / precision, rel=1e-5)
            assert mean[i, t] == pytest.approx(total / precision, abs=1e-5)
    noisy = found.observed(at)
    torch.testing.assert_close(noisy.variance, found.latent(at).variance + 0.04)
    torch.testing.assert_close(noisy.aleatoric, torch.full_like(noisy.mean, 0.04))


def test_one_expert_and_many_of_one():
    """Closed forms. Of one expert `rbcm` is not that expert: its weight is what it learned, not one."""
    x, y = rows(20)
    part = exact_part(kernel(0.6), x, y)
    at = torch.linspace(-1, 6, 20, dtype=F64)[:, None]
    mean, variance = moments(GPPosterior(*part, unit_scaling(part[0])), at)
    for method in ("poe", "gpoe", "bcm"):
        found = moments(combine([part], method), at)
        torch.testing.assert_close(found[0], mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found[1], variance, rtol=1e-9, atol=1e-12)
    learned = -0.5 * variance.log()  # the prior variance is one
    precision = learned / variance + 1 - learned
    one = moments(combine([part], "rbcm"), at)
    torch.testing.assert_close(one[1], 1 / precision, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(one[0], learned * mean / variance / precision, rtol=1e-8, atol=1e-9)
    five = {method: moments(combine([part] * 5, method), at) for method in ("poe", "gpoe", "bcm")}
    torch.testing.assert_close(five["poe"][1], variance / 5)  # five times too sure
    torch.testing.assert_close(five["poe"][0], mean)
    torch.testing.assert_close(five["gpoe"][1], variance)
    torch.testing.assert_close(five["bcm"][1], 1 / (5 / variance - 4))


def test_far_from_all_rows_only_poe_does_not_know_the_prior():
    x, y = rows(40)
    parts = [exact_part(kernel(0.6, 1.3), x[k::4], y[k::4]) for k in range(4)]
    far = torch.tensor([[60.0]], dtype=F64)
    for method in ("gpoe", "bcm", "rbcm"):
        mean, variance = moments(combine(parts, method), far)
        assert (mean.item(), variance.item()) == pytest.approx((0.0, 1.3), abs=1e-9)
    assert combine(parts, "poe").latent(far).variance.item() == pytest.approx(1.3 / 4)


def test_the_level_of_the_data_is_where_means_are_measured_from(gaussian):
    """Experts in the units of a scaling: the same products, scaled."""
    basis = gaussian.basis
    plain = [GPPosterior(*expert(basis, *gaussian.shard(k, 3)), unit_scaling(basis)) for k in range(3)]
    scaling = replace(
        unit_scaling(basis),
        y_shift=torch.tensor([5.0, -3.0], dtype=F64),
        y_scale=torch.tensor([2.0, 0.1], dtype=F64),
    )
    moved = [GPPosterior(e.basis, e.site, scaling) for e in plain]
    at = 2 * gaussian.x[:20]
    for method in ("poe", "gpoe", "bcm", "rbcm", "sites"):
        one, other = moments(combine(plain, method), at), moments(combine(moved, method), at)
        torch.testing.assert_close(other[0], scaling.y_shift + scaling.y_scale * one[0])
        torch.testing.assert_close(other[1], scaling.y_scale.square() * one[1])


def test_experts_whose_outputs_are_mixed(gaussian):
    """One expert is its own combination, also where an output is a sum of what is modelled."""
    basis = gaussian.basis
    scaling = replace(
        unit_scaling(basis),
        y_scale=torch.tensor([2.0, 0.1], dtype=F64),
        mixing=torch.tensor([[0.8, -0.6], [0.3, 0.9]], dtype=F64),
    )
    whole = GPPosterior(*expert(basis, *gaussian.shard(0, 3)), scaling)
    other = GPPosterior(*expert(basis, *gaussian.shard(1, 3)), scaling)
    at = 2 * gaussian.x[:20]
    for method in ("poe", "bcm", "sites"):
        found = combine([whole], method)
        torch.testing.assert_close(moments(found, at), moments(whole, at))
        torch.testing.assert_close(found.observed(at).variance, whole.observed(at).variance)
    far = torch.full((1, at.shape[1]), 1e3, dtype=F64)
    prior = moments(combine([whole, other], "bcm"), far)[1]
    torch.testing.assert_close(prior, moments(whole, far)[1])  # [a scale without the mixing gives another]
    with pytest.raises(OptionError, match=r"another scaling than the first \(mixing: none and"):
        combine([whole, GPPosterior(other.basis, other.site, replace(scaling, mixing=None))], "bcm")


def test_experts_of_classes(binary):
    parts = [(binary.basis, converge(binary.basis, *binary.shard(k, 3))[0]) for k in range(3)]
    found = combine(parts, "rbcm")
    latent = found.latent(binary.x[:6])
    expected = torch.special.ndtr(latent.mean / (1 + latent.variance).sqrt())
    probabilities = found.observed(binary.x[:6]).probs[:, 1]  # an average over 128 values of f
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-3)
    level = combine(parts, "rbcm").latent(binary.x[:1] + 100).mean
    torch.testing.assert_close(level, binary.basis.likelihood.offset.detach())


def test_a_product_of_experts_has_no_joint_posterior():
    x, y = rows(30)
    found = combine([exact_part(kernel(), x[k::2], y[k::2]) for k in range(2)], "bcm")
    with pytest.raises(OptionError, match="no functions to draw"):
        found.draw(3)
    latent = found.latent(x[:4])
    for ask in (
        lambda: latent.covariance,
        lambda: latent.rsample(2),
        lambda: found.observed(x[:4]).joint_log_prob(y[:4, 0]),
        lambda: found.condition(x, y),
        lambda: found.as_botorch().posterior(x[:2]).mean,
    ):
        with pytest.raises(FspaceError):
            ask()
    assert found.observed(x[:4]).log_prob(y[:4, 0]).isfinite().all()
    assert latent.interval(0.9)[0].shape == (4,)


def test_other_kernels_of_experts_take_their_own_prior_out():
    """Experts that know nothing leave the target's prior; the formulas of the papers, with one prior, would not."""
    x, y = rows(20)
    parts = [exact_part(kernel(0.5, scale), x + 50, y) for scale in (0.7, 2.0)]
    target = Basis(kernel(0.5, 1.0), x, likelihood(0.09))
    for method in ("bcm", "rbcm"):
        found = combine(parts, method, target)
        assert found.latent(x[:1]).variance.item() == pytest.approx(1.0, abs=1e-9)
        assert found.observed(x[:1]).variance.item() == pytest.approx(1.09, abs=1e-9)


def test_combine_refuses(gaussian, binary):
    parts = [expert(gaussian.basis, *gaussian.shard(k, 2)) for k in range(2)]
    basis, site = parts[0]
    with pytest.raises(OptionError, match="empty"):
        combine([], "poe")
    with pytest.raises(OptionError, match="choose one of"):
        combine(parts, "mean")
    for threshold in (0.0, -1.0, math.nan):
        with pytest.raises(OptionError, match="threshold"):
            combine(parts, "lifted", threshold=threshold)
    for wrong in (basis, (basis,), (site, basis), None):
        with pytest.raises(OptionError, match="Part 1 is a"):
            combine([parts[0], wrong], "poe")
    for method in ("sites", "lifted", "rbcm"):
        for what, other in {
            "must be of one kind": (binary.basis, converge(binary.basis, binary.x, binary.y)[0]),
            "functions": expert(replace(basis, likelihood=likelihood()), gaussian.x, gaussian.y[:, :1]),
        }.items():
            with pytest.raises(OptionError, match=what):
                combine([parts[0], other], method)
        with pytest.raises(OptionError, match="must be of one kind"):
            combine(parts, method, target=binary.basis)
        with pytest.raises(SiteRefused, match="NaN"):
            combine([parts[0], (basis, replace(site, precision=site.precision * math.nan))], method)
    with pytest.raises(OptionError, match="belongs to basis"):
        combine([(replace(basis, inducing_inputs=basis.inducing_inputs[:5]), site)], "poe")
    scaling = replace(unit_scaling(basis), y_scale=torch.tensor([2.0, 1.0], dtype=F64))
    with pytest.raises(OptionError, match="another scaling than the first .y_scale"):
        combine([parts[0], GPPosterior(basis, site, scaling)], "rbcm")
    grown = basis.grown(gaussian.x[50:51])
    with pytest.raises(OptionError, match="2 bases"):
        combine([parts[0], (grown, site.padded(grown))], "sites")
    counts = with_offset(PoissonLikelihood(), gaussian.y.abs().round()).requires_grad_(False)
    poisson = Basis(basis.kernel, basis.inducing_inputs, counts)
    with pytest.raises(OptionError, match="GaussianLikelihood"):
        combine([parts[0], (poisson, replace(site, basis_id=poisson.id))], "sites")
    with pytest.raises(DataError, match="NaN"):
        combine(parts, "bcm").latent(gaussian.x[:2] * math.nan)


def test_an_expert_less_certain_than_the_prior_is_refused(gaussian):
    basis, site = expert(gaussian.basis, gaussian.x[:3], gaussian.y[:3])
    worse = replace(site, precision=-0.5 * torch.eye(30, dtype=F64).expand(2, 30, 30), shift=0 * site.shift)
    with pytest.raises(NumericalError, match="less certain than the prior"):
        combine([(basis, worse)] * 6, "bcm").latent(gaussian.x[:5])


# -- the server --------------------------------------------------------------------------------------------------


def test_a_worker_with_inducing_inputs_of_its_own(gaussian, front):
    server = PosteriorServer()
    target = gaussian.basis.grown(gaussian.x[100:130])
    server.register_basis(target)
    own = replace(gaussian.basis, inducing_inputs=gaussian.x[100:130])
    site = replace(fit_site(own, gaussian.x, gaussian.y), site_id="w")
    receipt, lifted = put_lifted(front(server).client("w"), site, own, threshold=1e4)
    assert receipt.status == "accepted" and lifted.trace == pytest.approx(0, abs=1e-7)
    assert server.log_evidence() == pytest.approx(log_evidence([site]), abs=1e-7)
    assert_same_posterior(server.posterior(), posterior_of(own, site, unit_scaling(own)), gaussian.x[:9])
    before = server.total()
    few = replace(own, inducing_inputs=gaussian.x[100:103])
    lossy = replace(fit_site(few, gaussian.x, gaussian.y), site_id="w", version=1)
    with pytest.raises(SiteRefused, match="nats an observation short") as refused:
        put_lifted(server, lossy, few)
    assert refused.value.reason == "lossy"
    assert torch.equal(server.total().precision, before.precision)
    with pytest.raises(OptionError, match="threshold"):
        put_lifted(server, lossy, few, threshold=0.0)


def test_sites_over_weights_are_not_lifted(gaussian):
    server = PosteriorServer()
    server.register_basis(WeightBasis.of(torch.nn.Linear(2, 1)))
    basis, site = expert(gaussian.basis, gaussian.x, gaussian.y)
    with pytest.raises(ServerError, match="weights"):
        put_lifted(server, site, basis)
