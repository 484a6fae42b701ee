"""A posterior over functions as a BoTorch model: Gaussian, or a mixture of which one component is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from botorch.models.model import FantasizeMixin, Model
from botorch.posteriors import GPyTorchPosterior
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from jaxtyping import Float
from linear_operator import to_linear_operator
from torch import Tensor

from fspace.botorch_moments import Member, Moments, conditioned, moments_of, picked, seen
from fspace.botorch_normals import FromNormals
from fspace.errors import DataError, OptionError
from fspace.inference.numerics import MAX_JITTER, MIN_JITTER
from fspace.posterior import FunctionPosterior, MixturePosterior


class MixtureOfGaussians(FromNormals):
    """BoTorch posterior of which one of k joint Gaussians is right.

    Shapes: components' mean [..., q, m], weights [..., k] that broadcast against their batches. A base sample is
    [..., 1 + q * m] normals, of which the first picks the component: all of a joint sample comes from one, every
    sampler of normals can draw from it, and values are differentiable in X at a fixed pick.
    """

    def __init__(self, components: Sequence[Any], weights: Float[Tensor, "*b k"]):
        self.components, self.weights = list(components), weights
        self.batch_shape = self.components[0].mean.shape[:-2]

    @property
    def device(self) -> torch.device:
        """Device of the moments."""
        return self.weights.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the moments."""
        return self.weights.dtype

    def _average(self, values: Sequence[Tensor]) -> Tensor:
        return (torch.stack(list(values), -3) * self.weights[..., None, None]).sum(-3)

    @property
    def mean(self) -> Float[Tensor, "*b q m"]:
        """Mean of the mixture."""
        return self._average([c.mean for c in self.components])

    @property
    def variance(self) -> Float[Tensor, "*b q m"]:
        """Variance of the mixture, spread of the components' means included."""
        mean = self.mean
        return self._average([c.variance + (c.mean - mean).square() for c in self.components])

    @property
    def base_sample_shape(self) -> torch.Size:
        """Shape of one base sample."""
        return self.batch_shape + torch.Size([1 + self.components[0].mean.shape[-2:].numel()])

    def _extended_shape(self, sample_shape: torch.Size = torch.Size()) -> torch.Size:  # noqa: B008
        return sample_shape + self.components[0].mean.shape

    @property
    def distribution(self) -> Any:
        """What some acquisition functions ask for. Raises OptionError: a mixture is not one Gaussian."""
        raise OptionError(
            f"This posterior is a mixture of {len(self.components)} Gaussians, and what was asked needs one. Use a "
            "Monte Carlo acquisition function (qLogExpectedImprovement, qLogNoisyExpectedImprovement, ...), or one "
            "member: posterior.members[0].as_botorch()."
        )

    def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: Tensor) -> Tensor:
        """Joint samples [*sample_shape, ..., q, m] from normals [*sample_shape, ..., 1 + q * m]."""
        level = torch.special.ndtr(base_samples[..., 0])
        pick = (level[..., None] >= self.weights.detach().cumsum(-1)[..., :-1]).sum(-1)
        samples = []
        for component in self.components:
            shape = sample_shape + component.base_sample_shape
            samples.append(
                component.rsample_from_base_samples(sample_shape, base_samples[..., 1:].reshape(shape))
            )
        return torch.take_along_dim(torch.stack(samples, -3), pick[..., None, None, None], -3).squeeze(-3)


