"""Prepare data: from a public data set or one's own folder to a checked manifest with conditions and splits.

python -m data.prepare phantom --output_dir runs/phantom --count 64 --seed 3          # synthetic, nothing needed
python -m data.prepare build --source breast --input BrEaST --output_dir runs/breast --size 256
python -m data.prepare check --data_dir runs/breast --knowledge breast --output report.json
python -m data.prepare split --data_dir mine --seed 0
python -m data.prepare subsample --data_dir mine --most malignant=20
python -m data.prepare conditions --data_dir mine
python -m data.prepare shards --data_dir mine --output_dir /archive/mine
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from data.check import examine, summary
from data.maps import make_maps
from data.mend import mend
from data.shards import write_shards
from data.sources import breast, busi, chexpert, folder, isic, tiger_thyroid, vindr_pcxr
from data.split import assign_folds, keep_at_most, missing_classes, refuse_leaks, share_problem
from tiger import manifest
from tiger.errors import InputError, run
from tiger.files import atomic_path, write_json
from tiger.knowledge import Knowledge
from tiger.manifest import FILE_COLUMNS, SPLITS, Manifest
from tiger.shards import exists, index_path, is_member


def build(args: argparse.Namespace) -> None:
    """Read a source, write images, masks, maps and metadata.jsonl, and check what was written."""
    input_dir, output_dir = Path(args.input), Path(args.output_dir)
    if not input_dir.is_dir():
        raise InputError(f"--input {input_dir}: no such folder")
    if output_dir.resolve().is_relative_to(input_dir.resolve()):
        raise InputError(f"--output_dir {output_dir}: lies in the input, which stays as it is: give another folder")
    with tempfile.TemporaryDirectory() as scratch:  # a dry run does all of it, and nothing stays
        rows = write_source(args, input_dir, Path(scratch) if args.dry_run else output_dir).rows
    report(Manifest(output_dir / manifest.FILE_NAME, rows), args.dry_run)


def write_source(args: argparse.Namespace, input_dir: Path, output_dir: Path) -> Manifest:
    """Write one source's data set and check it."""
    if args.source == "breast":
        knowledge = Knowledge.load("breast")
        rows = breast.build(input_dir, output_dir, args.size, args.seed)
    elif args.source == "tiger_thyroid":
        knowledge = Knowledge.load("thyroid")
        rows = tiger_thyroid.build(input_dir, output_dir, args.size)
    elif args.source == "busi":
        knowledge = Knowledge.load("breast")
        rows = busi.build(input_dir, output_dir, args.size, args.seed)
    elif args.source == "chexpert":
        knowledge = Knowledge.load("chest_xray")
        rows = chexpert.build(input_dir, output_dir, args.size, args.seed, args.uncertain)
    elif args.source == "isic":
        knowledge = Knowledge.load("skin")
        rows = isic.build(input_dir, output_dir, args.size, args.seed)
    elif args.source == "vindr_pcxr":
        knowledge = Knowledge.load("chest_xray")
        rows = vindr_pcxr.build(input_dir, output_dir, args.size, args.seed, args.rare_share)
    else:
        knowledge = Knowledge.load(args.knowledge)
        options = {"table": args.table, "columns": dict(chain(*args.columns or ())), "labels": dict(args.labels or ())}
        rows = folder.build(input_dir, output_dir, args.size, knowledge, **options)
    path = output_dir / manifest.FILE_NAME
    manifest.write(path, rows)
    written = manifest.read(path, knowledge)
    manifest.check(written, conditions=False, knowledge=knowledge)
    return written


def check(args: argparse.Namespace) -> None:
    """List everything that is wrong with a data set. Exit code 2 if there are errors, 0 if there are warnings only."""
    knowledge = Knowledge.load(args.knowledge)
    report = examine(args.data_dir, knowledge, args.stage, args.workers)
    print(report.text())
    if args.output:
        write_json(args.output, report.record())
    if args.fix:
        for line in mend(report, knowledge, Path(args.fix), args.workers):
            print(line)
        report = examine(args.fix, knowledge, args.stage, args.workers)
        print(report.text())
    if errors := report.count("error"):
        hint = "" if args.fix else "; --fix FOLDER writes a copy with what can be mended"
        raise InputError(f"{report.data.path}: {errors} errors, listed above{hint}")


