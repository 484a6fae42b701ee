"""Particle filter with discrete states: a hidden Markov model against the forward and backward recursions, and the
gradient of resampling against the enumeration of all ancestors."""

import itertools
import math

import pytest
import torch

from fspace.errors import OptionError
from fspace.inference.amortized import smc
from fspace.inference.amortized.smoothing import backward_simulation

START = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MOVE = torch.tensor([[0.8, 0.15, 0.05], [0.1, 0.6, 0.3], [0.25, 0.05, 0.7]], dtype=torch.float64)
SHOW = torch.tensor(
    [[0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.05, 0.15, 0.8]], dtype=torch.float64
)  # [state, symbol]
SYMBOLS = torch.tensor([0, 0, 2, 1, 2, 0])


def forward(symbols=SYMBOLS):
    """log p(symbols) and p(z_t, x_1:t) [T, 3]."""
    alphas = [START * SHOW[:, symbols[0]]]
    for symbol in symbols[1:]:
        alphas.append((alphas[-1] @ MOVE) * SHOW[:, symbol])
    return alphas[-1].sum().log(), torch.stack(alphas)


def pairs(t):
    """p(z_t, z_t+1 | all symbols) [3, 3]."""
    log_p, alphas = forward()
    beta = torch.ones(3, dtype=torch.float64)
    for symbol in SYMBOLS[t + 2 :].flip(0):
        beta = MOVE @ (SHOW[:, symbol] * beta)
    return alphas[t][:, None] * MOVE * (SHOW[:, SYMBOLS[t + 1]] * beta)[None] / log_p.exp()


def pick(probabilities, u):
    """State of each particle by inverse probability, from uniforms."""
    return (u[..., None] > probabilities.cumsum(-1)).sum(-1).clamp(max=2)


def from_prior():
    """States drawn from the transition, as integers."""

    def init(particles, x, u):
        z = pick(START.expand(*u.shape, 3), u)
        return z, SHOW[z, x.expand_as(z)].log()

    def step(z, x, t, u):
        z = pick(MOVE[z], u)
        return z, SHOW[z, x.expand_as(z)].log()

    return init, step


def enumerated():
    """States drawn from p(z_t | z_t-1, x_t), all three of them weighed; the weight is then p(x_t | z_t-1)."""

    def draw(prior, x, u):
        joint = prior * SHOW[:, x[0]]
        return pick(joint / joint.sum(-1, keepdim=True), u), joint.sum(-1).log()

    def init(particles, x, u):
        return draw(START.expand(*u.shape, 3), x, u)

    def step(z, x, t, u):
        return draw(MOVE[z], x, u)

    return init, step


def concrete(temperature):
    """Points of the simplex [N, B, 3] in place of states, transition and emission mixed by them."""

    def draw(prior, u):
        gumbel = -(-u.log()).log()
        return ((prior.log() + gumbel) / temperature).softmax(-1)

    def init(particles, x, u):
        z = draw(START, u)
        return z, (z @ SHOW[:, x[0]]).log()

    def step(z, x, t, u):
        z = draw(z @ MOVE, u)
        return z, (z @ SHOW[:, x[0]]).log()

    return init, step


def run(model, particles, replicates, seed=0, width=(), **options):
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(6, particles, replicates, *width, generator=generator, dtype=torch.float64)
    symbols = SYMBOLS[:, None].expand(-1, replicates)
    return smc.filter(*model, symbols, None, particles, noise=u, generator=generator, **options)


def z_score(values, expected):
    values = values.double()
    return (float(values.mean()) - float(expected)) / (float(values.std()) / math.sqrt(len(values)))


@pytest.mark.parametrize("criterion", ["ess", "always", "never"])
@pytest.mark.parametrize("model", [from_prior, enumerated])
def test_evidence_is_the_forward_algorithms(model, criterion):
    log_p = forward()[0]
    found = run(model(), 8, 8000, criterion=criterion)
    assert abs(z_score((found.log_evidence - log_p).exp(), 1.0)) < 4
    assert z_score(found.log_evidence, log_p) < -4
    away = 0.4 if criterion == "never" else 0.05  # the weights of particles left alone vary more
    assert abs(z_score((found.log_evidence - log_p - away).exp(), 1.0)) > 4
    if criterion == "ess":
        assert 0 < float(found.resampled.double().mean()) < 1


def test_enumerating_the_states_tightens_the_bound():
    log_p = forward()[0]
    gap = {m: float(log_p - run(m(), 8, 8000).log_evidence.mean()) for m in (from_prior, enumerated)}
    assert 0 < gap[enumerated] < 0.8 * gap[from_prior]


def test_concrete_states_have_the_forward_algorithms_evidence_as_they_cool():
    log_p = forward()[0]
    cold, warm = (run(concrete(tau), 8, 8000, width=(3,)) for tau in (0.005, 1.0))
    assert abs(z_score((cold.log_evidence - log_p).exp(), 1.0)) < 4
    assert abs(z_score((warm.log_evidence - log_p).exp(), 1.0)) > 4  # another model


