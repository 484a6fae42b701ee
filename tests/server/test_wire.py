"""Sites and bases as bytes: what goes out comes back, and anything else is refused by name, before it is allocated."""

import json
import math
import pickle
import struct
import tracemalloc
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fspace.errors import ModelFileError, SiteRefused
from fspace.inference.basis import Basis, Site
from fspace.inference.collapsed import fit_site
from fspace.inference.optimise import gaussian_likelihood
from fspace.inference.sites import converge
from fspace.kernels.deep import DeepKernel
from fspace.server import PosteriorServer, WeightBasis
from fspace.server.core import form_of, unit_scaling
from fspace.server.names import LONGEST_NAME as NAME
from fspace.server.natural import Form
from fspace.server.wire import (
    HEADER,
    basis_bytes,
    basis_from_bytes,
    basis_id_of,
    check_site,
    most_bytes,
    site_bytes,
    site_from_bytes,
)

FIELDS = ("precision", "shift", "log_scale")
SMALL = Form(1, 2)


def small_site(**changes):
    precision = torch.tensor([[[2.0, 0.5], [0.5, 1.0]]]).double()
    site = Site("b" * 64, precision, torch.tensor([[1.0, -3.0]]).double(), torch.tensor([0.25]).double(), 7)
    return replace(site, site_id="hospital 3", incarnation="i" * 32, version=12, **changes)


def same(one, other):
    names = ("basis_id", "site_id", "incarnation", "version", "count")
    return all(getattr(one, n) == getattr(other, n) for n in names) and all(
        torch.equal(getattr(one, n), getattr(other, n)) for n in FIELDS
    )


def random_site(form, seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(form.functions, form.size, form.size, generator=generator).double()
    precision = root @ root.mT
    parts = {n: torch.randn(s, generator=generator).double() for n, s in form.shapes.items()}
    parts["precision"] = precision.diagonal(dim1=-2, dim2=-1).contiguous() if form.diagonal else precision
    return Site("c" * 64, **parts, count=3, site_id="s", incarnation="x", version=1)


@pytest.mark.parametrize("form", [Form(1, 1), Form(1, 40), Form(3, 17), Form(1, 500, diagonal=True)], ids=str)
def test_sites_round_trip_in_few_bytes(form):
    site = random_site(form)
    data = site_bytes(site)
    # exactly, but for what symmetry leaves: the lower triangle is the matrix
    found = site_from_bytes(data, form)
    assert same(found, check_site(site, form))
    assert site_bytes(found) == data == site_bytes(replace(site))
    assert basis_id_of(data) == site.basis_id
    t, m = form.functions, form.size
    limit = 16 * t * m if form.diagonal else 4 * t * (m**2 + 3 * m)
    assert len(data) <= limit + 8 * t + 1000 < limit + 4096
    assert len(data) <= most_bytes(form)


def test_sites_of_every_likelihood_round_trip(gaussian, binary):
    for problem, site in (
        (gaussian, fit_site(gaussian.basis, gaussian.x, gaussian.y)),
        (binary, converge(binary.basis, binary.x, binary.y)[0]),
    ):
        form = form_of(problem.basis)
        checked = check_site(site, form)
        assert same(site_from_bytes(site_bytes(checked), form), checked)
        assert len(site_bytes(checked)) <= form.functions * 4 * (form.size**2 + 3 * form.size) + 4096


@pytest.mark.parametrize("letter", ["a", '"', "\\", "\u00e9", "\U0001f600"])
def test_the_longest_names_still_fit(letter, gaussian, tmp_path):
    """Names that are allowed had been written escaped, too long to be read again: the server's file was lost to it."""
    site = replace(small_site(), site_id=letter * NAME, incarnation=letter * NAME)
    assert same(site_from_bytes(site_bytes(site), SMALL), site)
    assert len(site_bytes(site)) <= most_bytes(SMALL)
    site = replace(fit_site(gaussian.basis, gaussian.x, gaussian.y), site_id=letter * NAME)
    with PosteriorServer(tmp_path / "server.db") as server:
        server.register_basis(gaussian.basis)
        server.put(site)
        assert server.put(site).status == "unchanged"
    with PosteriorServer(tmp_path / "server.db") as server:
        assert server.get(letter * NAME).count == 400


def test_every_prefix_and_every_extension_is_refused():
    data = site_bytes(small_site())
    for end in range(len(data)):
        with pytest.raises(SiteRefused) as refused:
            site_from_bytes(data[:end], SMALL)
        assert refused.value.reason == "format"
    for more in (b"\0", b"\0" * 8, data):
        with pytest.raises(SiteRefused):
            site_from_bytes(data + more, SMALL)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bits_are_refused_or_make_another_site_whole(flips):
    """Numbers and names may be others, as nothing in a message says what they were; what is read is a site that goes
    back to bytes, or is refused by its values."""
    data = bytearray(site_bytes(small_site()))
    for place, bits in flips:
        data[place % len(data)] ^= bits
    read_whole_or_refused(bytes(data))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=300), st.integers(0, 10**4))
