"""Figures over seeds and folds, thresholds from valid, paired tests: from scores alone."""

from dataclasses import replace

import numpy as np
import pytest
from eval_samples import make_run
from scipy import stats

from eval import figures, scoring, statistics
from eval.figures import Run, Scores
from tiger.errors import InputError


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
        if one["figure"] == "auc benign vs FTC"
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


@pytest.mark.parametrize("figure", ["auc benign vs FTC", "macro_auc"])
def test_a_few_seeds_are_not_taken_for_many(figure: str) -> None:
    """Three seeds of one sign: resampling them would never give the other sign, however they spread."""
    runs = [make_run("none", 0.5, seed) for seed in range(3)]
    runs += [make_run("tiger_f", gain, seed) for seed, gain in enumerate((0.52, 1.0, 1.6))]
    (entry,) = [one for one in figures.summarise(runs, "benign", 300)["comparisons"] if one["figure"] == figure]
    assert 0.05 < entry["p"] < 0.3 and entry["low"] < 0 < entry["value"] < entry["high"]
    assert "3 seeds; Student's t" in entry["test"]
    one = figures.summarise([runs[0], runs[3]], "benign", 300)["comparisons"][0]
    assert one["test"].endswith("one training seed")


def test_a_resample_that_lacks_a_class_in_one_fold_keeps_the_others() -> None:
    runs = [make_run("none", 1.0, fold=fold) for fold in range(4)]
    for run in runs:  # two positives a fold, so that about one resample in seven lacks them in a given fold
        for part in (run.test, run.valid):
            assert part is not None
            part.y[62:] = 0
    entry = figures.summarise(runs, "benign", 400)["arms"]["none"]["auc benign vs FTC"]
    assert entry["low"] < entry["value"] < entry["high"]
    drawn = figures.draw(runs, "benign", 400)["none"]
    assert np.isfinite(drawn.values["auc benign vs FTC"]).all()


def test_a_task_of_which_valid_has_no_image_has_its_figures() -> None:
    run = make_run("none", 1.0)
    assert run.valid is not None
    run.valid.y[:], run.test.y[::6] = 2, 2  # a third class; in valid there is no other
    valid, test = (replace(part, p=np.pad(part.p, ((0, 0), (0, 1)))) for part in (run.valid, run.test))
    run = replace(run, classes=["benign", "FTC", "MTC"], valid=valid, test=test)
    entry = figures.summarise([run], "benign", 20)["arms"]["none"]
    assert entry["auc benign vs FTC"]["value"] > 0.6 and np.isnan(entry["valid auc benign vs FTC"]["value"])
    assert entry["sensitivity benign vs FTC"]["value"] == (run.test.p[run.test.y == 1, 1] >= 0.5).mean()


def test_two_probabilities_of_0_tell_nothing() -> None:
    p = np.array([[0.2, 0.6, 0.2], [0.0, 0.0, 1.0], [1e-13, 3e-13, 1.0]])
    y, s, rows = figures.pair_scores(Scores(np.array([0, 1, 1]), p, ["a", "b", "c"], ["a", "b", "c"]), 0, 1)
    assert s == pytest.approx([0.75, 0.5, 0.75]) and rows.tolist() == [0, 1, 2] and y.tolist() == [False, True, True]


def test_calibration_on_held_out_images_has_all_degrees_of_freedom() -> None:
    run = make_run("none", 1.0)
    chi2, p = figures.hosmer_lemeshow([run], "benign", "benign vs FTC")
    assert p == pytest.approx(stats.chi2.sf(chi2, 10))
    twice = {name: [*getattr(run.test, name)] * 2 for name in ("patients", "file_names")}
    doubled = replace(run, test=Scores(np.tile(run.test.y, 2), np.tile(run.test.p, (2, 1)), **twice))
    # A second copy of each image, of the same patient, tells nothing new; of several tests p is twice the median.
    found = figures.hosmer_lemeshow([doubled], "benign", "benign vs FTC")
    assert (
        found == pytest.approx((chi2, min(1, 2 * p))) == figures.hosmer_lemeshow([run] * 3, "benign", "benign vs FTC")
    )
    few = replace(run, test=Scores(run.test.y[56:64], run.test.p[56:64], list("abcdefgh"), list("abcdefgh")))
    assert np.isnan(figures.hosmer_lemeshow([few], "benign", "benign vs FTC")).all()  # eight images, ten groups


