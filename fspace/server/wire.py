"""Sites and bases as bytes: safetensors, whose header is checked before anything is allocated; nothing is unpickled.

A site of m inducing values takes 4 (m^2 + 3 m) bytes a function and a header of under 1 kB: of a symmetric matrix only
the lower triangle is sent.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch import Tensor

from fspace.errors import ModelFileError, SiteRefused
from fspace.inference.basis import Basis, Site
from fspace.inference.gp import Scaling
from fspace.saving import describe_basis, read_basis
from fspace.server.names import name_trouble
from fspace.server.natural import Form, is_diagonal

HEADER = 4096  # bytes of a site's header, at most
MOST = {"version": 10**18, "count": 10**12}  # rows of a million contributors still are an int64
LARGEST = 1e15  # of any number of a site: beside that, float64 loses the prior's precision of 1
ABOUT = {"basis_id": str, "site_id": str, "incarnation": str, "version": int, "count": int}
_FIELDS = ("precision", "shift", "log_scale")


def site_bytes(site: Site) -> bytes:
    """The site as bytes."""
    tensors = {name: getattr(site, name).detach().cpu() for name in _FIELDS}
    if not is_diagonal(site):
        tensors["precision"] = _packed(tensors["precision"])
    about = {name: getattr(site, name) for name in ABOUT}
    # one entry: safetensors writes several in no order, and the same site must be the same bytes
    # and names in UTF-8: escaped, a name of allowed length could outgrow the header
    metadata = {"fspace site 1": json.dumps(about, ensure_ascii=False)}
    return write_tensors({k: v.contiguous().clone() for k, v in tensors.items()}, metadata=metadata)


def site_from_bytes(data: bytes, form: Form) -> Site:
    """The site of a basis of this form. Raises SiteRefused, before tensors are made, for what is none."""
    about = _checked_header(data, form)
    try:
        tensors = read_tensors(data)
    except (
        SafetensorError,
        ValueError,
    ) as error:  # a header of the right sizes that is not laid out as it should be
        raise SiteRefused("format", f"The bytes are no safetensors of a site: {error}.") from error
    if not form.diagonal:
        tensors["precision"] = _unpacked(tensors["precision"], form.size)
    return Site(
        precision=tensors["precision"],
        shift=tensors["shift"],
        log_scale=tensors["log_scale"],
        **about,
    )


def most_bytes(form: Form) -> int:
    """The largest message that a site of this form can be."""
    return HEADER + sum(8 * math.prod(shape) for shape in _packed_shapes(form).values())


def basis_id_of(data: bytes) -> str:
    """Which basis the site in these bytes says it is of, before its form is known. Raises SiteRefused."""
    return _header(data)[0]["basis_id"]


def _header(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Names and numbers of a site, and the layout of its tensors."""
    if len(data) < 8:
        raise SiteRefused("format", f"{len(data)} bytes are no site: it is cut off.")
    (size,) = struct.unpack("<Q", data[:8])
    if size > HEADER or 8 + size > len(data):
        raise SiteRefused(
            "format", "The bytes are no safetensors of a site: the header is too long or cut off."
        )
    try:
        layout = json.loads(data[8 : 8 + size])
        about = json.loads(layout.pop("__metadata__")["fspace site 1"])
        if set(about) != set(ABOUT):
            raise ValueError("its fields are others")
        for name, kind in ABOUT.items():
            if type(about[name]) is not kind:
                raise ValueError(f"{name} is no {kind.__name__}")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise SiteRefused("format", f"The bytes are no site of fspace: {error}.") from error
    return about, layout


def _checked_header(data: bytes, form: Form) -> dict[str, Any]:
    about, layout = _header(data)
    start = 8 + struct.unpack("<Q", data[:8])[0]
    wanted = _packed_shapes(form)
    if set(layout) != set(wanted):
        raise SiteRefused(
            "format", f"A site holds {', '.join(_FIELDS)}; this one {', '.join(map(str, layout))}."
        )
    end = 0
    for name, shape in wanted.items():
        try:
            dtype, found, offsets = layout[name]["dtype"], layout[name]["shape"], layout[name]["data_offsets"]
            first, last = offsets
            if type(first) is not int or type(last) is not int:
                raise ValueError("offsets are whole numbers")
        except (TypeError, LookupError, ValueError) as error:
            raise SiteRefused("format", f"The header does not describe {name}.") from error
        if dtype != "F64":
            raise SiteRefused("dtype", f"{name} is {dtype}; natural parameters are float64 (F64).")
        if found != list(shape):
            raise SiteRefused(
                "shape", f"{name} has shape {found}; a site of this basis has {list(shape)} there (packed)."
            )
        if last - first != 8 * math.prod(shape):
            raise SiteRefused("format", f"{name} does not have the bytes of its shape.")
        end = max(end, last)
    if len(data) - start != end or end != sum(8 * math.prod(shape) for shape in wanted.values()):
        raise SiteRefused(
            "format", f"The site has {len(data) - start} bytes of numbers, not {end}: it is cut off."
        )
    return about


