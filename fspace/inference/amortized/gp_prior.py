"""A VAE whose latents are functions of a covariate, such as time: a sparse Gaussian process prior, amortised sites.

Frame n of a series has the latent f(t_n), f_l ~ GP(0, k) for every latent. The encoder turns a frame into
pseudo-observations N(mu_n, s2_n) of f(t_n); these make a site in closed form, so that q(f) of a whole series, also
where frames are missing, is a sparse posterior like any other in fspace. The bound is
    sum_n E_q[log p(x_n | f(t_n))] - sum_l KL(q(u_l) || p(u_l)).
Sources: Pearce (2020), the Gaussian process prior VAE; Jazbec et al. (2021), scalable Gaussian process VAEs. Of a long
series, a step sends gradients through some frames only; the others are encoded without, so that q(f) is always that of
the whole series (theirs scales up the batch, which biases it).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gpytorch.kernels import Kernel, MaternKernel, RBFKernel
from jaxtyping import Float
from torch import Tensor, nn

from fspace.errors import DataError, OptionError
from fspace.inference.amortized import checks
from fspace.inference.amortized.arrays import numbers
from fspace.inference.amortized.model import AmortizedModel
from fspace.inference.amortized.training import Rows, Step, plan_of, train
from fspace.inference.basis import FIRST_JITTER, Basis, Site
from fspace.inference.gp import GPPosterior, Scaling
from fspace.inference.inducing import greedy_variance
from fspace.inference.numerics import cholesky_unseen, seeded, solve_lower
from fspace.inference.optimise import MIN_NOISE, gaussian_likelihood
from fspace.kernels import DeepKernel
from fspace.kernels.deep import embed, embedded_kernel
from fspace.kernels.describe import kernel_from_spec, kernel_to_spec
from fspace.kernels.evaluate import covariance, diagonal
from fspace.kernels.extractors import MLP
from fspace.predictive import Samples, check_count, generator_for

LIKELIHOODS = ("gaussian", "bernoulli")
JUDGED = 20  # samples of the latent functions behind the held-out score
DRAWS = 64  # samples behind predictives of frames
CANDIDATES = 5000  # frames among which inducing inputs are chosen
HIDDEN = 0.1  # share of the frames of a series that are hidden to judge it


class GPPriorVAE(AmortizedModel):
    """Variational autoencoder with a sparse GP prior along a covariate.

    Data: a pair (t, x), or a list of such pairs where every series has functions of its own: t [T] or [T, d]; x
    [T, ...] one frame for each t. NaN in x is missing, a whole frame or parts of it. latents: number of functions;
    kernel: "matern" (5/2), "rbf", "deep" (a network before the Matern kernel), or a gpytorch kernel over t, shared by
    the latents (t is standardised; the decoder sets their scale); inducing: number of inducing inputs; widths: of the
    hidden layers of encoder and decoder; frames: of a series that a step sends gradients through, at most.
    Bernoulli frames hold values from 0 to 1.
    """

    def __init__(
        self,
        latents: int = 2,
        kernel: str | Kernel | dict[str, Any] = "matern",
        inducing: int = 30,
        widths: Sequence[int] = (64,),
        likelihood: str = "gaussian",
        frames: int = 500,
        device: str = "auto",
    ):
        super().__init__()
        if likelihood not in LIKELIHOODS:
            raise OptionError(
                f"likelihood={likelihood!r} does not exist; choose one of {', '.join(LIKELIHOODS)}."
            )
        for name, value in (("latents", latents), ("inducing", inducing), ("frames", frames)):
            checks.count(value, name)
        self.latents, self.inducing, self.frames = latents, inducing, frames
        object.__setattr__(self, "kernel", kernel)  # an option: what is trained is a copy of it
        self.widths, self.likelihood, self.device = list(widths), likelihood, device

    def options(self) -> dict[str, Any]:
        named = super().options()
        if isinstance(self.kernel, Kernel):
            named["kernel"] = kernel_to_spec(self.kernel)
        return named

    # -- data --------------------------------------------------------------------------------------------------

    def prepare(self, data: Any) -> Rows:
        """Series padded to one length: t [s, T, d], x [s, T, p], whether a value was seen [s, T, p], which frames make
        the site [s, T], and which are to be predicted from these [s, T] (none, but while training)."""
        series = [data] if isinstance(data, tuple) else data
        if not isinstance(series, list):
            raise DataError("Data must be a pair (t, x) of times and frames, or a list of such pairs.")
        if not series:
            raise DataError("There is no series.")
        parts = [_series(pair, k) for k, pair in enumerate(series)]
        shapes = {(t.shape[1], tuple(x.shape[1:])) for t, x in parts}
        if len(shapes) > 1:
            raise DataError(f"Series differ in what t or a frame looks like: {sorted(shapes)}.")
        longest = max(len(t) for t, _ in parts)
        count, (d, frame) = len(parts), next(iter(shapes))
        t_all = torch.zeros(count, longest, d, dtype=torch.float64)
        x_all = torch.zeros(count, longest, math.prod(frame), dtype=torch.float64)
        seen = torch.zeros(x_all.shape, dtype=torch.bool)
        for k, (t, x) in enumerate(parts):
            flat = x.reshape(len(x), -1)
            seen[k, : len(t)] = ~flat.isnan()
            t_all[k, : len(t)], x_all[k, : len(t)] = t, flat.nan_to_num(0.0)
        if self.likelihood == "bernoulli" and bool(((x_all < 0) | (x_all > 1)).any()):
            raise DataError(
                "Bernoulli frames must hold values from 0 to 1; use likelihood='gaussian' for others."
            )
        given = seen.any(-1)
        if not bool(given.any(1).all()):
            empty = int((~given.any(1)).nonzero()[0])
            raise DataError(f"Series {empty} has no frame with a value in it; leave it out.")
        return t_all, x_all, seen, given, torch.zeros_like(given)

    def shape_of(self, rows: Rows) -> dict[str, Any]:
        return {"inputs": rows[0].shape[-1], "size": rows[1].shape[-1]}

    def build(self, shape: dict[str, Any]) -> None:
        d, size = shape["inputs"], shape["size"]
        self.prior = _kernel(self.kernel, d).double()
        # values, and which of them were seen
        self.encoder = MLP(2 * size, self.widths, 2 * self.latents)
        self.decoder = MLP(self.latents, self.widths, size)
        self.log_noise = nn.Parameter(torch.tensor(math.log(0.1), dtype=torch.float64))
        self.inducing_inputs = nn.Parameter(torch.zeros(self.inducing, d, dtype=torch.float64))
        numbers = {"t_shift": d, "t_scale": d, "x_shift": 1, "x_scale": 1}
        for name, length in numbers.items():
            self.register_buffer(name, torch.zeros(length, dtype=torch.float64))
        self.register_buffer("grid", torch.zeros(0, d, dtype=torch.float64))

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        for name in ("grid", "inducing_inputs"):  # as many as there were in training
            if prefix + name in state_dict:
                getattr(self, name).data = torch.zeros_like(state_dict[prefix + name])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # -- training ----------------------------------------------------------------------------------------------

    def fit(self, data: Any, **plan: Any) -> Any:
        """Train; of one series frames are held out, of several whole series (of which frames are then hidden).

        posterior_: q(f) of the one series, or a list of them. Keywords as in `training.Plan`."""
        how, rows = plan_of(plan), self.prepare(data)
        with seeded(how.seed):
            self._make(self.shape_of(rows))
        rows = tuple(r.to(self.where) for r in rows)
        judged = None
        if len(rows[0]) == 1:
            judged = _hidden(rows, how.held_out, torch.Generator(self.where).manual_seed(how.seed))
            rows = (*judged[:4], rows[4])
        self.history_ = train(self, rows, how, judged)
        self.posterior_ = self.encode(data)
        return self

    def begin(self, rows: Rows) -> None:
        """Scales and inducing inputs."""
        t, x, seen, given, _ = rows
        flat = t[given]
        self.t_shift, self.t_scale = flat.mean(0), _spread(flat)
        if self.likelihood == "gaussian":
            values = x[seen & given[..., None]]
            self.x_shift, self.x_scale = values.mean()[None], _spread(values[:, None])
        else:
            self.x_shift, self.x_scale = torch.zeros_like(self.x_shift), torch.ones_like(self.x_scale)
        self.grid = t[0][given[0]]
        some = torch.linspace(0, len(flat) - 1, min(len(flat), CANDIDATES), device=flat.device).long()
        scaled = ((flat - self.t_shift) / self.t_scale)[some]
        with torch.no_grad():
            picked = greedy_variance(embedded_kernel(self.prior), embed(self.prior, scaled), self.inducing)
        self.inducing_inputs.data = scaled[
            picked
        ].clone()  # in t: a network in the kernel moves what it embeds

    def pseudo_observations(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Means and precisions [..., T, l] that the encoder reads off frames [..., T, p]; of unseen ones, 0."""
        scaled = torch.where(seen, (x - self.x_shift) / self.x_scale, torch.zeros_like(x))
        told = torch.cat([scaled, seen.to(x)], dim=-1).to(_dtype(self.encoder))
        mean, log_precision = self.encoder(told).to(torch.float64).chunk(2, dim=-1)
        return mean, torch.where(seen.any(-1)[..., None], log_precision.clamp(-12, 12).exp(), 0.0)

    def log_density(self, x: Tensor, seen: Tensor, f: Tensor) -> Tensor:
        """log p of frames [..., T, p] given latents f [..., T, l]: [..., T], over the values that were seen."""
        out = self.decoder(f.to(_dtype(self.decoder))).to(torch.float64)
        if self.likelihood == "bernoulli":
            each = -nn.functional.binary_cross_entropy_with_logits(out, x.expand_as(out), reduction="none")
        else:
            error = (x - self.x_shift) / self.x_scale - out
            each = -0.5 * (error.square() / self.log_noise.exp() + self.log_noise + math.log(2 * math.pi))
            each = each - self.x_scale.log()
        return torch.where(seen, each, torch.zeros_like(each)).sum(-1)

    def _whitened(self, t: Float[Tensor, "s T d"]) -> tuple[Float[Tensor, "s m T"], Float[Tensor, "s T"]]:
        """a = L^-1 k_u(t), and the variance that u leaves."""
        inner = embedded_kernel(self.prior)
        z = embed(self.prior, (t - self.t_shift) / self.t_scale)
        zu = embed(self.prior, self.inducing_inputs)
        factor, _ = cholesky_unseen(
            covariance(inner, zu), "kernel matrix of the inducing inputs", FIRST_JITTER
        )
        a = solve_lower(factor, covariance(inner, zu.expand(len(z), -1, -1), z))
        return a, (diagonal(inner, z) - a.square().sum(-2)).clamp(min=0.0)

    def step(self, rows: Rows, generator: torch.Generator) -> Step:
        t, x, seen, given, _ = rows
        with torch.no_grad():
            mean, precision = self.pseudo_observations(x, seen)
        order = torch.randperm(t.shape[1], generator=generator, device=t.device)
        picked = order[: self.frames].sort().values
        now = lambda values: values.index_select(1, picked)  # noqa: E731
        share = now(given).sum(-1) / given.sum(-1)  # of the frames of a series, those that are picked
        scale = 1.0 / share.clamp(min=1e-12)
        # the gradient through the picked ones stands for that through all
        told = [
            v.detach() + scale[:, None, None] * (v - v.detach())
            for v in self.pseudo_observations(now(x), now(seen))
        ]
        mean, precision = mean.index_copy(1, picked, told[0]), precision.index_copy(1, picked, told[1])
        a, residual = self._whitened(t)
        inner, centre, divergence = _posterior(a, mean, precision * given[..., None])
        f = _sampled(a[..., picked], residual[..., picked], inner, centre, generator)
        fits = torch.where(now(given), self.log_density(now(x), now(seen), f), 0.0).sum(-1)
        bound = fits * scale - divergence
        return Step(bound.detach(), [(bound.sum() / given.sum(), list(self.parameters()))])

    def score(self, rows: Rows, generator: torch.Generator) -> Float[Tensor, " s"]:
        """Mean log density of hidden frames, predicted from the others."""
        if not bool(rows[4].any()):
            rows = _hidden(rows, HIDDEN, generator)
        t, x, seen, given, hidden = rows
        mean, precision = self.pseudo_observations(x, seen)
        a, residual = self._whitened(t)
        inner, centre, _ = _posterior(a, mean, precision * given[..., None])
        logs = torch.stack(
            [
                self.log_density(x, seen, _sampled(a, residual, inner, centre, generator))
                for _ in range(JUDGED)
            ]
        )
        each = torch.logsumexp(logs, 0) - math.log(JUDGED)
        return torch.where(hidden, each, 0.0).sum(-1) / hidden.sum(-1).clamp(min=1)

    # -- answers -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, data: Any) -> Any:
        """q(f) of a series (t, x), a `SeriesPosterior`; of a list of series, a list."""
        rows = self.rows_like_fitted(data)
        t, x, seen, given, _ = rows
        mean, precision = self.pseudo_observations(x, seen)
        basis, scaling = self._basis(), self._scaling()
        found = []
        for k in range(len(t)):
            here = given[k]
            a = basis.whiten(basis.embed(scaling.inputs(t[k][here])))
            weight, target = precision[k][here], mean[k][here]
            lam = torch.einsum("mt,tl,nt->lmn", a, weight, a)
            site = Site(
                basis.id, 0.5 * (lam + lam.mT), torch.einsum("mt,tl->lm", a, weight * target),
                a.new_zeros(self.latents), int(here.sum()), f"series {k}",
            )  # fmt: skip
            found.append(SeriesPosterior(basis, site, scaling, self))
        return found[0] if isinstance(data, tuple) else found

    def _basis(self) -> Basis:
        kernel = copy.deepcopy(self.prior).eval().requires_grad_(False)
        likelihood = gaussian_likelihood(self.latents, 2 * MIN_NOISE, self.where).requires_grad_(False)
        return Basis(kernel, embed(kernel, self.inducing_inputs).detach(), likelihood)

    def _scaling(self) -> Scaling:
        d, one = len(self.t_shift), torch.ones(self.latents, dtype=torch.float64, device=self.where)
        ones = torch.ones(d, dtype=torch.float64, device=self.where)
        return Scaling(ones, ones, self.t_shift, self.t_scale, torch.zeros_like(one), one)

    @torch.no_grad()
    def decode(self, f: Float[Tensor, "*b l"]) -> Float[Tensor, "*b p"]:
        """Mean of a frame given the latents, in the units of x."""
        out = self.decoder(f.to(_dtype(self.decoder))).to(torch.float64)
        return out.sigmoid() if self.likelihood == "bernoulli" else out * self.x_scale + self.x_shift

    def reconstruct(self, data: Any) -> Any:
        """Mean of every frame given its series, missing ones filled: [T, p], or a list of these."""
        pairs = [data] if isinstance(data, tuple) else list(data)
        posteriors = self.encode(pairs)
        found = [q.observed(torch.as_tensor(np.asarray(t))).mean for q, (t, _) in zip(posteriors, pairs)]
        return found[0] if isinstance(data, tuple) else found

    @torch.no_grad()
    def sample(self, n: int = 1, seed: int | None = None, t: Any = None) -> Float[Tensor, "n T p"]:
        """n new series at t [T, d] (None: where the first series of the training was)."""
        self._require_fit()
        grid = self.grid if t is None else _times(t, 0).to(self.where)
        m, zeros = len(self.inducing_inputs), grid.new_zeros
        nothing = Site("", zeros(self.latents, m, m), zeros(self.latents, m), zeros(self.latents), 0)
        prior = GPPosterior(self._basis(), nothing, self._scaling(), vector=False)
        return self.decode(prior.draw(check_count(n, 1), seed)(grid))

    @torch.no_grad()
    def log_likelihood(self, data: Any, samples: int = 1000, seed: int | None = 0) -> Float[Tensor, " s"]:
        """log p(x) of every series (nats), by importance sampling of whole functions from q: a lower bound in
        expectation. The conditional of f given u is the exact one, so the sum over frames is cubic in their number."""
        generator, rows = generator_for(seed, self.where), self.rows_like_fitted(data)
        t, x, seen, given, _ = rows
        found = []
        for k in range(len(t)):
            here = given[k]
            tk, xk, sk = t[k][here][None], x[k][here], seen[k][here]
            mean, precision = self.pseudo_observations(xk, sk)
            a, _ = self._whitened(tk)
            inner, centre, _ = _posterior(a, mean[None], precision[None])
            z = embed(self.prior, (tk[0] - self.t_shift) / self.t_scale)
            left = covariance(embedded_kernel(self.prior), z) - a[0].mT @ a[0]
            root = _root(left)
            logs = []
            for _ in range(check_count(samples, 1)):
                white = torch.randn(
                    self.latents, a.shape[1], 1, generator=generator, dtype=a.dtype, device=a.device
                )
                v = torch.linalg.solve_triangular(inner[0].mT, white, upper=True)[..., 0] + centre[0]
                noise = torch.randn(self.latents, len(z), generator=generator, dtype=a.dtype, device=a.device)
                f = (v @ a[0] + noise @ root.mT).mT
                weight = -0.5 * v.square().sum() + 0.5 * white.square().sum()
                weight = weight - inner[0].diagonal(dim1=-2, dim2=-1).log().sum()
                logs.append(self.log_density(xk, sk, f).sum() + weight)
            found.append(torch.logsumexp(torch.stack(logs), 0) - math.log(samples))
        return torch.stack(found)


