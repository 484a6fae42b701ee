"""A VAE whose prior is a mixture of Gaussians: the graphical model of clusters, seen through a decoder.

    c ~ Categorical(weights),   z | c ~ N(mean_c, diag(std_c^2)),   x | z as the decoder says
The cluster is summed out of the prior, so that nothing discrete is sampled and every estimator for Gaussian latents
serves; p(c | x) is read off afterwards. Sources: Dilokthanakul et al. (2016), deep unsupervised clustering with
Gaussian mixture VAEs; Johnson et al. (2016), structured VAEs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor, nn

from fspace.errors import OptionError
from fspace.inference.amortized import checks
from fspace.inference.amortized.proposals import DiagonalGaussian
from fspace.inference.amortized.training import Rows
from fspace.inference.amortized.vae import VAE
from fspace.predictive import check_count, generator_for

OBJECTIVES = ("iwae", "stl", "dreg")
ROWS, AXES = 5000, 20  # rows that k-means sees, and their principal axes
CHUNK = 10_000  # pairs of row and sample at once


class MixtureVAE(VAE):
    """Variational autoencoder of rows [n, d] or images [n, c, h, w] with a Gaussian-mixture prior.

    components: of the mixture; objective: "iwae" (with one sample the ELBO), "stl" or "dreg"; samples: of every row.
    The other options are those of `VAE`, with one layer of latents.
    """

    def __init__(
        self,
        latents: int = 16,
        components: int = 10,
        widths: Sequence[int] = (200,),
        network: str = "dense",
        likelihood: str = "bernoulli",
        objective: str = "iwae",
        samples: int = 1,
        device: str = "auto",
    ):
        if objective not in OBJECTIVES:
            raise OptionError(
                f"objective={objective!r} does not exist; choose one of {', '.join(OBJECTIVES)}."
            )
        checks.count(components, "components")
        super().__init__(latents, "gaussian", widths, network, likelihood, objective, samples, device=device)
        self.components = components

    def options(self) -> dict[str, Any]:
        return super().options() | {"latents": self.latents[0]}

    def build(self, shape: dict[str, Any]) -> None:
        super().build(shape)
        size = (self.components, self.latents[-1])
        self.mixture_logits = nn.Parameter(torch.zeros(self.components))
        self.mixture_means = nn.Parameter(torch.randn(size))
        self.mixture_log_stds = nn.Parameter(torch.full(size, math.log(0.5)))

    @torch.no_grad()
    def begin(self, rows: Rows) -> None:
        """Scales of the data; the components start where the encoder puts groups that k-means finds in the data.

        From a random start two groups often share a component for good."""
        super().begin(rows)
        read = self.observations.read(rows[0])
        seen = read[:ROWS].cpu().numpy()
        axes = (
            PCA(min(AXES, *seen.shape)).fit_transform(seen) if len(np.unique(seen, axis=0)) > 1 else 0 * seen
        )
        distinct = len(np.unique(axes, axis=0))
        groups = KMeans(min(self.components, distinct), n_init=5, random_state=0).fit_predict(axes)
        last = [layer for layer in self.encoder.modules() if isinstance(layer, nn.Linear)][-1]
        q, logits = self.propose(rows[0][:ROWS]), torch.tensor(np.bincount(groups))
        assert isinstance(q, DiagonalGaussian)
        means = q.mean
        spread, count = means.std(0, correction=0), self.latents[0]
        spread = torch.where(
            spread > 1e-6, spread, torch.ones_like(spread)
        )  # of rows that are all the same: 1
        last.weight[:count] /= spread[:, None]  # standardised means, and a posterior narrower than that
        last.bias[:count] = (last.bias[:count] - means.mean(0)) / spread
        last.bias[count:] -= 1.0
        means = (means - means.mean(0)) / spread
        for k in range(len(logits)):
            own = means[torch.as_tensor(groups == k, device=means.device)]
            self.mixture_means[k] = own.mean(0)
            self.mixture_log_stds[k] = (own.var(0, correction=0) + 0.1).sqrt().log()
        self.mixture_logits[: len(logits)] = logits.clamp(min=1).log()

    def log_components(self, z: Float[Tensor, "*b l"]) -> Float[Tensor, "*b c"]:
        """log p(z, c) of every component."""
        white = (z[..., None, :] - self.mixture_means) * (-self.mixture_log_stds).exp()
        each = -0.5 * (white.square() + math.log(2 * math.pi)) - self.mixture_log_stds
        return each.sum(-1) + self.mixture_logits.log_softmax(-1)

    def log_prior(self, z: Float[Tensor, "k b l"]) -> Float[Tensor, "k b"]:
        return self.log_components(z).logsumexp(-1)

    def draw_prior(self, n: int, generator: torch.Generator | None) -> Float[Tensor, "n l"]:
        c = torch.multinomial(self.mixture_logits.softmax(-1), n, replacement=True, generator=generator)
        white = torch.randn(n, self.latents[-1], generator=generator, device=self.where)
        return self.mixture_means[c] + self.mixture_log_stds[c].exp() * white

    @torch.no_grad()
    def clusters(self, data: Any, samples: int = 100, seed: int | None = 0) -> Float[Tensor, "n c"]:
        """p(c | x) of every row, by importance sampling of its latents: exact as the samples grow."""
        (x,) = self.rows_like_fitted(data)
        generator, samples = generator_for(seed, self.where), check_count(samples, 1)
        return torch.cat(
            [self._clusters(part, samples, generator) for part in x.split(max(1, CHUNK // samples))]
        )

    def _clusters(self, x: Tensor, samples: int, generator: torch.Generator) -> Float[Tensor, "b c"]:
        q = self.propose(x)
        z = q.sample(samples, generator)
        weights = (self.log_joint(x, z) - q.log_prob(z)).softmax(0)
        return (weights[..., None] * self.log_components(z).softmax(-1)).sum(0)
