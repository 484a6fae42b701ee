"""Saved models: one zip file of safetensors and JSON. Nothing that is loaded is ever unpickled."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gpytorch
import numpy as np
import torch
from gpytorch.constraints import Positive
from gpytorch.likelihoods import GaussianLikelihood, Likelihood

from fspace import __version__
from fspace.archive import read_archive, write_archive
from fspace.data import TableEncoder
from fspace.errors import ModelFileError, NotFittedError
from fspace.estimators import GPClassifier, GPRegressor
from fspace.fitting import GPEstimator
from fspace.front import FunctionEstimator
from fspace.inference.basis import Basis, Site
from fspace.inference.gp import GPPosterior, Scaling
from fspace.inference.likelihoods import (
    AnyLikelihood,
    OffsetLikelihood,
    functions,
    likelihood_from_spec,
    likelihood_to_spec,
)
from fspace.inference.noise import NoiseFunction
from fspace.inference.nongaussian import posterior_of
from fspace.inference.numerics import pick_device
from fspace.inference.optimise import gaussian_likelihood
from fspace.inference.weights import GaussianPrior, Method
from fspace.kernels.describe import (
    kernel_from_spec,
    kernel_to_spec,
    module_to_spec,
    prior_from_spec,
    prior_to_spec,
)
from fspace.network_estimators import BNNClassifier, BNNEstimator, BNNRegressor
from fspace.network_saving import (
    describe_networks,
    method_from_spec,
    method_to_spec,
    read_module,
    read_networks,
)
from fspace.posterior import MixturePosterior

FORMAT = 2
ESTIMATORS: dict[str, type[FunctionEstimator]] = {
    kind.__name__: kind for kind in (GPRegressor, GPClassifier, BNNRegressor, BNNClassifier)
}
JOINED = "data+held out"  # what the first site of a sparse posterior was called at first
SCALING = ("unit", "power", "shift", "scale", "y_shift", "y_scale")


def save(model: FunctionEstimator, path: str | Path) -> Path:
    """Write a fitted estimator to `path`, in full or not at all. Raises NotFittedError, ModelFileError."""
    if not hasattr(model, "posterior_"):
        raise NotFittedError(
            f"This {type(model).__name__} instance is not fitted yet: there is nothing to save. Call 'fit' first."
        )
    path = Path(path)
    if os.path.isdir(path) or not path.name:  # pathlib's raises for names that are too long
        raise ModelFileError(f"{str(path)!r} is a folder; name the file to write in it.")
    tensors: dict[str, torch.Tensor] = {}
    options = {k: _option(k, v, tensors) for k, v in model.get_params(deep=False).items()}
    header = {
        "format": FORMAT,
        "fspace": __version__,
        "estimator": type(model).__name__,
        "options": options,
        "encoder": model.encoder_.state(),
        "history": model.history_,
        "relevance": model.relevance_.tolist(),
        "target_names": model.target_names_,
        "interrupted": model.interrupted_,
        "classes": classes_to_json(model.classes_) if hasattr(model, "classes_") else None,
    }
    if isinstance(model, GPEstimator):
        header |= _gp_header(model, tensors)
    elif isinstance(model, BNNEstimator):
        header |= describe_networks(model, tensors)
    write_archive(path, "model", json.dumps(header, default=_plain), tensors, repr(str(path)))
    return path


def _gp_header(model: GPEstimator, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What only Gaussian processes have; numbers of the members go to `tensors`."""
    posterior = model.posterior_
    members = posterior.members if isinstance(posterior, MixturePosterior) else [posterior]
    specs = []
    for i, member in enumerate(members):
        assert isinstance(member, GPPosterior)
        specs.append(_describe(member, f"{i}.", tensors))
    return {
        "members": specs,
        "weights": posterior.weights.tolist() if isinstance(posterior, MixturePosterior) else None,
        "log_evidence": model.log_evidence_,
        "choice": model.choice_,
        "budget": model.budget_,
    }


