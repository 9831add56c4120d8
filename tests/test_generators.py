"""Several generators as one arm: their mean, and what three of them can tell."""

import lzma
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_samples import make_run
from PIL import Image

from benchmarks import generators
from eval import statistics
from eval.figures import Run
from eval.runs import read_table, write_table
from eval.study import Trial, read_condition
from tiger.errors import InputError
from tiger.files import read_json


def study(gains: tuple[float, ...], seeds: int = 3) -> list[Run]:
    """Two plain arms, and as many generators as there are gains."""
    runs = [make_run("oversampling", 0.5, seed, noise=seed) for seed in range(seeds)]
    runs += [make_run("real_upper", 1.7, seed, noise=seed) for seed in range(seeds)]
    for number, gain in enumerate(gains):
        runs += [make_run(f"tiger_f_{number}", gain, seed, noise=seed) for seed in range(seeds)]
    return runs


def difference(runs: list[Run]) -> dict[str, float]:
    found = generators.summarise(generators.draw(runs, "benign", 300), {"oversampling": 0.0})
    return next(one for one in found["differences"] if (one["arm"], one["figure"]) == ("tiger_f", "benign-FTC"))


def test_generators_are_one_arm_whose_figure_is_their_mean() -> None:
    runs = study((0.8, 1.1, 1.4))
    found = generators.summarise(generators.draw(runs, "benign", 300), {"oversampling": 0.0})
    assert list(found["arms"]) == ["oversampling", "real_upper", "tiger_f"]
    auc = {
        arm: np.mean([statistics.auc(one.test.y, one.test.p[:, 1]) for one in runs if one.condition.startswith(arm)])
        for arm in found["arms"]
    }
    for arm, entry in found["arms"].items():
        assert entry["benign-FTC"]["value"] == entry["macro"]["value"] == pytest.approx(auc[arm])
        assert entry["benign-FTC"]["low"] < auc[arm] < entry["benign-FTC"]["high"]
    share = (auc["tiger_f"] - auc["oversampling"]) / (auc["real_upper"] - auc["oversampling"])
    assert found["shares"]["oversampling"]["tiger_f"]["benign-FTC"]["value"] == pytest.approx(share, rel=1e-6)
    of_figure = [one for one in found["differences"] if one["figure"] == "macro"]
    assert [one["p_holm"] for one in of_figure] == pytest.approx(statistics.holm([one["p"] for one in of_figure]))


def test_generators_of_an_amount_are_one_arm_and_what_has_none_is_said_to_have_none() -> None:
    named = {"tiger_f": "tiger_f_{}, 100 a class", "oversampling": "oversampling, 0.5 of the real"}
    runs = []
    for one in study((0.8, 1.1)):
        method, number = generators.generator_of(one.condition)
        runs.append(replace(one, condition=named.get(method, method).format(number)))
    found = generators.summarise(generators.draw(runs, "benign", 50), {"oversampling, 0.5 of the real": 0.0})
    counts = {arm: entry["macro"]["generators"] for arm, entry in found["arms"].items()}
    assert counts == {"oversampling, 0.5 of the real": 0, "real_upper": 0, "tiger_f, 100 a class": 2}
    assert generators.named("tiger_f, 100 a class", found["arms"]["tiger_f, 100 a class"]).endswith("2 generators")


def test_differences_of_a_figure_are_one_family_and_a_pair_is_tested_once() -> None:
    drawn = generators.draw(study((0.5, 0.6, 0.7)), "benign", 300)
    family = [
        one for one in generators.summarise(drawn, {"oversampling": 0.0, "real_upper": 0.0})["differences"]
        if one["figure"] == "macro"
    ]  # fmt: skip
    pairs = [(one["arm"], one["against"]) for one in family]
    assert pairs == [("real_upper", "oversampling"), ("tiger_f", "oversampling"), ("tiger_f", "real_upper")]
    p = [one["p"] for one in family]
    assert max(p) > 1e-3 and [one["p_holm"] for one in family] == pytest.approx(statistics.holm(p), rel=1e-6, abs=0)


