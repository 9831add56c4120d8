"""The gate: what its scores say of planted good and bad images, and that nothing is lost."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from eval_samples import PLACES, write_dataset
from PIL import Image

from eval import gate
from eval.features import resize
from eval.images import load_masks
from eval.judges import AttributeNet, Segmenter, save_judge
from tiger import manifest
from tiger.errors import InputError, run
from tiger.knowledge import Knowledge
from tiger.manifest import Manifest

JUDGES = Path(__file__).resolve().parents[1] / "assets" / "judges"
COUNTS = {"train": {"benign": 16, "FTC": 12}, "valid": {"benign": 10, "FTC": 8}, "test": {"benign": 4, "FTC": 4}}


# -------------------------------------------------------------------------------------------------------------- scores


def test_realism_by_hand() -> None:
    train = np.array([[0.0], [1.0], [2.0], [10.0]])  # distance to the 2nd nearest: 2, 1, 2, 9; the median is 2
    scores = gate.realism_scores(np.array([[1.5], [4.0], [10.5]]), train, k=2)
    # 2 / 1.5, 1 / .5, 2 / .5; then 2 / 4, 1 / 3, 2 / 2; the lone image at 10 lends no realism to its neighbour
    np.testing.assert_allclose(scores, [4, 1, 2 / 8.5])


def test_novelty_by_hand() -> None:
    train, patients = np.array([[0.0], [0.1], [4.0]]), np.array(["a", "a", "b"])
    # to the nearest, over its own distance to another patient's: 4 for 0, 3.9 for 0.1 and 4
    scores = gate.novelty_scores(np.array([[0.0], [0.2], [6.0]]), train, patients)
    np.testing.assert_allclose(scores, [0, 0.1 / 3.9, 2 / 3.9])


def test_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, train, patients = rng.normal(size=(23, 4)), rng.normal(size=(31, 4)), np.arange(31) // 2
    whole = gate.realism_scores(x, train), gate.novelty_scores(x, train, patients)
    monkeypatch.setattr(gate.parts, "__defaults__", (7,))
    pieces = gate.realism_scores(x, train), gate.novelty_scores(x, train, patients)
    np.testing.assert_allclose(pieces, whole)


def left_out(training: np.ndarray, y: np.ndarray, is_real: np.ndarray, z: int) -> float:
    """The rise of the risk on real images when image z leaves, by training twice."""

    def risk(rows: np.ndarray) -> float:
        mean, spread = training[is_real].mean(0), training[is_real].std(0) + 1e-6
        inputs = np.concatenate([(training - mean) / spread / np.sqrt(training.shape[1]), np.ones((len(y), 1))], 1)
        weights = np.zeros((inputs.shape[1], 2))
        total = 0.0
        for _ in range(gate.STEPS):
            logits = inputs @ weights
            p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            total = -np.sum(np.log(p[is_real, y[is_real]]) * gate._balance(y[is_real]))
            weights -= gate.RATE * inputs[rows].T @ ((p - np.eye(2)[y])[rows] * gate._balance(y)[rows, None])
        return total

    every = np.ones(len(y), bool)
    return risk(every & (np.arange(len(y)) != z)) - risk(every)


def test_usefulness_orders_images_as_leaving_them_out_does() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 60)
    training = rng.normal(size=(60, 5)) + 1.2 * np.outer(y, [1, 1, 0, 0, 0])
    is_real = np.arange(60) < 36
    y[50:] = 1 - y[50:]  # ten synthetic images with the wrong label
    scores = gate.usefulness_scores(training[36:], y[36:], training, y, is_real)
    truth = [left_out(training, y, is_real, z) for z in range(36, 60)]
    ranks = [np.argsort(np.argsort(values)) for values in (scores, truth)]
    assert np.corrcoef(*ranks)[0, 1] > 0.85 and np.corrcoef(scores, truth)[0, 1] > 0.9
    assert scores[14:].mean() < scores[:14].mean() - 0.02


def test_best_by_mean_rank() -> None:
    scores = {"a": np.array([3.0, 1.0, 2.0, 9.0]), "b": np.array([0.2, 0.1, np.nan, 0.9])}
    scores["novelty"] = np.array([0.0, 9.0, 9.0, 0.0])
    assert gate.best(scores, [0, 1, 2], 1) == [0]
    assert gate.best(scores, [0, 1, 2, 3], 2) == [0, 3]


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained nets."""
    folder = tmp_path_factory.mktemp("judges")
    save_judge(Segmenter(width=4, resolution=32), folder / "segmenter")
    save_judge(AttributeNet({"location": list(PLACES)}, width=4, resolution=32), folder / "attributes")
    return folder


