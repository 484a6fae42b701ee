"""REBAR and RELAX: unbiased by enumeration, coupled on every sample, and of far lower variance than REINFORCE."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.distributions import Poisson
from torch.nn import functional as F

from fspace.errors import DataError, NumericalError, OptionError
from fspace.inference.amortized import backward, couple_binary, couple_categorical, iwae, rebar, relax

COUPLE = {"binary": couple_binary, "categorical": couple_categorical}


def uniforms(like, K, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (K, *like.shape)
    return [torch.rand(shape, generator=g, dtype=like.dtype) for _ in range(2)]


def objective(enumerable, model):
    """f(b [K, R, ...]) -> [R]: the IWAE bound of all K samples together; log q at relaxed values by its formula."""

    def f(b):
        if enumerable.kind == "binary":
            log_q = (b * model.logits - F.softplus(model.logits)).sum(-1)
        else:
            log_q = (b * model.logits.log_softmax(-1)).sum((-1, -2))
        return iwae(enumerable.log_joint_with(model.theta, b) - log_q)

    return f


class Control(nn.Module):
    """A free-form control variate of z [K, R, ...]."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(8, dtype=torch.float64))

    def forward(self, z):
        flat = z.movedim(0, 1).flatten(1)
        k = flat.shape[1]
        return (torch.tanh(flat * self.weight.repeat(3)[:k]) * self.weight.repeat(3)[1 : k + 1]).sum(1)


def phi_of(estimate, model):
    return torch.autograd.grad(estimate.encoder.sum(), model.logits, retain_graph=True)[0]


@pytest.mark.parametrize("K", [1, 2, 3])
def test_unbiased_by_enumeration(enumerable, scores, K):
    model = enumerable.replicates(50_000)
    coupling = COUPLE[enumerable.kind](model.logits, *uniforms(model.logits, K, seed=K))
    f = objective(enumerable, model)
    true_phi, true_theta = enumerable.exact(K)
    for estimate in (rebar(f, coupling, 0.5, 0.8), rebar(f, coupling, 0.1), relax(f, Control(), coupling)):
        assert scores(phi_of(estimate, model), true_phi).abs().max() < 4
        theta = torch.autograd.grad(estimate.decoder.sum(), model.theta, retain_graph=True)[0]
        assert scores(theta, true_theta).abs().max() < 4
        torch.testing.assert_close(estimate.bound, f(coupling.hard).detach())
    assert scores(phi_of(estimate, model), enumerable.exact(4 if K == 1 else 1)[0]).abs().max() > 6  # twin


