"""The posterior server: one posterior from many machines, over time."""

from __future__ import annotations

from typing import Any

_WHERE = {
    "Basis": "fspace.inference.basis",
    "Site": "fspace.inference.basis",
    "PosteriorServer": "fspace.server.core",
    "Receipt": "fspace.server.core",
    "WeightBasis": "fspace.server.weights",
    "WeightPosterior": "fspace.server.weights",
    "Engine": "fspace.server.engines",
    "LocalEngine": "fspace.server.engines",
    "RayEngine": "fspace.server.ray_engine",
    "ServerFit": "fspace.server.engines",
    "TableShard": "fspace.server.workers",
    "fit": "fspace.server.engines",
    "Learned": "fspace.server.learning",
    "learn_basis": "fspace.server.learning",
    "ContinualClassifier": "fspace.server.continual_classifier",
    "TaskLearned": "fspace.server.continual",
    "learn_task": "fspace.server.continual",
    "fit_weights": "fspace.server.weight_fit",
    "Snep": "fspace.server.snep",
    "Pvi": "fspace.server.pvi",
    "Softmax": "fspace.server.weight_workers",
    "GaussianNoise": "fspace.server.weight_workers",
    "Update": "fspace.server.local_updates",
    "RemoteServer": "fspace.server.client",
    "Tokens": "fspace.server.tokens",
    "Limits": "fspace.server.tokens",
    "create_app": "fspace.server.http",
    "combine": "fspace.server.combining",
    "PointwisePosterior": "fspace.server.combining",
    "Lift": "fspace.server.lifting",
    "lift": "fspace.server.lifting",
    "put_lifted": "fspace.server.lifting",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    """Public names are imported when first used."""
    if name in _WHERE:
        from importlib import import_module

        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'fspace.server' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
