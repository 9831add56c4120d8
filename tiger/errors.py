"""Bad input ends in one clear line and exit code 2, work that cannot go on in one line and exit code 1."""

import sys
from collections.abc import Callable, Sequence


class InputError(Exception):
    """Something the user gave is wrong. The message says what, where, and what to do."""


class WorkFailed(Exception):
    """The work cannot go on, though the input was good: a full disk, a diverged training, a lost process.

    The message says what happened, what is safe, and what to do.
    """


def run(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Call an entry point and turn its outcome into an exit code.

    Returns 0 when done, 1 if the work failed for a known reason and 2 on bad input. Any other exception propagates:
    Python prints it and exits with 1.
    """
    try:
        main(argv)
    except (InputError, WorkFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


def name_rows(names: Sequence[str], most: int = 8) -> str:
    """`a.png, b.png and 7 more`."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
