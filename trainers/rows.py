"""Rows of a task from disk or Hub: read, checked, labels turned into numbers. No tensors here."""

from __future__ import annotations

import csv
import json
import logging
import math
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from merge_algorithms.errors import UserError, suggest
from trainers.tasks import SUFFIXES, Role, Task

log = logging.getLogger(__name__)

_PLAIN = (str, int, float)  # types of labels and answers


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        texts: One text, or the two of a pair; of a causal_lm the prompt and, if it has one, the
            answer.
        label: Class index (int), or the number to predict (float); 0 for a causal_lm.
        group: Rows of equal group stay together when validation is carved.
    """

    texts: tuple[str, ...]
    label: int | float
    group: str


@dataclass(frozen=True)
class Table:
    """A split as it was found: plain dictionaries, and what to call it in a message."""

    where: str
    rows: Sequence[Mapping[str, Any]]

    def check_column(self, column: str, task: Task) -> None:
        """UserError unless a row has the column, which the task reads."""
        if not any(column in row for row in self.rows):
            columns = dict.fromkeys(key for row in self.rows for key in row)
            raise UserError(
                f"{self.where} has no column '{column}' that task '{task.name}' reads; columns"
                f" found: {', '.join(map(str, columns))}"
            )


def read_split(task: Task, role: Role) -> Table:
    """Read the split that plays `role`, unchecked but for its columns.

    Raises:
        UserError: A file that is missing, unreadable or of an unknown type; a missing column;
            a Hub data set or split that cannot be had.
    """
    split = task.splits[role]
    assert split is not None, "the caller carves a validation part that has no split"
    if "hub" in task.data:
        table = _from_hub(task, split)
    else:
        path = _find_file(task, split)
        table = Table(str(path), _read_file(path))
    if not table.rows:
        raise UserError(f"{table.where} holds no rows: task '{task.name}' needs some to {role} on")
    for column in (*task.text, task.label):
        if column is not None:
            table.check_column(column, task)
    return table


def check_group(task: Task, tables: Mapping[Role, Table]) -> None:
    """UserError for a group column that the rows to carve validation from lack, or all rows do.

    Test rows alone may lack it: those of equal texts are then a group.
    """
    if task.group is None:
        return
    carved = "validation" not in tables
    if carved or not any(task.group in row for table in tables.values() for row in table.rows):
        tables["train"].check_column(task.group, task)


def class_names(task: Task, table: Table) -> tuple[str, ...]:
    """The task's class names in index order, those of the training rows if it lists none."""
    if task.kind != "classification":
        return ()
    if task.labels is not None:
        return task.labels
    labels = (_label(task, row) for row in table.rows)
    found = {str(label) for label in labels if not _missing(label)}
    try:
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    except ValueError:
        return tuple(sorted(found))


def parse(task: Task, table: Table, names: tuple[str, ...]) -> list[Row]:
    """Check every row and turn its label into a number.

    Rows of a Hub data set without text or label are left out with a warning, for its user cannot
    mend them; in a file they are an error.

    Raises:
        UserError: Empty rows in a file; a label outside `names`, or not a finite number.
    """
    for number, row in enumerate(table.rows, 1):
        _check_types(task, table, number, row)
    label = "an answer" if task.kind == "causal_lm" else "a label"
    empty = [number for number, row in enumerate(table.rows, 1) if _is_empty(task, row)]
    if empty and "hub" not in task.data:
        raise UserError(
            f"{table.where} has {len(empty)} row(s) with a blank text or without {label}, the"
            f" first is row {empty[0]}: fill them in or remove them"
        )
    if empty:
        log.warning("%s: %d rows without text or label are left out", table.where, len(empty))
    left_out = set(empty)
    encode = _encoder(task, table, names)
    return [
        Row(
            texts=_texts(task, row),
            label=encode(number, _label(task, row)),
            group=_group(task, row),
        )
        for number, row in enumerate(table.rows, 1)
        if number not in left_out
    ]


def _label(task: Task, row: Mapping[str, Any]) -> Any:
    return None if task.label is None else row.get(task.label)


def _group(task: Task, row: Mapping[str, Any]) -> str:
    """What rows have in common that stay together; a row without a group is one with its texts."""
    if task.group is not None and not _missing(row.get(task.group)):
        return str(row[task.group])
    return "\n".join(str(row.get(column)) for column in task.text)


def _check_types(task: Task, table: Table, number: int, row: Mapping[str, Any]) -> None:
    """Refuse what would be read as something else: a list as its spelling, a number as no text."""
    for column in (*task.text, *filter(None, [task.label])):
        value = row.get(column)
        wanted, kinds = ("a text", str) if column in task.text else ("a text or a number", _PLAIN)
        if value is not None and value == value and not isinstance(value, kinds):
            raise UserError(
                f"{table.where} has a value of type {type(value).__name__} in column '{column}'"
                f" of row {number}: expected {wanted}"
            )
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise UserError(
                f"{table.where} has half a character (a lone surrogate, as of an emoji that was cut"
                f" in two) in column '{column}' of row {number}: remove it"
            )