def split(args: argparse.Namespace) -> None:
    """Assign splits or folds by patient, alike in labels, in place or in a copy of the data set."""
    data = manifest.read(args.data_dir, Knowledge.load(args.knowledge))
    if problem := share_problem(args.fractions):
        raise InputError(problem)
    without = sum(row.patient_id is None for row in data.rows if not row.synthetic)
    if without:
        print(f"warning: {without} rows have no patient_id: each is split as a patient of its own", file=sys.stderr)
    folder = data.root if args.output_dir is None else Path(args.output_dir)
    fractions: dict[str, float] = dict(zip(SPLITS, args.fractions, strict=True))
    if args.folds:
        parts = assign_folds(data.rows, args.folds, args.seed)
        done = {folder / f"fold{number}.jsonl": rows for number, rows in enumerate(parts)}
    else:
        path = data.path if args.output_dir is None else folder / manifest.FILE_NAME
        done = {path: manifest.assign_splits(data.rows, fractions, args.seed)}
    wanted = list(SPLITS) if args.folds else [name for name in SPLITS if fractions[name]]
    for path, rows in done.items():
        refuse_leaks(rows, path)
        for line in missing_classes(rows, wanted):
            print(f"warning: {f'{path.name}: ' * bool(args.folds)}{line}", file=sys.stderr)
    copied = files_of(data) if folder.resolve() != data.root.resolve() else []
    if not args.dry_run:
        copy_files(data.root, folder, copied)
    for path, rows in done.items():
        if not args.dry_run:
            manifest.write(path, rows)
        report(Manifest(path, rows), args.dry_run)


def subsample(args: argparse.Namespace) -> None:
    """Make classes rare: manifests beside the old one, with fewer training patients, and with those left out."""
    data = manifest.read(args.data_dir, Knowledge.load(args.knowledge))
    kept, rest = keep_at_most(data.rows, dict(args.most), args.seed)
    done = {data.root / f"{args.name}{end}.jsonl": rows for end, rows in (("", kept), ("_rest", rest))}
    for path, rows in done.items():
        if path.exists() and manifest.read(path).rows != rows:
            raise InputError(f"{path}: is there and holds other rows; give another --name")
    for path, rows in done.items():
        if not args.dry_run:
            manifest.write(path, rows)
        report(Manifest(path, rows), args.dry_run)


def files_of(data: Manifest) -> list[str]:
    """Every file that the manifest names; of shards they and their indices. Raises InputError where one is missing."""
    names = set()
    for path in {data.file(row, column) for row in data.rows for column in FILE_COLUMNS if getattr(row, column)}:
        if not exists(path):
            raise InputError(f"{data.path}: {path} does not exist; see python -m data.prepare check")
        names |= {path.parent, index_path(path.parent)} if is_member(path) else {path}
    return sorted(path.relative_to(data.root).as_posix() for path in names)


def copy_files(root: Path, output_dir: Path, names: Sequence[str]) -> None:
    """Copy files of `root` to the same places below `output_dir`."""
    for name in tqdm(names, desc="files", unit="file"):
        with atomic_path(output_dir / name) as temporary:
            shutil.copyfile(root / name, temporary)


def conditions(args: argparse.Namespace) -> None:
    """Write the edge maps that are missing, and name them in the manifest. A stopped run continues where it was."""
    data = manifest.read(args.data_dir, Knowledge.load(args.knowledge))
    written, there = make_maps(data, args.edges, args.workers, args.dry_run)
    print(f"{written} maps {'would be ' * args.dry_run}written, {there} were there")


def shards(args: argparse.Namespace) -> None:
    """Write a data set as tar shards that training reads where they lie. A stopped run continues where it was."""
    data = manifest.read(args.data_dir, Knowledge.load(args.knowledge))
    report(write_shards(data, Path(args.output_dir), args.rows_per_shard, args.dry_run), args.dry_run)


def phantom(args: argparse.Namespace) -> None:
    """Write synthetic thyroid ultrasound with known attributes."""
    from data.phantom import write_dataset

    options = {"preset": args.preset, "size": args.size, "workers": args.workers, "dry_run": args.dry_run}
    data = write_dataset(args.output_dir, args.count, args.seed, **options)
    report(data, args.dry_run)


def dicom(args: argparse.Namespace) -> None:
    """Turn a DICOM export into PNGs and a table that name no patient; `build --source folder` reads the result."""
    from data.dicom import deidentify

    done = deidentify(
        Path(args.input), Path(args.output_dir), key_file=args.key_file, table=args.table,
        knowledge=Knowledge.load(args.knowledge), frames=args.frames, text=args.text, modalities=args.modalities,
        workers=args.workers, dry_run=args.dry_run,
    )  # fmt: skip
    removed = done.pop("removed_attributes")
    print(json.dumps(done, indent=2), f"\n{len(removed)} kinds of attributes removed; none is kept")


