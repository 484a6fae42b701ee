"""What the plots draw is what the numbers say; and the report holds it all in one page."""

import re
from html.parser import HTMLParser
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from fspace import class_plots, plots
from fspace.canvas import curves_of, frame_of
from fspace.data import TableEncoder
from fspace.errors import DataError, OptionError
from fspace.posterior import FunctionDraws, FunctionPosterior
from fspace.predictive import Categorical, Gaussian
from fspace.report import CAPTIONS, input_relevance, report_html, write_report


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


class Linear(FunctionPosterior):
    """f(x) = w.x with independent Gaussian weights: everything is known in closed form."""

    def __init__(self, mean, variance=0.1, noise=0.5):
        self.w = torch.as_tensor(mean, dtype=torch.float64)  # [d] or [d, t]
        self.v, self.noise = variance, noise
        self.num_inputs, self.num_outputs = len(self.w), 1 if self.w.ndim == 1 else self.w.shape[1]
        self.batch_shape = torch.Size([])

    def _at(self, x, noise):
        mean = x @ self.w
        variance = self.v * x.square().sum(-1)
        variance = variance if self.w.ndim == 1 else variance[:, None].expand_as(mean)
        return Gaussian(mean, variance + noise, aleatoric=torch.full_like(mean, noise))

    def latent(self, x):
        return self._at(torch.as_tensor(x), 0.0)

    def observed(self, x):
        return self._at(torch.as_tensor(x), self.noise)

    def draw(self, n=1, seed=None):
        weights = self.w + self.v**0.5 * torch.randn(
            n, *self.w.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed or 0)
        )
        return FunctionDraws([lambda x, w=w: torch.as_tensor(x) @ w for w in weights])


def calibrated(n, factor=1.0, seed=0):
    """y, and a predictive whose deviations are `factor` times the true ones."""
    rng = np.random.default_rng(seed)
    mean, std = rng.normal(size=n), np.exp(0.5 * rng.normal(size=n))
    y = mean + std * rng.normal(size=n)
    return y, Gaussian(torch.tensor(mean), torch.tensor(factor * std) ** 2)


def line(ax, label):
    return next(item for item in ax.get_lines() if str(item.get_label()).startswith(label))


# ---- predicted and observed ------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 200, 3000])
def test_predicted_vs_observed_marks_what_lies_outside(n):
    y, predictive = calibrated(n)
    ax = plots.predicted_vs_observed(y, predictive, level=0.8)
    lower, upper = predictive.interval(0.8)
    out = (torch.tensor(y) < lower) | (torch.tensor(y) > upper)
    drawn = {c.get_label(): np.asarray(c.get_offsets()) for c in ax.collections}
    expected = np.column_stack([predictive.mean[out], y[out.numpy()]])
    np.testing.assert_allclose(drawn.get("outside", np.empty((0, 2))), expected)
    assert ("outside" in drawn) == bool(out.any())  # no key to what is not drawn
    assert len(drawn["inside"]) == n - int(out.sum())
    assert ax.get_title(loc="left").startswith(f"{1 - out.double().mean():.1%} of {n:,}")


def test_bars_are_the_intervals():
    y, predictive = calibrated(20)
    ax = plots.predicted_vs_observed(y, predictive)
    bars = next(c for c in ax.collections if "interval" in str(c.get_label()))
    lower, upper = predictive.interval(0.9)
    ends = np.array([path.vertices[:, 1] for path in bars.get_paths()])
    np.testing.assert_allclose(ends, torch.stack([lower, upper], 1))


def test_with_many_points_the_band_is_the_binned_interval():
    n = 6000
    mean = np.linspace(-1, 1, n)
    predictive = Gaussian(torch.tensor(mean), torch.full((n,), 4.0).double())
    ax = plots.predicted_vs_observed(mean, predictive)
    low = line(ax, "90% interval")
    np.testing.assert_allclose(low.get_ydata(), low.get_xdata() - 1.6448536 * 2, atol=1e-6)


# ---- calibration -----------------------------------------------------------------------------------


def step_of(ax):
    drawn = line(ax, "this model")
    return np.asarray(drawn.get_xdata()), np.asarray(drawn.get_ydata())


def test_calibration_counts_the_observations_inside():
    y, predictive = calibrated(300)
    level, share = step_of(plots.calibration(y, predictive))
    for p in (0.1, 0.5, 0.9):
        lower, upper = predictive.interval(p)
        inside = ((torch.tensor(y) >= lower) & (torch.tensor(y) <= upper)).double().mean()
        assert share[np.argmin(np.abs(level - p))] == pytest.approx(float(inside), abs=1e-12)


