from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from files import write_rows

from merge_algorithms.errors import UserError
from trainers.data import TaskData
from trainers.rows import Row
from trainers.settings import RowSettings

Rows = list[dict[str, Any]]
MakeData = Callable[..., TaskData]

GOOD: Rows = [{"text": str(i), "label": ("no", "yes")[i % 2]} for i in range(30)]


def refused(data: TaskData) -> str:
    with pytest.raises(UserError) as error:
        data.setup()
    return str(error.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_type_of_file_gives_the_same_rows(make: MakeData, suffix: str) -> None:
    rows = [{"text": f'{i}, "so" \u00fc', "label": ("no", "yes")[i % 2]} for i in range(20)]
    data = make(train=rows, suffix=suffix, splits={"validation": None})
    assert data.labels == ("no", "yes")
    texts = {row.texts for part in ("train", "validation") for row in data.rows(part)}
    assert texts == {(row["text"],) for row in rows}
    assert all(
        data.labels[int(row.label)] == ("no", "yes")[int(row.texts[0].split(",")[0]) % 2]
        for row in data.rows("train")
    )


def test_class_names_are_those_of_train_sorted_as_numbers_if_they_are(make: MakeData) -> None:
    rows = [{"text": str(i), "label": i % 12} for i in range(60)]
    data = make(train=rows, test=rows[:12])
    assert data.labels == tuple(str(i) for i in range(12))
    assert all(int(row.texts[0]) % 12 == row.label for row in data.rows("test"))
    assert (data.target_mean, data.target_std) == (0.0, 1.0)


def test_150_classes(make: MakeData) -> None:
    rows = [{"text": str(i % 450), "label": f"intent {i % 150:03}"} for i in range(1500)]
    data = make(train=rows, test=rows[:300], suffix=".csv")
    assert data.num_labels == 150
    assert {row.label for row in data.rows("test")} == set(range(150))


@pytest.mark.parametrize("label", [1, "1", 1.0, "yes"])
def test_a_label_may_be_a_name_or_an_index(make: MakeData, label: Any) -> None:
    test = [{"text": "1", "label": label}, {"text": "2", "label": "no"}]
    data = make(test=test, labels=("no", "yes"))
    assert set(data.rows("test")) == {Row(("1",), 1, "1"), Row(("2",), 0, "2")}


@pytest.mark.parametrize("names", [("true", "false"), ("True", "False"), ("FALSE", "TRUE")])
def test_booleans_go_by_the_names_of_the_classes(make: MakeData, names: tuple[str, ...]) -> None:
    rows = [{"text": str(i), "label": i % 2 == 0} for i in range(30)]
    data = make(train=rows, test=rows, labels=names)
    for row in data.rows("test"):
        assert names[int(row.label)].lower() == str(int(row.texts[0]) % 2 == 0).lower()


def test_booleans_are_no_indices(make: MakeData) -> None:
    rows = [{"text": str(i), "label": i % 2 == 0} for i in range(30)]
    assert "label True in row 1" in refused(make(train=rows, labels=("spam", "ham")))


def test_a_csv_may_hold_long_texts(make: MakeData) -> None:
    rows = [{"text": "7 " * 100_000, "label": "no"}, *GOOD]
    data = make(train=rows, suffix=".csv", test=GOOD)
    parts = [*data.rows("train"), *data.rows("validation")]
    assert max(len(row.texts[0]) for row in parts) == 200_000


def test_a_regression_whose_test_labels_are_hidden_is_refused(
    make: MakeData, tmp_path: Path
) -> None:
    rows = [{"text": str(i), "label": i / 4} for i in range(40)]
    message = refused(make(train=rows, test=[{"text": "1", "label": -1}] * 5, kind="regression"))
    assert f"{tmp_path / 'test.jsonl'} has one label only (-1.0) in the 5 rows to test" in message


def test_names_that_look_like_indices_are_names(make: MakeData) -> None:
    rows = [{"text": str(i), "label": 1 + i % 3} for i in range(60)]
    data = make(train=rows, test=rows, labels=("1", "2", "3"))
    assert all(int(row.texts[0]) % 3 == row.label for row in data.rows("train"))
    assert "label 0 in row 1" in refused(
        make(train=rows, test=[{"text": "1", "label": 0}] * 2, labels=("1", "2", "3"))
    )


BAD_TRAIN_ROWS: dict[str, tuple[Rows, dict[str, Any], list[str]]] = {
    "missing column": (
        [{"sentence": "1", "label": "no"}] * 30,
        {},
        ["no column 'text'", "sentence, label"],
    ),
    "missing label column": (
        [{"text": "1", "class": "no"}] * 30,
        {},
        ["no column 'label'", "text, class"],
    ),
    "missing group column": (GOOD, {"group": "question"}, ["no column 'question'"]),
    "blank text": (
        [*GOOD, {"text": " ", "label": "no"}, {"text": "", "label": "no"}],
        {},
        ["2 row(s)", "the first is row 31"],
    ),
    "text that is none": (
        [*GOOD[:3], {"text": 5, "label": "no"}],
        {},
        ["type int in column 'text' of row 4: expected a text"],
    ),
    "label that is a list": (
        [*GOOD[:3], {"text": "5", "label": ["no"]}],
        {},
        ["type list in column 'label' of row 4: expected a text or a number"],
    ),
    "half an emoji": (
        [*GOOD[:3], {"text": "cut \ud83d", "label": "no"}],
        {},
        ["half a character", "in column 'text' of row 4"],
    ),
    "no label": ([{"text": "1", "label": None}, *GOOD], {}, ["1 row(s)", "row 1"]),
    "NaN label": (
        [{"text": "1", "label": float("nan")}, *GOOD],
        {},
        ["1 row(s)", "row 1"],
    ),
    "label out of range": (
        [*GOOD, {"text": "1", "label": 2}],
        {"labels": ("no", "yes")},
        ["label 2 in row 31", "none of the 2 classes", "no, yes, or an index from 0 to 1"],
    ),
    "hidden label": (
        [*GOOD, {"text": "1", "label": -1}],
        {"labels": ("no", "yes")},
        ["label -1 in row 31"],
    ),
    "unknown class": (
        [*GOOD, {"text": "1", "label": "maybe"}],
        {"labels": ("no", "yes")},
        ["label 'maybe' in row 31"],
    ),
    "one class": (
        [{"text": str(i), "label": "no"} for i in range(30)],
        {"labels": ("no", "yes")},
        ["one label only (no)", "27 training rows", "learn anything"],
    ),
    "one number": (
        [{"text": str(i), "label": 2.5} for i in range(30)],
        {"kind": "regression", "test": [{"text": "1", "label": 1.0}] * 2},
        ["one label only (2.5)"],
    ),
    "infinite number": (
        [{"text": "1", "label": 1.0}, {"text": "2", "label": float("inf")}],
        {"kind": "regression"},
        ["label inf in row 2", "finite number"],
    ),
    "huge number": (
        [{"text": "1", "label": 1.0}, {"text": "2", "label": 10**400}],
        {"kind": "regression"},
        ["in row 2", "finite number"],
    ),
    "no number": (GOOD, {"kind": "regression"}, ["label 'no' in row 1"]),
    "no rows": ([], {}, ["holds no rows"]),
    "too few rows to carve": (GOOD[:5], {}, ["too few rows (5", "validation_fraction"]),
    "one group": (
        [{**row, "q": 1} for row in GOOD],
        {"group": "q"},
        ["30 in 1 groups"],
    ),
}


@pytest.mark.parametrize("case", BAD_TRAIN_ROWS)
def test_bad_training_rows_are_refused(make: MakeData, tmp_path: Path, case: str) -> None:
    train, task, messages = BAD_TRAIN_ROWS[case]
    message = refused(make(train=train, **task))
    for part in [str(tmp_path / "train.jsonl"), *messages]:
        assert part in message


def test_a_class_that_the_cap_leaves_out_is_told_from_one_that_is_not_there(make: MakeData) -> None:
    rare = [{"text": str(i), "label": "yes" if i == 150 else "no"} for i in range(300)]
    message = refused(make(train=rare, caps=RowSettings(train=10)))
    assert "has one label only (no) in the 10 training rows" in message
    assert "rows.train is 10: raise it, or use null for all" in message
    alike = [row | {"label": "no"} for row in rare]
    message = refused(make(train=alike, caps=RowSettings(train=6000), labels=("no", "yes")))
    assert "rows.train" not in message


def test_a_group_that_no_split_has_is_refused_beside_a_validation_file_too(
    make: MakeData, tmp_path: Path
) -> None:
    write_rows(tmp_path / "validation.jsonl", GOOD)
    customers = [row | {"customer": i // 2} for i, row in enumerate(GOOD)]
    message = refused(make(test=customers, group="custmer"))
    assert "no column 'custmer' that task 'mood' reads" in message
    assert len(set(make(test=customers, group="customer").groups("test"))) == 15


def test_a_class_that_train_lacks_is_refused_in_test(make: MakeData, tmp_path: Path) -> None:
    message = refused(make(test=[{"text": "1", "label": "maybe"}, {"text": "1", "label": "no"}]))
    assert f"{tmp_path / 'test.jsonl'} has label 'maybe' in row 1" in message


def test_a_test_part_of_one_row_is_refused(make: MakeData, tmp_path: Path) -> None:
    message = refused(make(test=GOOD[:1]))
    assert "1 rows to test on" in message
    assert str(tmp_path / "test.jsonl") in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", b'{"text": "1", "label": 0}\n{"text": \n', "line 2 is not JSON"),
        ("train.jsonl", b'{"text": "1", "label": 0}\n\n[1, 2]\n', "line 3 is not a JSON object"),
        ("train.jsonl", b'{"text": "\xff", "label": 0}\n', "cannot be read as .jsonl"),
        ("train.csv", b"text,label\n1,no\n1, 2,no\n", "row 2 has more fields"),
        ("train.csv", b'label,text\nno,1\nno,"2\nno,3\n', "unexpected end of data"),
        ("train.csv", b"text,label,text\n1,no,2\n", "two columns called 'text'"),
        ("train.csv", b"text,label\n1,no\n2\n", "1 row(s) with a blank text or without a label"),
        ("train.parquet", b"PAR1 and no more", "cannot be read as .parquet"),
        ("train.tsv", b"text\tlabel\n1\tno\n", "of no type that can be read: use .jsonl"),
    ],
)
def test_broken_files_are_refused(
    make: MakeData, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / name).write_bytes(content)
    files = {"train": str(folder / name), "test": str(tmp_path / "test.jsonl")}
    found = refused(make(data={"files": files}))
    assert found.startswith(str(folder / name))
    assert message in found


def test_missing_files_and_unknown_splits_are_refused(make: MakeData, tmp_path: Path) -> None:
    assert f"{tmp_path / 'dev.jsonl'} does not exist" in refused(make(splits={"test": "dev"}))
    files = {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "gone.csv")}
    assert f"{tmp_path / 'gone.csv'} does not exist" in refused(make(data={"files": files}))
    message = refused(make(data={"files": files}, splits={"test": "tset"}))
    assert "no file for split 'tset': did you mean 'test'" in message


