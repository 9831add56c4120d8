"""Prepare data: from a public data set or one's own folder to a checked manifest with conditions and splits.

python -m data.prepare phantom --output_dir runs/phantom --count 64 --seed 3          # synthetic, nothing needed
python -m data.prepare build --source breast --input BrEaST --output_dir runs/breast --size 256
python -m data.prepare check --data_dir runs/breast --knowledge breast
python -m data.prepare split --data_dir mine --seed 0
python -m data.prepare conditions --data_dir mine
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from data.sources import breast, folder, tiger_thyroid
from data.sources.writer import write_png
from tiger import manifest
from tiger.conditions import read_gray, sobel_map
from tiger.errors import InputError, run
from tiger.files import atomic_path
from tiger.knowledge import Knowledge
from tiger.manifest import SPLITS, Manifest

UNKNOWN_SHOWN = 20  # most frequent unknown words that `check` lists


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
    else:
        knowledge = Knowledge.load(args.knowledge)
        rows = folder.build(input_dir, output_dir, args.size, knowledge)
    path = output_dir / manifest.FILE_NAME
    manifest.write(path, rows)
    written = manifest.read(path, knowledge)
    manifest.check(written, conditions=False, knowledge=knowledge)
    return written


def check(args: argparse.Namespace) -> None:
    """Check structure, files and texts. Ends in one message that lists every bad row and its mending."""
    knowledge = Knowledge.load(args.knowledge)
    data = manifest.read(args.data_dir, knowledge)
    if unknown := unknown_words(data.path, knowledge):
        told = ", ".join(f"{word!r} {count}" for word, count in unknown.most_common(UNKNOWN_SHOWN))
        rest = f" and {len(unknown) - UNKNOWN_SHOWN} more" if len(unknown) > UNKNOWN_SHOWN else ""
        print(f"not in the {knowledge.organ} knowledge base and left out of the prompts: {told}{rest}")
    conditions = args.stage == "fine" or (args.stage == "auto" and any(row.condition_fg for row in data.rows))
    with tqdm(total=len(data.rows), desc="check", unit="row") as bar:
        manifest.check(data, conditions=conditions, knowledge=knowledge, on_row=bar.update)
    print(f"{summary(data)}\nready for {'both stages' if conditions else 'the coarse stage'}")


def unknown_words(path: Path, knowledge: Knowledge) -> Counter[str]:
    """What the `text` columns of a readable manifest say that the knowledge base does not know, and how often."""
    records = (json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    texts = (record["text"] for record in records if record.get("text") is not None)
    return Counter(word.lower() for text in texts for word in knowledge.parse(text).unknown)


def split(args: argparse.Namespace) -> None:
    """Assign splits by patient, alike in labels, in place or in a copy of the data set."""
    data = manifest.read(args.data_dir, Knowledge.load(args.knowledge))
    total = sum(args.fractions)
    if abs(total - 1) > 1e-6 or min(args.fractions) < 0:
        raise InputError(f"--fractions {args.fractions}: must be shares that add up to 1, they add up to {total:g}")
    without = sum(row.patient_id is None for row in data.rows if not row.synthetic)
    if without:
        print(f"warning: {without} rows have no patient_id: each is split as a patient of its own", file=sys.stderr)
    fractions: dict[str, float] = dict(zip(SPLITS, args.fractions, strict=True))
    path = data.path if args.output_dir is None else Path(args.output_dir) / manifest.FILE_NAME
    done = Manifest(path, manifest.assign_splits(data.rows, fractions, args.seed))
    for label, lacking in empty_splits(done, [name for name in SPLITS if fractions[name]]).items():
        print(f"warning: {label} has too few patients: none is in {' or '.join(lacking)}", file=sys.stderr)
    copied = files_of(data) if path.parent.resolve() != data.root.resolve() else []
    if not args.dry_run:
        copy_files(data.root, path.parent, copied)
        manifest.write(path, done.rows)
    report(done, args.dry_run)


def empty_splits(data: Manifest, names: Sequence[str]) -> dict[str, list[str]]:
    """Label → those of the splits `names` that hold none of its real images; labels that lack none are left out."""
    found = {(row.label, row.split) for row in data.rows if not row.synthetic}
    labels = sorted({label for label, _ in found if label is not None})
    lacking = {label: [name for name in names if (label, name) not in found] for label in labels}
    return {label: missing for label, missing in lacking.items() if missing}


def files_of(data: Manifest) -> list[str]:
    """Every file that the manifest names. Raises InputError where one does not exist."""
    names = {getattr(row, column) for row in data.rows for column in manifest.FILE_COLUMNS if getattr(row, column)}
    for name in names:
        if not (data.root / name).is_file():
            raise InputError(f"{data.path}: {name} does not exist; see python -m data.prepare check")
    return sorted(names)


def copy_files(root: Path, output_dir: Path, names: Sequence[str]) -> None:
    """Copy files of `root` to the same places below `output_dir`."""
    for name in tqdm(names, desc="files", unit="file"):
        with atomic_path(output_dir / name) as temporary:
            shutil.copyfile(root / name, temporary)


def conditions(args: argparse.Namespace) -> None:
    """Write the Sobel maps that are missing, and name them in the manifest. A stopped run continues where it was."""
    data = manifest.read(args.data_dir, Knowledge.load(args.knowledge))
    rows = [row if row.condition_bg else replace(row, condition_bg=map_name(row.file_name)) for row in data.rows]
    owner: dict[str, str] = {}
    for row in rows:
        first = owner.setdefault(str(row.condition_bg), row.file_name)
        if first != row.file_name:
            raise InputError(f"{data.path}: {first} and {row.file_name} would share {row.condition_bg}: rename one")
    jobs = [
        (data.root / row.file_name, target)
        for row in rows if not (target := data.root / str(row.condition_bg)).is_file()
    ]  # fmt: skip
    make = partial(write_map, dry_run=args.dry_run)
    problems = [problem for problem in parallel(make, jobs, args.workers, "Sobel maps") if problem]
    if problems:
        raise InputError("\n  ".join([f"{data.path}: {len(problems)} maps could not be made:", *problems]))
    if not args.dry_run:
        manifest.write(data.path, rows)
    print(f"{len(jobs)} maps {'would be ' * args.dry_run}written, {len(rows) - len(jobs)} were there")


def map_name(file_name: str) -> str:
    """images/a/b.jpg → condition_bg/a/b.png"""
    path = PurePosixPath(file_name)
    parts = path.parts[1:] if path.parts[0] == "images" else path.parts
    return str(PurePosixPath("condition_bg", *parts).with_suffix(".png"))


def write_map(job: tuple[Path, Path], dry_run: bool) -> str | None:
    """Write the Sobel map of one (image, map) pair, or only try to make it. Returns what went wrong."""
    image, target = job
    try:
        edges = sobel_map(read_gray(image))
    except InputError as error:
        return str(error)
    if not dry_run:
        write_png(target, edges)
    return None


def parallel(
    function: Callable[[tuple[Path, Path]], str | None], jobs: Sequence[tuple[Path, Path]], workers: int, name: str
) -> Iterable[str | None]:
    """Results of `function` over `jobs`, in order, with a progress bar."""
    spawn = multiprocessing.get_context("spawn")  # a forked child inherits OpenCV's threads as locks that never open
    with tqdm(total=len(jobs), desc=name, unit="image") as bar, ProcessPoolExecutor(workers, spawn) as pool:
        for result in pool.map(function, jobs, chunksize=16):
            bar.update()
            yield result


def phantom(args: argparse.Namespace) -> None:
    """Write synthetic thyroid ultrasound with known attributes."""
    from data.phantom import write_dataset

    options = {"preset": args.preset, "size": args.size, "workers": args.workers, "dry_run": args.dry_run}
    data = write_dataset(args.output_dir, args.count, args.seed, **options)
    report(data, args.dry_run)


def report(data: Manifest, dry_run: bool) -> None:
    """Print what was written, or would be."""
    print(f"would write {summary(data)}" if dry_run else summary(data))


def summary(data: Manifest) -> str:
    """Rows per split and label, one line each."""
    counts = Counter((row.split or "no split", row.label or "no label") for row in data.rows)
    lines = [f"{data.path}: {len(data.rows)} rows, {len({row.patient_id for row in data.rows} - {None})} patients"]
    for name in (*SPLITS, "no split"):
        of_split = {label: n for (split, label), n in sorted(counts.items()) if split == name}
        if of_split:
            lines.append(
                f"  {name:8s} {sum(of_split.values()):6d}   " + "  ".join(f"{k} {n}" for k, n in of_split.items())
            )
    return "\n".join(lines)


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value


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
        "--source", required=True, choices=["breast", "tiger_thyroid", "folder"], help="see data/README.md"
    )
    sub.add_argument("--input", required=True, help="the data set's folder; it is only read")
    sub.add_argument(
        "--output_dir", required=True, help="where images/, condition_fg/, condition_bg/, metadata.jsonl go"
    )
    sub.add_argument("--size", type=positive, help="side in px to resize to; sides are not kept in proportion "
                     "(as in Stable Diffusion's training on squares); None: keep")  # fmt: skip
    sub.add_argument("--seed", type=int, default=0, help="seed of the split (breast)")
    sub.add_argument("--knowledge", default="thyroid", help="name or YAML file (folder)")
    dry_run(sub)

    sub = command(check, "check")
    data_dir(sub)
    sub.add_argument("--stage", choices=["auto", "coarse", "fine"], default="auto",
                     help="fine needs a mask and a map in every row; auto: fine if any row has a mask")  # fmt: skip

    sub = command(split, "split")
    data_dir(sub)
    sub.add_argument("--output_dir", help="folder for a copy; None: rewrite the manifest in place")
    sub.add_argument("--seed", type=int, default=0, help="another seed, another split")
    sub.add_argument("--fractions", type=float, nargs=3, default=[0.7, 0.1, 0.2], metavar=("TRAIN", "VALID", "TEST"),
                     help="shares of the patients")  # fmt: skip
    dry_run(sub)

    sub = command(conditions, "conditions")
    data_dir(sub)
    sub.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="processes")
    dry_run(sub)

    sub = command(phantom, "phantom")
    sub.add_argument("--output_dir", required=True, help="where the data set goes")
    sub.add_argument("--count", type=positive, default=64, help="training images; held-out splits come on top")
    sub.add_argument("--seed", type=int, default=0, help="another seed, other images")
    sub.add_argument("--preset", default="longtail", help="longtail, balanced, common or truth (see data/phantom.py)")
    sub.add_argument("--size", type=positive, default=128, help="side in px")
    sub.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="processes")
    dry_run(sub)
    return top


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    sys.exit(run(main))
