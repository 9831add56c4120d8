"""Figures over many resamples at once against scikit-learn on each resample by itself."""

import numpy as np
import pytest
from sklearn import metrics

from eval import classifier, scoring, statistics


@pytest.fixture(scope="module")
def sample() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(y, scores with ties, weights of 6 resamples)"""
    rng = np.random.default_rng(0)
    y = rng.random(60) < 0.4
    s = np.round(np.clip(0.3 * y + rng.random(60), 0, 1), 1)
    return y, s, scoring.resample_weights([f"P{i // 3}" for i in range(60)], 5, rng)


def test_resamples_draw_whole_patients() -> None:
    w = scoring.resample_weights(list("aabbbc"), 400, np.random.default_rng(0))
    assert np.array_equal(w[0], np.ones(6))
    assert (w[:, 0] == w[:, 1]).all() and (w[:, 2] == w[:, 4]).all()
    assert (w[:, 0] + w[:, 2] + w[:, 5] == 3).all()  # as many patients as there are
    assert w[1:].mean(0) == pytest.approx(1, abs=0.15)


def test_binary_figures_are_those_of_scikit_learn(sample) -> None:
    y, s, w = sample
    threshold = 0.55
    found = scoring.binary_figures(y, s, threshold, w)
    for i, weights in enumerate(w):
        rows = np.repeat(np.arange(60), weights.astype(int))
        truth, score, said = y[rows], s[rows], s[rows] >= threshold
        fpr, tpr, _ = metrics.roc_curve(truth, score, drop_intermediate=False)
        expected = {
            "auc": metrics.roc_auc_score(truth, score),
            "sensitivity": metrics.recall_score(truth, said),
            "specificity": metrics.recall_score(~truth, ~said),
            "precision": metrics.precision_score(truth, said),
            "f1": metrics.f1_score(truth, said),
            "accuracy": metrics.accuracy_score(truth, said),
            "mcc": metrics.matthews_corrcoef(truth, said),
            "kappa": metrics.cohen_kappa_score(truth, said),
            "brier": metrics.brier_score_loss(truth, score),
        } | {f"recall at FPR {budget:g}": tpr[fpr <= budget].max() for budget in scoring.FPRS}
        assert {name: values[i] for name, values in found.items()} == pytest.approx(expected)
        assert found["recall at FPR 0.1"][i] == statistics.recall_at_fpr(truth, score, 0.1)


def test_multiclass_figures_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    y = rng.integers(0, 3, 90)
    p = rng.dirichlet(np.ones(3), 90) * 0.7 + 0.3 * np.eye(3)[y]
    w = scoring.resample_weights([str(i) for i in range(90)], 4, rng)
    found = scoring.multiclass_figures(y, p, ["a", "b", "c"], w)
    for i, weights in enumerate(w):
        rows = np.repeat(np.arange(90), weights.astype(int))
        said = p[rows].argmax(1)
        assert found["macro_auc"][i] == pytest.approx(metrics.roc_auc_score(y[rows], p[rows], multi_class="ovr"))
        assert found["auc b"][i] == pytest.approx(metrics.roc_auc_score(y[rows] == 1, p[rows, 1]))
        assert found["balanced_accuracy"][i] == pytest.approx(metrics.balanced_accuracy_score(y[rows], said))
        assert found["mcc"][i] == pytest.approx(metrics.matthews_corrcoef(y[rows], said))
        assert found["kappa"][i] == pytest.approx(metrics.cohen_kappa_score(y[rows], said))
        macro = {"average": "macro", "zero_division": 0}
        assert found["macro_precision"][i] == pytest.approx(metrics.precision_score(y[rows], said, **macro))
        assert found["macro_f1"][i] == pytest.approx(metrics.f1_score(y[rows], said, **macro))
        specificities = [metrics.recall_score(y[rows] != c, said != c) for c in range(3)]
        assert found["macro_specificity"][i] == pytest.approx(np.mean(specificities))
        assert found["brier"][i] == pytest.approx(((p[rows] - np.eye(3)[y[rows]]) ** 2).sum(1).mean())


def test_a_class_that_is_never_the_answer_has_no_precision_and_one_that_is_not_there_no_figures() -> None:
    y, p = np.array([0, 0, 1, 1, 2]), np.eye(3)[[0, 1, 1, 1, 0]]
    w = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]], float)  # the second lacks the third class
    found = scoring.multiclass_figures(y, p, ["a", "b", "c"], w)
    assert found["macro_precision"][0] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)  # 0, as of two classes
    assert found["macro_f1"][0] == pytest.approx((1 / 2 + 4 / 5 + 0) / 3)
    for name in ("macro_precision", "macro_specificity", "macro_f1", "balanced_accuracy"):
        assert np.isnan(found[name]).tolist() == [False, True]


def test_an_auc_has_one_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single values, those on which states are selected, and those of resamples cannot differ."""
    y, p = (
        np.array([0, 0, 1, 1, 1]),
        np.array([[0.9, 0.1, 0], [0.4, 0.6, 0], [0.5, 0.4, 0.1], [0.1, 0.9, 0], [0, 1, 0]]),
    )
    assert classifier.macro_auc(y, p) == statistics.auc(y, p[:, 1]) == 5 / 6  # of the classes that are there
    monkeypatch.setattr(scoring, "_by_threshold", lambda y, s, w: (np.array([[0, 1.0]]), np.array([[1.0, 0]])))
    assert statistics.auc(y, p[:, 1]) == statistics.recall_at_fpr(y, p[:, 1], 0.5) == classifier.macro_auc(y, p) == 0


