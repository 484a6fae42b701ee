"""Topics over time: the shares of a corpus's topics are functions of time with a sparse Gaussian process prior.

    eta_k ~ GP(level_k, kernel),   x_d = eta(t_d) + N(0, spread_k),   words of d ~ softmax(x_d) @ topics
The encoder reads a document's words as pseudo-observations N(x~_d; x_d, 1 / precision_d) of its log-shares, so that
q(x_d | eta) is the prior's Gaussian times that, and x_d may lean on eta as the prior does: with an independent q(x_d)
the bands of eta would be too narrow where documents are short. eta itself has q(v) over whitened inducing values; what
v leaves open joins the spread of documents. The bound is the documents' importance-weighted one, given eta from q,
less KL(q(v) || p(v)). Topics are point estimates: the bands of shares do not hold what is unknown of them.
Sources: Blei and Lafferty (2006), dynamic topic models; Srivastava and Sutton (2017), autoencoding inference for topic
models; Jazbec et al. (2021) for the pseudo-observations.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from jaxtyping import Float, Int
from torch import Tensor, nn

from fspace.errors import DataError
from fspace.inference.amortized import bounds, checks
from fspace.inference.amortized.arrays import numbers
from fspace.inference.amortized.evaluate import LogLikelihood
from fspace.inference.amortized.evaluate import log_likelihood as by_importance
from fspace.inference.amortized.model import AmortizedModel
from fspace.inference.amortized.proposals import DiagonalGaussian
from fspace.inference.amortized.training import Rows, Step
from fspace.inference.basis import FIRST_JITTER, Basis, Site
from fspace.inference.gp import GPPosterior, Scaling
from fspace.inference.numerics import cholesky_unseen, solve_lower
from fspace.inference.optimise import gaussian_likelihood
from fspace.kernels.evaluate import covariance, diagonal
from fspace.kernels.extractors import MLP
from fspace.predictive import check_count, generator_for
from fspace.sampled import Samples

DOCUMENTS, SWEEPS, RESTARTS = 2000, 60, 4  # of the expectation-maximisation that training starts from
AROUND = 512  # documents over which the share of a topic at one time is averaged
PAIRS = 4_000_000  # words of documents and samples at once


class Eta(NamedTuple):
    """eta at the times of documents under q(v), and what x_d has around it. Shapes: all [n, k]."""

    mean: Float[Tensor, "n k"]
    variance: Float[Tensor, "n k"]
    spread: Float[Tensor, "n k"]


class TopicsOverTime(AmortizedModel):
    """Topic model with shares that are Gaussian processes of time.

    Data: a pair (counts, times): how often each word of the vocabulary is in each document [n, v], and when it is
    from [n]. topics: their number; inducing: number of inducing times; widths: hidden layers of the encoder; samples:
    of every document in the bound (with one, the documents' spread comes out too small).
    Log-likelihoods are of a document's words in their order: no multinomial coefficient.
    """

    def __init__(
        self,
        topics: int = 10,
        inducing: int = 15,
        widths: Sequence[int] = (64,),
        samples: int = 10,
        device: str = "auto",
    ):
        super().__init__()
        for name, value in (("topics", topics), ("inducing", inducing), ("samples", samples)):
            checks.count(value, name)
        self.topics, self.inducing, self.widths, self.samples = topics, inducing, list(widths), samples
        self.device = device

    # -- data and layers ---------------------------------------------------------------------------------------

    def prepare(self, data: Any) -> Rows:
        """Counts [n, v] and times [n], float64."""
        if not isinstance(data, tuple) or len(data) != 2:
            raise DataError("Data must be a pair (counts, times).")
        counts, t = (numbers(part, what, np.float64) for part, what in zip(data, ("Counts", "Times")))
        if counts.ndim != 2 or t.shape != counts.shape[:1] or len(t) == 0:
            raise DataError(
                f"Counts must be [n, v] and times [n], at least one document; they are {list(counts.shape)} and "
                f"{list(t.shape)}."
            )
        for words, wrong in (
            ("counts that are no whole numbers from 0 on", (counts < 0) | (counts != counts.round())),
            ("no word", (counts.sum(1) == 0)[:, None]),
            ("a time that is not finite", ~t.isfinite()[:, None]),
            ("counts that are not finite", ~counts.isfinite()),
        ):
            if bool(wrong.any()):
                raise DataError(f"Document {int(wrong.any(1).nonzero()[0])} has {words}.")
        return counts, t

    def shape_of(self, rows: Rows) -> dict[str, Any]:
        return {"words": rows[0].shape[1]}

    def build(self, shape: dict[str, Any]) -> None:
        k, m = self.topics, self.inducing
        number = lambda value: nn.Parameter(torch.as_tensor(value).double())  # noqa: E731
        self.encoder = MLP(shape["words"] + 1, self.widths, 2 * k)
        self.topic_logits = number(torch.zeros(k, shape["words"]))
        self.prior = ScaleKernel(MaternKernel(nu=2.5)).double()
        self.level, self.log_spread = number(torch.zeros(k)), number(torch.zeros(k))
        self.v_mean = number(torch.zeros(k, m))
        self.v_root = number(0.3 * torch.eye(m).expand(k, m, m).clone())
        self.register_buffer("inducing_inputs", torch.zeros(m, 1, dtype=torch.float64))
        self.register_buffer("t_shift", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("t_scale", torch.ones(1, dtype=torch.float64))

    @torch.no_grad()
    def begin(self, rows: Rows) -> None:
        """Scale of time; topics of a model without time, by expectation-maximisation."""
        counts, t = rows
        spread = t.std(correction=0)
        self.t_shift, self.t_scale = t.mean()[None], torch.where(spread > 0, spread, 1.0)[None]
        low, high = self._scaled(torch.stack([t.min(), t.max()]))[:, 0].tolist()
        grid = torch.linspace(low, high, self.inducing, dtype=t.dtype, device=t.device)
        self.inducing_inputs = grid[:, None] + (1e-3 * torch.arange(self.inducing, device=t.device))[:, None]
        generator = torch.Generator(t.device).manual_seed(0)
        some = torch.randperm(len(t), generator=generator, device=t.device)[:DOCUMENTS]
        topics, shares = _static(counts[some], self.topics, generator)
        self.topic_logits.copy_((topics + 0.01 / topics.shape[1]).log())
        level = (shares.mean(0) + 1e-3).log()
        self.level.copy_(level - level.mean())
        self._documents = len(t)

    def _scaled(self, t: Float[Tensor, " n"]) -> Float[Tensor, "n 1"]:
        return ((t - self.t_shift) / self.t_scale)[:, None]

    # -- the model ---------------------------------------------------------------------------------------------

    @property
    def word_probabilities(self) -> Float[Tensor, "k v"]:
        """Probabilities of the words in every topic."""
        return self.topic_logits.softmax(1)

    def top_words(self, n: int = 10) -> Int[Tensor, "k n"]:
        """Columns of the n most probable words of every topic."""
        return self.topic_logits.detach().topk(n, dim=1).indices

    def log_density(self, counts: Float[Tensor, "b v"], x: Float[Tensor, "*s b k"]) -> Float[Tensor, "*s b"]:
        """log p of the words given log-shares x, in their order."""
        return (counts * (x.softmax(-1) @ self.word_probabilities).log()).sum(-1)

    def pseudo_observations(self, counts: Float[Tensor, "b v"]) -> tuple[Tensor, Tensor]:
        """What the encoder reads off words: means and precisions of log-shares [b, k]."""
        told = torch.cat([counts, counts.sum(1, keepdim=True)], dim=1).log1p().float()
        mean, log_precision = self.encoder(told).double().chunk(2, dim=-1)
        return mean, log_precision.clamp(-12, 12).exp()

    def _root_of_v(self) -> Float[Tensor, "k m m"]:
        """Lower factor of the covariance of q(v), with a positive diagonal."""
        along = self.v_root.diagonal(dim1=-2, dim2=-1).abs() + 1e-6
        return self.v_root.tril(-1) + torch.diag_embed(along)

    def divergence(self) -> Float[Tensor, ""]:
        """KL(q(v) || p(v)), over all topics."""
        root = self._root_of_v()
        log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum()
        return 0.5 * (root.square().sum() + self.v_mean.square().sum() - self.v_mean.numel() - log_det)

    def _eta(self, t: Float[Tensor, " n"]) -> Eta:
        k = covariance(self.prior, self.inducing_inputs)
        factor, _ = cholesky_unseen(k, "kernel matrix of the inducing inputs", FIRST_JITTER)
        z = self._scaled(t)
        a = solve_lower(factor, covariance(self.prior, self.inducing_inputs, z))
        left = (diagonal(self.prior, z) - a.square().sum(0)).clamp(min=0.0)
        variance = (self._root_of_v().mT @ a).square().sum(-2).mT
        return Eta(self.level + (self.v_mean @ a).mT, variance, self.log_spread.exp() + left[:, None])

    def _bound(self, rows: Rows, generator: torch.Generator) -> Float[Tensor, " b"]:
        """Of every document: E[log mean p(words | x) p(x | eta) / q(x | eta)] over eta from q and `samples` x."""
        counts, t = rows
        (mean, variance, spread), (target, precision) = self._eta(t), self.pseudo_observations(counts)
        kind: dict[str, Any] = {"generator": generator, "dtype": mean.dtype, "device": mean.device}
        eta = mean + variance.sqrt() * torch.randn(mean.shape, **kind)
        total = 1.0 / spread + precision
        q = DiagonalGaussian((eta / spread + precision * target) / total, total.rsqrt())
        x = q.sample(self.samples, generator)
        weights = self.log_density(counts, x) + DiagonalGaussian(eta, spread.sqrt()).log_prob(x)
        return bounds.iwae(weights - q.log_prob(x))

    def step(self, rows: Rows, generator: torch.Generator) -> Step:
        bound = self._bound(rows, generator) - self.divergence() / self._documents
        return Step(bound.detach(), [(bound.sum() / rows[0].sum(), list(self.parameters()))])

    def score(self, rows: Rows, generator: torch.Generator) -> Float[Tensor, " b"]:
        """The bound of documents that q(v) has not seen."""
        return self._bound(rows, generator)

    # -- answers -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, data: Any) -> DiagonalGaussian:
        """q(x_d) of the log-shares of every document, mean and std [n, k]; its softmax are the shares."""
        return self._encoded(*self.rows_like_fitted(data))

    def _encoded(self, counts: Tensor, t: Tensor) -> DiagonalGaussian:
        """eta integrated out of both factors, the prior N(mean, spread + variance of eta) and the words'."""
        eta, (target, precision) = self._eta(t), self.pseudo_observations(counts)
        prior = 1.0 / (eta.spread + eta.variance)
        mean = (prior * eta.mean + precision * target) / (prior + precision)
        return DiagonalGaussian(mean, (prior + precision).rsqrt())

    @torch.no_grad()
    def proportions(self, data: Any, samples: int = 100, seed: int | None = 0) -> Float[Tensor, "n k"]:
        """Mean shares of the topics in every document."""
        q, generator = self.encode(data), generator_for(seed, self.where)
        return q.sample(check_count(samples, 1), generator).softmax(-1).mean(0)

    def reconstruct(self, data: Any) -> Float[Tensor, "n v"]:
        """Mean counts of every document of its length, given its encoding."""
        counts, _ = self.rows_like_fitted(data)
        return counts.sum(1, keepdim=True) * (self.proportions(data) @ self.word_probabilities.detach())

    @property
    def posterior_(self) -> GPPosterior:
        """q(eta), functions of time [n, 1] with an output for each topic: latent(t), draw(n)."""
        kernel = copy.deepcopy(self.prior).eval().requires_grad_(False)
        likelihood = gaussian_likelihood(self.topics, 1.0, self.where).requires_grad_(False)
        likelihood.noise = self.log_spread.detach().exp()[:, None].clamp(min=1e-6)
        basis = Basis(kernel, self.inducing_inputs, likelihood)
        root = self._root_of_v().detach()
        eye = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
        whole = torch.cholesky_solve(eye.expand_as(root), root)
        shift = (whole @ self.v_mean.detach()[..., None])[..., 0]
        site = Site(basis.id, whole - eye, shift, root.new_zeros(self.topics), 0)
        one = root.new_ones(1)
        scaling = Scaling(
            one, one, self.t_shift, self.t_scale, self.level.detach(), root.new_ones(self.topics)
        )
        return GPPosterior(basis, site, scaling, vector=False)

    @torch.no_grad()
    def shares(self, t: Any, samples: int = 200, seed: int | None = 0) -> Samples:
        """Shares of the topics among documents of times t [n]: [n, k], each sample from one draw of the functions.

        `.mean`, and bands by `.interval(level)`."""
        times = numbers(t, "Times", np.float64).to(self.where)
        if times.ndim != 1 or not bool(times.isfinite().all()):
            raise DataError(f"t must be finite numbers [n]; it is {list(times.shape)}.")
        eta = self.posterior_.draw(check_count(samples, 1), seed)(times[:, None])
        sobol = torch.quasirandom.SobolEngine(self.topics, scramble=True, seed=0)
        even = sobol.draw(AROUND, dtype=torch.float64).clamp(1e-9, 1 - 1e-9).to(eta)
        around = (0.5 * self.log_spread).exp() * torch.special.ndtri(even)
        return Samples(torch.stack([(draw[:, None] + around).softmax(-1).mean(1) for draw in eta]))

    def evaluate(self, data: Any, samples: int = 1000, seed: int | None = 0) -> LogLikelihood:
        """log p of every document by importance sampling, eta integrated out under q, with diagnostics."""
        counts, t = self.rows_like_fitted(data)
        joined = torch.cat([counts, t[:, None]], dim=1)
        chunk = max(1, PAIRS // counts.shape[1])
        return by_importance(
            _Seen(self), joined, check_count(samples, 1), chunk, generator_for(seed, self.where)
        )

    def log_likelihood(self, data: Any, samples: int = 1000, seed: int | None = 0) -> Float[Tensor, " n"]:
        """log p of every document's words given its time (nats): a lower bound in expectation."""
        return self.evaluate(data, samples, seed).log_likelihood

    def perplexity(self, data: Any, samples: int = 1000, seed: int | None = 0) -> float:
        """exp of minus the mean log-likelihood of a word."""
        logs = self.log_likelihood(data, samples, seed).sum() / self.rows_like_fitted(data)[0].sum()
        return math.exp(-logs.item())

    @torch.no_grad()
    def sample(
        self, n: int = 1, seed: int | None = None, t: Any = None, words: int = 100
    ) -> Float[Tensor, "n v"]:
        """Counts of n new documents of so many words, of times t [n] (None: spread evenly over those of training)."""
        generator, n = generator_for(seed, self.where), check_count(n, 1)
        ends = self.inducing_inputs[[0, -1], 0] * self.t_scale + self.t_shift
        low, high = ends.tolist()
        times = torch.linspace(low, high, n, dtype=ends.dtype) if t is None else torch.as_tensor(t)
        times = times.to(ends)
        if times.shape != (n,):
            raise DataError(f"t must be [{n}]; it is {list(times.shape)}.")
        eta = self.posterior_.draw(1, seed)(times[:, None])[0]
        white = torch.randn(eta.shape, generator=generator, dtype=eta.dtype, device=eta.device)
        chances = (eta + (0.5 * self.log_spread).exp() * white).softmax(-1) @ self.word_probabilities
        picked = torch.multinomial(chances, check_count(words, 1), replacement=True, generator=generator)
        return torch.zeros_like(chances).scatter_add(1, picked, torch.ones_like(picked, dtype=chances.dtype))


class _Seen:
    """The model as importance sampling asks it, of rows of counts and, last, the time."""

    def __init__(self, model: TopicsOverTime):
        self.model = model

    def encode(self, x: Float[Tensor, "b w"]) -> DiagonalGaussian:
        """q(log-shares)."""
        return self.model._encoded(x[:, :-1], x[:, -1])

    def log_joint(self, x: Float[Tensor, "b w"], z: Float[Tensor, "s b k"]) -> Float[Tensor, "s b"]:
        """log p(words | z) + log p(z | t), eta integrated out."""
        eta = self.model._eta(x[:, -1])
        prior = DiagonalGaussian(eta.mean, (eta.spread + eta.variance).sqrt())
        return self.model.log_density(x[:, :-1], z) + prior.log_prob(z)


def _static(
    counts: Float[Tensor, "n v"], topics: int, generator: torch.Generator
) -> tuple[Float[Tensor, "k v"], Float[Tensor, "n k"]]:
    """Topics and shares of documents by expectation-maximisation, the best of a few starts. Source: Hofmann (1999)."""
    best, found = -math.inf, None
    for _ in range(RESTARTS):
        kind: dict[str, Any] = {"generator": generator, "dtype": counts.dtype, "device": counts.device}
        words = (counts.mean(0) + 1e-3) * (0.5 + torch.rand(topics, counts.shape[1], **kind))
        words, shares = words / words.sum(1, keepdim=True), counts.new_full((len(counts), topics), 1 / topics)
        for _ in range(SWEEPS):
            ratio = counts / (shares @ words).clamp(min=1e-12)
            told = shares * (ratio @ words.mT) + 0.1  # a little of every topic in every document
            words = words * (shares.mT @ ratio) + 1e-6
            words, shares = words / words.sum(1, keepdim=True), told / told.sum(1, keepdim=True)
        worth = (counts * (shares @ words).clamp(min=1e-12).log()).sum().item()
        if worth > best:
            best, found = worth, (words, shares)
    assert found is not None
    return found