def segmenter(args: argparse.Namespace) -> None:
    """Masks for images that have none: train a YOLOv8-seg on those that do, evaluate it, predict; or find lungs."""
    from data import segmentation

    if args.action == "train":
        done = segmentation.train(
            args.data_dir, args.output_dir, target=args.target, start=args.start, epochs=args.epochs,
            imgsz=args.imgsz, batch=args.batch, seed=args.seed, device=args.device,
        )  # fmt: skip
    elif args.action == "lungs":
        done = segmentation.lungs(args.data_dir, args.weights)
    else:
        action = segmentation.evaluate if args.action == "evaluate" else segmentation.predict
        done = action(args.data_dir, args.model, args.confidence, args.device)
    print(json.dumps(done, indent=2))


def report(data: Manifest, dry_run: bool) -> None:
    """Print what was written, or would be."""
    print(f"would write {summary(data)}" if dry_run else summary(data))


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value


def whole(text: str) -> int:
    """An integer of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, found {value}")
    return value


def share(text: str) -> float:
    """A number above 0, at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, found {value}")
    return value


def pair(text: str) -> tuple[str, str]:
    """a=b"""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, found {text!r}")
    return name, value


def count(text: str) -> tuple[str, int]:
    """label=20"""
    name, value = pair(text)
    return name, positive(value)


def pairs(text: str) -> list[tuple[str, str]]:
    """a=b,c=d"""
    return [pair(part) for part in re.split(r",(?=\w+=)", text)]


