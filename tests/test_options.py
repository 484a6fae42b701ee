"""Options that cannot be used are refused by name before the fit, and kernels of every sort fit or say why not."""

import numpy as np
import pandas as pd
import pytest
import torch
from gpytorch import kernels
from gpytorch.constraints import Interval
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.priors import GammaPrior
from scipy.stats import norm

import fspace
from fspace import interpret
from fspace.errors import DataError, DeviceError, NumericalError, OptionError
from fspace.kernels import MLP
from fspace.report import CAPTIONS, report_html

RNG = np.random.default_rng(0)
X = RNG.standard_normal((20, 2))
Y = np.sin(2 * X[:, 0]) + 0.1 * RNG.standard_normal(20)


def fit(**options):
    return fspace.GPRegressor(**{"kernel": "matern", "members": 1, **options}).fit(X, Y)


@pytest.mark.parametrize("seed", [None, "a", -1, 1.5, 2**32, np.random.RandomState(0)])
def test_seeds(seed):
    with pytest.raises(OptionError, match="seed"):
        fit(seed=seed)


def test_the_largest_seed_and_numpy_s_numbers():
    assert np.isfinite(fit(seed=2**32 - 1, kernel="deep", members=2).predict(X)).all()
    some = fit(seed=np.int64(3), inference="collapsed", inducing=np.float32(0.1))
    assert 1 < some.posterior_.site.shift.shape[-1] < 20


@pytest.mark.parametrize("categories", [5, {"a": 1}, [None], [0.7], [2], [-1]])
def test_categories(categories):
    with pytest.raises((OptionError, DataError), match="categories"):
        fit(categories=categories)


def test_categories_by_position_are_predicted_from_the_array_they_were_fitted_on():
    table = np.column_stack([X[:, 0], np.arange(20) % 3])
    model = fspace.GPRegressor(kernel="matern", categories=np.array([1])).fit(table, Y)
    frame = pd.DataFrame({"a": table[:, 0], "b": pd.Categorical(table[:, 1])})
    by_frame = fspace.GPRegressor(kernel="matern").fit(frame, Y)
    np.testing.assert_allclose(model.predict(table), by_frame.predict(frame), rtol=1e-8)
    with pytest.raises(DataError, match="7"):
        model.predict([[0.0, 7.0]])


def test_a_device_that_holds_no_numbers():
    with pytest.raises(DeviceError, match="meta"):
        fit(device="meta")


def test_bounds_of_the_noise_are_refused_rather_than_dropped():
    with pytest.raises(OptionError, match="bounds"):
        fit(likelihood=GaussianLikelihood(noise_constraint=Interval(0.5, 1.0)))


def test_a_prior_that_is_not_of_the_noise_is_refused():
    own = GaussianLikelihood()
    own.register_prior("mine", GammaPrior(1.0, 1.0), lambda module: module.noise)
    with pytest.raises(OptionError, match="not its noise_prior"):
        fit(likelihood=own)


@pytest.mark.parametrize("options", [{"kernel": "auto"}, {"kernel": "deep"}, {"inference": "collapsed"}])
def test_a_prior_of_the_noise_is_refused_where_it_would_not_count(options):
    with pytest.raises(OptionError, match="prior on its noise"):
        fit(likelihood=GaussianLikelihood(noise_prior=GammaPrior(1.0, 1.0)), **options)


@pytest.mark.parametrize("inference", ["exact", "collapsed"])
@pytest.mark.parametrize(
    "kernel",
    [
        kernels.RBFKernel(ard_num_dims=3),
        kernels.ScaleKernel(kernels.RBFKernel(active_dims=[5])),
        kernels.RBFKernel(batch_shape=torch.Size([2])),
        kernels.MultitaskKernel(kernels.RBFKernel(), 2),
        fspace.DeepKernel(MLP(3, (4,), 2), kernels.RBFKernel()),
    ],
    ids=["lengthscales", "columns", "batch", "tasks", "network"],
)
def test_kernels_for_other_tables(kernel, inference):
    with pytest.raises(OptionError, match="cannot be used on rows of shape"):
        fit(kernel=kernel, inference=inference)


