"""A sparse posterior is a basis plus a table of sites: q(u) proportional to p(u | basis) prod_k t_k(u).

A *basis* is a kernel, inducing inputs and a likelihood at fixed parameters. A *site* is what one batch of data says
about the inducing values, t(u) = exp(b'v - v' Lambda v / 2 + c), in whitened coordinates v = L^-1 u, L L' = K_uu.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import GaussianLikelihood
from jaxtyping import Float
from torch import Tensor

from fspace.errors import OptionError
from fspace.inference.likelihoods import AnyLikelihood, OffsetLikelihood
from fspace.inference.noise import NoiseFunction
from fspace.inference.numerics import cholesky, solve_lower
from fspace.kernels.deep import embed, embedded_kernel
from fspace.kernels.evaluate import covariance, diagonal

FIRST_JITTER = 1e-10  # relative to the mean of the diagonal of K_uu


@dataclass(frozen=True, eq=False)
class Basis:
    """Kernel, inducing inputs (in the kernel's embedding) and likelihood, at fixed parameters.

    Shapes: inducing_inputs [m, p]; the likelihood's noise [t, 1], one variance an output, times exp(noise_function)
    where the noise varies over the inputs.
    """

    kernel: Kernel
    inducing_inputs: Float[Tensor, "m p"]
    likelihood: AnyLikelihood
    noise_function: NoiseFunction | None = None

    @cached_property
    def id(self) -> str:
        """Hash of everything the basis is made of: two bases with one id give the same prior."""
        digest = hashlib.sha256(type(self.kernel).__name__.encode())
        state = {f"kernel.{k}": v for k, v in self.kernel.state_dict().items()}
        state |= {f"likelihood.{k}": v for k, v in self.likelihood.state_dict().items()}
        state["inducing_inputs"] = self.inducing_inputs
        if isinstance(
            self.likelihood, OffsetLikelihood
        ):  # which may have no parameter that tells it from another
            digest.update(type(self.likelihood.inner).__name__.encode())
        if self.noise_function is not None:
            state |= {f"noise_function.{k}": v for k, v in self.noise_function.state_dict().items()}
        for name in sorted(state):
            value = state[name].detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def _factor_and_jitter(self) -> tuple[Float[Tensor, "m m"], float]:
        with torch.no_grad():
            k = covariance(embedded_kernel(self.kernel), self.inducing_inputs)
            return cholesky(k, "kernel matrix of the inducing inputs", FIRST_JITTER)

    @property
    def factor(self) -> Float[Tensor, "m m"]:
        """Lower Cholesky factor of K_uu."""
        return self._factor_and_jitter[0]

    @property
    def jitter(self) -> float:
        """What was added to the diagonal of K_uu, relative to its mean."""
        return self._factor_and_jitter[1]

    @property
    def noise(self) -> Float[Tensor, " t"]:
        """Noise variance of every output, where the noise is Gaussian."""
        assert isinstance(self.likelihood, GaussianLikelihood)
        return self.likelihood.noise.detach()[..., 0]

    def log_noise_ratio(self, z: Float[Tensor, "*b n p"]) -> Float[Tensor, "*b n"]:
        """Log of the noise variance at embedded inputs relative to `noise`: zero where the noise is constant."""
        if self.noise_function is None:
            return torch.zeros(z.shape[:-1], dtype=z.dtype, device=z.device)
        return self.noise_function(z)

    def embed(self, x: Tensor) -> Tensor:
        """Inputs as the kernel sees them: [..., n, d] (or images, sequences) -> [..., n, p], float64."""
        return embed(self.kernel, x)

    def whiten(self, z: Float[Tensor, "*b n p"]) -> Float[Tensor, "*b m n"]:
        """L^-1 k(Z, z) for embedded inputs z."""
        cross = covariance(
            embedded_kernel(self.kernel), self.inducing_inputs.expand(*z.shape[:-2], -1, -1), z
        )
        return solve_lower(self.factor, cross)

    def prior_variance(self, z: Float[Tensor, "*b n p"]) -> Float[Tensor, "*b n"]:
        """k(z_i, z_i)."""
        return diagonal(embedded_kernel(self.kernel), z)

    def grown(self, z: Float[Tensor, "n p"]) -> Basis:
        """The basis with more inducing inputs after its own (old sites go on with `Site.padded`)."""
        return replace(self, inducing_inputs=torch.cat([self.inducing_inputs, z]))


@dataclass(frozen=True, eq=False)
class Site:
    """Natural parameters of one batch's factor, and what it adds to the log evidence.

    Shapes: precision [t, m, m] (positive semi-definite; [t, m] where it is diagonal, over weights), shift [t, m],
    log_scale [t] (nats), all relative to the whitened prior N(0, I). (site_id, incarnation, version) name one state of
    one contributor.
    """

    basis_id: str
    precision: Float[Tensor, "t m m"] | Float[Tensor, "t m"]
    shift: Float[Tensor, "t m"]
    log_scale: Float[Tensor, " t"]
    count: int
    site_id: str = "data"
    incarnation: str = ""
    version: int = 0

    def __add__(self, other: Site) -> Site:
        if self.basis_id != other.basis_id:
            raise OptionError(
                f"Sites {self.site_id!r} and {other.site_id!r} belong to different bases "
                f"({self.basis_id[:8]}, {other.basis_id[:8]}) and cannot be added; refit one on the other's basis."
            )
        return replace(
            self,
            precision=self.precision + other.precision,
            shift=self.shift + other.shift,
            log_scale=self.log_scale + other.log_scale,
            count=self.count + other.count,
            site_id=f"{self.site_id}+{other.site_id}",
        )

    def padded(self, basis: Basis) -> Site:
        """The same factor on a basis that `Basis.grown` made: it says nothing about the new inducing values."""
        extra = basis.inducing_inputs.shape[0] - self.shift.shape[-1]
        return replace(
            self,
            basis_id=basis.id,
            precision=torch.nn.functional.pad(self.precision, (0, extra, 0, extra)),
            shift=torch.nn.functional.pad(self.shift, (0, extra)),
        )
