"""Images and sequences that are read from disk, of different lengths, or from a torch data set."""

import numpy as np
import pytest
import torch
from gpytorch.kernels import MaternKernel
from sklearn.datasets import load_digits

import fspace
from fspace.errors import DataError
from fspace.inference.source import AT_ONCE, RowSource
from fspace.kernels import CausalConv, ConvNet


def small_images():
    X, y = load_digits(return_X_y=True)
    keep = y < 3
    return (X[keep].reshape(-1, 1, 8, 8) / 16).astype(np.float32), y[keep]


def image_kernel():
    torch.manual_seed(0)
    return fspace.DeepKernel(ConvNet(1, (8, 16), out_features=4), MaternKernel(ard_num_dims=4))


def test_images_on_disk_are_fitted_as_images_in_memory(tmp_path):
    X, y = small_images()
    X.tofile(tmp_path / "x")
    on_disk = np.memmap(tmp_path / "x", np.float32, "r", shape=X.shape)
    options = {"kernel": image_kernel(), "members": 1, "inducing": 60}
    models = [fspace.GPClassifier(**options).fit(rows[:400], y[:400]) for rows in (X, on_disk)]
    probs = [model.predict_proba(X[400:]) for model in models]
    assert np.array_equal(*probs)
    assert (probs[0].argmax(1) == y[400:]).mean() > 0.95


class Pictures(torch.utils.data.Dataset):
    """Images and labels, one by one."""

    def __init__(self, X, y):
        self.X, self.y = X, y

    def __len__(self):
        return len(self.X)

    def __getitem__(self, i):
        return torch.from_numpy(self.X[i]), int(self.y[i])


def test_a_torch_data_set_is_fitted_as_its_arrays():
    X, y = small_images()
    options = {"kernel": image_kernel(), "members": 1, "inducing": 60}
    whole = fspace.GPClassifier(**options).fit(X[:300], y[:300]).predict_proba(X[300:])
    model = fspace.GPClassifier(**options).fit(Pictures(X[:300], y[:300]))
    assert np.array_equal(model.predict_proba(Pictures(X[300:], y[300:])), whole)
    table = torch.utils.data.TensorDataset(torch.from_numpy(X[:60].reshape(60, -1)), torch.from_numpy(y[:60]))
    assert fspace.GPClassifier(kernel="rbf").fit(table).predict(table).shape == (60,)
    with pytest.raises(DataError, match="no pair"):
        fspace.GPRegressor(kernel="rbf").fit(torch.utils.data.TensorDataset(torch.ones(5, 2)))
    with pytest.raises(DataError, match="empty"):
        fspace.GPRegressor().fit(Pictures(X[:0], y[:0]))


def test_a_frozen_network_as_extractor_stays_as_it_is_and_a_free_one_is_tuned():
    X, y = small_images()
    for frozen in (True, False):
        kernel = image_kernel()
        before = {k: v.clone() for k, v in kernel.extractor.state_dict().items()}
        kernel.extractor.requires_grad_(not frozen)
        model = fspace.GPClassifier(kernel=kernel, members=1, inducing=40).fit(X[:200], y[:200])
        after = model.posterior_.basis.kernel.extractor.state_dict()
        assert all(torch.equal(before[k], after[k]) for k in before) == frozen


def test_sequences_of_different_lengths():
    rng = np.random.default_rng(0)
    sequences, y = [], []
    for _ in range(260):
        steps = rng.integers(5, 30)
        rows = rng.standard_normal((steps, 2))
        sequences.append(rows)
        y.append(rows[-1, 0] - 0.5 * rows[-2, 1])
    y = np.array(y)
    torch.manual_seed(0)
    kernel = fspace.DeepKernel(CausalConv(2, 16, (1, 2), out_features=4), MaternKernel(ard_num_dims=4))
    model = fspace.GPRegressor(kernel=kernel, members=1).fit(sequences[:200], y[:200])
    error = np.sqrt(np.mean((model.predict(sequences[200:]) - y[200:]) ** 2))
    assert error < 0.5 * np.std(y)
    longer = [np.concatenate([rows, np.full((7, 2), np.nan)]) for rows in sequences[200:]]
    assert np.allclose(model.predict(longer), model.predict(sequences[200:]))
    assert np.isfinite(model.relevance_).all() and model.relevance_.sum() == pytest.approx(1.0)
    assert (
        model.relevance_[0] > model.relevance_[1] + 0.1
    )  # the first channel counts twice as much as the second


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: s[3].__setitem__((0, 0), np.nan), "[Rr]ow 3"),
        (lambda s: s.__setitem__(2, s[2][:0]), "row 2 has no steps"),
        (lambda s: s.__setitem__(1, s[1][:, :1]), "one width"),
        (lambda s: s.__setitem__(1, np.full((4, 2), np.nan)), "row 1"),
    ],
)
def test_sequences_that_cannot_be_used_are_refused(spoil, words):
    rng = np.random.default_rng(0)
    sequences = [rng.standard_normal((4 + i % 3, 2)) for i in range(10)]
    spoil(sequences)
    kernel = fspace.DeepKernel(CausalConv(2, 4, (1,), out_features=2), MaternKernel())
    with pytest.raises(DataError, match=words):
        fspace.GPRegressor(kernel=kernel, members=1).fit(sequences, np.arange(10.0))


def test_a_source_reads_what_is_asked_and_no_more():
    values = np.arange(3 * (AT_ONCE + 10)).reshape(-1, 3).astype(np.float32)
    most = 0

    def read(rows):
        nonlocal most
        most = max(most, len(rows))
        assert (np.diff(rows) >= 0).all()  # forwards
        return values[rows]

    source = RowSource(read, np.arange(len(values)), (3,), torch.device("cpu"))
    assert source.shape == values.shape and source.ndim == 2 and len(source) == len(values)
    some = torch.tensor([5, 2, 2, AT_ONCE + 9])
    assert torch.equal(source[some], torch.from_numpy(values[some.numpy()]).double())
    many = source[torch.ones(len(values), dtype=torch.bool)]
    assert isinstance(many, RowSource) and len(many) == len(values)
    assert torch.equal(many[::5000], torch.from_numpy(values[::5000]).double())
    doubled = many.changed(lambda rows: 2 * rows)
    assert torch.equal(torch.cat(list(doubled.split(3000))), 2 * torch.from_numpy(values).double())
    assert most <= AT_ONCE
