"""Synthesis: what goes into each image, and that the folder is right however the work is cut up."""

import collections
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import awaken, make_scheduler, make_text_encoder, make_unet, make_vae
from diffusers import LCMScheduler, StableDiffusionControlNetInpaintPipeline
from PIL import Image

from benchmarks import generate as benchmark
from data.shards import write_shards
from eval.judges import AttributeNet, Segmenter, save_judge
from tiger import conditions, generate, manifest, output, recipes
from tiger.config import GenerationConfig, parse
from tiger.errors import InputError, run
from tiger.files import read_json, write_json
from tiger.knowledge import Knowledge
from tiger.manifest import Manifest, Row
from tiger.model import DualControlNet
from tiger.pipeline import TigerPipeline
from tiger.recipes import Planner, draw_conditions, read_training_rows
from tiger.tokenizer import build_clip_tokenizer

ROOT = Path(__file__).parents[1]
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


def test_mask_has_the_stated_size(data: Manifest) -> None:
    """That of the map's own nodule, where that is as large as the prompt says; else it comes from such a nodule."""
    train = data.select(split="train")
    plan = planner(data, prompts="knowledge")
    there = {row.attributes["diameter"] for row in plan.usable}
    recipes = [recipe for i in range(60) if (recipe := plan.recipe("FTC", i)).attributes["diameter"] in there]
    taken = [r for r in recipes if r.map_row.attributes["diameter"] == r.attributes["diameter"]]
    assert len(taken) > 10
    ratios = []
    for recipe in taken:
        old = conditions.read_mask(train.file(recipe.map_row, "condition_fg"))
        mask, _ = draw_conditions(recipe, train, len(old), refine=False)
        ratios.append(np.count_nonzero(mask) / np.count_nonzero(old))
    assert np.median(np.abs(np.log(ratios))) < np.log(1.1) and max(ratios) < 1.4  # the organ may still shrink it
    assert any(r.mask_row.attributes["diameter"] != r.attributes["diameter"] for r in taken)  # so that scaling shows


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
        region = conditions.nodule_region(mask)
        assert np.array_equal(edges == 0, region > 0)
        old = conditions.read_mask(train.file(recipe.map_row, "condition_fg"))
        uncovered = edges[(old > 0) & (region == 0)]
        assert len(uncovered) == 0 or np.ptp(uncovered) == 0  # the old nodule is gone, and left no hole


def test_mask_crosses_the_organs_upper_edge_where_the_prompt_says_so(data: Manifest) -> None:
    for number in range(6):
        recipe = planner(data).recipe("FTC", number)
        term = recipe.placement.extension
        without = {name: value for name, value in recipe.attributes.items() if value != term}
        inside, crossing = (
            draw_conditions(replace(recipe, attributes=attributes), data, SIZE, refine=False)[0] > 0
            for attributes in (without, {**without, "extension": str(term)})
        )
        assert crossing[:12].any()  # the organ's rows are 12 to 51
        assert inside[:12].sum() < 0.03 * inside.sum()


def test_map_is_in_the_plane_asked_for(data: Manifest) -> None:
    plan = planner(data)
    for plane in KNOWLEDGE.categories["direction"].terms:
        there = {row.plane for row in plan.backgrounds}
        assert plane.split()[0] in there and len(there) == 2
        drawn = [plan._background({"direction": plane}, np.random.default_rng(i)) for i in range(8)]
        assert {row.plane for row in drawn} == {plane.split()[0]}


def test_a_mask_is_another_one_each_time(tmp_path: Path) -> None:
    """One nodule of the bank on one map: the outlines differ, not only the places."""
    data = make_data(tmp_path, organ=False)
    recipe = planner(data).recipe("FTC", 0)
    shapes = set()
    for seed in range(4):
        mask, _ = draw_conditions(replace(recipe, seed=(seed,)), data, SIZE, refine=False)
        y, x = np.nonzero(mask)
        shapes.add((np.ptp(y), np.ptp(x), mask[y.min() : y.max() + 1, x.min() : x.max() + 1].tobytes()))
    assert len(shapes) == 4


