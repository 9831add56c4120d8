"""Do synthetic images give the training images away? Every figure stands beside the same one of held-out real images.

    python -m eval.privacy --real runs/data --fake runs/generated --output privacy.json   # and privacy.html beside it

Held-out images (splits valid and test) are of other patients than the training images, so they are as near to these as
images can be that were not copied; a generator that has seen one of them is refused, as are synthetic and training
images that show the same picture as one of them. Synthetic and held-out images are compared in equal numbers of each
class.

None of this proves privacy: it finds copies in the space of one extractor. Use several, an in-domain one among them.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from tqdm import tqdm

from eval import charts, page, statistics
from eval.features import features_of, load_extractor
from eval.images import add_knowledge, group_of, load_native, matched, patients_of, read_split, refuse_below
from eval.leakage import held_out, refuse_leakage, refuse_shown, unknown_weights
from eval.metrics import Features, nearest
from eval.quality import add_extractor, checkpoint_of
from eval.similarity import phash, ssim
from tiger.conditions import read_gray
from tiger.errors import InputError, run
from tiger.files import atomic_path, write_json
from tiger.manifest import Manifest

NEAR = 5  # % of held-out images that are nearer to the training images than what is called near
MATCH = 4  # bits of 64 in which two perceptual hashes may differ to be called a match
CELLS = 5  # of the training images, for C_T
FEWEST = 20  # synthetic and held-out images in a cell that counts in C_T
COMPONENTS = 64  # of the features, for the cells
RESAMPLES = 500
PAIRS = 24  # on the page
TILE = 160  # px


# ------------------------------------------------------------------------------------------------------------- figures


def authentic(train: Features, x: Features) -> NDArray[np.bool_]:
    """(N,) whether each row of `x` is no mere noisy copy: farther from its nearest training row than any other
    training row is from that one (Alaa et al. 2022, section 4.3)."""
    rows, distances = nearest(x, train)
    return distances > nearest(train, train, skip_self=True)[1][rows]


def cells_of(train: Features, parts: Sequence[Features], seed: int = 0) -> list[NDArray[np.int64]]:
    """For each of `parts`, its rows' cells: k-means of the training rows, on their first principal components."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    components = PCA(min(COMPONENTS, *train.shape), random_state=seed).fit(train)
    means = KMeans(min(CELLS, len(train)), n_init="auto", random_state=seed).fit(components.transform(train))
    return [np.asarray(means.predict(components.transform(part)), np.int64) for part in parts]


def data_copying(
    held: NDArray[np.float64], fake: NDArray[np.float64], held_cells: NDArray[Any], fake_cells: NDArray[Any]
) -> float:
    """C_T of Meehan, Chaudhuri & Dasgupta 2020: well below 0 where synthetic rows are nearer to the training rows than
    held-out ones are (copying), well above where they are farther (underfitting). In each cell it is normal.

    Args:
        held, fake: (N,) distance of each row to the nearest training row.
        held_cells, fake_cells: (N,) cell of each row; cells with fewer than FEWEST of either are left out.
    Returns nan where no cell is left.
    """
    total = weights = 0.0
    for cell in np.unique(held_cells):
        p, q = held[held_cells == cell], fake[fake_cells == cell]
        n, m = len(p), len(q)
        if min(n, m) < FEWEST:
            continue
        u = float(stats.mannwhitneyu(q, p).statistic)  # pairs in which the synthetic row is farther
        z = (u - m * n / 2) / np.sqrt(m * n * (m + n + 1) / 12)
        total += n * float(z)
        weights += n
    return total / weights if weights else float("nan")


