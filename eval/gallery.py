r"""A page to browse synthetic images on, the real source beside each, and a contact sheet of a few of each class.

    python -m eval.gallery --real runs/data --fake runs/generated --output runs/generated/gallery.html
    python -m eval.gallery --real runs/data --fake runs/generated/kept.jsonl runs/generated/kept_rejected.jsonl \
        --output runs/generated/gallery.html                      # with the gate's scores and reasons

One file that needs no network: every picture is in it, and a script of its own filters and sorts. The contact sheet is
a PNG of the same name: synthetic images with the outline of the mask that was asked for, below each its source.
"""

import argparse
import base64
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.charts import montage, outlined, to_rgb
from eval.images import add_knowledge, read_split
from eval.page import escape
from tiger.conditions import read_gray, read_mask
from tiger.errors import InputError, run
from tiger.files import atomic_path
from tiger.manifest import Manifest, Row

HERE = Path(__file__).parent
QUALITY = 80  # of the JPEGs in the page


def thumbnail(image: np.ndarray) -> str:
    """(H, W) or (H, W, 3) uint8 -> a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def gate_notes(path: Path) -> dict[str, dict[str, Any]]:
    """file name -> what `eval.gate` wrote of it; empty where it wrote nothing."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    return {record["file_name"]: record["gate"] for record in records if isinstance(record.get("gate"), dict)}


def with_outline(rows: Manifest, row: Row, size: int) -> np.ndarray:
    """An image with the outline of its mask, if it has one."""
    image = read_gray(rows.file(row, "file_name"), size)
    return outlined(image, read_mask(rows.file(row, "condition_fg"), size)) if row.condition_fg else image


def source_of(row: Row, by_name: dict[str, Row]) -> Row | None:
    """The real row whose map an image was drawn after, if it is known."""
    return next((by_name[name] for name in row.derived_from if name in by_name), None)


def entries_of(fakes: Sequence[Manifest], real: Manifest, size: int) -> list[dict[str, Any]]:
    """What the page shows of each synthetic image, as JSON."""
    by_name = {row.file_name: row for row in real.rows}
    sources: dict[str, str] = {}  # a map is drawn after many times
    entries = []
    for fake in fakes:
        notes = gate_notes(fake.path)
        for row in fake.rows:
            note = notes.get(row.file_name, {})
            source = source_of(row, by_name)
            if source is not None and source.file_name not in sources:
                sources[source.file_name] = thumbnail(with_outline(real, source, size))
            entries.append(
                {
                    "name": row.file_name,
                    "label": str(row.label),
                    "text": row.text,
                    "attributes": row.attributes,
                    "seed": row.seed,
                    "scores": {k: v for k, v in note.get("scores", {}).items() if v is not None},
                    "reasons": note.get("reasons", []),
                    "image": thumbnail(read_gray(fake.file(row, "file_name"), size)),
                    "outlined": thumbnail(with_outline(fake, row, size)),
                    "source": source and source.file_name,
                    "source_label": source and str(source.label),
                }
            )
    return [{"sources": sources}, *entries]


def page(entries: list[dict[str, Any]], title: str) -> str:
    """The whole page. JSON in a script element must not close it, nor be taken for markup."""
    data = json.dumps(entries, ensure_ascii=False).replace("<", "\\u003c")
    style, script = ((HERE / f"gallery.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<form id="filters"></form>
<p><output id="count"></output> Hold the pointer over an image to see the outline that was asked for. The real image
whose edges it was drawn after is on its right, with its own outline. For research; not for diagnosis.</p>
</header>
<main id="images"></main>
<button id="more" type="button">more</button>
<script type="application/json" id="data">{data}</script>
<script>
{script}</script>
</body>
</html>
"""


def contact_sheet(fakes: Sequence[Manifest], real: Manifest, each: int, size: int) -> bytes:
    """For every class two rows of tiles, `each` wide: synthetic images, and below each its source."""
    by_name = {row.file_name: row for row in real.rows}
    lines: list[list[np.ndarray]] = []
    for label in dict.fromkeys(row.label for fake in fakes for row in fake.rows):
        drawn = [(fake, row) for fake in fakes for row in fake.rows if row.label == label][:each]
        lines.append([to_rgb(with_outline(fake, row, size)) for fake, row in drawn])
        sources = [source_of(row, by_name) for _, row in drawn]
        blank = np.full((size, size, 3), 255, np.uint8)
        lines.append([blank if row is None else to_rgb(with_outline(real, row, size)) for row in sources])
    return montage(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m eval.gallery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--real", required=True, help="manifest of the real images they were made from")
    parser.add_argument("--fake", required=True, nargs="+", help="manifests of synthetic images")
    parser.add_argument("--output", required=True, help="HTML file; the contact sheet is a .png beside it")
    add_knowledge(parser)
    parser.add_argument("--most", type=int, default=2000, help="images in the page, evenly spread (default: 2000)")
    parser.add_argument("--each", type=int, default=12, help="images of a class in the contact sheet (default: 12)")
    parser.add_argument("--size", type=int, default=128, help="side of a picture in pixels (default: 128)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = _parser().parse_args(argv)
    output = Path(args.output)
    if output.suffix not in (".html", ".htm"):
        raise InputError(f"--output {output}: give the name of an HTML file, as gallery.html")
    for name in ("most", "each", "size"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be at least 1")
    real = read_split(args.real, None, synthetic=False, knowledge=args.knowledge)
    fakes = [read_split(path, None, synthetic=True, knowledge=args.knowledge) for path in args.fake]
    total = sum(len(fake.rows) for fake in fakes)
    step = max(1, -(-total // args.most))  # every step-th image
    shown = [Manifest(fake.path, fake.rows[::step]) for fake in fakes]
    title = f"{sum(len(fake.rows) for fake in shown)} of {total} synthetic images"
    with atomic_path(output) as temporary:
        temporary.write_text(page(entries_of(shown, real, args.size), title), encoding="utf-8")
    with atomic_path(output.with_suffix(".png")) as temporary:
        temporary.write_bytes(contact_sheet(fakes, real, args.each, args.size))
    print(f"{title}: {output}, {output.with_suffix('.png')}")


if __name__ == "__main__":
    sys.exit(run(main))
