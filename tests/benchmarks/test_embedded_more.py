"""The eight further tasks of the suite embedded-16."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks import embedded_more
from benchmarks.assets import pull
from benchmarks.cli import main
from benchmarks.embedded import EMBEDDED_TASKS
from benchmarks.embedded_more import MORE_TASKS
from benchmarks.suites import load_suite

# Rows of train and test. Of boolq 12,697 rows of the source have a label; the others lose a few
# rows that are there twice or contradict each other.
ROWS = {
    "amazon": (2765, 922),
    "editorials": (3789, 1263),
    "valence": (10436, 3479),
    "insult": (745, 248),
    "boolq": (9490, 3207),
    "group": (3136, 1045),
    "follows": (3190, 1056),
    "source": (8033, 2677),
}
PAIRS = {"boolq": ["question", "passage"], "follows": ["context", "sentence"]}
GROUPS = {"boolq": "passage", "follows": "context"}

Splits = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def tasks() -> dict[str, Splits]:
    return {
        task.name: {
            file.stem: [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]
            for file in task.glob("*.jsonl")
        }
        for task in pull("embedded-more-tasks").iterdir()
    }


def test_the_tasks_hold_the_stated_rows(tasks: dict[str, Splits]) -> None:
    assert {n: (len(s["train"]), len(s["test"])) for n, s in tasks.items()} == ROWS
    labelled = Counter(row["label"] for rows in tasks["boolq"].values() for row in rows)
    assert labelled == {"yes": 7907, "no": 4790}


@pytest.mark.parametrize("task", MORE_TASKS)
def test_columns_and_no_text_in_both_splits(tasks: dict[str, Splits], task: str) -> None:
    columns = PAIRS.get(task, ["text"])
    seen = []
    for rows in tasks[task].values():
        assert all(list(row) == [*columns, "label"] for row in rows)
        assert all(row[column].strip() for row in rows for column in columns)
        key = GROUPS.get(task, "text")
        seen.append({" ".join(row[key].casefold().split()) for row in rows})
    assert not seen[0] & seen[1]


def test_labels_of_known_rows(tasks: dict[str, Splits]) -> None:
    labels = {
        (task, *(row[column] for column in PAIRS.get(task, ["text"]))): row["label"]
        for task, splits in tasks.items()
        for rows in splits.values()
        for row in rows
    }
    assert labels["valence", "aardvark"] == 6.26
    assert labels["source", "Are fibroids serious?"] == "health"
    assert labels["group", "Many people live in Ethiopia."] == "race"
    context = "Many people live in Ethiopia."
    said = "The people are very thin and good at distance running."
    assert labels["follows", context, said] == "related"
    assert labels["follows", context, "Cats have sharp claws."] == "unrelated"
    assert labels["amazon", "repost from january 13, 2004 with a better fit title."] == -0.15


def test_the_suite_names_them_after_the_eight() -> None:
    suite = load_suite("embedded-16")
    assert list(suite.tasks) == [*EMBEDDED_TASKS, *MORE_TASKS]
    folder = pull("embedded-more-tasks")
    for name in MORE_TASKS:
        assert Path(suite.tasks[name].data["dir"]).resolve() == (folder / name).resolve()


def test_old_and_new_tasks_train_in_one_job(tmp_path: Path) -> None:
    command = ["bench", "--suite", "embedded-16", "--preset", "smoke", "--tasks", "trec", "follows"]
    rows = ["--rows.train", "16", "--rows.test", "8", "--merges", "ties", "--inits", "lora"]
    assert main([*command, *rows, "--runs-dir", str(tmp_path)]) == 0


def test_prepared_files_belong_to_this_format() -> None:
    """Whoever changes a prepared file changes the scores: raise FORMAT, then this digest."""
    folder = pull("embedded-more-tasks")
    files = sorted(folder.glob("*/*.jsonl"))
    content = b"".join(f.relative_to(folder).as_posix().encode() + f.read_bytes() for f in files)
    assert (embedded_more.FORMAT, hashlib.sha256(content).hexdigest()) == (
        1,
        "9bcdb986e236b02b22d6314650dafe2d1f8dc248821b039c779183896071d13f",
    )
