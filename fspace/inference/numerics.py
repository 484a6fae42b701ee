"""Precision, jitter and device policy: the one place where fspace repairs a factorisation.

Everything that is factorised is float64. Jitter is relative to the mean of the diagonal, starts at nothing and grows
tenfold up to `MAX_JITTER`; what was added is returned, so that a fitted object can show it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from fspace.errors import DeviceError, NumericalError, OptionError

_SEEDING = threading.Lock()
MIN_JITTER = 1e-10
MAX_JITTER = 1e-4


def host_may_look(device: torch.device) -> bool:
    """Whether a number can be asked for in passing. On a GPU the host would wait until all steps before it are done."""
    return device.type == "cpu"


def cholesky(
    matrix: Float[Tensor, "*batch n n"], what: str, first_jitter: float = 0.0
) -> tuple[Float[Tensor, "*batch n n"], float]:
    """Lower Cholesky factor, and the jitter (relative to the mean diagonal) that it took.

    Shapes: [..., n, n] -> [..., n, n]. Raises NumericalError, naming `what`, with size, smallest eigenvalue and
    condition number, when no jitter up to 1e-4 of the mean diagonal is enough.
    """
    unit = _unit(matrix)
    finite = torch.isfinite(matrix).all()
    for jitter in _jitters(first_jitter):
        factor, info = torch.linalg.cholesky_ex(matrix + jitter * unit if jitter else matrix)
        if finite & ~info.any():  # one look at the device for both
            return factor, jitter
        if not finite:
            raise NumericalError(
                f"{what} ({_size(matrix)}) holds NaN or infinite values. A kernel parameter or an input has "
                "overflowed: scale the inputs, or lower the learning rate."
            )
    eigenvalues = torch.linalg.eigvalsh(matrix.detach())
    low, high = eigenvalues[..., 0].min().item(), eigenvalues[..., -1].max().item()
    raise NumericalError(
        f"{what} ({_size(matrix)}) is not positive definite, even with jitter {MAX_JITTER:g} of its mean diagonal: "
        f"smallest eigenvalue {low:.3g}, largest {high:.3g}. Is the kernel a valid covariance? Remove "
        "duplicated rows, raise the noise, or use fewer inducing inputs."
    )


def cholesky_unseen(
    matrix: Float[Tensor, "*batch n n"], what: str, first_jitter: float = 0.0
) -> tuple[Float[Tensor, "*batch n n"], float | Tensor]:
    """`cholesky` for the steps of a training loop: on a GPU the host does not wait to hear how it went.

    There all jitters are tried at once and the device takes the first that is enough. Where none is, or the matrix is
    not finite, the factor is NaN and so is the loss, at which the loop looks once in many steps. For small matrices.
    """
    if host_may_look(matrix.device):
        return cholesky(matrix, what, first_jitter)
    unit = _unit(matrix)
    with torch.no_grad():
        jitters = _jitters(first_jitter)
        tried = torch.stack([matrix + jitter * unit for jitter in jitters])
        worked = (torch.linalg.cholesky_ex(tried).info == 0).reshape(len(jitters), -1).all(1)
        worked &= torch.isfinite(matrix).all()
        jitter = torch.full_like(unit.sum(), torch.nan)
        for enough, value in zip(reversed(worked.unbind()), reversed(jitters)):
            jitter = torch.where(enough, value, jitter)
    return torch.linalg.cholesky_ex(matrix + jitter * unit).L, jitter


def _unit(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """What jitter is a multiple of: the mean of the diagonal on the diagonal."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].detach() * identity


def _jitters(first: float) -> list[float]:
    """Those that are tried, in order."""
    found = [first]
    while (following := max(MIN_JITTER, found[-1] * 10.0)) <= MAX_JITTER * 1.001:
        found.append(following)
    return found


def _size(matrix: Tensor) -> str:
    return " x ".join(str(s) for s in matrix.shape)


def solve_lower(factor: Float[Tensor, "*b n n"], right: Float[Tensor, "*c n k"]) -> Float[Tensor, "*d n k"]:
    """Solve L z = right for a lower triangular L."""
    return torch.linalg.solve_triangular(factor, right, upper=False)


def pick_device(device: str | torch.device) -> torch.device:
    """The torch device for "auto", "cpu", "cuda", "cuda:1", ...; DeviceError when it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(f"device={device!r} is not a torch device; use 'auto', 'cpu' or 'cuda'.") from error
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= count:
            raise DeviceError(
                f"device={device!r} was asked for, but torch sees {count} CUDA devices; use 'auto' or 'cpu'."
            )
    elif chosen.type != "cpu":
        try:
            torch.zeros(
                1, dtype=torch.float64, device=chosen
            ).item()  # "meta" can make them, but they hold nothing
        except Exception as error:
            raise DeviceError(
                f"device={device!r} cannot hold float64 numbers here ({error}); use 'auto' or 'cpu'."
            ) from error
    return chosen


def pick_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """float32 or float64, for the networks; GP algebra is float64 whatever is asked here."""
    known = {"float32": torch.float32, "float64": torch.float64}
    if isinstance(dtype, str) and dtype in known:
        return known[dtype]
    if isinstance(dtype, torch.dtype) and dtype in known.values():
        return dtype
    raise OptionError(
        f"dtype={dtype!r}: networks run in 'float32' or 'float64' (GP algebra is always float64)."
    )


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """TF32 off for matrix products inside the block, as it was before after it."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's global generator starts at `seed` inside and goes on as before after; one thread at a time, so that
    networks made in threads are those made one after the other."""
    with _SEEDING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