def parser() -> argparse.ArgumentParser:
    """The command line; every default is in --help."""
    top = argparse.ArgumentParser(
        prog="python -m data.prepare", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Callable[[argparse.Namespace], None], name: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=(function.__doc__ or "").split(".")[0], description=function.__doc__, allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )  # fmt: skip
        sub.set_defaults(function=function)
        return sub

    def dry_run(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--dry_run", action="store_true", help="check the input, print what would be written")

    def data_dir(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--data_dir", required=True, help="folder with a metadata.jsonl, or that file")
        sub.add_argument("--knowledge", default="thyroid", help="name in configs/knowledge, or a YAML file")

    sub = command(build, "build")
    sub.add_argument(
        "--source", required=True, help="see data/README.md",
        choices=["breast", "busi", "chexpert", "isic", "vindr_pcxr", "tiger_thyroid", "folder"],
    )  # fmt: skip
    sub.add_argument("--input", required=True, help="the data set's folder; it is only read")
    sub.add_argument(
        "--output_dir", required=True, help="where images/, condition_fg/, condition_bg/, metadata.jsonl go"
    )
    sub.add_argument("--size", type=positive, help="side in px to resize to; sides are not kept in proportion "
                     "(as in Stable Diffusion's training on squares); None: keep")  # fmt: skip
    sub.add_argument("--seed", type=int, default=0, help="seed of the split (all but tiger_thyroid and folder)")
    sub.add_argument("--uncertain", choices=["zeros", "ones", "ignore"], default="zeros",
                     help="what -1 means: absent, present, or leave the image out (chexpert)")  # fmt: skip
    sub.add_argument("--rare_share", type=share, default=0.1,
                     help="pneumonia in train, as a share of the commonest class; 1: all (vindr_pcxr)")  # fmt: skip
    sub.add_argument("--knowledge", default="thyroid", help="name or YAML file (folder)")
    sub.add_argument("--table", help="CSV, Parquet or JSON lines in the input folder; None: metadata.csv, .parquet or "
                     ".jsonl, or else all of it as a Hugging Face data set (folder)")  # fmt: skip
    sub.add_argument("--columns", nargs="+", type=pairs, metavar="OURS=THEIRS",
                     help="what the table calls image, text, label, patient_id, mask, … (folder)")  # fmt: skip
    sub.add_argument("--labels", nargs="+", type=pair, metavar="THEIRS=OURS",
                     help="labels of the table → labels of the knowledge base (folder)")  # fmt: skip
    dry_run(sub)

    sub = command(check, "check")
    data_dir(sub)
    sub.add_argument("--stage", choices=["auto", "coarse", "fine"], default="auto",
                     help="fine needs a mask and a map in every row; auto: fine if any row has a mask")  # fmt: skip
    sub.add_argument("--output", help="JSON file for the whole report")
    sub.add_argument("--fix", metavar="FOLDER", help="new folder for a copy in which what can be mended is")
    sub.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="processes")

    sub = command(split, "split")
    data_dir(sub)
    sub.add_argument("--output_dir", help="folder for a copy; None: rewrite the manifest in place")
    sub.add_argument("--seed", type=int, default=0, help="another seed, another split")
    sub.add_argument("--fractions", type=float, nargs=3, default=[0.7, 0.1, 0.2], metavar=("TRAIN", "VALID", "TEST"),
                     help="shares of the patients")  # fmt: skip
    sub.add_argument("--folds", type=positive, help="write fold0.jsonl … instead: each part of the patients is the "
                     "test of one fold, the next part its valid; None: one split by --fractions")  # fmt: skip
    dry_run(sub)

    sub = command(subsample, "subsample")
    data_dir(sub)
    sub.add_argument("--most", nargs="+", type=count, required=True, metavar="LABEL=IMAGES",
                     help="training images of a class that stay at most, whole patients of them")  # fmt: skip
    sub.add_argument("--seed", type=int, default=0, help="another seed, other patients")
    sub.add_argument(
        "--name", default="subsample", help="NAME.jsonl and NAME_rest.jsonl are written beside the manifest"
    )
    dry_run(sub)

    sub = command(conditions, "conditions")
    data_dir(sub)
    sub.add_argument("--edges", choices=["sobel", "boundary"], default="sobel",
                     help="boundary: the Sobel map with the mask's boundary drawn into it")  # fmt: skip
    sub.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="processes")
    dry_run(sub)

    sub = command(shards, "shards")
    data_dir(sub)
    sub.add_argument("--output_dir", required=True, help="where shard-000000.tar …, metadata.jsonl go")
    sub.add_argument("--rows_per_shard", type=positive, default=1000, help="images a shard, with their masks and maps")
    dry_run(sub)

    sub = command(dicom, "dicom")
    sub.add_argument("--input", required=True, help="folder of DICOM files, at any depth; it is only read")
    sub.add_argument("--output_dir", required=True, help="where images/, metadata.csv and report.json go")
    sub.add_argument("--key_file", help="secret that the codes of patients and images depend on; None: a random one, "
                     "so that codes differ in every run")  # fmt: skip
    sub.add_argument("--table", help="CSV with SOPInstanceUID, SeriesInstanceUID, StudyInstanceUID, AccessionNumber, "
                     "PatientID or file, and any of text, label, split, plane")  # fmt: skip
    sub.add_argument("--knowledge", default="thyroid", help="name or YAML file; texts keep only its terms")
    sub.add_argument("--text", choices=["mask", "refuse", "keep"], default="mask",
                     help="text inside the scan area: paint it black, leave the file out, or do not look")  # fmt: skip
    sub.add_argument("--frames", type=whole, default=1, help="frames to take from a clip, spread evenly; 0: all")
    sub.add_argument("--modalities", nargs="+", default=["US", "CR", "DX"], help="other files are left out")
    sub.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="processes")
    dry_run(sub)

    sub = command(segmenter, "segmenter")
    actions = sub.add_subparsers(dest="action", required=True, metavar="train|evaluate|predict|lungs")
    told = {"train": "train on the rows with masks", "evaluate": "Dice and IoU of each split",
            "predict": "write masks for the rows without", "lungs": "write the lungs of chest x-rays"}  # fmt: skip
    for name in told:
        action = actions.add_parser(
            name, help=told[name], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        action.add_argument("--data_dir", required=True, help="folder with a metadata.jsonl, or that file")
        if name == "lungs":
            action.add_argument("--weights", required=True, help="local copy of TorchXRayVision's PSPNet weights")
            continue
        action.add_argument("--device", help="cpu, 0, 0,1, …; None: a GPU if there is one")
        if name != "train":
            action.add_argument("--model", required=True, help="output folder of segmenter train")
            action.add_argument("--confidence", type=share, default=0.25, help="of the parts that a mask is made of")
            continue
        action.add_argument("--output_dir", required=True, help="where model.safetensors and scores.json go")
        action.add_argument("--target", choices=["nodule", "organ"], default="nodule",
                            help="condition_fg or organ_mask")  # fmt: skip
        action.add_argument("--start", default="yolov8n-seg.yaml", help="architecture in the wheel, or a local .pt")
        action.add_argument("--epochs", type=positive, default=100, help="passes over the training rows")
        action.add_argument("--imgsz", type=positive, default=640, help="side in px, a multiple of 32")
        action.add_argument("--batch", type=positive, default=16, help="images a step")
        action.add_argument("--seed", type=int, default=0, help="another seed, another model")

    sub = command(phantom, "phantom")
    sub.add_argument("--output_dir", required=True, help="where the data set goes")
    sub.add_argument("--count", type=positive, default=64, help="training images; held-out splits come on top")
    sub.add_argument("--seed", type=int, default=0, help="another seed, other images")
    sub.add_argument(
        "--preset", default="longtail", help="longtail, study, balanced, common or truth (see data/phantom.py)"
    )
    sub.add_argument("--size", type=positive, default=128, help="side in px")
    sub.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="processes")
    dry_run(sub)
    return top


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    sys.exit(run(main))
