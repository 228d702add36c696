"""Merging methods as flags: every option of every registered method, from its signature."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from merge_algorithms import Adapter, methods


def add_method_options(parser: ArgumentParser, runtime: Sequence[bool] = (False,)) -> None:
    """One flag per option name; its help says which methods take it and their defaults."""
    found: dict[str, tuple[Any, list[str]]] = {}
    for kind in runtime:
        for method in methods(runtime=kind).values():
            for option in method.options:
                texts = found.setdefault(option.name, (option.type, []))[1]
                default = "required" if option.required else f"default {option.default}"
                text = f"{method.name}: {option.help} ({default})"
                if text not in texts:
                    texts.append(text)
    group = parser.add_argument_group("options of the methods")
    for name, (kind, texts) in found.items():
        group.add_argument(
            f"--{name.replace('_', '-')}", type=kind | None, default=None, help="; ".join(texts)
        )


def method_options(config: Namespace) -> dict[str, Any]:
    """The method options that the user gave."""
    names = {
        option.name
        for runtime in (False, True)
        for method in methods(runtime=runtime).values()
        for option in method.options
    }
    return {name: config[name] for name in sorted(names) if config.get(name) is not None}


def method_summaries(runtime: bool = False) -> str:
    """For a flag's help."""
    return "; ".join(f"{m.name}: {m.summary}" for m in methods(runtime=runtime).values())


def load_adapters(sources: Sequence[str]) -> list[Adapter]:
    """Adapters from PATH or NAME=PATH arguments; Hub ids work as paths do."""
    adapters = []
    for source in sources:
        name, equals, path = source.partition("=")
        if equals and not Path(source).exists():
            adapters.append(Adapter.load(path, name=name))
        else:
            adapters.append(Adapter.load(source))
    return adapters
