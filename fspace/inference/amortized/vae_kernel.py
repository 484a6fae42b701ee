"""A Gaussian process on what a VAE's encoder says, both trained at once: rows without targets shape the kernel.

k(x, x') = base(m(x), m(x')), m the mean of q(z | x). What is climbed is
    sum over all rows of ELBO(x)  +  weight * F(targets of the labelled rows),
F Titsias' bound on the log evidence of the labelled rows: that evidence itself where all of them are inducing inputs.
Sources: Wilson et al. (2016), deep kernel learning; Jean, Xie and Ermon (2018), semi-supervised deep kernel learning
(whose unlabelled rows lower the predictive variance instead); Titsias (2009), eq. 9.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from jaxtyping import Float
from torch import Tensor, nn

from fspace.errors import DataError, NotFittedError, OptionError
from fspace.inference.amortized import checks
from fspace.inference.amortized.model import AmortizedModel
from fspace.inference.amortized.training import Rows, Step, hold_out, plan_of, train
from fspace.inference.amortized.vae import VAE
from fspace.inference.basis import Basis
from fspace.inference.collapsed import bound_from, fit_site, statistics
from fspace.inference.gp import GPPosterior, Scaling
from fspace.inference.inducing import greedy_variance
from fspace.inference.numerics import cholesky_unseen, seeded
from fspace.inference.optimise import gaussian_likelihood
from fspace.kernels import DeepKernel
from fspace.kernels.deep import embed, embedded_kernel
from fspace.kernels.evaluate import covariance

SCALES = ("y_shift", "y_scale")
LABELLED = ("labelled_x", "labelled_y")  # kept with the model: the posterior is of them


class VAEKernelGP(AmortizedModel):
    """Deep-kernel GP regression whose extractor is a VAE's encoder, of rows [n, d] or images [n, c, h, w].

    latents, widths, network, likelihood: as of `VAE`; weight: of the GP's bound beside the VAE's (1: the joint density
    of rows and targets; more bends the latents to the targets, which a few of them do not justify); inducing: number of
    inducing inputs, at most: with fewer labelled rows the GP is exact. posterior_ answers for the targets; encode,
    reconstruct, sample and log_likelihood are the VAE's, about rows.
    """

    def __init__(
        self,
        latents: int = 2,
        widths: Sequence[int] = (64,),
        network: str = "dense",
        likelihood: str = "gaussian",
        weight: float = 1.0,
        inducing: int = 300,
        device: str = "auto",
    ):
        super().__init__()
        if not 0 <= weight < math.inf:
            raise OptionError(f"weight={weight!r} must be a number of at least 0.")
        checks.count(inducing, "inducing")
        self.latents, self.widths, self.network, self.likelihood = latents, list(widths), network, likelihood
        self.weight, self.inducing, self.device = weight, inducing, device
        self._new_vae()  # which refuses what makes no sense

    def _new_vae(self) -> VAE:
        return VAE(self.latents, "gaussian", self.widths, self.network, self.likelihood, device=self.device)

    # -- data and layers ---------------------------------------------------------------------------------------

    def fit(self, data: Any, y: Any = None, **plan: Any) -> Any:
        """Train on rows, and on targets y [n] or [n, t], NaN where unknown (all t of a row, or none).

        posterior_: a GPPosterior given the labelled rows. Rows without targets are held out where there are enough.
        Keywords as in `training.Plan`. Raises DataError for fewer than two targets, or another number than rows.
        """
        how = plan_of(plan)
        (x,) = self.prepare(data)
        target = _targets(y, len(x))
        known = ~target.isnan().any(1)
        with seeded(how.seed):
            self._make(self.shape_of((x,)) | {"outputs": target.shape[1], "vector": np.ndim(y) == 1})
        x, target, known = x.to(self.where), target.to(self.where), known.to(self.where)
        kept, held = hold_out(known, how)
        mine = kept[known[kept]]
        if len(mine) < 2:
            raise DataError("Too few rows with targets are left to learn from; hold out less, or label more.")
        self._keep(x[mine], target[mine])
        self.history_ = train(self, (x[kept],), how, (x[held],))
        self._keep(x[known], target[known])
        self.posterior_ = self.posterior()
        return self

    def prepare(self, data: Any) -> Rows:
        """Rows [n, d], images flat, float32."""
        vae = self._new_vae()
        rows = vae.prepare(data)
        self._image = vae._image
        return rows

    def shape_of(self, rows: Rows) -> dict[str, Any]:
        vae = self._new_vae()
        vae._image = self._image
        own = {k: v for k, v in getattr(self, "shape_", {}).items() if k in ("outputs", "vector")}
        if hasattr(self, "shape_"):
            vae.shape_ = {k: v for k, v in self.shape_.items() if k not in own}
        return vae.shape_of(rows) | own

    def build(self, shape: dict[str, Any]) -> None:
        self.vae = self._new_vae()
        self.vae._make({k: v for k, v in shape.items() if k not in ("outputs", "vector")})
        base = ScaleKernel(MaternKernel(nu=2.5, ard_num_dims=self.latents))
        self.kernel = DeepKernel(
            EncoderMean(self.vae, shape["row"]), base, num_features=self.latents, momentum=0.0
        )
        # latents have the scale of their prior already; that of an idle one must not be blown up
        self.kernel.norm.set_statistics(torch.zeros(self.latents), torch.ones(self.latents))
        self.noise = gaussian_likelihood(shape["outputs"], 0.1, torch.device("cpu"))
        sizes: dict[str, tuple[int, ...]] = dict.fromkeys(SCALES, (shape["outputs"],))
        sizes |= {"labelled_x": (0, math.prod(shape["row"])), "labelled_y": (0, shape["outputs"])}
        for name, size in sizes.items():
            self.register_buffer(name, torch.zeros(size, dtype=torch.float64))
        self.register_buffer("total", torch.tensor(1))

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        for name in LABELLED:  # as many as there were
            if prefix + name in state_dict:
                setattr(self, name, torch.zeros_like(state_dict[prefix + name], device=self.where))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _keep(self, x: Tensor, y: Float[Tensor, "n t"]) -> None:
        """The labelled rows, and the scales of their targets."""
        self.labelled_x, self.labelled_y = x.to(torch.float64), y
        spread = y.std(0, correction=0)
        self.y_shift, self.y_scale = y.mean(0), torch.where(spread > 0, spread, torch.ones_like(spread))

    def begin(self, rows: Rows) -> None:
        """Scales of the data, and how many rows share the evidence."""
        self.vae.begin(rows)
        self.total = torch.tensor(len(rows[0]), device=self.where)

    # -- training ----------------------------------------------------------------------------------------------

    def evidence(self) -> Float[Tensor, ""]:
        """Titsias' bound on the log evidence of the labelled rows' standardised targets (nats)."""
        x, y = self._rows(self.labelled_x), (self.labelled_y - self.y_shift) / self.y_scale
        z = embed(self.kernel, x)
        some = torch.linspace(0, len(z) - 1, min(len(z), self.inducing), device=z.device).long()
        inner = embedded_kernel(self.kernel)
        stats = statistics(inner, z[some], z, y)
        return bound_from(
            stats, covariance(inner, z[some]), self.noise.noise[..., 0], factorise=cholesky_unseen
        )

    def _rows(self, flat: Tensor) -> Tensor:
        return flat.unflatten(1, self.shape_["row"])

    def _objective(self, rows: Rows, generator: torch.Generator) -> Tensor:
        return self.vae._analytic(rows[0], generator) + self.weight * self.evidence() / self.total

    def step(self, rows: Rows, generator: torch.Generator) -> Step:
        value = self._objective(rows, generator)
        return Step(value.detach(), [(value.mean(), list(self.parameters()))])

    def score(self, rows: Rows, generator: torch.Generator) -> Float[Tensor, " b"]:
        return self._objective(rows, generator)

    # -- answers -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def posterior(self) -> GPPosterior:
        """Posterior of the targets as a function of rows [n, d] (or images), in the units of the data.

        What `fit` leaves as posterior_. Raises NotFittedError."""
        if not hasattr(self, "shape_"):
            raise NotFittedError("This VAEKernelGP is not fitted yet: call `fit` first.")
        kernel = copy.deepcopy(self.kernel).eval().requires_grad_(False)
        noise = copy.deepcopy(self.noise).eval().requires_grad_(False)
        x = self._rows(self.labelled_x)
        z = embed(kernel, x)
        picked = greedy_variance(embedded_kernel(kernel), z, self.inducing)
        basis = Basis(kernel, z[picked], noise)
        row = self.shape_["row"]
        ones = self.labelled_x.new_ones(row if len(row) == 1 else (row[0], 1, 1))
        scaling = Scaling(ones, ones, torch.zeros_like(ones), ones, self.y_shift, self.y_scale)
        site = fit_site(basis, x, (self.labelled_y - self.y_shift) / self.y_scale)
        return GPPosterior(basis, site, scaling, vector=self.shape_["vector"])

    def encode(self, data: Any) -> Any:
        """q(z | x) of every row: mean and std [n, l]."""
        self._require_fit()
        return self.vae.encode(data)

    def latent_means(self, data: Any) -> Float[Tensor, "n l"]:
        """Means of the latents under q: what the kernel sees."""
        return self.vae.latent_means(data)

    def reconstruct(self, data: Any) -> Tensor:
        """Mean of every row at the mean of its latents, shaped as the data."""
        return self.vae.reconstruct(data)

    def sample(self, n: int = 1, seed: int | None = None) -> Tensor:
        """n new rows, shaped as the data."""
        self._require_fit()
        return self.vae.sample(n, seed)

    def log_likelihood(self, data: Any, samples: int = 5000, seed: int | None = 0) -> Float[Tensor, " n"]:
        """log p of every row (nats) by importance sampling: a lower bound in expectation."""
        return self.vae.log_likelihood(data, samples, seed)


class EncoderMean(nn.Module):
    """Means of a VAE's latents at rows [n, d] or images [n, c, h, w]: an extractor for a kernel."""

    def __init__(self, vae: VAE, row: Sequence[int]):
        super().__init__()
        self.observations, self.encoder = vae.observations, vae.encoder
        self.input_dims, self.out_features = len(row), vae.latents[0]

    def forward(self, x: Tensor) -> Float[Tensor, "n k"]:
        """Features of the rows of x."""
        return self.encoder(self.observations.read(x.flatten(1))).chunk(2, dim=-1)[0]


def _targets(y: Any, rows: int) -> Float[Tensor, "n t"]:
    if y is None:
        raise DataError("y is missing: targets [n] or [n, t], NaN where they are unknown.")
    target = torch.as_tensor(np.asarray(y, dtype=np.float64))
    if target.ndim not in (1, 2) or len(target) != rows or 0 in target.shape:
        raise DataError(f"y must be [{rows}] or [{rows}, t], NaN where unknown; it is {list(target.shape)}.")
    target = target.reshape(rows, -1)
    partly = target.isnan().any(1) & ~target.isnan().all(1)
    for bad, words in ((target.isinf().any(1), "an infinite target"), (partly, "some targets, but not all")):
        if bool(bad.any()):
            raise DataError(f"Row {int(bad.nonzero()[0])} has {words}; give all or none (NaN).")
    if int((~target.isnan().any(1)).sum()) < 2:
        raise DataError("Fewer than two rows have targets; a VAE alone needs none: `VAE`.")
    return target
