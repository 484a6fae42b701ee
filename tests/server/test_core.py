"""The table of sites: replacement, refusals, removal, restarts, epochs; always in natural parameters."""

import sqlite3
import time
from dataclasses import replace

import pytest
import torch

from fspace.errors import FspaceError, OptionError, ServerError, SiteRefused
from fspace.inference.collapsed import fit_site, log_evidence
from fspace.server import PosteriorServer
from fspace.server.natural import Total, contribution, divergence, log_normaliser, moments


def sites_of(problem, k=4, order=None):
    return [
        replace(fit_site(problem.basis, *problem.shard(i, k)), site_id=f"s{i}") for i in (order or range(k))
    ]


def assert_same(one, other, tolerance=1e-10):
    for name in ("precision", "shift", "log_scale"):
        a, b = getattr(one, name), getattr(other, name)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
@pytest.mark.parametrize("on_disk", [False, True])
def test_shards_in_any_order_give_the_pooled_posterior(gaussian, order, on_disk, tmp_path):
    server = PosteriorServer(tmp_path / "server.db" if on_disk else None)
    server.register_basis(gaussian.basis)
    for site in sites_of(gaussian, 4, order):
        assert server.put(site).status == "accepted"
    pooled = fit_site(gaussian.basis, gaussian.x, gaussian.y)
    assert_same(server.total(), pooled)
    assert server.total().count == 400
    assert server.log_evidence() == pytest.approx(log_evidence([pooled]), rel=1e-10)
    mean = server.posterior().latent(gaussian.x[:5]).mean
    assert mean.shape == (5, 2)