@pytest.fixture
def real(tmp_path: Path) -> Manifest:
    return write_dataset(tmp_path / "real", COUNTS, seed=1)


@pytest.fixture
def fake(tmp_path: Path, real: Manifest) -> Manifest:
    """Twelve more of the same kind: the first is a training image, the second all white."""
    sources = [row.file_name for row in real.select(split="train").rows]
    counts = {"train": {"benign": 6, "FTC": 6}}
    made = write_dataset(tmp_path / "fake", counts, seed=2, synthetic=True, prefix="S", sources=sources)
    Image.open(real.file(real.rows[0], "file_name")).save(made.file(made.rows[0], "file_name"))
    Image.fromarray(np.full((32, 32), 255, np.uint8)).save(made.file(made.rows[1], "file_name"))
    return made


class Pixels:
    """Images as they are, 8 by 8, in place of a network's features."""

    name = "pixels"

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([resize(image, 8).ravel() for image in images]).astype(np.float32)


@pytest.fixture(autouse=True)
def pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "load_extractor", lambda *_: Pixels())


def command(real: Manifest, fake: Manifest, judges: Path, *more: str, output: str = "kept.jsonl") -> list[str]:
    argv = ["--real", str(real.root), "--fake", str(fake.root), "--output", str(fake.root / output)]
    return [*argv, "--judges", str(judges), "--cache_dir", str(fake.root / "cache"), *more]


def test_bad_images_go_with_reasons_and_nothing_is_lost(real: Manifest, fake: Manifest, judges: Path) -> None:
    before = fake.path.read_bytes()
    gate.main(command(real, fake, judges))
    assert fake.path.read_bytes() == before
    kept, rejected = (manifest.read(fake.root / name) for name in ("kept.jsonl", "kept_rejected.jsonl"))
    assert sorted(row.file_name for row in (*kept.rows, *rejected.rows)) == [row.file_name for row in fake.rows]
    assert all(row in fake.rows for row in kept.rows)
    notes = {}
    for name in ("kept.jsonl", "kept_rejected.jsonl"):
        for line in (fake.root / name).read_text().splitlines():
            notes[json.loads(line)["file_name"]] = json.loads(line)["gate"]
    assert all(set(note["scores"]) == set(gate.SCORES) for note in notes.values())
    assert {name for name, note in notes.items() if "reasons" in note} == {row.file_name for row in rejected.rows}
    copy, white = (notes[row.file_name] for row in fake.rows[:2])
    assert copy["scores"]["novelty"] == 0 and any(why.startswith("novelty 0 is below") for why in copy["reasons"])
    assert any(why.startswith("realism") for why in white["reasons"])
    report = json.loads((fake.root / "kept.json").read_text())
    assert ["do not say which model made them" in text for text in report["unchecked"]] == [True, False, False]
    assert [
        f"{judge} was trained on is not known" in text
        for judge, text in zip(("attributes", "segmenter"), report["unchecked"][1:], strict=True)
    ] == [True, True]
    assert sum(entry["kept"] for entry in report["kept"].values()) == len(kept.rows)
    for name, entry in report["scores"].items():
        assert entry["below"] == sum(note["scores"][name] < round(entry["bound"], 4) for note in notes.values()), name


def test_bounds_and_counts_can_be_given(real: Manifest, fake: Manifest, judges: Path) -> None:
    only = ["--scores", "novelty", "realism"]
    gate.main(command(real, fake, judges, *only, "--min_novelty", "-1", "--min_realism", "-1"))
    assert len(manifest.read(fake.root / "kept.jsonl").rows) == 12
    assert manifest.manifest_path(fake.root) == fake.path
    gate.main(command(real, fake, judges, *only, "--min_novelty", "-1", "--min_realism", "-1", "--most", "2"))
    kept = manifest.read(fake.root / "kept.jsonl").rows
    assert [row.label for row in kept] == ["benign"] * 2 + ["FTC"] * 2
    assert fake.rows[1] not in kept  # the white one ranks low


