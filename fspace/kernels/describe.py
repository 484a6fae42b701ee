"""Kernels as JSON: how one is built, to be rebuilt without pickle. Its parameters travel as state_dict.

Only classes listed here are ever constructed, so a stranger's description can do no more than build a kernel.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import gpytorch
import torch
from gpytorch import constraints, kernels, priors
from gpytorch.kernels import Kernel
from torch import Tensor, nn

from fspace.errors import ModelFileError
from fspace.kernels import extractors
from fspace.kernels.deep import DeepKernel
from fspace.kernels.neural import NeuralKernel

Spec = dict[str, Any]


@dataclass(frozen=True)
class _Recipe:
    """What the constructor of a kernel class takes beyond the options all kernels share."""

    kind: type[Kernel]
    args: tuple[str, ...] = ()
    children: tuple[str, ...] = ()
    shared: tuple[str, ...] = ("ard_num_dims", "batch_shape")


_KERNELS: dict[str, _Recipe] = {
    recipe.kind.__name__: recipe
    for recipe in (
        _Recipe(kernels.RBFKernel),
        _Recipe(kernels.MaternKernel, ("nu",)),
        _Recipe(kernels.RQKernel),
        _Recipe(kernels.PeriodicKernel),
        _Recipe(kernels.LinearKernel),
        _Recipe(kernels.PolynomialKernel, ("power",)),
        _Recipe(kernels.CosineKernel),
        _Recipe(kernels.ConstantKernel, shared=("batch_shape",)),
        _Recipe(kernels.SpectralMixtureKernel, ("num_mixtures",)),
        _Recipe(kernels.PiecewisePolynomialKernel, ("q",)),
        _Recipe(kernels.RFFKernel, ("num_samples", "num_dims")),
        _Recipe(kernels.HammingIMQKernel, ("vocab_size",), shared=("batch_shape",)),
        _Recipe(kernels.CylindricalKernel, ("num_angular_weights", "eps"), ("radial_base_kernel",)),
        _Recipe(kernels.ScaleKernel, children=("base_kernel",)),
        _Recipe(NeuralKernel, ("depth", "activation")),
    )
}
_SUMS: dict[str, type[Kernel]] = {
    "AdditiveKernel": kernels.AdditiveKernel,
    "ProductKernel": kernels.ProductKernel,
}
_EXTRACTORS: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (extractors.MLP, extractors.ResidualMLP, extractors.ConvNet, extractors.CausalConv)
}
_CONVOLUTION = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias",
)  # fmt: skip
# torch layers whose constructor arguments can be read back from attributes of the same name
_LAYERS: dict[str, tuple[str, ...]] = {
    "Linear": ("in_features", "out_features", "bias"),
    "Conv1d": _CONVOLUTION,
    "Conv2d": _CONVOLUTION,
    "MaxPool2d": ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    "AvgPool2d": ("kernel_size", "stride", "padding", "ceil_mode"),
    "AdaptiveAvgPool2d": ("output_size",),
    "BatchNorm1d": ("num_features", "eps", "momentum", "affine", "track_running_stats"),
    "BatchNorm2d": ("num_features", "eps", "momentum", "affine", "track_running_stats"),
    "LayerNorm": ("normalized_shape", "eps", "elementwise_affine", "bias"),
    "Dropout": ("p",),
    "Flatten": ("start_dim", "end_dim"),
    "Identity": (),
    "ReLU": (),
    "Tanh": (),
    "Sigmoid": (),
    "SiLU": (),
    "ELU": ("alpha",),
    "GELU": ("approximate",),
    "LeakyReLU": ("negative_slope",),
    "Softplus": ("beta", "threshold"),
}
_PRIORS: dict[str, tuple[str, ...]] = {
    "NormalPrior": ("loc", "scale"),
    "LogNormalPrior": ("loc", "scale"),
    "HalfNormalPrior": ("scale",),
    "HalfCauchyPrior": ("scale",),
    "GammaPrior": ("concentration", "rate"),
}
_CONSTRAINTS: dict[str, tuple[str, ...]] = {
    "Positive": (),
    "GreaterThan": ("lower_bound",),
    "LessThan": ("upper_bound",),
    "Interval": ("lower_bound", "upper_bound"),
}
# one representative for each transform; F.softplus and nn.Softplus() are the same function
_TRANSFORMS: dict[str, tuple[Any, Any]] = {
    "none": (None, None),
    "softplus": (constraints.constraints.softplus, gpytorch.utils.transforms.inv_softplus),
    "sigmoid": (torch.sigmoid, gpytorch.utils.transforms.inv_sigmoid),
    "exp": (torch.exp, torch.log),
}
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


def kernel_to_spec(kernel: Kernel) -> Spec:
    """Describe how a kernel is built, as a JSON-able dict; its parameters are in `kernel.state_dict()`.

    Raises: ModelFileError for a kernel, prior or constraint that is not on the list (the message names it).
    A foreign torch module as extractor is noted as custom: it must be handed to `kernel_from_spec`.
    """
    return _kernel_to_spec(kernel, "")


def kernel_from_spec(spec: Mapping[str, Any], modules: Mapping[str, nn.Module] | None = None) -> Kernel:
    """Build the kernel that `kernel_to_spec` described; its parameters are at their initial values.

    modules: the foreign extractors, by the name that the description gives them, for example
    `{"extractor": my_network}`. Raises: ModelFileError if one is missing or the description is damaged.
    """
    try:
        return _kernel_from_spec(spec, dict(modules or {}))
    except ModelFileError:
        raise
    except Exception as error:  # whatever a damaged description sets off: the caller needs to know just that
        raise ModelFileError(
            f"The kernel's description cannot be read ({type(error).__name__}: {error}); the file is "
            "damaged or was not written by fspace. Save the model again from its source."
        ) from error


# -- writing ---------------------------------------------------------------------------------------


def _kernel_to_spec(kernel: Kernel, path: str) -> Spec:
    name = type(kernel).__name__
    place = f" (at {path})" if path else ""
    spec: Spec = {"type": name}
    if type(kernel) is DeepKernel:
        spec["args"] = {
            "num_features": kernel.num_features,
            "input_dims": kernel.input_dims,
            "momentum": kernel.norm.momentum,
        }
        spec["extractor"] = module_to_spec(kernel.extractor, _join(path, "extractor"))
        spec["children"] = {
            n: _kernel_to_spec(child, _join(path, n)) for n, child in kernel.named_sub_kernels()
        }
    elif type(kernel) is _SUMS.get(name):
        parts = enumerate(kernel.kernels)
        spec["children"] = {str(i): _kernel_to_spec(part, _join(path, f"kernels.{i}")) for i, part in parts}
    elif name in _KERNELS and type(kernel) is _KERNELS[name].kind:
        recipe = _KERNELS[name]
        spec["args"] = {arg: _argument(kernel, arg) for arg in recipe.args}
        spec["args"] |= {
            arg: _argument(kernel, arg) for arg in recipe.shared if _argument(kernel, arg) is not None
        }
        if recipe.children:
            spec["children"] = {
                n: _kernel_to_spec(getattr(kernel, n), _join(path, n)) for n in recipe.children
            }
    else:
        known = ", ".join(sorted([*_KERNELS, *_SUMS, "DeepKernel"]))
        raise ModelFileError(
            f"The kernel {type(kernel).__module__}.{name}{place} cannot be saved: fspace stores kernels as "
            f"JSON and knows how to rebuild {known}. Build yours from these, or keep its state_dict yourself "
            "and construct it in code."
        )
    if kernel.active_dims is not None:
        spec["active_dims"] = kernel.active_dims.tolist()
    own = {parameter.dtype for parameter in kernel.parameters(recurse=False)}
    if own:
        spec["dtype"] = str(own.pop()).removeprefix("torch.")
    for key, constraint in kernel._constraints.items():
        described = _constraint_to_spec(constraint, key, place)
        spec.setdefault("constraints", {})[key.removesuffix("_constraint")] = described
    for key, (prior, _, _) in kernel._priors.items():
        accepted = {*inspect.signature(type(kernel)).parameters, *inspect.signature(Kernel).parameters}
        spec.setdefault("priors", {})[key] = prior_to_spec(prior, key, place, key in accepted)
    return spec


def _argument(kernel: Kernel, name: str) -> Any:
    if name == "batch_shape":
        return list(kernel._batch_shape) or None
    if name == "num_dims":  # of an RFFKernel, which draws its weights on first use
        weights = getattr(kernel, "randn_weights", None)
        return None if weights is None else weights.shape[-2]
    value = getattr(kernel, name)
    return value.item() if isinstance(value, Tensor) else value


def _constraint_to_spec(constraint: constraints.Interval, key: str, place: str) -> Spec:
    name = type(constraint).__name__
    if type(constraint) is not getattr(constraints, name, None) or name not in _CONSTRAINTS:
        raise ModelFileError(
            f"The constraint {name} of {key}{place} cannot be saved; use one of "
            f"{', '.join(sorted(_CONSTRAINTS))}."
        )
    bounds = {bound: _to_json(getattr(constraint, bound)) for bound in _CONSTRAINTS[name]}
    return {"type": name, **bounds, "transform": _transform_name(constraint._transform, key, place)}


def _transform_name(transform: Any, key: str, place: str) -> str:
    if isinstance(transform, nn.Softplus) or transform is nn.functional.softplus:
        return "softplus"
    for name, (known, _) in _TRANSFORMS.items():
        if transform is known:
            return name
    raise ModelFileError(
        f"The transform {transform!r} of {key}{place} cannot be saved; use one of "
        f"{', '.join(sorted(_TRANSFORMS))}."
    )


def prior_to_spec(prior: priors.Prior, key: str, place: str, accepted: bool = True) -> Spec:
    """A prior of gpytorch as JSON; accepted: whether the constructor of what has it takes it. Raises ModelFileError."""
    name = type(prior).__name__
    known = type(prior) is getattr(priors, name, None) and name in _PRIORS
    if not known or getattr(prior, "_transform", None) is not None or not accepted:
        raise ModelFileError(
            f"The prior {key} = {name}{place} cannot be saved; use one of {', '.join(sorted(_PRIORS))} "
            "without a transform, given to the constructor, or none (predictions do not use it)."
        )
    return {"type": name, **{arg: _to_json(getattr(prior, arg)) for arg in _PRIORS[name]}}


def module_to_spec(module: nn.Module, path: str) -> Spec:
    """How a module is built, as JSON; of one that is not of fspace's or torch's standard layers only its name."""
    name = type(module).__name__
    if type(module) is _EXTRACTORS.get(name):
        spec: Spec = {"type": name, "args": dict(cast(dict[str, Any], module.config))}
    elif _is_standard(module):
        spec = _layer_to_spec(module)
    else:
        return {"type": "custom", "name": path, "class": f"{type(module).__module__}.{name}"}
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    if tensors:
        spec["dtype"] = str(tensors[0].dtype).removeprefix("torch.")
    return spec


def _is_standard(module: nn.Module) -> bool:
    if type(module) is nn.Sequential:
        return all(_is_standard(part) for part in module)
    name = type(module).__name__
    if name not in _LAYERS or type(module) is not getattr(nn, name):
        return False
    return getattr(module, "padding_mode", "zeros") == "zeros"


def _layer_to_spec(module: nn.Module) -> Spec:
    if isinstance(module, nn.Sequential):
        layers = {name: _layer_to_spec(part) for name, part in module.named_children()}
        return {"type": "Sequential", "layers": layers}
    name = type(module).__name__
    args = {arg: getattr(module, arg) for arg in _LAYERS[name]}
    if "bias" in args:
        args["bias"] = args["bias"] is not None
    return {"type": name, "args": {arg: list(v) if isinstance(v, tuple) else v for arg, v in args.items()}}


# -- reading ---------------------------------------------------------------------------------------


def _kernel_from_spec(spec: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> Kernel:
    name = spec["type"]
    children = {key: _kernel_from_spec(child, modules) for key, child in spec.get("children", {}).items()}
    args = dict(spec.get("args", {}))
    for key, prior in spec.get("priors", {}).items():
        args[key] = prior_from_spec(prior)
    kernel: Kernel
    if name == "DeepKernel":
        extractor = module_from_spec(spec["extractor"], modules)
        kernel = DeepKernel(extractor, children["base"], children.get("plain"), **args)
    elif name in _SUMS:
        kernel = _SUMS[name](*[children[key] for key in sorted(children, key=int)])
    elif name in _KERNELS:
        if "batch_shape" in args:
            args["batch_shape"] = torch.Size(args["batch_shape"])
        surplus = args.keys() - {*_KERNELS[name].args, *_KERNELS[name].shared, *spec.get("priors", {})}
        if surplus:  # gpytorch would swallow them in silence
            raise ValueError(f"{name} has no arguments {sorted(surplus)}")
        kernel = _KERNELS[name].kind(**children, **args)
    else:
        raise ModelFileError(
            f"The file holds a kernel of type {name!r}, which this version of fspace does not know; load "
            "it with the version that saved it."
        )
    if "active_dims" in spec:
        kernel.active_dims = torch.tensor(spec["active_dims"], dtype=torch.long)
    for key, constraint in spec.get("constraints", {}).items():
        kernel.register_constraint(key, _constraint_from_spec(constraint))
    if "dtype" in spec:
        _cast_own(kernel, _DTYPES[spec["dtype"]])
    return kernel


def _cast_own(kernel: Kernel, dtype: torch.dtype) -> None:
    """Cast a kernel's own parameters, constraints and priors, not those of the kernels within it."""
    for parameter in kernel.parameters(recurse=False):
        parameter.data = parameter.data.to(dtype)
    for buffer_name, buffer in kernel.named_buffers(recurse=False):
        if buffer.is_floating_point():
            setattr(kernel, buffer_name, buffer.to(dtype))
    for child in kernel.children():
        if isinstance(child, constraints.Interval | priors.Prior):
            child.to(dtype)