class SeriesPosterior(GPPosterior):
    """q(f) of one series. latent(t): the functions; observed(t): the frames [T, p] at t, `Samples` whose rows are joint
    over t (of Bernoulli frames: their probabilities); draw(n): functions of t."""

    def __init__(self, basis: Basis, site: Site, scaling: Scaling, model: GPPriorVAE):
        super().__init__(basis, site, scaling, vector=False)
        self._model = model

    def _inputs(self, x: Any) -> Tensor:
        t = self.numbers(x, "t")
        return self.embedded(t[:, None] if t.ndim == 1 else t)

    def observed(self, x: Any) -> Samples:  # type: ignore[override]
        """Predictive of the frame at t."""
        with torch.no_grad():
            frames = self._model.decode(self.latent(x).rsample(DRAWS, seed=0))
            if self._model.likelihood == "bernoulli":
                return Samples(frames)
            return Samples(frames, self._model.log_noise.exp() * self._model.x_scale.square())


def _posterior(
    a: Float[Tensor, "s m T"], mean: Float[Tensor, "s T l"], precision: Float[Tensor, "s T l"]
) -> tuple[Float[Tensor, "s l m m"], Float[Tensor, "s l m"], Float[Tensor, " s"]]:
    """Cholesky factor of the precision of q(v), its mean, and KL(q(v) || N(0, I)) over all latents."""
    lam = torch.einsum("smt,stl,snt->slmn", a, precision, a)
    eye = torch.eye(lam.shape[-1], dtype=lam.dtype, device=lam.device)
    inner, _ = cholesky_unseen(eye + 0.5 * (lam + lam.mT), "I + site precision")
    half = solve_lower(inner, torch.einsum("smt,stl->slm", a, precision * mean)[..., None])
    centre = torch.linalg.solve_triangular(inner.mT, half, upper=True)[..., 0]
    trace = solve_lower(inner, eye.expand_as(inner)).square().sum((-2, -1))
    log_det = 2 * inner.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    divergence = 0.5 * (trace + centre.square().sum(-1) - len(eye) + log_det)
    return inner, centre, divergence.sum(-1)