def _texts(task: Task, row: Mapping[str, Any]) -> tuple[str, ...]:
    if task.kind != "causal_lm":
        return tuple(row[column] for column in task.text)
    pieces = string.Formatter().parse(task.prompt)
    prompt = "".join(before + (row[column] if column else "") for before, column, _, _ in pieces)
    return (prompt,) if task.label is None else (prompt, str(_label(task, row)))


def _encoder(task: Task, table: Table, names: tuple[str, ...]) -> Callable[[int, Any], int | float]:
    """Turns (number of the row, its label) into a number."""
    match task.kind:
        case "classification":
            return _Classes(table, names, task)
        case "regression":
            return _Numbers(table)
        case "causal_lm":
            return lambda number, answer: 0


class _Numbers:
    """Labels of a regression."""

    def __init__(self, table: Table) -> None:
        self.where = table.where

    def __call__(self, number: int, value: Any) -> float:
        try:
            label = float(value)
        except (TypeError, ValueError, OverflowError):
            label = math.nan
        if not math.isfinite(label):
            raise UserError(
                f"{self.where} has label {value!r} in row {number}: a regression needs a finite"
                " number in every row"
            )
        return label


class _Classes:
    """Labels of a classification: names, or indices into listed names that look like no index."""

    def __init__(self, table: Table, names: tuple[str, ...], task: Task) -> None:
        self.where = table.where
        self.names = names
        self.index = {name: index for index, name in enumerate(names)}
        numeric = any(name.lstrip("-").isdigit() for name in names)
        self.by_index = task.labels is not None and not numeric

    def __call__(self, number: int, value: Any) -> int:
        if isinstance(value, bool):  # JSON's true may be called True, true or TRUE
            value = next((n for n in self.names if n.lower() == str(value).lower()), value)
        index = self.index.get(str(value))
        if index is None and self.by_index:
            index = self._as_index(value)
        if index is None:
            shown = ", ".join(self.names[:8]) + (", .." if len(self.names) > 8 else "")
            indices = f", or an index from 0 to {len(self.names) - 1}" if self.by_index else ""
            raise UserError(
                f"{self.where} has label {value!r} in row {number}, which is none of the"
                f" {len(self.names)} classes: expected {shown}{indices}"
            )
        return index

    def _as_index(self, value: Any) -> int | None:
        if isinstance(value, bool):  # which class is true, only its name can say
            return None
        try:
            index = float(value)
        except (TypeError, ValueError):
            return None
        return int(index) if index in range(len(self.names)) else None


def _is_empty(task: Task, row: Mapping[str, Any]) -> bool:
    texts = (row.get(column) for column in task.text)
    unlabelled = task.label is not None and _missing(_label(task, row))
    return unlabelled or any(not isinstance(text, str) or not text.strip() for text in texts)


def _missing(value: Any) -> bool:
    """Whether a label is absent: null, blank, or the NaN that tables hold for null."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _find_file(task: Task, split: str) -> Path:
    if "files" in task.data:
        files: Mapping[str, str] = task.data["files"]
        if split not in files:
            raise UserError(
                f"task '{task.name}' has no file for split '{split}': {suggest(split, files)}"
            )
        path = Path(files[split])
    else:
        folder = Path(task.data["dir"])
        candidates = [folder / f"{split}{suffix}" for suffix in SUFFIXES]
        path = next((file for file in candidates if file.is_file()), candidates[0])
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: task '{task.name}' reads its split '{split}' from there"
            f" ({', '.join(SUFFIXES)} can be read)"
        )
    return path


def _read_file(path: Path) -> list[dict[str, Any]]:
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path} is of no type that can be read: use {', '.join(SUFFIXES)}")
    try:
        return reader(path)
    except (OSError, UnicodeDecodeError, csv.Error, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read as {path.suffix}: {error}") from error


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path} line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(
                    f"{path} line {number} is not a JSON object: expected one with the columns"
                    " as keys"
                )
            rows.append(row)
    return rows


def _read_csv(path: Path) -> list[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the 128 KiB that it allows
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)  # or an open quote would swallow what follows
        names = reader.fieldnames or []
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{path} has two columns called '{twice[0]}': rename one")
        rows = []
        for number, row in enumerate(reader, 1):
            if None in row:
                raise UserError(
                    f"{path} row {number} has more fields than the header: put texts that hold"
                    " a comma in double quotes"
                )
            rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows


def _from_hub(task: Task, split: str) -> Table:
    import datasets  # a second to import, and only for the Hub

    hub = task.data["hub"]
    where = f"Hub data set {'/'.join(filter(None, (hub['path'], hub.get('name'))))}"
    try:
        found = datasets.load_dataset(hub["path"], hub.get("name"))
    except Exception as error:  # the Hub client's errors have no common class
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{where} cannot be loaded ({reason[0]}): check its name and the network, or give"
            " the files yourself with --data-dir"
        ) from error
    split = hub.get("splits", {}).get(split, split)
    if split not in found:
        raise UserError(f"{where} has no split '{split}': {suggest(split, found)}")
    return Table(f"{where} split {split}", found[split].to_list())
