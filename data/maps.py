"""Background conditions of a whole data set: an edge map for each image, in parallel.

"sobel" is the paper's map. "boundary" draws the mask's boundary into it, as DiffBoost (Zhang et al., IEEE Trans Med
Imaging) does into a HED map; no maintained package ships weights of HED, so Sobel stands in for it.
"""

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from data.sources.writer import write_png
from tiger import manifest, shards
from tiger.conditions import boundary_map, read_gray, read_mask, sobel_map
from tiger.errors import InputError
from tiger.manifest import Manifest

FOLDERS = {"sobel": "condition_bg", "boundary": "condition_bg_boundary"}
Job = tuple[Path, Path | None, Path]  # image, mask (for "boundary"), map


def make_maps(data: Manifest, edges: str, workers: int, dry_run: bool) -> tuple[int, int]:
    """Write the maps that are missing and name them in the manifest; returns how many were written, how many there.

    A stopped run continues where it was. With "sobel", rows that name a map keep it; with "boundary" every row gets
    its own, in a folder of its own. Raises InputError that lists every image or mask that cannot be read.
    """
    owner: dict[str, str] = {}
    rows, jobs, problems = [], [], []
    for row in data.rows:
        name = (row.condition_bg if edges == "sobel" else None) or map_name(row.file_name, FOLDERS[edges])
        first = owner.setdefault(name, row.file_name)
        if first != row.file_name:
            raise InputError(f"{data.path}: {first} and {row.file_name} would share {name}: rename one")
        if edges == "boundary" and row.condition_fg is None:
            problems.append(f"{row.file_name}: has no condition_fg, whose boundary is drawn")
            continue
        rows.append(replace(row, condition_bg=name))
        if not shards.exists(data.root / name):
            mask = data.file(row, "condition_fg") if edges == "boundary" else None
            jobs.append((data.file(row, "file_name"), mask, data.root / name))
    make = partial(write_map, dry_run=dry_run)
    problems += [problem for problem in parallel(make, jobs, workers, f"{edges} maps") if problem]
    if problems:
        raise InputError("\n  ".join([f"{data.path}: {len(problems)} maps could not be made:", *problems]))
    if not dry_run:
        manifest.write(data.path, rows)
    return len(jobs), len(rows) - len(jobs)


def map_name(file_name: str, folder: str) -> str:
    """images/a/b.jpg → condition_bg/a/b.png"""
    path = PurePosixPath(file_name)
    parts = path.parts[1:] if path.parts[0] == "images" else path.parts
    return str(PurePosixPath(folder, *parts).with_suffix(".png"))


def write_map(job: Job, dry_run: bool) -> str | None:
    """Write one map, or only try to make it. Returns what went wrong."""
    image, mask, target = job
    try:
        gray = read_gray(image)
        edges = sobel_map(gray) if mask is None else boundary_map(gray, read_mask(mask))
    except InputError as error:
        return str(error)
    if not dry_run:
        write_png(target, edges)
    return None


def parallel(
    function: Callable[[Job], str | None], jobs: Sequence[Job], workers: int, name: str
) -> Iterable[str | None]:
    """Results of `function` over `jobs`, in order, with a progress bar."""
    spawn = multiprocessing.get_context("spawn")  # a forked child inherits OpenCV's threads as locks that never open
    with tqdm(total=len(jobs), desc=name, unit="image") as bar, ProcessPoolExecutor(workers, spawn) as pool:
        for result in pool.map(function, jobs, chunksize=16):
            bar.update()
            yield result