def _sampled(
    a: Float[Tensor, "s m T"],
    residual: Float[Tensor, "s T"],
    inner: Float[Tensor, "s l m m"],
    centre: Float[Tensor, "s l m"],
    generator: torch.Generator,
) -> Float[Tensor, "s T l"]:
    """A sample of f at every frame, each from its own marginal."""
    mean = torch.einsum("slm,smt->stl", centre, a)
    spread = solve_lower(inner, a[:, None].expand(-1, inner.shape[1], -1, -1)).square().sum(-2).mT
    white = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return mean + (spread + residual[..., None]).clamp(min=1e-12).sqrt() * white


def _hidden(rows: Rows, share: float, generator: torch.Generator) -> Rows:
    """The same series with some frames to be predicted from the others: at least one, and not all."""
    t, x, seen, given, _ = rows
    order = torch.rand(given.shape, generator=generator, device=given.device).masked_fill(~given, 2.0)
    count = (share * given.sum(1)).round().clamp(min=1)
    count = torch.minimum(count, (given.sum(1) - 1).to(count))  # of a single frame, none
    hidden = (order.argsort(1).argsort(1) < count[:, None]) & given
    return t, x, seen, given & ~hidden, hidden


def _series(pair: Any, k: int) -> tuple[Tensor, Tensor]:
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise DataError(f"Series {k} must be a pair (t, x) of times and frames.")
    t, x = _times(pair[0], k), numbers(pair[1], f"The frames of series {k}", np.float64)
    if x.ndim == 1:
        x = x[:, None]
    if len(t) != len(x) or len(t) == 0:
        raise DataError(
            f"Series {k}: t has {len(t)} times and x {len(x)} frames; there must be one for each."
        )
    if bool(x.isinf().any()):
        raise DataError(
            f"Series {k}: frame {int(x.isinf().flatten(1).any(1).nonzero()[0])} holds infinite values."
        )
    return t, x


