"""DRAW: where its attention reads and writes, its bound, files, refusals."""

import numpy as np
import pytest
import torch

from fspace.errors import DataError, OptionError
from fspace.inference.amortized.attention import Grid, filters, grid_from, read, write
from fspace.inference.amortized.draw import DRAW
from fspace.inference.amortized.model import load

QUIET = {"progress": False}


def grid(x, y, stride=1.0, deviation=0.05, intensity=1.0):
    return Grid(*(torch.tensor([v]).double() for v in (x, y, stride, deviation, intensity)))


def test_attention_reads_and_writes_where_the_grid_says():
    image = torch.arange(48.0).double().reshape(1, 1, 6, 8)
    patch = read(image, grid(x=4.0, y=2.0), 3)  # columns 3 to 5, rows 1 to 3
    assert torch.allclose(patch[0, 0], image[0, 0, 1:4, 3:6], atol=1e-12)
    every_other = read(image, grid(x=3.0, y=2.0, stride=2.0), 3)  # columns 1, 3, 5 and rows 0, 2, 4
    assert torch.allclose(every_other[0, 0], image[0, 0, 0:5:2, 1:6:2], atol=1e-12)
    assert torch.allclose(read(image, grid(4.0, 2.0, intensity=2.5), 3), 2.5 * patch)
    canvas = write(patch, grid(x=4.0, y=2.0), 6, 8)
    expected = torch.zeros(6, 8).double()
    expected[1:4, 3:6] = patch[0, 0]
    assert torch.allclose(canvas[0, 0], expected, atol=1e-12)
    assert not torch.allclose(write(patch, grid(x=3.0, y=2.0), 6, 8)[0, 0], expected)  # the twin
    wide = read(image, grid(3.5, 2.5, deviation=100.0), 2)  # sees the mean everywhere
    assert torch.allclose(wide, torch.full_like(wide, image.mean()), atol=0.05)


def test_zeros_look_at_the_whole_image_and_filters_sum_to_one():
    whole = grid_from(torch.zeros(1, 5).double(), 9, 9, 3)
    assert (whole.x.item(), whole.y.item(), whole.stride.item(), whole.deviation.item()) == (
        4.0,
        4.0,
        4.0,
        1.0,
    )
    for centre in (-1000.0, 0.0, 4.0, 1e6):
        found = filters(torch.tensor([centre]).double(), whole, 3, 9)
        assert torch.allclose(found.sum(-1), torch.ones(1, 3).double())


def squares(n=200, seed=0):
    """A 3 x 3 square somewhere on 8 x 8."""
    rng = np.random.default_rng(seed)
    x = np.zeros((n, 1, 8, 8), np.float32)
    for k, (r, c) in enumerate(rng.integers(0, 6, (n, 2))):
        x[k, 0, r : r + 3, c : c + 3] = 1.0
    return x


@pytest.mark.parametrize("patch", [pytest.param(3, marks=pytest.mark.slow), 0])
def test_learns_squares(patch):
    """Much better than columns by themselves, and its samples are squares: nine bright pixels."""
    x = squares(400)
    model = DRAW(4, 32, steps=4, patch=patch, device="cpu")
    model.fit(x, epochs=50, learning_rate=5e-3, batch_size=50, **QUIET)
    chance = x.mean(0).clip(0.01, 0.99)
    alone = (x * np.log(chance) + (1 - x) * np.log(1 - chance)).sum((1, 2, 3)).mean()
    assert model.log_likelihood(squares(50, 1), 50).mean() > alone + 8
    assert (model.reconstruct(x) - torch.tensor(x)).square().mean() < 0.4 * x.var()
    assert model.canvases(3, seed=0).shape == (4, 3, 1, 8, 8)
    assert torch.equal(model.canvases(3, seed=0)[-1], model.sample(3, seed=0))


def test_the_bound_is_below_importance_sampling_and_both_densities_agree(tmp_path):
    """Mean of log q - log p is the KL (four standard errors); log p by many samples is above the bound."""
    x = squares(20)
    model = DRAW(3, 16, steps=3, device="cpu").fit(x, epochs=2, **QUIET)
    with torch.no_grad():
        made = model.draw_from(torch.tensor(x), 2000, torch.Generator().manual_seed(0))
    gap = (made.proposal - made.prior - made.divergence).double()
    assert (gap.mean().abs() < 4 * gap.std() / gap.numel() ** 0.5) and made.divergence.mean() > 0
    (rows,) = model.rows_like_fitted(x)
    bounds = torch.stack([model.score((rows,), torch.Generator().manual_seed(k)) for k in range(50)])
    assert model.log_likelihood(x, 500).mean() > bounds.mean()
    again = load(model.save(tmp_path / "d.amortized"), "cpu")
    assert torch.equal(again.log_likelihood(x, 20), model.log_likelihood(x, 20))


def test_bad_input_is_named():
    for bad, words in (
        (squares(3)[:, 0], "images"),
        (squares(3) * 2, "from 0 to 1"),
        (squares(3) * np.nan, "NaN"),
    ):
        with pytest.raises(DataError, match=words):
            DRAW().fit(bad, **QUIET)
    for wrong in ({"steps": 0}, {"patch": -1}, {"likelihood": "categorical"}):
        with pytest.raises(OptionError):
            DRAW(**wrong)