def test_chosen_arms_are_a_family_of_their_own(tmp_path: Path) -> None:
    runs = [*study((0.8, 0.9, 1.0)), *(make_run("basic", 0.51, seed, noise=seed + 9) for seed in range(3))]
    save(runs, tmp_path / "scores.csv")
    arguments = ["--scores", str(tmp_path / "scores.csv"), "--against", "oversampling", "--output"]
    p = {}
    for name, more in (("all", []), ("aims", ["--arms", "tiger_f"])):
        generators.main([*arguments, str(tmp_path / f"{name}.json"), *more])
        p[name] = {
            one["arm"]: (one["p"], one["p_holm"])
            for one in read_json(tmp_path / f"{name}.json")["differences"]
            if one["figure"] == "macro"
        }
    assert set(p["all"]) == {"basic", "real_upper", "tiger_f"} and set(p["aims"]) == {"tiger_f"}
    assert p["aims"]["tiger_f"] == pytest.approx((p["all"]["tiger_f"][0],) * 2)
    assert p["all"]["tiger_f"][1] > 1.9 * p["all"]["tiger_f"][0]
    pairs = [("none", "oversampling"), ("tiger_f", "none"), ("tiger_f", "oversampling")]
    assert set(generators.pairs_of(["none", "tiger_f", "tiger_f"], ["oversampling", "none"])) == set(pairs)
    with pytest.raises(InputError, match="--arms none --against none: give two different arms"):
        generators.pairs_of(["none"], ["none"])
    assert read_json(tmp_path / "aims.json")["arms_tested"] == ["tiger_f"]
    with pytest.raises(InputError, match="--arms sd: .* has basic, oversampling, real_upper, tiger_f"):
        generators.main([*arguments, str(tmp_path / "out.json"), "--arms", "sd"])


def test_a_share_has_fiellers_interval() -> None:
    """Beside the closed form, of means whose variance is as good as known."""
    rng = np.random.default_rng(0)
    deviations = rng.multivariate_normal([0, 0, 0], 4e-4 * np.array([[2, 1, 1], [1, 2, 1], [1, 1, 2]]), 500).T
    values = np.array([[0.75], [0.65], [0.8]]) + np.hstack([np.zeros((3, 1)), deviations])
    arm, plain, upper = ({None: one[None]} for one in values)
    gain, most = values[0] - values[1], values[2] - values[1]
    (v, c), (_, w) = np.cov(gain[1:], most[1:])
    z, a, b = statistics.Z, gain[0], most[0]
    ends = np.sort(np.roots([b**2 - z**2 * w, 2 * (z**2 * c - a * b), a**2 - z**2 * v]))
    found = generators.share(arm, plain, upper)
    assert found == pytest.approx({"value": a / b, "low": ends[0], "high": ends[1]}, rel=1e-6)
    assert found["high"] - found["value"] > 1.1 * (found["value"] - found["low"])
    vague = generators.share(arm, plain, {None: 0.65 + 0.3 * (values[2:] - 0.65)})
    assert vague["high"] == math.inf > vague["value"]


def test_a_margin_is_tested_too() -> None:
    drawn = generators.draw(study((0.8, 0.9, 1.0)), "benign", 300)["macro"]
    tiger, plain = drawn["tiger_f"], drawn["oversampling"]
    found = generators.estimate(np.subtract, tiger, plain, margin=0.05)
    below = generators.estimate(np.subtract, tiger, {None: plain[None] + 0.05})
    assert found["value"] > 0.05 and 1e-6 < found["p_beyond"] < 0.2
    assert found["p_beyond"] == pytest.approx(below["p"] / 2)
    assert generators.estimate(np.subtract, tiger, plain, margin=found["value"])["p_beyond"] == pytest.approx(0.5)
    assert generators.estimate(np.subtract, tiger, plain, margin=0.5)["p_beyond"] > 0.99


