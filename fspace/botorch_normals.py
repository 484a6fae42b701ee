"""What BoTorch posteriors share that are no Gaussians and yet are drawn from normals, the first of which picks."""

from __future__ import annotations

import torch
from botorch.posteriors import Posterior
from botorch.sampling.get_sampler import GetSampler
from botorch.sampling.normal import IIDNormalSampler, NormalMCSampler, SobolQMCNormalSampler
from torch import Tensor
from torch.quasirandom import SobolEngine

import fspace.botorch_refusals  # noqa: F401  (they are no Gaussians)


class FromNormals(Posterior):  # type: ignore[misc]
    """BoTorch posterior whose joint samples are made of base samples [..., k] of normals, one set for all batches."""

    @property
    def batch_range(self) -> tuple[int, int]:
        """Batch dimensions of a base sample, which share one set of normals."""
        return (0, -1)

    def rsample(self, sample_shape: torch.Size | None = None) -> Tensor:
        """Joint samples [*sample_shape, ..., q, m]."""
        sample_shape = torch.Size([1]) if sample_shape is None else sample_shape
        shape = sample_shape + self.base_sample_shape
        return self.rsample_from_base_samples(
            sample_shape, torch.randn(shape, dtype=self.dtype, device=self.device)
        )


@GetSampler.register(FromNormals)
def _sampler(posterior: FromNormals, sample_shape: torch.Size, *, seed: int | None = None) -> NormalMCSampler:
    few = posterior.base_sample_shape[-1] <= SobolEngine.MAXDIM
    return (SobolQMCNormalSampler if few else IIDNormalSampler)(sample_shape, seed=seed)
