"""`osrm merge --tune.*`: the merge's free values chosen by validation scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.alignment import Alignment, Head
from benchmarks.commands.scoring import (
    base_model,
    load_evaluator,
    scored_tasks,
    truncations,
    with_heads,
)
from benchmarks.evaluate import Evaluator, Scores, evaluate_fusion
from benchmarks.fusion import Fusion
from benchmarks.progress import TerminalProgress
from benchmarks.results import RUNTIME_SUFFIX, Split, merit
from benchmarks.search import (
    SCALE,
    WEIGHTS,
    Objective,
    Trial,
    Values,
    best,
    evaluation_record,
    search_space,
    tpe,
)
from benchmarks.suites import load_suite
from benchmarks.trial_log import TrialLog, search_key
from merge_algorithms import Adapter, UserError
from merge_algorithms.registry import Method

SHOWN = 10  # trials in the printed table


def tune(
    config: Namespace,
    adapters: Sequence[Adapter],
    method: Method,
    statistics: Mapping[str, Mapping[str, Tensor]] | None,
    fixed: Values,
    proposals: int,
) -> tuple[Values, dict[str, Any], dict[str, Head]]:
    """Search, print the best trials.

    Args:
        config: The arguments of the command.
        adapters: What is merged.
        method: How.
        statistics: What the method reads of the adapters' data.
        fixed: Values that the user gave: 'scale', 'weights', options.
        proposals: How many trials a search by Optuna has.

    Returns:
        The chosen values, the fixed ones among them; what osrm.json and the model card say of the
        search; and the heads, by task, that were aligned with the chosen merge, if asked for.
    """
    settings = config.tune
    parameters: dict[str, list[Any]] = settings.parameters
    for name in parameters or [SCALE]:
        if name in fixed:
            raise UserError(
                f"--{name} is given, but the search is to find it: leave out --{name}, or name"
                " what to search instead with --tune.parameters"
            )
    if config.seed < 0:
        raise UserError(f"--seed is {config.seed}: a search needs one of at least 0")
    space = search_space(parameters, method, len(adapters))
    suite = load_suite(settings.suite, settings.preset, settings.data_dir)
    adapters = with_heads(suite, settings.tasks, adapters)
    # emr for one task writes that adapter's model, and its heads alone: others have no say.
    only = fixed.get("task") if method.runtime else None
    owners = [adapter for adapter in adapters if only in (None, adapter.name)]
    wanted = scored_tasks(suite, settings.tasks, owners, "--tune.tasks")
    suite = load_suite(settings.suite, settings.preset, settings.data_dir, wanted)
    served = [head for owner in owners for head in owner.heads]
    if only is not None and (foreign := [task for task in wanted if task not in served]):
        raise UserError(
            f"--tune.tasks names '{foreign[0]}', but --task {only} writes a model of"
            f" {', '.join(served) or 'no task'} alone: name its tasks only, or leave it out"
        )
    model = base_model(config.base, adapters, suite.model)
    evaluator = load_evaluator(suite, model, adapters)
    if settings.heads:
        evaluator.aligner.check()
    name = method.name + (RUNTIME_SUFFIX if method.runtime else "")
    fuse = partial(Fusion, adapters, name, config.seed, statistics=statistics)
    objective = Objective(evaluator, fuse, fixed=fixed)
    grid: list[float] = settings.coefficients or suite.coefficients
    searched = parameters or {SCALE: grid}
    void: list[str] = []
    key = search_key(
        adapters,
        statistics,
        method=name,
        fixed=fixed,
        seed=config.seed,
        model=model.fingerprint,
        data={
            task: [data.fingerprint("validation"), data.task.metrics, data.max_length]
            for task, data in evaluator.data.items()
        },
    )
    log = TrialLog(trials_file(config), key)
    with TerminalProgress(proposals if parameters else len(grid)) as progress:

        def score(values: Values) -> Trial:
            said = ", ".join(f"{name} {_text(value)}" for name, value in values.items())
            stage = f"trial {progress.done + 1}: {said}"
            report = progress.started(stage)
            known = log.find(values)
            try:
                trial = objective(values, report) if known is None else known
            except UserError as error:
                void.append(str(error))
                raise
            finally:
                progress.finished(stage, reused=known is not None)
            log.add(values, trial)
            return replace(trial, values=fixed | values)

        try:
            if parameters:
                defaults = {option.name: option.default for option in method.options}
                start = defaults | {SCALE: 1.0, WEIGHTS: [1.0] * len(adapters)}
                trials = tpe(score, space, proposals, config.seed, start)
            else:
                trials = [score({SCALE: coefficient}) for coefficient in grid]
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(
                f"{len(log)} finished trials are kept in {log.path}, run again to continue"
            ) from stop
    chosen = best(trials)
    console = Console()
    console.print(_table(list(searched), trials, evaluator))
    if void:
        console.print(f"{len(void)} more could not be merged: {void[-1]}", highlight=False)
    scores, alignment = _finish(objective, chosen, settings.heads, settings.test)
    evaluation = evaluation_record(evaluator, searched, len(trials), scores)
    if settings.heads:
        evaluation["aligned_heads"] = alignment.mus
        moved = ", ".join(f"{task} {mu}" for task, mu in alignment.mus.items() if mu is not None)
        console.print(f"heads aligned, with mu: {moved or 'none'}", highlight=False)
    for split, mean in evaluation["means"].items():
        for line in truncations(evaluator.data, adapters, split, "train.max_length of the suite"):
            console.print(line, highlight=False, soft_wrap=True)
        said = "undefined" if mean is None else f"{mean:.3f}"
        console.print(f"{split} mean of the headline metrics: {said}", highlight=False)
    evaluation = {"suite": suite.name, "preset": suite.preset, **evaluation}
    return chosen.values, evaluation, alignment.heads


def _finish(
    objective: Objective, chosen: Trial, heads: bool, test: bool
) -> tuple[dict[str, Scores], Alignment]:
    """Split -> scores with the chosen values, and the heads they are of.

    Args:
        objective: What was searched.
        chosen: The values, with their validation scores.
        heads: Whether to align the heads with the merge, and score validation again.
        test: Whether to score the test rows.
    """
    evaluator, scale = objective.evaluator, chosen.values.get(SCALE, 1.0)
    scores: dict[str, Scores] = {"validation": chosen.scores}
    alignment = Alignment()
    wanted: dict[Split, bool] = {"validation": heads, "test": test}
    splits = [split for split, asked in wanted.items() if asked]
    if not splits:
        return scores, alignment
    fusion = objective.fusion(chosen.values)
    fusion = fusion.with_aligned_heads() if heads else fusion
    with TerminalProgress(len(splits)) as progress:
        for split in splits:
            stage = f"scoring {split} rows{' with aligned heads' if heads else ''}"
            report = progress.started(stage)
            scores[split] = evaluate_fusion(evaluator, fusion, scale, split, report=report)
            progress.finished(stage, reused=False)
    if heads:
        alignment = evaluator.aligner.align(fusion, scale)
    return scores, alignment


def trials_file(config: Namespace) -> Path:
    """Where the trials are kept until the merge is written: beside it."""
    output: Path = config.output or config.checkpoint
    return output.with_name(f"{output.name}.trials.json")


def _table(names: Sequence[str], trials: Sequence[Trial], evaluator: Evaluator) -> Table:
    """The best trials: the values that were searched, and every task's headline metric."""
    headline = {task: data.task.headline for task, data in evaluator.data.items()}
    table = Table(*names, "mean", *headline, title=f"validation, best of {len(trials)} trials")
    for trial in sorted(trials, key=lambda trial: merit(trial.mean), reverse=True)[:SHOWN]:
        table.add_row(
            *(_text(trial.values[name]) for name in names),
            f"{trial.mean:.3f}",
            *(f"{trial.scores[task][metric]:.3f}" for task, metric in headline.items()),
        )
    return table


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
