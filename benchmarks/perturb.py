"""A knowledge base with other frequencies: how much does the benefit rest on the numbers being right?

    python -m benchmarks.perturb --knowledge thyroid --by 0.3 --seed 0 runs/study/thyroid-0.yaml

Each P(term | subtype) is multiplied by a factor drawn uniformly from 1 - by to 1 + by, and a category whose frequencies
summed to 1, or now exceed it, is brought back to it. Terms, synonyms and everything else stay.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tiger.errors import InputError, run
from tiger.files import atomic_path
from tiger.knowledge import Knowledge, knowledge_path


def perturbed(base: dict[str, Any], by: float, rng: np.random.Generator) -> dict[str, Any]:
    """`base`, as its YAML has it, with every subtype's frequencies changed, in place."""
    for subtype in base["subtypes"].values():
        for category, table in subtype["frequencies"].items():
            whole = sum(table.values())
            changed = {term: value * rng.uniform(1 - by, 1 + by) for term, value in table.items()}
            new = sum(changed.values())
            factor = 1 / new if whole > 0.999 or new > 1 else 1.0  # optional findings may sum to less than 1
            subtype["frequencies"][category] = {term: value * factor for term, value in changed.items()}
    return base


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--knowledge", default="thyroid", help="a name in configs/knowledge or a YAML file")
    parser.add_argument("--by", type=float, default=0.3, help="largest relative change, 0 to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("output", type=Path, help="YAML file to write")
    args = parser.parse_args(argv)
    if not 0 <= args.by < 1:
        raise InputError(f"--by {args.by}: must be at least 0 and below 1")
    Knowledge.load(args.knowledge)  # names the line where the file is wrong
    base = yaml.safe_load(knowledge_path(args.knowledge).read_text(encoding="utf-8"))
    base = perturbed(base, args.by, np.random.default_rng(args.seed))
    with atomic_path(args.output) as temporary:
        text = yaml.safe_dump(base, sort_keys=False, allow_unicode=True, width=120)
        temporary.write_text(text, encoding="utf-8")
        Knowledge.load(temporary)


if __name__ == "__main__":
    sys.exit(run(main))