@pytest.mark.parametrize("size", [SIZE, SIZE // 2])
def test_a_boundary_in_the_maps_is_that_of_the_new_mask(tmp_path: Path, size: int) -> None:
    """Models trained on `conditions --edges boundary`: the line is as training shows it, and the old one is gone."""
    train, plain = make_data(tmp_path / "lines").select(split="train"), make_data(tmp_path / "plain")
    for data, make in ((train, conditions.boundary_map), (plain, lambda image, _: conditions.sobel_map(image))):
        for row in data.rows:
            image, mask = (conditions.read_gray(data.file(row, column)) for column in ("file_name", "condition_fg"))
            Image.fromarray(make(image // 8, mask)).save(data.file(row, "condition_bg"))  # edges well below the line
            Image.fromarray(image // 8).save(data.file(row, "file_name"))
    moved = 0
    for number in range(12):
        recipe = planner(train).recipe("FTC", number)
        mask, edges = draw_conditions(recipe, train, size, refine=False)
        same_mask, without = draw_conditions(recipe, plain, size, refine=False)
        assert np.array_equal(mask, same_mask)
        line = conditions.resize_gray(conditions.outline(conditions.resize_mask(mask, SIZE)), size)
        expected = conditions.blank_nodule(np.maximum(without, line), mask)
        assert np.array_equal(edges, expected) and not np.array_equal(edges, without)
        moved += not np.array_equal(mask, conditions.read_mask(train.file(recipe.map_row, "condition_fg"), size))
        kept = draw_conditions(planner(train, mode="refine").recipe("FTC", number), train, SIZE, refine=True)
        assert conditions.has_outline(kept[1], kept[0])
    assert moved > 6
    sobel = conditions.read_gray(plain.file(plain.rows[0], "condition_bg"))
    assert not conditions.has_outline(sobel, conditions.read_mask(plain.file(plain.rows[0], "condition_fg")))


def test_without_an_organ_mask_the_nodule_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    data = make_data(tmp_path, organ=False)
    for number in range(6):
        recipe = planner(data).recipe("FTC", number)
        mask, _ = draw_conditions(recipe, data, SIZE, refine=False)
        old = conditions.read_mask(data.file(recipe.map_row, "condition_fg"))
        assert np.hypot(*np.subtract(conditions.centroid(mask), conditions.centroid(old))) < 6


def test_move_keeps_the_mask_whole_in_the_frame() -> None:
    big, corner = disc(30, 30, 20), disc(3, 60, 3)
    moved = recipes.move(big, corner)
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
        recipe = planner(data, seed=9).recipe(str(row.label), int(Path(row.file_name).stem[-6:]))
        assert set(row.derived_from) == {recipe.map_row.file_name, recipe.mask_row.file_name}
        seed = torch.Generator().manual_seed(row.seed)  # what was recorded makes the image again
        expected = torch.randint(0, 256, (SIZE, SIZE), generator=seed, dtype=torch.uint8).numpy()
        assert np.array_equal(conditions.read_gray(made.file(row, "file_name")), expected)
    assert len({row.patient_id for row in made.rows}) == len(made.rows)


def test_emphasis_is_of_rare_classes_prompts(data: Manifest, model: str, stub: Stub, tmp_path: Path) -> None:
    plain, emphasised = tmp_path / "plain", tmp_path / "emphasised"
    for folder, more in ((plain, []), (emphasised, ["--emphasis", "4"])):
        generate.main(arguments(data, model, folder, "--count", "benign=4,FTC=16", *more))
    rows, raised = (manifest.read(folder, KNOWLEDGE).rows for folder in (plain, emphasised))
    assert [row.text for row in rows[:4]] == [row.text for row in raised[:4]]  # benign: training rows' own
    halos = [[row.attributes["halo"] for row in of[4:]].count("uneven thick halo") for of in (rows, raised)]
    assert halos[0] < 12 and halos[1] == 16
    with pytest.raises(InputError, match="emphasis was 4.0, is 2.0"):
        generate.main(arguments(data, model, emphasised, "--count", "FTC=17", "--emphasis", "2"))


def test_what_an_older_version_did_not_note_had_its_default(
    data: Manifest, model: str, stub: Stub, tmp_path: Path
) -> None:
    generate.main(arguments(data, model, tmp_path, "--count", "FTC=2"))
    settings = read_json(tmp_path / "generation.json")
    del settings["emphasis"]
    write_json(tmp_path / "generation.json", settings)
    with pytest.raises(InputError, match="emphasis was 0.0, is 2.0"):
        generate.main(arguments(data, model, tmp_path, "--count", "FTC=3", "--emphasis", "2"))
    generate.main(arguments(data, model, tmp_path, "--count", "FTC=3"))
    assert len(manifest.read(tmp_path).rows) == 3


def test_shards_interruptions_and_growth_change_nothing(data: Manifest, model: str, stub: Stub, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    generate.main(arguments(data, model, whole, "--count", "FTC=9,MTC=4"))
    assert [len(call["text_fg"]) for call in stub.calls] == [4, 4, 4, 4]  # always full
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
    out = capsys.readouterr().out
    assert "5 of 5 images would be made" in out and "at most 61 kB" in out  # 5 × 3 pictures of 64² bytes
    assert "--resolution" not in out
    generate.main(
        arguments(data, model, tmp_path / "new", "--count", "FTC=5", "--dry_run", "true", "--resolution", "128")
    )
    assert f"--resolution 128: the model was trained at {SIZE} px" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()


def test_refine_gives_the_real_image_and_the_strength(data: Manifest, model: str, stub: Stub, tmp_path: Path) -> None:
    generate.main(arguments(data, model, tmp_path / "near", "--count", "FTC=2", "--mode", "refine"))
    (call,) = stub.calls
    assert call["strength"] == generate.DEFAULT_STRENGTH
    rows = manifest.read(tmp_path / "near").rows
    assert len(rows) == 2
    for row, image in zip(rows, call["images"], strict=False):  # the batch of 4 is full all the same
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
        (["--count", "ATC=1", "--mode", "refine"], "should come from there; give --mode diversify"),
        (["--count", "FTC=1", "--strength", "0.5"], "is for --mode refine only"),
        (["--count", "FTC=1", "--mode", "refine", "--prompts", "names"], "keeps each real image's own prompt"),
        (
            ["--count", "FTC=1", "--prompts", "names", "--emphasis", "0.5"],
            "is for --mode diversify with --prompts auto",
        ),
        (["--count", "FTC=1", "--mode", "refine", "--emphasis", "0.5"], "is for --mode diversify with --prompts auto"),
        (["--count", "FTC=1", "--emphasis", "11"], "--emphasis 11.0: must lie in 0..10"),
        (["--count", "PTC=1", "--emphasis", "0.5"], "--count PTC=1 has no class that the knowledge base calls rare"),
        (["--count", "FTC=1", "--guidance_scale", "0.5"], "must be at least 1"),
        (["--count", "FTC=1", "--guidance_interval", "0.8,0.2"], "write LOW,HIGH within 0..1"),
        (["--count", "FTC=1", "--guidance_interval", "all"], "write LOW,HIGH within 0..1"),
        (["--count", "FTC=1", "--reuse_encoder", "0"], "must be at least 1"),
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
    assert "no other split may be used" in message and data.select(split="test").rows[0].file_name in message


def test_other_settings_are_refused(
    data: Manifest, model: str, stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate.main(arguments(data, model, tmp_path / "new", "--count", "FTC=1"))
    capsys.readouterr()
    message = bad_input(arguments(data, model, tmp_path / "new", "--count", "FTC=2", "--steps", "7"), capsys)
    assert "steps was 20, is 7" in message


def test_settings_say_what_was_asked(data: Manifest, model: str, stub: Stub, tmp_path: Path) -> None:
    more = ["--steps", "7", "--branches", "fg_then_bg", "--fg_scale", "0.5", "--control_uncond", "text"]
    more += ["--guidance_interval", "0.1,0.9", "--reuse_encoder", "3", "--bg_scale", "0.7", "--guidance_rescale", "0.3"]
    more += ["--resolution_weighting", "--guidance_scale", "3"]
    generate.main(arguments(data, model, tmp_path / "new", "--count", "FTC=1", *more))
    (call,) = stub.calls
    asked = {"num_inference_steps": 7, "branches": "fg_then_bg", "fg_scale": 0.5, "control_uncond": "text"}
    asked |= {"guidance_interval": (0.1, 0.9), "reuse_encoder": 3, "bg_scale": 0.7, "guidance_rescale": 0.3}
    asked |= {"resolution_weighting": True, "guidance_scale": 3.0}
    assert asked.items() <= call.items()
    assert asked["branches"] == json.loads((tmp_path / "new" / "generation.json").read_text())["branches"]


# -------------------------------------------------------------------------------------------------------------- leakage


def spoiled(root: Path, spoil: Callable[[list[Row]], None]) -> Path:
    """A data set whose rows `spoil` has changed; the last eight are test rows."""
    data = make_data(root)
    rows = list(data.rows)
    spoil(rows)
    manifest.write(data.path, rows)
    return root


def share_a_map(rows: list[Row]) -> None:
    rows[2] = replace(rows[2], condition_bg=rows[-1].condition_bg)


def share_a_mask(rows: list[Row]) -> None:
    rows[2] = replace(rows[2], condition_fg=rows[-1].condition_fg)


def derive(rows: list[Row]) -> None:
    rows[2] = replace(rows[2], derived_from=(rows[-1].file_name,))


def share_a_patient(rows: list[Row]) -> None:
    rows[2] = replace(rows[2], patient_id=rows[-1].patient_id)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (share_a_map, "{train}: its condition_bg is a file of test row {test}"),
        (share_a_mask, "{train}: its condition_fg is a file of test row {test}"),
        (derive, "{train}: is derived from test row {test}"),
        (share_a_patient, "patient {patient}: is in test and train"),
    ],
)
def test_held_out_rows_are_refused_by_name(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[list[Row]], None], message: str
) -> None:
    data = manifest.read(spoiled(tmp_path / "data", spoil))
    names = {"train": data.rows[2].file_name, "test": data.rows[-1].file_name, "patient": data.rows[-1].patient_id}
    for mode in ("diversify", "refine"):
        argv = arguments(data, model, tmp_path / "new", "--count", "FTC=1", "--mode", mode)
        assert message.format(**names) in bad_input(argv, capsys)


def test_copies_of_held_out_images_are_refused(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data(tmp_path / "data")
    first, last = data.rows[0], data.rows[-1]
    shutil.copy(data.file(last, "file_name"), data.file(first, "file_name"))
    message = bad_input(arguments(data, model, tmp_path / "new", "--count", "FTC=1"), capsys)
    assert f"{first.file_name}: its file_name is a copy of one of test row {last.file_name}" in message


def test_equal_masks_are_no_leak(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    shutil.copy(data.file(data.rows[-1], "condition_fg"), data.file(data.rows[0], "condition_fg"))
    assert len(read_training_rows(tmp_path, KNOWLEDGE).rows) == sum(COUNTS["train"].values())


# --------------------------------------------------------------------------------------------------------- other organs


@pytest.mark.parametrize("organ", [False, True])
def test_an_organ_without_poles_or_planes(tmp_path: Path, organ: bool) -> None:
    """The breast's vocabulary has no location, diameter or extension."""
    knowledge = Knowledge.load("breast")
    assert not {"location", "diameter", "extension", "direction"} & set(knowledge.categories)
    rows = []
    for index, row in enumerate(make_data(tmp_path, organ).select(split="train").rows):
        label = list(knowledge.subtypes)[index % 2]
        attributes = knowledge.sample(label, np.random.default_rng(index))
        text_fg, text_bg = knowledge.compose(label, attributes)
        rows.append(replace(row, label=label, attributes=attributes, text_fg=text_fg, text_bg=text_bg, plane=None))
    manifest.write(tmp_path / "metadata.jsonl", rows)
    train = read_training_rows(tmp_path, knowledge)
    for prompts in ("auto", "knowledge", "names", "estimated"):
        plan = Planner(train, knowledge, mode="diversify", prompts=prompts, seed=0)
        for label in list(knowledge.subtypes)[:2]:
            plan.check(label)
            for number in range(4):
                recipe = plan.recipe(label, number)
                mask, edges = draw_conditions(recipe, train, SIZE, refine=False)
                assert mask.any() and not edges[mask > 0].any()
                assert recipe.text_fg and knowledge.parse(f"{recipe.text_fg}, {recipe.text_bg}").label == label


# ------------------------------------------------------------------------------------------------ processes and writing


@pytest.mark.parametrize(
    ("text", "environment", "part"),
    [
        ("0/1", {}, (0, 1)),
        ("2/3", {}, (2, 3)),
        ("0/1", {"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ("1/2", {"RANK": "3", "WORLD_SIZE": "4"}, (7, 8)),
    ],
)
def test_parts(text: str, environment: dict[str, str], part: tuple[int, int]) -> None:
    assert generate.parse_shard(text, environment) == part


def test_parts_make_a_whole() -> None:
    counts = {"FTC": 13, "MTC": 4}
    parts = [[item for batch in generate.batches(counts, 4, (k, 3)) for item in batch] for k in range(3)]
    whole = [(label, number) for label, count in counts.items() for number in range(count)]
    assert sorted(item for part in parts for item in part) == whole
    assert generate.filled([("FTC", 12)], 4) == [("FTC", 12), ("FTC", 13), ("FTC", 14), ("FTC", 15)]


def test_what_a_killed_process_left_is_swept(data: Manifest, model: str, stub: Stub, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    (folder / "images").mkdir(parents=True)
    litter = folder / "images" / ".FTC_000001.png.x_12y.png"
    anothers = folder / "images" / ".FTC_000005.png.x_12y.png"  # of another part, which may be writing it now
    for path in (litter, anothers):
        path.write_bytes(b"half")
    generate.main(arguments(data, model, folder, "--count", "FTC=8", "--shard", "0/2"))
    assert not litter.exists() and anothers.exists()
    assert len(manifest.read(folder).rows) == 4


def test_a_failed_write_is_raised_and_no_more_than_so_many_wait() -> None:
    done, gate = [], threading.Event()

    def slow(value: int) -> None:
        gate.wait(10)
        done.append(value)

    def fail() -> None:
        raise ValueError("no")

    with output.background(2) as later:
        later(slow, 0)
        later(slow, 1)
        assert done == []
        threading.Timer(0.05, gate.set).start()
        later(slow, 2)  # waits for the first
        assert done[:1] == [0]
    assert done == [0, 1, 2]
    with pytest.raises(ValueError, match="no"), output.background(8) as later:
        later(fail)


def test_ahead_keeps_order_and_raises_in_place() -> None:
    assert list(generate.ahead(lambda x: x * x, range(5))) == [0, 1, 4, 9, 16]
    assert list(generate.ahead(str, [])) == []
    seen = []
    with pytest.raises(ZeroDivisionError):
        for value in generate.ahead(lambda x: 6 // (2 - x), range(5)):
            seen.append(value)
    assert seen == [3, 6]


def test_a_disk_too_small_is_refused_after_the_first_batch(
    data: Manifest, model: str, stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(output.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=200_000))
    assert run(generate.main, arguments(data, model, tmp_path / "new", "--count", "FTC=400")) == 2
    message = capsys.readouterr().err.splitlines()[-1]  # after the progress bar
    assert "396 images more take about" in message and "200 kB free" in message
    assert len(stub.calls) == 1
    assert len(manifest.read(tmp_path / "new").rows) == 4
    monkeypatch.undo()


def test_estimate_is_printed(
    data: Manifest, model: str, stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    minutes = itertools.count(0, 60)  # each look at the clock is a minute after the last
    monkeypatch.setattr(generate, "time", types.SimpleNamespace(monotonic=lambda: next(minutes)))
    generate.main(arguments(data, model, tmp_path / "new", "--count", "FTC=32", "--shard", "1/2"))
    assert "12 more here in about 3 min; 28 in all take" in capsys.readouterr().out


def in_a_small_disk(size: str, argv: list[str], kept: Path) -> subprocess.CompletedProcess[str]:
    """Run generation.py with --output_dir on a tmpfs of `size`, and copy what it leaves to `kept`."""
    mount = kept.with_name("disk")
    mount.mkdir()
    script = 'mount -t tmpfs -o size="$1" none "$2" || exit 77; disk=$2 kept=$3; shift 3; "$@"; code=$?; '
    script += 'cp -r "$disk" "$kept"; exit $code'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", size, str(mount), str(kept)]
    command += [sys.executable, "generation.py", *argv, "--output_dir", str(mount)]
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        pytest.skip("no unshare to make a small disk with")


def test_full_disk(data: Manifest, model: str, tmp_path: Path) -> None:
    argv = [*arguments(data, model, tmp_path)[:4], "--count", "FTC=8", "--batch_size", "4", "--steps", "1"]
    ended = in_a_small_disk("36k", argv, tmp_path / "kept")  # settings and two images or so; a page is 4 kB
    if ended.returncode == 77 or "unshare" in ended.stderr:
        pytest.skip("not allowed to mount a small disk")
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "the disk is full (No space left on device)" in last
    assert "Traceback" not in ended.stderr
    files = list((tmp_path / "kept").rglob("*.png"))
    assert files and all(output.is_png(path) for path in files)


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


@pytest.mark.parametrize("mode", ["diversify", "refine"])
def test_shards_give_the_same_images(data: Manifest, model: str, tmp_path: Path, mode: str) -> None:
    """Masks, maps and images that are read from tar shards are those of the folder, to the bit."""
    sharded = write_shards(data, tmp_path / "shards", 5, dry_run=False)
    argv = ["--mode", mode, "--count", "FTC=2,benign=2", "--steps", "4", "--device", "cpu"]
    for rows, name in ((data, "folder"), (sharded, "sharded")):
        generate.main(arguments(rows, model, tmp_path / name, *argv))
    made = [
        {name: content for name, content in contents(tmp_path / folder).items() if name.endswith(".png")}
        for folder in ("folder", "sharded")
    ]
    assert len(made[0]) == 12 and made[0] == made[1]
    assert all(
        name.startswith("shard-") for row in manifest.read(tmp_path / "sharded").rows for name in row.derived_from
    )


def test_shards_hide_no_copy_of_a_held_out_image(data: Manifest, tmp_path: Path) -> None:
    rows = [replace(row, split="test" if number == 2 else row.split) for number, row in enumerate(data.rows)]
    copied = make_data(tmp_path / "data")
    shutil.copyfile(copied.root / rows[2].file_name, copied.root / rows[0].file_name)
    sharded = write_shards(replace(copied, rows=tuple(rows)), tmp_path / "shards", 2, dry_run=False)
    with pytest.raises(InputError, match="held-out data would reach synthetic images"):
        read_training_rows(sharded.root, KNOWLEDGE)


def test_missing_conditions_are_named(data: Manifest, tmp_path: Path) -> None:
    bare = Manifest(data.path, tuple(Row(r.file_name, r.text_fg, r.text_bg, label=r.label) for r in data.rows))
    for prompts in ("train", "knowledge"):  # neither leads to the other: masks come first
        with pytest.raises(InputError, match="data.prepare segmenter predict.*data.prepare conditions") as error:
            planner(bare, prompts=prompts).check("FTC")
        assert "--prompts" not in str(error.value)


def test_an_image_does_not_depend_on_how_many_are_asked_for(data: Manifest, model: str, tmp_path: Path) -> None:
    more = ["--steps", "2", "--device", "cpu"]
    generate.main(arguments(data, model, tmp_path / "grown", "--count", "FTC=2", *more))
    generate.main(arguments(data, model, tmp_path / "grown", "--count", "FTC=6", *more))
    generate.main(arguments(data, model, tmp_path / "whole", "--count", "FTC=6", *more))
    assert contents(tmp_path / "grown") == contents(tmp_path / "whole")


def test_options_for_speed_reach_the_networks(
    data: Manifest, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []  # test_pipeline compiles for real
    monkeypatch.setattr(TigerPipeline, "compile_blocks", lambda self: compiled.append(self))
    argv = arguments(data, model, tmp_path / "new", "--count", "FTC=2", "--steps", "2", "--device", "cpu")
    argv += ["--dtype", "bfloat16", "--channels_last", "--scheduler", "unipc", "--reuse_encoder", "2"]
    pipeline = generate.load_pipeline(parse(GenerationConfig, [*argv, "--compile"]))
    assert compiled == [pipeline]
    weight = pipeline.unet.down_blocks[0].resnets[0].conv1.weight
    assert weight.dtype == torch.bfloat16 and weight.is_contiguous(memory_format=torch.channels_last)
    assert pipeline.controlnet.fg.conv_in.weight.dtype == torch.bfloat16
    generate.main(argv)
    assert len(manifest.read(tmp_path / "new").rows) == 2


def start(argv: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """generation.py in a process of its own, on one thread."""
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "generation.py", *argv],
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, stdout=file, stderr=file,
        )  # fmt: skip


@pytest.mark.timeout(900)  # four processes that each load the libraries; a minute on two idle cores
def test_kill_and_restart_with_several_processes(data: Manifest, model: str, tmp_path: Path) -> None:
    """Two processes, started as `accelerate launch` does, are killed; two shards make what is missing, and no more; all
    bytes are those of one process."""
    more = ["--count", "FTC=30,MTC=10", "--steps", "4", "--device", "cpu"]
    parts, logs = tmp_path / "parts", [tmp_path / "0.log", tmp_path / "1.log"]
    argv = arguments(data, model, parts, *more)
    ranks = [{"RANK": str(k), "LOCAL_RANK": str(k), "WORLD_SIZE": "2"} for k in range(2)]
    running = [start(argv, log, **rank) for log, rank in zip(logs, ranks, strict=True)]

    def at_work() -> set[int]:
        """Which of the two have made an image: batches of four are dealt out in turn."""
        return {int(path.stem[-6:]) // 4 % 2 for path in parts.glob("images/FTC_*.png")}

    deadline = time.monotonic() + 400
    while at_work() != {0, 1} and any(p.poll() is None for p in running) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in running:
        process.kill()
        process.wait()
    assert at_work() == {0, 1}, [log.read_text() for log in logs]
    there = {path: path.stat().st_mtime_ns for path in parts.glob("images/[!.]*.png")}
    assert 2 <= len(there) < 40

    restarted = [start([*argv, "--shard", f"{k}/2"], logs[k]) for k in range(2)]
    assert [process.wait(400) for process in restarted] == [0, 0]
    made = sum(int(log.read_text().splitlines()[-1].split(" images made")[0]) for log in logs)
    assert made == 40 - len(there)
    assert all(path.stat().st_mtime_ns == when for path, when in there.items())  # nothing was made twice

    generate.main(arguments(data, model, tmp_path / "whole", *more))
    assert contents(parts) == contents(tmp_path / "whole")
    names = [row.file_name for row in manifest.read(parts).rows]
    assert names == [f"images/{label}_{i:06d}.png" for label, n in (("FTC", 30), ("MTC", 10)) for i in range(n)]


class Pixels:
    """Images as they are, 8 by 8, in place of a network's features."""

    name = "pixels"

    def __call__(self, images: list[np.ndarray]) -> np.ndarray:
        return np.stack([conditions.resize_gray(image, 8).ravel() for image in images]).astype(np.float32)


@pytest.mark.slow  # a minute and more on a slow processor
def test_benchmark(data: Manifest, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours and the stock pipelines draw the same recipes, and each is timed, judged and plotted."""
    save_judge(Segmenter(width=4, resolution=SIZE), tmp_path / "segmenter")
    terms = {name: list(category.terms) for name, category in KNOWLEDGE.categories.items()}
    save_judge(AttributeNet(terms, width=4, resolution=SIZE), tmp_path / "attributes")
    monkeypatch.setattr(benchmark, "load_extractor", Pixels)
    monkeypatch.setattr(benchmark, "default_cache", lambda: None)
    argv = ["--model", model, "--data_dir", str(data.root), "--output", str(tmp_path / "bench"), "--device", "cpu"]
    argv += ["--judges", str(tmp_path), "--classes", "FTC", "benign", "--each", "3", "--batch_size", "3"]
    student = shutil.copytree(model, tmp_path / "student")
    schedule = TigerPipeline.from_pretrained(model).scheduler.config
    LCMScheduler.from_config(schedule, original_inference_steps=4).save_pretrained(student / "scheduler")
    argv += ["--steps", "15", "--student", str(student)]
    benchmark.main(argv)
    report = json.loads((tmp_path / "bench" / "results.json").read_text())
    assert report["images"] == 6
    folders = sorted(path for path in (tmp_path / "bench").iterdir() if path.is_dir())
    assert len(folders) == len(report["settings"]) >= 8
    assert {"student, lcm 2", "student, lcm 4", "stock inpaint twice, ddim 15"} <= set(report["settings"])
    first = manifest.read(folders[0]).rows
    for folder, (name, result) in zip(folders, report["settings"].items(), strict=True):
        rows = manifest.read(folder).rows
        assert [row.text for row in rows] == [row.text for row in first] and len(rows) == 6
        assert result["seconds_per_image"] > 0 and result["cpu_seconds_per_image"] > 0
        assert np.isfinite(list(result.values())).all(), name
    images = [conditions.read_gray(folder / "images" / "FTC_000000.png") for folder in folders]
    assert len({image.tobytes() for image in images}) == len(folders)  # no setting is another under a new name
    with Image.open(tmp_path / "bench" / "results.png") as picture:
        assert picture.width > 500


def test_stock_inpainting_keeps_what_is_outside_the_mask(data: Manifest, model: str) -> None:
    """diffusers takes a U-Net with other than four channels for one that has no need to put known latents back."""
    pipeline = TigerPipeline.from_pretrained(model)
    pipe = benchmark.stock(StableDiffusionControlNetInpaintPipeline, pipeline, pipeline.controlnet.fg, "ddim")
    (batch,) = benchmark.batches(planner(data), ["FTC"], 1, 1, SIZE)
    latents = pipe(
        [""], image=list(batch.images), mask_image=batch.pictures(0), control_image=batch.pictures(0), strength=1.0,
        num_inference_steps=2, generator=batch.generators, output_type="latent",
    ).images  # fmt: skip
    known = pipeline._encode_images(torch.from_numpy(np.stack(batch.images)).permute(0, 3, 1, 2) / 127.5 - 1)
    outside = torch.nn.functional.interpolate(batch.tensor(0), size=latents.shape[-2:])[0, 0] < 0.5
    # the stock pipeline draws from the posterior, whose spread here is small beside what noise would give
    near = (latents - known)[0, :, outside].abs().mean()
    assert near < 0.5 * (latents - known)[0, :, ~outside].abs().mean() or near < 0.2
    assert pipeline.unet.config["in_channels"] == 8  # ours is as it was