def _times(t: Any, k: int) -> Float[Tensor, "T d"]:
    t = numbers(t, f"The times of series {k}", np.float64)
    t = t[:, None] if t.ndim == 1 else t
    if t.ndim != 2 or not bool(t.isfinite().all()):
        raise DataError(f"Series {k}: t must be [T] or [T, d] finite numbers; it is {list(t.shape)}.")
    return t


def _kernel(kernel: str | Kernel | dict[str, Any], d: int) -> Kernel:
    if isinstance(kernel, dict):
        return kernel_from_spec(kernel)
    if isinstance(kernel, Kernel):
        return copy.deepcopy(kernel)
    if kernel == "matern":
        return MaternKernel(nu=2.5, ard_num_dims=d)
    if kernel == "rbf":
        return RBFKernel(ard_num_dims=d)
    if kernel == "deep":
        return DeepKernel(MLP(d, (32, 32), 4), MaternKernel(nu=2.5))
    raise OptionError(f"kernel={kernel!r} does not exist; choose 'matern', 'rbf', 'deep' or pass a kernel.")


def _spread(values: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """Standard deviations; 1 where nothing varies."""
    spread = values.std(0, correction=0)
    return torch.where(spread > 0, spread, torch.ones_like(spread))


def _root(covariance_: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """A root of a positive semi-definite matrix that may be singular."""
    values, vectors = torch.linalg.eigh(0.5 * (covariance_ + covariance_.mT))
    return vectors * values.clamp(min=0.0).sqrt()


def _dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype
