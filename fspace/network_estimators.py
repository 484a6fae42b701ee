"""The scikit-learn front of Bayesian neural networks: a prior over weights, and one of many ways to its posterior."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fspace.data import target_names
from fspace.errors import OptionError
from fspace.fitting import channel_scaling
from fspace.front import (
    ClassificationFront,
    FunctionEstimator,
    RegressionFront,
    column_scales,
    slope_relevance,
)
from fspace.inference.candidates import input_scaling
from fspace.inference.gp import Scaling
from fspace.inference.numerics import full_precision, pick_device, pick_dtype, seeded
from fspace.inference.weights import METHODS, Method
from fspace.inference.weights.likelihoods import Classes, GaussianNoise, NetworkLikelihood, VaryingNoise
from fspace.inference.weights.network import Network
from fspace.inference.weights.priors import named_prior
from fspace.inference.weights.problem import Problem, Report, Training
from fspace.kernels.extractors import MLP
from fspace.predictive_base import check_seed
from fspace.targets import check_labels
from fspace.torch_data import unpacked

LIKELIHOODS = ("auto", "gaussian", "heteroscedastic")
LARGEST = 1e30  # learning rate and temperature: beyond it a step of Adam, or a variance, is no float32


class BNNEstimator(FunctionEstimator):
    """Options and attributes that `BNNRegressor` and `BNNClassifier` have in common."""

    inference: Any
    network: Any
    hidden: Any
    activation: Any
    prior: Any
    temperature: Any
    epochs: Any
    batch_size: Any
    learning_rate: Any

    def _method(self) -> Method:
        """The inference that is asked for. Raises OptionError for one that does not exist."""
        if isinstance(self.inference, str) and self.inference in METHODS:
            return METHODS[self.inference]()
        if isinstance(self.inference, Method):
            return self.inference
        raise OptionError(
            f"inference={self.inference!r} does not exist; choose one of {', '.join(METHODS)}, or pass a method of "
            "fspace.inference.weights with settings of its own, such as Laplace(structure='kronecker')."
        )

    def _check_shared_options(self) -> None:
        self._method()
        named_prior(self.prior)
        check_seed(self.seed)
        if self.progress is not False and self.progress != "auto":
            raise OptionError(f"progress={self.progress!r} does not exist; choose 'auto' or False.")
        if not (_positive(self.temperature) and 1 / LARGEST <= self.temperature <= LARGEST):
            raise OptionError(
                f"temperature={self.temperature!r} must be a positive number, from {1 / LARGEST:g} to "
                f"{LARGEST:g}; 1 is Bayes' rule."
            )
        if not (_positive(self.learning_rate) and self.learning_rate <= LARGEST):
            raise OptionError(
                f"learning_rate={self.learning_rate!r} must be a positive number, at most {LARGEST:g}."
            )
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if value is not None and not _whole(value):
                raise OptionError(f"{name}={value!r} must be a whole number of at least 1, or None.")
        if not isinstance(self.network, nn.Module) and self.network != "mlp":
            raise OptionError(
                f"network={self.network!r} does not exist; choose 'mlp', or pass a torch module."
            )
        sizes = list(self.hidden) if isinstance(self.hidden, list | tuple) else [None]
        if not all(_whole(size) for size in sizes):
            raise OptionError(
                f"hidden={self.hidden!r} must be the sizes of hidden layers, such as (64, 64); () is a linear model."
            )

    def _check_shape(self, x: Any) -> None:
        """Only a module that was passed in can read images and sequences."""
        dims = getattr(self.network, "input_dims", None) if isinstance(self.network, nn.Module) else 1
        if dims is not None and dims != x.ndim - 1:
            what = {2: "a table", 3: "sequences", 4: "images"}[x.ndim]
            raise OptionError(
                f"X has shape {list(x.shape)} ({what}), which network={_name(self.network)} does not read; pass a "
                "module that does, such as ConvNet(in_channels, out_features=...) of fspace.kernels for images."
            )

    def _module(self, x: Tensor, outputs: int, dtype: torch.dtype) -> nn.Module:
        """The network, on the device and in the type. Raises OptionError where it does not give so many outputs."""
        if isinstance(self.network, nn.Module):
            module = copy.deepcopy(self.network)
        else:
            with seeded(check_seed(self.seed)):
                module = MLP(x.shape[1], tuple(self.hidden), outputs, self.activation)
        module = module.to(device=x.device, dtype=dtype)
        module.eval()
        try:
            with torch.no_grad():
                shape = tuple(module(x[:2].to(dtype)).shape)
        except Exception as error:  # whatever a foreign module raises
            raise OptionError(
                f"network={_name(self.network)} cannot be used on rows of shape {list(x.shape[1:])}: {error}"
            ) from error
        if shape != (2, outputs):
            raise OptionError(
                f"network={_name(self.network)} gives {list(shape)} for two rows; this likelihood needs [2, {outputs}]."
            )
        return module

    def _fit_network(
        self,
        x: np.ndarray,
        y: np.ndarray,
        shift: np.ndarray,
        scale: np.ndarray,
        likelihood: NetworkLikelihood,
        vector: bool,
    ) -> None:
        """Fit standardised y [n, t] and set the attributes of a fitted estimator."""
        from fspace.inference.weights.posterior import posterior_of

        device, dtype = pick_device(self.device), pick_dtype(self.dtype)
        tensor = lambda a: torch.as_tensor(np.asarray(a), dtype=torch.float64, device=device)  # noqa: E731
        method = self._method()
        parts = input_scaling(x, False) if x.ndim == 2 else channel_scaling(x)
        scaling = Scaling(
            **{k: tensor(v) for k, v in parts.items()}, y_shift=tensor(shift), y_scale=tensor(scale)
        )
        rows = scaling.inputs(tensor(x))
        network = Network.of(self._module(rows, likelihood.outputs, dtype))
        report = Report()
        with self._recording() as record, full_precision():
            problem = Problem(
                network=network,
                scales=named_prior(self.prior).scales(network).to(device),
                likelihood=likelihood,
                x=rows.to(dtype),
                y=tensor(y).to(dtype),
                temperature=float(self.temperature),
                seed=check_seed(self.seed),
                training=Training(self.epochs, self.batch_size, float(self.learning_rate)),
                record=record,
                report=report,
            )
            distribution, likelihood = method.fit(problem)
        if self.interrupted_:
            warnings.warn(
                f"Interrupted while fitting {self._interrupted_in}; the best state so far is kept.",
                stacklevel=3,
            )
        self.diverged_, self.diagnostics_ = report.diverged, report.figures
        self.posterior_ = posterior_of(network, distribution, likelihood, scaling, vector, method.name)
        self.relevance_ = slope_relevance(self.posterior_, tensor(x))


class BNNRegressor(RegressionFront, BNNEstimator):
    """Regression by a neural network with a prior over its weights.

    inference: how the posterior over weights is had: "map", "ensemble", "laplace", "dropout", "mfvi", "swag",
        "multiswag", "functional_laplace", "sgld", "sghmc", "csgld", "hmc", "nuts", "fvi", "functional_prior"; or one of
        the classes of `fspace.inference.weights` with settings of its own.
    network: "mlp" (fully connected, with layers of the sizes `hidden` and this `activation`), or a torch module of
        Linear and Conv layers that reads rows and has as many outputs as y (twice as many where noise varies).
    prior: "scaled" (weights N(0, 2 / fan-in), biases N(0, 1)), a number (the standard deviation of every weight), or
        a `GaussianPrior`; of the network on standardised x and y.
    likelihood: "gaussian" (constant noise), "heteroscedastic" (a second output for the noise of every row), or "auto":
        heteroscedastic for ensembles, gaussian for all else.
    noise_variance: of constant noise, where it is known, in squared units of y (None: it is learned).
    temperature: of the posterior (likelihood * prior) ** (1 / temperature); 1 is Bayes' rule. Below 1 the posterior is
        "cold"; methods that claim no posterior take only 1.
    epochs, batch_size, learning_rate: of training by Adam (None: by the number of rows).
    categories, missing, device, dtype, seed, progress: as for `GPRegressor`.

    After fit: posterior_ (each draw is one network), history_ (dicts with "step", "stage", "loss", "heldout"),
    relevance_ (of each encoded column), diagnostics_ (figures of the method: evidence, R-hat, effective sample size,
    ...), diverged_ (None, or where the fit stopped being finite: the last finite state is kept, with a
    DivergedWarning), interrupted_, target_names_.
    """

    def __init__(
        self,
        inference: Any = "ensemble",
        network: Any = "mlp",
        hidden: Any = (64, 64),
        activation: Any = "silu",
        prior: Any = "scaled",
        likelihood: Any = "auto",
        noise_variance: Any = None,
        temperature: Any = 1.0,
        epochs: Any = None,
        batch_size: Any = None,
        learning_rate: Any = 1e-2,
        categories: Any = None,
        missing: Any = "error",
        device: Any = "auto",
        dtype: Any = "float32",
        seed: Any = 0,
        progress: Any = "auto",
    ):
        self.inference = inference
        self.network = network
        self.hidden = hidden
        self.activation = activation
        self.prior = prior
        self.likelihood = likelihood
        self.noise_variance = noise_variance
        self.temperature = temperature
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.categories = categories
        self.missing = missing
        self.device = device
        self.dtype = dtype
        self.seed = seed
        self.progress = progress

    def fit(self, X: Any, y: Any = None) -> BNNRegressor:
        """Fit to X [n, d] (or images, sequences) and y [n] or [n, t], or to a torch data set of pairs (x, y). Raises a
        FspaceError for data or options that cannot be used."""
        self._check_options()
        encoder, x, target, names = self._read(X, y)
        columns = target.reshape(len(x), -1)
        shift, scale, _ = column_scales(columns)
        likelihood = self._likelihood(scale)
        self._fit_network(x, (columns - shift) / scale, shift, scale, likelihood, target.ndim == 1)
        self._adopt(encoder)
        self.target_names_ = names
        return self

    def _likelihood(self, scale: np.ndarray) -> NetworkLikelihood:
        chosen = self.likelihood
        if chosen == "auto":
            varies = self._method().name == "ensemble" and self.noise_variance is None
            chosen = "heteroscedastic" if varies else "gaussian"
        if chosen == "heteroscedastic":
            return VaryingNoise(len(scale))
        if self.noise_variance is None:
            return GaussianNoise(len(scale))
        known = np.asarray(self.noise_variance, dtype=np.float64)
        if known.shape not in ((), scale.shape):
            raise OptionError(
                f"noise_variance={self.noise_variance!r} must be one number, or one for each of {len(scale)} outputs."
            )
        return GaussianNoise(len(scale), torch.from_numpy(np.log(known / scale**2)))

    def _check_options(self) -> None:
        self._check_shared_options()
        if self.likelihood not in tuple(LIKELIHOODS):
            raise OptionError(
                f"likelihood={self.likelihood!r} does not exist; choose one of {', '.join(LIKELIHOODS)}."
            )
        if self.noise_variance is not None:
            if self.likelihood == "heteroscedastic":
                raise OptionError(
                    "noise_variance is of constant noise; leave it None, or take likelihood='gaussian'."
                )
            numbers = (
                self.noise_variance
                if isinstance(self.noise_variance, list | tuple | np.ndarray)
                else [self.noise_variance]
            )
            if not all(_positive(value) for value in numbers):
                raise OptionError(
                    f"noise_variance={self.noise_variance!r} must be positive, in squared units of y."
                )


class BNNClassifier(ClassificationFront, BNNEstimator):
    """Classification by a neural network with a prior over its weights: two classes (logistic) or more (softmax).

    All options are as for `BNNRegressor`; a module passed as network has one output for two classes, else one a class.

    After fit: classes_, posterior_ (latent(x) of the outputs before the link; observed(x) is a `Categorical` over
    positions in classes_, with entropy and mutual_information), and what `BNNRegressor` has.
    """

    def __init__(
        self,
        inference: Any = "ensemble",
        network: Any = "mlp",
        hidden: Any = (64, 64),
        activation: Any = "silu",
        prior: Any = "scaled",
        temperature: Any = 1.0,
        epochs: Any = None,
        batch_size: Any = None,
        learning_rate: Any = 1e-2,
        categories: Any = None,
        missing: Any = "error",
        device: Any = "auto",
        dtype: Any = "float32",
        seed: Any = 0,
        progress: Any = "auto",
    ):
        self.inference = inference
        self.network = network
        self.hidden = hidden
        self.activation = activation
        self.prior = prior
        self.temperature = temperature
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.categories = categories
        self.missing = missing
        self.device = device
        self.dtype = dtype
        self.seed = seed
        self.progress = progress

    def fit(self, X: Any, y: Any = None) -> BNNClassifier:
        """Fit to X [n, d] (or images, sequences) and labels y [n] of any kind, or to a torch data set of pairs (x, y).
        Raises a FspaceError for data or options that cannot be used."""
        self._check_shared_options()
        X, y = unpacked(X, y)
        encoder, x = self._encoded(X)
        self.classes_, labels = check_labels(y, len(x))
        count = len(self.classes_)
        outputs = 1 if count == 2 else count
        columns = labels.astype(np.float64)[:, None]
        self._fit_network(x, columns, np.zeros(outputs), np.ones(outputs), Classes(count), count == 2)
        self._adopt(encoder)
        self.target_names_ = target_names(y, labels)
        return self


def _positive(value: Any) -> bool:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return bool(number and 0 < value < math.inf)


def _whole(value: Any) -> bool:
    return bool(isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= 1)


def _name(network: Any) -> str:
    return type(network).__name__ if isinstance(network, nn.Module) else repr(network)