def classes_to_json(classes: np.ndarray) -> dict[str, Any]:
    """Labels of any kind as JSON."""
    dtype = "object" if classes.dtype.kind == "O" else classes.dtype.str
    dates = (
        classes.dtype.kind in "mM"
    )  # as whole numbers of their unit: text of durations cannot be read back
    return {"values": classes.view(np.int64).tolist() if dates else classes.tolist(), "dtype": dtype}


def classes_from_json(saved: Mapping[str, Any]) -> np.ndarray:
    """What `classes_to_json` wrote."""
    dtype = np.dtype(saved["dtype"])
    if dtype.kind in "mM":
        return np.array(saved["values"], dtype=np.int64).view(dtype)
    return np.array(saved["values"], dtype=dtype)


def _plain(value: Any) -> Any:
    """Options as JSON: numpy's numbers and arrays, torch's devices and types."""
    return value.tolist() if hasattr(value, "tolist") else str(value).removeprefix("torch.")


def _option(name: str, value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """An option as JSON; of a kernel or likelihood that was passed in, the parameters go to `tensors`."""
    if isinstance(value, gpytorch.kernels.Kernel):
        tensors |= {f"option.{name}.{k}": v for k, v in value.state_dict().items()}
        fixed = [k for k, parameter in value.named_parameters() if not parameter.requires_grad]
        return {"kernel": kernel_to_spec(value), "fixed": fixed}
    if isinstance(value, GaussianLikelihood):
        tensors[f"option.{name}.noise"] = value.noise
        prior = getattr(value.noise_covar, "noise_prior", None)
        described = (
            {} if prior is None else {"prior": prior_to_spec(prior, "noise_prior", " of the likelihood")}
        )
        return {"noise": list(value.noise.shape), **described}
    if isinstance(value, Likelihood):
        tensors |= {f"option.{name}.{k}": v for k, v in value.state_dict().items()}
        return likelihood_to_spec(value)
    if isinstance(value, torch.nn.Module):  # a network
        tensors |= {f"option.{name}.{k}": v for k, v in value.state_dict().items()}
        return {"module": module_to_spec(value, name)}
    if isinstance(value, Method):
        return {"method": method_to_spec(value)}
    if isinstance(value, tuple):
        return {"tuple": list(value)}
    if isinstance(value, GaussianPrior):
        return {"weight_prior": dataclasses.asdict(value)}
    if isinstance(value, dict):  # JSON would make text of keys that are labels
        return {"items": [[_plain_label(key), item] for key, item in value.items()]}
    return value


def _plain_label(label: Any) -> Any:
    return label.item() if isinstance(label, np.generic) else label


def _read_option(
    name: str, value: Any, tensors: dict[str, torch.Tensor], modules: Mapping[str, torch.nn.Module] | None
) -> Any:
    prefix = f"option.{name}."
    own = {k.removeprefix(prefix): v.clone() for k, v in tensors.items() if k.startswith(prefix)}
    if isinstance(value, dict) and "kernel" in value:
        kernel = _read_kernel(value["kernel"], own, modules, torch.device("cpu"))
        for parameter in value["fixed"]:
            kernel.get_parameter(parameter).requires_grad_(False)
        return kernel.train()
    if isinstance(value, dict) and "module" in value:
        return read_module(value["module"], own, modules)
    if isinstance(value, dict) and "method" in value:
        return method_from_spec(value["method"])
    if isinstance(value, dict) and "tuple" in value:
        return tuple(value["tuple"])
    if isinstance(value, dict) and "weight_prior" in value:
        return GaussianPrior(**value["weight_prior"])
    if isinstance(value, dict) and "noise" in value:
        prior = prior_from_spec(value["prior"]) if "prior" in value else None
        likelihood = GaussianLikelihood(
            noise_prior=prior, noise_constraint=Positive(), batch_shape=own["noise"].shape[:-1]
        )
        likelihood.to(own["noise"].dtype).noise = own["noise"]
        return likelihood
    if isinstance(value, dict) and "items" in value:
        return dict(value["items"])
    if isinstance(value, dict) and "likelihood" in value:
        other = likelihood_from_spec(value)
        other.load_state_dict(own)
        return other
    return value


def _read_kernel(
    spec: Mapping[str, Any],
    weights: dict[str, torch.Tensor],
    modules: Mapping[str, torch.nn.Module] | None,
    where: torch.device,
) -> gpytorch.kernels.Kernel:
    own = copy.deepcopy(dict(modules or {}))  # each kernel has weights of its own
    for name, module in own.items():
        saved = [v for k, v in weights.items() if k.startswith(f"{name}.") and v.is_floating_point()]
        if saved:
            module.to(saved[0].dtype)
    kernel = kernel_from_spec(spec, own).to(where)
    kernel.eval()  # first, because going to eval may move a spectral-norm estimate
    try:
        kernel.load_state_dict(weights)
    except RuntimeError as error:
        if not own:
            raise
        raise ModelFileError(
            f"The weights in the file do not fit modules={{{', '.join(map(repr, own))}: ...}}; pass a module built "
            f"as the one that was fitted. {error}"
        ) from error
    return kernel


def _describe(member: GPPosterior, prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    for i, site in enumerate(member.sites.values()):
        tensors |= {f"{prefix}site{i}.{k}": getattr(site, k) for k in ("precision", "shift", "log_scale")}
    return {
        **describe_basis(member.basis, member.scaling, prefix, tensors),
        "vector": member.vector,
        "sites": [
            {"name": name, "count": site.count, "version": site.version}
            for name, site in member.sites.items()
        ],
    }


def describe_basis(
    basis: Basis, scaling: Scaling, prefix: str, tensors: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """How a basis and the scaling before it are built, as JSON; their numbers go to `tensors`.

    Raises ModelFileError for a kernel or likelihood that cannot be described."""
    tensors |= {f"{prefix}kernel.{k}": v for k, v in basis.kernel.state_dict().items()}
    tensors |= {f"{prefix}likelihood.{k}": v for k, v in basis.likelihood.state_dict().items()}
    if basis.noise_function is not None:
        tensors |= {f"{prefix}noise_function.{k}": v for k, v in basis.noise_function.state_dict().items()}
    tensors |= {f"{prefix}scaling.{k}": getattr(scaling, k) for k in SCALING}
    if scaling.mixing is not None:
        tensors[f"{prefix}scaling.mixing"] = scaling.mixing
    tensors[f"{prefix}inducing_inputs"] = basis.inducing_inputs
    return {
        "kernel": kernel_to_spec(basis.kernel),
        "outputs": functions(basis.likelihood),
        "likelihood": likelihood_to_spec(basis.likelihood.inner)
        if isinstance(basis.likelihood, OffsetLikelihood)
        else None,
        "basis_id": basis.id,
    }


def load(path: str | Path, device: str = "auto", modules: Mapping[str, torch.nn.Module] | None = None) -> Any:
    """Read a saved estimator; it predicts as it did, has the options it had, and needs no training data.

    modules: {"extractor": module} for a feature extractor that is not one of fspace's or torch's standard layers;
    it stays as it is, copies of it take the saved weights. Raises ModelFileError for files that are missing, damaged
    or foreign, and where such a module is needed or does not fit.
    """
    path, where = Path(path), pick_device(device)
    foreign = f"{path} is not a model that fspace saved, or it is damaged"
    header, tensors = read_archive(path, "model", foreign)
    try:
        if header["format"] != FORMAT:
            raise ModelFileError(
                f"{path} has format {header['format']}; this version of fspace reads format {FORMAT}."
            )
        model = ESTIMATORS[header["estimator"]](
            **{k: _read_option(k, v, tensors, modules) for k, v in header["options"].items()}
        )
        model.encoder_ = TableEncoder.from_state(header["encoder"])
        model.history_ = header["history"]
        model.target_names_, model.interrupted_ = header["target_names"], header["interrupted"]
        model.relevance_ = torch.tensor(header["relevance"], dtype=torch.float64).numpy()
        if isinstance(model, GPEstimator):
            known = _read_gp(model, header, tensors, modules, where)
        else:
            assert isinstance(model, BNNEstimator)
            known = read_networks(model, header, tensors, modules, where)
        if isinstance(model, GPClassifier | BNNClassifier):
            model.classes_ = classes_from_json(header["classes"])
            if len(model.classes_) != known:
                raise ModelFileError(
                    f"{path} names {len(model.classes_)} classes, but its model is of {known}."
                )
        model.n_features_in_ = model.encoder_.n_features_in_
        if hasattr(model.encoder_, "feature_names_in_"):
            model.feature_names_in_ = model.encoder_.feature_names_in_
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{path} is a damaged fspace model: {type(error).__name__}: {error}") from error
    return model


def _read_gp(
    model: GPEstimator,
    header: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    modules: Mapping[str, torch.nn.Module] | None,
    where: torch.device,
) -> int:
    """The attributes that only Gaussian processes have; returns how many classes the model is of (0: none)."""
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
    model.log_evidence_, model.choice_ = header["log_evidence"], header["choice"]
    model.budget_ = int(header["budget"])
    like = members[0].basis.likelihood
    return (like.classes or 2) if isinstance(like, OffsetLikelihood) else 0


def _member(
    spec: dict[str, Any], tensors: dict[str, torch.Tensor], modules: Mapping[str, torch.nn.Module] | None
) -> GPPosterior:
    basis, scaling = read_basis(spec, tensors, modules)
    sites = {}
    names = [about["name"] for about in spec["sites"]]
    for i, about in enumerate(spec["sites"]):
        natural = _part(tensors, f"site{i}")
        numbers = natural["precision"], natural["shift"], natural["log_scale"]
        name = about["name"]
        if name == JOINED and "data" not in names:
            name = "data"
        sites[name] = Site(basis.id, *numbers, about["count"], name, version=about["version"])
    return posterior_of(basis, sites, scaling, spec["vector"])


def read_basis(
    spec: Mapping[str, Any],
    tensors: dict[str, torch.Tensor],
    modules: Mapping[str, torch.nn.Module] | None,
) -> tuple[Basis, Scaling]:
    """What `describe_basis` described. Raises ModelFileError where a parameter differs."""
    where = tensors["inducing_inputs"].device
    kernel = _read_kernel(spec["kernel"], _part(tensors, "kernel"), modules, where).requires_grad_(False)
    likelihood: AnyLikelihood = gaussian_likelihood(spec["outputs"], 0.1, where)
    described = spec.get("likelihood")
    if described is not None:
        likelihood = OffsetLikelihood(likelihood_from_spec(described), torch.zeros(spec["outputs"])).to(where)
    likelihood.load_state_dict(_part(tensors, "likelihood"))
    likelihood.eval().requires_grad_(False)
    noise_function = _noise_function(_part(tensors, "noise_function"))
    basis = Basis(kernel, tensors["inducing_inputs"], likelihood, noise_function)
    if basis.id != spec["basis_id"]:
        raise ModelFileError("A saved parameter differs from what was saved (the basis has another id).")
    scaling = _part(tensors, "scaling")
    mixing, t = scaling.get("mixing"), spec["outputs"]
    if mixing is not None and not (
        mixing.shape == (t, t) and bool(torch.linalg.slogdet(mixing)[1].isfinite())
    ):
        raise ModelFileError(f"The saved mixing of the outputs is no invertible {t} x {t} matrix.")
    return basis, Scaling(**scaling)


def _part(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}


def _noise_function(tensors: dict[str, torch.Tensor]) -> NoiseFunction | None:
    if not tensors:
        return None
    function = NoiseFunction(tensors["inducing_inputs"], tensors["weights"])
    function.load_state_dict(tensors)
    return function.eval().requires_grad_(False)