def test_any_bytes_in_any_place_are_refused_or_make_a_site_whole(text, place):
    data = site_bytes(small_site())
    place %= len(data)
    read_whole_or_refused(text)
    read_whole_or_refused(data[:place] + text + data[place + len(text) :])


def read_whole_or_refused(data):
    try:
        found = check_site(site_from_bytes(data, SMALL), SMALL)
    except SiteRefused as refused:
        assert refused.reason in {"format", "shape", "dtype", "values", "name"} and len(str(refused)) > 20
        return
    assert same(site_from_bytes(site_bytes(found), SMALL), found)


def header_of(data):
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(change, body=None):
    """The small site's message with its header changed."""
    layout, numbers = header_of(site_bytes(small_site()))
    about = json.loads(layout["__metadata__"]["fspace site 1"])
    text = change(layout, about)
    if text is None:
        if layout.get("__metadata__") is not None and "keep" not in layout:
            layout["__metadata__"]["fspace site 1"] = json.dumps(about)
        layout.pop("keep", None)
        text = json.dumps(layout)
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text)) + text + (numbers if body is None else body)


HOSTILE = {
    "huge shape": lambda h, a: h["precision"].update(shape=[1, 10**15]),
    "huge shape and offsets": lambda h, a: h["precision"].update(
        shape=[1, 10**15], data_offsets=[0, 8 * 10**15]
    ),
    "huge offsets": lambda h, a: h["shift"].update(data_offsets=[0, 2**62]),
    "negative offsets": lambda h, a: h["shift"].update(data_offsets=[-16, 0]),
    "swapped offsets": lambda h, a: h["shift"].update(data_offsets=h["shift"]["data_offsets"][::-1]),
    "overlapping offsets": lambda h, a: h["shift"].update(data_offsets=[0, 16]),
    "infinite offsets": lambda h, a: h["shift"].update(data_offsets=[0, math.inf]),
    "fractional offsets": lambda h, a: h["shift"].update(
        data_offsets=[o + 0.0 for o in h["shift"]["data_offsets"]]
    ),
    "three offsets": lambda h, a: h["shift"].update(data_offsets=[0, 8, 16]),
    "no offsets": lambda h, a: h["shift"].pop("data_offsets") and None,
    "shape of true": lambda h, a: h["shift"].update(shape=[True, 2]),
    "shape of fractions": lambda h, a: h["shift"].update(shape=[1.0, 2.0]),
    "float32": lambda h, a: h["shift"].update(dtype="F32"),
    "int64": lambda h, a: h["shift"].update(dtype="I64"),
    "dtype of list": lambda h, a: h["shift"].update(dtype=["F64"]),
    "extra tensor": lambda h, a: h.update(extra=dict(h["shift"])),
    "missing tensor": lambda h, a: h.pop("shift") and None,
    "tensor of text": lambda h, a: h.update(shift="F64"),
    "metadata of list": lambda h, a: h.update(__metadata__=[1], keep=1),
    "metadata more": lambda h, a: h["__metadata__"].update(more=3),
    "no metadata": lambda h, a: h.pop("__metadata__") and None,
    "version of text": lambda h, a: a.update(version="1"),
    "version of true": lambda h, a: a.update(version=True),
    "version of NaN": lambda h, a: a.update(version=math.nan),
    "version far too large": lambda h, a: a.update(version=10**19),
    "version of 900 digits": lambda h, a: a.update(version=10**900),
    "version below 0": lambda h, a: a.update(version=-1),
    "count of fraction": lambda h, a: a.update(count=1.5),
    "name of list": lambda h, a: a.update(site_id=["s"]),
    "name of surrogates": lambda h, a: a.update(site_id="\ud800"),
    "name with a line": lambda h, a: a.update(site_id="a\nb"),
    "name too long": lambda h, a: a.update(site_id="x" * (NAME + 1)),
    "other field": lambda h, a: a.update(weight=1),
    "missing field": lambda h, a: a.pop("count") and None,
    "nested JSON": lambda h, a: "[" * 2000 + "]" * 2000,
    "nested JSON inside": lambda h, a: json.dumps(
        {"__metadata__": {"fspace site 1": "[" * 1500 + "]" * 1500}}
    ),
    "JSON of a number": lambda h, a: "3",
    "JSON of null": lambda h, a: "null",
    "no JSON": lambda h, a: "{",
    "no text": lambda h, a: b"\xff\xfe\x00",
    "header too long": lambda h, a: json.dumps(h) + " " * HEADER,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_headers_are_refused(kind):
    data = with_header(HOSTILE[kind])
    tracemalloc.start()
    with pytest.raises(SiteRefused):
        check_site(site_from_bytes(data, SMALL), SMALL)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6


def test_the_unchanged_header_is_taken():
    """So that the refusals are for what was changed."""
    assert same(site_from_bytes(with_header(lambda h, a: None), SMALL), small_site())


def test_a_header_that_claims_more_than_it_brings_never_reaches_the_allocation(monkeypatch):
    called = []
    monkeypatch.setattr("fspace.server.wire.read_tensors", lambda data: called.append(len(data)))
    for kind in ("huge shape", "huge shape and offsets", "huge offsets", "float32", "extra tensor"):
        with pytest.raises(SiteRefused):
            site_from_bytes(with_header(HOSTILE[kind]), SMALL)
    for size in (2**63, 2**40, HEADER + 1):
        with pytest.raises(SiteRefused):
            site_from_bytes(struct.pack("<Q", size) + b"{}" * 5000, SMALL)
    assert called == []


class Trap:
    """Unpickled, it would leave a trace."""

    sprung: list[int] = []

    def __reduce__(self):
        return (Trap.sprung.append, (1,))


def test_nothing_is_unpickled(tmp_path):
    torch.save(Trap(), tmp_path / "trap.pt")
    for data in (pickle.dumps(Trap()), (tmp_path / "trap.pt").read_bytes()):
        with pytest.raises(SiteRefused):
            site_from_bytes(data, SMALL)
        with pytest.raises(SiteRefused):
            basis_id_of(data)
        for read in (basis_from_bytes, WeightBasis.from_bytes):
            with pytest.raises(ModelFileError):
                read(data)
    assert Trap.sprung == []


def test_safetensors_of_something_else_are_refused():
    for tensors in ({}, {"weight": torch.zeros(3)}, {n: getattr(small_site(), n) for n in FIELDS}):
        with pytest.raises(SiteRefused):
            site_from_bytes(save(tensors), SMALL)
        with pytest.raises(ModelFileError):
            basis_from_bytes(save(tensors))


@pytest.mark.parametrize("form", [Form(1, 3), Form(2, 2), Form(1, 2, diagonal=True)], ids=str)
def test_a_site_of_another_form_is_refused(form):
    with pytest.raises(SiteRefused) as refused:
        site_from_bytes(site_bytes(small_site()), form)
    assert refused.value.reason == "shape"


# -- bases -----------------------------------------------------------------------------------------------------


def deep(gaussian):
    torch.manual_seed(3)
    extractor = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).double()
    kernel = DeepKernel(extractor, gaussian.basis.kernel).requires_grad_(False).eval()
    likelihood = gaussian_likelihood(2, 0.05, torch.device("cpu")).requires_grad_(False)
    with torch.no_grad():
        return Basis(kernel, extractor(gaussian.x[:9]), likelihood)


