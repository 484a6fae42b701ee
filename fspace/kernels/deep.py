"""A Gaussian process kernel on features that a network reads off the inputs."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float
from linear_operator import to_dense
from torch import Tensor, nn

from fspace.errors import DataError, OptionError


def register_with_botorch() -> None:
    """Make BoTorch's pathwise sampling know fspace's kernels, if it is there; never imports BoTorch."""
    if "botorch.sampling.pathwise" in sys.modules:
        import_module("fspace.kernels.pathwise_botorch")


class FeatureNorm(nn.Module):
    """Scale features by running statistics: tracked in training, fixed in evaluation, never clamped.

    The statistics are constants for the gradient, so one batch never changes the kernel between its own rows.
    Features far from the training features stay far. Buffers `mean`, `var` are `[k]` float64 (0-d until the
    number of features is known).
    """

    mean: Tensor
    var: Tensor
    seen: Tensor

    def __init__(self, num_features: int | None = None, momentum: float = 0.1):
        super().__init__()
        shape = () if num_features is None else (num_features,)
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))

    @property
    def num_features(self) -> int | None:
        """Number of features, None as long as no batch was seen."""
        return None if self.mean.dim() == 0 else self.mean.shape[0]

    @torch.no_grad()
    def set_statistics(self, mean: Float[Tensor, " k"], var: Float[Tensor, " k"]) -> None:
        """Use exactly these statistics from now on."""
        self.mean = mean.detach().to(torch.float64).clone()
        self.var = var.detach().to(torch.float64).clone()
        self.seen = torch.ones_like(self.seen)

    @torch.no_grad()
    def update(self, features: Float[Tensor, "*batch n k"]) -> None:
        """Move the statistics towards those of one batch; the first batch sets them."""
        rows = features.detach().reshape(-1, features.shape[-1]).to(torch.float64)
        if rows.shape[0] < 2:  # one row says nothing about the spread
            return
        mean, var = rows.mean(0), rows.var(0, unbiased=False)
        step = torch.where(self.seen, self.momentum, 1.0)  # not an `if`: that would wait for the GPU
        # new tensors, not in-place: an earlier forward pass may still need the old ones for its backward pass
        self.mean = self.mean + step * (mean - self.mean)
        self.var = self.var + step * (var - self.var)
        self.seen = torch.ones_like(self.seen)

    def forward(self, features: Float[Tensor, "*batch n k"]) -> Float[Tensor, "*batch n k"]:
        """Return (features - mean) / std in float64."""
        # The floor is relative: a feature that hardly varies in training must not become amplified rounding.
        floor = 1e-6 * self.var.mean() + 1e-8
        return (features.to(torch.float64) - self.mean) / (self.var + floor).sqrt()

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        # The number of features may be learnt from the file.
        for name in ("mean", "var"):
            stored = state_dict.get(prefix + name)
            own = getattr(self, name)
            if stored is not None and own.dim() == 0:
                setattr(self, name, own.new_empty(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class _OfParts(Kernel):
    """A kernel made of others, whose batch shape follows from theirs."""

    def __getitem__(self, index: Any) -> Kernel:
        """The kernel of one batch element."""
        part = super().__getitem__(index)
        if part is not self:
            part._batch_shape = torch.Size([])
        return part


class SplitKernel(_OfParts):
    """`base` on the first `split` columns plus `plain` on the rest: the kernel on `[features, inputs]`."""

    def __init__(self, base: Kernel, plain: Kernel, split: int):
        super().__init__()
        self.base = base
        self.plain = plain
        self.split = split

    def named_sub_kernels(self) -> Iterable[tuple[str, Kernel]]:
        """The two component kernels (each knows its own parts)."""
        yield "base", self.base
        yield "plain", self.plain

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params) -> Tensor:  # type: ignore[no-untyped-def]
        """Covariance `[..., n, m]`, or its diagonal `[..., n]`."""
        k = self.split
        on_features = to_dense(self.base(x1[..., :k], x2[..., :k], diag=diag, **params))
        return on_features + to_dense(self.plain(x1[..., k:], x2[..., k:], diag=diag, **params))


class DeepKernel(_OfParts):
    """k(x, x') = base(g(x), g(x')) [+ plain(x, x')] with g a network followed by `FeatureNorm`.

    The network runs in its own dtype; features are cast to float64 before the kernel, because a kernel matrix
    computed in float32 needs a jitter about a thousand times larger before it can be factorised.

    Args:
        extractor: any torch module mapping `[n, ...]` to `[n, k]`.
        base: any gpytorch kernel for the k features (moved to float64).
        plain: optional gpytorch kernel for the raw inputs (tables only), added to the deep one; it keeps
            distance awareness where the network collapses, and makes the deep kernel safe on small tables.
        num_features: k; needed only for modules without an `out_features` attribute when `plain` is given and
            `on_embedding` is used before any data was seen.
        input_dims: dimensions of one row (1 table, 2 sequence `[t, d]`, 3 image `[c, h, w]`); read from the
            extractor when it says so. When unknown the module sees x as it comes.
        momentum: of the running feature statistics.

    Raises: OptionError for parts that do not fit together, DataError for x of the wrong shape.
    Source: Wilson et al. 2016 (deep kernel learning); the sum with a plain kernel guards against the
    overfitting shown by Ober et al. 2021.
    """

    def __init__(
        self,
        extractor: nn.Module,
        base: Kernel,
        plain: Kernel | None = None,
        *,
        num_features: int | None = None,
        input_dims: int | None = None,
        momentum: float = 0.1,
        active_dims: tuple[int, ...] | None = None,
    ):
        super().__init__(active_dims=active_dims)
        if not isinstance(extractor, nn.Module):
            raise OptionError(
                f"DeepKernel: extractor is a {type(extractor).__name__}; pass a torch.nn.Module."
            )
        for name, part in (("base", base), ("plain", plain)):
            if part is not None and not isinstance(part, Kernel):
                raise OptionError(
                    f"DeepKernel: {name} is a {type(part).__name__}; pass a gpytorch.kernels.Kernel."
                )
        if num_features is None:
            num_features = getattr(extractor, "out_features", None)
        if input_dims is None:
            input_dims = getattr(extractor, "input_dims", 1 if plain is not None else None)
        if plain is not None and input_dims != 1:
            raise OptionError(
                f"DeepKernel: a plain kernel acts on tables [n, d], but this extractor reads rows of "
                f"{input_dims} dimensions; leave plain=None."
            )
        self.extractor = extractor
        self.base = base.double()
        self.plain = None if plain is None else plain.double()
        self.input_dims = input_dims
        self.norm = FeatureNorm(num_features, momentum)
        register_with_botorch()

    @property
    def dtype(self) -> torch.dtype:
        """That of the kernel on the features; the network may have another."""
        return self.base.dtype

    @property
    def num_features(self) -> int | None:
        """k, the number of features (None for a foreign module before it has seen data)."""
        return self.norm.num_features

    @property
    def is_stationary(self) -> bool:
        """False: the network bends the input space."""
        return False

    @property
    def on_embedding(self) -> Kernel:
        """The kernel that acts on `embed(x)`; it shares this kernel's parameters."""
        if self.plain is None:
            return self.base
        if self.num_features is None:
            raise OptionError(
                "DeepKernel: the number of features is not known yet; pass num_features= or embed data first."
            )
        return SplitKernel(self.base, self.plain, self.num_features)

    def embed(self, x: Tensor) -> Float[Tensor, "*batch n p"]:
        """Normalised features of x in float64, followed by x itself when there is a plain kernel.

        x: `[..., n, d]`, images `[n, c, h, w]` or sequences `[n, t, d]`, whatever the extractor reads.
        In training mode the running statistics move first. Raises DataError if x has too few dimensions.
        """
        x = self._select(x)
        features = self.raw_features(x)
        if self.training:
            self.norm.update(features)
        return self._finish(x, features)

    def raw_features(self, x: Tensor) -> Float[Tensor, "*batch n k"]:
        """The network's output for x `[..., n, *row]` in the network's own dtype, before normalisation."""
        rows = x.to(self._network_dtype(x))
        if self.input_dims is None:
            return self.extractor(rows)
        if x.dim() < self.input_dims + 1:
            raise DataError(
                f"DeepKernel: x has shape {tuple(x.shape)}, but a row has {self.input_dims} dimensions; pass "
                f"a tensor of at least {self.input_dims + 1} dimensions, rows first."
            )
        split = x.dim() - self.input_dims
        leading, row = rows.shape[:split], rows.shape[split:]
        # modules such as BatchNorm know one batch dimension only
        features = self.extractor(rows.reshape(-1, *row))
        return features.reshape(*leading, features.shape[-1])

    @torch.no_grad()
    def fix_statistics(self, x: Any, chunk: int = 8192) -> None:
        """Set the feature statistics exactly to those of x (a tensor, or anything with `split`), read in chunks of rows
        along dimension 0."""
        was_training = self.extractor.training
        self.extractor.eval()
        try:
            parts = [self.raw_features(self._select(part)) for part in x.split(chunk)]
        finally:
            self.extractor.train(was_training)
        features = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).to(torch.float64)
        self.norm.set_statistics(features.mean(0), features.var(0, unbiased=False))

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params) -> Tensor:  # type: ignore[no-untyped-def]
        """Covariance `[..., n, m]` or its diagonal, computed in float64, returned in the dtype of x1."""
        if params.pop("last_dim_is_batch", False):
            raise OptionError(
                "DeepKernel: last_dim_is_batch has no meaning; put structure kernels inside base."
            )
        same = x1 is x2 or (x1.shape == x2.shape and torch.equal(x1, x2))
        raw1 = self.raw_features(x1)
        raw2 = raw1 if same else self.raw_features(x2)
        if self.training:  # before either side is normalised: both sides see the same statistics
            self.norm.update(raw1)
        z1 = self._finish(x1, raw1)
        z2 = z1 if same else self._finish(x2, raw2)
        dtype = x1.dtype if x1.is_floating_point() else torch.float64
        return to_dense(self.on_embedding(z1, z2, diag=diag, **params)).to(dtype)

    def named_sub_kernels(self) -> Iterable[tuple[str, Kernel]]:
        """The component kernels (each knows its own parts)."""
        yield "base", self.base
        if self.plain is not None:
            yield "plain", self.plain

    def _select(self, x: Tensor) -> Tensor:
        return x if self.active_dims is None else x.index_select(-1, self.active_dims)

    def _finish(self, x: Tensor, features: Tensor) -> Tensor:
        z = self.norm(features)
        return z if self.plain is None else torch.cat([z, x.to(torch.float64)], dim=-1)

    def _network_dtype(self, x: Tensor) -> torch.dtype:
        for tensor in self.extractor.parameters():
            if tensor.is_floating_point():
                return tensor.dtype
        return x.dtype if x.is_floating_point() else torch.float64


def embed(kernel: Kernel, x: Tensor) -> Tensor:
    """Float64 inputs of `embedded_kernel(kernel)`: features for a DeepKernel, else x itself."""
    return kernel.embed(x) if isinstance(kernel, DeepKernel) else x.to(torch.float64)


def embedded_kernel(kernel: Kernel) -> Kernel:
    """The kernel on `embed(kernel, x)`: kernel(x, x') = embedded_kernel(kernel)(embed(x), embed(x'))."""
    return kernel.on_embedding if isinstance(kernel, DeepKernel) else kernel
