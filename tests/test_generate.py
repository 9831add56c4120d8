"""Synthesis: what goes into each image, and that the folder is right however the work is cut up."""

import collections
import json
import shutil
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import awaken, make_scheduler, make_text_encoder, make_unet, make_vae
from PIL import Image

from tiger import conditions, generate, manifest
from tiger.errors import InputError, run
from tiger.generate import Planner, draw_conditions
from tiger.knowledge import Knowledge
from tiger.manifest import Manifest, Row
from tiger.model import DualControlNet
from tiger.pipeline import TigerPipeline
from tiger.tokenizer import build_clip_tokenizer

SIZE = 64
KNOWLEDGE = Knowledge.load("thyroid")
RADIUS = {"small": 4, "middle": 7, "large": 10, "enormous": 13}
COUNTS = {"train": {"benign": 8, "PTC": 8, "FTC": 3, "MTC": 2}, "test": {"benign": 4, "FTC": 4}}


def disc(x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:SIZE, :SIZE]
    return np.where((columns - x) ** 2 + (rows - y) ** 2 <= radius**2, 255, 0).astype(np.uint8)


def make_row(root: Path, index: int, label: str, split: str, organ: bool) -> Row:
    """A random picture with a round nodule in its stated pole, and all conditions."""
    rng = np.random.default_rng([index, 7])
    attributes = KNOWLEDGE.sample(label, rng)
    x = (SIZE // 8) + SIZE * 3 // 4 * (conditions.POLES.index(attributes["location"]) + 0.5) / 3
    pictures = {
        "file_name": rng.integers(0, 256, (SIZE, SIZE), dtype=np.uint8),
        "condition_fg": disc(x, SIZE / 2, RADIUS[attributes["diameter"]]),
        "condition_bg": rng.integers(1, 256, (SIZE, SIZE), dtype=np.uint8),  # zero only where something blanked it
    }
    if organ:
        pictures["organ_mask"] = np.zeros((SIZE, SIZE), np.uint8)
        pictures["organ_mask"][12:52, 8:56] = 255
    files = {}
    for column, picture in pictures.items():
        files[column] = f"{column}/{split}_{index:03d}.png"
        (root / column).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(root / files[column])
    text_fg, text_bg = KNOWLEDGE.compose(label, attributes)
    return Row(
        **files,
        text_fg=text_fg,
        text_bg=text_bg,
        label=label,
        patient_id=f"{split}{index}",
        split=split,
        attributes=attributes,
        plane=attributes["direction"].split()[0],
    )


def make_data(root: Path, organ: bool = True) -> Manifest:
    rows = []
    for split, counts in COUNTS.items():
        for label, count in counts.items():
            rows += [make_row(root, len(rows) + i, label, split, organ) for i in range(count)]
    manifest.write(root / "metadata.jsonl", rows)
    return manifest.read(root)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random fine-tuned model of the embedded base's kind, 64 px."""
    folder = tmp_path_factory.mktemp("model")
    unet = make_unet("tiny")
    pipeline = TigerPipeline(
        vae=make_vae(8),
        text_encoder=make_text_encoder(),
        tokenizer=build_clip_tokenizer(),
        unet=unet,
        scheduler=make_scheduler("tiny"),
        controlnet=awaken(DualControlNet.from_unet(unet)),
    )
    pipeline.save_pretrained(str(folder))
    return str(folder)


def planner(data: Manifest, mode: str = "diversify", prompts: str = "auto", seed: int = 0) -> Planner:
    return Planner(data.select(split="train"), KNOWLEDGE, mode=mode, prompts=prompts, seed=seed)


class Stub:
    """Stands in for the pipeline: an image is its generator's noise, with the mask drawn on it, and calls are kept."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, text_fg: list[str], text_bg: list[str], **options: Any) -> types.SimpleNamespace:
        self.calls.append({"text_fg": text_fg, "text_bg": text_bg, **options})
        noise = [torch.randint(0, 256, (SIZE, SIZE), generator=g, dtype=torch.uint8) for g in options["generator"]]
        return types.SimpleNamespace(images=[Image.fromarray(x.numpy()).convert("RGB") for x in noise])


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    stub = Stub()
    monkeypatch.setattr(generate, "load_pipeline", lambda config: stub)
    return stub


def arguments(data: Manifest, model: str, output: Path, *more: str) -> list[str]:
    return ["--model", model, "--data_dir", str(data.root), "--output_dir", str(output), "--batch_size", "4", *more]


# -------------------------------------------------------------------------------------------------------------- recipes


def test_recipe_is_a_function_of_seed_class_and_number(data: Manifest) -> None:
    for label in ("FTC", "benign"):
        recipes = [planner(data, seed=5).recipe(label, i) for i in range(6)]
        assert recipes == [planner(data, seed=5).recipe(label, i) for i in range(6)]
        assert len({recipe.noise_seed for recipe in recipes}) == 6
        assert recipes != [planner(data, seed=6).recipe(label, i) for i in range(6)]


def test_auto_prompts(data: Manifest) -> None:
    train = data.select(split="train")
    theirs = {row.text_fg for row in train.rows if row.label == "benign"}
    fg = [name for name, category in KNOWLEDGE.categories.items() if category.role == "fg"]
    for number in range(20):
        common, rare = (planner(data).recipe(label, number) for label in ("benign", "FTC"))
        assert common.text_fg in theirs
        assert rare.text_fg.startswith("malignant, follicular, ")
        assert set(fg) <= set(rare.attributes)
        for recipe in (common, rare):  # texts, attributes and the map's plane agree
            parsed = KNOWLEDGE.parse(f"{recipe.text_fg}, {recipe.text_bg}")
            assert parsed.attributes == dict(recipe.attributes)
            assert parsed.label == recipe.label
            assert recipe.attributes["direction"].split()[0] == recipe.map_row.plane


def test_knowledge_prompts_go_beyond_the_training_rows_and_names_say_nothing_else(data: Manifest) -> None:
    texts = {planner(data, prompts="knowledge").recipe("FTC", i).text_fg for i in range(30)}
    assert len(texts) > 20
    names = planner(data, prompts="names").recipe("FTC", 0)
    assert (names.text_fg, names.text_bg) == KNOWLEDGE.compose("FTC", {})
    assert names.attributes == {}


def test_estimated_prompts_keep_to_what_the_class_shows(data: Manifest) -> None:
    rows = [row for row in data.select(split="train").rows if row.label == "PTC"]
    texts = set()
    for number in range(40):
        recipe = planner(data, prompts="estimated").recipe("PTC", number)
        for name, category in KNOWLEDGE.categories.items():
            if category.role == "fg" and name in recipe.attributes:
                assert recipe.attributes[name] in {row.attributes[name] for row in rows}
        texts.add(recipe.text_fg)
    assert not texts <= {row.text_fg for row in rows}  # combinations, not copies


def test_masks_and_maps_are_of_training_rows_and_maps_of_common_classes(data: Manifest) -> None:
    used = collections.Counter()
    for number in range(60):
        recipe = planner(data).recipe("MTC", number)
        assert recipe.mask_row.split == recipe.map_row.split == "train"
        assert recipe.map_row.label in ("benign", "PTC")
        used[recipe.map_row.file_name] += 1
    assert len(used) > 5


def test_mask_shows_the_stated_diameter(data: Manifest) -> None:
    plan = planner(data, prompts="knowledge")
    there = {row.attributes["diameter"] for row in plan.usable}
    stated = [recipe for i in range(60) if (recipe := plan.recipe("FTC", i)).attributes["diameter"] in there]
    agree = np.mean([r.mask_row.attributes["diameter"] == r.attributes["diameter"] for r in stated])
    assert agree > 0.7, agree  # it is one of three traits to agree on, so not always
    by_chance = np.mean([a.mask_row.attributes["diameter"] == b.attributes["diameter"] for a in stated for b in stated])
    assert agree > by_chance + 0.2


def test_conditions_are_placed_as_stated_and_blanked(data: Manifest) -> None:
    train = data.select(split="train")
    for number in range(12):
        recipe = planner(data).recipe("FTC", number)
        mask, edges = draw_conditions(recipe, train, SIZE, refine=False)
        again = draw_conditions(recipe, train, SIZE, refine=False)
        assert np.array_equal(mask, again[0]) and np.array_equal(edges, again[1])
        organ = conditions.read_mask(train.file(recipe.map_row, "organ_mask"))
        axis, low, high = conditions.pole_bounds(organ, recipe.attributes["location"], recipe.map_row.plane)
        assert low - 1 <= conditions.centroid(mask)[axis] <= high + 1
        assert np.array_equal(edges == 0, mask > 0)
        old = conditions.read_mask(train.file(recipe.map_row, "condition_fg"))
        uncovered = edges[(old > 0) & (mask == 0)]
        assert len(uncovered) == 0 or np.ptp(uncovered) == 0  # the old nodule is gone, and left no hole


def test_without_an_organ_mask_the_nodule_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    data = make_data(tmp_path, organ=False)
    for number in range(6):
        recipe = planner(data).recipe("FTC", number)
        mask, _ = draw_conditions(recipe, data, SIZE, refine=False)
        old = conditions.read_mask(data.file(recipe.map_row, "condition_fg"))
        assert np.hypot(*np.subtract(conditions.centroid(mask), conditions.centroid(old))) < 6


def test_move_keeps_the_mask_whole_in_the_frame() -> None:
    big, corner = disc(30, 30, 20), disc(3, 60, 3)
    moved = generate.move(big, corner)
    assert np.count_nonzero(moved) == np.count_nonzero(big)
    x, y = conditions.centroid(moved)
    assert x < 22 and y > 42


def test_refinement_uses_every_row_of_the_class_equally(data: Manifest) -> None:
    recipes = [planner(data, mode="refine").recipe("FTC", number) for number in range(6)]
    assert sorted(collections.Counter(r.map_row.file_name for r in recipes).values()) == [2, 2, 2]
    for recipe in recipes:
        assert recipe.mask_row == recipe.map_row
        assert recipe.text_fg == recipe.map_row.text_fg


# -------------------------------------------------------------------------------------------------------- whole folders


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_output_is_a_manifest_with_provenance(data: Manifest, model: str, stub: Stub, tmp_path: Path) -> None:
    generate.main(arguments(data, model, tmp_path / "new", "--count", "MTC=3,FTC=6", "--seed", "9"))
    made = manifest.read(tmp_path / "new", KNOWLEDGE)
    manifest.check(made, conditions=True, knowledge=KNOWLEDGE)
    assert [row.label for row in made.rows] == ["FTC"] * 6 + ["MTC"] * 3
    real = {row.file_name: row for row in data.rows}
    for row in made.rows:
        assert row.synthetic and row.split == "train" and row.seed is not None and row.model is not None
        assert row.model.startswith(f"{model}@")
        assert all(real[name].split == "train" for name in row.derived_from)
        seed = torch.Generator().manual_seed(row.seed)  # what was recorded makes the image again
        expected = torch.randint(0, 256, (SIZE, SIZE), generator=seed, dtype=torch.uint8).numpy()
        assert np.array_equal(conditions.read_gray(made.file(row, "file_name")), expected)
    assert len({row.patient_id for row in made.rows}) == len(made.rows)


def test_shards_interruptions_and_growth_change_nothing(data: Manifest, model: str, stub: Stub, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    generate.main(arguments(data, model, whole, "--count", "FTC=9,MTC=4"))
    generate.main(arguments(data, model, parts, "--count", "FTC=9,MTC=4", "--shard", "1/2"))
    assert 0 < len(manifest.read(parts).rows) < 13
    generate.main(arguments(data, model, parts, "--count", "FTC=9,MTC=4", "--shard", "0/2"))
    assert contents(whole) == contents(parts)

    torn = parts / "images" / "FTC_000002.png"
    torn.write_bytes(torn.read_bytes()[:100])
    (parts / "condition_bg" / "MTC_000001.png").unlink()
    stub.calls.clear()
    generate.main(arguments(data, model, parts, "--count", "FTC=9,MTC=4"))
    assert len(stub.calls) == 2
    assert contents(whole) == contents(parts)

    stub.calls.clear()
    generate.main(arguments(data, model, parts, "--count", "FTC=9,MTC=4"))
    assert stub.calls == []
    shutil.rmtree(parts)
    generate.main(arguments(data, model, parts, "--count", "FTC=8"))
    generate.main(arguments(data, model, parts, "--count", "FTC=9,MTC=4"))
    assert contents(whole) == contents(parts)


def test_interrupted_run_leaves_a_valid_manifest(
    data: Manifest, model: str, stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Stub.__call__

    def twice(self: Stub, *texts: Any, **options: Any) -> Any:
        if len(self.calls) == 2:
            raise KeyboardInterrupt
        return original(self, *texts, **options)

    monkeypatch.setattr(Stub, "__call__", twice)
    with pytest.raises(KeyboardInterrupt):
        generate.main(arguments(data, model, tmp_path / "new", "--count", "FTC=12"))
    made = manifest.read(tmp_path / "new")
    manifest.check(made, conditions=True)
    assert len(made.rows) == 8


def test_dry_run_makes_nothing(data: Manifest, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate.main(arguments(data, model, tmp_path / "new", "--count", "FTC=5", "--dry_run", "true"))
    assert "5 of 5 images would be made" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()


def test_refine_gives_the_real_image_and_the_strength(data: Manifest, model: str, stub: Stub, tmp_path: Path) -> None:
    generate.main(arguments(data, model, tmp_path / "near", "--count", "FTC=2", "--mode", "refine"))
    (call,) = stub.calls
    assert call["strength"] == generate.DEFAULT_STRENGTH
    for row, image in zip(manifest.read(tmp_path / "near").rows, call["images"], strict=True):
        (source,) = row.derived_from
        assert np.array_equal(np.asarray(image)[..., 0], conditions.read_gray(data.root / source))


def bad_input(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert run(generate.main, argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--count", "FTD=3"], "unknown class 'FTD'; known are benign, PTC, FTC, MTC"),
        (["--count", "FTC"], "write CLASS=NUMBER"),
        (["--count", "FTC=0"], "write CLASS=NUMBER"),
        (["--count", "FTC=1,FTC=2"], "FTC appears twice"),
        (["--count", "FTC=1", "--shard", "2/2"], "k from 0 to n-1"),
        (["--count", "ATC=1", "--prompts", "train"], "no training row of this class"),
        (["--count", "ATC=1", "--mode", "refine"], "no training row of this class"),
        (["--count", "FTC=1", "--strength", "0.5"], "is for --mode refine only"),
        (["--count", "FTC=1", "--mode", "refine", "--prompts", "names"], "keeps each real image's own prompt"),
        (["--count", "FTC=1", "--guidance_scale", "0.5"], "must be at least 1"),
        (["--count", "FTC=1", "--stepz", "3"], "stepz"),
        (["--count", "FTC=1", "--model", "/nowhere"], "give the folder that finetune.sh wrote"),
        (["--count", "FTC=1", "--data_dir", "/nowhere"], "no such file"),
    ],
)
def test_bad_input(
    data: Manifest, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert message in bad_input(arguments(data, model, tmp_path / "new", *more), capsys)
    assert not (tmp_path / "new").exists()


def test_other_splits_are_refused(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data(tmp_path / "data")
    manifest.write(data.path, data.select(split="test").rows)
    message = bad_input(arguments(data, model, tmp_path / "new", "--count", "FTC=1"), capsys)
    assert "no other split may be used" in message


def test_other_settings_are_refused(
    data: Manifest, model: str, stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate.main(arguments(data, model, tmp_path / "new", "--count", "FTC=1"))
    capsys.readouterr()
    message = bad_input(arguments(data, model, tmp_path / "new", "--count", "FTC=2", "--steps", "7"), capsys)
    assert "steps was 50, is 7" in message


def test_settings_say_what_was_asked(data: Manifest, model: str, stub: Stub, tmp_path: Path) -> None:
    more = ["--steps", "7", "--branches", "fg_then_bg", "--fg_scale", "0.5", "--control_uncond", "text"]
    generate.main(arguments(data, model, tmp_path / "new", "--count", "FTC=1", *more))
    (call,) = stub.calls
    asked = {"num_inference_steps": 7, "branches": "fg_then_bg", "fg_scale": 0.5, "control_uncond": "text"}
    assert asked.items() <= call.items()
    assert asked["branches"] == json.loads((tmp_path / "new" / "generation.json").read_text())["branches"]


# ------------------------------------------------------------------------------------------------------------ real nets


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++", "unipc"])
def test_real_pipeline(data: Manifest, model: str, tmp_path: Path, scheduler: str) -> None:
    argv = ["--count", "FTC=2", "--steps", "4", "--scheduler", scheduler, "--device", "cpu"]
    generate.main(arguments(data, model, tmp_path / "a", *argv))
    generate.main(arguments(data, model, tmp_path / "b", *argv))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    images = [conditions.read_gray(tmp_path / "a" / "images" / f"FTC_00000{i}.png") for i in (0, 1)]
    assert images[0].shape == (SIZE, SIZE)
    assert not np.array_equal(images[0], images[1])


def test_missing_conditions_are_named(data: Manifest, tmp_path: Path) -> None:
    bare = Manifest(data.path, tuple(Row(r.file_name, r.text_fg, r.text_bg, label=r.label) for r in data.rows))
    with pytest.raises(InputError, match="data.prepare conditions"):
        planner(bare, prompts="knowledge").check("FTC")