def test_gradient_must_flow_through_the_condition(enumerable, scores):
    """Twin: with u' held constant (z~ without its gradient to the logits beyond the shift) the estimate is biased."""
    model = enumerable.replicates(50_000)
    u, v = uniforms(model.logits, 1)
    coupling = COUPLE[enumerable.kind](model.logits, u, v)
    f = objective(enumerable, model)
    held = COUPLE[enumerable.kind](model.logits.detach(), u, v).z_given_hard
    shift = model.logits if enumerable.kind == "binary" else model.logits.log_softmax(-1)
    cut = dataclasses.replace(coupling, z_given_hard=held + shift - shift.detach())
    torch.testing.assert_close(cut.z_given_hard, coupling.z_given_hard)
    truth = enumerable.exact(1)[0]
    assert scores(phi_of(rebar(f, coupling, 0.5), model), truth).abs().max() < 4
    assert scores(phi_of(rebar(f, cut, 0.5), model), truth).abs().max() > 20
    slope, other = (
        torch.autograd.grad(c.z_given_hard.sum(), model.logits, retain_graph=True)[0] for c in (coupling, cut)
    )
    assert (slope - other).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["binary", "categorical"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hard_values_of_both_agree_on_every_sample(kind, dtype):
    """Logits up to 20, a million coordinates; noise at the ends of the interval too."""
    g = torch.Generator().manual_seed(0)
    logits = torch.cat([torch.randn(40, 4, generator=g), torch.tensor([[20.0, -20.0, 0.0, 5.0]])]).to(dtype)
    u, v = (torch.rand(6000, 41, 4, generator=g).to(dtype) for _ in range(2))
    for noise, order in ((u, (0, 1, 0.5, 0)), (v, (1, 0, 0.5, 1))):
        noise[0] = torch.tensor(order, dtype=dtype)
        noise[1], noise[2] = 0.0, 1.0
    coupling = COUPLE[kind](logits, u, v)

    def hard(z):
        return (z > 0).to(dtype) if kind == "binary" else F.one_hot(z.argmax(-1), 4).to(dtype)

    assert coupling.z.isfinite().all() and coupling.z_given_hard.isfinite().all()
    assert torch.equal(hard(coupling.z), coupling.hard)
    assert torch.equal(hard(coupling.z_given_hard), coupling.hard)
    shuffled = COUPLE[kind](logits, u.flip(0), v)
    assert not torch.equal(
        hard(shuffled.z_given_hard), coupling.hard
    )  # the twin: another draw is not coupled


@pytest.mark.parametrize("kind", ["binary", "categorical"])
def test_both_have_the_distribution_of_z(kind):
    """z~ averaged over hard is distributed as z: by quantiles; and hard has the probabilities of the logits."""
    logits = torch.tensor([[0.7, -1.2, 0.1]], dtype=torch.float64)
    u, v = uniforms(logits, 200_000)
    coupling = COUPLE[kind](logits, u, v)
    levels = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    first, second = (torch.quantile(z[:, 0], levels, dim=0) for z in (coupling.z, coupling.z_given_hard))
    assert (first - second).abs().max() < 0.04
    chances = logits.sigmoid() if kind == "binary" else logits.softmax(-1)
    error = (chances * (1 - chances) / 200_000).sqrt()
    assert ((coupling.hard.mean(0) - chances) / error).abs().max() < 4
    given = coupling.z_given_hard[coupling.hard[:, 0, 0] == 1, 0, 0]
    assert (
        given - coupling.z[coupling.hard[:, 0, 0] == 1, 0, 0]
    ).abs().mean() > 0.3  # another draw, not the same


def toy(t, R=20_000, logit=0.0):
    """E (b - t)^2 for one bit, R replicates: logits, noise, f."""
    logits = torch.full((R, 1), logit, dtype=torch.float64, requires_grad=True)
    return logits, uniforms(logits, 1), lambda b: (b - t).square().sum((0, -1))


def spread(surrogate, logits):
    return torch.autograd.grad(surrogate.sum(), logits, retain_graph=True)[0].var().item()


def best(coupling, f, temperature, logits):
    """Variance at the best scalar eta, by regression, for the estimate is linear in it."""

    def slopes(eta):
        surrogate = rebar(f, coupling, temperature, eta).encoder
        return torch.autograd.grad(surrogate.sum(), logits, retain_graph=True)[0][:, 0]

    without, step = slopes(0.0), slopes(0.0) - slopes(1.0)
    both = torch.stack([without, step]).cov()
    return (without - both[0, 1] / both[1, 1] * step).var().item()


def test_variance_is_far_below_reinforce_at_minus_one():
    """f = (b + 1)^2 at temperature 1: at least ten times lower; with z~ drawn without b, unbiased still, it is not.

    Near t = 1/2 a relaxation of f has nothing to give, so that is no test of REBAR.
    """
    for logit in (0.0, 1.0):
        logits, (u, v), f = toy(-1.0, logit=logit)
        coupling = couple_binary(logits, u, v)
        plain = spread(f(coupling.hard).detach() * coupling.log_prob[0], logits)
        assert plain / best(coupling, f, 1.0, logits) > 10
        free = dataclasses.replace(coupling, z_given_hard=couple_binary(logits, v, u).z)
        assert plain / best(free, f, 1.0, logits) < 10
    logits, (u, v), f = toy(0.499)
    coupling = couple_binary(logits, u, v)
    plain = spread(f(coupling.hard).detach() * coupling.log_prob[0], logits)
    assert plain / best(coupling, f, 1.0, logits) < 1.5


def test_variance_of_many_bits_is_below_the_best_constant_baseline():
    """One bit says little: there a constant baseline is perfect. Ten bits, f = sum (b + 1)^2: REBAR beats every
    constant by more than two; without the coupling it loses to it."""
    logits = torch.linspace(-1, 1, 10, dtype=torch.float64).expand(20_000, 10).clone().requires_grad_()
    _, _, f = toy(-1.0)
    coupling = couple_binary(logits, *uniforms(logits, 1))
    free = dataclasses.replace(coupling, z_given_hard=couple_binary(logits, *uniforms(logits, 1, seed=1)).z)

    def total(surrogate):
        return torch.autograd.grad(surrogate.sum(), logits, retain_graph=True)[0].var(0).sum().item()

    value = f(coupling.hard).detach()
    constant = min(total((value - c) * coupling.log_prob[0]) for c in range(15, 36))
    assert constant / total(rebar(f, coupling, 0.5).encoder) > 2
    assert constant / min(total(rebar(f, free, 0.5, eta).encoder) for eta in (0.5, 0.75, 1.0, 1.25)) < 1


def test_second_moment_tunes_eta_and_temperature():
    """Descending it from a poor start lowers the variance; its gradient is that of the mean square."""
    logits, (u, v), f = toy(-1.0, R=4000)
    eta = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    log_temperature = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([eta, log_temperature], lr=0.05)
    spreads = []
    for step in range(150):
        coupling = couple_binary(logits, *uniforms(logits, 1, seed=step))
        estimate = rebar(f, coupling, log_temperature.exp(), eta)
        gradient = torch.autograd.grad(estimate.encoder.sum(), logits, retain_graph=True)[0]
        torch.testing.assert_close(estimate.second_moment, gradient.square().sum(1))
        spreads.append(gradient.var().item())
        optimiser.zero_grad()
        estimate.second_moment.mean().backward(inputs=[eta, log_temperature])
        optimiser.step()
    assert spreads[-1] < 0.1 * spreads[0]


def test_relax_learns_what_no_relaxation_of_f_gives():
    """f = (b - 0.499)^2: 150 steps of the second moment bring the variance to less than a hundredth of REINFORCE's."""
    logits, _, f = toy(0.499, R=200)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 1)).double()
    optimiser = torch.optim.Adam(net.parameters(), lr=0.02)
    ratios = []
    for step in range(150):
        coupling = couple_binary(logits, *uniforms(logits, 1, seed=step))
        estimate = relax(f, lambda z: net(z).sum((0, -1)), coupling)
        plain = spread(f(coupling.hard).detach() * coupling.log_prob[0], logits)
        ratios.append(plain / spread(estimate.encoder, logits))
        optimiser.zero_grad()
        estimate.second_moment.mean().backward(inputs=list(net.parameters()))
        optimiser.step()
    assert ratios[0] < 2 and ratios[-1] > 100