def test_generators_that_disagree_weaken_a_test() -> None:
    alike, apart = difference(study((1.1, 1.1, 1.1))), difference(study((0.6, 1.1, 1.6)))
    assert alike["value"] == pytest.approx(apart["value"], abs=0.03)
    assert alike["p"] < 1e-4 and 0.01 < apart["p"] < 0.3  # all three are above, and three are few
    one = difference(study((1.1,)))
    assert one["high"] - one["low"] == pytest.approx(alike["high"] - alike["low"], rel=0.05)
    assert (one["generators"], alike["generators"]) == (1, 3)  # what the interval of one does not cover is said


def test_an_arm_of_one_generator_is_called_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [*study((0.8, 1.1)), *(make_run("coarse", 0.9, seed, noise=seed) for seed in range(3))]
    runs += [make_run("real_common", 0.6, seed, noise=seed) for seed in range(3)]  # no generator: real images
    save(runs, tmp_path / "scores.csv")
    arguments = ["--scores", str(tmp_path / "scores.csv"), "--output", str(tmp_path / "out.json")]
    generators.main([*arguments, "--against", "oversampling", "coarse"])
    told, found = capsys.readouterr().out, read_json(tmp_path / "out.json")
    assert {arm: of["macro"]["generators"] for arm, of in found["arms"].items()} == {
        "oversampling": 0, "real_upper": 0, "tiger_f": 2, "coarse": 1, "real_common": 0
    }  # fmt: skip
    pairs = {(one["arm"], one["against"]): one["generators"] for one in found["differences"]}
    assert pairs["tiger_f", "oversampling"] == 2 and pairs["real_upper", "oversampling"] == 0
    assert pairs["tiger_f", "coarse"] == pairs["coarse", "oversampling"] == 1
    assert found["shares"]["oversampling"]["coarse"]["macro"]["generators"] == 1
    coarse = "Stable Diffusion (coarse stage), one generator"
    assert f"| {coarse} | " in told and f"| minus {coarse} | " in told and "| oversampling | " in told
    assert told.splitlines()[-1].startswith("One generator: intervals and p do not cover")


def test_a_missing_training_and_an_unknown_arm_are_refused(tmp_path: Path) -> None:
    runs = study((0.8, 1.1))
    with pytest.raises(InputError, match=r"arm tiger_f: needs a training .* generators \[0, 1\] and seeds \[0, 1, 2\]"):
        generators.draw(runs[:-1], "benign", 10)
    arguments = ["--scores", str(tmp_path / "scores.csv"), "--output", str(tmp_path / "out.json")]
    save(runs, tmp_path / "scores.csv")
    with pytest.raises(InputError, match="--against sd: .* has oversampling, real_upper, tiger_f"):
        generators.main([*arguments, "--against", "sd"])
    with pytest.raises(InputError, match="--margins: 2 numbers for 1 arms of --against; give one each"):
        generators.main([*arguments, "--against", "oversampling", "--margins", "0.1", "0.03"])
    mixed = [*runs, *(make_run("tiger_f", 0.9, seed) for seed in range(3))]
    with pytest.raises(InputError, match="arm tiger_f: some of its trainings name a generator and some do not"):
        generators.draw(mixed, "benign", 10)


def save(runs: list[Run], path: Path) -> None:
    """A table of scores, as eval.classify leaves it."""

    def about(one: Run) -> dict[str, Any]:
        scores = {
            "file_name": one.test.file_names,
            "patient_id": one.test.patients,
            "label": [one.classes[c] for c in one.test.y],
            "probabilities": one.test.p.tolist(),
        }
        settings = {"task": one.task, "seed": one.seed, "fold": one.fold}
        return {"settings": settings, "condition": one.condition, "classes": one.classes, "test": scores}

    write_table(path, map(about, runs))