@pytest.mark.parametrize("kind", ["gaussian", "binary", "deep"])
def test_bases_round_trip(kind, gaussian, binary):
    basis = {"gaussian": gaussian.basis, "binary": binary.basis}.get(kind) or deep(gaussian)
    scaling = unit_scaling(basis)
    data = basis_bytes(basis, scaling)
    found, found_scaling = basis_from_bytes(data)
    assert found.id == basis.id
    assert form_of(found) == form_of(basis)
    x = gaussian.x[:6]
    torch.testing.assert_close(found.whiten(found.embed(x)), basis.whiten(basis.embed(x)), rtol=0, atol=0)
    assert found_scaling.mixing is None
    assert all(torch.equal(getattr(found_scaling, n), v) for n, v in vars(scaling).items() if n != "mixing")
    # the digest of the content tells whether a basis is registered again
    assert sorted(header_of(basis_bytes(found, found_scaling))[0]) == sorted(header_of(data)[0])


def test_a_basis_is_the_same_bytes_always(gaussian):
    scaling = unit_scaling(gaussian.basis)
    data = {basis_bytes(gaussian.basis, scaling) for _ in range(10)}
    again, _ = basis_from_bytes(next(iter(data)))
    assert len(data | {basis_bytes(again, scaling)}) == 1


