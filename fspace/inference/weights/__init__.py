"""Posteriors over the weights of a network: one file for each family of methods."""

from typing import Any

from fspace.inference.weights.dropout import Dropout
from fspace.inference.weights.ensemble import MAP, Ensemble
from fspace.inference.weights.functional_laplace import FunctionalLaplace
from fspace.inference.weights.functional_prior import FunctionalPrior
from fspace.inference.weights.fvi import FunctionVI
from fspace.inference.weights.hmc import HMC
from fspace.inference.weights.laplace import Laplace
from fspace.inference.weights.method import Method
from fspace.inference.weights.mfvi import MFVI
from fspace.inference.weights.nuts import NUTS
from fspace.inference.weights.priors import GaussianPrior
from fspace.inference.weights.sgmcmc import SGHMC, SGLD, CyclicalSGLD
from fspace.inference.weights.swag import SWAG, MultiSWAG

METHODS: dict[str, type[Any]] = {
    kind.name: kind
    for kind in (
        MAP,
        Ensemble,
        Laplace,
        Dropout,
        MFVI,
        SWAG,
        MultiSWAG,
        FunctionalLaplace,
        SGLD,
        SGHMC,
        CyclicalSGLD,
        HMC,
        NUTS,
        FunctionVI,
        FunctionalPrior,
    )
}

__all__ = [
    "HMC",
    "METHODS",
    "MAP",
    "MFVI",
    "NUTS",
    "SGHMC",
    "SGLD",
    "SWAG",
    "CyclicalSGLD",
    "Dropout",
    "Ensemble",
    "FunctionVI",
    "FunctionalLaplace",
    "FunctionalPrior",
    "GaussianPrior",
    "Laplace",
    "Method",
    "MultiSWAG",
]
