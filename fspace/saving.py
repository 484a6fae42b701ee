"""Saved models: one zip file of safetensors and JSON. Nothing that is loaded is ever unpickled."""

from __future__ import annotations

import copy
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors

from fspace import __version__
from fspace.data import TableEncoder
from fspace.errors import ModelFileError, NotFittedError
from fspace.estimators import GPRegressor
from fspace.inference.basis import Basis, Site
from fspace.inference.gp import GPPosterior, Scaling
from fspace.inference.noise import NoiseFunction
from fspace.inference.numerics import pick_device
from fspace.inference.optimise import gaussian_likelihood
from fspace.kernels.describe import kernel_from_spec, kernel_to_spec
from fspace.posterior import MixturePosterior

FORMAT = 1
SCALING = ("unit", "power", "shift", "scale", "y_shift", "y_scale")


def save(model: GPRegressor, path: str | Path) -> Path:
    """Write a fitted estimator to `path`, in full or not at all. Raises NotFittedError, ModelFileError.

    The options are written with it, but for a kernel or likelihood object: that one is "auto" in a later `fit`.
    """
    if not hasattr(model, "posterior_"):
        raise NotFittedError(
            "This GPRegressor instance is not fitted yet: there is nothing to save. Call 'fit' first."
        )
    path = Path(path)
    posterior = model.posterior_
    members = posterior.members if isinstance(posterior, MixturePosterior) else [posterior]
    tensors: dict[str, torch.Tensor] = {}
    specs = []
    for i, member in enumerate(members):
        assert isinstance(member, GPPosterior)
        specs.append(_describe(member, f"{i}.", tensors))
    options = {
        k: v if not isinstance(v, torch.nn.Module) else "auto"
        for k, v in model.get_params(deep=False).items()
    }
    header = {
        "format": FORMAT,
        "fspace": __version__,
        "estimator": "GPRegressor",
        "options": options,
        "encoder": model.encoder_.state(),
        "members": specs,
        "weights": posterior.weights.tolist() if isinstance(posterior, MixturePosterior) else None,
        "log_evidence": model.log_evidence_,
        "history": model.history_,
        "choice": model.choice_,
        "relevance": model.relevance_.tolist(),
        "target_names": model.target_names_,
        "interrupted": model.interrupted_,
    }
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    unfinished = path.with_name(path.name + ".part")
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("model.json", json.dumps(header, default=_plain))
        archive.writestr("model.safetensors", write_tensors(tensors))
    os.replace(unfinished, path)
    return path


def _plain(value: Any) -> Any:
    """Options as JSON: numpy's numbers and arrays, torch's devices and types."""
    return value.tolist() if hasattr(value, "tolist") else str(value).removeprefix("torch.")


