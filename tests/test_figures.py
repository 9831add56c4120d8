"""Figures over seeds and folds, thresholds from valid, paired tests: from scores alone."""

import numpy as np
import pytest

from eval import figures, scoring, statistics
from eval.figures import Run, Scores

CLASSES = ["benign", "FTC"]


def scores(n: int, gain: float, seed: int, images: int = 1) -> Scores:
    """`n` patients of each class with so many images, told apart the better the larger `gain` is."""
    rng = np.random.default_rng([7, seed])
    y = np.repeat([0, 1], n * images)
    logit = gain * y + np.repeat(rng.normal(0, 0.7, 2 * n), images) + rng.normal(0, 0.7, 2 * n * images)
    p = 1 / (1 + np.exp(-logit))
    names = [f"i{i}" for i in range(len(y))]
    return Scores(y, np.stack([1 - p, p], 1), [f"P{i // images}" for i in range(len(y))], names)


def make_run(
    condition: str, gain: float, seed: int = 0, fold: int | None = None, noise: int = 0, images: int = 1
) -> Run:
    arm, _, amount = condition.partition(":")
    settings = {"arm": arm, "amount": int(amount) if amount else None, "real_share": 1.0}
    notes = {"selected_step": 1, "images_per_second": 1.0, "settings": settings}
    parts = (scores(60, gain, 1000 * noise + 10 * (fold or 0) + part, images) for part in (1, 2))
    return Run(condition, "all", seed, fold, CLASSES, *parts, notes)


def test_a_figure_is_the_mean_over_seeds_and_folds() -> None:
    runs = [make_run("none", 1.0, seed, fold, noise=seed) for seed in (0, 1) for fold in (0, 1)]
    entry = figures.summarise(runs, "benign", 200)["arms"]["none"]
    aucs = {(run.seed, run.fold): statistics.auc(run.test.y, run.test.p[:, 1]) for run in runs}
    found = entry["auc benign vs FTC"]
    assert found["value"] == pytest.approx(np.mean(list(aucs.values())))
    assert found["per_seed"] == pytest.approx([np.mean([aucs[seed, fold] for fold in (0, 1)]) for seed in (0, 1)])
    assert entry["n_test"] == 240
    assert found["low"] < found["value"] < found["high"]
    one = figures.summarise(runs[:2], "benign", 1000)["arms"]["none"]["auc benign vs FTC"]  # two folds, one seed
    assert one["delong"] == pytest.approx([one["low"], one["high"]], abs=0.01)
    assert found["delong"][1] - found["delong"][0] > 0.5 * (found["high"] - found["low"])


def test_intervals_are_over_patients_and_over_seeds() -> None:
    def width(runs: list[Run]) -> float:
        entry = figures.summarise(runs, "benign", 300)["arms"]["none"]["auc benign vs FTC"]
        return entry["high"] - entry["low"]

    one = width([make_run("none", 1.0, images=4)])
    image_level = make_run("none", 1.0, images=4)
    image_level.test.patients[:] = image_level.test.file_names
    assert one > 1.3 * width([image_level])
    steady = width([make_run("none", 1.0, seed) for seed in range(3)])  # three equal seeds tell as much as one
    assert steady == pytest.approx(width([make_run("none", 1.0)]), rel=0.05)
    assert width([make_run("none", gain, seed) for seed, gain in enumerate((0.2, 1.0, 1.8))]) > 1.3 * steady


def test_thresholds_come_from_valid() -> None:
    run = make_run("none", 1.5)
    assert run.valid is not None
    run.valid.p[:] = np.stack([1 - (high := 0.9 + 0.05 * run.valid.y), high], 1)  # cut at .925
    entry = figures.summarise([run], "benign", 20)["arms"]["none"]
    said = run.test.p[:, 1] >= 0.925
    assert entry["sensitivity benign vs FTC"]["value"] == pytest.approx(said[run.test.y == 1].mean())
    assert entry["valid auc benign vs FTC"]["value"] == 1.0
    without = Run(run.condition, run.task, run.seed, run.fold, run.classes, None, run.test, run.notes)
    entry = figures.summarise([without], "benign", 20)["arms"]["none"]
    assert entry["accuracy benign vs FTC"]["value"] == pytest.approx(((run.test.p[:, 1] >= 0.5) == run.test.y).mean())


def test_one_seed_is_tested_as_delong_does() -> None:
    first, second = make_run("none", 0.8), make_run("tiger_f", 1.0, noise=1)
    (entry,) = [
        one
        for one in figures.summarise([first, second], "benign", 100)["comparisons"]
        if one["figure"].startswith("auc")
    ]
    expected = statistics.delong_test(first.test.y, second.test.p[:, 1], first.test.p[:, 1])[1]
    assert (entry["arm"], entry["against"]) == ("tiger_f", "none")
    assert entry["p"] == entry["p_holm"] == pytest.approx(expected)
    assert entry["low"] < entry["value"] < entry["high"]


def test_seeds_that_disagree_weaken_a_test() -> None:
    def p(gains: tuple[float, ...]) -> float:
        runs = [make_run("none", 0.5, seed) for seed in range(3)]
        runs += [make_run("tiger_f", gain, seed) for seed, gain in enumerate(gains)]
        return figures.summarise(runs, "benign", 20)["comparisons"][0]["p"]

    assert p((0.9, 0.9, 0.9)) < 1e-6 < p((0.1, 0.9, 1.7))


def test_only_equal_conditions_are_compared_and_each_figure_is_a_family() -> None:
    gains = {"oversampling": 0.5, "tiger_f:2": 0.6, "tiger_f:4": 0.9, "sd:4": 0.7}
    runs = [make_run(condition, gain, noise=i) for i, (condition, gain) in enumerate(gains.items())]
    found = figures.summarise(runs, "benign", 200)["comparisons"]
    of_auc = [one for one in found if one["figure"] == "auc benign vs FTC"]
    pairs = {(one["arm"], one["against"]) for one in of_auc}
    assert pairs == {
        ("tiger_f:2", "oversampling"),
        ("tiger_f:4", "oversampling"),
        ("sd:4", "oversampling"),
        ("sd:4", "tiger_f:4"),
    }
    assert [one["p_holm"] for one in of_auc] == pytest.approx(statistics.holm([one["p"] for one in of_auc]))
    macro = [one for one in found if one["figure"] == "macro_auc"]
    assert all(2 / 201 <= one["p"] <= 1 for one in macro) and len(macro) == 4


def test_resamples_are_the_same_for_every_condition() -> None:
    a, b = make_run("none", 0.8), make_run("tiger_f", 0.8)  # equal scores
    (entry, *_) = figures.summarise([a, b], "benign", 50)["comparisons"]
    assert (entry["value"], entry["low"], entry["high"], entry["p"]) == (0, 0, 0, 1)
    assert figures.bootstrap_p(np.zeros(50)) == 1
    w = scoring.resample_weights(a.test.patients, 5, np.random.default_rng(0))
    assert w.shape == (6, 120)
