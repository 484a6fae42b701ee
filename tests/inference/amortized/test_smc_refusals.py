"""What a particle filter and its smoother refuse, and in which words."""

import math

import pytest
import torch
from torch.distributions import Normal, Poisson

from fspace.errors import DataError, NumericalError, OptionError
from fspace.inference.amortized import particle_checks as checks
from fspace.inference.amortized import smc
from fspace.inference.amortized.smoothing import backward_simulation


def plain(particles=4, steps=5, series=3, lengths=None, change=lambda t, w: w, twist=None, **options):
    """A filter whose increments `change` may spoil."""

    def init(n, x, noise):
        return torch.zeros(n, series), change(0, torch.zeros(n, series))

    def step(z, x, t, noise):
        return z, change(t, torch.zeros(particles, series))

    return smc.filter(init, step, torch.zeros(steps, series), lengths, particles, twist=twist, **options)


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([5, 0, 3], r"Series 1 is empty \(lengths\[1\] = 0\)"),
        ([5, 4, -1], r"lengths\[2\] = -1, but observations have 5 steps"),
        ([6, 4, 1], r"lengths\[0\] = 6, but observations have 5 steps"),
        ([5, 4], r"shape \(2,\), but there are 3 series"),
        (torch.tensor([[5, 4, 3]]), r"shape \(1, 3\)"),
        ([5.0, 4.0, 3.0], "whole numbers, not float32"),
        (torch.tensor([5.5, 4, 3]), "whole numbers, not float32"),
        ([True, True, True], "whole numbers, not bool"),
        (["5", "4", "3"], "whole numbers"),
        (5, r"shape \(\), but there are 3 series"),
    ],
)
def test_lengths_that_lie(lengths, words):
    with pytest.raises(DataError, match=words):
        plain(lengths=lengths)


def spoil(step, series, value, particles=slice(None)):
    def change(t, weight):
        if t == step:
            weight[particles, series] = value
        return weight

    return change


@pytest.mark.parametrize("criterion", ["ess", "always", "never"])
@pytest.mark.parametrize("step", [0, 2, 4])
def test_weights_that_end_a_series_are_named(criterion, step):
    with pytest.raises(NumericalError, match=rf"Series 1, step {step} of 5: all log-weights are -inf"):
        plain(change=spoil(step, 1, -torch.inf), criterion=criterion)
    with pytest.raises(NumericalError, match=rf"Series 2, step {step} of 5: 1 of 4 log-weights are NaN"):
        plain(change=spoil(step, 2, torch.nan, 1), criterion=criterion)
    with pytest.raises(NumericalError, match=rf"Series 0, step {step} of 5: a log-weight is \+inf"):
        plain(change=spoil(step, 0, torch.inf, 1), criterion=criterion)
    with pytest.raises(NumericalError, match=r"3 series are affected: 0, 1, 2"):
        plain(change=spoil(step, slice(None), torch.nan), criterion=criterion)
    some = plain(
        change=spoil(step, 1, -torch.inf, slice(0, 2)), criterion=criterion
    )  # half of them is no end
    assert some.log_evidence.tolist() == pytest.approx([0.0, math.log(0.5), 0.0], abs=1e-12)


def test_what_stands_after_the_end_is_not_refused():
    found = plain(lengths=[5, 2, 5], change=spoil(3, 1, torch.nan))
    assert found.log_evidence.tolist() == [0.0, 0.0, 0.0]


def test_dead_particles_have_no_gradient_and_no_children():
    bias = torch.zeros(4, 3, requires_grad=True)

    def change(t, weight):
        weight = weight + bias
        return weight.masked_fill(torch.arange(4)[:, None] < 2, -torch.inf) if t == 1 else weight

    found = plain(change=change, criterion="always")
    found.log_evidence.sum().backward()
    assert bool(bias.grad.isfinite().all())
    assert bool((found.ancestors[2] >= 2).all())


