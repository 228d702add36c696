"""Scoring tasks with one adapter, a merge, or a run-time merge on one backbone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForSequenceClassification

from benchmarks.alignment import Head, HeadAligner, heads_in_place
from benchmarks.fusion import Coefficient, Fusion
from benchmarks.predictions import Predicted, Predictions
from benchmarks.results import Split
from merge_algorithms import Adapter, UserError
from trainers.backbone import (
    ModelRef,
    compute_in,
    load_backbone,
    load_tokenizer,
    pick_device,
    token_states,
)
from trainers.data import TaskData
from trainers.heads import TaskHead
from trainers.metrics import make_metrics
from trainers.settings import TrainerOptions
from trainers.store import Report
from trainers.tasks import Task

Scores = dict[str, dict[str, float]]
"""Task -> metric -> score."""


def are_language(tasks: Mapping[str, Task]) -> bool:
    """Whether the tasks are a language model's; UserError if only some are."""
    language = [name for name, task in tasks.items() if task.kind == "causal_lm"]
    if language and len(language) < len(tasks):
        raise UserError(
            f"task '{language[0]}' is a causal_lm but others are not: their adapters name the"
            " model's modules differently, take them apart with --tasks"
        )
    return bool(language)


def make_evaluator(
    model: ModelRef,
    data: Mapping[str, TaskData],
    adapters: Sequence[Adapter],
    dtype: torch.dtype = torch.float32,
) -> Evaluator:
    """The evaluator that the tasks and the adapters' heads call for; arguments as there.

    Heads that osrm trained sit on an AutoModel backbone; those of plain PEFT classifiers
    (`modules_to_save`) belong to transformers' AutoModelForSequenceClassification; language models
    predict with their own.
    """
    if are_language({name: rows.task for name, rows in data.items()}):
        from benchmarks.language import LanguageEvaluator  # which builds on this module

        return LanguageEvaluator(model, data, adapters, dtype)
    foreign = [a.name for a in adapters if not all(a.head_info(head) for head in a.heads)]
    if not foreign:
        return Evaluator(model, data, adapters, dtype)
    if len(foreign) == len(adapters):
        return ClassifierEvaluator(model, data, adapters, dtype)
    raise UserError(
        f"adapter '{foreign[0]}' has no osrm.json but others have: adapters of osrm and of plain"
        " PEFT classifiers name the backbone's modules differently; evaluate them apart"
    )


