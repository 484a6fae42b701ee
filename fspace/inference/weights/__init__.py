"""Posteriors over the weights of a network: one file for each family of methods."""

from typing import TypeAlias

from fspace.inference.weights.ensemble import MAP, Ensemble
from fspace.inference.weights.priors import GaussianPrior

Method: TypeAlias = MAP | Ensemble
METHODS: dict[str, type[Method]] = {method.name: method for method in (MAP, Ensemble)}

__all__ = ["METHODS", "MAP", "Ensemble", "GaussianPrior", "Method"]
