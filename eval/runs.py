"""Trainings of a study and the scores that they leave: one small file each, from which every figure can be made anew.

scores/tiger_f-seed0.json
    settings           what was trained, and a digest of every image that it depends on
    classes            names of the columns of `probabilities`
    selected_step, …   notes on the training
    valid, test        file_name, patient_id, label, probabilities of each image
"""

import csv
import lzma
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from eval import classifier
from eval.arms import Mixing, augmentation_of, draw_batch, is_synthetic
from eval.classifier import Recipe
from eval.study import Data, Held, Plan, Trial, digest, plan, read_condition
from tiger.errors import InputError
from tiger.files import atomic_path, read_json, write_json

SHARES = (0.25, 0.5, 0.75, 0.9)  # of synthetic images, from which --share auto chooses


@dataclass(frozen=True)
class Study:
    """What all trainings of a study share."""

    folder: Path
    recipe: Recipe
    image_size: int  # px
    policy: str
    shares: tuple[float, ...]  # of synthetic images within a class; of several, valid chooses
    rare: tuple[str, ...]
    negative: str
    save_models: bool

    def path(self, trial: Trial) -> Path:
        """The file of a trial's scores."""
        return self.folder / "scores" / f"{trial.name}.json"

    def model(self, trial: Trial) -> Path:
        """The folder of a trial's classifier."""
        return self.folder / "models" / trial.name

    def mixings(self, trial: Trial) -> list[Mixing]:
        """How the trial may mix; plain arms do not mix."""
        shares = self.shares if is_synthetic(trial.arm) and self.policy in ("share", "rare") else self.shares[:1]
        return [Mixing(self.policy, share, self.rare) for share in shares]

    def plans(self, trial: Trial, data: Data) -> list[Plan]:
        """What the trial may draw from, for each of its mixings. Raises InputError where it cannot be trained."""
        plans = [plan(trial, data, mixing, self.negative) for mixing in self.mixings(trial)]
        labels = ", ".join(plans[0].labels)
        if len(plans) > 1 and plans[0].valid is None:
            raise InputError(f"--share auto: split 'valid' has fewer than two of {labels} to choose on; give a share")
        if is_synthetic(trial.arm) and self.policy == "rare" and not set(self.rare) & set(plans[0].labels):
            raise InputError(f"--policy rare: none of {labels} is rare, so nothing would be added; name some as --rare")
        return plans

    def settings(self, trial: Trial, data: Data) -> dict[str, Any]:
        """All that the trial's scores depend on, as JSON."""
        plans = self.plans(trial, data)
        settings = self.recipe.settings() | {"image_size": self.image_size, "arm": trial.arm, "seed": trial.seed}
        settings |= {"task": trial.task, "fold": trial.fold, "amount": trial.amount, "real_share": trial.real_share}
        if is_synthetic(trial.arm):
            settings |= {"policy": self.policy, "share": [mixing.share for mixing in self.mixings(trial)]}
            settings |= {"rare": list(self.rare)} if self.policy == "rare" else {}
        return settings | {"data": "-".join(digest(one, data) for one in plans)}

    def is_done(self, trial: Trial) -> bool:
        """Whether the trial's scores are there, and its classifier where that is wanted."""
        saved = not self.save_models or (self.model(trial) / "config.json").is_file()
        return self.path(trial).is_file() and saved


def refuse_changes(study: Study, trials: Iterable[Trial], data: Data) -> dict[Trial, dict[str, Any]]:
    """The settings of each trial. Raises InputError where its scores are there and were made with others, or of images
    that had other names or patients."""
    settings = {trial: study.settings(trial, data) for trial in trials}
    for trial, of_trial in settings.items():
        path = study.path(trial)
        if not path.is_file():
            continue
        saved, one = read_json(path), study.plans(trial, data)[0]
        old = saved["settings"]
        named = [(name, old.get(name), of_trial.get(name)) for name in of_trial | old]
        changed = [f"{name} was {was}, is {value}" for name, was, value in named if was != value]
        for split, held in (("valid", one.valid), ("test", one.test)):
            if (
                held is not None
                and split in saved
                and any(saved[split][name] != values for name, values in held.names.items())
            ):
                changed.append(f"images of {split} had other names or patients")
        if changed:
            raise InputError(
                f"{path} was made with other settings: {'; '.join(changed)}. Give the old values to go on, or another "
                "--output; or remove the file"
            )
    return settings


def run(study: Study, trial: Trial, data: Data, settings: dict[str, Any]) -> None:
    """Train one trial and write its scores; where there are several shares, that which is best on valid."""
    fitted = []
    for mixing, one in zip(study.mixings(trial), study.plans(trial, data), strict=True):
        net, notes = fit(study, trial, data, one)
        fitted.append((notes.get("valid_macro_auc", 0.0), mixing, one, net, notes))
    _, mixing, one, net, notes = max(fitted, key=lambda item: item[0])
    if is_synthetic(trial.arm) and study.policy in ("share", "rare"):
        notes |= {"share": mixing.share}
    if len(fitted) > 1:
        notes |= {"valid_macro_auc_of_shares": {str(m.share): value for value, m, *_ in fitted}}
    scores = {name: scored(net, held, one.labels) for name, held in (("valid", one.valid), ("test", one.test)) if held}
    if study.save_models:
        classifier.save(net, study.model(trial), study.recipe.model, study.image_size, one.labels)
    about = {"settings": settings, "condition": trial.condition, "classes": one.labels}
    write_json(study.path(trial), about | notes | scores)


