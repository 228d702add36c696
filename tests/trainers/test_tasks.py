from __future__ import annotations

import os
from typing import Any

import pytest

from merge_algorithms.errors import UserError
from trainers.tasks import Task


def make(**changes: Any) -> Task:
    return Task(**{"name": "mood", "text": ("text",), "data": {"dir": "data"}, **changes})


def test_what_is_left_out_takes_the_usual_value() -> None:
    task = make()
    assert task.metrics == ("accuracy",)
    assert task.splits == {"train": "train", "validation": None, "test": "test"}
    assert make(kind="regression").metrics == ("pearson",)


def test_a_validation_file_is_used_without_being_named_twice() -> None:
    files = {"train": "a.csv", "validation": "b.csv", "test": "c.csv"}
    assert make(data={"files": files}).splits["validation"] == "validation"
    carved = make(data={"files": files}, splits={"validation": None})
    assert carved.splits["validation"] is None
    dev = make(data={"files": {"dev": "b.csv", **files}}, splits={"validation": "dev"})
    assert dev.splits["validation"] == "dev"


def test_a_directory_that_is_fetched_when_it_is_used_is_not_fetched_by_naming_it() -> None:
    class Far(os.PathLike[str]):
        def __fspath__(self) -> str:
            pytest.fail("fetched")

    assert make(data={"dir": Far()}).splits["validation"] is None


def test_naming_one_role_leaves_the_others() -> None:
    task = make(splits={"test": "validation"})
    assert task.splits == {"train": "train", "validation": None, "test": "validation"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "'a/b' cannot be called that"),
        ({"name": "average"}, "names the mean of all tasks"),
        ({"kind": "clasification"}, "did you mean 'classification'"),
        ({"text": ()}, "0 text columns"),
        ({"text": ("a", "b", "c")}, "3 text columns"),
        ({"text": ("label",)}, "both as text and as label"),
        ({"labels": ("a",)}, "at least two different labels"),
        ({"labels": ("a", "a")}, "at least two different labels"),
        ({"labels": ("a", "b"), "kind": "regression"}, "is a regression but lists labels"),
        ({"metrics": ("acuracy",)}, "did you mean 'accuracy'"),
        ({"metrics": ("accuracy+pearson",)}, "unknown metric 'pearson' for a classification"),
        ({"metrics": ("accuracy", "accuracy")}, "names a metric twice"),
        ({"validation_fraction": 1.0}, "validation_fraction 1.0"),
        ({"data": {}}, "exactly one data source"),
        ({"data": {"dir": "a", "hub": {"path": "b"}}}, "exactly one data source"),
        ({"data": {"folder": "a"}}, "unknown data source 'folder'"),
        ({"data": {"hub": "org/name"}}, "hub: {path: org/name}"),
        ({"data": {"hub": {"path": "org/name", "nam": "x"}}}, "did you mean 'name'"),
        ({"data": {"files": "a.csv"}}, "needs a file for each split"),
        ({"data": {"files": {"train": "a.csv", "test": "a.csv"}}}, "one file for two splits"),
        (
            {"data": {"files": {"train": "a.csv", "test": "b.csv", "valid": "c.csv"}}},
            "a file for split 'valid' that nothing reads: did you mean 'validation'",
        ),
        ({"splits": {"valid": "dev"}}, "did you mean 'validation'"),
        ({"splits": {"test": None}}, "different splits"),
        ({"splits": {"validation": "test"}}, "different splits"),
    ],
)
def test_a_task_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        make(**changes)
    assert message in str(error.value)
    assert f"task '{changes.get('name', 'mood')}'" in str(error.value)
