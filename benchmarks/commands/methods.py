"""`osrm methods`: every merging method and its options, from the registry."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich import box
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from benchmarks.commands import eval as eval_command
from benchmarks.commands import merge as merge_command
from benchmarks.commands.merging import option_flag
from benchmarks.commands.statistics import STATISTICS
from merge_algorithms import UserError, methods
from merge_algorithms.card import ARXIV
from merge_algorithms.errors import suggest
from merge_algorithms.registry import Method, Option

_SECTION = re.compile(r"^(Args|Returns|Yields|Raises):$", re.MULTILINE)


def add_arguments(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Flags of `osrm methods`."""
    parser.add_argument(
        "name", nargs="?", type=str | None, default=None, help="explain this method and its options"
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print the table as Markdown, for documents"
    )


def run(config: Namespace, raw: Namespace) -> None:
    """Print the table, or one method."""
    chosen = _all() if config.name is None else _called(config.name)
    if config.markdown:
        print(methods_table(chosen))
    elif config.name is None:
        Console().print(_table(chosen))
    else:
        for method in chosen:
            Console().print(_explained(method))


def methods_table(listed: Iterable[Method] | None = None) -> str:
    """The methods (default: all that are registered) as a Markdown table."""
    lines = [
        "| method | what it does | form | result | needs | options (default) |",
        "|---|---|---|---|---|---|",
    ]
    for method in _all() if listed is None else listed:
        paper = ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", method.paper)
        options = ", ".join(f"`{option.name}` ({_default(option)})" for option in method.options)
        what = f"{method.summary} ({paper})"
        cells = [f"`{method.name}`", what, _form(method), _result(method), method.needs, options]
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines)


def _all() -> list[Method]:
    """Static methods, then run-time ones, each by name."""
    return [*methods().values(), *methods(runtime=True).values()]


def _called(name: str) -> list[Method]:
    """The one or two forms of a method."""
    found = [method for method in _all() if method.name == name]
    if not found:
        known = (method.name for method in _all())
        raise UserError(f"unknown merging method '{name}': {suggest(name, known)}")
    return found


def _table(listed: Sequence[Method]) -> Group:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 1, 0), pad_edge=False, show_edge=False)
    table.add_column("method", no_wrap=True)
    table.add_column("form", no_wrap=True)
    table.add_column("what it does, needs, options (defaults), source")
    for method in listed:
        form = _form(method).split(", ") + ([] if method.runtime else [_result(method)])
        what = Text(method.summary)
        if method.needs:
            what.append(f"\nneeds the {method.needs} of every adapter's data")
        if method.options:
            what.append("\n" + ", ".join(f"{o.name} ({_default(o)})" for o in method.options))
        what.append(f"\n{method.paper}", style="dim")
        table.add_row(Text(method.name, style="bold"), "\n".join(form), what)
    legend = (
        "static: one model, by osrm merge. run time: outputs are combined while the model runs, by"
        " osrm eval --merge; osrm merge writes emr, with a model for each adapter. LoRA: exact at"
        " the sum of the adapters' ranks. dense: a full matrix, truncated when it is saved as an"
        " adapter. seeded: random, decided by --seed. `osrm methods NAME` explains one."
    )
    return Group(table, Text(legend, style="dim"))


def _explained(method: Method) -> Group:
    facts = [_form(method), _result(method)]
    facts += [f"merges exactly {method.adapters} adapters"] if method.adapters else []
    facts += [f"needs the {method.needs} of every adapter's data"] if method.needs else []
    heading = Text(method.name, style="bold").append(f": {method.summary}", style="default")
    parts: list[Any] = [heading, Text(method.paper), Text("; ".join(facts)), Text()]
    parts += [Text(_description(method)), Text()]
    flags = _flags(method)
    for option in method.options:
        flag = Text(flags[option.name], style="bold")
        flag.append(f"  {_type(option)}, {_default(option)}", style="dim")
        parts += [flag, Padding(Text(option.help), (0, 0, 0, 4), expand=False)]
    parts += [Text("\nExample:"), Padding(Text(example(method)), (0, 0, 1, 4), expand=False)]
    return Group(*parts)


def example(method: Method) -> str:
    """A command that uses the method on two adapters, its options at their defaults."""
    words = ["osrm", *("eval A B --merge" if method.runtime else "merge A B --method").split()]
    words.append(method.name)
    for flag, kind in STATISTICS.items():
        if kind == method.needs:
            words += [f"--{flag}", "A.safetensors", "B.safetensors"]
    flags = _flags(method)
    for option in method.options:
        if option.required or option.default is not None:
            value = "VALUE" if option.required else str(option.default)
            words += [flags[option.name], value.lower() if option.type is bool else value]
    return shlex.join(words if method.runtime else [*words, "-o", "merged"])


def _description(method: Method) -> str:
    """The docstring up to its sections; lines that continue a sentence are joined."""
    text = _SECTION.split(inspect.getdoc(method.function) or "")[0].strip()
    return re.sub(r"(?<!\n)\n(?!\s|-|[A-Z]\w*:)", " ", text)


def _flags(method: Method) -> dict[str, str]:
    """Option -> its flag of the command that the method is for, which may have one of that name."""
    parser = ArgumentParser()
    (eval_command if method.runtime else merge_command).add_arguments(parser, [])
    return {option.name: option_flag(parser, option.name) for option in method.options}


def _form(method: Method) -> str:
    return ("run time" if method.runtime else "static") + (", seeded" if method.seeded else "")


def _result(method: Method) -> str:
    if method.runtime:
        return "no new weights"
    return "LoRA" if method.low_rank else "dense"


def _type(option: Option) -> str:
    if option.choices:
        return " or ".join(map(str, option.choices))
    name = option.type.__name__ if isinstance(option.type, type) else str(option.type)
    return re.sub(r"\b(?:\w+\.)+", "", name).replace(" | None", "")


def _default(option: Option) -> str:
    if option.required:
        return "required"
    return "none" if option.default is None else str(option.default)