def test_calibration_is_not_rejected_because_patients_have_several_images() -> None:
    """Perfectly calibrated, one to four images a patient, all of one class and risk."""
    rng, told, image_by_image = np.random.default_rng(0), [], []
    for _ in range(60):
        risk, images = rng.beta(1.2, 1.2, 150), rng.integers(1, 5, 150)
        patient = np.repeat(np.arange(150), images)
        y, p = (rng.random(150) < risk)[patient].astype(np.int64), risk[patient]
        scores = Scores(y, np.stack([1 - p, p], 1), [f"p{i}" for i in patient], [f"{i}.png" for i in range(len(p))])
        run = replace(make_run("none", 1.0), test=scores)
        told.append(figures.hosmer_lemeshow([run], "benign", "benign vs FTC")[1] < 0.05)
        image_by_image.append(statistics.hosmer_lemeshow(y, p, fitted=False)[1] < 0.05)
    assert np.mean(told) < 0.05 and np.mean(image_by_image) > 0.5


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
    assert len(macro) == 4  # with two classes it is the AUC: the bootstrap says what DeLong says
    assert [one["value"] for one in macro] == pytest.approx([one["value"] for one in of_auc])
    assert [one["high"] - one["low"] for one in macro] == pytest.approx(
        [one["high"] - one["low"] for one in of_auc], rel=0.25
    )


def test_every_figure_of_the_tables_is_tested() -> None:
    """By the bootstrap over patients where DeLong has no test, and as sure of it as resamples of the difference are."""
    runs = [make_run("none", 0.5), make_run("tiger_f", 0.9, noise=1), make_run("sd", 0.7, noise=2)]
    summary = figures.summarise(runs, "benign", 400)
    pair = "tiger_f", "none"
    found = {one["figure"]: one for one in summary["comparisons"] if (one["arm"], one["against"]) == pair}
    tables = {"macro_auc", "balanced_accuracy", "accuracy", "brier", "auc benign", "auc FTC"}
    assert set(found) == tables | {"auc benign vs FTC", "accuracy benign vs FTC"}
    drawn = figures.draw(runs, "benign", 400)
    for name, entry in found.items():
        values = drawn["tiger_f"].values[name] - drawn["none"].values[name]
        assert entry["value"] == pytest.approx(values[0])
        if name != "auc benign vs FTC":
            assert entry["test"].startswith("bootstrap over patients")
            assert entry["p"] == pytest.approx(2 * stats.norm.sf(abs(values[0]) / values[1:].std(ddof=1)))
        family = [one for one in summary["comparisons"] if one["figure"] == name]
        assert [one["p_holm"] for one in family] == pytest.approx(statistics.holm([one["p"] for one in family]))
    assert found["auc FTC"]["p"] == pytest.approx(found["auc benign vs FTC"]["p"], rel=0.3)  # two classes: the same AUC


def test_scores_alone_have_figures_without_notes_on_the_training() -> None:
    run = make_run("none", 0.8)
    bare = replace(run, notes={"settings": run.notes["settings"]})
    entry, noted = (figures.summarise([one], "benign", 20)["arms"]["none"] for one in (bare, run))
    assert {name: value for name, value in noted.items() if name not in entry} == {
        "selected_steps": [1], "images_per_second": [1.0]
    }  # fmt: skip


def test_resamples_are_the_same_for_every_condition() -> None:
    a, b = make_run("none", 0.8), make_run("tiger_f", 0.8)  # equal scores
    (entry, *_) = figures.summarise([a, b], "benign", 50)["comparisons"]
    assert (entry["value"], entry["low"], entry["high"], entry["p"]) == (0, 0, 0, 1)
    w = scoring.resample_weights(a.test.patients, 5, np.random.default_rng(0))
    assert w.shape == (6, 120)


def test_an_interval_over_three_seeds_holds_as_often_as_it_says() -> None:
    """Where seeds alone vary: resampling three of them would cover 73 %."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        by_seed = 0.7 + 0.02 * rng.standard_normal(3)
        entry = figures.estimate("macro_auc", np.full(50, by_seed.mean()), by_seed)
        hits += entry["low"] < 0.7 < entry["high"]
    assert 0.92 < hits / 400 < 0.98
    assert figures.estimate("brier", np.array([0.01, 0.3, 0.2, 0.0]), np.array([0.0, 0.02]))["low"] == 0
    assert figures.estimate("mcc benign vs FTC", np.array([0.01, 0.3, 0.2, 0.0]), np.array([0.0, 0.02]))["low"] < 0


def test_scores_that_are_no_numbers_are_refused() -> None:
    part = {"file_name": ["a"], "patient_id": ["p"], "label": ["b"], "probabilities": [[float("nan"), 0.5]]}
    saved = {"condition": "none", "classes": ["a", "b"], "settings": {"task": "all", "seed": 3, "fold": None}}
    with pytest.raises(InputError, match="the scores of none, seed 3, on test: probabilities that are no numbers"):
        figures.read_run(saved | {"test": part})