@pytest.mark.parametrize(
    "options", [{"criterion": "always"}, {"resampling": "multinomial", "ancestor_grad": "relaxed"}]
)
def test_a_twist_that_is_not_finite_is_refused(options):
    with pytest.raises(NumericalError, match="Series 0, step 1 of 5"):
        plain(twist=lambda z, t: torch.full((4, 3), torch.nan if t == 1 else 0.0), **options)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda n: (torch.zeros(n, 3), torch.zeros(3, n)), r"step \(t = 1\) returned torch.float32 \[3, 4\]"),
        (lambda n: (torch.zeros(n, 3), torch.zeros(n, 1)), r"\[4, 1\] for the log-weights"),
        (lambda n: (torch.zeros(n, 3), torch.zeros(n, 3, dtype=torch.int64)), "real numbers"),
        (lambda n: (torch.zeros(n, 3), 0.0), "float for the log-weights"),
        (lambda n: (torch.zeros(3, n), torch.zeros(n, 3)), r"state with \[3, 4\]"),
        (lambda n: ({"z": torch.zeros(n, 3), "n": 1}, torch.zeros(n, 3)), "state with int"),
        (lambda n: torch.zeros(n, 3), r"must return \(state, log_weight\), not Tensor"),
        (lambda n: None, "not NoneType"),
    ],
)
def test_wrong_answers_of_step_and_init(answer, words):
    def right(n, x, noise):
        return torch.zeros(n, 3), torch.zeros(n, 3)

    x = torch.zeros(5, 3)
    with pytest.raises(OptionError, match=words):
        smc.filter(right, lambda z, x, t, noise: answer(4), x, None, 4)
    with pytest.raises(OptionError, match="^init"):
        smc.filter(lambda n, x, noise: answer(4), lambda z, x, t, noise: (z, z), x, None, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"particles": 0}, "particles=0"),
        ({"resampling": "best"}, "resampling='best' does not exist; there are 'systematic'"),
        ({"criterion": "sometimes"}, "criterion='sometimes'"),
        ({"ancestor_grad": "full"}, "ancestor_grad='full'"),
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"threshold": math.nan}, "threshold=nan"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"twist": lambda z, t: torch.zeros(3)}, r"twist \(t = 0\) returned torch.float32 \[3\]"),
    ],
)
def test_options_that_do_not_exist(options, words):
    with pytest.raises(OptionError, match=words):
        plain(**options)


def test_options_of_another_type():
    """Asked of the checks themselves: the types of `filter` are checked before it under test, and nowhere else."""
    right = {
        "particles": 4, "resampling": "residual", "criterion": "ess", "threshold": 0.5, "ancestor_grad": None,
        "temperature": 0.5,
    }  # fmt: skip
    checks.options(**right)
    for name, value in (
        ("particles", 4.0),
        ("particles", True),
        ("threshold", "half"),
        ("temperature", None),
    ):
        with pytest.raises(OptionError, match=f"{name}={value!r}"):
            checks.options(**right | {name: value})
    with pytest.raises(DataError, match="baseline must be a tensor .* not float"):
        checks.numbers("baseline", 1.0, (5, 3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"noise": torch.zeros(5, 3, 4)}, r"noise is \(5, 3, 4\); it must be .* = \[5, 4, 3, ...\]"),
        ({"noise": {"z": 1.0}}, "noise is float"),
        ({"uniforms": torch.zeros(5, 4, 3)}, r"uniforms has shape \(5, 4, 3\); it must be \(5, 1, 3\)"),
        ({"baseline": torch.zeros(5)}, r"baseline has shape \(5,\); it must be \(5, 3\)"),
        (
            {"baseline": torch.zeros(5, 3).fill_diagonal_(math.nan)},
            r"baseline\[0, 0\] is nan; it must be finite",
        ),
        (
            {"uniforms": torch.full((5, 1, 3), math.nan)},
            r"uniforms\[0, 0, 0\] is nan; it must lie in \[0, 1\)",
        ),
        ({"uniforms": torch.ones(5, 1, 3)}, r"uniforms\[0, 0, 0\] is 1; it must lie in \[0, 1\)"),
        ({"uniforms": -0.5 * torch.ones(5, 1, 3)}, "uniforms.* is -0.5"),
        ({"steps": 0}, "0 steps of 3 series"),
        ({"series": 0}, "5 steps of 0 series"),
    ],
)
def test_shapes_that_do_not_fit(options, words):
    with pytest.raises(DataError, match=words):
        plain(**options)