def test_examples_of_scikit_learns_documentation() -> None:
    one = np.ones((1, 4))
    assert scoring.auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], one) == [0.75]
    assert scoring.brier([0, 1, 1, 0], np.array([0.1, 0.9, 0.8, 0.3]), one) == pytest.approx(0.0375)
    table = scoring.confusion([1, 1, 1, 0], [1, 0, 1, 1], one, 2)
    assert scoring.agreement(table)["mcc"] == pytest.approx(-0.33, abs=0.01)
    table = scoring.confusion([0, 1, 0, 2, 1], [0, 1, 0, 2, 0], np.ones((1, 5)), 3)
    assert scoring.agreement(table)["kappa"] == pytest.approx(0.6875)


def test_a_resample_without_a_class_has_no_auc_and_no_recall(sample) -> None:
    y, s, _ = sample
    w = np.stack([np.ones(60), ~y])
    assert np.isnan(scoring.auc(y, s, w)).tolist() == [False, True]
    assert np.isnan(scoring.recall_at_fpr(y, s, w, 0.1)).tolist() == [False, True]
    assert np.isnan(scoring.binary_figures(y, s, 0.5, w)["sensitivity"]).tolist() == [False, True]


def test_threshold_has_the_largest_youden_index(sample) -> None:
    y, s, _ = sample
    fpr, tpr, _ = metrics.roc_curve(y, s, drop_intermediate=False)
    said = s >= scoring.youden_threshold(y, s)
    assert said[y].mean() - said[~y].mean() == pytest.approx((tpr - fpr).max())
    assert scoring.youden_threshold([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.9]) == pytest.approx(0.4)  # half-way
    assert scoring.youden_threshold([1, 1], [0.1, 0.2]) == 0.5


def test_calibration_of_a_calibrated_score_is_the_diagonal() -> None:
    rng = np.random.default_rng(2)
    p = rng.random(20000)
    predicted, observed = scoring.calibration(rng.random(20000) < p, p)
    assert predicted == pytest.approx(observed, abs=0.04)
    assert len(predicted) == 10
    ties = scoring.calibration([0, 0, 1, 1], np.full(4, 0.5), 2)
    assert ties == ([0.5, 0.5], [0.5, 0.5])  # not by the order of the rows
