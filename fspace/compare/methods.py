"""The methods that can be compared by name: priors on functions, priors on weights, and plain baselines.

All networks have one hidden layer of 50 relu units, as in the published comparisons (Hernandez-Lobato and Adams 2015),
and the prior of `BNNRegressor`, so that `WideNetworkGP` is their infinitely wide limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fspace.columns import suggest
from fspace.compare.cells import Method
from fspace.errors import OptionError
from fspace.inference.weights import METHODS as KINDS

HIDDEN, ACTIVATION = (50,), "relu"

# inference of BNNRegressor and BNNClassifier: what tables call it, what it is
WORDS = {
    "map": ("MAP", "one network at the mode of its posterior (weight decay)"),
    "ensemble": ("deep ensemble", "five networks from different starts (Lakshminarayanan et al. 2017)"),
    "dropout": ("dropout", "Monte Carlo dropout (Gal and Ghahramani 2016)"),
    "mfvi": ("mean-field VI", "independent Gaussians over weights (Blundell et al. 2015)"),
    "laplace": ("Laplace", "linearised Laplace with learned prior and noise (Immer et al. 2021)"),
    "functional_laplace": ("functional Laplace", "the network as a Gaussian process with its tangent kernel"),
    "swag": ("SWAG", "a Gaussian over the path of SGD (Maddox et al. 2019)"),
    "multiswag": ("MultiSWAG", "several SWAG runs (Wilson and Izmailov 2020)"),
    "sgld": ("SGLD", "stochastic gradient Langevin dynamics (Welling and Teh 2011)"),
    "sghmc": ("SGHMC", "stochastic gradient Hamiltonian Monte Carlo (Chen et al. 2014)"),
    "csgld": ("cyclical SGLD", "Langevin dynamics with restarts (Zhang et al. 2020)"),
    "hmc": ("HMC", "Hamiltonian Monte Carlo over all weights, sixteen chains side by side"),
    "nuts": ("NUTS", "Hamiltonian Monte Carlo over all weights, by pyro's no-U-turn sampler"),
    "fvi": ("function-space VI", "a network fitted to a Gaussian-process prior (Sun et al. 2019)"),
    "functional_prior": ("functional prior", "weights' prior tuned to a Gaussian process (Tran et al. 2022)"),
}
NETWORKS = {name: WORDS.get(name, (name, "")) for name in KINDS}
REFERENCE, WIDE = WORDS["hmc"][0], "wide network"


def _network(inference: str) -> Callable[[], Method]:
    def make() -> Method:
        from fspace.network_estimators import BNNClassifier, BNNRegressor

        name, source = NETWORKS[inference]
        options: dict[str, Any] = {"inference": inference, "hidden": HIDDEN, "activation": ACTIVATION}
        classifier = (
            None if inference in ("hmc", "nuts") else BNNClassifier(**options)
        )  # hours on many inputs and classes
        return Method(name, BNNRegressor(**options), classifier, space="weights", source=source)

    return make


def _gp(kernel: str, source: str) -> Callable[[], Method]:
    def make() -> Method:
        from fspace.estimators import GPClassifier, GPRegressor

        name = "GP" if kernel == "auto" else f"GP, {kernel}"
        regressor, classifier = GPRegressor(kernel=kernel), GPClassifier(kernel=kernel)
        return Method(name, regressor, classifier, space="function", source=f"Gaussian process, {source}")

    return make


def _wide() -> Method:
    from fspace.compare.wide import WideNetworkGP

    source = (
        "exact Gaussian process with the networks' own prior, infinitely wide; nothing learned but the noise"
    )
    return Method(WIDE, WideNetworkGP(len(HIDDEN), ACTIVATION), space="function", source=source)


def _linear() -> Method:
    from sklearn.linear_model import BayesianRidge, LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return Method(
        "linear",
        make_pipeline(StandardScaler(), BayesianRidge()),
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
        source="scikit-learn's Bayesian ridge and logistic regression",
    )


METHODS: dict[str, Callable[[], Method]] = {
    "gp": _gp("auto", "kernel chosen by the data"),
    "gp-matern": _gp("matern", "Matern kernel"),
    "gp-rbf": _gp("rbf", "squared-exponential kernel"),
    "gp-neural": _gp("neural", "kernel of an infinitely wide network, learned"),
    "gp-deep": _gp("deep", "deep kernels"),
    "wide": _wide,
    **{name.replace("_", "-"): _network(name) for name in NETWORKS},
    "linear": _linear,
}
# in the order of tables; without HMC, which needs half a minute of a processor a fit: the exact limit needs none
DEFAULT = ("wide", "gp", "map", "ensemble", "dropout", "mfvi", "laplace", "swag", "linear")


def named_methods(names: Sequence[str] | None = None) -> list[Method]:
    """Methods by their names in METHODS (None: those of `fspace compare`). Raises OptionError for another name."""
    for name in names or ():
        if name not in METHODS:
            near = suggest(name, list(METHODS)).split(" There is:")[0]
            raise OptionError(f"There is no method {name!r}.{near} Known are {', '.join(METHODS)}.")
    return [METHODS[name]() for name in (names if names is not None else DEFAULT)]
