"""The one exception a user is meant to read, and the spelling help that goes into it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST = 60  # names that one sentence may list


class UserError(ValueError):
    """Bad input: one sentence that says what was found, where, what was expected, and the remedy.

    The command line prints the sentence without a traceback and exits with status 2.
    """


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the nearest one, or all there are."""
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    listed = (", ".join(names[:MOST]) or "none") + more
    return f"did you mean '{near[0]}'? (known: {listed})" if near else f"known: {listed}"
