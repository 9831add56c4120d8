"""Bad input ends in one clear line and exit code 2."""

import sys
from collections.abc import Callable


class InputError(Exception):
    """Something the user gave is wrong. The message says what, where, and what to do."""


def run(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Call an entry point and turn its outcome into an exit code.

    Returns 0 when done and 2 on bad input. Any other exception propagates: Python prints it and exits with 1.
    """
    try:
        main(argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
