"""A task's rows as batches: split, subsampled, tokenised once, bucketed by length."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase
from transformers.trainer_pt_utils import LengthGroupedSampler

from merge_algorithms.errors import UserError
from trainers.rows import Row, check_group, class_names, parse, read_split
from trainers.settings import RowSettings, TrainSettings
from trainers.tasks import ROLES, Role, Task
from trainers.texts import Truncation, collate, encode_rows, pack

log = logging.getLogger(__name__)

Part = Literal["train", "validation", "test", "covariance"]


class TaskData(LightningDataModule):
    """One task's data.

    Rows are read and checked at the first use of anything that depends on them, or by
    `setup()`, and tokenised when a dataloader first needs them. Which rows are used is the same in
    every run; torch's global seed, as set last, decides the order of the training batches, so that
    runs over the same rows can differ in their order.

    Batches are dictionaries: input_ids, attention_mask and, if the tokenizer makes them,
    token_type_ids, each (n, longest) int64 padded on the right; labels (n,), int64 class
    indices or float32 numbers in the task's own units. Those of a causal_lm: input_ids,
    attention_mask (packed: position_ids) and labels, as trainers.texts makes them.

    Args:
        task: The task.
        tokenizer: The model's own, by `load_tokenizer`, which looks up how many tokens the model
            reads; one without a padding token gets its end-of-sequence token.
        train: Batch size and maximal length.
        rows: How many rows of each part are used at most.

    Raises:
        UserError: At construction, settings that cannot be; later, bad data (see trainers.rows),
            too few rows, training rows with one class or one number only.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        train: TrainSettings,
        rows: RowSettings,
    ) -> None:
        super().__init__()
        check_settings(task, tokenizer, train, rows)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        # Absolute positions are counted from the left, so padding belongs on the right.
        tokenizer.padding_side = "right"
        self.task = task
        self.tokenizer = tokenizer
        self.train_settings = train
        self.row_settings = rows
        self._tokenised: dict[Part, list[dict[str, Any]]] = {}
        self._order: dict[Part, list[int]] = {}
        self._truncated: dict[Part, Truncation] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read and check all rows, whatever the stage."""
        _ = self._parts

    def rows(self, part: Part) -> list[Row]:
        """The rows in use; those of 'covariance' are the first of 'train'."""
        if part == "covariance":
            return self.rows("train")[: self.row_settings.covariance]
        return self._parts[part]

    def groups(self, part: Literal["validation", "test"]) -> list[int]:
        """The number of every row's group (see `Task.group`), in the order of the dataloader."""
        self._features(part)
        rows, numbers = self.rows(part), dict[str, int]()
        return [numbers.setdefault(rows[i].group, len(numbers)) for i in self._order[part]]

    @cached_property
    def groups_fingerprint(self) -> str:
        """SHA-256 of the groups of the test rows."""
        groups = [row.group for row in self.rows("test")]
        return hashlib.sha256(json.dumps(groups).encode()).hexdigest()

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in index order; none for a regression."""
        return self._loaded[0]

    @property
    def max_length(self) -> int:
        """Longest input in tokens."""
        return self.train_settings.max_length

    def settings_of(self, train: TrainSettings) -> TrainSettings:
        """The settings of a training on these rows: their own batch size and maximal length."""
        own = self.train_settings
        return replace(train, batch_size=own.batch_size, max_length=own.max_length)

    @property
    def num_labels(self) -> int:
        """Width of the head's output: the number of classes, or 1."""
        return len(self.labels) or 1

    @cached_property
    def target_mean(self) -> float:
        """Mean of the training rows' labels, in their units; 0 for a classification."""
        if self.task.kind == "classification":
            return 0.0
        return statistics.fmean(row.label for row in self.rows("train"))

    @cached_property
    def target_std(self) -> float:
        """Standard deviation of the training rows' labels; 1 for a classification."""
        if self.task.kind == "classification":
            return 1.0
        return statistics.pstdev([row.label for row in self.rows("train")])

    def fingerprint(self, part: Part) -> str:
        """SHA-256 of the rows in use, in their order, with the class names."""
        digest = hashlib.sha256(json.dumps(self.labels).encode())
        if self.task.kind == "causal_lm":
            digest.update(f"{self.task.loss} {self.task.packing}".encode())
        for row in self.rows(part):
            digest.update(json.dumps([row.texts, row.label]).encode())
        return digest.hexdigest()

    def inputs_fingerprint(self, part: Part) -> str:
        """SHA-256 of what a model reads of the rows, be their labels what they may."""
        texts = [row.texts for row in self.rows(part)]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()

    def truncation(self, part: Part) -> Truncation:
        """What the maximal length cuts off the rows of a causal_lm."""
        self._features(part)
        return self._truncated.get(part, Truncation())

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of rows of similar length."""
        features = self._features("train")
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        sampler = LengthGroupedSampler(
            self.train_settings.batch_size,
            lengths=[len(feature["input_ids"]) for feature in features],
            generator=generator,
        )
        return self._loader(features, sampler=sampler)

    def ordered_train_dataloader(self) -> DataLoader:
        """The same rows from the longest to the shortest, in the same order every time."""
        return self._loader(sorted(self._features("train"), key=lambda f: -len(f["input_ids"])))

    def val_dataloader(self) -> DataLoader:
        """Validation rows from the longest to the shortest."""
        return self._loader(self._features("validation"))

    def test_dataloader(self) -> DataLoader:
        """Test rows from the longest to the shortest."""
        return self._loader(self._features("test"))

    def covariance_dataloader(self, pad_to_max_length: bool = False) -> DataLoader:
        """The training rows that the covariance is collected from, longest first.

        Args:
            pad_to_max_length: Pad every batch to `max_length`, as the released code of OSRM
                does, whose means run over padding too.
        """
        return self._loader(self._features("covariance"), pad_to_max_length=pad_to_max_length)

    @property
    def _parts(self) -> dict[Role, list[Row]]:
        return self._loaded[1]

    @cached_property
    def _loaded(self) -> tuple[tuple[str, ...], dict[Role, list[Row]]]:
        task = self.task
        tables = {role: read_split(task, role) for role in ROLES if task.splits[role] is not None}
        check_group(task, tables)
        names = class_names(task, tables["train"])
        parts = {role: parse(task, table, names) for role, table in tables.items()}
        where = tables["train"].where
        if "validation" not in parts:
            parts["train"], parts["validation"] = self._carve(parts["train"], where)
        for role in ROLES:
            parts[role] = self._shuffled(parts[role], role)[: getattr(self.row_settings, role)]
            if len(parts[role]) < 2:
                raise UserError(
                    f"task '{task.name}' has {len(parts[role])} rows to {role} on in"
                    f" {tables.get(role, tables['train']).where}: at least 2 are needed"
                )
        if task.kind != "causal_lm" and len({row.label for row in parts["train"]}) < 2:
            label, cap = parts["train"][0].label, self.row_settings.train
            remedy = f"; rows.train is {cap}: raise it, or use null for all"
            raise UserError(
                f"{where} has one label only ({names[int(label)] if names else label}) in the"
                f" {len(parts['train'])} training rows of task '{task.name}': at least two"
                " different ones are needed to learn anything"
                f"{remedy if len(parts['train']) == cap else ''}"
            )
        for role in ("validation", "test"):
            labels = {row.label for row in parts[role]}
            if task.kind == "regression" and len(labels) < 2:
                raise UserError(
                    f"{tables.get(role, tables['train']).where} has one label only ({labels.pop()})"
                    f" in the {len(parts[role])} rows to {role} task '{task.name}' on, with which"
                    " nothing correlates: if its labels are hidden, name another split under splits"
                )
        log.info("%s: %s rows", task.name, {role: len(rows) for role, rows in parts.items()})
        return names, parts

    def _carve(self, rows: list[Row], where: str) -> tuple[list[Row], list[Row]]:
        """Split off validation, whole groups at a time, until it has its share.

        A group that would make it larger than what is left to train on stays there.
        """
        wanted = math.ceil(self.task.validation_fraction * len(rows))
        groups: dict[str, list[Row]] = {}
        for row in rows:
            groups.setdefault(row.group, []).append(row)
        validation: list[Row] = []
        train: list[Row] = []
        for name in self._shuffled(list(groups), "validation"):
            fits = 2 * (len(validation) + len(groups[name])) <= len(rows)
            (validation if len(validation) < wanted and fits else train).extend(groups[name])
        if min(len(validation), len(train)) < 2:
            raise UserError(
                f"{where} has too few rows ({len(rows)} in {len(groups)} groups) to carve a"
                f" validation part for task '{self.task.name}': add rows, raise"
                " validation_fraction, or name a split of its own under splits"
            )
        return train, validation

    def _shuffled(self, items: list[Any], purpose: str) -> list[Any]:
        shuffled = list(items)
        # Another number here would choose other rows, and no run would find its stages again.
        random.Random(f"0 {purpose}").shuffle(shuffled)
        return shuffled

    def _features(self, part: Part) -> list[dict[str, Any]]:
        """Token ids and label of every row; sorted by length unless they are to be sampled."""
        if part not in self._tokenised:
            features = self._encode(part)
            order = list(range(len(features)))
            if part != "train":
                order.sort(key=lambda index: -len(features[index]["input_ids"]))
            self._tokenised[part] = [features[index] for index in order]
            self._order[part] = order
        return self._tokenised[part]

    def _encode(self, part: Part) -> list[dict[str, Any]]:
        rows = self.rows(part)
        if self.task.kind == "causal_lm":
            texts, self._truncated[part] = encode_rows(
                self.task, self.tokenizer, rows, self.max_length
            )
            packed = self.task.packing and part == "train"
            return list(pack(texts, self.max_length) if packed else texts)
        columns = zip(*(row.texts for row in rows), strict=True)
        encoded = self.tokenizer(
            *(list(column) for column in columns),
            truncation=True,
            max_length=self.max_length,
            padding=False,
        )
        return [
            {**{key: values[i] for key, values in encoded.items()}, "labels": row.label}
            for i, row in enumerate(rows)
        ]

    def _loader(
        self,
        features: Sequence[dict[str, Any]],
        sampler: LengthGroupedSampler | None = None,
        pad_to_max_length: bool = False,
    ) -> DataLoader:
        length = self.max_length if pad_to_max_length else None
        if self.task.kind == "causal_lm":
            pad = self.tokenizer.pad_token_id
            collator = partial(collate, pad, length=length)
        else:
            padding = "max_length" if pad_to_max_length else "longest"
            collator = partial(
                _collate,
                DataCollatorWithPadding(self.tokenizer, padding=padding, max_length=length),
            )
        # The rows are tokenised already: worker processes would cost more than they save.
        return DataLoader(
            features,  # type: ignore[arg-type]
            batch_size=self.train_settings.batch_size,
            sampler=sampler,
            collate_fn=collator,
            num_workers=0,
        )


def _collate(collator: DataCollatorWithPadding, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return dict(collator(rows))


def check_settings(
    task: Task, tokenizer: PreTrainedTokenizerBase, train: TrainSettings, rows: RowSettings
) -> None:
    """UserError for settings that no training of the task can have; no row is read."""
    for name, least in (("train", 2), ("validation", 2), ("test", 2), ("covariance", 1)):
        cap = getattr(rows, name)
        if cap is not None and cap < least:
            raise UserError(f"rows.{name} is {cap}: use at least {least}, or null for all rows")
    for name in ("epochs", "batch_size"):
        if getattr(train, name) < 1:
            raise UserError(f"train.{name} is {getattr(train, name)}: use at least 1")
    for name in ("learning_rate", "head_learning_rate", "weight_decay", "max_grad_norm"):
        value = getattr(train, name)
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"train.{name} is {value}: use a finite number of at least 0")
    if not 0 <= train.warmup <= 1:
        raise UserError(f"train.warmup is {train.warmup}: it is a share of the steps, from 0 to 1")
    pair = len(task.text) == 2 and task.kind != "causal_lm"
    # A text predicts nothing before its second token; an answer needs one to follow.
    own = 3 if task.kind == "causal_lm" else len(task.text)
    least = tokenizer.num_special_tokens_to_add(pair=pair) + own
    if train.max_length < least:
        raise UserError(f"train.max_length is {train.max_length}: use at least {least}")
    if train.max_length > tokenizer.model_max_length:
        raise UserError(
            f"train.max_length is {train.max_length}, but the model reads at most"
            f" {tokenizer.model_max_length} tokens: use a smaller one"
        )
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} has neither a padding nor an"
            " end-of-sequence token: batches cannot be padded"
        )


class PooledData(TaskData):
    """The rows of several causal_lm tasks as those of one task, called after all of them.

    Args:
        parts: At least one, of the same tokenizer and settings; each row keeps the prompt of the
            task that it comes from.
    """

    def __init__(self, parts: Sequence[TaskData]) -> None:
        first = parts[0]
        task = replace(first.task, name="-".join(part.task.name for part in parts))
        rows = first.row_settings
        super().__init__(task, first.tokenizer, first.train_settings, rows)
        self.parts = list(parts)
        for data in parts:
            if data.task.packing != first.task.packing:
                raise UserError(
                    f"tasks '{first.task.name}' and '{data.task.name}' are trained together, but"
                    " packing is true of one only: give both the same"
                )

    def fingerprint(self, part: Part) -> str:
        """Of the parts', for each has a prompt and a loss of its own."""
        each = [data.fingerprint(part) for data in self.parts]
        return hashlib.sha256(json.dumps(each).encode()).hexdigest()

    def rows(self, part: Part) -> list[Row]:
        """Those of all parts, one after the other."""
        return [row for data in self.parts for row in data.rows(part)]

    @property
    def labels(self) -> tuple[str, ...]:
        """None: it is no classification."""
        return ()

    def setup(self, stage: str | None = None) -> None:
        """Read and check all rows, whatever the stage."""
        for data in self.parts:
            data.setup(stage)

    def _encode(self, part: Part) -> list[dict[str, Any]]:
        encoded = [
            encode_rows(data.task, self.tokenizer, data.rows(part), self.max_length)
            for data in self.parts
        ]
        self._truncated[part] = sum((cut for _, cut in encoded), Truncation())
        texts = [feature for features, _ in encoded for feature in features]
        packed = self.task.packing and part == "train"
        return list(pack(texts, self.max_length) if packed else texts)
