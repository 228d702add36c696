"""What commands that merge share: methods' options as flags, adapters, coefficients."""

from __future__ import annotations

import functools
import math
import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, Namespace

from benchmarks.assets import public_name
from benchmarks.commands.statistics import STATISTICS, named, readers
from merge_algorithms import Adapter, UserError, methods
from merge_algorithms.bases import base_revision
from merge_algorithms.hub import is_hub_id
from merge_algorithms.registry import Method, Option


def add_method_options(parser: ArgumentParser) -> None:
    """One flag per option name; its help says which methods take it and their defaults.

    A flag takes what any of its methods does; whether it suits the chosen one is checked there.
    Where the command has a flag of that name already, the option's is --method-NAME: call this
    last.
    """
    kinds: defaultdict[str, list[Any]] = defaultdict(list)
    texts: defaultdict[str, list[str]] = defaultdict(list)
    for method, option in _options():
        kinds[option.name].append(option.type)
        default = "required" if option.required else f"default {option.default}"
        text = f"{method.name}: {option.help} ({default})"
        if text not in texts[option.name]:
            texts[option.name].append(text)
    group = parser.add_argument_group("options of the methods")
    for name, types in kinds.items():
        flag = f"--{name.replace('_', '-')}"
        if flag in parser._option_string_actions:
            flag = f"--method-{flag[2:]}"
        text = "; ".join(texts[name])
        kind = _union(types)
        if get_origin(kind) is Sequence:
            (item,) = get_args(kind)
            group.add_argument(flag, nargs="+", type=item, default=None, help=text)
        else:
            group.add_argument(flag, type=None | kind, default=None, help=text)


def option_flag(parser: ArgumentParser, option: str) -> str:
    """The flag that `add_method_options` gave a method's option in this parser."""
    name = option.replace("_", "-")
    own = f"--method-{name}"
    return own if own in parser._option_string_actions else f"--{name}"


def _union(types: Sequence[Any]) -> Any:
    """A type that takes what any of them does; all choices of words in one."""
    unions = (UnionType, Union)
    parts: list[Any] = []
    for kind in types:
        parts += get_args(kind) if get_origin(kind) in unions else [kind]
    words = [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
    rest = [part for part in parts if get_origin(part) is not Literal and part is not type(None)]
    if words:
        rest.append(Literal[tuple(dict.fromkeys(words))])
    # jsonargparse takes the first that fits: 3 fits float and str as well as int.
    return functools.reduce(operator.or_, sorted(rest, key=_breadth))


def _breadth(kind: Any) -> int:
    order = [bool, int, float]
    return order.index(kind) if kind in order else len(order) + (kind is str)


def method_options(config: Namespace) -> dict[str, Any]:
    """The method options that the user gave."""
    given = {}
    for name in sorted({option.name for _, option in _options()}):
        value = config.get(f"method_{name}" if f"method_{name}" in config else name)
        if value is not None:
            given[name] = value
    return given


def _options() -> Iterator[tuple[Method, Option]]:
    """Of every method, in its static form first."""
    for runtime in (False, True):
        for method in methods(runtime=runtime).values():
            for option in method.options:
                yield method, option


def add_merge_arguments(parser: ArgumentParser, scale: str) -> None:
    """--weights, the scale under the given name, statistics files, and the methods' options."""
    parser.add_argument(
        "--weights",
        nargs="+",
        type=float,
        default=None,
        help="one weight per adapter, in their order (default: 1 for each)",
    )
    parser.add_argument(
        scale,
        type=float | dict[str, float] | str,
        default=1.0,
        help="what the merged update is multiplied by: a number, or one by pattern of module names"
        " (the first regular expression that is found in a name decides, 1 if none is), such as"
        r""" '{"layer\.[0-5]\.": 0.5, "value": 0.8}'""",
    )
    for flag, kind in STATISTICS.items():
        parser.add_argument(
            f"--{flag}",
            nargs="+",
            type=str,
            default=[],
            help=f"{kind} files from osrm {kind}, for methods that read them"
            f" ({readers(kind) or 'none'}): the task that a file records is the adapter's name,"
            " NAME=PATH says another",
        )
    add_method_options(parser)


def coefficient(value: float | dict[str, float] | str) -> float | dict[str, float]:
    """A --scale as it was typed or read from YAML; `\\` in a pattern may stand for itself."""
    if isinstance(value, str):
        try:
            content = yaml.safe_load(value.replace("\\", "\\\\"))
        except yaml.YAMLError:
            content = None
    else:
        content = value
    numbers = content.values() if isinstance(content, dict) else [content]
    if not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
        raise UserError(
            f"the scale is {value}: expected a number, or a mapping of patterns to numbers such as"
            """ '{"layer.0": 0.5, "value": 0.8}'"""
        )
    if isinstance(content, dict):
        return {str(pattern): float(number) for pattern, number in content.items()}
    return float(content)


def load_adapters(sources: Sequence[str], base: str | None = None) -> list[Adapter]:
    """Adapters from PATH or NAME=PATH arguments; Hub ids work as paths do.

    Args:
        sources: The arguments.
        base: The base model's name, which becomes theirs, whatever names, fingerprints or revisions
            of it they record; a fingerprint that all agree on stays. A directory is a copy of what
            they name by one id of the Hub, which then stays, too.
    """
    adapters = [Adapter.load(path, name=name) for name, path in map(named, sources)]
    if base is None:
        return adapters
    names = sorted({adapter.base for adapter in adapters if adapter.base})
    copy = Path(base).exists() and len(names) == 1 and is_hub_id(names[0])
    base = names[0] if copy else public_name(base)
    fingerprints = {adapter.base_fingerprint for adapter in adapters} - {None}
    revisions = {adapter.config.get("revision") for adapter in adapters} - {None}
    if all(a.base == base for a in adapters) and max(len(fingerprints), len(revisions)) < 2:
        return adapters
    known = fingerprints.pop() if len(fingerprints) == 1 else None
    revision = base_revision(adapters, base) if len(revisions) == 1 else None
    return [adapter.on_base(base, known, revision) for adapter in adapters]
