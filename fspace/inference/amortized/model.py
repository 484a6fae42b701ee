"""What every amortised model answers: fit, encode, reconstruct, sample, log_likelihood, save; and how one is saved."""

from __future__ import annotations

import inspect
import json
from abc import abstractmethod
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fspace import __version__
from fspace.archive import read_archive, write_archive
from fspace.errors import DataError, DeviceError, ModelFileError, NotFittedError
from fspace.inference.amortized.training import History, Rows, Trainable, plan_of, train
from fspace.inference.numerics import pick_device, seeded

FORMAT = 1
MODELS = {  # what a file may name: nothing else is ever made from one
    "CausalVAE": "fspace.inference.amortized.causal",
    "GPPriorVAE": "fspace.inference.amortized.gp_prior",
    "DRAW": "fspace.inference.amortized.draw",
    "SemiSupervisedVAE": "fspace.inference.amortized.semi_supervised",
    "VAE": "fspace.inference.amortized.vae",
    "VAEKernelGP": "fspace.inference.amortized.vae_kernel",
    "VRNN": "fspace.inference.amortized.vrnn",
    "GPStateSpace": "fspace.inference.amortized.gp_state_space",
    "MixtureVAE": "fspace.inference.amortized.mixture_vae",
    "SwitchingLinear": "fspace.inference.amortized.switching",
    "TopicsOverTime": "fspace.inference.amortized.topics",
}


class AmortizedModel(Trainable):
    """A model with latents, and the network that infers them.

    A subclass keeps the options of its constructor as attributes of the same names (numbers, text, lists of these),
    makes its layers in `build`, which is told what the data look like, and says in `prepare` what rows are.
    """

    device: str = "auto"

    @abstractmethod
    def prepare(self, data: Any) -> Rows:
        """Data as tensors of one length. Raises DataError for what the model cannot take."""

    @abstractmethod
    def shape_of(self, rows: Rows) -> dict[str, Any]:
        """What `build` must know of the data, as JSON."""

    @abstractmethod
    def build(self, shape: dict[str, Any]) -> None:
        """Make the layers."""

    @abstractmethod
    def encode(self, data: Any) -> Any:
        """The approximate posterior of the latents of every row."""

    @abstractmethod
    def reconstruct(self, data: Any) -> Tensor:
        """The mean of every row given its encoding."""

    @abstractmethod
    def sample(self, n: int = 1, seed: int | None = None) -> Tensor:
        """n new rows."""

    @abstractmethod
    def log_likelihood(self, data: Any, samples: int = 5000, seed: int | None = 0) -> Float[Tensor, " n"]:
        """An estimate of log p of every row (nats), a lower bound in expectation."""

    def fit(self, data: Any, **plan: Any) -> Any:
        """Train on data; keywords as in `training.Plan` (epochs, batch_size, learning_rate, patience, held_out, seed,
        progress, checkpoint). history_ says how it went. Raises DataError, OptionError, NumericalError."""
        how = plan_of(plan)
        rows = self.prepare(data)
        with seeded(how.seed):
            self._make(self.shape_of(rows))
        rows = tuple(r.to(self.where) for r in rows)
        self.history_ = train(self, rows, how)
        return self

    def _make(self, shape: dict[str, Any]) -> None:
        for name in list(self._modules):
            del self._modules[name]
        for name in list(self._parameters):
            del self._parameters[name]
        self.shape_ = shape
        self.build(shape)
        self.to(pick_device(self.device))

    @property
    def where(self) -> torch.device:
        """The device the model is on. Raises NotFittedError."""
        self._require_fit()
        return next(self.parameters()).device

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        if name == "where":  # here Python asks again after NotFittedError, which is an AttributeError too
            self._require_fit()
        return super().__getattr__(name)

    def _require_fit(self) -> None:
        if not hasattr(self, "shape_"):
            raise NotFittedError(f"This {type(self).__name__} is not fitted yet: call `fit` first.")

    def rows_like_fitted(self, data: Any) -> Rows:
        """Data as rows of the kind the model was fitted on. Raises NotFittedError, DataError."""
        self._require_fit()
        rows = self.prepare(data)
        shape = self.shape_of(rows)
        if shape != self.shape_:
            raise DataError(f"The data are of {shape}; the model was fitted on {self.shape_}.")
        return tuple(r.to(self.where) for r in rows)

    def options(self) -> dict[str, Any]:
        """The options of the constructor."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def save(self, path: str | Path) -> Path:
        """Write the model, in full or not at all: safetensors and JSON. Raises NotFittedError, ModelFileError."""
        if not hasattr(self, "shape_"):
            raise NotFittedError(f"This {type(self).__name__} is not fitted yet: there is nothing to save.")
        path = Path(path)
        header = {
            "format": FORMAT,
            "fspace": __version__,
            "model": type(self).__name__,
            "options": self.options(),
            "shape": self.shape_,
            "history": asdict(self.history_) if hasattr(self, "history_") else None,
        }
        write_archive(path, "amortized", json.dumps(header), self.state_dict(), repr(str(path)))
        return path


def load(path: str | Path, device: str = "auto") -> AmortizedModel:
    """Read a saved amortised model. Raises ModelFileError for files that are missing, damaged or foreign."""
    foreign = f"{path} is no amortised model of fspace, or damaged"
    header, state = read_archive(path, "amortized", foreign)
    try:
        if header["format"] != FORMAT:
            raise ModelFileError(f"{path} has format {header['format']}; this version reads {FORMAT}.")
        kind = getattr(import_module(MODELS[header["model"]]), header["model"])
        model = kind(**header["options"] | {"device": device})
        model._make(header["shape"])
        model.load_state_dict(state)
        if header["history"] is not None:
            model.history_ = History(**header["history"])
    except DeviceError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return model.eval()
