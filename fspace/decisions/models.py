"""Models of an outcome by name, with settings for the few rows that experiments make."""

from __future__ import annotations

import math
from typing import Any

from fspace.errors import OptionError

KERNELS = ("matern", "rbf", "neural", "deep")  # of GPs; "neural" is the infinitely wide network
# Mean and spread of the log of the noise variance, in units of the outcome's variance. Without this prior a few rows
# in many dimensions are often taken for nothing but noise, after which there is nothing to search by.
LOG_NOISE = (-4.0, 2.0)


def named_model(name: str, seed: int = 0) -> Any:
    """An estimator: a GP with one of KERNELS, or a network by a method of `fspace.inference.weights.METHODS`.

    GPs start from little noise, which all but "deep" have a log-normal prior on (wider than BoTorch's, so that
    experiments may be noisy).
    Networks have two hidden layers of 32 and constant noise, and take 500 steps over all rows; those of "hmc" (16
    chains) and "nuts" (one) one layer of 16, with 128 and 64 states: few for a posterior, many for one experiment.
    Raises OptionError.
    """
    from gpytorch.likelihoods import GaussianLikelihood
    from gpytorch.priors import LogNormalPrior

    from fspace.estimators import GPRegressor
    from fspace.inference.weights import HMC, METHODS, NUTS, Ensemble
    from fspace.network_estimators import BNNRegressor

    if name in KERNELS:
        likelihood = GaussianLikelihood(noise_prior=None if name == "deep" else LogNormalPrior(*LOG_NOISE))
        likelihood.noise = math.exp(LOG_NOISE[0])
        return GPRegressor(kernel=name, likelihood=likelihood, inference="exact", progress=False, seed=seed)
    if name not in METHODS:
        raise OptionError(
            f"model={name!r} does not exist; choose one of {', '.join((*KERNELS, *METHODS))}, or pass an estimator."
        )
    hidden: tuple[int, ...] = (32, 32)
    method: Any = METHODS[name]()
    if name == "hmc":
        hidden, method = (16,), HMC(samples=128, warmup=100)
    if name == "nuts":
        hidden, method = (16,), NUTS(samples=64, chains=1, warmup=64, max_tree_depth=5)
    if name == "ensemble":
        method = Ensemble(held_out=0.0)  # every experiment counts
    return BNNRegressor(
        method,
        hidden=hidden,
        likelihood="gaussian",
        epochs=500,
        batch_size=256,
        seed=seed,
        progress=False,
    )