def hash_bits(hashes: NDArray[np.uint64], among: NDArray[np.uint64], but: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """(N,) fewest bits in which each hash differs from one of `among`, those at `but` of each left out."""
    found = np.full(len(hashes), 64, np.int64)
    for i, (one, left_out) in enumerate(zip(hashes, but, strict=True)):
        bits = np.bitwise_count(one ^ among).astype(np.int64)
        bits[list(left_out)] = 64
        found[i] = bits.min()
    return found


# -------------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Seen:
    """Images as they look from the training images; (N,) or (N, D) arrays."""

    features: Features
    groups: list[str]  # patient of each
    nearest: NDArray[np.int64]  # the nearest training image, and its distance
    distance: NDArray[np.float64]
    authentic: NDArray[np.bool_]
    bits: NDArray[np.int64]  # perceptual hash: fewest that differ from a training image's
    other_bits: NDArray[np.int64]  # the same without the images whose mask or map it was drawn after

    def __getitem__(self, rows: NDArray[np.int64]) -> "Seen":
        groups = [self.groups[i] for i in rows]
        arrays = {name: value[rows] for name, value in vars(self).items() if name != "groups"}
        return Seen(groups=groups, **arrays)


def see(manifest: Manifest, features: Features, train: Manifest, of_train: Features) -> Seen:
    """Compare every image with the training images."""
    patient_of = patients_of((*train.rows, *manifest.rows))
    rows, distance = nearest(features, of_train)
    hashes, known = hashes_of(manifest), hashes_of(train)
    places = {row.file_name: i for i, row in enumerate(train.rows)}
    sources = [[places[name] for name in row.derived_from if name in places] for row in manifest.rows]
    return Seen(
        features=features,
        groups=[group_of(row, patient_of) for row in manifest.rows],
        nearest=rows,
        distance=distance,
        authentic=authentic(of_train, features),
        bits=hash_bits(hashes, known, [()] * len(hashes)),
        other_bits=hash_bits(hashes, known, sources),
    )


def hashes_of(manifest: Manifest) -> NDArray[np.uint64]:
    """(N,) perceptual hashes."""
    shown = tqdm(manifest.rows, desc="hashes", unit="image", leave=False)
    return np.array([phash(load_native(manifest, row)) for row in shown], np.uint64)


def copying_report(of_train: Features, held: Seen, fake: Seen, seed: int) -> dict[str, Any]:
    """C_T with its interval over patients, and as its floor where nothing leaks: between random halves of the held-out
    patients. The floor is a range about 0 that fewer images leave as it is; only the value of a true difference grows
    with their number."""
    cells = cells_of(of_train, [held.features, fake.features], seed)
    members = [statistics.group_members(side.groups) for side in (held, fake)]

    def value(p: NDArray[np.int64], q: NDArray[np.int64]) -> float:
        return data_copying(held.distance[p], fake.distance[q], cells[0][p], cells[1][q])

    draws, floors = [], []
    for i in range(RESAMPLES):
        rng = np.random.default_rng([seed, i])
        draws.append(value(*(statistics.resample_groups(some, rng) for some in members)))
        halves = np.array_split(rng.permutation(len(members[0])), 2)
        p, q = (np.concatenate([members[0][i] for i in half]) if len(half) else half for half in halves)
        floors.append(data_copying(held.distance[p], held.distance[q], cells[0][p], cells[0][q]))
    low, high = statistics.percentile_interval(np.array(draws))
    floor = dict(zip(("low", "high"), statistics.percentile_interval(np.array(floors)), strict=True))
    every = value(np.arange(len(held.distance)), np.arange(len(fake.distance)))
    return {"value": every, "low": low, "high": high, "floor": floor}


def membership_report(
    train: Features, held: Features, fake: Features, groups: Sequence[str], seed: int
) -> dict[str, Any]:
    """AUC of telling training from held-out images by their distance to the nearest synthetic one (GAN-Leaks, Chen et
    al. 2020, full black box), 0.5 where nothing leaks; and the attack's recall at 1 % and 10 % false alarms.

    Args:
        groups: patient of each training image, then of each held-out one.
    """
    y = np.repeat([1, 0], [len(train), len(held)])
    scores = -np.concatenate([nearest(x, fake)[1] for x in (train, held)])
    value, low, high = statistics.cluster_bootstrap_ci(statistics.auc, y, scores, groups, RESAMPLES, seed)
    recalls = {f"recall_at_fpr_{fpr}": statistics.recall_at_fpr(y, scores, fpr) for fpr in (0.01, 0.1)}
    return {"n": len(y), "value": value, "low": low, "high": high, **recalls}


def measure(train: Manifest, held: Manifest, fake: Manifest, features: Sequence[Features], seed: int) -> dict[str, Any]:
    """Every figure, and the PAIRS synthetic images that are nearest to a training image; features of all three."""
    rng = np.random.default_rng(seed)
    of_train, of_held, of_fake = features
    every_held, every_fake = (see(m, x, train, of_train) for m, x in ((held, of_held), (fake, of_fake)))
    rows = matched(held.rows, fake.rows, rng)
    sides = {"synthetic": every_fake[rows[1]], "held_out": every_held[rows[0]]}
    near = float(np.percentile(sides["held_out"].distance, NEAR))
    members, others = matched(train.rows, held.rows, rng)
    patient_of = patients_of((*train.rows, *held.rows))
    groups = [patient_of[row.file_name] for row in (*(train.rows[i] for i in members), *(held.rows[i] for i in others))]

    def shares(hit: Callable[[Seen], NDArray[np.bool_]]) -> dict[str, Any]:
        return {name: statistics.share_ci(hit(side), side.groups) for name, side in sides.items()}

    return {
        "n": {"train": len(train.rows), "held_out": len(held.rows), "synthetic": len(fake.rows), "each": len(rows[0])},
        "nearest_training": {
            name: {f"{share} %": float(np.percentile(side.distance, share)) for share in (1, 5, 50)}
            for name, side in sides.items()
        },
        "near": shares(lambda side: side.distance < near),
        "authenticity": shares(lambda side: side.authentic),
        "phash_matches": shares(lambda side: side.bits <= MATCH),
        "phash_matches_of_others": shares(lambda side: side.other_bits <= MATCH),
        "c_t": copying_report(of_train, sides["held_out"], sides["synthetic"], seed),
        "membership_auc": membership_report(of_train[members], of_held[others], of_fake, groups, seed),
        "closest": closest(train, fake, every_fake),
    }


def closest(train: Manifest, fake: Manifest, seen: Seen) -> list[dict[str, Any]]:
    """The PAIRS synthetic images that are nearest to a training image."""
    pairs = []
    for i in np.argsort(seen.distance, kind="stable")[:PAIRS]:
        one, other = fake.rows[i], train.rows[seen.nearest[i]]
        size = load_native(fake, one).shape[0]
        pair = {"synthetic": one.file_name, "training": other.file_name, "labels": [one.label, other.label]}
        pair |= {"distance": float(seen.distance[i]), "authentic": bool(seen.authentic[i])}
        square = (read_gray(rows.file(row, "file_name"), size) for rows, row in ((fake, one), (train, other)))
        pair |= {"ssim": ssim(*square)}
        pairs.append(pair | {"made_after_it": other.file_name in one.derived_from})
    return pairs


# ---------------------------------------------------------------------------------------------------------------- page


SHARES = {
    "near": f"nearer to a training image than all but {NEAR} % of held-out ones",
    "authenticity": "authentic: no mere copy of its nearest training image",
    "phash_matches": f"perceptual hash within {MATCH} bits of a training image's",
    "phash_matches_of_others": "the same, but for the images whose mask or map it was drawn after",
}


def html(report: dict[str, Any], train: Manifest, fake: Manifest) -> str:
    """One page without scripts: the figures, and each of the closest pairs."""
    n, copying, leak = report["n"], report["c_t"], report["membership_auc"]
    unseen = f" ({n['unseen']} others, which the generator has not seen, are left out)" if n["unseen"] else ""
    shares = [[title, *(page.cell(report[name][side]) for side in report[name])] for name, title in SHARES.items()]
    tests = [
        [
            "C_T: below 0 for copies, above 0 for what is far from them",
            page.cell(copying),
            page.bracket(copying["floor"]),
        ],
        ["AUC of telling training images by their nearness to synthetic ones", page.cell(leak), "0.5"],
    ]
    figures = page.section(
        "figures",
        "Figures",
        page.table(["share of images", "synthetic", "held-out real"], shares),
        page.table(["", "value", "where nothing leaks"], tests),
        page.not_checked(report),
        f"<pre>{page.escape(report['command'])}</pre>",
    )
    pairs = page.section(
        "pairs",
        "The closest pairs",
        "<p>The synthetic images that are nearest to a training image, left, beside it, right.</p>",
        f'<div class="pairs">{"".join(picture(pair, train, fake) for pair in report["closest"])}</div>',
    )
    style = (Path(page.__file__).parent / "report.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Privacy</title>
<style>
{style}.pairs {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 0 18px; }}
</style>
</head>
<body>
<main>
<header>
<h1>Are training images given away?</h1>
<p class="soft">Features of {page.escape(report["extractor"])}. {n["each"]} synthetic images beside as many held-out
real ones, equally many of each class; {n["train"]} training images{unseen}. A hint, not a proof.</p>
</header>
{figures}
{pairs}
</main>
</body>
</html>
"""


def picture(pair: dict[str, Any], train: Manifest, fake: Manifest) -> str:
    """One synthetic image beside its nearest training image, with what is known of the two."""
    tiles = [
        read_gray(manifest.root / pair[kind], TILE) for manifest, kind in ((fake, "synthetic"), (train, "training"))
    ]
    facts = [f"distance {page.number(pair['distance'])}, SSIM {page.number(pair['ssim'])}"]
    facts += [] if pair["authentic"] else ["not authentic"]
    facts += ["drawn after this one's conditions"] if pair["made_after_it"] else []
    names = [page.escape(pair[kind]) for kind in ("synthetic", "training")]
    alt = f"Synthetic {pair['synthetic']} beside training image {pair['training']}"
    return page.image(charts.montage([tiles]), "<br>".join([*names, *facts]), alt, pixels=True)


# ----------------------------------------------------------------------------------------------------------------- CLI


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m eval.privacy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--real", required=True, help="manifest of real images: train, and valid or test")
    parser.add_argument("--fake", required=True, help="manifest of synthetic images")
    parser.add_argument("--output", required=True, help="JSON file; a page of the same name is written beside it")
    add_extractor(parser)
    add_knowledge(parser)
    parser.add_argument("--seed", type=int, default=0, help="of draws, cells and resamples (default: 0)")
    parser.add_argument("--dry_run", action="store_true", help="check the input and measure nothing")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = _parser().parse_args(argv)
    refuse_below(args, seed=0)
    real = read_split(args.real, None, synthetic=False, knowledge=args.knowledge)
    fake = read_split(args.fake, None, synthetic=True, knowledge=args.knowledge)
    every, held = real.select(split="train"), Manifest(real.path, tuple(held_out(real)))
    checked = refuse_leakage(real, [fake])
    refuse_shown(held, [fake, every])
    members = tuple(row for row in every.rows if row.file_name in checked.seen)
    train = replace(every, rows=members or every.rows)  # the others are no members; all, where nothing is known
    if len(train.rows) < 2 or not held.rows:
        raise InputError(
            f"{real.path}: {len(train.rows)} training and {len(held.rows)} held-out images (valid, test); needed are 2 "
            "and 1: python -m data.prepare split"
        )
    of_train, of_held, of_fake = ({str(row.label) for row in rows} for rows in (train.rows, held.rows, fake.rows))
    if not of_train & of_held or not of_held & of_fake:
        raise InputError(f"{fake.path}: no class is in it and among training and held-out images of {real.path}")
    extractor = load_extractor(args.extractor, args.extractor_weights)
    unchecked = [*checked.unchecked, *unknown_weights(checkpoint_of(args))]
    if args.dry_run:
        counts = f"{len(train.rows)} training, {len(held.rows)} held-out, {len(fake.rows)} synthetic images"
        print(f"{counts}: nothing measured")
        return
    features = [features_of(rows, extractor, args.cache_dir) for rows in (train, held, fake)]
    report = {
        "command": f"python -m eval.privacy {shlex.join(sys.argv[1:] if argv is None else argv)}",
        "extractor": extractor.name,
        "resize": extractor.resize,
        "interval": "95 %, bootstrap over patients; a synthetic image belongs to that of its map; of a share of 0 or "
        "1, which every resample has too, Wilson's with as many trials as patients",
        "unchecked": unchecked,
        **measure(train, held, fake, features, args.seed),
    }
    report["n"] |= {"unseen": len(every.rows) - len(train.rows)}
    write_json(args.output, report)
    with atomic_path(Path(args.output).with_suffix(".html")) as temporary:
        temporary.write_text(html(report, train, fake), encoding="utf-8")
    for name, title in SHARES.items():
        ours, theirs = (report[name][side]["value"] for side in ("synthetic", "held_out"))
        print(f"{title}: {ours:.3f} (held-out {theirs:.3f})")
    for name, figure in (("C_T", report["c_t"]), ("membership AUC", report["membership_auc"])):
        print(f"{name}: {figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]")


if __name__ == "__main__":
    sys.exit(run(main))
