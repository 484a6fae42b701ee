"""The methods that can be compared by name: priors on functions, priors on weights, and plain baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fspace.columns import suggest
from fspace.compare.cells import Method
from fspace.errors import OptionError


def _gp() -> Method:
    from fspace.estimators import GPClassifier, GPRegressor

    return Method(
        "GP",
        GPRegressor(),
        GPClassifier(),
        space="function",
        source="Gaussian process, kernel chosen by the data",
    )


def _gp_kernel(kernel: str, words: str) -> Callable[[], Method]:
    def make() -> Method:
        from fspace.estimators import GPClassifier, GPRegressor

        return Method(
            f"GP, {kernel}", GPRegressor(kernel=kernel), GPClassifier(kernel=kernel), space="function",
            source=f"Gaussian process with {words}",
        )  # fmt: skip

    return make


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
    "gp": _gp,
    "gp-matern": _gp_kernel("matern", "a Matern kernel"),
    "gp-rbf": _gp_kernel("rbf", "a squared-exponential kernel"),
    "gp-neural": _gp_kernel("neural", "the kernel of an infinitely wide network"),
    "gp-deep": _gp_kernel("deep", "deep kernels"),
    "linear": _linear,
}


def methods(names: Sequence[str] | None = None) -> list[Method]:
    """Methods by their names in METHODS (None: those that `fspace compare` takes). Raises OptionError for another."""
    found = []
    for name in names if names is not None else DEFAULT:
        if name not in METHODS:
            raise OptionError(
                f"There is no method {name!r}.{suggest(name, list(METHODS))} Known are {', '.join(METHODS)}."
            )
        found.append(METHODS[name]())
    return found


DEFAULT = ("gp", "gp-neural", "linear")
