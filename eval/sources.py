"""What a study reads, checked for leaks, and what the looks of synthetic images may give away."""

import argparse
import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from data.split import assign_folds
from eval import leakage, realism
from eval.arms import EXTRA, REAL, UPPER, is_synthetic, synthetic_shares
from eval.classifier import Recipe
from eval.images import patients_of, source_patients
from eval.runs import Study
from eval.study import Data, Sources, Trial, refuse_unlabelled
from tiger import manifest as manifests
from tiger.errors import InputError
from tiger.files import read_json, write_json
from tiger.knowledge import Knowledge
from tiger.manifest import Manifest

DEFAULT_SET = "tiger_f"
RARE = 0.25  # a class is rare that has fewer training images than this share of the largest one's
TELLING = 0.6  # AUC of real against synthetic from which on looks tell more than little


def synthetic_sets(given: Sequence[str], flag: str = "--fake") -> dict[str, str]:
    """Name -> path of NAME=PATH, or of PATH alone, which is DEFAULT_SET."""
    found: dict[str, str] = {}
    for text in given:
        name, _, path = text.partition("=")
        if not path or not re.fullmatch(r"[\w-]+", name):
            name, path = DEFAULT_SET, text
        if not is_synthetic(name) or name in (REAL, EXTRA, *found):
            raise InputError(f"{flag} {text}: the name '{name}' is taken; write NAME=PATH with another")
        found[name] = path
    return found


def read_sources(args: argparse.Namespace, fold: int | None) -> Sources:
    """The manifests of a fold, without leaks between them."""
    knowledge = Knowledge.load(args.knowledge)

    def read(path: str) -> Manifest:
        return manifests.read(path.replace("{fold}", str(fold)), knowledge)

    real = read(args.real)
    if fold is not None and "{fold}" not in args.real:
        real = replace(real, rows=assign_folds(real.rows, args.folds, 0)[fold])
    sets = synthetic_sets(args.fake)
    measure = list(sets)[:1] if UPPER in args.arms else []  # further real images are as many as the first set has
    fakes = {name: read(folder) for name, folder in sets.items() if name in (*args.arms, *measure)}
    extra = read(args.extra_real).select(split="train") if args.extra_real else None
    sources = Sources(real, fakes, extra)
    refuse_unlabelled(sources)
    return replace(sources, unchecked=tuple(leakage.refuse_leakage(real, list(fakes.values()), extra).unchecked))


def rare_classes(args: argparse.Namespace, real: Manifest, classes: Sequence[str]) -> tuple[str, ...]:
    """Those asked for, or those with few training images beside the largest class."""
    if unknown := set(args.rare or ()) - set(classes):
        raise InputError(f"--rare {' '.join(sorted(unknown))}: no such class in {real.path} ({', '.join(classes)})")
    sizes = {label: len(real.select(split="train", labels=[label]).rows) for label in classes}
    return tuple(args.rare or (label for label in classes if sizes[label] < RARE * max(sizes.values())))


Test = tuple[str, int | None]  # a synthetic set and a fold, whose real and synthetic images are told apart


def c2st_settings(args: argparse.Namespace, study: Study, sources: Sources, data: Data, name: str) -> dict[str, Any]:
    """All that a real-versus-synthetic classifier's figures depend on. Raises InputError where images are too few."""
    recipe, fake = c2st_recipe(args, study), sources.fakes[name].select(labels=data.classes)
    kept_out = leakage.held_out(sources.real)
    realism.parts_of(sources.real, fake, kept_out, args.seeds[0])
    settings = recipe.settings() | {"image_size": args.image_size, "seed": args.seeds[0], "resamples": args.resamples}
    images = b"".join(key for key, origin in zip(data.keys, data.origin, strict=True) if origin == name)
    patient_of = patients_of(sources.real.rows)
    groups = [source_patients(row, patient_of) for row in fake.rows], [patient_of[row.file_name] for row in kept_out]
    settings["data"] = hashlib.sha256(data.held_out_key.encode() + images + repr(groups).encode()).hexdigest()[:16]
    return settings


def c2st_recipe(args: argparse.Namespace, study: Study) -> Recipe:
    """The arms' recipe with steps of its own."""
    return replace(study.recipe, max_train_steps=args.realism_steps or max(1, study.recipe.max_train_steps // 2))


def c2st_path(study: Study, test: Test) -> Path:
    """The file of a test's result, beside the scores."""
    name, fold = test
    return study.folder / "scores" / (f"real_vs_{name}" + ("" if fold is None else f"-fold{fold}") + ".json")


def c2st(
    args: argparse.Namespace, study: Study, sources: Sources, classes: list[str], test: Test, settings: dict[str, Any]
) -> dict[str, Any]:
    """How well real and synthetic images are told apart; what is there with the same settings is not made again."""
    path, recipe = c2st_path(study, test), c2st_recipe(args, study)
    if path.is_file():
        found = read_json(path)
        if found["settings"] == settings:
            return found["result"]
    fake, kept_out = sources.fakes[test[0]].select(labels=classes), leakage.held_out(sources.real)
    result = realism.measure(sources.real, fake, kept_out, recipe, args.image_size, args.seeds[0], args.resamples)
    result |= {"model": recipe.model, "image_size": args.image_size, "max_train_steps": recipe.max_train_steps}
    write_json(path, {"settings": settings, "result": result})
    return result


def mean_of_folds(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result of all folds': their mean, and images in all. The bounds are means too, which is wide: an image is
    held out in two folds, and how much they tell each other is unknown."""
    if len(results) == 1:
        return results[0]
    means = {name: fmean(result[name] for result in results) for name in ("auc", "low", "high")}
    sums = {name: sum(result[name] for result in results) for name in ("n_train", "n_test")}
    return results[0] | means | sums | {"folds": list(results)}


def looks(trial: Trial, result: dict[str, Any], study: Study, data: Data) -> str:
    """What follows for a trial from how well real and its synthetic images are told apart.

    Judged by the whole interval: a small test or a net that has hardly been trained shows nothing.
    """
    name, one = trial.arm, study.plans(trial, data)[0]
    shares = synthetic_shares(one.phases[0], one.y, data.origin, len(one.labels))
    in_classes = ", ".join(f"{label} {share:.0%}" for label, share in zip(one.labels, shares, strict=True))
    auc = f"Real and synthetic images ({name}) are told apart with an AUC of {result['auc']:.3f}"
    if result["high"] < TELLING:
        steps = f"{result['max_train_steps']:,} steps"
        return f"{auc}, its interval below {TELLING}: looks tell a net of {steps} little."
    if result["low"] >= TELLING:
        auc += ", far from 0.5"
    else:
        auc += f" [{result['low']:.3f}, {result['high']:.3f}]: that looks tell little is not shown"
    if max(shares) - min(shares) < 0.02 or study.policy == "pretrain":
        return (
            f"{auc}. Synthetic images are as frequent in every class of a batch ({in_classes}), so "
            "looking synthetic tells nothing of the label."
        )
    return (
        f"{auc}, and they are not equally frequent in the classes of a batch ({in_classes}): the label "
        "may leak through looks, and the net may learn that instead of the disease."
    )