def test_the_pooled_posterior_is_that_of_titsias(gaussian):
    """Against the formula of Titsias (2009), eq. 10, written with plain inverses."""
    server = PosteriorServer()
    server.register_basis(gaussian.basis)
    for site in sites_of(gaussian):
        server.put(site)
    k = lambda a, b: gaussian.basis.kernel(a, b).to_dense().detach()  # noqa: E731
    z, noise = gaussian.basis.inducing_inputs, 0.04
    kuu, kuf = k(z, z), k(z, gaussian.x)
    inner = torch.linalg.inv(kuu + kuf @ kuf.T / noise)
    at = gaussian.x[:7]
    mean = k(at, z) @ inner @ kuf @ gaussian.y[:, 0] / noise
    variance = torch.diagonal(k(at, at) - k(at, z) @ (torch.linalg.inv(kuu) - inner) @ k(z, at))
    found = server.posterior().latent(at)
    torch.testing.assert_close(found.mean[:, 0], mean, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(found.variance[:, 0], variance, atol=1e-7, rtol=1e-7)


def test_keyed_replacement(gaussian):
    server = PosteriorServer()
    server.register_basis(gaussian.basis)
    first, second = sites_of(gaussian, 2)
    server.put(first)
    server.put(second)
    before = server.total()
    assert server.put(first).status == "unchanged"
    assert_same(server.total(), before, 0.0)
    with pytest.raises(SiteRefused) as refused:
        server.put(replace(first, shift=first.shift * 2))
    assert refused.value.reason == "conflict"
    server.put(replace(first, version=5, shift=first.shift * 2))
    for version in (0, 4):
        with pytest.raises(SiteRefused) as refused:
            server.put(replace(first, version=version))
        assert refused.value.reason == "stale"
    server.put(replace(first, version=6))
    assert_same(server.total(), before)


def test_a_restarted_worker_counts_from_zero_and_its_old_messages_are_refused(gaussian):
    server = PosteriorServer()
    server.register_basis(gaussian.basis)
    (site, _) = sites_of(gaussian, 2)
    old = server.join("s0")
    server.put(replace(site, incarnation=old, version=9))
    new = server.join("s0")
    late = replace(site, incarnation=old, version=10, shift=3 * site.shift)
    with pytest.raises(SiteRefused) as refused:  # even before the new one has sent anything
        server.put(late)
    assert refused.value.reason == "incarnation"
    assert server.put(replace(site, incarnation=new, version=0)).status == "accepted"
    assert server.get("s0").version == 0


def test_removal_equals_the_fit_without(gaussian):
    server = PosteriorServer()
    server.register_basis(gaussian.basis)
    sites = sites_of(gaussian, 4)
    for site in sites:
        server.put(site)
    server.remove("s1")
    rest = [k for k in range(400) if k % 4 != 1]
    assert_same(server.total(), fit_site(gaussian.basis, gaussian.x[rest], gaussian.y[rest]), 1e-9)
    with pytest.raises(SiteRefused) as refused:
        server.put(replace(sites[1], version=7))
    assert refused.value.reason == "removed"
    with pytest.raises(SiteRefused):  # nor under an incarnation that nobody has heard of
        server.put(replace(sites[1], incarnation="other"))
    server.put(replace(sites[1], incarnation=server.join("s1")))
    assert server.total().count == 400


def test_a_large_site_leaves_no_rounding_behind(gaussian):
    """The twin, a plain running sum, does."""
    server = PosteriorServer()
    server.register_basis(gaussian.basis)
    small, other = sites_of(gaussian, 2)
    huge = replace(other, site_id="huge", precision=1e9 * other.precision, shift=1e9 * other.shift)
    server.put(small)
    server.put(huge)
    server.remove("huge")
    assert_same(server.total(), small, 1e-12)
    plain = small.precision + huge.precision - huge.precision
    assert (plain - small.precision).abs().max() > 1e-9 * small.precision.abs().max()


def test_two_thousand_replacements_do_not_drift(gaussian):
    server = PosteriorServer()
    server.register_basis(gaussian.basis)
    first, second = sites_of(gaussian, 2)
    server.put(second)
    for version in range(300):
        scale = 1.0 + 0.3 * (version % 7)
        server.put(replace(first, version=version, precision=scale * first.precision))
    server.put(replace(first, version=1000))
    assert_same(server.total(), fit_site(gaussian.basis, gaussian.x, gaussian.y), 1e-13)


def poisoned(site):
    nan, inf = site.shift.clone(), site.precision.clone()
    nan[0, 0], inf[0, 0, 0] = float("nan"), float("inf")
    lopsided = site.precision.clone()
    lopsided[0, 0, 1] += 1.0
    return {
        "nan": replace(site, shift=nan),
        "inf": replace(site, precision=inf),
        "huge": replace(site, shift=1e200 * site.shift),
        "shape": replace(site, shift=site.shift[:, 1:], precision=site.precision[:, 1:, 1:]),
        "float32": replace(site, shift=site.shift.float()),
        "basis": replace(site, basis_id="0" * 64),
        "negative": replace(site, precision=-1e6 * torch.eye(30).double().expand(2, 30, 30)),
        "lopsided": replace(site, precision=lopsided),
        "name": replace(site, site_id=""),
        "long_name": replace(site, site_id="x" * 1000),
        "version": replace(site, version=-1),
        "count": replace(site, count=-5),
    }


KINDS = "nan inf huge shape float32 basis negative lopsided name long_name version count".split()


@pytest.mark.parametrize("kind", KINDS)
def test_poisoned_sites_are_refused_and_change_nothing(gaussian, kind, tmp_path):
    path = tmp_path / "server.db"
    with PosteriorServer(path) as server:
        server.register_basis(gaussian.basis)
        one, two = sites_of(gaussian, 2)
        server.put(one)
        before, status = server.total(), server.status()["bases"]
        with pytest.raises(SiteRefused) as refused:
            server.put(poisoned(replace(two, site_id="s0", version=1))[kind])
        assert len(str(refused.value)) > 30
        assert_same(server.total(), before, 0.0)
        assert server.status()["bases"] == status
    with PosteriorServer(path) as server:
        assert_same(server.total(), before)


def test_an_indefinite_site_is_taken_as_far_as_total_and_cavities_allow(gaussian):
    server = PosteriorServer()
    server.register_basis(gaussian.basis)
    first, second = sites_of(gaussian, 2)
    server.put(first)
    eye = torch.eye(30, dtype=torch.float64).expand(2, 30, 30)
    mild = replace(second, precision=-0.5 * eye, site_id="mild")
    assert server.put(mild).step == 1.0
    strong = replace(second, precision=-1.5 * eye, site_id="strong")  # with `mild` gone already too much
    receipt = server.put(strong)
    assert 0 < receipt.step < 1
    assert torch.equal(server.get("strong").precision, receipt.step * strong.precision)
    for name in ("s0", "mild", "strong"):
        moments(server.cavity(name))  # raises where it is no Gaussian
    assert server.put(strong).status == "unchanged"  # told by what was sent, not by what was kept
    with pytest.raises(SiteRefused) as refused:
        server.put(replace(strong, precision=-1e9 * eye, version=1, site_id="worse"))
    assert refused.value.reason == "indefinite"
    # without "s0" the other two leave a Gaussian; they were checked to
    server.remove("s0")
    moments(server.total())


def test_cavity_and_site_make_the_total(gaussian):
    server = PosteriorServer()
    server.register_basis(gaussian.basis)
    sites = sites_of(gaussian, 3)
    for site in sites:
        server.put(site)
    assert_same(server.cavity("s1"), sites[0] + sites[2])
    assert_same(server.cavity("never seen"), server.total())
    total = server.total()
    shares = sum(contribution(total, site) for site in sites)
    prior = sum(torch.diagonal(moments(total)[1], dim1=-2, dim2=-1).sum(-1)).item()
    assert shares + prior == pytest.approx(2 * 30, rel=1e-9)


def test_everything_is_there_after_a_restart(gaussian, tmp_path):
    path = tmp_path / "server.db"
    with PosteriorServer(path) as server:
        server.register_basis(gaussian.basis)
        for site in sites_of(gaussian, 4):
            server.put(site)
        server.remove("s3")
        server.join("s2")
        server.attach("note", b"12")
        before, status = server.total(), server.status()["bases"]
    with PosteriorServer(path) as server:
        assert_same(server.total(), before, 1e-14)
        found = server.status()["bases"]
        assert found[0]["sites"] == status[0]["sites"]
        assert server.attachment("note") == b"12"
        for name in ("s3", "s2"):
            with pytest.raises(SiteRefused):
                server.put(replace(sites_of(gaussian, 4)[int(name[1])], version=3))
        assert server.posterior().latent(gaussian.x[:3]).mean.shape == (3, 2)


def damaged(path, how):
    data = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "text":
        path.write_bytes(b"this is no database at all\n" * 300)
    elif how == "other":
        path.unlink()
        sqlite3.connect(path).executescript("CREATE TABLE t (a); INSERT INTO t VALUES (1);")
    elif how == "number":  # one bit of one number of one site: SQLite itself does not notice
        db = sqlite3.connect(path)
        (content,) = db.execute("SELECT content FROM sites LIMIT 1").fetchone()
        content = content[:-20] + bytes([content[-20] ^ 16]) + content[-19:]
        db.execute("UPDATE sites SET content = ? WHERE rowid = (SELECT min(rowid) FROM sites)", (content,))
        db.commit()
        db.close()
    elif how == "row":  # the site of another contributor in a row
        db = sqlite3.connect(path)
        db.execute("UPDATE sites SET site_id = 'other' WHERE site_id = 's2'")
        db.commit()
        db.close()
    elif how == "schema":  # sqlite3 fails to decode its own message, which quotes the file
        path.write_bytes(data.replace(b"row_count", b"row\xd4coun"))
    elif how == "page":
        data[len(data) // 2 : len(data) // 2 + 4096] = b"\x5a" * 4096
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "text", "other", "number", "row", "schema", "page"])
def test_a_damaged_file_is_refused(gaussian, tmp_path, how):
    path = tmp_path / "server.db"
    with PosteriorServer(path) as server:
        server.register_basis(gaussian.basis)
        for site in sites_of(gaussian, 4):
            server.put(site)
    damaged(path, how)
    with pytest.raises(ServerError, match="damaged|another program"):
        PosteriorServer(path)


