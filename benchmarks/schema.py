"""YAML files, and their values checked against type hints: a dataclass is a file's schema too."""

from __future__ import annotations

import math
import reprlib
import types
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import yaml

from merge_algorithms.errors import UserError, suggest

# How wrong values are quoted: a whole file may be one.
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 80


class _Loader(yaml.SafeLoader):
    """Refuses a key that one mapping has twice, of which YAML would silently keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":  # which merges others
                if (key.tag, key.value) in seen:
                    line = key.start_mark.line + 1
                    raise UserError(
                        f"{self.name} has key '{key.value}' a second time in line {line}: keep one"
                    )
                seen.add((key.tag, key.value))
        return node


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, by the rules of yaml.safe_load; None if it is empty.

    Raises:
        UserError: No such file, no YAML, or a mapping that has a key twice.
    """
    try:
        with path.open(encoding="utf-8") as file:
            return yaml.load(file, _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error


def checked(value: Any, hint: Any, path: str, key: str) -> Any:
    """`value` as the type hint wants it, the way YAML gives it.

    Args:
        value: What yaml.safe_load returned, or a part of it.
        hint: A scalar type, list, tuple or mapping of such, a Literal, an optional of these, or
            a dataclass or TypedDict, which stands for a mapping of some of its fields.
        path: The YAML file, for the message.
        key: Dotted key of `value` in it, "" for the whole.

    Returns:
        The value with lists turned into tuples and numbers into floats where the hint says so;
        mappings stay mappings.

    Raises:
        UserError: A wrong type or an unknown key; the message names file, key and remedy.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if is_dataclass(hint) or is_typeddict(hint):
        fields = get_type_hints(hint)
        _mapping(value, path, key)
        for name in value:
            if name not in fields:
                raise UserError(
                    f"{path} has unknown key '{_join(key, name)}': {suggest(str(name), fields)}"
                )
        return {k: checked(v, fields[k], path, _join(key, k)) for k, v in value.items()}
    if origin in (dict, Mapping):
        _mapping(value, path, key)
        return {
            checked(k, arguments[0], path, f"{key} (a key)"): checked(
                v, arguments[1], path, _join(key, k)
            )
            for k, v in value.items()
        }
    if origin in (types.UnionType, Union):
        if value is None and type(None) in arguments:
            return None
        return checked(value, arguments[0], path, key)
    if origin in (list, tuple):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise _wrong(value, "a list", path, key)
        items = [checked(item, arguments[0], path, f"{key}[{i}]") for i, item in enumerate(value)]
        return origin(items)
    if origin is Literal:
        if value not in arguments:
            raise UserError(
                f"{path} has {value!r} at '{key}': {suggest(str(value), map(str, arguments))}"
            )
        return value
    return _scalar(value, hint, path, key)


def _scalar(value: Any, hint: type, path: str, key: str) -> Any:
    if hint is float and not isinstance(value, bool):
        # YAML reads 4e-4 (no dot) as text, which nobody means.
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise _wrong(value, "a finite number", path, key)
        return number
    if type(value) is not hint:
        names = {int: "a whole number", str: "text (in quotes?)", bool: "true or false"}
        raise _wrong(value, names.get(hint, hint.__name__), path, key)
    return value


def _mapping(value: Any, path: str, key: str) -> None:
    if not isinstance(value, Mapping):
        raise _wrong(value, "a mapping of keys to values", path, key)


def _wrong(value: Any, expected: str, path: str, key: str) -> UserError:
    at = f" at '{key}'" if key else ""
    return UserError(f"{path} has {SHORT.repr(value)}{at}: expected {expected}")


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)