def outside_band(y, predictive):
    ax = plt.gca()
    ax.clear()
    level, share = step_of(plots.calibration(y, predictive, ax=ax))
    n = len(y)
    band = 1.358 / (np.sqrt(n) + 0.12 + 0.11 / np.sqrt(n))
    return bool((np.abs(share - level) > band).any())


def test_the_band_holds_95_percent_of_calibrated_models_and_few_others():
    runs = 200
    missed = sum(outside_band(*calibrated(200, seed=s)) for s in range(runs))
    # 5% expected; four standard errors of a share of 200 runs. A grid of levels can only miss fewer.
    assert missed / runs < 0.05 + 4 * np.sqrt(0.05 * 0.95 / runs)
    too_sure = sum(outside_band(*calibrated(200, 0.7, seed=s)) for s in range(50))
    assert too_sure > 40


# ---- errors and predicted deviations -----------------------------------------------------------------


def test_errors_follow_their_predicted_size_only_where_they_do():
    y, predictive = calibrated(6000)
    bins = plots.residuals_vs_std(y, predictive).containers[0].lines[0]
    np.testing.assert_allclose(bins.get_ydata(), bins.get_xdata(), rtol=0.25)
    # the twin: predicted deviations dealt out at random have nothing to do with the errors
    mixed = predictive.variance[torch.randperm(6000, generator=torch.Generator().manual_seed(0))]
    bins = plots.residuals_vs_std(y, Gaussian(predictive.mean, mixed)).containers[0].lines[0]
    assert np.ptp(bins.get_xdata()) > 5 * np.ptp(bins.get_ydata())


def test_equal_deviations_and_single_points_are_drawn():
    n = 50
    plots.residuals_vs_std(np.zeros(n), Gaussian(torch.zeros(n).double(), torch.ones(n).double()))
    y, predictive = calibrated(1)
    plots.residuals_vs_std(y, predictive).figure.canvas.draw()
    plots.calibration(y, predictive).figure.canvas.draw()


def test_both_axes_of_one_unit_have_one_power_of_ten():
    y, predictive = calibrated(60)
    large = Gaussian(3e6 + 3e6 * predictive.mean, 9e12 * predictive.variance)
    ax = plots.predicted_vs_observed(3e6 + 3e6 * y, large)
    ax.figure.canvas.draw()
    assert {axis.get_offset_text().get_text() for axis in (ax.xaxis, ax.yaxis)} == {"1e6"}


# ---- classes -----------------------------------------------------------------------------------------


def test_bars_and_ticks_of_classes_stay_within_what_a_share_can_be():
    predictive = Categorical(torch.tensor([[0.9, 0.1]]).expand(23, 2))
    ends = class_plots.reliability(np.zeros(23), predictive).containers[0].lines[2][0].get_segments()[0][:, 1]
    np.testing.assert_allclose(ends, [23 / (23 + 1.96**2), 1.0])  # Wilson's interval where all are right
    ax = class_plots.accuracy_rejection(np.arange(23) % 8 == 0, predictive)
    assert max(ax.get_yticks()) <= 1.0 + 1e-9


# ---- training ----------------------------------------------------------------------------------------


def test_stages_follow_one_another_and_the_best_held_out_point_is_marked():
    history = [{"stage": "a", "step": i, "loss": 1.0 - 0.01 * i} for i in range(50)]
    heldout = [0.9, 0.6, 0.5, 0.7]
    history += [{"stage": "b", "step": i, "loss": 0.9 - 0.1 * i, "heldout": h} for i, h in enumerate(heldout)]
    ax = plots.training_curve(history)
    first, second, dashed = (line(ax, label) for label in ("a:", "b:", "b, held out"))
    assert first.get_xdata()[-1] + 1 == second.get_xdata()[0] == 50
    np.testing.assert_allclose(second.get_ydata(), [0.9, 0.8, 0.7, 0.6])
    np.testing.assert_allclose(dashed.get_ydata(), heldout)
    np.testing.assert_allclose(ax.collections[0].get_offsets(), [[52, 0.5]])


def test_curves_on_other_scales_get_scales_of_their_own():
    history = [{"stage": "a", "loss": 1e6 - 1000 * i} for i in range(20)]
    history += [{"stage": "b", "loss": 1.0 - 0.01 * i} for i in range(20)]
    ax = plots.training_curve(history)
    assert "own scale" in ax.get_ylabel()
    assert np.ptp(line(ax, "b:").get_ydata()) == pytest.approx(1.0)
    assert line(ax, "b:").get_label() == "b: 1 to 0.81"