def test_tables_are_printed_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(study((0.8, 1.1)), tmp_path / "scores.csv")
    output = tmp_path / "out.json"
    arguments = ["--scores", str(tmp_path / "scores.csv"), "--output", str(output)]
    generators.main([*arguments, "--against", "oversampling", "--chart", str(tmp_path / "chart.png")])
    with Image.open(tmp_path / "chart.png") as chart:
        assert chart.format == "PNG" and chart.width > chart.height
    told = capsys.readouterr().out
    entry = read_json(output)["arms"]["tiger_f"]["benign-FTC"]
    assert f"| Tiger-F, 2 generators | {entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}] |" in told
    assert "| minus oversampling | benign-FTC | macro |" in told
    assert "| share of what further real images gain over oversampling | benign-FTC | macro |" in told
    assert "ne generator" not in told


def test_tables_are_taken_together_also_packed(tmp_path: Path) -> None:
    runs = study((0.8, 1.1, 0.9))
    save(runs, tmp_path / "whole.csv")
    save(runs[:9], tmp_path / "one.csv")
    save(runs[9:], tmp_path / "two.csv")
    packed = tmp_path / "two.csv.xz"
    packed.write_bytes(lzma.compress((tmp_path / "two.csv").read_bytes()))

    def figures_of(*paths: Path) -> dict[str, Any]:
        output = str(tmp_path / "out.json")
        generators.main(["--scores", *map(str, paths), "--output", output, "--against", "oversampling"])
        return read_json(output)

    assert figures_of(tmp_path / "one.csv", packed) == figures_of(tmp_path / "whole.csv")
    with pytest.raises(InputError, match=r"arm tiger_f_1, seed 0: more than one training; give each once"):
        figures_of(tmp_path / "whole.csv", packed)
    packed.write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"two\.csv\.xz: cannot be read as a table of scores"):
        figures_of(tmp_path / "one.csv", packed)
    with pytest.raises(InputError, match="--negative normal: .*whole.csv has benign, FTC"):
        generators.main(["--scores", str(tmp_path / "whole.csv"), "--output", "x.json", "--negative", "normal"])


def test_a_table_gives_back_the_runs(tmp_path: Path) -> None:
    def part(names: str, classes: int) -> dict[str, Any]:
        rows = [[round(1 / (i + 2 + c), 7) for c in range(classes)] for i in range(len(names))]
        return {"file_name": [*names], "patient_id": ["01", "NA"], "label": ["benign", "MTC"], "probabilities": rows}

    settings = {"task": "all", "seed": 3, "fold": None, "arm": "tiger_f_0", "amount": 5, "real_share": 0.25}
    other = {"task": "MTC", "seed": 0, "fold": 2, "arm": "none", "amount": None, "real_share": 1.0}
    net = {"model": "resnet18", "image_size": 64, "real_images": 99}
    condition = "tiger_f_0, 5 a class, 0.25 of the real"
    runs = [
        {"condition": condition, "classes": ["benign", "FTC", "MTC"], "settings": settings}
        | net
        | {"valid": part("ab", 3), "test": part("cd", 3)},
        {"condition": "none", "classes": ["benign", "MTC"], "settings": other} | {"test": part("cd", 2)},
    ]
    write_table(tmp_path / "scores.csv", runs)
    assert read_table(tmp_path / "scores.csv") == runs
    (tmp_path / "scores.csv").write_text("file_name,label\na,b\n")
    with pytest.raises(InputError, match="not a table of scores .*; it has 1 rows of file_name, label"):
        read_table(tmp_path / "scores.csv")


