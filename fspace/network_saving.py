"""How a posterior over networks is written as JSON and tensors, and read again."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fspace.errors import ModelFileError
from fspace.inference.gp import Scaling
from fspace.inference.weights import METHODS, Method
from fspace.inference.weights.distributions import DISTRIBUTIONS
from fspace.inference.weights.likelihoods import Classes, GaussianNoise, VaryingNoise
from fspace.inference.weights.network import Network
from fspace.inference.weights.posterior import NetworkPosterior, posterior_of
from fspace.kernels.describe import module_from_spec, module_to_spec
from fspace.network_estimators import BNNEstimator

LIKELIHOODS = {kind.__name__: kind for kind in (GaussianNoise, VaryingNoise, Classes)}
SCALING = ("unit", "power", "shift", "scale", "y_shift", "y_scale")


def describe_networks(model: BNNEstimator, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What only networks have; numbers go to `tensors`."""
    posterior = model.posterior_
    assert isinstance(posterior, NetworkPosterior)
    tensors |= {f"network.{k}": v for k, v in posterior.network.module.state_dict().items()}
    tensors |= {f"scaling.{k}": getattr(posterior.scaling, k) for k in SCALING}
    return {
        "network": module_to_spec(posterior.network.module, "network"),
        "distribution": _parts(posterior.distribution, "distribution.", tensors),
        "likelihood": _parts(posterior.likelihood, "likelihood.", tensors),
        "vector": posterior.vector,
        "method": posterior.method,
        "diagnostics": model.diagnostics_,
        "diverged": model.diverged_,
    }


def read_networks(
    model: BNNEstimator,
    header: dict[str, Any],
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module] | None,
    where: torch.device,
) -> int:
    """The attributes that only networks have; returns how many classes the model is of (0: none)."""
    own = {k: v.to(where) for k, v in tensors.items()}
    module = read_module(header["network"], _under(own, "network."), modules).to(where)
    scaling = Scaling(**_under(own, "scaling."))
    distribution = _whole(header["distribution"], DISTRIBUTIONS, _under(own, "distribution."))
    likelihood = _whole(header["likelihood"], LIKELIHOODS, _under(own, "likelihood."))
    network = Network.of(module)
    model.posterior_ = posterior_of(
        network, distribution, likelihood, scaling, header["vector"], header["method"]
    )
    model.diagnostics_, model.diverged_ = header["diagnostics"], header["diverged"]
    return likelihood.count if isinstance(likelihood, Classes) else 0


def read_module(
    spec: Mapping[str, Any], weights: Mapping[str, Tensor], modules: Mapping[str, nn.Module] | None
) -> nn.Module:
    """A module with its weights; one of its author's own is copied from `modules`. Raises ModelFileError."""
    module = module_from_spec(spec, copy.deepcopy(dict(modules or {})))
    floating = [v for v in weights.values() if v.is_floating_point()]
    if floating:
        module.to(floating[0].dtype)
    try:
        module.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise ModelFileError(f"The weights in the file do not fit the network: {error}") from error
    return module


def method_to_spec(method: Method) -> dict[str, Any]:
    """A method and its settings as JSON."""
    names = [item.name for item in dataclasses.fields(cast(Any, method))]
    return {"name": method.name, "settings": {name: getattr(method, name) for name in names}}


def method_from_spec(spec: Mapping[str, Any]) -> Method:
    """What `method_to_spec` wrote."""
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in spec["settings"].items()}
    return METHODS[spec["name"]](**settings)


def _parts(whole: Any, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of a dataclass: tensors, alone or several in a list, go to `tensors`; the rest is JSON."""
    spec: dict[str, Any] = {"type": type(whole).__name__, "fields": {}, "lists": {}}
    for item in dataclasses.fields(whole):
        value = getattr(whole, item.name)
        if isinstance(value, Tensor):
            tensors[prefix + item.name] = value
        elif isinstance(value, tuple | list) and value and all(isinstance(v, Tensor) for v in value):
            spec["lists"][item.name] = len(value)
            tensors |= {f"{prefix}{item.name}.{k}": v for k, v in enumerate(value)}
        else:
            spec["fields"][item.name] = value
    return spec


def _whole(spec: Mapping[str, Any], kinds: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """What `_parts` took apart."""
    lists = {name: tuple(tensors[f"{name}.{k}"] for k in range(n)) for name, n in spec["lists"].items()}
    single = {k: v for k, v in tensors.items() if "." not in k}
    fields = {k: _tuples(v) for k, v in spec["fields"].items()}
    return kinds[spec["type"]](**fields, **lists, **single)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
