"""Control fidelity between floor and ceiling, with judges whose answers are known."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_samples import PLACES, assert_leaks_are_refused, write_dataset
from PIL import Image

from eval import control
from eval.images import patients_of
from eval.judges import AttributeNet, Segmenter, save_judge
from tiger import manifest
from tiger.conditions import blank_nodule, read_gray, read_mask, sobel_map
from tiger.errors import InputError
from tiger.files import write_json
from tiger.manifest import Manifest

JUDGES = Path(__file__).resolve().parents[1] / "assets" / "judges"
COUNTS = {"test": {"benign": 9, "FTC": 6}}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Manifest, Manifest]:
    """Real images, and generated ones that are just as good."""
    fake = write_dataset(
        tmp_path / "fake", {"train": {"benign": 6, "FTC": 12}}, seed=1, synthetic=True, prefix="S", grain=7
    )
    return fake, write_dataset(tmp_path / "real", COUNTS, grain=7)


def bright(images: np.ndarray) -> np.ndarray:
    return images > 45  # the discs of tests/eval_samples.py, with some noise


def test_masks_between_floor_and_ceiling(folders: tuple[Manifest, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    fake, real = folders
    net = Segmenter(width=4, resolution=32)
    monkeypatch.setattr(control, "segment", lambda net, images: bright(images))
    result = control.mask_control(net, fake, real, {})
    assert result["generated"]["n"] == 18
    assert 0.3 < result["generated"]["value"] < 1
    assert result["generated"]["low"] < result["generated"]["value"] < result["generated"]["high"]
    assert result["ratio_to_ceiling"] == pytest.approx(1, abs=0.1)
    assert result["floor"]["value"] < 0.5 * result["generated"]["value"]
    of_class = result["per_class"]["FTC"]
    assert of_class["generated"]["n"] == of_class["floor"]["n"] == 12
    assert of_class["floor"]["low"] <= of_class["floor"]["value"] < 0.5 * of_class["generated"]["value"]
    monkeypatch.setattr(control, "segment", lambda net, images: np.zeros(images.shape, bool))
    blind = control.mask_control(net, fake, real, {})
    assert (blind["generated"]["value"], blind["ratio_to_ceiling"]) == (0, None)


def test_the_ceiling_has_the_class_shares_of_the_generated_images() -> None:
    labels = np.array(["a"] * 30 + ["b"] * 10)
    real = control.Judged(np.where(labels == "a", 0.4, 0.8), labels, np.arange(40))
    generated = control.Judged(np.full(8, 0.5), np.array(["a"] * 2 + ["b"] * 6), np.arange(8))
    result = control.compare(generated, generated, real)
    assert result["ceiling"]["value"] == pytest.approx(0.25 * 0.4 + 0.75 * 0.8)
    assert result["ratio_to_ceiling"] == pytest.approx(0.5 / 0.7)
    assert result["per_class"]["a"]["ceiling"]["value"] == pytest.approx(0.4)


def test_a_class_without_real_images_is_set_against_nothing() -> None:
    labels = np.array(["a"] * 5 + ["c"] * 15)
    generated = control.Judged(np.where(labels == "a", 1.0, 0.0), labels, np.arange(20))
    real = control.Judged(np.ones(4), np.array(["a"] * 3 + ["b"]), np.arange(4))
    result = control.compare(generated, generated, real)
    assert result["generated"]["n"] == result["floor"]["n"] == 5 and set(result["per_class"]) == {"a"}
    assert result["generated"]["value"] == result["ceiling"]["value"] == result["ratio_to_ceiling"] == 1
    nothing = control.compare(generated.where(labels == "c"), generated, real)
    assert np.isnan(nothing["ceiling"]["value"]) and nothing["ratio_to_ceiling"] is None


def test_a_class_without_a_floor_has_none() -> None:
    labels = np.array(["a", "a", "b"])
    every = control.Judged(np.array([0.2, 0.4, 0.6]), labels, np.arange(3))
    result = control.compare(every, every.where(labels == "a"), every)
    assert result["per_class"]["a"]["floor"]["value"] == pytest.approx(0.3)
    assert result["per_class"]["b"]["floor"]["n"] == 0
    assert np.isnan(result["per_class"]["b"]["floor"]["value"])


def test_generated_images_belong_to_the_patient_of_their_map(tmp_path: Path) -> None:
    real = write_dataset(tmp_path / "real", {"train": {"FTC": 4}})  # two images a patient
    sources = [row.file_name for row in real.rows]
    fake = write_dataset(tmp_path / "fake", {"train": {"FTC": 4}}, synthetic=True, prefix="S", sources=sources)
    groups = control.judged(np.zeros(4), fake, patients_of(real.rows)).groups
    assert groups.tolist() == [row.patient_id for row in real.rows]
    assert len(set(groups)) == 2


def test_shuffling_leaves_nothing_in_place() -> None:
    for count in (2, 3, 17):
        order = control.shuffled(count)
        assert sorted(order) == list(range(count))
        assert (order != np.arange(count)).all()


def test_sobel_correlation_is_one_for_the_image_itself(folders: tuple[Manifest, Manifest]) -> None:
    fake, real = folders
    result = control.sobel_control(fake, real, {})
    assert result["generated"]["value"] == pytest.approx(1)
    assert result["ceiling"]["value"] == pytest.approx(1)
    assert result["floor"]["value"] < 0.6
    assert result["images_compared_in_whole"] == 18


def test_blanked_maps_are_compared_outside_the_mask(folders: tuple[Manifest, Manifest]) -> None:
    fake, real = folders
    for row in fake.rows:  # what is in the nodule was not asked for by the map, and may be anything there
        image, mask = read_gray(fake.file(row, "file_name")), read_mask(fake.file(row, "condition_fg"))
        Image.fromarray(blank_nodule(sobel_map(image), mask)).save(fake.file(row, "condition_bg"))
    result = control.sobel_control(fake, real, {})
    assert result["images_compared_outside_the_mask"] == 18
    assert result["generated"]["value"] == pytest.approx(1)


def test_correlation_by_hand() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (32, 32)).astype(np.uint8)
    edges = rng.integers(0, 255, (32, 32)).astype(np.uint8)
    region = np.zeros((32, 32), bool)
    region[4:20, 6:30] = True
    expected = np.corrcoef(edges[region], sobel_map(image)[region])[0, 1]
    assert control.correlation(edges, image, region) == pytest.approx(expected)
    assert control.correlation(np.zeros_like(edges), image, region) == 0


def place_of(image: np.ndarray) -> str:
    return PLACES[int(np.argmax([part.mean() for part in np.array_split(image, 3, axis=1)]))]


def test_attributes_between_floor_and_ceiling(
    folders: tuple[Manifest, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, real = folders
    net = AttributeNet({"location": list(PLACES)}, width=4, resolution=32)

    def predict(net: AttributeNet, images: np.ndarray) -> list[dict[str, str]]:
        return [{"location": place_of(image)} for image in images]

    monkeypatch.setattr(control, "predict_attributes", predict)
    knowledge = control.Knowledge.load("thyroid")
    result = control.attribute_control(net, fake, real, {}, knowledge)
    assert result["generated"]["value"] > 0.9
    assert result["floor"]["value"] < 0.7
    assert result["categories"]["location"]["generated"] == result["generated"]
    prompts_only = Manifest(fake.path, tuple(replace(row, attributes={}) for row in fake.rows))
    assert control.attribute_control(net, prompts_only, real, {}, knowledge)["generated"] == result["generated"]
    silent = Manifest(
        fake.path, tuple(replace(row, attributes={}, text_fg="malignant", text_bg="sonogram") for row in fake.rows[:1])
    )
    with pytest.raises(InputError, match="rows that state no attribute.*S0000.png"):
        control.attribute_control(net, Manifest(fake.path, silent.rows + fake.rows[1:]), real, {}, knowledge)


def test_command_writes_a_report(folders: tuple[Manifest, Manifest], tmp_path: Path) -> None:
    fake, real = folders
    save_judge(Segmenter(width=4, resolution=32).eval(), tmp_path / "judges" / "segmenter")
    save_judge(AttributeNet({"location": list(PLACES)}, 4, 32).eval(), tmp_path / "judges" / "attributes")
    write_json(tmp_path / "judges" / "segmenter" / "metrics.json", {"command": "train it"})
    given = ["--fake", str(fake.root), "--real", str(real.root), "--judges", str(tmp_path / "judges")]
    control.main([*given, "--output", str(tmp_path / "control.json")])
    report = json.loads((tmp_path / "control.json").read_text())
    assert report["n"] == {"generated": 18, "real": 15}
    assert report["command"].startswith("python -m eval.control --fake ")
    assert report["judges"]["segmenter"] == {"folder": str(tmp_path / "judges" / "segmenter"), "command": "train it"}
    makers, *judges = report["unchecked"]
    assert "18 rows do not say which model made them" in makers
    for told, judge in zip(judges, ("segmenter", "attributes"), strict=True):
        assert told.startswith(f"what {tmp_path / 'judges' / judge} was trained on is not known")
    assert report["judges"]["attributes"]["command"] == ""  # nobody wrote down how it was made
    assert set(report) >= {"mask_iou", "sobel_correlation", "attribute_agreement"}
    control.main([*given, "--output", str(tmp_path / "dry.json"), "--dry_run"])
    assert not (tmp_path / "dry.json").exists()
    with pytest.raises(InputError, match="no config.json; train this judge first"):
        control.main([*given[:4], "--judges", str(tmp_path), "--output", str(tmp_path / "c.json")])
    manifest.write(real.root / "metadata.jsonl", [replace(row, label="MTC") for row in real.rows])
    with pytest.raises(InputError, match="no class in common"):
        control.main([*given, "--output", str(tmp_path / "c.json")])


def test_what_was_made_from_the_ceilings_images_is_refused(
    folders: tuple[Manifest, Manifest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, real = folders
    given = ["--fake", str(fake.root), "--real", str(real.root), "--judges", str(JUDGES), "--dry_run"]
    given += ["--output", str(tmp_path / "c.json")]
    control.main(given)
    assert "judges was trained on" not in capsys.readouterr().err  # it is known of those that come with the code
    assert_leaks_are_refused(lambda: control.main(given), fake, real.root, real.rows[0].file_name, tmp_path)


@pytest.mark.parametrize("judge", ["segmenter", "attributes"])
def test_a_judge_that_was_trained_on_the_ceilings_images_is_refused(
    folders: tuple[Manifest, Manifest], tmp_path: Path, capsys: pytest.CaptureFixture[str], judge: str
) -> None:
    fake, real = folders
    judges = shutil.copytree(JUDGES, tmp_path / "judges")
    given = ["--fake", str(fake.root), "--real", str(real.root), "--judges", str(judges), "--dry_run"]
    given += ["--output", str(tmp_path / "c.json")]
    control.main(given)
    assert f"what {judges / judge} was trained on is not known" in capsys.readouterr().err
    (judges / judge / "config.yaml").write_text(f"data_dir: {real.root}\nsplit: test\n")
    with pytest.raises(InputError, match=f"the net .*{judge} was trained on patients of valid or test"):
        control.main(given)


@pytest.mark.parametrize("name", ["fake", "real"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"condition_fg": None}, "column 'condition_fg' is needed"),
        ({"condition_bg": None}, "column 'condition_bg' is needed"),
        ({"attributes": {"margin": "spiculated"}}, "does not know the margin 'spiculated' of images/"),
        ({"attributes": {"orientation": "parallel"}}, "no row states an attribute that it knows"),
    ],
)
def test_a_dry_run_finds_what_would_stop_a_run(
    folders: tuple[Manifest, Manifest], tmp_path: Path, name: str, change: dict[str, Any], message: str
) -> None:
    """With the judges of assets/judges, which are the default."""
    changed = folders[("fake", "real").index(name)]
    manifest.write(changed.path, [replace(row, **change) for row in changed.rows])
    argv = ["--fake", str(folders[0].root), "--real", str(folders[1].root), "--output", str(tmp_path / "c.json")]
    with pytest.raises(InputError, match=message) as error:
        control.main([*argv, "--judges", str(JUDGES), "--dry_run"])
    assert str(error.value).startswith(str(changed.path))
    assert "attributes" not in change or "python -m eval.attributes train" in str(error.value)
