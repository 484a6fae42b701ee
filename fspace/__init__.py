"""Bayesian modelling in which the unknown is a function."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
_WHERE = {
    "GPRegressor": "fspace.estimators",
    "GPClassifier": "fspace.estimators",
    "BNNRegressor": "fspace.network_estimators",
    "BNNClassifier": "fspace.network_estimators",
    "load": "fspace.saving",
    "FspaceError": "fspace.errors",
    "FunctionPosterior": "fspace.posterior",
    "Predictive": "fspace.predictive",
    "DeepKernel": "fspace.kernels",
    "NeuralKernel": "fspace.kernels",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that `import fspace` is quick."""
    if name in _WHERE:
        from importlib import import_module

        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'fspace' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
