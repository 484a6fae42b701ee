"""The kernel of an infinitely wide random network: the function-space limit of a Bayesian neural network."""

from __future__ import annotations

import math
from typing import Any

import torch
from gpytorch.constraints import Interval, Positive
from gpytorch.kernels import Kernel
from gpytorch.priors import Prior
from jaxtyping import Float
from torch import Tensor

from fspace.errors import OptionError
from fspace.kernels.deep import register_with_botorch


class _ArcCosine(torch.autograd.Function):
    """J(c) = (sin t + (pi - t) cos t) / pi with c = cos t.

    Its derivative 1 - t / pi is finite everywhere, but composed from arccos and sqrt it would be inf - inf at
    c = 1, which is where every diagonal entry lies. Where rounding pushes c past 1 it counts as 1.
    """

    @staticmethod
    def forward(ctx: Any, c: Tensor) -> Tensor:
        c = c.clamp(-1.0, 1.0)
        ctx.save_for_backward(c)
        angle = torch.arccos(c)
        return (((1.0 - c) * (1.0 + c)).sqrt() + (math.pi - angle) * c) / math.pi

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        (c,) = ctx.saved_tensors
        # second derivatives do diverge at c = 1; a hair inside keeps Hessians finite
        inside = 1.0 - torch.finfo(c.dtype).eps
        return grad[0] * (1.0 - torch.arccos(c.clamp(-inside, inside)) / math.pi)


def _relu_step(k12: Tensor, k11: Tensor, k22: Tensor) -> Tensor:
    """E[relu(u) relu(v)] for (u, v) ~ N(0, [[k11, k12], [k12, k22]]): Cho & Saul 2009, equation 6, n = 1."""
    norm = (k11 * k22).clamp_min(torch.finfo(k12.dtype).tiny).sqrt()
    return 0.5 * norm * _ArcCosine.apply(k12 / norm)


def _erf_step(k12: Tensor, k11: Tensor, k22: Tensor) -> Tensor:
    """E[erf(u) erf(v)] for the same (u, v): Williams 1998, equation 11."""
    z = 2.0 * k12 / ((1.0 + 2.0 * k11) * (1.0 + 2.0 * k22)).sqrt()
    limit = 1.0 - torch.finfo(z.dtype).eps
    return (2.0 / math.pi) * torch.arcsin(z.clamp(-limit, limit))


_STEPS = {"relu": _relu_step, "erf": _erf_step}


class NeuralKernel(Kernel):
    """Covariance of the outputs of a random network with `depth` infinitely wide hidden layers.

    K_0 = s_b + s_w <x, x'> / d, then K_l = s_b + s_w E[act(u) act(v)] with (u, v) ~ N(0, K_{l-1}), where
    s_w = weight_variance and s_b = bias_variance; a finite network has weights from N(0, s_w / fan-in) and
    biases from N(0, s_b). With `ard_num_dims` the inputs are first divided by one lengthscale each.
    Not stationary: it grows (relu) or saturates (erf) away from the origin. Scale it by a ScaleKernel.

    Raises: OptionError for an unknown activation or a depth below 1.
    Source: Neal 1996; Williams 1998; Cho & Saul 2009; Lee et al. 2018, equations 4 to 6.
    """

    def __init__(
        self,
        depth: int = 2,
        activation: str = "relu",
        ard_num_dims: int | None = None,
        weight_variance_prior: Prior | None = None,
        weight_variance_constraint: Interval | None = None,
        bias_variance_prior: Prior | None = None,
        bias_variance_constraint: Interval | None = None,
        **kwargs: Any,
    ):
        if activation not in _STEPS:
            raise OptionError(
                f"NeuralKernel: activation={activation!r} does not exist; choose 'relu' or 'erf'."
            )
        if depth < 1:
            raise OptionError(
                f"NeuralKernel: depth={depth} hidden layers; at least 1 (a LinearKernel has none)."
            )
        self.has_lengthscale = ard_num_dims is not None
        super().__init__(ard_num_dims=ard_num_dims, **kwargs)
        self.depth = depth
        self.activation = activation
        for name, prior, constraint in (
            ("weight_variance", weight_variance_prior, weight_variance_constraint),
            ("bias_variance", bias_variance_prior, bias_variance_constraint),
        ):
            self.register_parameter(f"raw_{name}", torch.nn.Parameter(torch.zeros(*self.batch_shape, 1, 1)))
            self.register_constraint(f"raw_{name}", Positive() if constraint is None else constraint)
            if prior is not None:
                self.register_prior(
                    f"{name}_prior",
                    prior,
                    lambda m, name=name: getattr(m, name),
                    lambda m, v, name=name: m._set_variance(name, v),
                )
        # relu halves second moments, so a weight variance of 2 keeps them (He et al. 2015)
        if weight_variance_constraint is None:
            self.weight_variance = 2.0
        if bias_variance_constraint is None:
            self.bias_variance = 1.0
        register_with_botorch()

    @property
    def is_stationary(self) -> bool:
        """False: the kernel depends on where the inputs are, not on their difference alone."""
        return False

    @property
    def weight_variance(self) -> Tensor:
        """s_w, shape `[*batch_shape, 1, 1]`."""
        return self.raw_weight_variance_constraint.transform(self.raw_weight_variance)

    @weight_variance.setter
    def weight_variance(self, value: Tensor | float) -> None:
        self._set_variance("weight_variance", value)

    @property
    def bias_variance(self) -> Tensor:
        """s_b, shape `[*batch_shape, 1, 1]`."""
        return self.raw_bias_variance_constraint.transform(self.raw_bias_variance)

    @bias_variance.setter
    def bias_variance(self, value: Tensor | float) -> None:
        self._set_variance("bias_variance", value)

    def _set_variance(self, name: str, value: Tensor | float) -> None:
        raw = getattr(self, f"raw_{name}")
        constraint = getattr(self, f"raw_{name}_constraint")
        self.initialize(**{f"raw_{name}": constraint.inverse_transform(torch.as_tensor(value).to(raw))})

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params: Any
    ) -> Float[Tensor, "*batch n m"] | Float[Tensor, "*batch n"]:
        """Covariance `[..., n, m]`, or its diagonal `[..., n]`."""
        if last_dim_is_batch:
            raise OptionError(
                "NeuralKernel: last_dim_is_batch is not supported; sum kernels with active_dims."
            )
        if self.has_lengthscale:
            x1, x2 = x1 / self.lengthscale, x2 / self.lengthscale
        s_w, s_b = self.weight_variance, self.bias_variance
        fan_in = x1.shape[-1]
        norm1 = x1.square().sum(-1, keepdim=True) / fan_in
        norm2 = x2.square().sum(-1, keepdim=True) / fan_in
        if diag:
            k12 = (x1 * x2).sum(-1, keepdim=True) / fan_in
        else:
            k12 = x1 @ x2.transpose(-2, -1) / fan_in
            norm2 = norm2.transpose(-2, -1)
        k12, k11, k22 = s_b + s_w * k12, s_b + s_w * norm1, s_b + s_w * norm2
        step = _STEPS[self.activation]
        for _ in range(self.depth):
            k12 = s_b + s_w * step(k12, k11, k22)
            k11, k22 = s_b + s_w * step(k11, k11, k11), s_b + s_w * step(k22, k22, k22)
        return k12.squeeze(-1) if diag else k12