@pytest.mark.parametrize(
    ("was", "becomes", "told"),
    [
        (",0,,test,", ",zero,,test,", "invalid literal for int"),
        (",0,,test,", ",0,,Test,", "rows of split 'Test'"),
        (",0,,test,", ",0,,valid,", "no rows of split 'test'"),
        ("benign,0.25", "benign,", "could not convert string to float"),
        ("FTC,0.5", "MTC,0.5", "rows of class MTC, and no probabilities of it"),
        ("b.png", "a.png", "a.png is there more than once in test"),
    ],
)
def test_a_table_that_is_not_one_is_refused_by_its_run(tmp_path: Path, was: str, becomes: str, told: str) -> None:
    lines = ["arm,task,seed,fold,split,file_name,patient_id,label,p_benign,p_FTC"]
    lines += ["none,all,0,,test,a.png,A,benign,0.25,0.75", "none,all,0,,test,b.png,B,FTC,0.5,0.5"]
    path = tmp_path / "scores.csv"
    path.write_text("\n".join(lines))
    assert read_table(path)[0]["test"]["probabilities"] == [[0.25, 0.75], [0.5, 0.5]]
    path.write_text("\n".join(lines).replace(was, becomes))
    with pytest.raises(InputError, match=f"scores.csv: arm none, task all.*{told}"):
        read_table(path)


def test_a_condition_says_what_it_is_of() -> None:
    for trial in (Trial("all", "none", 0), Trial("all", "tiger_f_0", 0, None, 100), Trial("MTC", "sd", 1, 2, 5, 1 / 3)):
        share = float(f"{trial.real_share:.4g}")
        found = {"arm": trial.arm, "amount": trial.amount, "real_share": share}
        assert read_condition(trial.condition) == found
    with pytest.raises(ValueError, match="'none, all of it' is no arm with its amount and its share"):
        read_condition("none, all of it")


def test_generators_are_paired_by_number() -> None:
    """An arm of fewer is set against the same ones; one of others is not set against at all."""
    runs = study((0.5, 1.0, 1.5))
    two = [make_run(f"coarse_{k}", gain, seed, noise=seed) for seed in range(3) for k, gain in ((1, 0.9), (2, 1.4))]
    drawn = generators.draw([*runs, *two], "benign", 100)
    found = {
        (one["arm"], one["against"]): one
        for one in generators.summarise(drawn, {"coarse": 0.0})["differences"]
        if one["figure"] == "macro"
    }
    tiger, coarse = (
        [np.mean([drawn["macro"][arm][k][:, 0].mean() for k in (1, 2)]) for arm in ("tiger_f", "coarse")]
    )  # fmt: skip
    entry = found["tiger_f", "coarse"]
    assert entry["value"] == pytest.approx(tiger - coarse) and entry["generators"] == 2
    first = generators.draw([*runs, *(make_run("coarse_0", 0.9, seed, noise=seed) for seed in range(3))], "benign", 100)
    (entry,) = (
        one for one in generators.summarise(first, {"coarse": 0.0}, ["tiger_f"])["differences"]
        if one["figure"] == "macro"
    )  # fmt: skip
    tiger, coarse = (first["macro"][arm][0][:, 0].mean() for arm in ("tiger_f", "coarse"))
    assert entry["value"] == pytest.approx(tiger - coarse) and entry["generators"] == 1
    others = [make_run(f"coarse_{k}", 0.9, seed) for seed in range(3) for k in (7, 8)]
    with pytest.raises(InputError, match=r"generators .*\[7, 8\].* have no number in common"):
        generators.summarise(generators.draw([*runs, *others], "benign", 10), {"coarse": 0.0})


def test_one_seed_and_other_test_images_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(study((0.8, 1.1), seeds=1), tmp_path / "scores.csv")
    arguments = ["--scores", str(tmp_path / "scores.csv"), "--against", "oversampling", "--resamples", "20"]
    generators.main([*arguments, "--output", str(tmp_path / "out.json")])
    assert capsys.readouterr().out.splitlines()[-1].startswith("One seed: intervals and p do not cover")
    other = make_run("basic", 0.9, 0)
    other.test.patients[0] = "another"
    with pytest.raises(InputError, match="arm basic: its test images are others than those of arm oversampling"):
        generators.draw([*study((0.8,), seeds=1), other], "benign", 10)
