"""`osrm methods`, and the flags that other commands derive from the same registry."""

from __future__ import annotations

import re
import shlex
from typing import Any, Literal

import pytest

from benchmarks.cli import build_parser, main
from benchmarks.commands.merging import STATISTICS, method_options
from benchmarks.commands.methods import example, methods_table
from merge_algorithms import methods, registry
from merge_algorithms.registry import Method

EVERY = [*methods().values(), *methods(runtime=True).values()]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["methods", *arguments]) == 0
    return capsys.readouterr().out


def parsed(*arguments: str) -> Any:
    config = build_parser(arguments).parse_args(list(arguments))
    return config[config.subcommand]


def ids(method: Method) -> str:
    return f"{method.name}{'-runtime' * method.runtime}"


def test_the_list_has_every_method_with_its_needs_and_defaults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = printed(capsys)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    words = " ".join(text.split())
    for method in EVERY:
        row = re.search(rf"^{method.name} .*(?:\n .*)*", text, re.MULTILINE)
        assert row, method.name
        assert all(f"{option.name} (" in words for option in method.options)
    assert re.search(r"^ties +static .*\n +dense ", text, re.MULTILINE)
    assert re.search(r"^average +static .*\n +LoRA ", text, re.MULTILINE)
    assert re.search(
        r"^regmean +static .*(?:\n .*)*?needs the covariance of every", text, re.MULTILINE
    )
    assert re.search(r"^mc_dropout +run time .*\n +seeded ", text, re.MULTILINE)
    assert "density (0.2)" in words


@pytest.mark.parametrize("method", EVERY, ids=ids)
def test_one_method_is_explained(capsys: pytest.CaptureFixture[str], method: Method) -> None:
    words = " ".join(printed(capsys, method.name).split())
    assert f"{method.name}: {method.summary}" in words
    assert method.paper in words
    assert "Args:" not in words
    for option in method.options:
        assert f"--{option.name.replace('_', '-')} " in words
        assert " ".join(option.help.split()) in words
        default = "none" if option.default is None else str(option.default)
        assert option.required or default in words
    assert ("needs the" in words) == any(m.needs for m in EVERY if m.name == method.name)


def test_both_forms_of_a_method_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "orthogonal_mc_dropout")
    assert "osrm merge A B --method orthogonal_mc_dropout -o merged" in text
    assert "osrm eval A B --merge orthogonal_mc_dropout" in text


@pytest.mark.parametrize("method", EVERY, ids=ids)
def test_the_example_is_a_command_with_the_defaults(method: Method) -> None:
    config = parsed(*shlex.split(example(method))[1:])
    assert config["merge" if method.runtime else "method"] == method.name
    assert config.adapters == ["A", "B"]
    given = method_options(config)
    typed = {o.name: "VALUE" if o.required else o.default for o in method.options}
    assert method.check_options(given) == typed
    for flag, kind in STATISTICS.items():
        assert bool(config[flag]) == (kind == method.needs)


def test_markdown_is_a_table_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    table = methods_table()
    assert printed(capsys, "--markdown").rstrip("\n") == table
    header, rule, *rows = (re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines())
    assert [cell.strip() for cell in header][:2] == ["method", "what it does"]
    assert set(rule) == {"---"}
    assert [row[0].strip() for row in rows] == [f"`{method.name}`" for method in EVERY]
    assert {len(row) for row in rows} == {len(header)}
    ties = next(line for line in table.splitlines() if line.startswith("| `ties`"))
    assert "[2306.01708](https://arxiv.org/abs/2306.01708)" in ties
    assert "`density` (0.2)" in ties
    only = printed(capsys, "ties", "--markdown").splitlines()
    assert only[2:] == [ties]


def test_unknown_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "tise"]) == 2
    assert "did you mean 'ties'?" in capsys.readouterr().err
    assert main(["methods", "ties", "more"]) == 2


# The flags of `osrm merge` and `osrm eval`


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two methods whose options share names but not types, and one with a flag's own name."""
    methods()
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))

    @registry.register(summary="first", paper="arXiv 0000.00000")
    def first(
        tasks: Any,
        *,
        amount: float = 0.5,
        switch: float = 1.0,
        kind: Literal["a", "b"] = "a",
        text: str = "x",
        several: float = 1.0,
    ) -> dict[str, Any]:
        return {}

    @registry.register(summary="second", paper="arXiv 0000.00000")
    def second(
        tasks: Any,
        *,
        amount: int = 1,
        switch: bool = False,
        kind: Literal["c", "d"] = "c",
        text: float = 1.0,
        several: list[float] | None = None,
    ) -> dict[str, Any]:
        return {}

    for runtime in (False, True):

        @registry.register(summary="third", paper="arXiv 0000.00000", runtime=runtime)
        def third(tasks: Any, *, rank: int = 7, split: str = "x") -> dict[str, Any]:
            return {}


@pytest.mark.parametrize(
    ("method", "option", "typed", "value"),
    [
        ("first", "amount", "3", 3),
        ("first", "amount", "0.3", 0.3),
        ("second", "amount", "3", 3),
        ("first", "switch", "0.5", 0.5),
        ("second", "switch", "true", True),
        ("first", "kind", "b", "b"),
        ("second", "kind", "d", "d"),
        ("first", "text", "words", "words"),
        ("second", "text", "1.5", 1.5),
        ("first", "several", "2", 2),
        ("second", "several", "[1, 2.5]", [1, 2.5]),
    ],
)
def test_a_flag_takes_what_each_of_its_methods_does(
    registered: None, method: str, option: str, typed: str, value: object
) -> None:
    config = parsed("merge", "A", "B", "-o", "out", "--method", method, f"--{option}", typed)
    assert methods()[method].check_options(method_options(config))[option] == value


def test_all_choices_of_a_shared_flag_are_named(
    registered: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", "A", "B", "-o", "out", "--kind", "e"]) == 2
    assert "--kind e is unknown: known: a, b, c, d" in capsys.readouterr().err


@pytest.mark.parametrize("runtime", [False, True])
def test_an_option_with_the_name_of_a_flag_is_explained_by_its_own(
    registered: None, capsys: pytest.CaptureFixture[str], runtime: bool
) -> None:
    """`osrm merge` has --rank, `osrm eval` has --split."""
    method = methods(runtime)["third"]
    flags = ["--rank", "--method-split"] if runtime else ["--method-rank", "--split"]
    words = shlex.split(example(method))
    assert [word for word in words if word.startswith("--")][1:] == flags
    assert method_options(parsed(*words[1:])) == {"rank": 7, "split": "x"}
    text = printed(capsys, "third")
    assert all(f"{flag}  " in text for flag in flags)