class FakeHub:
    """Stands for datasets.load_dataset, which would need a network."""

    def __init__(self, splits: dict[str, Rows] | Exception) -> None:
        self.splits = splits
        self.asked: list[tuple[str, str | None]] = []

    def __call__(self, path: str, name: str | None = None) -> Any:
        import datasets

        self.asked.append((path, name))
        if isinstance(self.splits, Exception):
            raise self.splits
        return datasets.DatasetDict(
            {name: datasets.Dataset.from_list(rows) for name, rows in self.splits.items()}
        )


def hub_task(monkeypatch: pytest.MonkeyPatch, hub: FakeHub, make: MakeData) -> TaskData:
    monkeypatch.setattr("datasets.load_dataset", hub)
    source = {"path": "org/set", "name": "mood", "splits": {"test": "test_matched"}}
    return make(data={"hub": source}, labels=("no", "yes"))


def test_a_hub_data_set_is_read_by_its_own_split_names(
    monkeypatch: pytest.MonkeyPatch, make: MakeData, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": str(i), "label": i % 2} for i in range(40)]
    hub = FakeHub({"train": [*rows, {"text": "", "label": 1}], "test_matched": rows[:6]})
    with caplog.at_level(logging.WARNING):
        data = hub_task(monkeypatch, hub, make)
        assert len(data.rows("train")) + len(data.rows("validation")) == 40
    assert len(data.rows("test")) == 6
    assert set(hub.asked) == {("org/set", "mood")}
    assert "1 rows without text or label are left out" in caplog.text


def test_a_hub_that_cannot_be_reached_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, make: MakeData
) -> None:
    message = refused(hub_task(monkeypatch, FakeHub(ConnectionError("offline\nmore")), make))
    assert "Hub data set org/set/mood cannot be loaded (offline)" in message
    assert "--data-dir" in message
    rows = [{"text": str(i), "label": i % 2} for i in range(40)]
    message = refused(hub_task(monkeypatch, FakeHub({"train": rows, "test_match": rows}), make))
    assert "no split 'test_matched': did you mean 'test_match'" in message


def test_classes_have_one_order_whatever_their_spelling(make: MakeData) -> None:
    """As sets have another order in every process."""
    labels = ["1", "01", "+1", "2"]
    rows = [{"text": str(i), "label": labels[i % 4]} for i in range(40)]
    assert make(train=rows, test=rows[:8]).labels == ("+1", "01", "1", "2")
