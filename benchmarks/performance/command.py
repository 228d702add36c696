"""A measurement as a command: its arguments as flags, its refusals as one line."""

from __future__ import annotations

import sys
from collections.abc import Callable

from jsonargparse import auto_cli

from merge_algorithms.errors import UserError


def run_as_command(function: Callable[..., object]) -> None:
    """Call it with what the command line says."""
    try:
        auto_cli(function, as_positional=False)
    except UserError as error:
        sys.exit(f"error: {error}")