def test_backward_simulation_is_the_forward_backward_recursion():
    found = run(from_prior(), 100, 300)
    paths = backward_simulation(
        found,
        lambda z, following, t: MOVE.log()[z, following],
        50,
        torch.Generator().manual_seed(1),
    )
    assert paths.dtype == torch.int64
    for t in (0, 2, 4):
        exact = pairs(t)
        assert float(exact.sum()) == pytest.approx(1, abs=1e-12)
        for i, j in itertools.product(range(3), repeat=2):
            both = ((paths[t] == i) & (paths[t + 1] == j)).double().mean(0)
            assert abs(z_score(both, exact[i, j])) < 4
        filtered = torch.stack([(found.weights[t] * (found.states[t] == i)).sum(0) for i in range(3)])
        assert max(abs(z_score(filtered[i], exact[i].sum())) for i in range(3)) > 4  # without smoothing


# ---- the gradient of resampling ----------------------------------------------------------------------

PLACES = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
MOVES = torch.tensor([0.2, 0.5, -0.4], dtype=torch.float64)
SEEN = torch.tensor([0.5, 1.2, -0.3], dtype=torch.float64)


def walkers(theta):
    """Three particles that move without noise: chance is in the ancestors alone. theta is a number or one a series."""

    def init(particles, x, noise):
        z = PLACES[:, None].expand(3, x.shape[0])
        return z, -((x - theta * z) ** 2)

    def step(z, x, t, noise):
        z = 0.8 * z + MOVES[:, None]
        return z, -((x - theta * z) ** 2)

    return init, step


def expected_log_evidence(theta):
    """Sum over all 27 x 27 choices of ancestors, with their probabilities."""

    def weigh(z, x):
        w = -((x - theta * z) ** 2)
        return w.logsumexp(0) - math.log(3), w.softmax(0)

    total = torch.zeros((), dtype=torch.float64)
    first, p0 = weigh(PLACES, SEEN[0])
    for a in itertools.product(range(3), repeat=3):
        z1 = 0.8 * PLACES[list(a)] + MOVES
        second, p1 = weigh(z1, SEEN[1])
        for b in itertools.product(range(3), repeat=3):
            third, _ = weigh(0.8 * z1[list(b)] + MOVES, SEEN[2])
            total = total + p0[list(a)].prod() * p1[list(b)].prod() * (first + second + third)
    return total


def gradients(ancestor_grad, replicates=40_000, baseline=None):
    """d surrogate / d theta of each series, and the run."""
    theta = torch.full((replicates,), 0.9, dtype=torch.float64, requires_grad=True)
    found = smc.filter(
        *walkers(theta), SEEN[:, None].expand(-1, replicates), None, 3,
        resampling="multinomial", criterion="always", ancestor_grad=ancestor_grad, baseline=baseline,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(found.surrogate.sum(), theta)
    return gradient, found


def exact():
    theta = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    value = expected_log_evidence(theta)
    return float(value.detach()), float(torch.autograd.grad(value, theta)[0])


def test_score_gradient_is_the_enumerated_one_and_without_it_the_gradient_is_biased():
    value, gradient = exact()
    scored, found = gradients("score")
    assert abs(z_score(found.log_evidence.detach(), value)) < 4
    assert torch.equal(found.surrogate, found.log_evidence)  # the value is the same
    assert abs(z_score(scored, gradient)) < 4
    plain, _ = gradients(None)
    assert abs(z_score(plain, gradient)) > 4


def test_a_baseline_takes_variance_from_the_score_gradient_and_adds_no_bias():
    _, gradient = exact()
    plain, found = gradients("score")
    rest = torch.stack(
        [(found.log_evidence.detach().mean()).expand(40_000) * share for share in (0.6, 0.3, 0.0)]
    )
    based, _ = gradients("score", baseline=rest)
    assert abs(z_score(based, gradient)) < 4
    assert float(based.var()) < 0.7 * float(plain.var())


def test_relaxed_gradient_is_finite_and_goes_through_the_choice_of_ancestors():
    gradient, found = gradients("relaxed", 2000)
    plain, _ = gradients(None, 2000)
    assert bool(gradient.isfinite().all())
    assert not torch.allclose(gradient, plain)
    assert found.ancestors.shape == (3, 3, 2000)


def test_relaxed_ancestors_become_those_they_relax():
    u = torch.rand(3, 3, 3, 500, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x = SEEN[:, None].expand(-1, 500)
    options = {"resampling": "multinomial", "criterion": "always", "ancestor_grad": "relaxed", "uniforms": u}
    cold = smc.filter(*walkers(0.9), x, None, 3, temperature=1e-6, **options)
    state = PLACES[:, None].expand(3, 500)
    for t in (1, 2):  # by the ancestors it reports
        state = 0.8 * state.gather(0, cold.ancestors[t]) + MOVES[:, None]
    assert float((cold.states[2] - state).abs().quantile(0.99)) < 1e-6
    warm = smc.filter(*walkers(0.9), x, None, 3, temperature=0.5, **options)
    value, _ = exact()
    assert abs(z_score(cold.log_evidence, value)) < 4
    assert abs(z_score(warm.log_evidence, value)) > 4  # no estimate of what it relaxes


def test_relaxed_ancestors_refuse_states_that_cannot_be_averaged():
    with pytest.raises(OptionError, match="int64"):
        run(from_prior(), 4, 3, resampling="multinomial", ancestor_grad="relaxed")


@pytest.mark.parametrize("ancestor_grad", ["score", "relaxed"])
def test_gradients_of_ancestors_need_independent_ones(ancestor_grad):
    with pytest.raises(OptionError, match="multinomial"):
        run(from_prior(), 4, 3, ancestor_grad=ancestor_grad)
