from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from files import write_rows
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from benchmarks.suites import Suite, load_suite
from trainers.backbone import load_tokenizer
from trainers.data import TaskData
from trainers.settings import RowSettings, TrainSettings
from trainers.tasks import Task

Rows = list[dict[str, Any]]


def _word_tokenizer(pad: bool = True) -> PreTrainedTokenizerFast:
    """Numbers 0-999 are words; [CLS] a [SEP] b [SEP] as BERT does."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = [*special, *map(str, range(1000))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="[UNK]",
        eos_token="[SEP]",
        pad_token="[PAD]" if pad else None,
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = list(rows)
    if path.suffix == ".jsonl":
        write_rows(path, rows)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def _examples(count: int, start: int = 0) -> Rows:
    """Texts of 1 to 9 words, every one different; two classes in turn."""
    return [
        {"text": " ".join([str(i)] * (1 + i % 9)), "label": ("no", "yes")[i % 2]}
        for i in range(start, start + count)
    ]


@pytest.fixture(scope="module")
def suite(toy_suite: Path) -> Suite:
    return load_suite(str(toy_suite))


@pytest.fixture(scope="module")
def data(suite: Suite) -> dict[str, TaskData]:
    tokenizer = load_tokenizer(suite.model)
    return {
        name: TaskData(task, tokenizer, suite.train, suite.rows)
        for name, task in suite.tasks.items()
    }


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., TaskData]:
    """A task over files of its own: `train` and `test` rows, changes to the Task."""

    def build(
        train: Rows | None = None,
        test: Rows | None = None,
        caps: RowSettings | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        batch_size: int = 4,
        max_length: int = 16,
        suffix: str = ".jsonl",
        **task: Any,
    ) -> TaskData:
        _write(tmp_path / f"train{suffix}", _examples(100) if train is None else train)
        _write(tmp_path / f"test{suffix}", _examples(20, 500) if test is None else test)
        return TaskData(
            Task(**{"name": "mood", "text": ("text",), "data": {"dir": str(tmp_path)}, **task}),
            tokenizer or _word_tokenizer(),
            TrainSettings(batch_size=batch_size, max_length=max_length),
            caps or RowSettings(),
        )

    return build


@pytest.fixture
def word_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return _word_tokenizer


@pytest.fixture
def write() -> Callable[[Path, Rows], Path]:
    return _write


@pytest.fixture
def examples() -> Callable[..., Rows]:
    return _examples
