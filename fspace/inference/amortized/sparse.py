"""Sparse distributions over categories (sparsemax, entmax): few enough have any mass that the bound is an exact sum.

Nothing is sampled or relaxed. Needs the package entmax, extra `amortized`.
Source: Correia, Niculae, Aziz and Martins (2020), efficient marginalization of discrete latents via sparsity.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import DataError, OptionError
from fspace.inference.amortized import checks


def sparse_probabilities(logits: Float[Tensor, "*b c"], alpha: float = 1.5) -> Float[Tensor, "*b c"]:
    """alpha-entmax of the last axis: 1 is softmax, 2 sparsemax; above 1 unlikely categories get exactly 0.

    Raises OptionError for alpha < 1 or without the package entmax, DataError for logits that are not finite.
    Source: Peters, Niculae and Martins (2019).
    """
    if not 1 <= alpha < float("inf"):
        raise OptionError(f"alpha={alpha} must be a finite number, at least 1: 1 is softmax, 2 sparsemax.")
    checks.logits(logits, logits.isfinite(), "they are finite")
    try:
        import entmax
    except ImportError as error:
        raise OptionError("sparse_probabilities needs entmax: pip install 'fspace[amortized]'.") from error
    if alpha == 1:
        return logits.softmax(-1)
    if alpha == 1.5:
        return entmax.entmax15(logits, dim=-1)
    if alpha == 2:
        return entmax.sparsemax(logits, dim=-1)
    return entmax.entmax_bisect(logits, alpha, dim=-1)


def sparse_elbo(
    log_joint: Callable[[Tensor, Tensor], Tensor], probabilities: Float[Tensor, "b c"]
) -> Float[Tensor, " b"]:
    """Exact ELBO, sum_z q(z) [log p(x, z) - log q(z)] over the categories with mass; its gradient is exact too.

    log_joint(rows [S], categories [S]) -> [S] is called once, with every pair that has mass. Raises DataError for rows
    that do not sum to one. Source: Correia et al. (2020).
    """
    if probabilities.ndim != 2:
        raise DataError(
            f"probabilities must be [data, categories]; they have shape {tuple(probabilities.shape)}."
        )
    fine = (probabilities >= 0).all(-1) & ((probabilities.sum(-1) - 1).abs() < 1e-3)
    checks.support(fine, probabilities, "probabilities", "a row is not negative and sums to one")
    rows, categories = (probabilities.detach() > 0).nonzero(as_tuple=True)
    joint = checks.asked("log_joint", log_joint, rows, categories)
    checks.of_shape(joint, tuple(rows.shape), "The value of log_joint")
    if bool(joint.isnan().any()):
        s = int(joint.isnan().nonzero()[0])
        raise DataError(f"log_joint of datum {int(rows[s])} and category {int(categories[s])} is NaN.")
    q = probabilities[rows, categories]
    return torch.zeros_like(probabilities[:, 0]).index_add(0, rows, q * (joint - q.log()))