@pytest.mark.parametrize("name", ["", "a\nb", "a\u200b", 201 * "a", ".."])
def test_nobody_joins_under_a_name_that_no_site_can_have(gaussian, name):
    server = PosteriorServer()
    with pytest.raises(SiteRefused) as refused:
        server.join(name)
    assert refused.value.reason == "name"
    with pytest.raises(OptionError, match="no site"):  # nothing was kept
        server.remove(name)


def test_counts_of_many_contributors_stay_numbers_that_the_file_can_hold(gaussian, tmp_path):
    with PosteriorServer(tmp_path / "server.db") as server:
        server.register_basis(gaussian.basis)
        site = sites_of(gaussian, 4)[0]
        with pytest.raises(SiteRefused, match="whole number"):
            server.put(replace(site, count=10**18 - 1))
        server.put(replace(site, count=10**12 - 1))
        assert 1_000_000 * server.total().count < 2**63


def test_the_evidence_is_noted_though_the_clock_was_set_back(gaussian, monkeypatch):
    monkeypatch.setattr("fspace.server.core.EVIDENCE_EVERY", 0.0)
    server = PosteriorServer()
    server.register_basis(gaussian.basis)
    one, two, *_ = sites_of(gaussian, 4)
    server.put(one)
    now = time.time()
    monkeypatch.setattr("fspace.server.core.time.time", lambda: now - 86400.0)
    server.put(two)
    assert [note["sites"] for note in server.status()["evidence"]] == [1, 2]


def test_one_process_a_file(gaussian, tmp_path):
    with PosteriorServer(tmp_path / "server.db"):
        with pytest.raises(ServerError, match="in use"):
            PosteriorServer(tmp_path / "server.db")


