"""Time, memory and agreement of eval.metrics beside prdc and torch-fidelity, on random features.

    python -m benchmarks.metrics --count 2000                       # a minute on one core
    python -m benchmarks.metrics --count 30000 --oracles none       # ours alone, in bounded memory

Each function runs in a process of its own, so that its peak memory is its own. `seconds` are wall-clock, `cpu_seconds`
those of all threads, which other work on the machine hardly changes.
"""

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def features(count: int, width: int, seed: int) -> np.ndarray:
    """(count, width) float32 of a correlated Gaussian; the second set is moved and narrower."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(16, width)) / 4
    x = rng.normal(size=(count, 16)) @ mixing + 0.5 * rng.normal(size=(count, width))
    return (x if seed == 0 else 0.9 * x + 0.05).astype(np.float32)


def ours_neighbours(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Density, coverage, precision and recall."""
    from eval.metrics import neighbourhoods

    return neighbourhoods(a, b)


def ours_kid(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """KID of all images at once."""
    from eval.metrics import kid

    return {"kid": kid(a, b)}


def ours_fid(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """FID."""
    from eval.metrics import fid

    return {"fid": fid(a, b)}


def ours_cmmd(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """CMMD, both estimates."""
    from eval.metrics import cmmd_estimates

    return dict(zip(("cmmd", "cmmd_unbiased"), cmmd_estimates(a, b), strict=True))


def theirs_prdc(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """The same as ours_neighbours; holds whole matrices of distances."""
    import prdc

    return {name: float(value) for name, value in prdc.compute_prdc(a, b, nearest_k=5).items()}


def theirs_kid(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """torch-fidelity with one subset that is the whole set."""
    import torch
    from torch_fidelity.metric_kid import kid_features_to_metric

    found = kid_features_to_metric(
        *(torch.from_numpy(x.astype(np.float64)) for x in (a, b)), kid_subsets=2, kid_subset_size=len(a),
        kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, rng_seed=0,
        verbose=False,
    )  # fmt: skip
    return {"kid": found["kernel_inception_distance_mean"]}


def theirs_fid(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """torch-fidelity."""
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    return {"fid": fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]}


OURS = (ours_neighbours, ours_kid, ours_fid, ours_cmmd)
THEIRS = (theirs_prdc, theirs_kid, theirs_fid)


def measured(function: Callable[..., dict[str, float]], count: int, width: int) -> dict[str, Any]:
    """{seconds, cpu_seconds, peak_gb, values} of one function; the peak counts the features and the libraries too."""
    a, b = features(count, width, 0), features(count, width, 1)
    function(a[:20], b[:20])  # what it imports is no part of its time
    started, cpu_started = time.perf_counter(), time.process_time()
    values = function(a, b)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    figures = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_gb": peak}
    return {name: round(value, 2) for name, value in figures.items()} | {"values": values}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser("python -m benchmarks.metrics", description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="images in each set")
    parser.add_argument("--width", type=int, default=2048, help="of the features")
    parser.add_argument("--oracles", choices=("all", "none"), default="all")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for function in (*OURS, *(THEIRS if args.oracles == "all" else ())):
        with context.Pool(1) as pool:
            found = pool.apply(measured, (function, args.count, args.width))
        print(json.dumps({"function": function.__name__, "count": args.count, **found}), flush=True)


if __name__ == "__main__":
    main()
