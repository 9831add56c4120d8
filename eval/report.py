"""One page that shows what a run gave: report.html, which opens anywhere, and report.json with the same figures.

    python -m eval.report --run runs/quickstart

The run is a folder as quickstart.sh makes it. What has not been measured there is left out of the page.
"""

import argparse
import sys
from pathlib import Path

from eval.page import page
from eval.results import figures_of, read_results
from tiger.errors import InputError, run
from tiger.files import atomic_path, write_json


def main(argv: list[str] | None = None) -> None:
    """Write report.html and report.json into the run's folder."""
    parser = argparse.ArgumentParser(
        "python -m eval.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--run", type=Path, required=True, help="folder with data/, pretrain/, …, as quickstart.sh makes"
    )
    parser.add_argument(
        "--title", default="Tiger: what this run gave", help="heading of the page (default: %(default)s)"
    )
    parser.add_argument("--dry_run", action="store_true", help="read everything and write nothing")
    args = parser.parse_args(argv)
    try:
        results = read_results(args.run)
        figures = figures_of(results)
        text = page(results, figures, args.title)
    except KeyError as error:
        raise InputError(f"--run {args.run}: a result lacks {error}; other code made it: make it anew") from error
    if args.dry_run:
        print(f"{args.run}: the results can be read; nothing written")
        return
    write_json(args.run / "report.json", figures)
    with atomic_path(args.run / "report.html") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"wrote {args.run / 'report.html'} and {args.run / 'report.json'}")


if __name__ == "__main__":
    sys.exit(run(main))
