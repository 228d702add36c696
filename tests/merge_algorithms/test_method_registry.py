"""The registry: one typed function becomes a method with checked, documented options."""

from __future__ import annotations

import inspect
import re
import typing
from importlib.metadata import EntryPoint
from typing import Literal

import pytest

from merge_algorithms import UserError, attach, merge, methods, registry


@pytest.fixture
def clean_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    registry._load_third_parties.cache_clear()
    yield
    registry._load_third_parties.cache_clear()


@pytest.fixture
def echo(clean_registry):
    seen = {}

    @registry.register(summary="adds nothing", paper="arXiv 0000.00000")
    def echo(
        tasks,
        *,
        needed: int,
        share: float = 0.5,
        kind: Literal["a", "bb"] = "a",
        loud: bool = False,
        table: dict[str, int] | None = None,
    ):
        """Do nothing.

        Args:
            needed: First line of
                two lines.
            share: A share: with a colon.

                And a second paragraph.
            kind: One of two.
            loud: Aloud.

        Returns:
            nothing: really.
        """
        seen.update(needed=needed, share=share, kind=kind, loud=loud, table=table)
        return {}

    return seen


def test_options_come_from_the_signature_and_docstring(echo):
    method = methods()["echo"]
    assert (method.summary, method.paper) == ("adds nothing", "arXiv 0000.00000")
    needed, share, kind, loud, table = method.options
    assert (needed.name, needed.type, needed.required) == ("needed", int, True)
    assert needed.help == "First line of two lines."
    assert (share.type, share.default, share.required) == (float, 0.5, False)
    assert share.help.startswith("A share: with a colon.")
    assert kind.choices == ("a", "bb")
    assert loud.choices == ()
    assert table.help == ""


def test_ties_as_the_command_line_sees_it():
    options = {o.name: o for o in methods()["ties"].options}
    assert {"density", "scope", "combine"} <= options.keys()
    assert options["density"].default == 0.2
    assert {"global", "tensor"} <= set(options["scope"].choices)
    assert options["density"].help.startswith("Share of each adapter's entries")


@pytest.mark.parametrize("runtime", [False, True])
def test_every_method_tells_its_users_what_they_need_to_know(runtime):
    """Command line, documentation and model cards are made of nothing else."""
    for name, method in methods(runtime).items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
        assert re.fullmatch(r"\S[^\n]{5,88}[^\n.]", method.summary), (name, method.summary)
        assert re.search(r"\d{4}, arXiv \d{4}\.\d{5}", method.paper), (name, method.paper)
        assert method.needs in typing.get_args(registry.Needs), name
        assert not (runtime and method.low_rank), name
        description = re.split(r"\n(?:Args|Returns|Raises):", inspect.getdoc(method.function) or "")
        assert len(description[0]) > 20, name
        for option in method.options:
            assert re.fullmatch(r"\S.{10,}[.)]", option.help), (name, option)
            if not option.required:
                option.check(name, option.default)


def test_values_reach_the_function(echo, random_adapter):
    merged = merge([random_adapter("a")], "echo", needed=3, share=1, table={"x": 1})
    assert echo == {"needed": 3, "share": 1, "kind": "a", "loud": False, "table": {"x": 1}}
    assert merged.options == echo


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "needs the option 'needed'"),
        ({"needed": 1, "shre": 2}, "no option 'shre': did you mean 'share'"),
        ({"needed": 1.5}, "needed=1.5 should be of type int"),
        ({"needed": True}, "needed=True should be of type int"),
        ({"needed": 1, "share": "x"}, "share='x' should be of type float"),
        ({"needed": 1, "share": float("inf")}, "finite"),
        ({"needed": 1, "share": 10**400}, "finite"),
        ({"needed": 1, "kind": "b"}, "kind='b': .*'bb'|known: a, bb"),
        ({"needed": 1, "loud": 1}, "loud=1 should be of type bool"),
    ],
)
def test_bad_options(echo, random_adapter, options, reason):
    with pytest.raises(UserError, match=reason):
        merge([random_adapter("a")], "echo", **options)
    assert not echo


def test_unknown_methods_suggest_the_nearest(random_adapter):
    with pytest.raises(UserError, match="unknown merging method 'tie': did you mean 'ties'"):
        merge([random_adapter("a")], "tie")
    with pytest.raises(UserError, match="'direct' works at run time only: use attach"):
        merge([random_adapter("a")], "direct")


def test_a_name_is_taken_once(echo):
    with pytest.raises(UserError, match="already is a merging method 'echo'"):
        registry.register(name="echo", summary="", paper="")(lambda tasks: {})


@pytest.mark.parametrize("runtime", [False, True])
def test_an_option_is_not_called_as_what_every_merge_takes(clean_registry, runtime):
    def clashing(tasks, *, temperature: float = 1.0, seed: int = 0):
        return {}

    with pytest.raises(UserError, match=r"'clashing' has an option 'seed', .*another name"):
        registry.register(summary="", paper="", runtime=runtime)(clashing)
    assert "clashing" not in methods(runtime)


@pytest.mark.parametrize("taker", [merge, attach])
def test_all_that_every_merge_takes_is_reserved(taker):
    taken = {p.name for p in inspect.signature(taker).parameters.values() if p.name != "options"}
    assert taken <= registry.RESERVED


def test_third_parties_register_by_entry_point(clean_registry, monkeypatch, tmp_path, caplog):
    (tmp_path / "their_methods.py").write_text(
        "from merge_algorithms.registry import register\n"
        "@register(summary='theirs', paper='none')\n"
        "def theirs(tasks): return {}\n"
    )
    (tmp_path / "their_broken_methods.py").write_text("raise RuntimeError('boom')\n")
    monkeypatch.syspath_prepend(tmp_path)
    entries = [
        EntryPoint(name, name, registry.ENTRY_POINTS)
        for name in ("their_broken_methods", "their_methods")
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    assert methods()["theirs"].summary == "theirs"
    assert "their_broken_methods cannot be loaded" in caplog.text
    assert "ties" in methods()
