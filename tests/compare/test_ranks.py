"""Ranks and tests against scipy, the figures printed by Demsar (2006), and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from fspace.compare.ranks import comparable, critical_difference, higher_is_better, holm, rank, standard_error
from fspace.errors import DataError, OptionError


def test_friedman_is_scipys_in_the_form_of_iman_and_davenport():
    values = np.round(np.random.default_rng(2).normal(size=(14, 4)) + [0, 0.5, 0, 1], 1)  # some are tied
    found = rank(values, list("abcd"), higher=True)
    square = stats.friedmanchisquare(*values.T).statistic
    assert found.p_value == pytest.approx(stats.f.sf(13 * square / (14 * 3 - square), 3, 13 * 3))
    assert np.allclose(found.ranks, stats.rankdata(-values, axis=1).mean(0))


def test_critical_differences_are_those_printed_by_demsar():
    """Table 5a: q of 5% for 2, 4 and 10 methods; the example of section 3.2.2 with 14 data sets."""
    for k, q in ((2, 1.960), (4, 2.569), (10, 3.164)):
        assert critical_difference(k, 1) / math.sqrt(k * (k + 1) / 6) == pytest.approx(q, abs=1e-3)
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=5e-3)


def test_pairs_are_wilcoxon_with_holm():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(20, 3)) + [0, 0, 2]
    found = rank(values, ["a", "b", "c"], higher=False)
    raw = [stats.wilcoxon(values[:, i], values[:, j]).pvalue for i, j in ((0, 1), (0, 2), (1, 2))]
    order = sorted(raw)
    assert found.pairs[0, 1] == pytest.approx(min(1, max(raw[0], 2 * order[1], 3 * order[0])))
    assert found.pairs[2, 0] < 0.01 and found.pairs[0, 1] > 0.05 and found.ranks.argmax() == 2
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_a_failed_cell_is_the_worst_of_its_block():
    nan, inf = math.nan, math.inf
    found = rank([[3.0, nan, 1.0], [2.0, -inf, 1.0], [3.0, 2.5, 2.0]], ["a", "b", "c"], higher=True)
    assert found.ranks.tolist() == [1.0, (3 + 3 + 2) / 3, (2 + 2 + 3) / 3]
    assert comparable(np.array([[nan, nan]])).tolist() == [[-1.0, -1.0]]


def test_friedman_holds_its_level_and_finds_differences():
    """400 tables without a difference: 5% rejected, standard error 1.1%."""
    rng = np.random.default_rng(1)
    names = list("abcd")
    rejected = np.mean([rank(rng.normal(size=(12, 4)), names, True).p_value < 0.05 for _ in range(400)])
    assert abs(rejected - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 400)
    assert rank(rng.normal(size=(12, 4)) + np.arange(4), names, True).p_value < 1e-3
    assert rank(np.ones((5, 3)), list("abc"), True).p_value == 1.0


def test_standard_error_of_overlapping_splits():
    values = [1.0, 2.0, 4.0, 5.0]
    assert standard_error(values, 0.0) == pytest.approx(stats.sem(values))
    assert standard_error(values, 0.25) == pytest.approx(np.std(values, ddof=1) * math.sqrt(0.5))
    assert math.isnan(standard_error([1.0], 0.0))


def test_what_is_refused():
    with pytest.raises(DataError, match="two methods on at least two blocks"):
        rank([[1.0, 2.0]], ["a", "b"], True)
    with pytest.raises(OptionError, match="neither high nor low"):
        higher_is_better("coverage_90")
    assert higher_is_better("log_likelihood") and not higher_is_better("crps")
    assert higher_is_better("auroc, entropy") and not higher_is_better("fpr95, entropy")


@pytest.mark.parametrize("blocks, k", [(2, 2), (2, 4), (3, 3)])
def test_few_blocks_of_one_order_are_no_proof(blocks, k):
    """By enumeration: how probable it is by chance that all blocks have the first one's order."""
    orders = list(itertools.permutations(range(k)))
    alike = sum(
        all(order == orders[0] for order in rest) for rest in itertools.product(orders, repeat=blocks - 1)
    )
    expected = alike / len(orders) ** (blocks - 1)
    assert rank(np.tile(np.arange(k), (blocks, 1)), list("abcdef")[:k], True).p_value == pytest.approx(
        expected
    )


def test_tables_that_are_none_are_refused():
    for table in ([[1.0, 2.0], [1.0]], [["a", "b"]] * 2):
        with pytest.raises(DataError, match="values must hold numbers"):
            rank(table, ["a", "b"], True)
