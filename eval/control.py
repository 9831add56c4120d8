"""Do generated images show what was asked of them: the mask, the Sobel map, the attributes?

    python -m eval.control --fake runs/generated --real runs/data --judges assets/judges --output control.json

Each figure stands between a floor, the same images judged against another image's request, and a ceiling, the same
judge on held-out real images, whose classes are weighted as those of the generated ones. Judges see the image alone. A
generator or a judge that has seen these images or patients is refused, as are images derived from them.

The judges in assets/judges know synthetic thyroid ultrasound only: on other images their figures mean nothing. Train
some on yours with `python -m eval.segment train` and `python -m eval.attributes train`, and give them by --judges.
"""

import argparse
import math
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval import statistics
from eval.images import (
    add_knowledge,
    group_of,
    load_images,
    load_masks,
    patients_of,
    read_split,
    require_column,
    select_split,
    shuffled,
)
from eval.judges import (
    AttributeNet,
    Segmenter,
    load_attribute_net,
    load_segmenter,
    mask_iou,
    predict_attributes,
    refuse_strangers,
    refuse_taught,
    segment,
    trained_by,
)
from eval.leakage import refuse_leakage
from tiger.conditions import nodule_region, read_gray, read_mask, sobel_map
from tiger.errors import InputError, name_rows, run
from tiger.files import write_json
from tiger.knowledge import Knowledge
from tiger.manifest import Manifest

RESAMPLES = 1000


@dataclass(frozen=True)
class Judged:
    """One value an image, with what is needed to average and to bootstrap it."""

    values: np.ndarray  # (N,) float
    labels: np.ndarray  # (N,) class names
    groups: np.ndarray  # (N,) patient, or the one whose map a generated image was drawn after

    def where(self, kept: np.ndarray) -> "Judged":
        """Those of `kept`, (N,) bool."""
        return Judged(self.values[kept], self.labels[kept], self.groups[kept])


def judged(values: np.ndarray, rows: Manifest, patient_of: Mapping[str, str]) -> Judged:
    """Values with the labels and groups of their rows."""
    labels = np.array([str(row.label) for row in rows.rows])
    return Judged(values, labels, np.array([group_of(row, patient_of) for row in rows.rows]))


def mean(these: Judged, weights: dict[str, float] | None = None) -> dict[str, float]:
    """{n, value, low, high} of the mean; `weights` are the shares of the classes in it, default as they are.

    The figures are nan where there is no value, as when no image of a class has a category's term.
    """
    kept = these if weights is None else these.where(np.isin(these.labels, list(weights)))
    if not len(kept.values):
        return {"n": 0} | dict.fromkeys(("value", "low", "high"), math.nan)

    def metric(labels: np.ndarray, values: np.ndarray) -> float:
        if weights is None:
            return float(values.mean())
        present = set(labels.tolist())
        if not weights.keys() <= present:
            raise ValueError("a resample without one of the classes")
        return float(sum(share * values[labels == label].mean() for label, share in weights.items()))

    value, low, high = statistics.cluster_bootstrap_ci(metric, kept.labels, kept.values, kept.groups, RESAMPLES, 0)
    return {"n": len(kept.values), "value": value, "low": low, "high": high}


def compare(generated: Judged, floor: Judged, real: Judged) -> dict[str, Any]:
    """The generated mean between floor and ceiling, overall and per class, and its ratio to the ceiling.

    Of the classes that there are real images of: those of others have nothing to be set against.
    """
    generated, floor = (part.where(np.isin(part.labels, real.labels)) for part in (generated, floor))
    common = Counter(generated.labels.tolist())
    weights = {label: n / sum(common.values()) for label, n in common.items()}
    result: dict[str, Any] = {"generated": mean(generated), "ceiling": mean(real, weights), "floor": mean(floor)}
    result["ratio_to_ceiling"] = ratio(result["generated"], result["ceiling"])
    result["per_class"] = {}
    for label in common:
        ours, theirs, chance = (mean(part.where(part.labels == label)) for part in (generated, real, floor))
        result["per_class"][label] = {
            "generated": ours, "ceiling": theirs, "floor": chance, "ratio_to_ceiling": ratio(ours, theirs)
        }  # fmt: skip
    return result