def _packed_shapes(form: Form) -> dict[str, tuple[int, ...]]:
    shapes = dict(form.shapes)
    if not form.diagonal:
        shapes["precision"] = (form.functions, form.size * (form.size + 1) // 2)
    return shapes


def _packed(matrix: Tensor) -> Tensor:
    rows, columns = torch.tril_indices(matrix.shape[-1], matrix.shape[-1])
    return matrix[..., rows, columns]


def _unpacked(triangle: Tensor, size: int) -> Tensor:
    rows, columns = torch.tril_indices(size, size)
    matrix = triangle.new_zeros(*triangle.shape[:-1], size, size)
    matrix[..., rows, columns] = triangle
    matrix[..., columns, rows] = triangle
    return matrix


def check_site(site: Site, form: Form) -> Site:
    """The site, on the CPU and exactly symmetric. Raises SiteRefused for one that no rows could have made."""
    names = {"site_id": site.site_id, "incarnation": site.incarnation}
    for name, text in names.items():
        trouble = name_trouble(name, text)
        if trouble is not None:
            raise SiteRefused("name", trouble)
    if not site.site_id:
        raise SiteRefused("name", "site_id is empty; name the contributor.")
    for name, number in {"version": site.version, "count": site.count}.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < MOST[name]:
            raise SiteRefused(
                "values", f"{name} of site {site.site_id!r} is {number!r}, not a whole number from 0."
            )
    parts: dict[str, Tensor] = {}
    for name, shape in form.shapes.items():
        value = getattr(site, name)
        if not isinstance(value, Tensor) or value.dtype != torch.float64:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise SiteRefused(
                "dtype", f"{name} of site {site.site_id!r} is {kind}; natural parameters are float64."
            )
        if tuple(value.shape) != shape:
            raise SiteRefused(
                "shape",
                f"{name} of site {site.site_id!r} has shape {list(value.shape)}; its basis asks {list(shape)}.",
            )
        value = value.detach().cpu()
        if not bool(value.isfinite().all()):
            raise SiteRefused("values", f"{name} of site {site.site_id!r} holds NaN or infinite values.")
        largest = value.abs().max().item() if value.numel() else 0.0
        if largest > LARGEST:
            raise SiteRefused(
                "values", f"{name} of site {site.site_id!r} holds {largest:.3g}, beyond {LARGEST:g}."
            )
        parts[name] = value
    if not form.diagonal:
        precision = parts["precision"]
        asymmetry = (precision - precision.mT).abs().max().item() if precision.numel() else 0.0
        if asymmetry > 1e-9 * max(1.0, precision.abs().max().item()):
            raise SiteRefused(
                "values", f"precision of site {site.site_id!r} is not symmetric (by {asymmetry:.3g})."
            )
        parts["precision"] = _unpacked(_packed(precision), form.size)
    return Site(
        site.basis_id, **parts, count=site.count, site_id=site.site_id, incarnation=site.incarnation,
        version=site.version,
    )  # fmt: skip


def digest(data: bytes) -> str:
    """What tells one content from another."""
    return hashlib.sha256(data).hexdigest()


def basis_bytes(basis: Basis, scaling: Scaling) -> bytes:
    """Basis and scaling as bytes. Raises ModelFileError for a kernel or likelihood that cannot be described."""
    tensors: dict[str, Tensor] = {}
    about = describe_basis(basis, scaling, "", tensors)
    kept = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    return write_tensors(kept, metadata={"fspace basis 1": json.dumps(about, sort_keys=True)})


def basis_from_bytes(
    data: bytes, modules: Mapping[str, torch.nn.Module] | None = None
) -> tuple[Basis, Scaling]:
    """What `basis_bytes` wrote; modules as in `fspace.load`. Raises ModelFileError for anything else."""
    try:
        (size,) = struct.unpack("<Q", data[:8])
        about = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["fspace basis 1"])
        tensors = read_tensors(data)
        if type(about["outputs"]) is not int or not 0 < about["outputs"] <= len(
            data
        ):  # which would be allocated
            raise ValueError(f"{about['outputs']} outputs in {len(data)} bytes")
        return read_basis(about, tensors, modules)
    except ModelFileError:
        raise
    except Exception as error:  # struct, json and safetensors each raise their own kinds for damaged bytes
        raise ModelFileError(f"The bytes are no basis of fspace, or damaged ({error}).") from error