def test_bound_is_the_quantile_of_the_real_images(real: Manifest, fake: Manifest, judges: Path) -> None:
    gate.main(command(real, fake, judges, "--scores", "realism", "--quantile", "0.5"))
    of = json.loads((fake.root / "kept.json").read_text())["scores"]["realism"]
    assert of["bound"] == of["real_median"] and 0 < of["below"] < len(fake.rows)


def test_scores_of_the_nets_are_against_what_the_row_asks_for(
    fake: Manifest, judges: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = load_masks(fake, 32)
    monkeypatch.setattr(gate, "segment", lambda *_: np.concatenate([asked[:6], np.roll(asked[6:], 1, axis=0)]))
    scores = gate.mask_scores(judges / "segmenter", fake)
    assert (scores[:6] == 1).all() and (scores[6:] < 1).all()

    stated = [dict(row.attributes) for row in fake.rows]
    other = {PLACES[i]: PLACES[i - 1] for i in range(3)}
    seen = [*stated[:6], *({"location": other[of["location"]]} for of in stated[6:])]
    monkeypatch.setattr(gate, "predict_attributes", lambda *_: seen)
    silent = replace(fake.rows[0], text_fg="", attributes={})  # states nothing to agree with
    rows = replace(fake, rows=(silent, *fake.rows[1:]))
    scores = gate.attribute_scores(judges / "attributes", rows, Knowledge.load("thyroid"))
    assert np.isnan(scores[0]) and (scores[1:6] == 1).all() and (scores[6:] == 0).all()


@pytest.mark.parametrize(
    ("more", "output", "message"),
    [
        ([], "../kept.jsonl", "name a .jsonl file in"),
        ([], "kept.csv", "name a .jsonl file in"),
        ([], "metadata.jsonl", "which is never changed"),
        (["--quantile", "1"], "kept.jsonl", "must lie in 0..1"),
        (["--most", "0"], "kept.jsonl", "must be at least 1"),
        (["--scores", "realism", "--min_novelty", ".5"], "kept.jsonl", "--min_novelty: novelty is not among --scores"),
        (["--scores", "novelty", "--min_novelty", "1e9"], "kept.jsonl", "no image passes"),
    ],
)
def test_bad_input(
    real: Manifest, fake: Manifest, judges: Path, capsys: pytest.CaptureFixture[str], more: list[str], output: str,
    message: str,
) -> None:  # fmt: skip
    before = sorted(fake.root.iterdir())
    assert run(gate.main, command(real, fake, judges, *more, output=output)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and message in lines[0]
    assert [path for path in sorted(fake.root.iterdir()) if path.name != "cache"] == before


def test_images_made_from_test_rows_are_refused(
    real: Manifest, fake: Manifest, judges: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = real.select(split="test").rows[0].file_name
    manifest.write(fake.path, [replace(row, derived_from=(source,)) for row in fake.rows])
    assert run(gate.main, command(real, fake, judges)) == 2
    assert "derived from valid or test" in capsys.readouterr().err


def test_images_that_the_judges_were_not_trained_on_are_refused(
    real: Manifest, fake: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    for rows in (real, fake):
        manifest.write(rows.path, [replace(row, attributes={"margin": "spiculated"}) for row in rows.rows])
    assert run(gate.main, command(real, fake, JUDGES, "--dry_run")) == 2
    told = capsys.readouterr().err
    assert "does not know the margin 'spiculated'" in told
    assert "or --scores realism novelty usefulness" in told
    assert run(gate.main, command(real, fake, JUDGES, "--scores", "mask", "--dry_run")) == 2
    assert "does not know the margin 'spiculated'" in capsys.readouterr().err
    assert run(gate.main, command(real, fake, JUDGES, "--scores", "realism", "novelty", "usefulness")) == 0
    with pytest.raises(SystemExit):
        gate.main(["--help"])
    assert "know synthetic thyroid ultrasound only" in capsys.readouterr().out


def test_a_dry_run_looks_for_masks(real: Manifest, fake: Manifest, judges: Path) -> None:
    manifest.write(real.path, [replace(row, condition_fg=None) for row in real.rows])
    with pytest.raises(InputError, match="column 'condition_fg' is needed"):
        gate.main(command(real, fake, judges, "--dry_run"))