def test_a_cut_or_flipped_basis_is_refused_or_the_same(gaussian):
    """A flip in the units of the data (the scaling) is not told by the basis' id; the server keeps a hash beside it."""
    basis = replace(gaussian.basis, inducing_inputs=gaussian.basis.inducing_inputs[:3])
    data = basis_bytes(basis, unit_scaling(basis))
    for end in list(range(300)) + list(range(300, len(data), 37)):
        with pytest.raises(ModelFileError):
            basis_from_bytes(data[:end])
    generator = torch.Generator().manual_seed(4)
    for _ in range(150):
        place, bit = (int(torch.randint(k, (), generator=generator)) for k in (len(data), 8))
        flipped = bytearray(data)
        flipped[place] ^= 1 << bit
        try:
            found, _ = basis_from_bytes(bytes(flipped))
        except ModelFileError:
            continue
        assert found.id == basis.id


@pytest.mark.parametrize("outputs", [10**12, 10**9, 0, -1, "2", None, 1.5])
def test_a_basis_that_claims_many_outputs_allocates_nothing(gaussian, outputs, monkeypatch):
    monkeypatch.setattr("fspace.saving.gaussian_likelihood", lambda *a: pytest.fail("allocated"))
    layout, numbers = header_of(basis_bytes(gaussian.basis, unit_scaling(gaussian.basis)))
    about = json.loads(layout["__metadata__"]["fspace basis 1"])
    about["outputs"] = outputs
    layout["__metadata__"]["fspace basis 1"] = json.dumps(about)
    text = json.dumps(layout).encode()
    with pytest.raises(ModelFileError):
        basis_from_bytes(struct.pack("<Q", len(text)) + text + numbers)


def test_weight_sites_and_bases_round_trip():
    basis = WeightBasis.of(torch.nn.Linear(3, 2), 0.5)
    assert WeightBasis.from_bytes(basis.to_bytes()).id == basis.id
    site = replace(random_site(form_of(basis)), basis_id=basis.id)
    assert same(site_from_bytes(site_bytes(site), form_of(basis)), site)
