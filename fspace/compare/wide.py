"""The same prior in function space: a network's prior over weights as its infinitely wide limit, and as functions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.base import BaseEstimator, RegressorMixin
from torch import Tensor

from fspace.data import TableEncoder, check_target
from fspace.errors import DataError, OptionError
from fspace.inference.candidates import input_scaling
from fspace.inference.exact import log_marginal_likelihood
from fspace.inference.finish import finish_exact
from fspace.inference.gp import GPPosterior, Scaling
from fspace.inference.numerics import seeded
from fspace.inference.optimise import MIN_NOISE, gaussian_likelihood
from fspace.inference.weights.likelihoods import LOG_NOISE
from fspace.inference.weights.network import Network
from fspace.inference.weights.priors import GaussianPrior, named_prior
from fspace.kernels.evaluate import covariance
from fspace.kernels.extractors import MLP
from fspace.kernels.neural import NeuralKernel
from fspace.posterior import Predictive
from fspace.predictive import check_count, generator_for

MOST_ROWS = 4000  # the posterior is exact
LIMIT = "these networks, infinitely wide"


class WideNetworkGP(RegressorMixin, BaseEstimator):
    """Exact Gaussian process with the prior that `BNNRegressor` has when its hidden layers are infinitely wide.

    depth: hidden layers; activation: "relu" or "erf"; prior: as for `BNNRegressor` (one that scales with the fan-in,
    without which there is no limit), of the network on standardised x and y. Nothing in the kernel is learned.
    noise_variance: in squared units of y, where it is known (None: the most probable one, under the prior that networks
    have). y has one column; 4,000 rows at most. Raises a FspaceError for data or options that cannot be used.
    Source: Neal (1996); Lee et al. (2018), eq. 4 to 6.
    """

    def __init__(
        self, depth: Any = 1, activation: Any = "relu", prior: Any = "scaled", noise_variance: Any = None
    ):
        self.depth = depth
        self.activation = activation
        self.prior = prior
        self.noise_variance = noise_variance

    def fit(self, X: Any, y: Any) -> WideNetworkGP:
        """Condition on X [n, d] and y [n]."""
        kernel = limit_kernel(self.prior, self.depth, self.activation)
        self.encoder_ = TableEncoder(owner=type(self).__name__)
        x = np.asarray(self.encoder_.fit_transform(X), dtype=np.float64)
        target = check_target(y, len(x))
        if target.ndim > 1 or not 2 <= len(x) <= MOST_ROWS:
            raise DataError(
                f"WideNetworkGP takes 2 to {MOST_ROWS:,} rows and one column of y; got y {list(target.shape)}."
            )
        shift, scale = target.mean(), target.std() or 1.0
        tensor = lambda a: torch.as_tensor(a, dtype=torch.float64)  # noqa: E731
        parts = {name: tensor(value) for name, value in input_scaling(x, False).items()}
        scaling = Scaling(**parts, y_shift=tensor([shift]), y_scale=tensor([scale]))
        rows, modelled = scaling.inputs(tensor(x)), tensor((target - shift) / scale)[:, None]
        noise = (
            self.noise_variance / scale**2
            if self.noise_variance is not None
            else _likeliest_noise(covariance(kernel, rows), modelled)
        )
        likelihood = gaussian_likelihood(1, noise, rows.device)
        done = finish_exact(kernel, likelihood, rows, modelled)
        self.log_evidence_ = done.log_evidence
        self.posterior_ = GPPosterior(done.basis, done.site, scaling)
        self.n_features_in_ = x.shape[1]
        return self

    def predictive(self, X: Any) -> Predictive:
        """Distribution of y at X [n, d]."""
        return self.posterior_.observed(torch.as_tensor(self.encoder_.transform(X), dtype=torch.float64))

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Mean of y [n]; with return_std also its standard deviation, noise included."""
        predictive = self.predictive(X)
        mean = predictive.mean.numpy()
        return (mean, predictive.stddev.numpy()) if return_std else mean


