"""Where predictives end: no variance, no samples, weights of zero, levels and counts that are none."""

import math

import numpy as np
import pytest
import torch

from fspace.errors import DataError, OptionError
from fspace.predictive import Categorical, Gaussian, Mixture, Samples

NAN, INF = math.nan, math.inf
DTYPES = [torch.float32, torch.float64]


def gaussian(mean, variance, dtype=torch.float64):
    variance = torch.tensor(variance, dtype=dtype)
    return Gaussian(torch.tensor(mean, dtype=dtype), variance, torch.diag(variance))


FORMS = {
    "gaussian": lambda: gaussian([0.0, 1.0], [0.5, 2.0]),
    "mixture": lambda: Mixture(
        [gaussian([0.0, 1.0], [0.5, 2.0]), gaussian([1.0, 1.0], [1.0, 1.0])], [0.3, 0.7]
    ),
    "samples": lambda: Samples(torch.randn(7, 2)),
    "noisy samples": lambda: Samples(torch.randn(7, 2), 0.1),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_variance_all_probability_is_at_the_mean(dtype):
    g = gaussian([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], dtype)
    y = [-1.0, 0.0, 1.0]
    assert g.log_prob(y).tolist() == [-INF, INF, -INF]
    assert g.cdf(y).tolist() == [0.0, 1.0, 1.0]
    # the limit of a variance that goes to zero, except at the mean itself, where P(value <= mean) is one
    near = gaussian([0.0, 0.0, 0.0], [1e-12] * 3, dtype)
    assert near.cdf(y).tolist() == [0.0, 0.5, 1.0]
    assert near.log_prob(y)[1] > 10 and (near.log_prob(y)[[0, 2]] < -1e10).all()
    assert g.log_prob([NAN] * 3).isnan().all() and g.cdf([NAN] * 3).isnan().all()
    assert g.quantile([0.1, 0.9]).abs().max() == 0


def test_a_variance_of_zero_beside_others_spoils_neither_values_nor_gradients():
    mean = torch.tensor([0.3, 0.3], requires_grad=True)
    g = Gaussian(mean, torch.tensor([0.0, 2.0]))
    alone = Gaussian(torch.tensor([0.3]), torch.tensor([2.0]))
    assert g.log_prob([0.3, 1.0])[1] == alone.log_prob([1.0])[0]
    g.log_prob([0.3, 1.0])[1].backward()
    assert mean.grad.isfinite().all() and mean.grad[1] == pytest.approx((1.0 - 0.3) / 2.0)


def test_a_component_without_weight_says_nothing_even_where_its_density_is_infinite():
    sure, unsure = gaussian([0.0], [0.0]), gaussian([0.0], [1.0])
    mixture = Mixture([sure, unsure], [0.0, 1.0])
    assert mixture.log_prob([0.0]) == unsure.log_prob([0.0])
    assert Mixture([sure, unsure], [0.5, 0.5]).log_prob([0.0]) == INF
    assert Mixture([sure, unsure], [0.5, 0.5]).cdf([0.0]).item() == pytest.approx(0.75)


@pytest.mark.parametrize("form", FORMS)
def test_no_samples_have_the_shape_of_samples(form):
    predictive = FORMS[form]()
    assert predictive.rsample(0).shape == (0, 2)


def test_no_labels():
    assert Categorical([[1.0, 0.0], [0.5, 0.5]]).rsample(0).shape == (0, 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [-1, True])
def test_counts_that_are_none(form, count):
    with pytest.raises(OptionError, match="how many to draw"):
        FORMS[form]().rsample(count)


@pytest.mark.parametrize("seed", [-1, 2**32, True])
def test_seeds_that_are_none(seed):
    with pytest.raises(OptionError, match="seed"):
        FORMS["gaussian"]().rsample(1, seed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("p", [0.0, 1.0, -0.1, 1.1, NAN, [], [0.1, 1.0]])
def test_levels_of_quantiles(form, p):
    with pytest.raises(OptionError, match="strictly between 0 and 1"):
        FORMS[form]().quantile(p)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("level", [0.0, 1.0, 1.5, -1.0, NAN, 1 - 2**-53])
def test_levels_of_intervals(form, level):
    with pytest.raises(OptionError, match="strictly between 0 and 1"):
        FORMS[form]().interval(level)


def test_a_level_may_be_nearly_one():
    assert all(end.isfinite().all() for end in FORMS["gaussian"]().interval(1 - 1e-12))


def test_the_distribution_function_of_a_sample_at_nan_is_nan():
    values = FORMS["samples"]().cdf([NAN, 100.0])
    assert values[0].isnan() and values[1] == 1


@pytest.mark.parametrize("values", [torch.zeros(0, 2), torch.zeros(3), torch.zeros(3, 2, dtype=torch.int64)])
def test_values_that_are_no_samples(values):
    with pytest.raises(DataError, match="at least one"):
        Samples(values)


def test_probabilities_of_zero_and_one():
    sure = Categorical([[1, 0], [0, 1]])  # a list of whole numbers
    assert sure.log_prob([0, 0]).tolist() == [0.0, -INF]
    assert sure.entropy.tolist() == [0.0, 0.0] and sure.mutual_information.tolist() == [0.0, 0.0]
    assert sure.rsample(20, seed=0).tolist() == [[0, 1]] * 20
    np.testing.assert_array_equal(Categorical(np.eye(2)).probs.numpy(), np.eye(2))


@pytest.mark.parametrize("probs", [torch.zeros(0, 3, 2), torch.zeros(2, 0), "ab", [[0.5, 0.6]], [[NAN, 1.0]]])
def test_what_is_no_probability(probs):
    with pytest.raises(DataError):
        Categorical(probs)


def test_weights_that_are_no_numbers():
    part = gaussian([0.0], [1.0])
    for weights in ([NAN, 1.0], [-1.0, 2.0], [0.0, 0.0], [1.0]):
        with pytest.raises(OptionError, match="weights"):
            Mixture([part, part], weights)