class FunctionModel(Model, FantasizeMixin):  # type: ignore[misc]
    """BoTorch model of a posterior over functions. X is [batch, q, d] in the units of the data, Y in those of y.

    members: moments of every component, one for a Gaussian posterior. weights [*batch_shape, k]. outputs: which of
    the members' outputs are shown. source: the posterior itself, where it can take in observations by itself.
    """

    likelihood = None  # `fantasize` asks whether the noise is fixed by the data; it is the model's own

    def __init__(
        self,
        members: Sequence[Member],
        weights: Tensor,
        outputs: Sequence[int],
        batch_shape: torch.Size = torch.Size(),  # noqa: B008
        source: FunctionPosterior | None = None,
    ):
        super().__init__()
        self._members, self._weights, self._outputs = list(members), weights, list(outputs)
        self._batch_shape, self._source = batch_shape, source

    @property
    def num_outputs(self) -> int:
        """Outputs of this model."""
        return len(self._outputs)

    @property
    def batch_shape(self) -> torch.Size:
        """Batch shape of the model itself: that of the observations it was conditioned on."""
        return self._batch_shape

    @property
    def is_mixture(self) -> bool:
        """Whether there is more than one component, so that no joint is Gaussian."""
        return len(self._members) > 1

    @property
    def not_gaussian(self) -> str:
        """What it is where formulas for Gaussians do not hold."""
        return f"a mixture of {len(self._members)}" if self.is_mixture else ""

    def posterior(  # type: ignore[override]
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: Callable[..., Any] | None = None,
    ) -> Any:
        """Joint posterior over the q points of each batch; gradients flow to X.

        observation_noise: True adds the model's, a tensor [..., q or 1, m] these variances. A posterior transform is
        applied to every component of a mixture. GPyTorch reports no variance under 1e-10, so y should not be in units
        that make it that small. Raises OptionError when a member does not predict Gaussians, DataError for other
        shapes.
        """
        if X.ndim < 2:
            raise DataError(f"X must be [..., q, d]; it is {tuple(X.shape)}. One point is X[None].")
        indices = range(self.num_outputs) if output_indices is None else output_indices
        chosen = [self._outputs[i] for i in indices]
        components = []
        for member in self._members:
            component = _gpytorch_posterior(member(X).picked(chosen), observation_noise)
            if posterior_transform is not None:
                component = posterior_transform(component, X=X)
            components.append(component)
        if not self.is_mixture:
            return components[0]
        return MixtureOfGaussians(components, self._weights.to(components[0].mean))

    def subset_output(self, idcs: list[int]) -> FunctionModel:
        """The model of some outputs only. Observations of these alone can still be taken in."""
        chosen = [self._outputs[i] for i in idcs]
        return FunctionModel(self._members, self._weights, chosen, self._batch_shape)

    def condition_on_observations(
        self, X: Tensor, Y: Tensor, noise: Tensor | None = None, **kwargs: Any
    ) -> FunctionModel:
        """The model after also seeing Y [..., n, m] at X [..., n, d]; this one stays as it is.

        Batch dimensions broadcast and become the new model's; members of a mixture are reweighted by how well they
        predicted Y, in each batch. noise [..., n, m]: variances in place of the model's. Raises DataError for shapes.
        """
        if Y.shape[-1] != self.num_outputs or Y.shape[-2] != X.shape[-2]:
            raise DataError(
                f"Y must be [..., {X.shape[-2]}, {self.num_outputs}] for X {tuple(X.shape)}; it is {tuple(Y.shape)}."
            )
        if not bool(Y.isfinite().all()):
            raise DataError("Y holds NaN or infinite values; observations must be numbers.")
        differentiable = X.requires_grad or Y.requires_grad
        if (
            self._source is not None
            and X.ndim == Y.ndim == 2
            and len(X)
            and noise is None
            and not differentiable
        ):
            vector = self._source.latent(X[:1]).mean.ndim == 1
            return botorch_model(self._source.condition(X, Y[:, 0] if vector else Y))
        x, y = X.to(torch.float64), Y.to(torch.float64)
        noise = None if noise is None else noise.to(y)
        members = [picked(member, self._outputs) for member in self._members]
        weights = self._weights
        if self.is_mixture:
            scores = [seen(member(x), y, noise).log_density for member in members]
            weights = (self._weights.to(y).log() + torch.stack(scores, -1)).softmax(-1)
        return FunctionModel(
            [conditioned(member, x, y, noise) for member in members],
            weights,
            range(self.num_outputs),
            torch.broadcast_shapes(self._batch_shape, x.shape[:-2], y.shape[:-2]),
        )


def botorch_model(posterior: FunctionPosterior) -> FunctionModel:
    """BoTorch model of a GP posterior, or of a mixture of them."""
    sources, weights = [posterior], torch.ones(1)
    if isinstance(posterior, MixturePosterior):
        sources, weights = posterior.members, posterior.weights
    return FunctionModel(
        [moments_of(source) for source in sources],
        weights,
        range(posterior.num_outputs),
        posterior.batch_shape,
        posterior if all(_takes_observations(source) for source in sources) else None,
    )


def _takes_observations(posterior: FunctionPosterior) -> bool:
    """Whether it has a way of its own; linearised networks are conditioned as the Gaussians that they are."""
    return type(posterior).condition is not FunctionPosterior.condition


def _gpytorch_posterior(moments: Moments, observation_noise: bool | Tensor) -> GPyTorchPosterior:
    mean, covariance, noise = moments.mean, moments.covariance, moments.noise
    if observation_noise is not False:
        added = noise
        if isinstance(observation_noise, Tensor):
            shape = (*mean.shape[:-2], mean.shape[-2:].numel() // moments.outputs, moments.outputs)
            added = torch.diag_embed(moments.grouped(observation_noise.to(mean).expand(shape)))
        covariance = covariance + added
    covariance = _positive_definite(covariance, noise.diagonal(dim1=-2, dim2=-1))
    if moments.together > 1:
        points = mean[..., 0, :].unflatten(-1, (-1, moments.outputs))
        return GPyTorchPosterior(
            MultitaskMultivariateNormal(points, to_linear_operator(covariance[..., 0, :, :]))
        )
    parts = [
        MultivariateNormal(mean[..., i, :], to_linear_operator(covariance[..., i, :, :]))
        for i in range(moments.outputs)
    ]
    joint = parts[0] if len(parts) == 1 else MultitaskMultivariateNormal.from_independent_mvns(parts)
    return GPyTorchPosterior(joint)


def _positive_definite(covariance: Float[Tensor, "*b g k k"], noise: Float[Tensor, "*b g k"]) -> Tensor:
    """The covariance, with jitter where a search has brought points together or onto the data.

    Jitter is relative to the variance of y: that of f may be nothing but rounding there, and of either sign.
    """
    level = (covariance.diagonal(dim1=-2, dim2=-1) + noise).mean(-1, keepdim=True).detach()
    repaired, jitter = covariance, MIN_JITTER
    while torch.linalg.cholesky_ex(repaired.detach())[1].any() and jitter <= MAX_JITTER * 1.001:
        repaired = covariance + torch.diag_embed((jitter * level).expand_as(noise))
        jitter *= 10.0
    return repaired