def test_parameters_inside_f_are_differentiated(enumerable):
    """theta's gradient is that of f at the hard sample, untouched by the control variate."""
    model = enumerable.replicates(3)
    coupling = COUPLE[enumerable.kind](model.logits, *uniforms(model.logits, 2))
    f = objective(enumerable, model)
    estimate = rebar(f, coupling, 0.5)
    expected = torch.autograd.grad(f(coupling.hard).mean(), model.theta)[0]
    backward(estimate, [model.theta], [model.logits])
    torch.testing.assert_close(model.theta.grad, -expected)


def test_batch_of_two_is_two_singles(enumerable):
    model = enumerable.replicates(2)
    u, v = uniforms(model.logits, 2)
    couple = COUPLE[enumerable.kind]

    def f(b):
        flat = b.flatten(2)
        return (flat * torch.arange(1.0, flat.shape[2] + 1, dtype=b.dtype)).sum(-1).square().mean(0)

    whole = phi_of(rebar(f, couple(model.logits, u, v), 0.5), model)
    for b in range(2):
        alone = rebar(f, couple(model.logits[b : b + 1], u[:, b : b + 1], v[:, b : b + 1]), 0.5)
        torch.testing.assert_close(phi_of(alone, model)[b], whole[b])


def test_refusals():
    logits, (u, v), f = toy(0.3, R=4)
    coupling = couple_binary(logits, u, v)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(OptionError, match="temperature"):
            rebar(f, coupling, temperature)
    with pytest.raises(OptionError, match="one number for all"):
        rebar(f, coupling, torch.ones(4, 1))
    with pytest.raises(DataError, match=r"u\[0, 2, 0\] = -0.5 is outside the support"):
        couple_binary(logits, torch.where(torch.arange(4)[:, None] == 2, -0.5, u), v)
    with pytest.raises(DataError, match="v has shape"):
        couple_categorical(logits, u, v[..., 0])
    with pytest.raises(DataError, match=r"The value of f has shape \[1, 4\]; it must be \[4\]"):
        rebar(lambda b: b.sum(-1), coupling, 0.5)
    with pytest.raises(NumericalError, match=r"f at the hard samples of datum \[2\] is nan"):
        relax(lambda b: torch.where(torch.arange(4) == 2, math.nan, f(b)), f, coupling)
    with pytest.raises(OptionError, match="need a gradient"):
        rebar(f, couple_binary(logits.detach(), u, v), 0.5)
    with torch.no_grad():
        blind = couple_binary(logits, u, v)
        with pytest.raises(OptionError, match="outside torch.no_grad"):
            rebar(f, coupling, 0.5)
    with pytest.raises(
        OptionError, match="outside torch.no_grad"
    ):  # logits ask for a gradient, the coupling has none
        rebar(f, blind, 0.5)
    for couple in COUPLE.values():
        for wrong in (math.nan, math.inf, -math.inf):
            with pytest.raises(DataError, match=r"logits\[2, 0\].*logits of a coupling are finite"):
                couple(torch.where(torch.arange(4)[:, None] == 2, wrong, logits), u, v)
    with pytest.raises(DataError, match=r"u has shape \[\]"):
        couple_binary(logits, u[0, 0, 0], v)
    with pytest.raises(DataError, match="f of hard latents refused its values"):
        rebar(lambda b: Poisson(1.0).log_prob(b - 2).sum((0, -1)), coupling, 0.5)


def test_float32_and_devices(device):
    logits = torch.tensor([[20.0, -20.0, 0.3]], device=device, requires_grad=True)
    g = torch.Generator(device=device).manual_seed(0)
    u, v = (torch.rand(5, 1, 3, generator=g, device=device) for _ in range(2))
    estimate = rebar(lambda b: (b - 0.4).square().sum((0, -1)), couple_binary(logits, u, v), 0.05)
    backward(estimate, [], [logits])
    assert logits.grad.isfinite().all() and estimate.second_moment.isfinite().all()