def _describe(member: GPPosterior, prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    basis, site = member.basis, member.site
    tensors |= {f"{prefix}kernel.{k}": v for k, v in basis.kernel.state_dict().items()}
    tensors |= {f"{prefix}likelihood.{k}": v for k, v in basis.likelihood.state_dict().items()}
    if basis.noise_function is not None:
        tensors |= {f"{prefix}noise_function.{k}": v for k, v in basis.noise_function.state_dict().items()}
    tensors |= {f"{prefix}scaling.{k}": getattr(member.scaling, k) for k in SCALING}
    tensors[f"{prefix}inducing_inputs"] = basis.inducing_inputs
    tensors |= {f"{prefix}site.{k}": getattr(site, k) for k in ("precision", "shift", "log_scale")}
    return {
        "kernel": kernel_to_spec(basis.kernel),
        "vector": member.vector,
        "outputs": member.num_outputs,
        "basis_id": basis.id,
        "count": site.count,
        "site_id": site.site_id,
    }


def load(
    path: str | Path, device: str = "auto", modules: Mapping[str, torch.nn.Module] | None = None
) -> GPRegressor:
    """Read a saved estimator; it predicts as it did, and needs no training data.

    modules: {"extractor": module} for a feature extractor that is not one of fspace's or torch's standard layers;
    it stays as it is, copies of it take the saved weights. Raises ModelFileError for files that are missing, damaged
    or foreign, and where such a module is needed or does not fit.
    """
    path, where = Path(path), pick_device(device)
    try:
        with zipfile.ZipFile(path) as archive:
            header = json.loads(archive.read("model.json"))
            tensors = read_tensors(archive.read("model.safetensors"))
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: no such file.") from error
    except Exception as error:  # zipfile, json and safetensors each raise their own kinds for damaged bytes
        raise ModelFileError(
            f"{path} is not a model that fspace saved, or it is damaged ({error})."
        ) from error
    try:
        if header["format"] != FORMAT:
            raise ModelFileError(
                f"{path} has format {header['format']}; this version of fspace reads format {FORMAT}."
            )
        model = GPRegressor(**header["options"])
        model.encoder_ = TableEncoder.from_state(header["encoder"])
        members = [
            _member(
                spec,
                {k.partition(".")[2]: v.to(where) for k, v in tensors.items() if k.startswith(f"{i}.")},
                modules,
            )
            for i, spec in enumerate(header["members"])
        ]
        model.posterior_ = (
            members[0] if header["weights"] is None else MixturePosterior(members, header["weights"])
        )
        model.log_evidence_ = header["log_evidence"]
        model.history_, model.choice_ = header["history"], header["choice"]
        model.target_names_, model.interrupted_ = header["target_names"], header["interrupted"]
        model.relevance_ = torch.tensor(header["relevance"], dtype=torch.float64).numpy()
        model.n_features_in_ = model.encoder_.n_features_in_
        if hasattr(model.encoder_, "feature_names_in_"):
            model.feature_names_in_ = model.encoder_.feature_names_in_
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{path} is a damaged fspace model: {type(error).__name__}: {error}") from error
    return model


def _member(
    spec: dict[str, Any], tensors: dict[str, torch.Tensor], modules: Mapping[str, torch.nn.Module] | None
) -> GPPosterior:
    def part(name: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}

    where = tensors["inducing_inputs"].device
    own = copy.deepcopy(dict(modules or {}))  # each member has weights of its own
    for name, module in own.items():
        saved = [v for k, v in tensors.items() if k.startswith(f"kernel.{name}.") and v.is_floating_point()]
        if saved:
            module.to(saved[0].dtype)
    kernel = kernel_from_spec(spec["kernel"], own).to(where)
    kernel.eval().requires_grad_(False)  # first, because going to eval may move a spectral-norm estimate
    try:
        kernel.load_state_dict(part("kernel"))
    except RuntimeError as error:
        if not own:
            raise
        raise ModelFileError(
            f"The weights in the file do not fit modules={{{', '.join(map(repr, own))}: ...}}; pass a module built "
            f"as the one that was fitted. {error}"
        ) from error
    likelihood = gaussian_likelihood(spec["outputs"], 0.1, where)
    likelihood.load_state_dict(part("likelihood"))
    likelihood.eval().requires_grad_(False)
    basis = Basis(kernel, tensors["inducing_inputs"], likelihood, _noise_function(part("noise_function")))
    if basis.id != spec["basis_id"]:
        raise ModelFileError("A saved parameter differs from what was saved (the basis has another id).")
    natural = part("site")
    site = Site(
        basis.id, natural["precision"], natural["shift"], natural["log_scale"], spec["count"], spec["site_id"]
    )
    return GPPosterior(basis, site, Scaling(**part("scaling")), spec["vector"])


def _noise_function(tensors: dict[str, torch.Tensor]) -> NoiseFunction | None:
    if not tensors:
        return None
    function = NoiseFunction(tensors["inducing_inputs"], tensors["weights"])
    function.load_state_dict(tensors)
    return function.eval().requires_grad_(False)