def test_observations_must_begin_alike():
    x = {"a": torch.zeros(5, 3), "b": torch.zeros(5, 2)}
    with pytest.raises(DataError, match=r"different \[steps, series\]: \(5, 2\), \(5, 3\)"):
        smc.filter(lambda n, x, e: None, lambda z, x, t, e: None, x, None, 4)
    with pytest.raises(DataError, match="must be a tensor"):
        smc.filter(lambda n, x, e: None, lambda z, x, t, e: None, torch.zeros(5), None, 4)


def test_backward_simulation_refuses_what_it_cannot_use():
    found = plain()
    with pytest.raises(OptionError, match=r"log_transition \(t = 4\) returned \[4, 3\]; .* = \[4, 6, 3\]"):
        backward_simulation(found, lambda z, following, t: torch.zeros(4, 3), 6)
    with pytest.raises(OptionError, match="paths=0"):
        backward_simulation(found, lambda z, following, t: torch.zeros(4, 6, 3), 0)
    with pytest.raises(DataError, match=r"log_transition \(t = 4\) refused its values"):
        backward_simulation(found, lambda z, following, t: Poisson(1.0).log_prob(z - 1), 6)
    for value in (-torch.inf, torch.nan):

        def density(z, following, t, value=value):
            return torch.full((4, 6, 3), value) if t == 3 else torch.zeros(4, 6, 3)

        with pytest.raises(NumericalError, match="Series 0: log_transition gives no particle of step 2"):
            backward_simulation(found, density, 6)


def counts(likelihood, x, lengths=None, **options):
    """A random walk seen through a distribution of torch, which raises ValueError for what is outside its support."""

    def init(n, x, noise):
        z = torch.zeros(n, len(x))
        return z, likelihood(z).log_prob(x)

    def step(z, x, t, noise):
        z = z + 0.1 * torch.randn_like(z)
        return z, likelihood(z).log_prob(x)

    return smc.filter(init, step, x, lengths, 4, **options)


@pytest.mark.parametrize("likelihood", [lambda z: Poisson(z.exp()), lambda z: Normal(z, 1.0)])
@pytest.mark.parametrize("step", [0, 2])
def test_observations_outside_the_support_name_the_step_and_nan_the_series(likelihood, step):
    x = torch.ones(5, 3)
    x[step, 1] = math.nan
    source = "init" if step == 0 else r"step \(t = 2\)"
    with pytest.raises(DataError, match=rf"^{source} of the model .* observation of series 1 is not finite"):
        counts(likelihood, x)
    if step:
        assert (
            counts(likelihood, x, [5, 2, 5]).log_evidence.isfinite().all()
        )  # after the end it is not looked at
    x[step, 1] = -1.0
    if likelihood(torch.zeros(1)).support.is_discrete:
        with pytest.raises(
            DataError, match=rf"^{source} of the model refused its values. Is an obs.*outside"
        ) as refused:
            counts(likelihood, x)
        assert isinstance(refused.value.__cause__, ValueError) and "Poisson" in str(refused.value)
    else:
        assert counts(likelihood, x).log_evidence.isfinite().all()


def test_errors_of_the_model_that_are_not_of_values_pass_through():
    def step(z, x, t, noise):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        smc.filter(lambda n, x, e: (torch.zeros(n, 3),) * 2, step, torch.zeros(5, 3), None, 4)


def test_a_state_may_change_its_form_only_where_all_series_are_of_one_length():
    def init(n, x, noise):
        return {"path": torch.zeros(n, 3, 1)}, torch.zeros(n, 3)

    def longer(state, x, t, noise):
        path = state["path"]
        return {"path": torch.cat([path, path[..., -1:] + 1], -1)}, torch.zeros(4, 3)

    def renamed(state, x, t, noise):
        return {"z": torch.zeros(4, 3, 1)}, torch.zeros(4, 3)

    x = torch.zeros(5, 3)
    assert smc.filter(init, longer, x, None, 4).states[-1]["path"].shape == (4, 3, 5)
    for step in (longer, renamed):
        with pytest.raises(OptionError, match=r"step \(t = 1\) returned a state of another form"):
            smc.filter(init, step, x, [5, 4, 1], 4)
