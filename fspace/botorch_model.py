"""A posterior over functions as a BoTorch model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.model import Model
from botorch.posteriors import GPyTorchPosterior
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from torch import Tensor

from fspace.errors import OptionError
from fspace.posterior import FunctionPosterior
from fspace.predictive import Gaussian


class FunctionModel(Model):  # type: ignore[misc]
    """BoTorch model of a Gaussian posterior. X is [batch, q, d] in the units of the data, Y in those of y.

    A mixture has no Gaussian joint; use its members, each of which is a model of its own.
    """

    def __init__(self, source: FunctionPosterior, outputs: list[int] | None = None):
        super().__init__()
        self._source = source
        self._outputs = list(range(source.num_outputs)) if outputs is None else outputs

    @property
    def num_outputs(self) -> int:
        """Outputs of this model."""
        return len(self._outputs)

    @property
    def batch_shape(self) -> torch.Size:
        """Batch shape of the model itself."""
        return self._source.batch_shape

    def posterior(  # type: ignore[override]
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool = False,
        posterior_transform: PosteriorTransform | Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Joint posterior over the q points of each batch; gradients flow to X. Raises OptionError for mixtures."""
        predictive = self._source.observed(X) if observation_noise else self._source.latent(X)
        if not isinstance(predictive, Gaussian):
            raise OptionError(
                "as_botorch() needs a Gaussian posterior; use one member: posterior.members[0].as_botorch()."
            )
        picked = [self._outputs[i] for i in output_indices] if output_indices is not None else self._outputs
        if predictive.outputs is None:
            joint = MultivariateNormal(predictive.mean, predictive.covariance)
        else:
            parts = [
                MultivariateNormal(predictive.mean[..., i], predictive.covariance[..., i, :, :])
                for i in picked
            ]
            joint = parts[0] if len(parts) == 1 else MultitaskMultivariateNormal.from_independent_mvns(parts)
        result = GPyTorchPosterior(joint)
        return result if posterior_transform is None else posterior_transform(result)

    def subset_output(self, idcs: list[int]) -> FunctionModel:
        """The model of some outputs only."""
        return FunctionModel(self._source, [self._outputs[i] for i in idcs])

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> FunctionModel:
        """The model after also seeing Y [n, outputs] at X [n, d]."""
        return FunctionModel(self._source.condition(X, Y), self._outputs)
