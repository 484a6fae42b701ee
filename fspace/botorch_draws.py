"""A posterior that is known from functions drawn from it, as of a network, as a BoTorch model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from botorch.models.model import Model
from jaxtyping import Float
from torch import Tensor

from fspace.botorch_normals import FromNormals
from fspace.errors import DataError, OptionError
from fspace.posterior import FunctionPosterior
from fspace.predictive import Samples


class DrawnFunctions(FromNormals):
    """BoTorch posterior of s equally likely functions at batches of q points, with or without noise around them.

    Shapes: values [s, ..., q, m], noise (variances) the same or None. A base sample is [..., 1] normals, of which the
    first picks the function, so that a joint sample is one function; with noise [..., 1 + q * m].
    """

    def __init__(self, values: Float[Tensor, "s *b q m"], noise: Float[Tensor, "s *b q m"] | None = None):
        self.values, self.noise = values, noise
        self.batch_shape = values.shape[1:-2]

    @property
    def device(self) -> torch.device:
        """Device of the values."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values."""
        return self.values.dtype

    @property
    def mean(self) -> Float[Tensor, "*b q m"]:
        """Mean over the functions."""
        return self.values.mean(0)

    @property
    def variance(self) -> Float[Tensor, "*b q m"]:
        """Variance over the functions, of which they are all there are; the noise is added."""
        spread = self.values.var(0, correction=0)
        return spread if self.noise is None else spread + self.noise.mean(0)

    @property
    def base_sample_shape(self) -> torch.Size:
        """Shape of one base sample."""
        noise = 0 if self.noise is None else self.values.shape[-2:].numel()
        return self.batch_shape + torch.Size([1 + noise])

    def _extended_shape(self, sample_shape: torch.Size = torch.Size()) -> torch.Size:  # noqa: B008
        return sample_shape + self.values.shape[1:]

    def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: Tensor) -> Tensor:
        """Joint samples [*sample_shape, ..., q, m] from normals; quasi-random ones use all functions equally often."""
        s, dims = len(self.values), len(self.batch_shape)
        level = torch.special.ndtr(base_samples[..., 0]).reshape(-1, *base_samples.shape[-1 - dims : -1])
        pick = (level * s).long().clamp(max=s - 1)[..., None, None]
        samples = torch.take_along_dim(self.values, pick, 0)
        if self.noise is not None:
            white = base_samples[..., 1:].reshape(
                -1, *base_samples.shape[-1 - dims : -1], *samples.shape[-2:]
            )
            samples = samples + torch.take_along_dim(self.noise, pick, 0).sqrt() * white
        return samples.reshape(*sample_shape, *self.values.shape[1:])


class DrawnModel(Model):  # type: ignore[misc]
    """BoTorch model of a posterior whose latent(x) is `Samples`, always of the same functions.

    X is [..., q, d] in the units of the data; gradients flow to it through the functions. What was drawn cannot be
    conditioned: fit again. Not Gaussian, so that formulas for Gaussians are refused (Monte Carlo acquisitions are not).
    """

    not_gaussian = "of drawn functions"

    def __init__(self, source: FunctionPosterior, outputs: Sequence[int] | None = None):
        super().__init__()
        self._source = source
        self._outputs = list(range(source.num_outputs)) if outputs is None else list(outputs)

    @property
    def num_outputs(self) -> int:
        """Outputs of this model."""
        return len(self._outputs)

    @property
    def batch_shape(self) -> torch.Size:
        """The model itself has no batch."""
        return torch.Size()

    def posterior(  # type: ignore[override]
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: Callable[..., Any] | None = None,
    ) -> DrawnFunctions:
        """Joint posterior over the q points of each batch.

        observation_noise: True adds each function's own, a tensor [..., q or 1, m] these variances. Raises OptionError
        for a posterior transform (give the acquisition function an objective), and for noise of what has none,
        DataError for other shapes.
        """
        if X.ndim < 2:
            raise DataError(f"X must be [..., q, d]; it is {tuple(X.shape)}. One point is X[None].")
        if posterior_transform is not None:
            raise OptionError(
                f"{type(posterior_transform).__name__} is for Gaussian posteriors, and this one is of drawn functions; "
                "give the acquisition function an objective instead (objective=GenericMCObjective(...))."
            )
        pick = self._outputs if output_indices is None else [self._outputs[i] for i in output_indices]
        flat = X.flatten(0, -2)
        added = isinstance(observation_noise, Tensor)
        predictive = self._source.observed(flat) if observation_noise is True else self._source.latent(flat)
        if not isinstance(predictive, Samples):
            raise OptionError(
                f"{type(self._source).__name__} predicts {type(predictive).__name__}, and this model needs Samples of "
                "functions; of classes take observation_noise=False."
            )

        def shaped(values: Tensor) -> Tensor:
            outputs = values.shape[2:] or (1,)  # -1 is not known of no points
            return values.reshape(len(values), *X.shape[:-1], *outputs)[..., pick]

        values = shaped(predictive.values)
        noise = None if predictive.noise is None else shaped(predictive.noise)
        if added:
            noise = observation_noise.to(values).expand_as(values)  # type: ignore[union-attr]
        return DrawnFunctions(values, noise)

    def subset_output(self, idcs: list[int]) -> DrawnModel:
        """The model of some outputs only."""
        return DrawnModel(self._source, [self._outputs[i] for i in idcs])

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> Model:
        """Raises OptionError: a finite number of drawn functions holds none that passes through new observations."""
        raise OptionError(
            f"This model is of functions drawn from {type(self._source).__name__}, none of which was drawn given the "
            "new observations: fit it again with them."
        )