def ratio(ours: dict[str, float], ceiling: dict[str, float]) -> float | None:
    """How much of the ceiling is reached; None where the ceiling is nothing."""
    return ours["value"] / ceiling["value"] if ceiling["value"] and ceiling["n"] else None


def mask_control(net: Segmenter, fake: Manifest, real: Manifest, patient_of: Mapping[str, str]) -> dict[str, Any]:
    """IoU of the requested mask with the nodule that the segmenter finds."""
    found, wanted = segment(net, load_images(fake, net.resolution)), load_masks(fake, net.resolution)
    of_real = mask_iou(segment(net, load_images(real, net.resolution)), load_masks(real, net.resolution))
    others = wanted[shuffled(len(wanted))]
    own, floor = (judged(mask_iou(found, masks), fake, patient_of) for masks in (wanted, others))
    return compare(own, floor, judged(of_real, real, patient_of))


def correlation(edges: np.ndarray, image: np.ndarray, region: np.ndarray) -> float:
    """Pearson correlation of a Sobel map with that of an image, over a region; 0 where either is flat. (H, W) each."""
    a, b = edges[region].astype(float), sobel_map(image)[region].astype(float)
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm > 0 else 0.0


def requests(rows: Manifest) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(requested map, image, region to compare) of each row: around the nodule where the map is blank inside it."""
    for row in rows.rows:
        image, edges = (read_gray(rows.file(row, column)) for column in ("file_name", "condition_bg"))
        mask = read_mask(rows.file(row, "condition_fg")) > 0 if row.condition_fg else np.zeros(edges.shape, bool)
        if not image.shape == edges.shape == mask.shape:
            raise InputError(f"{rows.path}: {row.file_name}: image, mask and Sobel map differ in size; make them one")
        around = nodule_region(np.where(mask, 255, 0).astype(np.uint8)) == 0
        yield edges, image, np.ones_like(mask) if edges[mask].any() else around


def sobel_control(fake: Manifest, real: Manifest, patient_of: Mapping[str, str]) -> dict[str, Any]:
    """Correlation of the requested Sobel map with the map of the generated image."""
    for rows in (fake, real):
        require_column(rows, "condition_bg")
    own, floor, blanked = [], [], 0
    for (edges, image, region), k in zip(requests(fake), shuffled(len(fake.rows)), strict=True):  # one at a time
        other = read_gray(fake.file(fake.rows[k], "condition_bg"))
        if other.shape != image.shape:
            raise InputError(f"{fake.path}: images of several sizes cannot be set against each other's maps")
        own.append(correlation(edges, image, region))
        floor.append(correlation(other, image, region))
        blanked += not region.all()
    where = {"images_compared_outside_the_mask": blanked, "images_compared_in_whole": len(own) - blanked}
    of_real = [correlation(*item) for item in requests(real)]
    parts = ((np.array(own), fake), (np.array(floor), fake), (np.array(of_real), real))
    return where | compare(*(judged(values, rows, patient_of) for values, rows in parts))


def attribute_control(
    net: AttributeNet, fake: Manifest, real: Manifest, patient_of: Mapping[str, str], knowledge: Knowledge
) -> dict[str, Any]:
    """Share of the attributes in a row, or else in its prompt, that the attribute net sees in the image."""
    seen, real_seen = (predict_attributes(net, load_images(rows, net.resolution)) for rows in (fake, real))
    asked, real_asked = (
        [dict(row.attributes) or knowledge.parse(row.text).attributes for row in rows.rows] for rows in (fake, real)
    )
    silent = [row.file_name for row, stated in zip(fake.rows, asked, strict=True) if not stated]
    if silent:
        raise InputError(f"{fake.path}: rows that state no attribute, in `attributes` or prompt: {name_rows(silent)}")
    other = [asked[k] for k in shuffled(len(asked))]

    def share(names: list[str]) -> dict[str, Any]:
        """Over these categories: the mean over an image's stated ones, then over images."""
        parts = []
        for rows, found, stated in ((fake, seen, asked), (fake, seen, other), (real, real_seen, real_asked)):
            values = [
                float(np.mean([f[name] == s[name] for name in names if name in s] or [np.nan]))
                for f, s in zip(found, stated, strict=True)
            ]
            parts.append(judged(np.array(values), rows, patient_of).where(np.isfinite(values)))
        return compare(*parts) if all(len(part.values) for part in parts) else {}

    stated_somewhere = [
        name for name in net.categories if any(name in s for s in asked) and any(name in s for s in real_asked)
    ]
    categories = {name: share([name]) for name in stated_somewhere}
    return {**share(stated_somewhere), "categories": categories}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m eval.control",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--fake", required=True, help="manifest of generated images, with the conditions they were made for"
    )
    parser.add_argument("--real", required=True, help="manifest of real images, for the ceiling")
    parser.add_argument("--split", default="test", help="split of --real (default: test)")
    parser.add_argument(
        "--judges", default="assets/judges", help="folder with segmenter/ and attributes/ (default: %(default)s)"
    )
    add_knowledge(parser)
    parser.add_argument("--output", required=True, help="JSON file")
    parser.add_argument("--dry_run", action="store_true", help="check the input and judge nothing")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = _parser().parse_args(argv)
    segmenter = load_segmenter(Path(args.judges) / "segmenter")
    attribute_net = load_attribute_net(Path(args.judges) / "attributes")
    fake = read_split(args.fake, None, synthetic=True, knowledge=args.knowledge)
    every = read_split(args.real, None, synthetic=False, knowledge=args.knowledge)
    real, patient_of = select_split(every, args.split), patients_of(every.rows)
    if len(fake.rows) < 2:
        raise InputError(f"{fake.path}: at least two generated images are needed")
    labels = {row.label for row in fake.rows} & {row.label for row in real.rows}
    if not labels:
        raise InputError(f"{fake.path}: no class in common with split '{args.split}' of {real.path}")
    for rows in (fake, real):
        for column in ("condition_fg", "condition_bg"):
            require_column(rows, column)
    knowledge = Knowledge.load(args.knowledge)
    refuse_strangers(Path(args.judges), attribute_net, (fake, real), knowledge)
    train = every.select(split="train")
    compared = Manifest(every.path, (*train.rows, *real.rows))
    unchecked = refuse_leakage(compared, [fake]).unchecked
    unchecked += refuse_taught(compared, Path(args.judges), ("segmenter", "attributes"))
    if args.dry_run:
        print(f"{len(fake.rows)} generated and {len(real.rows)} real images: fine; nothing judged")
        return
    report = {
        "command": f"python -m eval.control {shlex.join(sys.argv[1:] if argv is None else argv)}",
        "split": args.split,
        "n": {"generated": len(fake.rows), "real": len(real.rows)},
        "interval": f"95 %, {RESAMPLES} bootstrap resamples of patients; a generated image belongs to that of its map",
        "unchecked": unchecked,
        "judges": {name: trained_by(Path(args.judges) / name) for name in ("segmenter", "attributes")},
        "mask_iou": mask_control(segmenter, fake, real, patient_of),
        "sobel_correlation": sobel_control(fake, real, patient_of),
        "attribute_agreement": attribute_control(attribute_net, fake, real, patient_of, knowledge),
    }
    write_json(args.output, report)
    for name in ("mask_iou", "sobel_correlation", "attribute_agreement"):
        ours, ceiling, floor = (report[name][part]["value"] for part in ("generated", "ceiling", "floor"))
        print(f"{name}: {ours:.3f} of {ceiling:.3f} (shuffled {floor:.3f})")


if __name__ == "__main__":
    sys.exit(run(main))
