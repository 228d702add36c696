"""Training throughput: this package against transformers' Trainer + PEFT padded to 128 tokens.

    python -m benchmarks.performance.training --tasks '[stsb, trec]' --rows 128 --rounds 3

Both train the same adapter (LoRA at the suite's modules) of the same model on the same rows in
batches of the same size, with truncation at 128 tokens, one after the other in every round. Each
trains two epochs: the first warms up, the second, whole, is timed, so that all lengths count alike.
Dropout is off in both, as it is by default here (on, the peer would be slower still): what is left
is how inputs are batched and padded, and the loop around the model.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from benchmarks.assets import resolve_model
from benchmarks.performance.command import run_as_command
from benchmarks.suites import Suite, load_suite
from osrm import resolve_targets
from trainers.backbone import ModelRef, load_tokenizer, pick_dtype
from trainers.data import TaskData
from trainers.settings import RowSettings, SubspaceSettings
from trainers.training import train_task

MAX_LENGTH = 128
BATCH_SIZE = 32
EPOCHS = 2


@dataclass(frozen=True)
class Timing:
    """Seconds that one epoch took, in one round."""

    task: str
    round: int
    rows: int
    ours: float
    peer: float

    @property
    def ratio(self) -> float:
        """How many times as many rows per second as the peer."""
        return self.peer / self.ours


class EpochClock:
    """Seconds between the last optimiser step of the first epoch and that of the second."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def step(self) -> None:
        """To be called after every optimiser step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.steps.append(time.perf_counter())

    def seconds(self, rows: int) -> float:
        """The timed epoch, after checking that as many steps were made as there should be."""
        per_epoch = math.ceil(rows / BATCH_SIZE)
        if len(self.steps) != EPOCHS * per_epoch:
            raise RuntimeError(f"{len(self.steps)} steps, not {EPOCHS} epochs of {per_epoch}")
        return self.steps[-1] - self.steps[per_epoch - 1]


def measure_ours(model: ModelRef, data: TaskData, suite: Suite) -> float:
    """Seconds that an epoch takes with trainers.training.train_task."""
    clock = EpochClock()
    with tempfile.TemporaryDirectory() as output:
        train_task(
            model,
            data,
            Path(output),
            adapter=suite.adapter,
            head=suite.head,
            train=suite.train,
            subspace=SubspaceSettings(init="lora"),
            report=lambda done, total: clock.step(),
        )
    return clock.seconds(len(data.rows("train")))


def measure_peer(model: ModelRef, data: TaskData, suite: Suite) -> float:
    """Seconds that an epoch takes with transformers' Trainer and PEFT."""
    clock = EpochClock()

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()

    set_seed(0)
    regression = data.task.kind == "regression"
    classifier = AutoModelForSequenceClassification.from_pretrained(
        model.path,
        dtype=pick_dtype(),
        num_labels=data.num_labels,
        problem_type="regression" if regression else "single_label_classification",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    adapter = suite.adapter
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=adapter.rank,
        lora_alpha=int(adapter.alpha),
        target_modules=resolve_targets(classifier, adapter.targets),
    )
    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(
            model=get_peft_model(classifier, config),
            args=TrainingArguments(
                output_dir=output,
                num_train_epochs=EPOCHS,
                per_device_train_batch_size=BATCH_SIZE,
                learning_rate=suite.train.learning_rate,
                dataloader_pin_memory=torch.cuda.is_available(),
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=padded_features(data),
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.seconds(len(data.rows("train")))


def padded_features(data: TaskData) -> list[dict[str, Any]]:
    """The training rows as transformers' examples prepare them: tokenised once, all padded."""
    rows = data.rows("train")
    columns = zip(*(row.texts for row in rows), strict=True)
    encoded = data.tokenizer(
        *(list(column) for column in columns),
        truncation=True,
        padding="max_length",
        max_length=MAX_LENGTH,
    )
    return [
        {**{name: values[i] for name, values in encoded.items()}, "labels": row.label}
        for i, row in enumerate(rows)
    ]


def compare(
    tasks: list[str] | None = None, rows: PositiveInt = 128, rounds: PositiveInt = 3
) -> None:
    """Measure both, alternating, and print rows per second and their ratio.

    Args:
        tasks: Tasks of the embedded suite; all by default.
        rows: Training rows of each task.
        rounds: How often each is measured.
    """
    warnings.simplefilter("ignore")  # the libraries' own, about each other
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    suite = load_suite("embedded", tasks=tasks)
    train = replace(suite.train, epochs=EPOCHS, batch_size=BATCH_SIZE, max_length=MAX_LENGTH)
    suite = replace(suite, train=train)
    path = resolve_model(suite.model)
    model, tokenizer = ModelRef(suite.model, path), load_tokenizer(path)
    console = Console()
    timings = []
    for name in suite.tasks:
        data = load_rows(suite, name, rows, tokenizer)
        for number in range(1, rounds + 1):
            ours = measure_ours(model, data, suite)
            peer = measure_peer(model, data, suite)
            timings.append(Timing(name, number, len(data.rows("train")), ours, peer))
            console.print(f"{name}, round {number}: {timings[-1].ratio:.2f} times as fast")
    console.print(as_table(timings))


def load_rows(suite: Suite, task: str, rows: int, tokenizer: PreTrainedTokenizerBase) -> TaskData:
    settings = RowSettings(train=rows, validation=2, test=2)
    return TaskData(suite.tasks[task], tokenizer, suite.train, settings)


def as_table(timings: list[Timing]) -> Table:
    """Every round of every task; below, the rounds over all tasks and the ratio's spread."""
    threads = torch.get_num_threads()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{threads} threads"
    table = Table(
        "task",
        "round",
        "osrm rows/s",
        "Trainer + PEFT rows/s",
        "ratio",
        title=f"Training throughput, batch {BATCH_SIZE}, {device}",
    )
    totals = []
    for number in sorted({timing.round for timing in timings}):
        parts = [timing for timing in timings if timing.round == number]
        sums = (sum(p.rows for p in parts), sum(p.ours for p in parts), sum(p.peer for p in parts))
        totals.append(Timing("all", number, *sums))
    for timing in (*timings, *totals):
        table.add_row(
            timing.task,
            str(timing.round),
            f"{timing.rows / timing.ours:.1f}",
            f"{timing.rows / timing.peer:.1f}",
            f"{timing.ratio:.2f}",
            end_section=timing is timings[-1],
        )
    ratios = [timing.ratio for timing in totals]
    table.caption = (
        f"ratio over all tasks: median {statistics.median(ratios):.2f}"
        f" ({min(ratios):.2f}..{max(ratios):.2f}) of {len(ratios)} rounds"
    )
    return table


if __name__ == "__main__":
    run_as_command(compare)