def limit_kernel(prior: Any, depth: int, activation: str) -> NeuralKernel:
    """The kernel of an infinitely wide network with this prior, float64. Raises OptionError where there is none."""
    weights: GaussianPrior = named_prior(prior)
    if not weights.scaled:
        raise OptionError(
            f"prior={prior!r}: a network whose weights do not shrink with its width has no infinitely wide limit; take "
            "'scaled', or GaussianPrior(weight_variance, bias_variance)."
        )
    kernel = NeuralKernel(depth=depth, activation=activation).double()
    kernel.weight_variance, kernel.bias_variance = weights.weight_variance, weights.bias_variance
    return kernel.requires_grad_(False).eval()


def _likeliest_noise(k: Tensor, y: Tensor) -> float:
    """The variance of the noise that is most probable, of standardised y, under the prior that networks have."""

    def loss(log_noise: float) -> float:
        evidence = log_marginal_likelihood(k, y, torch.tensor([math.exp(log_noise)], dtype=torch.float64))
        return 0.5 * ((log_noise - LOG_NOISE[0]) / LOG_NOISE[1]) ** 2 - evidence.item()

    return math.exp(minimize_scalar(loss, bounds=(math.log(MIN_NOISE), 2.0), method="bounded").x)


def network_prior_draws(
    x: NDArray,
    hidden: tuple[int, ...],
    activation: str,
    prior: Any = "scaled",
    draws: int = 200,
    seed: int = 0,
) -> NDArray:
    """Functions [s, n] at x [n, d] of networks whose weights are drawn from their prior (standardised units)."""
    with seeded(seed):
        network = Network.of(MLP(x.shape[1], hidden, 1, activation).double())
    scales = named_prior(prior).scales(network)
    generator = generator_for(seed, torch.device("cpu"))
    w = scales * torch.randn(check_count(draws, 1), network.size, generator=generator, dtype=torch.float64)
    return network.many(w, torch.from_numpy(np.asarray(x, dtype=np.float64)))[..., 0].numpy()


def limit_prior_draws(
    x: NDArray, depth: int, activation: str, prior: Any = "scaled", draws: int = 200, seed: int = 0
) -> NDArray:
    """Functions [s, n] at x [n, d] of the infinitely wide network with this prior (standardised units)."""
    k = covariance(limit_kernel(prior, depth, activation), torch.from_numpy(np.asarray(x, dtype=np.float64)))
    values, vectors = torch.linalg.eigh(k)
    white = torch.randn(
        len(x), draws, generator=generator_for(seed, torch.device("cpu")), dtype=torch.float64
    )
    return ((vectors * values.clamp(min=0).sqrt()) @ white).T.numpy()


def prior_panels(
    hidden: tuple[int, ...], activation: str, x: NDArray, draws: int = 200
) -> dict[str, NDArray]:
    """Functions [s, n] at x [n, 1] (standardised) from priors that a reader may take for alike, by name; LIMIT is the
    infinitely wide network."""
    width, deep = hidden[0], (hidden[0],) * 3
    k = torch.exp(-0.5 * (torch.from_numpy(x) - torch.from_numpy(x).T).square()) + 1e-9 * torch.eye(len(x))
    white = torch.randn(len(x), draws, generator=generator_for(0, torch.device("cpu")), dtype=torch.float64)
    return {
        f"these networks: {width} units": network_prior_draws(x, hidden, activation, draws=draws),
        LIMIT: limit_prior_draws(x, len(hidden), activation, draws=draws),
        "the same prior, 3 units": network_prior_draws(x, (3,), activation, draws=draws),
        f"the same prior, three layers of {width}": network_prior_draws(x, deep, activation, draws=draws),
        "every weight N(0, 1)": network_prior_draws(x, hidden, activation, 1.0, draws),
        "every weight N(0, 1), three layers": network_prior_draws(x, deep, activation, 1.0, draws),
        "GP, squared exponential": (torch.linalg.cholesky(k) @ white).T.numpy(),
    }
