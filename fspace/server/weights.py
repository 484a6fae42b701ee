"""The other family: a Gaussian over the weights of a torch module, full or diagonal, on the same server.

Coordinates are v = w / prior_scale, so that the prior is N(0, I) as it is for inducing values.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from fspace.errors import DataError, ModelFileError, OptionError
from fspace.inference.basis import Site
from fspace.predictive import check_count, generator_for
from fspace.server.natural import moments

MAGIC = b"fspace weights 1\n"
LARGEST_FULL = 5000  # weights whose full covariance is kept


@dataclass(frozen=True, eq=False)
class WeightBasis:
    """A prior N(0, prior_scale^2) over the weights of a module of this layout; what it is told by is its content.

    layout: name and shape of every parameter, in order; architecture: text that tells this module from others of the
    same layout (`repr(module)`).
    """

    layout: tuple[tuple[str, tuple[int, ...]], ...]
    architecture: str
    prior_scale: float = 1.0
    diagonal: bool = True

    @staticmethod
    def of(module: nn.Module, prior_scale: float = 1.0, diagonal: bool = True) -> WeightBasis:
        """The basis of a module's trainable parameters. Raises OptionError for a scale that is not positive, a module
        without parameters, and a full Gaussian over more than 5,000 of them."""
        layout = tuple((n, tuple(p.shape)) for n, p in module.named_parameters() if p.requires_grad)
        if not layout:
            raise OptionError(f"{type(module).__name__} has no trainable parameter.")
        if not 0 < prior_scale < float("inf"):
            raise OptionError(f"prior_scale={prior_scale!r} must be a positive number.")
        basis = WeightBasis(layout, repr(module), float(prior_scale), bool(diagonal))
        if not diagonal and basis.size > LARGEST_FULL:
            raise OptionError(
                f"A full Gaussian over {basis.size:,} weights takes {basis.size**2 * 8 / 1e9:.1f} GB a site; pass "
                f"diagonal=True (full is for at most {LARGEST_FULL:,})."
            )
        return basis

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(_count(shape) for _, shape in self.layout)

    @cached_property
    def id(self) -> str:
        """Hash of the content."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The basis as bytes."""
        about = {name: getattr(self, name) for name in ("layout", "architecture", "prior_scale", "diagonal")}
        return MAGIC + json.dumps(about, sort_keys=True).encode()

    @staticmethod
    def is_in(content: bytes) -> bool:
        """Whether bytes hold a basis of weights."""
        return content.startswith(MAGIC)

    @staticmethod
    def from_bytes(content: bytes) -> WeightBasis:
        """What `to_bytes` wrote. Raises ModelFileError."""
        try:
            about = json.loads(content.removeprefix(MAGIC))
            layout = tuple((str(n), tuple(int(s) for s in shape)) for n, shape in about["layout"])
            return WeightBasis(layout, about["architecture"], about["prior_scale"], about["diagonal"])
        except (ValueError, TypeError, LookupError) as error:
            raise ModelFileError(f"The bytes are no basis of weights, or damaged ({error}).") from error

    def weights(self, v: Float[Tensor, " p"]) -> dict[str, Tensor]:
        """The module's parameters at coordinates v."""
        parts = (self.prior_scale * v).split([_count(shape) for _, shape in self.layout])
        return {name: part.reshape(shape) for (name, shape), part in zip(self.layout, parts)}

    def coordinates(self, module: nn.Module) -> Float[Tensor, " p"]:
        """Where the module's parameters stand. Raises DataError for a module of another layout."""
        own = {n: p.detach() for n, p in module.named_parameters()}
        for name, shape in self.layout:
            if name not in own or tuple(own[name].shape) != shape:
                raise DataError(
                    f"The module has no parameter {name!r} of shape {list(shape)}; it is of another basis."
                )
        flat = torch.cat([own[name].reshape(-1) for name, _ in self.layout])
        return flat.to(torch.float64) / self.prior_scale

    def posterior(self, total: Site) -> WeightPosterior:
        """The posterior that a product of sites gives."""
        mean, covariance = moments(total)
        return WeightPosterior(self, mean[0], covariance[0])


@dataclass(frozen=True, eq=False)
class WeightPosterior:
    """A Gaussian over the coordinates of a module's weights: mean [p]; covariance [p, p], or variances [p]."""

    basis: WeightBasis
    mean: Float[Tensor, " p"]
    covariance: Tensor

    def draw(self, n: int = 1, seed: int | None = None) -> list[dict[str, Tensor]]:
        """n sets of weights, as `torch.func.functional_call` takes them."""
        white = torch.randn(
            check_count(n, 1),
            self.basis.size,
            generator=generator_for(seed, torch.device("cpu")),
            dtype=torch.float64,
        )
        if self.covariance.ndim == 1:
            values = self.mean + white * self.covariance.sqrt()
        else:
            values = self.mean + white @ torch.linalg.cholesky(self.covariance).mT
        return [self.basis.weights(v) for v in values]

    def outputs(
        self, module: nn.Module, x: Tensor, n: int = 20, seed: int | None = None
    ) -> Float[Tensor, "s *b"]:
        """The module's outputs at x under n draws of its weights, stacked."""
        dtype = x.dtype

        def each() -> Iterator[Tensor]:
            for weights in self.draw(n, seed):
                with torch.no_grad():
                    yield functional_call(module, {k: v.to(dtype) for k, v in weights.items()}, (x,))

        return torch.stack(list(each()))


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
