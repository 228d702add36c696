"""Merging methods by name. A method is one typed function; its options are its keyword arguments.

A static method maps the task vectors to one update per module::

    @register(summary="...", paper="arXiv ...", low_rank=True)
    def average(tasks: TaskVectors, *, option: float = 1.0) -> dict[str, Update]: ...

A run-time method maps them to one function per module, from the module's input (..., d_in) to
what is added to its output (..., d_out). Other packages add methods by naming a module that
registers them in the entry-point group ``osrm.merge_methods``.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Literal

from merge_algorithms.errors import UserError, suggest

logger = logging.getLogger(__name__)

ENTRY_POINTS = "osrm.merge_methods"
Needs = Literal["", "covariance", "fisher"]
# What merge(), attach() and a search for the best values take beside a method's options, by keyword
# like them: an option of such a name would be taken for it. They import this module.
RESERVED = frozenset(
    ["adapters", "method", "weights", "seed", "statistics", "scale", "model", "masks", "samples"]
)


@dataclass(frozen=True)
class Option:
    """One option of a method, derived from a keyword-only parameter.

    Attributes:
        name: Parameter name.
        type: Its annotation, resolved.
        default: Default value; `inspect.Parameter.empty` if it must be given.
        help: Its entry in the docstring's Args section.
    """

    name: str
    type: Any
    default: Any
    help: str

    @property
    def required(self) -> bool:
        """Whether the option has no default."""
        return self.default is inspect.Parameter.empty

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of a Literal option, else empty."""
        return typing.get_args(self.type) if typing.get_origin(self.type) is Literal else ()

    def check(self, method: str, value: Any) -> None:
        """Raise UserError if `value` is not of the option's scalar type or not a choice."""
        what = f"method '{method}': {self.name}={value!r}"
        if self.choices and value not in self.choices:
            raise UserError(f"{what}: {suggest(str(value), map(str, self.choices))}")
        scalars = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}
        expected = scalars.get(self.type)
        if expected is None:
            return
        if not isinstance(value, expected) or (isinstance(value, bool) and self.type is not bool):
            raise UserError(f"{what} should be of type {self.type.__name__}")
        if self.type is float and not _is_finite(value):
            raise UserError(f"{what} should be a finite number")


def _is_finite(number: Any) -> bool:
    """Whether it is a finite float; an integer may be too large to be one."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        name: What users type.
        function: (tasks, *, options) -> {module: update, or run-time function}.
        summary: One line for listings.
        paper: Reference with arXiv number.
        runtime: Works on outputs at run time (`attach`) instead of producing updates (`merge`).
        low_rank: Every update is a LowRank whose rank is at most the sum of the adapters' ranks.
        seeded: Uses randomness, all of it decided by the seed.
        needs: The statistics of each adapter's data that the method reads: 'covariance', the
            second moment (d_in, d_in) of each module's input; 'fisher', the diagonal Fisher
            information (d_out, d_in) of each module's weight; '' for none.
        adapters: How many adapters it merges, exactly; None for any number.
        options: In the order of the signature.
    """

    name: str
    function: Callable[..., dict[str, Any]]
    summary: str
    paper: str
    runtime: bool
    low_rank: bool
    seeded: bool
    needs: Needs
    adapters: int | None
    options: tuple[Option, ...]

    def check_count(self, adapters: int) -> None:
        """Raise UserError if the method does not take so many adapters."""
        if self.adapters is not None and adapters != self.adapters:
            raise UserError(
                f"method '{self.name}' merges exactly {self.adapters} adapters but there are"
                f" {adapters}: give {self.adapters}, or use a method for any number"
            )

    def check_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options with their values; UserError for unknown, missing, or ill-typed ones."""
        known = {option.name: option for option in self.options}
        for name, value in given.items():
            if name not in known:
                what = f"no option '{name}': {suggest(name, known)}" if known else "no options"
                remedy = "" if known else f": leave out '{name}'"
                raise UserError(f"method '{self.name}' has {what}{remedy}")
            known[name].check(self.name, value)
        missing = [
            option.name for option in self.options if option.required and option.name not in given
        ]
        if missing:
            raise UserError(f"method '{self.name}' needs the option '{missing[0]}'")
        return {name: given.get(name, option.default) for name, option in known.items()}


Function = typing.TypeVar("Function", bound=Callable[..., dict[str, Any]])
_registry: dict[tuple[str, bool], Method] = {}


def register(
    *,
    summary: str,
    paper: str,
    name: str | None = None,
    runtime: bool = False,
    low_rank: bool = False,
    seeded: bool = False,
    needs: Needs = "",
    adapters: int | None = None,
) -> Callable[[Function], Function]:
    """Register the decorated function as a method, by default under its own name."""

    def decorate(function: Function) -> Function:
        key = (name or function.__name__, runtime)
        if key in _registry:
            raise UserError(f"there already is a merging method '{key[0]}': register another name")
        options = _options(function)
        if taken := [option.name for option in options if option.name in RESERVED]:
            raise UserError(
                f"the merging method '{key[0]}' has an option '{taken[0]}', which means something"
                " else to merge(), attach() or a search: give the option another name"
            )
        _registry[key] = Method(
            name=key[0],
            function=function,
            summary=summary,
            paper=paper,
            runtime=runtime,
            low_rank=low_rank,
            seeded=seeded,
            needs=needs,
            adapters=adapters,
            options=options,
        )
        return function

    return decorate


def methods(runtime: bool = False) -> dict[str, Method]:
    """All static (or all run-time) methods by name, third parties' included."""
    _load_third_parties()
    return {m.name: m for _, m in sorted(_registry.items()) if m.runtime == runtime}


def get_method(name: str, runtime: bool = False) -> Method:
    """The method called `name`; UserError with the nearest name if there is none."""
    known = methods(runtime)
    if name in known:
        return known[name]
    if name in methods(not runtime):
        remedy = "use attach()" if not runtime else "use merge()"
        kind = "at run time only" if not runtime else "on the weights only"
        raise UserError(f"method '{name}' works {kind}: {remedy}")
    raise UserError(f"unknown merging method '{name}': {suggest(name, known)}")


@functools.cache
def _load_third_parties() -> None:
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception:
            # Somebody else's broken package must not take the built-in methods down.
            logger.warning("merging methods of %s cannot be loaded", entry.value, exc_info=True)


def _options(function: Callable[..., Any]) -> tuple[Option, ...]:
    annotations = typing.get_type_hints(function)
    help_texts = _help_texts(inspect.getdoc(function) or "")
    return tuple(
        Option(p.name, annotations.get(p.name, Any), p.default, help_texts.get(p.name, ""))
        for p in inspect.signature(function).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    )


def _help_texts(docstring: str) -> dict[str, str]:
    """The entries of a Google-style Args section, each joined to one line."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", docstring, re.MULTILINE)
    entries = re.findall(
        r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.MULTILINE
    )
    return {name: " ".join(text.split()) for name, text in entries}
