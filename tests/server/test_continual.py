"""Task after task: what is remembered, what is lost, what is forgotten on request, and by what a twin is undone."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from sklearn.datasets import load_digits
from torch import nn

from fspace.errors import DataError, FspaceError, NotFittedError, OptionError, ServerError
from fspace.inference.basis import Site
from fspace.inference.collapsed import fit_site
from fspace.inference.dirichlet import DirichletLikelihood
from fspace.inference.likelihoods import OffsetLikelihood, SoftmaxLikelihood, with_offset
from fspace.inference.sites import converge
from fspace.kernels import DeepKernel
from fspace.server import ContinualClassifier, PosteriorServer, WeightBasis, fit, learn_task
from fspace.server.continual import Tasks
from fspace.server.natural import divergence


def server_with(basis, path=None):
    server = PosteriorServer(path)
    server.register_basis(basis)
    return server


def differences(one, other):
    """Largest relative difference of natural parameters."""
    return max(
        ((getattr(one, name) - getattr(other, name)).abs().max() / getattr(other, name).abs().max()).item()
        for name in ("precision", "shift", "log_scale")
    )


# -- learn_task -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_gaussian_tasks_in_any_order_make_the_posterior_of_all_rows(gaussian, order):
    server = server_with(gaussian.basis)
    for k in order:
        learned = learn_task(server, *gaussian.shard(k, 4), f"task {k}")
        assert learned == (f"task {k}", 100, 30, 0.0)
    pooled = fit_site(gaussian.basis, gaussian.x, gaussian.y)
    assert differences(server.total(), pooled) < 1e-10
    without = fit_site(
        gaussian.basis, *(torch.cat(v) for v in zip(*(gaussian.shard(k, 4) for k in order[:3])))
    )
    assert differences(server.total(), without) > 1e-3  # the twin: a task less is told apart


def test_a_gaussian_task_that_is_removed_was_never_there(gaussian):
    server = server_with(gaussian.basis)
    for k in range(4):
        learn_task(server, *gaussian.shard(k, 4), f"task {k}")
    server.remove("task 1")
    rest = [gaussian.shard(k, 4) for k in (0, 2, 3)]
    assert differences(server.total(), fit_site(gaussian.basis, *map(torch.cat, zip(*rest)))) < 1e-9
    learn_task(server, *gaussian.shard(1, 4), "task 1")  # and may come again
    assert differences(server.total(), fit_site(gaussian.basis, gaussian.x, gaussian.y)) < 1e-9


def test_bernoulli_tasks_in_turn_come_near_the_posterior_of_all_rows(binary):
    """Each task's site is found once, against those before it. Measured: 0.08 and 0.12 nats from the joint
    posterior over 25 inducing values; the last task alone is 23 and 38 nats from it."""
    pooled, _ = converge(binary.basis, binary.x, binary.y, tolerance=1e-9)
    for order in ((0, 1, 2, 3), (2, 3, 1, 0)):
        server = server_with(binary.basis)
        for k in order:
            learn_task(server, *binary.shard(k, 4), f"task {k}")
        assert divergence(server.total(), pooled) < 0.2
        last = server.get(f"task {order[-1]}")
        assert divergence(replace(last, basis_id=pooled.basis_id), pooled) > 2.0


def test_softmax_tasks_in_turn_come_near_the_posterior_of_all_rows(binary):
    """Measured: 3.9 nats from the joint posterior over 75 inducing values, where the last task alone is 61 from it.
    What is missing is that early sites were found without the later ones: workers that hold the rows still, and go
    on from these sites, close the gap."""
    labels = (binary.y + (binary.x[:, :1] > 0.7)).double()
    likelihood = with_offset(SoftmaxLikelihood(num_classes=3, mixing_weights=False), labels)
    basis = replace(binary.basis, likelihood=likelihood.requires_grad_(False))
    pooled, _ = converge(basis, binary.x, labels, tolerance=1e-9)
    server = server_with(basis)
    for k in range(4):
        learn_task(server, binary.x[k::4], labels[k::4], f"task {k}")
    once = divergence(server.total(), pooled)
    assert once < 5.0 and divergence(server.get("task 3"), pooled) > 30.0
    fit({f"task {k}": (binary.x[k::4], labels[k::4]) for k in range(4)}, basis, server=server)
    assert divergence(server.total(), pooled) < 0.05


def test_inducing_inputs_that_join_change_nothing_of_what_was_known(gaussian):
    server = server_with(replace(gaussian.basis, inducing_inputs=gaussian.x[:10].clone()))
    near, far = gaussian.x[:100], gaussian.x[100:] + 4.0
    assert learn_task(server, near, gaussian.y[:100], "near", inducing=60).inducing > 10
    before = Tasks.on(server)
    probe = torch.cat([near[:20], far[:20]])
    expected = before.posterior.latent(probe)
    after, lost = before.with_room_for(far, 400)
    found = after.posterior.latent(probe)
    assert len(after.basis.inducing_inputs) > len(before.basis.inducing_inputs) and lost == 0.0
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found.variance, expected.variance, rtol=1e-6, atol=1e-7)


def test_what_dropped_inducing_inputs_lose_is_measured(gaussian):
    """Against the divergence of dense Gaussians over all inducing values, new ones and old."""
    server = server_with(gaussian.basis)
    learn_task(server, gaussian.x[:200], gaussian.y[:200], "near")
    before = Tasks.on(server)
    far = gaussian.x[200:] + 2.0
    after, lost = before.with_room_for(far, 30)
    assert len(after.basis.inducing_inputs) == 30
    z = torch.cat([before.basis.inducing_inputs, after.basis.inducing_inputs])
    z = torch.unique(z, dim=0)
    expected = 0.0
    for t in range(2):
        one, other = (tasks.posterior.latent(z) for tasks in (before, after))
        first, second = (g.covariance[t] + 1e-9 * torch.eye(len(z)).double() for g in (one, other))
        gap = (other.mean - one.mean)[:, t]
        both = torch.distributions.MultivariateNormal
        expected += torch.distributions.kl_divergence(
            both(one.mean[:, t], first), both(one.mean[:, t] + gap, second)
        ).item()
    assert lost > 0.05
    assert lost == pytest.approx(expected, rel=0.02)
    assert before.with_room_for(far, 60)[1] < lost  # a larger budget loses less


def test_old_tasks_fade_where_the_world_drifts(gaussian):
    """The function changes its sign. With discount 1 the two tasks cancel; with 0.1 the new one is believed."""
    x, y = gaussian.x, gaussian.y
    errors = {}
    for discount in (1.0, 0.1):
        server = server_with(gaussian.basis)
        learn_task(server, x[:200], y[:200], "before")
        learn_task(server, x[200:], -y[200:], "after", discount=discount)
        mean = server.posterior().latent(x[200:]).mean
        errors[discount] = (mean + y[200:]).square().mean().sqrt().item()
        assert server.get("before").version == (0 if discount == 1 else 1)
    assert errors[0.1] < 0.35 < 0.5 < errors[1.0]
    faded = fit_site(gaussian.basis, x[:200], y[:200])
    torch.testing.assert_close(server.get("before").precision, 0.1 * faded.precision)


def test_a_task_that_was_cut_off_is_learned_by_the_same_call(gaussian, tmp_path, monkeypatch):
    """The process dies between the sites of a new basis: the old posterior serves, and the next process completes."""
    path = tmp_path / "tasks.db"
    rows = gaussian.x[100:200] + 3.0, gaussian.y[100:200]
    server = server_with(gaussian.basis, path)
    learn_task(server, *gaussian.shard(0, 4), "first")
    learn_task(server, *gaussian.shard(1, 4), "second")
    whole, before = server_with(gaussian.basis), server.total()
    for k, name in enumerate(["first", "second"]):
        learn_task(whole, *gaussian.shard(k, 4), name)
    learn_task(whole, *rows, "third", inducing=60)

    puts, put = [], server.put

    def dies(site):
        puts.append(site.site_id)
        if len(puts) == 3:
            raise KeyboardInterrupt
        return put(site)

    monkeypatch.setattr(server, "put", dies)
    with pytest.raises(KeyboardInterrupt):
        learn_task(server, *rows, "third", inducing=60)
    assert puts == ["third", "first", "second"]
    server.close()
    with PosteriorServer(path) as again:
        assert again.total().basis_id == before.basis_id and set(Tasks.on(again).sites) == {"first", "second"}
        assert differences(again.total(), before) < 1e-14
        learn_task(again, *rows, "third", inducing=60)
        assert set(Tasks.on(again).sites) == {"first", "second", "third"}
        assert differences(again.total(), whole.total()) < 1e-12


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"task": "first"}, OptionError, "learned already"),
        ({"task": ""}, OptionError, "name"),
        ({"task": 3}, OptionError, "name"),
        ({"task": "x" * 201}, OptionError, "200"),
        ({"x": torch.zeros(5, 3)}, DataError, "shape"),
        ({"x": torch.tensor([[0.0, float("nan")]] * 5)}, DataError, "NaN"),
        ({"x": torch.zeros(0, 2), "y": torch.zeros(0, 2)}, DataError, "no rows"),
        ({"y": torch.full((5, 2), float("inf"))}, DataError, "infinite"),
        ({"y": torch.zeros(4, 2)}, DataError, "shape"),
        ({"inducing": 0}, OptionError, "inducing"),
        ({"discount": 0.0}, OptionError, "discount"),
        ({"discount": 1.5}, OptionError, "discount"),
        ({"discount": float("nan")}, OptionError, "discount"),
    ],
)
def test_what_is_refused_changes_nothing(gaussian, change, kind, words):
    server = server_with(gaussian.basis)
    learn_task(server, *gaussian.shard(0, 4), "first")
    before = server.total()
    given = {"x": torch.zeros(5, 2), "y": torch.zeros(5, 2), "task": "second", "inducing": 40} | change
    with pytest.raises(kind, match=words):
        learn_task(server, **given)
    assert list(Tasks.on(server).sites) == ["first"] and len(server.forms()) == 1
    assert torch.equal(server.total().shift, before.shift)


def test_a_server_without_a_basis_of_inducing_values_is_refused():
    server = PosteriorServer()
    with pytest.raises(ServerError, match="register"):
        learn_task(server, torch.zeros(3, 2), torch.zeros(3), "task")
    server.register_basis(WeightBasis.of(nn.Linear(2, 1)))
    with pytest.raises(ServerError, match="weights"):
        learn_task(server, torch.zeros(3, 2), torch.zeros(3), "task")


# -- labels as Gaussian observations ---------------------------------------------------------------------------


def dirichlet_basis(binary, classes):
    inner = DirichletLikelihood(classes)
    offset = torch.full((classes,), inner.unlabelled, dtype=torch.float64)
    return replace(binary.basis, likelihood=OffsetLikelihood(inner, offset).requires_grad_(False))


def test_dirichlet_labels_are_a_heteroscedastic_regression(binary):
    """With all rows as inducing inputs: the exact posterior of a Gaussian process whose noise differs by label."""
    x, y = binary.x[:40], binary.y[:40]
    basis = replace(dirichlet_basis(binary, 2), inducing_inputs=x)
    server = server_with(basis)
    learn_task(server, x[:25], y[:25], "a")
    learn_task(server, x[25:], y[25:], "b")
    latent = server.posterior().latent(binary.x[40:60])
    k = basis.kernel(torch.cat([x, binary.x[40:60]])).to_dense()
    for c in range(2):
        a = 0.01 + (y[:, 0] == c).double()
        noise = torch.log(1 / a + 1)
        target = torch.log(a) - noise / 2
        gain = torch.linalg.solve(k[:40, :40] + noise.diag(), k[:40, 40:]).mT
        level = np.log(0.01) - np.log(101) / 2
        mean = level + gain @ (target - level)
        variance = k[40:, 40:].diagonal() - (gain * k[40:, :40]).sum(1)
        torch.testing.assert_close(latent.mean[:, c], mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(latent.variance[:, c], variance, rtol=1e-6, atol=1e-6)


def test_dirichlet_tasks_in_any_order_make_the_posterior_of_all_rows(binary):
    basis = dirichlet_basis(binary, 3)
    pooled, bound = converge(basis, binary.x, binary.y, tolerance=1e-12)
    for order in ((0, 1, 2), (2, 0, 1)):
        server = server_with(basis)
        for k in order:
            learn_task(server, *binary.shard(k, 3), f"task {k}")
        assert differences(server.total(), pooled) < 1e-10
        assert server.log_evidence() == pytest.approx(bound, abs=1e-7)
    server.remove("task 1")
    rest = [torch.cat(v) for v in zip(binary.shard(0, 3), binary.shard(2, 3))]
    assert differences(server.total(), converge(basis, *rest)[0]) < 1e-9


def test_dirichlet_concentration_must_be_positive():
    for concentration in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(OptionError, match="positive"):
            DirichletLikelihood(3, concentration)


# -- ContinualClassifier -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return X / 16.0, y


def halves(X, y, k):
    """Rows of the k-th pair of digits, to learn from and to test on."""
    rows = np.flatnonzero(y // 2 == k)
    return X[rows[::2]], y[rows[::2]], X[rows[1::2]], y[rows[1::2]]


def test_five_pairs_of_digits_in_turn_where_fine_tuning_forgets(digits):
    """No row says of which task it is. The twin is a network that is trained on one task after another."""
    model = ContinualClassifier(inducing=250)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    right_after = {}
    for k in range(5):
        X, y, X_test, y_test = halves(*digits, k)
        model.learn(X, y, f"pair {k}")
        x, labels = torch.tensor(X, dtype=torch.float32), torch.tensor(y)
        for _ in range(60):
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(x), labels).backward()
            optimiser.step()
        twin = network(torch.tensor(X_test, dtype=torch.float32)).argmax(1).numpy()
        right_after[k] = model.score(X_test, y_test), (twin == y_test).mean()
    assert model.classes_.tolist() == list(range(10))
    assert list(model.tasks_) == [f"pair {k}" for k in range(5)]
    X_test, y_test = halves(*digits, 0)[2:]
    twin = network(torch.tensor(X_test, dtype=torch.float32)).argmax(1).numpy()
    assert min(right_after[0]) > 0.97
    assert model.score(X_test, y_test) > right_after[0][0] - 0.05
    assert (twin == y_test).mean() < 0.5
    everything = [halves(*digits, k) for k in range(5)]
    assert np.mean([model.score(h[2], h[3]) for h in everything]) > 0.95
    told = [(model.predict(h[2], task=f"pair {k}") == h[3]).mean() for k, h in enumerate(everything)]
    assert min(told) > 0.97


def blobs(*classes, seed=0, n=30):
    """Rows around a centre of each class."""
    generator = np.random.default_rng(seed)
    centres = {name: np.array(at) for name, at in zip("abcd", [(0, 0), (4, 0), (0, 4), (4, 4)])}
    X = np.concatenate([centres[c] + generator.normal(size=(n, 2)) for c in classes])
    return X, np.repeat(list(classes), n)


def test_a_class_that_comes_later_is_as_if_it_had_been_known():
    """The order in which classes come leaves nothing behind, on the same inducing inputs."""
    kernel = ScaleKernel(RBFKernel()).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = 2.0, 5.0
    parts = [blobs("a", "b"), blobs("c", "b", seed=1), blobs("d", seed=2)]
    probe = np.random.default_rng(3).uniform(-1, 5, size=(50, 2))
    found = []
    for order in ((0, 1, 2), (2, 1, 0)):
        model = ContinualClassifier(kernel=kernel, inducing=1000)
        for k in order:
            model.learn(*parts[k], f"part {k}")
        assert model.classes_.tolist() == ["a", "b", "c", "d"]
        found.append(model.predict_proba(probe))
    # inducing inputs were chosen in another order: the rest is their approximation
    np.testing.assert_allclose(found[0], found[1], atol=0.03)
    assert (
        abs(found[0] - model.forget("part 2").learn(*blobs("d", seed=5), "other").predict_proba(probe)).max()
        > 0.03
    )


def test_functions_of_new_classes_are_what_knowing_them_before_gives(binary):
    """The sites of old tasks, moved to more classes, equal those of a likelihood that knew all classes."""
    X, y = binary.x.numpy()[:60], np.repeat([1, 4], 30)
    model = ContinualClassifier(inducing=40).learn(X, y, "old")
    old = Tasks.on(model.server_)
    tasks, labels, _ = model._known(binary.x, np.array([3, 1]))
    assert labels.tolist() == [1, 4, 3]
    rows = old.scaling.inputs(binary.x[:60]), torch.tensor(y == 4).double()[:, None]
    exact, _ = converge(tasks.basis, *rows, tolerance=1e-12)
    assert differences(tasks.sites["old"], exact) < 1e-10


def test_a_task_that_is_forgotten_leaves_its_classes():
    model = ContinualClassifier()
    model.learn(*blobs("a", "b"), "one").learn(*blobs("c", seed=1), "two")
    probe = np.array([[0.0, 4.0], [0.0, 0.0]])
    assert model.predict(probe).tolist() == ["c", "a"]
    model.forget("two")
    assert model.classes_.tolist() == ["a", "b"] and model.tasks_ == {"one": 60}
    assert model.predict_proba(probe).shape == (2, 2)
    model.learn(*blobs("c", seed=1), "two")
    assert model.predict(probe).tolist() == ["c", "a"]
    model.forget("one").forget("two")
    with pytest.raises(NotFittedError):
        model.predict(probe)
    model.learn(*blobs("d", "a", seed=2), "three")
    assert model.classes_.tolist() == ["a", "d"]


def test_another_process_goes_on(tmp_path):
    path = tmp_path / "tasks.db"
    with PosteriorServer(path) as server:
        ContinualClassifier(server).learn(*blobs("a", "b"), "one")
    program = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from test_continual import blobs\n"
        "from fspace.server import ContinualClassifier, PosteriorServer\n"
        "with PosteriorServer(sys.argv[1]) as server:\n"
        "    ContinualClassifier(server).learn(*blobs('c', 'd', seed=1), 'two')\n"
    )
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", program, str(path), here], check=True, env=dict(os.environ))
    same = ContinualClassifier().learn(*blobs("a", "b"), "one").learn(*blobs("c", "d", seed=1), "two")
    probe = np.random.default_rng(3).uniform(-1, 5, size=(50, 2))
    with PosteriorServer(path) as server:
        model = ContinualClassifier(server)
        assert model.tasks_ == {"one": 60, "two": 60} and model.classes_.tolist() == ["a", "b", "c", "d"]
        np.testing.assert_allclose(model.predict_proba(probe), same.predict_proba(probe), atol=1e-9)


def test_features_that_were_learned_elsewhere():
    extractor = nn.Sequential(nn.Flatten(), nn.Linear(2, 6), nn.Tanh())
    kernel = DeepKernel(extractor, ScaleKernel(RBFKernel()), num_features=6, input_dims=3)
    X, y = blobs("a", "b")
    kernel.fix_statistics(torch.tensor(X, dtype=torch.float32).reshape(-1, 1, 1, 2))
    images = X.reshape(-1, 1, 1, 2)
    model = ContinualClassifier(kernel=kernel).learn(images, y, "one")
    more, labels = blobs("d", seed=1)
    model.learn(more.reshape(-1, 1, 1, 2), labels, "two")
    assert (
        model.score(np.concatenate([images, more.reshape(-1, 1, 1, 2)]), np.concatenate([y, labels])) > 0.95
    )
    with pytest.raises(DataError, match="shape"):
        model.predict(np.zeros((3, 1, 2, 2)))


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda m: m.learn(*blobs("c"), "one"), OptionError, "learned already"),
        (lambda m: m.learn(np.zeros((3, 3)), ["a"] * 3, "two"), DataError, "first task"),
        (lambda m: m.learn(np.full((3, 2), np.nan), ["a"] * 3, "two"), DataError, "NaN"),
        (lambda m: m.learn(np.zeros((3, 2)), ["a"] * 2, "two"), DataError, "rows"),
        (lambda m: m.learn(np.zeros((3, 2)), [1, 2, 3], "two"), DataError, "alike"),
        (lambda m: m.learn(np.zeros((3, 2)), ["a", None, "b"], "two"), DataError, "missing"),
        (lambda m: m.learn(np.zeros((0, 2)), [], "two"), DataError, "shape"),
        (lambda m: m.forget("two"), OptionError, "no task 'two'"),
        (lambda m: m.predict(np.zeros((3, 2)), task="two"), OptionError, "no task 'two'"),
        (lambda m: m.predict(np.zeros((3, 4))), DataError, "first task"),
        (lambda m: m.predict(np.full((3, 2), np.inf)), DataError, "infinite"),
        (lambda m: m.set_params(inducing=None).learn(*blobs("c"), "two"), OptionError, "inducing"),
        (lambda m: m.set_params(discount=2.0).learn(*blobs("c"), "two"), OptionError, "discount"),
        (lambda m: m.set_params(server="file").learn(*blobs("c"), "two"), OptionError, "server"),
    ],
)
def test_what_a_classifier_refuses(call, kind, words):
    model = ContinualClassifier(inducing=50).learn(*blobs("a", "b"), "one")
    probe = np.array([[0.0, 1.0]])
    before = model.predict_proba(probe)
    with pytest.raises(kind, match=words):
        call(model)
    model.set_params(inducing=50, discount=1.0, server=None)
    assert model.tasks_ == {"one": 60} and np.array_equal(model.predict_proba(probe), before)


def test_what_a_first_task_refuses(gaussian):
    with pytest.raises(NotFittedError):
        ContinualClassifier().predict(np.zeros((2, 2)))
    with pytest.raises(OptionError, match="DeepKernel"):
        ContinualClassifier().learn(np.zeros((2, 1, 3, 3)), [0, 1], "one")
    with pytest.raises(OptionError, match="kernel"):
        ContinualClassifier(kernel="rbf").learn(np.zeros((2, 3)), [0, 1], "one")
    server = server_with(gaussian.basis)
    learn_task(server, *gaussian.shard(0, 4), "task")
    with pytest.raises(FspaceError, match="another"):
        ContinualClassifier(server).learn(np.zeros((2, 2)), [0, 1], "one")


# -- the other family: elastic weight consolidation is a product of diagonal sites over weights -----------------


def test_elastic_weight_consolidation_is_sites_over_weights():
    """The log of the server's product of sites is the penalty of Kirkpatrick et al. (2017), eq. 3, up to a constant."""
    torch.manual_seed(0)
    module = nn.Linear(3, 2).double()
    basis, strength = WeightBasis.of(module, prior_scale=1.0), 7.0
    server = server_with(basis)
    old = []
    for k in range(3):
        nn.init.normal_(module.weight)
        fisher, weights = torch.rand(basis.size).double(), basis.coordinates(module)
        old.append((fisher, weights))
        none = torch.zeros(1, dtype=torch.float64)
        precision = strength * fisher
        server.put(Site(basis.id, precision[None], (precision * weights)[None], none, 1, f"task {k}"))
    total = server.total()

    def product(w):
        return (-0.5 * total.precision[0] * w.square() + total.shift[0] * w).sum()

    def textbook(w):
        return sum((0.5 * strength * fisher * (w - weights).square()).sum() for fisher, weights in old)

    one, other = torch.randn(2, basis.size).double()
    assert (product(one) - product(other)).item() == pytest.approx((textbook(other) - textbook(one)).item())