def test_the_legend_of_many_stages_stays_inside_the_frame():
    stages = ["matern", *(f"deep {k}{part}" for k in range(1, 4) for part in (": features", ""))]
    history = [
        {"stage": stage, "loss": 0.00139 * 10**k - 1e-5 * i, "heldout": 0.07561 + 0.01 * i}
        for k, stage in enumerate(stages)
        for i in range(5)
    ]
    ax = plots.training_curve(history)
    ax.figure.canvas.draw()
    frame, words = ax.get_window_extent(), ax.get_legend().get_window_extent()
    assert frame.x0 <= words.x0 and words.x1 <= frame.x1


@pytest.mark.parametrize("history", [[], [{"stage": "a", "loss": float("nan")}], [{"loss": 3.0}]])
def test_hardly_any_history(history):
    plots.training_curve(history).figure.canvas.draw()
    assert all(np.isfinite(values).all() for _, _, values, _, _ in curves_of(history))


def test_a_huge_first_loss_does_not_flatten_the_rest():
    values = np.concatenate([[1e9], np.linspace(2, 1, 200)])
    low, high = frame_of(values)
    assert low == 1 and high < 3
    assert frame_of(np.ones(3))[1] > 1


# ---- relevance ---------------------------------------------------------------------------------------


def test_relevance_is_sorted_and_the_rest_is_pooled():
    share = np.arange(40.0) / np.arange(40.0).sum()
    ax = plots.relevance([f"input_{i}" for i in range(40)], share, most=5)
    widths = [bar.get_width() for bar in ax.patches]
    np.testing.assert_allclose(widths, [*share[:-6:-1], share[:35].sum()])
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    assert labels == ["input_39", "input_38", "input_37", "input_36", "input_35", "35 others"]
    with pytest.raises(DataError, match="2 names for 3"):
        plots.relevance(["a", "b"], [1, 2, 3])


# ---- draws -------------------------------------------------------------------------------------------


def test_draws_along_show_the_posterior():
    X = np.random.default_rng(0).normal(size=(101, 3))
    posterior = Linear([1.0, -2.0, 0.5])
    ax = plots.draws_along(posterior, X, 1, draws=5, seed=3)
    mean = line(ax, "mean")
    along = np.asarray(mean.get_xdata())
    rows = np.repeat(plots.typical_row(X)[None], len(along), axis=0)
    rows[:, 1] = along
    x = torch.tensor(rows)
    np.testing.assert_allclose(mean.get_ydata(), posterior.latent(x).mean)
    drawn = [item for item in ax.get_lines() if item.get_color() == plots.ORANGE]
    expected = posterior.draw(5, seed=3)(x)
    np.testing.assert_allclose([item.get_ydata() for item in drawn], expected)
    outer, inner = (c.get_paths()[0].vertices for c in ax.collections[:2])
    lower, upper = posterior.observed(x).interval(0.9)
    assert outer[:, 1].min() == pytest.approx(float(lower.min()))
    assert outer[:, 1].max() == pytest.approx(float(upper.max()))
    assert np.ptp(inner[:, 1]) < np.ptp(outer[:, 1])
    assert X[:, 1].min() <= along.min() < along.max() <= X[:, 1].max()


def test_second_output():
    posterior = Linear([[1.0, 10.0], [0.0, 20.0]])
    X = np.random.default_rng(0).normal(size=(30, 2))
    ax = plots.draws_along(posterior, X, 0, output=1)
    assert np.polyfit(*line(ax, "mean").get_data(), 1)[0] == pytest.approx(10.0)
    with pytest.raises(OptionError, match="output=2"):
        plots.draws_along(posterior, X, 0, output=2)


def estimator(frame, weights):
    encoder = TableEncoder()
    encoded = encoder.fit_transform(frame)
    posterior = Linear(weights)
    return SimpleNamespace(
        encoder_=encoder,
        posterior_=posterior,
        predictive=lambda X: posterior.observed(torch.tensor(encoder.transform(X))),
        relevance_=np.full(encoded.shape[1], 1 / encoded.shape[1]),
        choice_={
            "scores": {"deep": -1.5, "matern <b>": -1.25},
            "chosen": "matern <b>",
            "weights": {"matern <b>": 1.0},
            "unit": "density a row",
        },
        history_=[{"stage": "fit", "step": i, "loss": 1 / (i + 1)} for i in range(9)],
        log_evidence_=-12.0,
    )


