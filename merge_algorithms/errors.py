"""The one exception a user is meant to read, and the spelling help that goes into it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: one sentence that says what was found, where, what was expected, and the remedy.

    The command line prints the sentence without a traceback and exits with status 2.
    """


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the nearest one, or all there are."""
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean '{near[0]}'? (known: {', '.join(names)})"
    return f"known: {', '.join(names) or 'none'}"
