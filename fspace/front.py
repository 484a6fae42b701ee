"""What every estimator shares, whatever it fits: encoded rows, prediction in parts, saving, progress."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from torch import Tensor

from fspace.data import TableEncoder, check_target, target_names
from fspace.errors import DataError, NotFittedError, OptionError
from fspace.inference.source import Inputs
from fspace.interrupts import Interrupts, interrupts
from fspace.posterior import FunctionPosterior, Predictive
from fspace.predictive_base import as_tensor
from fspace.progress import progress
from fspace.torch_data import unpacked

CHUNK_VALUES = 2**20  # input values predicted at a time, so that memory does not grow with the rows
ROWS = 8192  # whose class probabilities are computed at once


class FunctionEstimator(BaseEstimator):
    """An estimator whose fit ends in `posterior_`, a posterior over functions of the encoded rows."""

    categories: Any
    missing: Any
    device: Any
    dtype: Any
    seed: Any
    progress: Any
    posterior_: FunctionPosterior
    history_: list[dict[str, Any]]
    _interrupted_in: str | None

    def _check_shape(self, x: Any) -> None:
        """Raises a FspaceError for encoded rows [n, d], [n, t, d] or [n, c, h, w] that are not read."""

    def _adopt(self, encoder: TableEncoder) -> None:
        """The attributes of scikit-learn that tell of the columns."""
        self.encoder_ = encoder
        self.n_features_in_ = encoder.n_features_in_
        if hasattr(encoder, "feature_names_in_"):
            self.feature_names_in_ = encoder.feature_names_in_

    def _encoded(self, X: Any) -> tuple[TableEncoder, Any]:
        """The encoder that was fitted to X, and its rows (images and sequences as they came, perhaps from disk)."""
        encoder = TableEncoder(self.categories, self.missing, owner=type(self).__name__)
        x = encoder.fit_transform(X)
        if x.ndim > 4:
            raise DataError(
                f"X has shape {list(x.shape)}; this estimator reads tables [n, columns], sequences [n, t, d] and "
                "images [n, c, h, w]."
            )
        self._check_shape(x)
        return encoder, x if x.ndim > 2 else np.asarray(x, dtype=np.float64)

    @contextmanager
    def _recording(self) -> Iterator[Callable[..., None]]:
        """What training calls at every step. Afterwards `interrupted_` says whether Ctrl-C ended it early."""
        self.history_ = []
        self._interrupted_in = None
        with interrupts() as held, progress("fitting", self.progress == "auto") as tell:
            yield self._recorder(tell, held)
        if held.waiting:  # it came when all training was done
            self._interrupted_in = self._interrupted_in or "the last steps"
        self.interrupted_ = self._interrupted_in is not None

    def _recorder(self, tell: Callable[..., None], held: Interrupts) -> Callable[..., None]:
        """What training calls at every step: keeps the history, lets Ctrl-C through, moves the progress bar."""

        def record(**entry: Any) -> None:
            tell(**entry)
            if entry.get("interrupted") and self._interrupted_in is None:
                self._interrupted_in = str(entry.get("stage", "the model"))
            if "held_out" in entry:  # a score; a history holds losses
                entry["heldout"] = -entry.pop("held_out")
            self.history_.append({"step": len(self.history_), **entry})
            held.check()

        return record

    def _parts(self, X: Any) -> Iterator[Tensor]:
        """Encoded rows, some at a time."""
        if not hasattr(self, "posterior_"):
            raise NotFittedError(f"This {type(self).__name__} instance is not fitted yet. Call 'fit' first.")
        for part in self.encoder_.batches(unpacked(X, ())[0], CHUNK_VALUES):
            yield torch.tensor(part, dtype=torch.float64)

    def predictive(self, X: Any) -> Predictive:
        """Distribution of y at X [n, d]: mean, variance, log_prob, quantile, interval, samples."""
        x = torch.cat(list(self._parts(X)))
        return self.posterior_.observed(x)

    def save(self, path: str | Path) -> Path:
        """Write the fitted model to one file (safetensors and JSON; nothing in it can run code)."""
        from fspace.saving import save

        return save(self, path)


class RegressionFront(RegressorMixin):
    """Predictions of a regressor from its posterior."""

    posterior_: FunctionPosterior
    predictive: Callable[[Any], Predictive]
    _parts: Callable[[Any], Iterator[Tensor]]
    _encoded: Callable[[Any], tuple[TableEncoder, Any]]

    def _read(self, X: Any, y: Any) -> tuple[TableEncoder, Any, np.ndarray, list[str]]:
        """Encoder and encoded rows, the target [n] or [n, t], and its names. Raises a FspaceError, for one row too."""
        X, y = unpacked(X, y)
        encoder, x = self._encoded(X)
        target = check_target(y, len(x))
        if len(x) < 2:
            raise DataError("X has 1 sample (n_samples=1); a fit needs at least 2 rows.")
        return encoder, x, target, target_names(y, target)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    @torch.no_grad()
    def predict(self, X: Any, return_std: bool = False, return_cov: bool = False) -> Any:
        """Mean of y [n] or [n, t]; with return_std also its standard deviation, with return_cov the joint covariance of
        the points, [n, n] or, of each output, [t, n, n] (over points and outputs: `predictive(X).joint_covariance`).

        Both include the noise. Rows are taken some at a time, so millions fit in memory (not with return_cov).
        Raises OptionError when both are asked for.
        """
        if return_std and return_cov:
            raise OptionError("predict gives either return_std or return_cov, not both.")
        if return_cov:
            joint: Any = self.predictive(X)
            return joint.mean.cpu().numpy(), joint.covariance.cpu().numpy()
        means, deviations = [], []
        for x in self._parts(X):
            predictive = self.posterior_.observed(x)
            means.append(predictive.mean.cpu().numpy())
            if return_std:
                deviations.append(predictive.stddev.cpu().numpy())
        mean = np.concatenate(means)
        return (mean, np.concatenate(deviations)) if return_std else mean

    def predict_cdf(self, X: Any, thresholds: Any) -> np.ndarray:
        """P(y <= threshold) at every row, for a threshold or one a row."""
        predictive: Any = self.predictive(X)
        y = as_tensor(thresholds, predictive.mean.device, "thresholds").to(torch.float64)
        try:
            y = y.expand_as(predictive.mean)
        except RuntimeError as error:
            raise DataError(
                f"thresholds has shape {tuple(y.shape)}, but the prediction has shape {tuple(predictive.mean.shape)}."
            ) from error
        return predictive.cdf(y).cpu().numpy()

    @torch.no_grad()
    def sample_y(self, X: Any, n_samples: int = 1, random_state: int | None = 0) -> np.ndarray:
        """Joint samples of y: [n, n_samples], or [n, t, n_samples]."""
        return np.moveaxis(self.predictive(X).rsample(n_samples, random_state).cpu().numpy(), 0, -1)


class ClassificationFront(ClassifierMixin):
    """Predictions of a classifier from its posterior."""

    posterior_: FunctionPosterior
    classes_: np.ndarray
    _parts: Callable[[Any], Iterator[Tensor]]

    @torch.no_grad()
    def predict_proba(self, X: Any) -> np.ndarray:
        """Class probabilities [n, classes], in the order of classes_. Rows are taken some at a time."""
        parts = []
        for x in self._parts(X):
            for rows in x.split(ROWS):
                predictive: Any = self.posterior_.observed(rows)
                parts.append(predictive.probs.cpu().numpy())
        return np.concatenate(parts)

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Logarithms of `predict_proba`."""
        return np.log(self.predict_proba(X))

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of every row."""
        best = self.predict_proba(X).argmax(axis=1)
        return self.classes_[best]


def column_scales(y: Float[np.ndarray, "n t"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and standard deviation [t] of the columns, 1 of those that are constant (to rounding), and which are."""
    shift = y.mean(axis=0)
    spread = (y - shift).std(axis=0)
    constant = spread <= 1e-13 * np.maximum(np.abs(shift), 1e-300)
    return shift, np.where(constant, 1.0, spread), constant