FRAME = pd.DataFrame(
    {
        "size": np.random.default_rng(0).normal(size=60),
        "new": np.tile([True, False, False], 20),
        "side": pd.Categorical(np.tile(["left", "right"], 30)),
        "city": pd.Categorical(np.tile(["Rome", "Paris", "Oxford"], 20)),
    }
)
MODEL = estimator(FRAME, [1.0, 2.0, 3.0, 10.0, 20.0, 30.0])


@pytest.mark.parametrize(
    ("column", "ticks", "steps"),
    [("city", ["Oxford", "Paris", "Rome"], [10, 20]), ("side", ["left", "right"], [3]), (1, ["0", "1"], [2])],
)
def test_categories_are_drawn_at_places_of_their_own(column, ticks, steps):
    ax = plots.draws_along(MODEL, FRAME, column)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ticks
    marks = next(c for c in ax.collections if c.get_label() == "mean")
    heights = np.array([path.vertices[0, 1] for path in marks.get_paths()])
    np.testing.assert_allclose(heights - heights[0], [0, *steps], atol=1e-9)


def test_unknown_inputs_are_named():
    with pytest.raises(DataError, match="no input 'town'.*'city'|Did you mean"):
        plots.draws_along(MODEL, FRAME, "town")
    with pytest.raises(DataError, match="numbered 0 to 3"):
        plots.draws_along(MODEL, FRAME, 4)


def test_the_typical_row_is_a_row_and_is_central():
    X = np.random.default_rng(0).normal(size=(200, 4)) * [1, 10, 100, 0]
    row = plots.typical_row(X)
    assert (X == row).all(axis=1).any()
    assert (np.abs(row - np.median(X, axis=0)) <= X.std(axis=0)).all()


def test_every_plot_draws_on_the_axes_it_is_given():
    y, predictive = calibrated(30)
    for draw in (
        lambda ax: plots.predicted_vs_observed(y, predictive, ax=ax),
        lambda ax: plots.calibration(y, predictive, ax=ax),
        lambda ax: plots.residuals_vs_std(y, predictive, ax=ax),
        lambda ax: plots.training_curve(MODEL.history_, ax=ax),
        lambda ax: plots.relevance(["a"], [1.0], ax=ax),
        lambda ax: plots.draws_along(MODEL, FRAME, "size", ax=ax),
    ):
        ax = plt.figure().add_subplot()
        assert draw(ax) is ax
        ax.figure.canvas.draw()


# ---- the report --------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Well-formed or not, and what it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.text = [], [], ""
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("img", "meta", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def sections(model, **options):
    rng = np.random.default_rng(5)
    predictive = model.predictive(FRAME)
    y = predictive.mean.numpy() + rng.normal(size=predictive.mean.shape)
    return report_html(model, FRAME, y, X_train=FRAME, y_train=y, **options)


def test_the_page_is_whole_and_fetches_nothing():
    text = sections(MODEL, targets=["price <&>"], facts={"data": "a<script>b"})
    page = Page(text)
    assert len(page.links) == 3 + 1 + 3 + 1  # diagnostics, relevance, draws, training
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"https?://|<script|@import|url\(", text)
    assert "price <&>" in page.text and "a<script>b" in page.text and "matern <b>" in page.text
    for words in (
        "RMSE",
        "90% interval coverage",
        "How was it fitted",
        "mean only",
        "-1.25",
        "density a row",
    ):
        assert words in page.text


def test_the_page_about_several_outputs():
    model = estimator(FRAME, np.arange(12.0).reshape(6, 2))
    page = Page(sections(model, targets=["a", "b"]))
    assert len(page.links) == 2 * 3 + 1 + 2 * 3 + 1
    for about in ("observed", "calibration", "residuals", "training", "relevance", "draws"):
        assert page.text.count(CAPTIONS[about]) == 1  # told once, not again for every output


def test_the_page_without_rows_held_out_says_so(tmp_path):
    path = write_report(tmp_path / "deep" / "report.html", MODEL, None, None, X_train=FRAME)
    page = Page(path.read_text(encoding="utf-8"))
    assert "none was held out" in page.text and "RMSE" not in page.text
    assert len(page.links) == 1 + 3 + 1


def test_levels_of_one_category_count_as_one_input():
    share = input_relevance(MODEL.encoder_, np.array([0.1, 0.2, 0.3, 0.1, 0.1, 0.2]))
    np.testing.assert_allclose(share, [0.1, 0.2, 0.3, 0.4])