def fit(study: Study, trial: Trial, data: Data, one: Plan) -> tuple[nn.Module, dict[str, Any]]:
    """Train one classifier; every phase has its part of the steps, and only the last one is selected on valid."""
    net, notes = None, {}
    recipe = replace(study.recipe, max_train_steps=max(1, study.recipe.max_train_steps // len(one.phases)))
    for number, groups in enumerate(one.phases, 1):
        last = number == len(one.phases)
        net, notes = classifier.train(
            recipe,
            data.images,
            one.y,
            lambda rng, groups=groups: draw_batch(groups, recipe.train_batch_size, rng),
            (one.valid.images, one.valid.y) if last and one.valid is not None else None,
            classes=len(one.labels),
            seed=trial.seed,
            description=f"{trial.name}" + (f", part {number}" if len(one.phases) > 1 else ""),
            augmentation=augmentation_of(trial.arm, study.image_size, len(one.labels)),
            net=net,
        )
    assert net is not None
    return net, notes


def scored(net: nn.Module, held: Held, labels: list[str]) -> dict[str, Any]:
    """The probabilities of held-out images, with what the figures need to know of each."""
    return {
        **held.names,
        "label": [labels[c] for c in held.y],
        "probabilities": [[float(f"{p:.7g}") for p in row] for row in classifier.predict(net, held.images).tolist()],
    }


HEAD = ("arm", "task", "seed", "fold", "split", "file_name", "patient_id", "label")  # of a table, then NET, p_CLASS …
NET = {"model": str, "image_size": int, "real_images": int}  # px; real images that it was trained on


def table_of(report: str | Path) -> Path:
    """The table of scores beside a report."""
    return Path(report).with_name(f"{Path(report).stem}_scores.csv")


def write_table(path: Path, found: Iterable[dict[str, Any]]) -> None:
    """One CSV with the probabilities of every held-out image in every run; empty where a net lacks the class.

    The column `arm` has a run's condition: its arm, and its amount and share of the real images where they are not all.
    """
    found = list(found)
    classes = list(dict.fromkeys(label for one in found for label in one["classes"]))
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*HEAD, *NET, *(f"p_{c}" for c in classes)])
        for one in found:
            net = [(one["settings"] | one).get(name, "") for name in NET]  # settings of a training, notes of a table
            run = [one["condition"], *(one["settings"][name] for name in ("task", "seed", "fold"))]
            for split in ("valid", "test"):
                rows = one.get(split) or {"file_name": []}
                for i, name in enumerate(rows["file_name"]):
                    p = dict(zip(one["classes"], rows["probabilities"][i], strict=True))
                    image = [name, rows["patient_id"][i], rows["label"][i]]
                    writer.writerow([*run, split, *image, *net, *(p.get(c, "") for c in classes)])


def read_table(path: str | Path) -> list[dict[str, Any]]:
    """The runs of a table of `write_table`, plain or packed (.gz, .xz), as their files have them, with NET for notes.

    Tables of older code have no NET. Raises InputError where it is no such table, names the place where it can, and
    where an image is in a run twice.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read as a table of scores: {str(error).strip()}") from error
    columns = [name for name in table if name.startswith("p_")]
    if not (set(HEAD) <= set(table) and columns and len(table)):
        found = f"{len(table)} rows of {', '.join(table)}"
        raise InputError(f"{path}: not a table of scores as eval.classify writes them; it has {found}")
    by_run: Any = table.groupby([*HEAD[:4]], sort=False)
    found = []
    for place, rows in by_run:
        try:
            found.append(_run_of(place, rows, columns))
        except ValueError as error:
            run = ", ".join(f"{name} {value}" for name, value in zip(HEAD, place, strict=False) if value)
            raise InputError(f"{path}: {run}: {error}") from error
    return found


def _run_of(place: tuple[str, str, str, str], rows: Any, columns: list[str]) -> dict[str, Any]:
    """One run of a table; raises ValueError where its rows are not those of a run."""
    condition, task, seed, fold = place
    known = [name for name in columns if (rows[name] != "").any()]
    classes = [name.removeprefix("p_") for name in known]
    settings = {"task": task, "seed": int(seed), "fold": int(fold) if fold else None} | read_condition(condition)
    net = {name: kind(rows[name].iloc[0]) for name, kind in NET.items() if name in rows and rows[name].iloc[0]}
    one: dict[str, Any] = {"condition": condition, "classes": classes, "settings": settings} | net
    if strange := set(rows["label"]) - set(classes):
        raise ValueError(f"rows of class {', '.join(sorted(strange))}, and no probabilities of it")
    for split, of in rows.groupby("split", sort=False):
        if split not in ("valid", "test"):
            raise ValueError(f"rows of split '{split}'; scores are of valid and test")
        if (again := of["file_name"][of["file_name"].duplicated()]).any():
            raise ValueError(f"{again.iloc[0]} is there more than once in {split}")
        one[split] = {name: of[name].tolist() for name in ("file_name", "patient_id", "label")}
        one[split]["probabilities"] = of[known].astype(float).to_numpy().tolist()
    if "test" not in one:
        raise ValueError("no rows of split 'test'")
    return one


def parse_shard(text: str) -> tuple[int, int]:
    """ "k/n" -> (k, n)"""
    k, slash, n = text.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise InputError(f"--shard '{text}': write k/n with k from 0 to n-1, as in 0/4 for the first of four parts")
    return int(k), int(n)
