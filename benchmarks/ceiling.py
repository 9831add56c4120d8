r"""What is lost between further real images and a generator's? Sets that stand in for the images of better generators.

    python -m benchmarks.ceiling requests --fake runs/study/tiger_f0 --output_dir runs/study/perfect0 --seed 0
    python -m benchmarks.ceiling decoder --real runs/study/extra --model assets/tiny-base --count 400 \
        --output_dir runs/study/decoded

`requests`: phantoms, each with the attributes that a synthetic image was asked for. What they fall short of further
real images lies in what was asked for, not in how it was drawn. It is no strict bound: a generator has also learned
its classes' looks from real images, whatever a prompt says. `decoder`: real images once through the autoencoder of a
base, `--count` of each class. What they fall short of the same images lies in the autoencoder. Rows are marked
synthetic, so that eval.classify takes either as a --fake. Minutes, made anew each time.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from benchmarks.autoencoder import reconstruct
from data import phantom
from eval.images import load_images, read_split
from tiger.components import load_components
from tiger.errors import InputError, run
from tiger.files import atomic_path
from tiger.manifest import FILE_NAME, Manifest, Row, write

BATCH = 25  # images that the autoencoder takes at once


def stand_in(row: Row, source: str) -> Row:
    """`row` as that of a synthetic image: without conditions and sources, of a patient of its own."""
    return replace(
        row,
        condition_fg=None,
        condition_bg=None,
        organ_mask=None,
        patient_id=f"ceiling-{Path(row.file_name).stem}",
        split="train",
        source=source,
        synthetic=True,
        derived_from=(),
    )


def drawn_as_asked(fake: Manifest, seed: int) -> Iterator[tuple[Row, NDArray[np.uint8]]]:
    """(row, (S, S) uint8 image): a phantom for each row of `fake`, whose attributes must all be stated."""
    if incomplete := [row.file_name for row in fake.rows if not set(phantom.CATEGORIES) <= set(row.attributes)]:
        raise InputError(f"{fake.path}: rows that do not state all of a phantom's attributes: {incomplete[0]}, …")
    for number, row in enumerate(tqdm(fake.rows, desc="render", unit="image")):
        image = phantom.render(dict(row.attributes), np.random.default_rng([seed, 2, number])).image
        yield stand_in(row, "phantom"), image


def decoded(real: Manifest, model: str, count: int) -> Iterator[tuple[Row, NDArray[np.uint8]]]:
    """(row, (S, S) uint8 image): `count` training images of each class after encoding (the mean) and decoding."""
    vae = load_components(model).vae
    taken: Counter[str | None] = Counter()
    rows = []
    for row in real.rows:
        if taken[row.label] < count:
            taken[row.label] += 1
            rows.append(row)
    if short := [label for label in taken if taken[label] < count]:
        raise InputError(f"{real.path}: fewer than --count {count} training images of class {short[0]}")
    for start in tqdm(range(0, len(rows), BATCH), desc="decode", unit="batch"):
        part = rows[start : start + BATCH]
        images = load_images(Manifest(real.path, tuple(part)), vae.config["sample_size"])
        for row, image in zip(part, reconstruct(vae, images), strict=True):
            yield stand_in(row, "decoded"), image


def save(output_dir: Path, pairs: Iterator[tuple[Row, NDArray[np.uint8]]]) -> None:
    """Images in `images/`; the manifest last, so that a folder with one is whole."""
    rows = []
    for row, image in pairs:
        path = output_dir / row.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path, durable=False) as temporary:
            Image.fromarray(image).save(temporary, format="PNG")
        rows.append(row)
    write(output_dir / FILE_NAME, rows)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    modes = parser.add_subparsers(dest="mode", required=True)
    requests = modes.add_parser("requests", allow_abbrev=False)
    requests.add_argument("--fake", required=True, help="manifest of the synthetic images that were asked for")
    requests.add_argument("--seed", type=int, default=0)
    decoder = modes.add_parser("decoder", allow_abbrev=False)
    decoder.add_argument("--real", required=True, help="manifest of further real images")
    decoder.add_argument("--model", required=True, help="base in diffusers' layout")
    decoder.add_argument("--count", type=int, required=True, help="images of each class")
    for mode in (requests, decoder):
        mode.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.mode == "requests":
        save(args.output_dir, drawn_as_asked(read_split(args.fake, None, synthetic=True), args.seed))
    else:
        save(args.output_dir, decoded(read_split(args.real, "train", synthetic=False), args.model, args.count))


if __name__ == "__main__":
    sys.exit(run(main))