def _constraint_from_spec(spec: Mapping[str, Any]) -> constraints.Interval:
    bounds = {bound: _from_json(spec[bound]) for bound in _CONSTRAINTS[spec["type"]]}
    transform, inverse = _TRANSFORMS[spec["transform"]]
    return getattr(constraints, spec["type"])(**bounds, transform=transform, inv_transform=inverse)


def prior_from_spec(spec: Mapping[str, Any]) -> priors.Prior:
    """The prior that `prior_to_spec` described."""
    args = {arg: _from_json(spec[arg]) for arg in _PRIORS[spec["type"]]}
    return getattr(priors, spec["type"])(**args)


def module_from_spec(spec: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> nn.Module:
    """What `module_to_spec` described, with weights of its own. Raises ModelFileError where it cannot be built."""
    name = spec["type"]
    if name == "custom":
        if spec["name"] not in modules:
            raise ModelFileError(
                f"The model uses a feature extractor of its author's own, {spec['class']}, which a file "
                f"cannot carry; pass one of the same shape with modules={{{spec['name']!r}: ...}}; its "
                "weights are then loaded."
            )
        return modules[spec["name"]]
    if name in _EXTRACTORS:
        module: nn.Module = _EXTRACTORS[name](**spec["args"])
    else:
        module = _layer_from_spec(spec)
    return module.to(_DTYPES[spec["dtype"]]) if "dtype" in spec else module


def _layer_from_spec(spec: Mapping[str, Any]) -> nn.Module:
    name = spec["type"]
    if name == "Sequential":
        module = nn.Sequential()
        for key, part in spec["layers"].items():
            module.add_module(key, _layer_from_spec(part))
        return module
    if name not in _LAYERS:
        raise ModelFileError(
            f"The file holds a network layer of type {name!r}, which this version of fspace does not know; "
            "load it with the version that saved it."
        )
    args = {arg: tuple(v) if isinstance(v, list) else v for arg, v in spec["args"].items()}
    return getattr(nn, name)(**args)


# -- small things ----------------------------------------------------------------------------------


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _to_json(value: Tensor | float) -> Any:
    """Numbers as JSON has them: no inf there, so it becomes text."""
    if isinstance(value, Tensor):
        return [_to_json(part) for part in value] if value.dim() else _to_json(value.item())
    return value if math.isfinite(value) else str(value)


def _from_json(value: Any) -> Tensor | float:
    if isinstance(value, list):
        return torch.tensor(
            [[float(v) for v in row] if isinstance(row, list) else float(row) for row in value]
        )
    return float(value)
