"""What a method over weights is: settings, and a pure function from a problem to a distribution over states."""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

from fspace.inference.weights.distributions import StateDistribution
from fspace.inference.weights.likelihoods import NetworkLikelihood
from fspace.inference.weights.problem import Problem


@runtime_checkable
class Method(Protocol):
    """One way to a posterior; a dataclass of its settings."""

    name: ClassVar[str]

    def fit(self, problem: Problem) -> tuple[StateDistribution, NetworkLikelihood]:
        """The distribution over states, and the likelihood with what was learned of it apart from the states."""