def other_basis(basis):
    return replace(basis, inducing_inputs=basis.inducing_inputs + 0.1)


def test_an_epoch_serves_the_old_posterior_until_the_new_one_is_complete(gaussian, tmp_path):
    path = tmp_path / "server.db"
    server = PosteriorServer(path)
    server.register_basis(gaussian.basis)
    old = sites_of(gaussian, 2)
    for site in old:
        server.put(site)
    before = server.total()
    new_problem = replace(gaussian, basis=other_basis(gaussian.basis))
    server.register_basis(new_problem.basis)
    new = sites_of(new_problem, 2)
    server.put(new[0])
    assert_same(server.total(), before, 0.0)
    with pytest.raises(OptionError, match="not complete"):
        server.register_basis(other_basis(new_problem.basis))
    server.close()  # in the middle of the epoch
    server = PosteriorServer(path)
    assert_same(server.total(), before, 1e-14)
    server.put(new[1])
    assert server.total().basis_id == new_problem.basis.id
    assert_same(server.total(), fit_site(new_problem.basis, gaussian.x, gaussian.y))
    with pytest.raises(SiteRefused) as refused:
        server.put(replace(old[0], version=1))
    assert refused.value.reason == "basis"
    with pytest.raises(OptionError, match="had its epoch"):
        server.register_basis(gaussian.basis)
    server.close()
    server = PosteriorServer(path)
    assert server.total().basis_id == new_problem.basis.id


def test_an_epoch_ends_when_the_one_that_is_missing_leaves(gaussian):
    server = PosteriorServer()
    server.register_basis(gaussian.basis)
    for site in sites_of(gaussian, 2):
        server.put(site)
    new_problem = replace(gaussian, basis=other_basis(gaussian.basis))
    server.register_basis(new_problem.basis)
    server.put(sites_of(new_problem, 2)[0])
    server.remove("s1")
    assert server.total().basis_id == new_problem.basis.id
    assert server.total().count == 200


def test_an_abandoned_epoch_changes_nothing(gaussian):
    server = PosteriorServer()
    server.register_basis(gaussian.basis)
    for site in sites_of(gaussian, 2):
        server.put(site)
    before = server.total()
    new_problem = replace(gaussian, basis=other_basis(gaussian.basis))
    server.register_basis(new_problem.basis)
    server.put(sites_of(new_problem, 2)[0])
    server.abandon_epoch()
    assert_same(server.total(), before, 0.0)
    with pytest.raises(OptionError):
        server.abandon_epoch()


def test_the_same_basis_with_another_scaling_is_refused(gaussian, tmp_path):
    from fspace.server.core import unit_scaling

    server = PosteriorServer(tmp_path / "server.db")
    scaling = unit_scaling(gaussian.basis)
    server.register_basis(gaussian.basis, scaling)
    server.register_basis(gaussian.basis, scaling)
    with pytest.raises(OptionError, match="scaling"):
        server.register_basis(gaussian.basis, replace(scaling, y_shift=scaling.y_shift + 1))


def test_questions_before_there_is_a_basis():
    server = PosteriorServer()
    for question in (server.total, server.posterior, server.log_evidence, server.basis):
        with pytest.raises(FspaceError, match="no basis"):
            question()
    with pytest.raises(OptionError, match="no site"):
        server.remove("x")
    assert server.status()["bases"] == []


def test_divergence_against_torch(gaussian):
    one, other = sites_of(gaussian, 2)
    normal = torch.distributions.MultivariateNormal
    p, q = (normal(m, c) for m, c in (moments(one), moments(other)))
    expected = torch.distributions.kl_divergence(p, q).sum().item()
    assert divergence(one, other) == pytest.approx(expected, rel=1e-8)
    diagonal = [
        replace(s, precision=s.precision.diagonal(dim1=-2, dim2=-1).contiguous()) for s in (one, other)
    ]
    p, q = (torch.distributions.Normal(m, v.sqrt()) for m, v in map(moments, diagonal))
    expected = torch.distributions.kl_divergence(p, q).sum().item()
    assert divergence(*diagonal) == pytest.approx(expected, rel=1e-8)


def test_total_counts_every_site_once(gaussian):
    from fspace.server.core import form_of

    total = Total(form_of(gaussian.basis), gaussian.basis.id)
    sites = sites_of(gaussian, 3)
    for site in sites:
        total.add(site)
    total.add(sites[1], -1)
    assert_same(total.site(), sites[0] + sites[2])
    assert log_normaliser(total.site()) == pytest.approx(log_evidence([sites[0], sites[2]]), rel=1e-12)
