"""Intervals and tests against figures published elsewhere: pROC's aSAH, Newcombe 1998, scikit-learn, and by hand."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from eval import statistics

ASAH = Path(__file__).parents[2] / "shared" / "data" / "aSAH.csv"


@pytest.fixture(scope="module")
def asah() -> pd.DataFrame:
    if not ASAH.is_file():
        pytest.skip(f"{ASAH} is not there")
    return pd.read_csv(ASAH)


def poor(table: pd.DataFrame) -> np.ndarray:
    return (table["outcome"] == "Poor").to_numpy()


def test_delong_interval_is_that_of_proc(asah: pd.DataFrame) -> None:
    value, low, high = statistics.delong_ci(poor(asah), asah["ndka"].to_numpy())
    assert value == pytest.approx(0.611957994579946, abs=1e-12)
    assert (low, high) == pytest.approx((0.501244999271703, 0.722670989888189), abs=1e-12)


def test_paired_delong_test_is_that_of_proc(asah: pd.DataFrame) -> None:
    z, p = statistics.delong_test(poor(asah), asah["wfns"].to_numpy(), asah["s100b"].to_numpy())
    assert z == pytest.approx(2.20898359144091, abs=1e-10)
    assert p == pytest.approx(0.0271757822291882, abs=1e-10)


def test_auc_counts_ties_half() -> None:
    rng = np.random.default_rng(0)
    y, s = rng.integers(0, 2, 200), rng.integers(0, 6, 200)
    assert statistics.auc(y, s) == pytest.approx(roc_auc_score(y, s), abs=1e-12)
    assert statistics.delong_ci(y, s)[0] == pytest.approx(roc_auc_score(y, s), abs=1e-12)
    assert statistics.auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) == 0.75  # the example in scikit-learn's documentation


def test_delong_variance_is_the_textbook_sum() -> None:
    rng = np.random.default_rng(1)
    y, s = rng.random(60) < 0.4, rng.integers(0, 9, 60).astype(float)
    wins = (s[y][:, None] > s[~y][None]) + 0.5 * (s[y][:, None] == s[~y][None])  # psi of DeLong et al., eq. 2
    variance = wins.mean(1).var(ddof=1) / y.sum() + wins.mean(0).var(ddof=1) / (~y).sum()
    value, low, high = statistics.delong_ci(y, s)
    assert (high - low) / 2 == pytest.approx(1.959963984540054 * math.sqrt(variance), abs=1e-12)


def test_delong_of_equal_curves() -> None:
    y, s = np.array([0, 0, 1, 1, 0, 1]), np.array([0.1, 0.6, 0.4, 0.9, 0.2, 0.3])
    assert statistics.delong_test(y, s, s) == (0.0, 1.0)
    assert statistics.delong_test(y, s, -s)[0] == -statistics.delong_test(y, -s, s)[0]


def test_clustered_delong_is_the_plain_one_where_every_case_is_a_patient(asah: pd.DataFrame) -> None:
    y, s = poor(asah), asah["ndka"].to_numpy()
    assert statistics.delong_ci(y, s, np.arange(len(y))) == pytest.approx(statistics.delong_ci(y, s), abs=1e-14)
    twice = np.repeat(np.arange(len(y)), 2)  # every case twice, known to be: no more certain than once
    doubled = statistics.delong_ci(np.repeat(y, 2), np.repeat(s, 2), twice)
    assert doubled == pytest.approx(statistics.delong_ci(y, s), abs=2e-3)
    assert statistics.delong_ci(np.repeat(y, 2), np.repeat(s, 2))[1] > doubled[1] + 0.02


def test_clustered_delong_has_the_spread_of_repeated_samples() -> None:
    rng = np.random.default_rng(7)
    patients = np.repeat(np.arange(50), 4)
    values, variances = [], []
    for _ in range(300):
        y = rng.random(200) < 0.4  # a patient has images of both kinds, whose scores share the patient's part
        s = 0.8 * y + np.repeat(rng.normal(0, 1, 50), 4) + rng.normal(0, 0.5, 200)
        v10, v01 = statistics.placements(y, s)
        values.append(v10.mean())
        variances.append(statistics.clustered_variance(y, v10, v01, patients))
    assert np.mean(variances) == pytest.approx(np.var(values), rel=0.2)


def test_delong_of_several_columns_is_that_of_their_mean_auc() -> None:
    rng = np.random.default_rng(8)
    y = rng.random(80) < 0.5
    s = y[:, None] + rng.normal(size=(80, 3))
    assert statistics.delong_ci(y, s)[0] == pytest.approx(np.mean([statistics.auc(y, column) for column in s.T]))
    assert statistics.delong_ci(y, np.stack([s[:, 0]] * 3, 1)) == pytest.approx(statistics.delong_ci(y, s[:, 0]))
    difference, variance = statistics.delong_difference(y, s[:, 0], s[:, 1])
    z = difference / math.sqrt(variance)
    assert statistics.delong_test(y, s[:, 0], s[:, 1]) == pytest.approx((z, 2 * stats.norm.sf(abs(z))))


def test_rounding_does_not_make_a_variance_negative() -> None:
    for n in (30, 40, 53):  # every patient has a positive and a negative case, and a positive is always one above
        y, s = np.tile([1, 0], n), np.stack([2 * np.arange(n) + 1, 2 * np.arange(n)], 1).ravel()
        value, low, high = statistics.delong_ci(y, s, np.repeat(np.arange(n), 2))
        assert low <= value <= high
    _, low, high = statistics.delong_ci([1, 0, 0], [0.3, 0.2, 0.4])  # one positive tells no variance
    assert math.isnan(low) and math.isnan(high)


def test_t_interval_is_that_of_scipy_and_of_welch() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(0.4, 1, 6), rng.normal(0, 2, 9)
    parts = [(float(x.var(ddof=1)) / len(x), len(x) - 1) for x in (a, b)]
    welch = stats.ttest_ind(a, b, equal_var=False)
    low, high, p = statistics.t_interval(float(a.mean() - b.mean()), parts)
    assert p == pytest.approx(welch.pvalue) and (low, high) == pytest.approx(tuple(welch.confidence_interval()))
    assert statistics.t_interval(1.96, [(1.0, math.inf), (0.0, 0)])[2] == pytest.approx(0.05, abs=1e-4)
    assert statistics.t_interval(0.0, [(0.0, 2)]) == (0.0, 0.0, 1.0)
    assert all(map(math.isnan, statistics.t_interval(0.1, [(math.nan, math.inf), (0.1, 2)])))


def test_holm_is_that_of_statsmodels() -> None:
    p = np.array([0.01, 0.04, 0.03, 0.005, 0.5, 0.04])
    assert statistics.holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    with_gap = statistics.holm([0.01, math.nan, 0.04])
    assert with_gap[[0, 2]] == pytest.approx([0.02, 0.04]) and math.isnan(with_gap[1])


def test_wilson_interval_of_newcombe() -> None:
    assert statistics.wilson_ci(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert statistics.wilson_ci(0, 10)[0] == 0.0
    assert statistics.wilson_ci(10, 10)[1] == 1.0
    with pytest.raises(ValueError, match="k = 5, n = 4"):
        statistics.wilson_ci(5, 4)


def test_wilson_interval_is_that_of_statsmodels() -> None:
    for k, n in ((0, 7), (3, 7), (7, 7), (81, 263), (1, 1000)):
        expected = proportion_confint(k, n, alpha=0.05, method="wilson")
        assert statistics.wilson_ci(k, n) == pytest.approx(expected, abs=1e-12)


def test_a_share_of_none_or_all_has_wilsons_interval_of_as_many_trials_as_patients() -> None:
    patients = np.repeat(np.arange(10), 6)
    none, every = (statistics.share_ci(np.full(60, hit), patients) for hit in (False, True))
    assert none == {"n": 60, "value": 0, "low": 0, "high": pytest.approx(statistics.wilson_ci(0, 10)[1])}
    assert every == {"n": 60, "value": 1, "low": pytest.approx(statistics.wilson_ci(10, 10)[0]), "high": 1}
    some = np.arange(60) < 7
    assert statistics.share_ci(some, patients) == statistics.mean_ci(some, patients)


def test_hosmer_lemeshow_by_hand() -> None:
    y = np.array([0, 0, 1, 0, 1, 1])
    p = np.array([0.1, 0.2, 0.3, 0.6, 0.7, 0.8])
    # three pairs by rank: expected .3, .9, 1.5; observed 0, 1, 2
    chi2 = 0.3**2 / (0.3 * 0.85) + 0.1**2 / (0.9 * 0.55) + 0.5**2 / (1.5 * 0.25)
    assert statistics.hosmer_lemeshow(y, p, groups=3) == pytest.approx((chi2, stats.chi2.sf(chi2, 1)), abs=1e-12)


def test_hosmer_lemeshow_of_equal_probabilities_does_not_know_the_order_of_the_rows() -> None:
    y = np.array([0, 0, 1, 1, 1, 0, 1, 1])
    p = np.array([0.2, 0.5, 0.5, 0.5, 0.5, 0.8, 0.8, 0.9])
    # two groups of four: three of the .5 stand in the lower one, with 3/4 of their positives each
    low, high = (2.25 - 1.7) ** 2 / (1.7 * (1 - 1.7 / 4)), (2.75 - 3.0) ** 2 / (3.0 * 0.25)
    for order in (np.arange(8), np.arange(8)[::-1], np.random.default_rng(0).permutation(8)):
        chi2, value = statistics.hosmer_lemeshow(y[order], p[order], groups=2, fitted=False)
        assert (chi2, value) == pytest.approx((low + high, stats.chi2.sf(low + high, 2)), abs=1e-12)


@pytest.mark.parametrize(("n", "groups", "fitted", "fewest"), [(9, 10, True, 3), (9, 10, False, 1), (9, 2, True, 3)])
def test_hosmer_lemeshow_needs_degrees_of_freedom_and_a_case_a_group(n: int, groups: int, fitted, fewest: int) -> None:
    with pytest.raises(ValueError, match=f"need {fewest} ≤ groups ≤ cases, got groups = {groups}, cases = {n}"):
        statistics.hosmer_lemeshow(np.arange(n) % 2, np.linspace(0.1, 0.9, n), groups, fitted)


def test_hosmer_lemeshow_tells_calibrated_from_not() -> None:
    rng = np.random.default_rng(2)
    p = rng.uniform(0.05, 0.95, 4000)
    y = rng.random(4000) < p
    assert statistics.hosmer_lemeshow(y, p)[1] > 0.01
    assert statistics.hosmer_lemeshow(y, p**2)[1] < 1e-6


def test_hosmer_lemeshow_on_other_cases_rejects_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    p = rng.uniform(0.05, 0.95, (1000, 300))
    found = [statistics.hosmer_lemeshow(rng.random(300) < row, row, fitted=False)[1] < 0.05 for row in p]
    assert 0.03 < np.mean(found) < 0.07
    assert (
        statistics.hosmer_lemeshow(p[0] > 0.5, p[0])[1] < statistics.hosmer_lemeshow(p[0] > 0.5, p[0], fitted=False)[1]
    )


def test_bootstrap_over_patients_is_wider_where_images_of_a_patient_agree() -> None:
    rng = np.random.default_rng(3)
    patients = np.repeat(np.arange(40), 5)
    y = np.repeat(rng.integers(0, 2, 40), 5)
    s = y + np.repeat(rng.normal(0, 1.5, 40), 5)
    value, low, high = statistics.cluster_bootstrap_ci(statistics.auc, y, s, patients, n=300, seed=0)
    _, image_low, image_high = statistics.cluster_bootstrap_ci(statistics.auc, y, s, np.arange(200), n=300, seed=0)
    assert value == statistics.auc(y, s)
    assert low < value < high
    assert high - low > 1.5 * (image_high - image_low)
    again = statistics.cluster_bootstrap_ci(statistics.auc, y, s, patients, n=300, seed=0)
    assert again == (value, low, high)


def test_interval_of_a_mean_is_that_of_drawing_whole_groups() -> None:
    rng = np.random.default_rng(6)
    groups = rng.integers(0, 25, 90)  # of unequal size
    values = rng.normal(size=25)[groups] + rng.normal(size=90)
    found = statistics.mean_ci(values, groups, n=4000)
    value, low, high = statistics.cluster_bootstrap_ci(lambda _, s: s.mean(), values, values, groups, 4000, 1)
    assert found["value"] == pytest.approx(value)
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.03)
    assert found["n"] == 90


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(4)
    covered = 0
    for trial in range(200):
        patients = np.repeat(np.arange(30), 3)
        values = np.repeat(rng.normal(0, 1, 30), 3) + rng.normal(0, 0.3, 90)
        interval = statistics.mean_ci(values, patients, n=200, seed=trial)
        covered += interval["low"] <= 0 <= interval["high"]
    assert 0.88 <= covered / 200 <= 0.98


def test_bootstrap_skips_resamples_without_a_class() -> None:
    y, s = np.array([0, 0, 0, 0, 0, 1]), np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    with pytest.warns(RuntimeWarning, match=r"undefined on \d+ of 200 resamples"):
        value, low, high = statistics.cluster_bootstrap_ci(statistics.auc, y, s, np.arange(6), n=200, seed=0)
    assert (value, low, high) == (1.0, 1.0, 1.0)  # the one positive is in 1 - (5/6)^6 = 67 % of them
    y = np.array([0] * 30 + [1])
    s = np.arange(31.0)
    with pytest.warns(RuntimeWarning, match="a class is missing"):
        low, high = statistics.cluster_bootstrap_ci(statistics.auc, y, s, [*["a"] * 15, *["b"] * 15, "c"], 200, 0)[1:]
    assert low == high == 1.0


def test_recall_stays_within_the_false_positive_budget() -> None:
    y = np.array([1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    s = np.array([9, 8, 7, 6, 5, 4, 4, 3, 3, 2, 2, 1, 1.0])
    assert statistics.recall_at_fpr(y, s, 0.0) == pytest.approx(1 / 3)
    assert statistics.recall_at_fpr(y, s, 0.15) == pytest.approx(2 / 3)  # one false positive of ten; two would be .2
    assert statistics.recall_at_fpr(y, s, 0.2) == 1.0
    rng = np.random.default_rng(5)
    y, s = rng.integers(0, 2, 300), rng.integers(0, 20, 300)
    false_rate, recall, _ = roc_curve(y, s, drop_intermediate=False)
    for budget in (0.01, 0.05, 0.1, 0.5):
        assert statistics.recall_at_fpr(y, s, budget) == pytest.approx(recall[false_rate <= budget].max())


def test_what_are_no_labels_and_scores_of_the_same_cases_is_refused() -> None:
    y, s = [0, 1, 0, 1, 1, 0], [0.1, 0.6, 0.4, 0.9, 0.2, 0.3]
    of_both = [
        statistics.auc,
        statistics.delong_ci,
        lambda y, s: statistics.delong_test(y, [0.1] * 6, s),
        lambda y, s: statistics.recall_at_fpr(y, s, 0.1),
        lambda y, s: statistics.hosmer_lemeshow(y, s, 3),
        lambda y, s: statistics.cluster_bootstrap_ci(statistics.auc, y, s, range(6), 10, 0),
    ]
    for figure in of_both:
        figure(y, s)
        with pytest.raises(ValueError, match="1 scores are no numbers"):
            figure(y, [*s[:5], math.nan])
        with pytest.raises(ValueError, match="6 labels and 5 scores"):
            figure(y, s[:5])
        for labels in ([0, 1, 2, 1, 1, 0], [-1, 1, -1, 1, 1, -1], [0, 1, 0, 1, 1, math.nan], [*"010110"], [[0]] * 6):
            with pytest.raises(ValueError, match="labels must be one column of 0 and 1"):
                figure(labels, s)
    for labels in (np.array(y, bool), np.array(y, np.int8), np.array(y, float)):
        assert statistics.auc(labels, s) == statistics.auc(y, s)
    with pytest.raises(ValueError, match=r"probabilities must be in \[0, 1\]"):
        statistics.hosmer_lemeshow(y, np.array(s) * 2, 3)


def test_cases_without_a_group_and_groups_of_other_cases_are_refused() -> None:
    y, s = [0, 1, 0, 1], [0.1, 0.6, 0.4, 0.2]
    with pytest.raises(ValueError, match="4 labels and 4 scores and 3 groups of the same cases"):
        statistics.cluster_bootstrap_ci(statistics.auc, y, s, [1, 2, 3], 10, 0)
    with pytest.raises(ValueError, match="4 labels and 3 groups"):
        statistics.delong_ci(y, s, [1, 2, 3])
    with pytest.raises(ValueError, match="4 values and 3 groups"):
        statistics.mean_ci(s, [1, 2, 3])
    for groups in (["a", None, "b", None], [1, math.nan, 2, math.nan]):
        with pytest.raises(ValueError, match="2 cases have no group"):
            statistics.delong_ci(y, s, groups)
        with pytest.raises(ValueError, match="2 cases have no group"):
            statistics.cluster_bootstrap_ci(statistics.auc, y, s, groups, 10, 0)


def test_one_patient_has_no_interval() -> None:
    value, low, high = statistics.cluster_bootstrap_ci(statistics.auc, [0, 1, 0, 1], [1, 4, 3, 2], ["a"] * 4, 50, 0)
    assert value == 0.75 and math.isnan(low) and math.isnan(high)
    found = statistics.mean_ci([1, 2, 3], ["a"] * 3)
    assert found["value"] == 2 and math.isnan(found["low"]) and math.isnan(found["high"])


def test_wilson_interval_of_small_integers_does_not_overflow() -> None:
    assert statistics.wilson_ci(np.int8(81), np.int8(100)) == statistics.wilson_ci(81, 100)
    assert statistics.wilson_ci(np.int32(81000), np.int32(200000)) == statistics.wilson_ci(81000, 200000)