def slope_relevance(posterior: FunctionPosterior, x: Inputs) -> np.ndarray:
    """Share of each encoded column (or channel) in the function: root mean square of the mean's slope times the
    column's spread. All NaN, with a warning, where a kernel has a slope that is not finite: predictions may be fine."""
    pick = x[:: max(1, len(x) // 200)].clone().requires_grad_()
    mean = posterior.latent(pick).mean.sum()
    slope = (
        torch.autograd.grad(mean, pick)[0] if mean.requires_grad else torch.zeros_like(pick[:1])
    )  # a constant kernel
    slope = torch.where(pick.isnan(), 0.0, slope)  # after the end of a short sequence there is no input
    channel = 1 if x.ndim == 4 else x.ndim - 1
    slopes = (
        (slope * _spread(x if isinstance(x, Tensor) else pick.detach())).movedim(channel, -1).flatten(0, -2)
    )
    strange = (~slopes.isfinite()).any(dim=0)
    if strange.any():
        warnings.warn(
            f"The kernel's slope in its inputs is not finite (encoded columns {strange.nonzero()[:, 0].tolist()}), so "
            "relevance_ is NaN. Mend the kernel's gradient, or use relevance(model, X, y, method='permutation') from "
            "fspace.interpret.",
            stacklevel=4,
        )
        return np.full(slopes.shape[1], np.nan)
    share = (slopes / slopes.abs().max().clamp(min=1e-300)).square().mean(dim=0).sqrt()
    total = share.sum()
    share = share / total if total > 0 else torch.full_like(share, 1.0 / len(share))
    return share.cpu().numpy()


def _spread(rows: Tensor) -> Tensor:
    """Standard deviation over the rows; NaN after the end of a short sequence is no value."""
    seen = ~rows.isnan()
    count = seen.sum(dim=0)
    mean = torch.where(seen, rows, 0.0).sum(dim=0) / count.clamp(min=1)
    square = torch.where(seen, rows - mean, 0.0).square().sum(dim=0)
    return (square / (count - 1).clamp(min=1)).sqrt()