@pytest.mark.parametrize("inference", ["exact", "collapsed"])
@pytest.mark.parametrize(
    "kernel",
    [kernels.LinearKernel(), kernels.ConstantKernel(), kernels.RFFKernel(20), kernels.PolynomialKernel(2)],
)
def test_kernels_without_a_full_rank_fit(kernel, inference):
    model = fit(kernel=kernel, inference=inference)
    mean, std = model.predict(X, return_std=True)
    assert np.isfinite(mean).all() and (std > 0).all()
    assert model.relevance_.sum() == pytest.approx(1.0)


def test_relevance_of_a_linear_function_is_its_slopes_times_spread():
    """With the exact posterior the rows are the inducing inputs, where gpytorch's linear kernel loses a gradient."""
    model = fspace.GPRegressor(kernel=kernels.LinearKernel(), inference="exact").fit(X, 3 * X[:, 0] - X[:, 1])
    share = np.array([3.0, 1.0]) * X.std(axis=0)
    np.testing.assert_allclose(model.relevance_, share / share.sum(), rtol=0.02)


@pytest.mark.parametrize("options", [{"kernel": "auto"}, {"likelihood": "heteroscedastic"}])
def test_a_constant_target_has_no_residuals_to_learn_noise_from(options):
    rows = RNG.standard_normal((70, 2))
    model = fspace.GPRegressor(**{"kernel": "matern", "members": 1, **options}).fit(rows, np.full(70, 5.0))
    mean, std = model.predict(rows, return_std=True)
    np.testing.assert_allclose(mean, 5.0, atol=1e-6)
    assert (std < 0.01).all()


def test_a_half_precision_kernel_loads(tmp_path):
    model = fit(kernel=kernels.ScaleKernel(kernels.RBFKernel()).half())
    loaded = fspace.load(model.save(tmp_path / "m"))
    np.testing.assert_array_equal(loaded.predict(X), model.predict(X))


def test_what_is_no_covariance_says_so():
    with pytest.raises(NumericalError, match="not positive definite"):
        fit(kernel=kernels.CosineKernel())


def test_thresholds():
    model = fit()
    mean, std = model.predict(X, return_std=True)
    np.testing.assert_allclose(model.predict_cdf(X, mean), 0.5)
    np.testing.assert_allclose(model.predict_cdf(X, 0.3), norm.cdf(0.3, mean, std), atol=1e-9)
    for thresholds in ([0.1, 0.2], "abc"):
        with pytest.raises(DataError, match="thresholds"):
            model.predict_cdf(X, thresholds)


class Distance(kernels.Kernel):
    """exp(-|x - x'|), whose slope is NaN where x is x': the slope of the root there is infinite, times zero."""

    is_stationary = True

    def forward(self, x1, x2, diag=False, **params):
        squares = (x1[..., :, None, :] - x2[..., None, :, :]).square().sum(-1)
        k = torch.exp(-squares.sqrt())
        return k.diagonal(dim1=-2, dim2=-1) if diag else k


def test_a_slope_that_is_nan_is_told_and_kept(tmp_path):
    with pytest.warns(
        UserWarning, match="slope in its inputs is not finite .encoded columns .0, 1.*permutation"
    ):
        model = fit(kernel=Distance())
    assert np.isfinite(model.predict(X)).all() and np.isnan(model.relevance_).all()
    with pytest.raises(NumericalError, match="permutation"):
        interpret.relevance(model, X)
    shares = interpret.relevance(model, X, Y, "permutation")
    assert sum(shares.values()) == pytest.approx(1.0)
    assert CAPTIONS["relevance"] not in report_html(model, X, Y)  # no figure of what is not known
    assert CAPTIONS["relevance"] in report_html(fit(), X, Y)


def test_slopes_whose_squares_overflow_have_shares():
    model = fspace.GPRegressor(kernel="matern").fit(X, 1e149 * X[:, 0])
    with np.errstate(all="raise"):
        assert model.relevance_.sum() == pytest.approx(1.0) and model.relevance_[0] > 0.9
