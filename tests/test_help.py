"""Help texts."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_examples_of_several_lines_are_shown_as_they_are_written() -> None:
    """A backslash at the end of a line is left out of a string that is not raw, and joins the two lines."""
    joined = []
    for path in (path for part in ("tiger", "data", "eval", "benchmarks") for path in (ROOT / part).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        shown = ast.get_docstring(ast.parse(source), clean=False)
        written = source.partition('"""')[2].partition('"""')[0]
        if shown is not None and shown.count("\n") < written.count("\n"):
            joined.append(str(path.relative_to(ROOT)))
    assert joined == []
