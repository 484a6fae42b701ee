"""Posteriors over the weights of a network: one file for each family of methods."""

from typing import Any

from fspace.inference.weights.dropout import Dropout
from fspace.inference.weights.ensemble import MAP, Ensemble
from fspace.inference.weights.laplace import Laplace
from fspace.inference.weights.method import Method
from fspace.inference.weights.mfvi import MFVI
from fspace.inference.weights.priors import GaussianPrior

METHODS: dict[str, type[Any]] = {kind.name: kind for kind in (MAP, Ensemble, Laplace, Dropout, MFVI)}

__all__ = ["METHODS", "MAP", "MFVI", "Dropout", "Ensemble", "GaussianPrior", "Laplace", "Method"]
