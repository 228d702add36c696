"""Adapters and a suite's rows brought together, for commands that score."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.assets import packaged_model
from benchmarks.commands.common import resolve
from benchmarks.results import Split
from benchmarks.suites import Suite
from merge_algorithms import Adapter
from merge_algorithms.bases import base_revision, common_base
from merge_algorithms.checkpoint import fetch_base
from merge_algorithms.errors import UserError, suggest

if TYPE_CHECKING:
    from benchmarks.evaluate import Evaluator
    from trainers.backbone import ModelRef
    from trainers.data import TaskData


def with_heads(
    suite: Suite, wanted: Sequence[str] | None, adapters: Sequence[Adapter]
) -> list[Adapter]:
    """The adapters, those that plain PEFT saved of language models with the heads osrm's have.

    Such a head is empty and says which tasks the adapter is scored on: the task that it is named
    after, or, of an adapter alone, such as a merge, all that are wanted.
    """
    language = {name for name, task in suite.tasks.items() if task.kind == "causal_lm"}
    alone = set(wanted or ()) if len(adapters) == 1 else set()
    return [
        adapter
        if adapter.heads
        else replace(adapter, heads={t: {} for t in sorted(({adapter.name} | alone) & language)})
        for adapter in adapters
    ]


def scored_tasks(
    suite: Suite, wanted: Sequence[str] | None, adapters: Sequence[Adapter], flag: str = ""
) -> list[str]:
    """The tasks asked for, or those of the suite that the adapters have heads for.

    Args:
        suite: Has the tasks.
        wanted: Those that were asked for, if any were.
        adapters: As `with_heads` returns them.
        flag: What asks for tasks, where that leaves adapters unscored.

    Raises:
        UserError: None is asked for and an adapter is for none of the suite: it would be left out
            of the scores, and of what they decide, because its name is misspelt.
    """
    if wanted:
        return list(wanted)
    for adapter in adapters:
        if not any(task in suite.tasks for task in adapter.heads):
            raise UserError(_not_scored(suite, adapter, flag))
    return [task for adapter in adapters for task in adapter.heads if task in suite.tasks]


def _not_scored(suite: Suite, adapter: Adapter, flag: str) -> str:
    """Why the adapter is for no task of the suite, and what to do."""
    heads = list(adapter.heads) or [adapter.name]
    if heads[0] in suite.tasks:
        return (
            f"adapter '{adapter.name}' has no head, without which it is for no task of suite"
            f" '{suite.name}': give the directory as training left it"
        )
    listed = "" if heads == [adapter.name] else f", its heads being for {', '.join(heads)}"
    remedies = "choose another suite, or say the adapter's task as TASK=PATH"
    if flag:
        remedies += f", or name the tasks to score with {flag}"
    return (
        f"adapter '{adapter.name}' is for no task of suite '{suite.name}'{listed}:"
        f" {suggest(heads[0], suite.tasks)}; {remedies}"
    )


def check_max_length(given: int, suite: Suite, adapters: Sequence[Adapter]) -> None:
    """UserError for a --train.max_length that nothing would read.

    An adapter's rows are cut to `trained_length`; the flag is for those that record none.
    """
    recorded: dict[str, object] = {}
    for adapter in adapters:
        lengths = {t: (adapter.head_info(t) or {}).get("max_length") for t in adapter.heads}
        if None in lengths.values() or not lengths:
            return
        recorded |= lengths
    for task, length in recorded.items():
        if given not in (length, suite.train.max_length):
            raise UserError(
                f"--train.max_length is {given}, but the adapter of task '{task}' was trained"
                f" with {length}, to which its rows are cut: leave it out"
            )


def trained_length(task: str, adapters: Sequence[Adapter], default: int) -> int:
    """The length in tokens that the task's adapter was trained with, if one of them says so."""
    info = next((a.head_info(task) for a in adapters if task in a.heads), None) or {}
    length: int = info.get("max_length", default)
    return length


def base_model(
    name: str | None, adapters: Sequence[Adapter], default: str | None = None
) -> ModelRef:
    """The base model called `name`, else the one that all adapters record, else the default.

    Raises:
        UserError: The adapters record different models, or were trained on another than this, or
            nothing says which it is.
    """
    recorded = None if name else common_base(adapters)
    chosen = name or recorded or default
    if chosen is None:
        raise UserError(
            "no adapter records its base model (base_model_name_or_path in adapter_config.json):"
            " name it with --base"
        )
    model = _recorded_model(recorded, adapters) if recorded else resolve(chosen)
    for adapter in adapters:
        recorded = adapter.info.get("model_fingerprint", model.fingerprint)
        if recorded != model.fingerprint:
            raise UserError(
                f"adapter '{adapter.name}' was trained on a model with fingerprint {recorded}, but"
                f" {model.path} has {model.fingerprint}: name the base model it was trained on"
            )
    return model


def _recorded_model(name: str, adapters: Sequence[Adapter]) -> ModelRef:
    """The base that adapters record: on the Hub, of the revision that they record with it.

    The oldest models there have no organisation in their names, as gpt2.
    """
    from trainers.backbone import ModelRef

    revision = base_revision(adapters, name)
    here = Path(name).exists() or packaged_model(name) is not None
    if here or (revision is None and "/" in name):
        return resolve(name)
    return ModelRef(name, str(fetch_base(name, revision)))


def load_evaluator(suite: Suite, model: ModelRef, adapters: Sequence[Adapter]) -> Evaluator:
    """The evaluator of the suite's tasks, rows cut to the length that each head was trained on."""
    from benchmarks.evaluate import make_evaluator
    from trainers.backbone import load_tokenizer
    from trainers.data import TaskData

    tokenizer = load_tokenizer(model.path)
    data = {}
    for name, task in suite.tasks.items():
        length = trained_length(name, adapters, suite.train.max_length)
        train = replace(suite.train, max_length=length)
        data[name] = TaskData(task, tokenizer, train, suite.rows)
    return make_evaluator(model, data, adapters)


def truncations(
    data: Mapping[str, TaskData], adapters: Sequence[Adapter], split: Split, setting: str
) -> Iterator[str]:
    """A line for every causal_lm task whose scores are of rows that were cut.

    Args:
        data: Task -> rows that were scored.
        adapters: Say what they were trained with; plain PEFT's do not.
        split: Which rows.
        setting: What to raise.
    """
    for task, rows in data.items():
        lost = rows.truncation(split)
        if lost.rows:
            info = next((a.head_info(task) for a in adapters if task in a.heads), None) or {}
            trained = info.get("max_length") == rows.max_length
            yield (
                f"{task}: {lost.rows} of {lost.of_rows} {split} rows were cut to"
                f" {rows.max_length} tokens ({lost.tokens} tokens lost):"
                f" {'as in its training' if trained else f'raise {setting}'}"
            )