class Evaluator:
    """Scores tasks with whatever updates the backbone currently carries.

    Args:
        model: The base model; loaded once.
        data: Task -> rows.
        adapters: Hold the heads of all tasks, each described in its osrm.json.
        dtype: What the backbone computes in, but for the modules that the adapters change.
    """

    def __init__(
        self,
        model: ModelRef,
        data: Mapping[str, TaskData],
        adapters: Sequence[Adapter],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.device = pick_device()
        self.data = data
        self.backbone = self.load_backbone(model)
        compute_in(self.backbone, dtype, {name for a in adapters for name in a.updates})
        self.backbone.to(self.device)
        self.heads: dict[str, dict[str, Tensor]] = {}
        for adapter in adapters:
            for task, head in adapter.heads.items():
                if task in self.heads:
                    raise UserError(
                        f"two adapters have a head for task '{task}': evaluate one at a time"
                    )
                self.heads[task] = head
        missing = sorted(set(data) - set(self.heads))
        if missing:
            raise UserError(
                f"no adapter has a head for task '{missing[0]}' (heads:"
                f" {', '.join(sorted(self.heads)) or 'none'}): name only tasks that have one, or"
                " pass the adapter that was trained on it"
            )
        self.modules: dict[str, TaskHead] = {}
        self.prepare_heads(adapters)
        self.aligner = HeadAligner(self)

    def load_backbone(self, model: ModelRef) -> nn.Module:
        """The model that updates are applied to, in float32: a merge is not to be rounded away."""
        return load_backbone(model.path, torch.float32)

    def prepare_heads(self, adapters: Sequence[Adapter]) -> None:
        """Build the head modules of all tasks."""
        specs = {task: a.head_info(task) or {} for a in adapters for task in a.heads}
        config: Any = self.backbone.config
        self.modules = {
            task: _task_head(data, specs[task], self.heads[task], config.hidden_size).to(
                self.device
            )
            for task, data in self.data.items()
        }

    def outputs(self, task: str) -> int:
        """Number of outputs of a task's head."""
        return self.modules[task].out.out_features

    def logits(self, task: str, batch: Mapping[str, Tensor]) -> Tensor:
        """(batch, outputs) for one task."""
        logits: Tensor = self.modules[task](
            token_states(self.backbone, batch), batch["attention_mask"]
        )
        return logits

    def rows(self, split: Split, tasks: Sequence[str] | None = None) -> int:
        """Number of rows that one pass of `scores` reads."""
        return sum(len(self.data[task].rows(split)) for task in tasks or self.data)

    def scores(
        self,
        split: Split,
        tasks: Sequence[str] | None = None,
        samples: int = 1,
        advance: Callable[[int], None] = lambda rows: None,
        keep: Predictions | None = None,
    ) -> Scores:
        """Every task's metrics.

        Args:
            split: 'validation' or 'test'.
            tasks: Which tasks; all by default.
            samples: Forward passes whose predictions (class probabilities, or regression
                outputs) are averaged: more than 1 only makes sense under a run-time merge.
            advance: Called with the number of rows after every batch.
            keep: Gets every task's predictions, row by row.
        """
        scores = {}
        for task in tasks or self.data:
            scores[task], predicted = self._score(task, split, samples, advance)
            if keep is not None:
                keep[task] = predicted
        return scores

    @torch.inference_mode()
    def _score(
        self, task: str, split: Split, samples: int, advance: Callable[[int], None]
    ) -> tuple[dict[str, float], Predicted]:
        data = self.data[task]
        labels, values = [], []
        metrics = make_metrics(data.task, self.outputs(task))
        loader = data.val_dataloader() if split == "validation" else data.test_dataloader()
        for batch in loader:
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            drawn = [self.predictions(self.logits(task, batch)) for _ in range(samples)]
            outputs = torch.stack(drawn).mean(dim=0).cpu()
            labels.append(batch["labels"].cpu())
            values.append(outputs.argmax(dim=-1) if outputs.shape[-1] > 1 else outputs[:, 0])
            metrics.update(outputs, labels[-1])
            advance(len(batch["labels"]) * samples)
        groups = np.array(data.groups(split))
        return metrics.compute(), Predicted(
            torch.cat(labels).numpy(), torch.cat(values).numpy(), groups
        )

    @staticmethod
    def predictions(logits: Tensor) -> Tensor:
        """Class probabilities, or a regression's outputs as they are."""
        return logits.softmax(dim=-1) if logits.shape[-1] > 1 else logits


class ClassifierEvaluator(Evaluator):
    """The same for adapters of transformers' sequence classifiers, heads in `modules_to_save`.

    Such an adapter does not say which class is which: the order is taken to be the data's.
    """

    def load_backbone(self, model: ModelRef) -> nn.Module:
        """The classifier; every task's head takes the place of its own."""
        backbone = load_backbone(model.path, torch.float32, AutoModelForSequenceClassification)
        config: Any = backbone.config
        if config.pad_token_id is None:
            config.pad_token_id = load_tokenizer(model.path).pad_token_id
        return backbone

    def prepare_heads(self, adapters: Sequence[Adapter]) -> None:
        """Bring the heads to the device and dtype of what they replace.

        Raises:
            UserError: A head with a tensor that the backbone has none for.
        """
        own = self.backbone.state_dict()
        for task in self.data:
            for name in self.heads[task]:
                if name not in own:
                    raise UserError(
                        f"the head of '{task}' has {name}, which {type(self.backbone).__name__}"
                        " lacks: name the base model that the adapter was trained on"
                    )
            self.heads[task] = {n: tensor.to(own[n]) for n, tensor in self.heads[task].items()}

    def outputs(self, task: str) -> int:
        """Number of outputs that the data asks for; `logits` checks that the head has them."""
        return self.data[task].num_labels

    def logits(self, task: str, batch: Mapping[str, Tensor]) -> Tensor:
        """(batch, outputs) for one task."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        # Tensors that only other tasks' heads replace are the backbone's own, as they now are.
        outputs = functional_call(self.backbone, self.heads[task], kwargs=inputs, tie_weights=False)
        logits: Tensor = outputs.logits
        if logits.shape[-1] != self.outputs(task):
            raise UserError(
                f"the head of '{task}' has {logits.shape[-1]} outputs but its data"
                f" {self.outputs(task)}: name the task it was trained on as TASK=PATH"
            )
        return logits


def _task_head(
    data: TaskData, info: Mapping[str, Any], tensors: Mapping[str, Tensor], width: int
) -> TaskHead:
    task, spec = data.task.name, info.get("head")
    if spec is None:
        raise UserError(
            f"the adapter of task '{task}' has no head, as one of a causal_lm, but the task is a"
            f" {data.task.kind}: evaluate it on the task that it was trained on"
        )
    if list(data.labels) != info["labels"]:
        trained = f"the labels {', '.join(info['labels'])}" if info["labels"] else "a regression"
        found = f"data has {', '.join(data.labels)}" if data.labels else "task is a regression"
        raise UserError(
            f"the head of task '{task}' was trained on {trained} but the {found}: evaluate on data"
            " with the same labels"
        )
    columns, now = info.get("text", []), list(data.task.text)
    if columns != now and sorted(columns) == sorted(now):
        raise UserError(
            f"the head of task '{task}' was trained on the columns {', '.join(columns)} in this"
            f" order, but the data has {', '.join(now)}: evaluate on texts in the same order"
        )
    try:
        return TaskHead.of(spec, tensors, width)
    except RuntimeError as error:
        raise UserError(
            f"the head of task '{task}' does not fit: {str(error).splitlines()[-1].strip()};"
            " expected head.safetensors and osrm.json written by the same training run"
        ) from error


def evaluate_individual(
    evaluator: Evaluator,
    adapters: Sequence[Adapter],
    split: Split,
    report: Report = lambda done, total: None,
    keep: Predictions | None = None,
) -> Scores:
    """Scores of every task of the evaluator under its own adapter alone; `keep` as in `scores`."""
    scores: Scores = {}
    for done, task in enumerate(evaluator.data, 1):
        adapter = next(adapter for adapter in adapters if task in adapter.heads)
        with Fusion([adapter], "task_arithmetic").on(evaluator.backbone, 1.0):
            scores |= evaluator.scores(split, [task], keep=keep)
        report(done, len(evaluator.data))
    return scores


def evaluate_fusion(
    evaluator: Evaluator,
    fusion: Fusion,
    coefficient: Coefficient,
    split: Split,
    samples: int = 1,
    report: Report = lambda done, total: None,
    keep: Predictions | None = None,
) -> Scores:
    """Scores of every task under one merge at one coefficient; told (rows done, rows in all).

    `keep` gets the predictions, row by row.
    """
    done = 0
    total = samples * evaluator.rows(split)
    if fusion.aligned:
        total += evaluator.aligner.rows(fusion, coefficient)

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        report(done, total)

    heads: dict[str, Head] = {}
    if fusion.aligned:
        heads = evaluator.aligner.align(fusion, coefficient, advance).heads
    scores: Scores = {}
    tasks = list(evaluator.data)
    for group in [[task] for task in tasks] if fusion.per_task else [tasks]:
        with (
            fusion.on(evaluator.backbone, coefficient, group[0]),
            heads_in_place(evaluator, heads),
        ):
            scores |= evaluator.scores(split, group, samples, advance, keep)
    return scores


def headline_average(scores: Scores, data: Mapping[str, TaskData]) -> float:
    """Mean over tasks of the headline metric."""
    return statistics.fmean(scores[task][data[task].task.headline] for task in scores)


def scoring_dtype(options: TrainerOptions) -> torch.dtype:
    """What a run's scores are computed in: bfloat16 if its adapters are trained in that."""
    half = "bf16" in str(options.chosen.get("precision", ""))
    return torch.bfloat16 if half else torch.float32


def dtype_inputs(dtype: torch.dtype) -> dict[str, str]:
    """What a stage of scores adds to its inputs for what they are computed in; float32, nothing."""
    return {} if dtype == torch.float32 else {"dtype": str(dtype)}
