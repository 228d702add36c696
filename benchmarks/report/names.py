"""Module names made short enough for tables and figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def without_prefix(modules: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The leading parts that all names share, and {module: the rest}; the last part stays."""
    parts = [module.split(".") for module in modules]
    columns = zip(*(names[:-1] for names in parts), strict=False)
    shared = list(takewhile(lambda column: len(set(column)) == 1, columns))
    prefix = ".".join(column[0] for column in shared)
    return prefix, {
        module: ".".join(names[len(shared) :]) for module, names in zip(modules, parts, strict=True)
    }


def layer_and_kind(module: str) -> tuple[int, str]:
    """The number of a module's layer, its first numeric part, and its name with * for it.

    A module without a number is of layer 0.
    """
    found = _NUMBER.search(module)
    if found is None:
        return 0, module
    return int(found[0]), f"{module[: found.start()]}*{module[found.end() :]}"


def natural_order(module: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in module.split(".")]
