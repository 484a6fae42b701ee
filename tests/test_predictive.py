"""The forms of a predictive: closed forms (scipy, enumeration), Monte Carlo within five standard errors, and twins:
wrong estimators that the same check must reject."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from fspace.errors import DataError, NumericalError, OptionError
from fspace.predictive import Categorical, Gaussian, Mixture, Samples

DRAWS = 40_000
MEANS, STDS, WEIGHTS = np.array([-2.0, 3.0]), np.array([0.5, 1.5]), np.array([0.3, 0.7])


def matrix(n: int, seed: int, batch: tuple[int, ...] = ()) -> torch.Tensor:
    """A covariance with correlations."""
    root = torch.randn(*batch, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.mT + 0.1 * torch.eye(n, dtype=torch.float64)


def gaussian(n=3, t=None, seed=0, dtype=torch.float64, noise=0.05) -> Gaussian:
    """A Gaussian of n points and t outputs, whose covariance holds noise."""
    generator = torch.Generator().manual_seed(seed + 100)
    mean = torch.randn(*((n,) if t is None else (n, t)), generator=generator, dtype=torch.float64)
    covariance = matrix(n, seed, () if t is None else (t,))
    variance = covariance.diagonal(dim1=-2, dim2=-1).mT if t is not None else covariance.diagonal()
    aleatoric = torch.full_like(mean, noise)
    return Gaussian(mean.to(dtype), variance.to(dtype), covariance.to(dtype), aleatoric.to(dtype))


def two_humps(n=1, t=None, dtype=torch.float64) -> Mixture:
    """The same two humps at every entry."""
    shape = (n,) if t is None else (n, t)
    components = []
    for mean, std in zip(MEANS, STDS):
        variance = torch.full(shape, std**2, dtype=dtype)
        covariance = torch.diag_embed(variance.mT if t is not None else variance)
        components.append(Gaussian(torch.full(shape, mean, dtype=dtype), variance, covariance))
    return Mixture(components, WEIGHTS.tolist())


def hump_density(y):
    return (WEIGHTS * stats.norm(MEANS, STDS).pdf(np.asarray(y)[..., None])).sum(-1)


def hump_cdf(y):
    return (WEIGHTS * stats.norm(MEANS, STDS).cdf(np.asarray(y)[..., None])).sum(-1)


def within(estimate, target, error, count=5.0) -> bool:
    """Every entry lies within `count` standard errors."""
    return bool(((estimate - target).abs() <= count * error).all())


def covariance_of(samples):
    """Sample covariance of [s, n] and its standard error, entry by entry."""
    centred = samples - samples.mean(0)
    products = centred[:, :, None] * centred[:, None, :]
    return products.mean(0), products.std(0) / math.sqrt(len(samples))


# ---- Gaussian


@pytest.mark.parametrize("t", [None, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_gaussian_is_scipy_s(t, dtype, tolerance):
    g = gaussian(4, t, dtype=dtype)
    reference = stats.norm(g.mean.double().numpy(), g.variance.double().sqrt().numpy())
    y = g.mean + torch.linspace(-2, 2, 4, dtype=dtype).reshape(4, *[1] * (g.mean.ndim - 1))

    def same(value, wanted):
        assert value.dtype == dtype and value.shape == g.mean.shape
        np.testing.assert_allclose(value.double().numpy(), wanted, rtol=tolerance, atol=tolerance)

    same(g.log_prob(y), reference.logpdf(y.double().numpy()))
    same(g.cdf(y), reference.cdf(y.double().numpy()))
    same(g.quantile(0.03), reference.ppf(0.03))
    same(g.interval(0.8)[0], reference.ppf(0.1))
    same(g.interval(0.8)[1], reference.ppf(0.9))
    same(g.epistemic, reference.var() - 0.05)
    assert g.quantile([0.1, 0.5]).shape == (2, *g.mean.shape)
    assert torch.allclose(g.quantile([0.1, 0.5])[1], g.mean)


@pytest.mark.parametrize("t", [None, 2])
def test_gaussian_joint_density_is_scipy_s(t):
    g = gaussian(4, t)
    y = g.mean + 0.3
    columns = [(g.mean, g.covariance)] if t is None else [(g.mean[:, i], g.covariance[i]) for i in range(t)]
    wanted = sum(stats.multivariate_normal(m.numpy(), c.numpy()).logpdf(m.numpy() + 0.3) for m, c in columns)
    assert g.joint_log_prob(y).item() == pytest.approx(wanted, abs=1e-10)
    assert g.log_prob(y).sum().item() != pytest.approx(wanted, abs=0.1)  # the marginals' product is another


def test_gaussian_joint_density_of_batches():
    covariance = matrix(3, 1, (5,))
    g = Gaussian(torch.zeros(5, 3).double(), covariance.diagonal(dim1=-2, dim2=-1), covariance, outputs=0)
    alone = [stats.multivariate_normal(np.zeros(3), c.numpy()).logpdf(np.ones(3)) for c in covariance]
    np.testing.assert_allclose(g.joint_log_prob(torch.ones(5, 3)).numpy(), alone, rtol=1e-10)


def test_no_joint_density_where_the_covariance_is_singular():
    twice = torch.ones(2, 2, dtype=torch.float64)
    with pytest.raises(NumericalError, match=r"observed\(\)"):
        Gaussian(torch.zeros(2).double(), torch.ones(2).double(), twice).joint_log_prob([0.0, 1.0])


@pytest.mark.parametrize("t", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gaussian_samples_are_joint_over_points(t, dtype):
    g = gaussian(3, t, dtype=dtype)
    joint = g.rsample(DRAWS, seed=1)
    assert joint.shape == (DRAWS, *g.mean.shape) and joint.dtype == dtype
    marginal = g.mean + g.stddev * torch.randn(joint.shape, dtype=dtype)  # the twin: every point by itself
    for i in range(t or 1):
        mean, wanted = (g.mean, g.covariance) if t is None else (g.mean[:, i], g.covariance[i])
        pick = (lambda s: s) if t is None else (lambda s, i=i: s[..., i])
        samples = pick(joint)
        assert within(samples.mean(0), mean, samples.std(0) / math.sqrt(DRAWS))
        assert within(covariance_of(samples)[0], wanted, covariance_of(samples)[1])
        assert not within(covariance_of(pick(marginal))[0], wanted, covariance_of(pick(marginal))[1])
    if t == 2:  # outputs are independent of each other
        across = ((joint - joint.mean(0)).prod(-1)).double()
        assert within(across.mean(0), torch.zeros(3), across.std(0) / math.sqrt(DRAWS))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_repeated_points_get_the_same_value(dtype):
    one = matrix(2, 3).to(dtype)
    twice = one[[0, 0, 1]][:, [0, 0, 1]]
    samples = Gaussian(torch.zeros(3, dtype=dtype), twice.diagonal(), twice).rsample(2000, seed=0)
    # a jitter of 1e-10 (float64), or the rounding of eigenvalues in float32, moves a value by its square root
    assert (samples[:, 0] - samples[:, 1]).abs().max() < (1e-4 if dtype == torch.float64 else 1e-2)
    assert within(*[covariance_of(samples)[0], twice, covariance_of(samples)[1]])


def test_gaussian_covariance_is_computed_once_and_only_when_asked_for():
    calls = []

    def covariance():
        calls.append(1)
        return torch.eye(2)

    g = Gaussian(torch.zeros(2), torch.ones(2), covariance)
    g.log_prob(torch.zeros(2)), g.affine(1.0, 2.0), g.quantile(0.5)
    assert not calls
    g.rsample(), g.rsample()
    assert len(calls) == 1


def test_gaussian_samples_carry_gradients():
    covariance = matrix(2, 0)
    mean, root = (
        torch.zeros(2, requires_grad=True, dtype=torch.float64),
        torch.tensor(1.0, requires_grad=True),
    )
    samples = Gaussian(mean, covariance.diagonal(), covariance * root).rsample(7, seed=0)
    samples.sum().backward()
    assert torch.allclose(mean.grad, torch.full((2,), 7.0).double())
    assert root.grad.item() == pytest.approx(0.5 * samples.sum().item())  # d sqrt(c) / dc = 1/2 at c = 1


# ---- mixture


def test_mixture_moments_and_the_law_of_total_variance():
    parts = [gaussian(3, seed=k, noise=0.02 * (k + 1)) for k in range(3)]
    weights = np.array([0.2, 0.5, 0.3])
    m = Mixture(parts, weights.tolist())
    means, variances = (np.stack([getattr(p, a).numpy() for p in parts]) for a in ("mean", "variance"))
    mean = weights @ means
    second = weights @ (variances + means**2)
    np.testing.assert_allclose(m.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(m.variance, second - mean**2, rtol=1e-10)
    np.testing.assert_allclose(m.aleatoric, np.full(3, weights @ [0.02, 0.04, 0.06]), rtol=1e-12)
    np.testing.assert_allclose(m.epistemic + m.aleatoric, m.variance, rtol=1e-12)
    np.testing.assert_allclose(m.covariance.diagonal(), m.variance, rtol=1e-10)


@pytest.mark.parametrize("t", [None, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_mixture_density_and_cdf_are_its_own(t, dtype, tolerance):
    m = two_humps(5, t, dtype)
    y = torch.linspace(-4, 6, m.mean.numel(), dtype=dtype).reshape(m.mean.shape)
    np.testing.assert_allclose(m.log_prob(y).exp(), hump_density(y), rtol=10 * tolerance, atol=tolerance)
    np.testing.assert_allclose(m.cdf(y), hump_cdf(y), rtol=tolerance, atol=tolerance)
    assert m.log_prob(y).shape == m.cdf(y).shape == m.mean.shape and m.log_prob(y).dtype == dtype
    twin = Gaussian(m.mean, m.variance)  # the moment match
    assert np.abs(twin.log_prob(y).exp().numpy() - hump_density(y)).max() > 0.05
    assert np.abs(twin.cdf(y).numpy() - hump_cdf(y)).max() > 0.05


def test_mixture_joint_density_by_enumeration():
    parts, weights = [gaussian(3, seed=k) for k in range(2)], [0.25, 0.75]
    y = np.array([0.1, -0.4, 0.7])
    densities = [
        w * stats.multivariate_normal(p.mean.numpy(), p.covariance.numpy()).pdf(y)
        for p, w in zip(parts, weights)
    ]
    m = Mixture(parts, weights)
    assert m.joint_log_prob(y).item() == pytest.approx(math.log(sum(densities)), abs=1e-10)
    assert m.log_prob(y).sum().item() != pytest.approx(math.log(sum(densities)), abs=0.05)


def test_far_tails_have_finite_density():
    value = two_humps().log_prob([-200.0]).item()
    assert value == pytest.approx(
        np.logaddexp(*(np.log(WEIGHTS) + stats.norm(MEANS, STDS).logpdf(-200.0))), rel=1e-12
    )


@pytest.mark.parametrize("p", [1e-6, 0.05, 0.29, 0.3, 0.31, 0.5, 0.95, 1 - 1e-6])
def test_mixture_quantiles_are_solved(p):
    m = two_humps(2)
    quantile = m.quantile(p)
    np.testing.assert_allclose(m.cdf(quantile), p, rtol=0, atol=1e-9)
    root = optimize.brentq(lambda y: hump_cdf(y) - p, -20, 20, xtol=1e-13)
    assert quantile[0].item() == pytest.approx(root, abs=1e-5 if 0.29 < p < 0.31 else 1e-7)
    averaged = sum(w * c.quantile(p) for w, c in zip(WEIGHTS, m.components))  # the twin
    assert (m.cdf(averaged) - p).abs().max() > 1e-9


def test_mixture_quantiles_of_far_components_and_of_float32():
    far = Mixture([Gaussian(torch.full((1,), c).double(), torch.ones(1).double()) for c in (0.0, 1e6)])
    assert far.cdf(far.quantile(0.25)).item() == pytest.approx(0.25, abs=1e-9)
    assert far.cdf(far.quantile(0.75)).item() == pytest.approx(0.75, abs=1e-9)
    single = two_humps(2, dtype=torch.float32)
    assert single.quantile(0.9).dtype == torch.float32
    assert single.cdf(single.quantile(0.9))[0].item() == pytest.approx(0.9, abs=1e-6)


@pytest.mark.parametrize("t", [None, 2])
def test_mixture_interval_holds_its_level(t):
    m = two_humps(2, t)
    lower, upper = m.interval(0.8)
    assert lower.shape == upper.shape == m.mean.shape
    np.testing.assert_allclose(m.cdf(lower), 0.1, atol=1e-9)
    np.testing.assert_allclose(m.cdf(upper), 0.9, atol=1e-9)


@pytest.mark.parametrize("t", [None, 2])
def test_one_joint_sample_comes_from_one_component(t):
    m = two_humps(2, t)
    samples = m.rsample(DRAWS, seed=3)
    assert samples.shape == (DRAWS, *m.mean.shape)
    flat = samples.reshape(DRAWS, -1)
    share = (flat < 0.2).double()  # below: the first hump, but for 3 % of the second
    low = stats.norm(MEANS, STDS).cdf(0.2)
    both, error = share[:, 0] * share[:, -1], math.sqrt(0.25 / DRAWS)
    assert both.mean().item() == pytest.approx((WEIGHTS * low**2).sum(), abs=5 * error)
    independent = share[:, 0] * share.roll(1, 0)[:, -1]  # the twin: a component for every point
    assert abs(independent.mean().item() - (WEIGHTS * low**2).sum()) > 5 * error
    assert within(flat.mean(0), m.mean.reshape(-1), flat.std(0) / math.sqrt(DRAWS))
    first = samples if t is None else samples[..., 0]
    covariance = m.covariance if t is None else m.covariance[0]
    assert within(covariance_of(first)[0], covariance, covariance_of(first)[1])


def test_samples_follow_the_mixture_s_cdf():
    m = two_humps(1)
    assert stats.kstest(m.rsample(DRAWS, seed=5)[:, 0].numpy(), hump_cdf).pvalue > 1e-3
    twin = Gaussian(m.mean, m.variance, torch.diag(m.variance)).rsample(DRAWS, seed=5)
    assert stats.kstest(twin[:, 0].numpy(), hump_cdf).pvalue < 1e-10


def test_weights_are_kept_in_full_precision_and_zero_weights_count_for_nothing():
    third = Mixture([gaussian(seed=k) for k in range(3)], [1 / 3, 1 / 3, 1 / 3])
    assert torch.equal(third.weights, Mixture(third.components).weights)
    m, only = Mixture([gaussian(seed=0), gaussian(seed=1)], [0.0, 2.0]), gaussian(seed=1)
    y = only.mean + 0.1
    assert torch.allclose(m.log_prob(y), only.log_prob(y))
    assert torch.allclose(m.quantile(0.2), only.quantile(0.2))
    assert (m.rsample(50, 0) - only.mean).abs().max() < 8 * only.stddev.max()


# ---- samples


def test_samples_with_noise_are_the_mixture_of_their_humps():
    s = Samples(torch.tensor(MEANS)[:, None], torch.tensor(STDS**2)[:, None])
    y = np.array([0.4])
    parts = stats.norm(MEANS, STDS)
    assert s.log_prob(y).exp().item() == pytest.approx(parts.pdf(0.4).mean(), rel=1e-12)
    assert s.cdf(y).item() == pytest.approx(parts.cdf(0.4).mean(), rel=1e-12)
    assert s.cdf(s.quantile(0.7)).item() == pytest.approx(0.7, abs=1e-9)
    assert s.epistemic.item() == pytest.approx(MEANS.var())
    assert s.aleatoric.item() == pytest.approx((STDS**2).mean())
    assert s.variance.item() == pytest.approx((STDS**2 + MEANS**2).mean() - MEANS.mean() ** 2)


@pytest.mark.parametrize("t", [None, 2])
@pytest.mark.parametrize("noise", [None, 0.3])
def test_samples_draw_whole_functions(t, noise):
    values = torch.randn(6, *((3,) if t is None else (3, t)), dtype=torch.float64)
    s = Samples(values, noise)
    drawn = s.rsample(DRAWS, seed=2)
    assert drawn.shape == (DRAWS, *s.mean.shape)
    flat, own = drawn.reshape(DRAWS, -1), values.reshape(6, -1)
    wanted = torch.from_numpy(np.cov(own.numpy().T, bias=True)) + (noise or 0.0) * torch.eye(own.shape[1])
    assert within(flat.mean(0), own.mean(0), flat.std(0) / math.sqrt(DRAWS))
    assert within(covariance_of(flat)[0], wanted, covariance_of(flat)[1])
    mixed = torch.stack([flat[torch.randperm(DRAWS), j] for j in range(flat.shape[1])], dim=1)  # the twin
    assert not within(covariance_of(mixed)[0], wanted, covariance_of(mixed)[1])
    if noise is None:
        assert (flat[:20, None] == own[None]).all(-1).any(-1).all()


def test_samples_quantile_is_the_inverse_of_their_cdf():
    values = torch.randperm(10, dtype=torch.float64)[:, None] + torch.tensor([0.0, 100.0])
    s = Samples(values)
    for p in (0.01, 0.1, 0.3, 0.7, 0.71, 0.95):
        quantile = s.quantile(p)
        assert (s.cdf(quantile) >= p - 1e-12).all() and (s.cdf(quantile - 1e-9) < p).all()
        assert quantile.tolist() == np.quantile(values.numpy(), p, axis=0, method="inverted_cdf").tolist()
    assert s.interval(0.6)[0].tolist() == [1.0, 101.0] and s.interval(0.6)[1].tolist() == [7.0, 107.0]
    with pytest.raises(OptionError, match="no density"):
        s.log_prob([0.0, 0.0])


# ---- categorical


def test_entropies_and_mutual_information_by_enumeration():
    probs = torch.tensor(stats.dirichlet([0.5, 1.0, 2.0]).rvs(12, random_state=0)).reshape(4, 3, 3)
    c = Categorical(probs)
    average = probs.numpy().mean(0)
    np.testing.assert_allclose(c.probs, average)
    np.testing.assert_allclose(c.entropy, [stats.entropy(row) for row in average], rtol=1e-12)
    inner = stats.entropy(probs.numpy(), axis=-1).mean(0)
    np.testing.assert_allclose(c.aleatoric, inner, rtol=1e-12)
    # mutual information of (function s, class c) from their joint table, p(s, c) = p(c | s) / S
    joint = probs.numpy() / 4
    ratio = joint / (joint.sum(0, keepdims=True) * joint.sum(-1, keepdims=True))
    np.testing.assert_allclose(c.mutual_information, (joint * np.log(ratio)).sum((0, 2)), rtol=1e-10)
    np.testing.assert_allclose(c.epistemic + c.aleatoric, c.entropy, rtol=1e-12)
    np.testing.assert_allclose(c.variance, average * (1 - average))
    assert c.mode.tolist() == average.argmax(-1).tolist()
    np.testing.assert_allclose(c.log_prob([2, 0, 1]), np.log(average[[0, 1, 2], [2, 0, 1]]))


def test_certain_classes_have_no_entropy():
    c = Categorical(torch.eye(2).expand(3, 2, 2))
    assert c.entropy.tolist() == c.mutual_information.tolist() == [0.0, 0.0]
    disagreeing = Categorical(torch.stack([torch.eye(2), 1 - torch.eye(2)]))
    assert torch.allclose(disagreeing.mutual_information, torch.full((2,), math.log(2.0)))
    assert torch.equal(disagreeing.aleatoric, torch.zeros(2))


def test_labels_of_one_draw_come_from_one_function():
    probs = torch.tensor([[[0.9, 0.1], [0.9, 0.1]], [[0.1, 0.9], [0.1, 0.9]]], dtype=torch.float64)
    c, n = Categorical(probs), 4000
    labels = c.rsample(n, seed=0)
    assert labels.shape == (n, 2)
    same, error = (labels[:, 0] == labels[:, 1]).double().mean().item(), math.sqrt(0.25 / n)
    assert same == pytest.approx(0.82, abs=5 * error)  # 0.9^2 + 0.1^2
    twin = torch.bernoulli(c.probs[:, 1].expand(n, 2))  # from the averaged probabilities
    assert abs((twin[:, 0] == twin[:, 1]).double().mean().item() - 0.82) > 5 * error
    assert labels.double().mean(0).tolist() == pytest.approx([0.5, 0.5], abs=5 * error)


# ---- all forms

FORMS = {
    "gaussian": lambda: gaussian(3),
    "gaussian, outputs": lambda: gaussian(3, 2),
    "mixture": lambda: Mixture([gaussian(3, seed=k) for k in range(3)], [0.2, 0.3, 0.5]),
    "mixture, outputs": lambda: Mixture([gaussian(3, 2, seed=k) for k in range(2)]),
    "samples": lambda: Samples(torch.randn(5, 3)),
    "noisy samples": lambda: Samples(torch.randn(5, 3, 2), 0.1),
    "categorical": lambda: Categorical(torch.rand(5, 3, 4).softmax(-1)),
}
CONTINUOUS = [name for name in FORMS if name != "categorical"]


@pytest.mark.parametrize("form", FORMS)
def test_a_seed_gives_one_sample_and_leaves_the_global_state(form):
    predictive = FORMS[form]()
    before = torch.get_rng_state()
    first, again, other = (predictive.rsample(50, seed) for seed in (7, 7, 8))
    fresh = [predictive.rsample(50) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(*fresh)


@pytest.mark.parametrize("form", CONTINUOUS)
def test_affine_is_the_distribution_of_the_scaled_value(form):
    predictive = FORMS[form]()
    outputs = predictive.mean.shape[1:]
    scale = torch.tensor([2.0, -3.0], dtype=torch.float64) if outputs else -2.0
    scale = scale.to(predictive.mean) if outputs else scale
    moved = predictive.affine(1.5, scale)
    square = scale**2
    assert torch.allclose(moved.mean, predictive.mean * scale + 1.5)
    assert torch.allclose(moved.variance, predictive.variance * square)
    assert torch.allclose(moved.aleatoric, predictive.aleatoric * square)
    y = predictive.mean + 0.2
    if form != "samples":
        size = scale.abs().log() if outputs else math.log(2.0)
        assert torch.allclose(moved.log_prob(y * scale + 1.5), predictive.log_prob(y) - size, atol=1e-5)
    if hasattr(predictive, "covariance"):
        per_output = square[:, None, None] if outputs else square
        assert torch.allclose(moved.covariance, predictive.covariance * per_output)


@pytest.mark.parametrize("form", CONTINUOUS)
def test_y_may_be_an_array_or_a_list_of_its_shape_only(form):
    predictive = FORMS[form]()
    y = predictive.mean + 0.1
    assert torch.equal(predictive.cdf(y), predictive.cdf(y.numpy()))
    assert torch.allclose(predictive.cdf(y), predictive.cdf(y.tolist()))
    locked = y.numpy().copy()
    locked.flags.writeable = False  # as the values of a pandas series are
    with warnings.catch_warnings(action="error"):
        assert torch.equal(predictive.cdf(locked), predictive.cdf(y))
    with pytest.raises(DataError, match=r"y has shape \(4,\).*shape \(3"):
        predictive.cdf(torch.zeros(4))
    with pytest.raises(DataError, match="no numbers"):
        predictive.cdf(np.full(predictive.mean.shape, "a"))


@pytest.mark.parametrize("form", CONTINUOUS)
def test_levels_outside_zero_and_one_are_refused(form):
    predictive = FORMS[form]()
    for p in (0.0, 1.0, -0.1, float("nan"), [0.5, 1.0]):
        with pytest.raises(OptionError, match="strictly between 0 and 1"):
            predictive.quantile(p)
    for level in (0.0, 1.0, 2.0):
        with pytest.raises(OptionError, match="strictly between 0 and 1"):
            predictive.interval(level)


def test_what_cannot_be_built_is_refused():
    with pytest.raises(OptionError, match="at least one"):
        Mixture([])
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")], [1.0, float("inf")]):
        with pytest.raises(OptionError, match="2 finite non-negative numbers"):
            Mixture([gaussian(), gaussian()], weights)
    with pytest.raises(DataError, match="one shape"):
        Mixture([gaussian(3), gaussian(4)])
    with pytest.raises(OptionError, match="without a joint covariance"):
        Gaussian(torch.zeros(2), torch.ones(2)).rsample()
    with pytest.raises(DataError, match="sum to one"):
        Categorical(torch.tensor([[0.5, 0.4]]))
    with pytest.raises(DataError, match="sum to one"):
        Categorical(torch.tensor([[1.5, -0.5]]))
    with pytest.raises(DataError, match=r"\[n, c\]"):
        Categorical(torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("labels", [[0, 2], [-1, 0], [0], [0.5, 1.0], [[0, 1]]])
def test_labels_that_are_no_class_are_refused(labels):
    with pytest.raises(DataError, match="integers from 0 to 1"):
        Categorical(torch.full((2, 2), 0.5)).log_prob(labels)


def test_a_log_prob_of_class_names_says_what_to_give():
    with pytest.raises(DataError, match="positions in the model's classes_"):
        Categorical(torch.full((2, 2), 0.5)).log_prob(["cat", "dog"])


@pytest.mark.parametrize("t", [None, 3])
def test_draws_hold_no_copy_of_the_root_for_each(t):
    """The largest tensor that 500 draws make is the draws themselves or the covariance, not n copies of its root."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    g = gaussian(40, t)
    with Largest():
        samples = g.rsample(500, seed=0)
    assert largest <= 500 * 40 * (t or 1)
    root = torch.linalg.cholesky(g.covariance)
    white = torch.randn(500, *root.shape[:-1], generator=torch.Generator().manual_seed(0), dtype=root.dtype)
    want = torch.einsum("...ij,s...j->s...i", root, white)
    assert torch.allclose(samples - g.mean, want if t is None else want.mT, atol=1e-9)
