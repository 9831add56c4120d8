"""The pictures of docs/img, from runs.

python -m benchmarks.montage run --real D --fake G docs/img/quickstart.png
python -m benchmarks.montage phantom --real tiger_thyroid/init_image docs/img/phantom_beside_real.png
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from data import phantom
from eval.images import load_images, load_maps, load_masks
from tiger import manifest
from tiger.conditions import read_gray
from tiger.knowledge import Knowledge

SIDE = 128  # pixels


def of_run(real_dir: str, fake_dir: str, classes: list[str], each: int) -> np.ndarray:
    """Rows: real test images, masks, Sobel maps, and what was drawn after them; the first `each` of every class."""
    rows = []
    real, fake = manifest.read(real_dir).select(split="test"), manifest.read(fake_dir)
    for data, loaders in ((real, [load_images]), (fake, [load_masks, load_maps, load_images])):
        chosen = [row for label in classes for row in data.select(labels=[label]).rows[:each]]
        part = manifest.Manifest(data.path, tuple(chosen))
        for load in loaders:
            pictures = load(part, SIDE)
            rows.append(np.concatenate(list(pictures * np.uint8(255) if pictures.dtype == bool else pictures), axis=1))
    return np.concatenate(rows)


def phantom_beside(real_dir: str, seed: int = 7) -> np.ndarray:
    """Above real ultrasound, below as many phantoms, all resized to SIDE."""
    paths = sorted(path for path in Path(real_dir).iterdir() if path.suffix in (".png", ".jpg"))
    real = [read_gray(path, SIDE) for path in paths]
    rng = np.random.default_rng(seed)
    labels = list(Knowledge.load("thyroid").subtypes)[:4]
    made = []
    for index in range(len(real)):
        nodule = phantom.sample_nodule(labels[index % 4], rng, frozenset(), False)
        made.append(phantom.render(nodule | phantom.sample_view(rng), rng, SIDE).image)
    return np.concatenate([np.concatenate(real, axis=1), np.concatenate(made, axis=1)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", choices=("run", "phantom"))
    parser.add_argument("--real", required=True, help="run: manifest of real images; phantom: folder of real images")
    parser.add_argument("--fake", help="run: manifest of generated images")
    parser.add_argument("--classes", nargs="+", default=["benign", "PTC", "FTC", "MTC"])
    parser.add_argument("--each", type=int, default=2, help="images a class")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    grid = (
        phantom_beside(args.real)
        if args.picture == "phantom"
        else of_run(args.real, args.fake, args.classes, args.each)
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
