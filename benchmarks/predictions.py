"""What was predicted for every test row, in one small file, for statistics over rows."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from merge_algorithms.errors import UserError

ROWS = "rows"  # what all settings share, in the place of a setting's name
Column = NDArray[Any]


class Predicted(NamedTuple):
    """One task's rows, in the order they were scored in.

    Attributes:
        labels: (n,) class indices, or numbers in the task's unit.
        values: (n,) what was predicted for them; of a language model, whose labels are numbers of
            tokens, (n, 2): their summed loss, and how many were the most probable.
        groups: (n,) numbers; rows with the same one, such as the questions on one policy, are no
            independent witnesses.
    """

    labels: Column
    values: Column
    groups: Column


Predictions = dict[str, Predicted]
"""Task -> its rows."""


def save_predictions(path: Path, predictions: Mapping[str, Predictions]) -> None:
    """Write the predictions of several settings of one model as a compressed .npz.

    Args:
        path: The file.
        predictions: Name of the setting -> task -> rows, the same rows in every setting.
    """
    columns = {
        f"{name if field == 'values' else ROWS}/{task}/{field}": _small(column)
        for name, tasks in predictions.items()
        for task, rows in tasks.items()
        for field, column in rows._asdict().items()
    }
    np.savez_compressed(path, allow_pickle=False, **columns)


def load_predictions(path: Path, name: str) -> Predictions:
    """The predictions of one setting, as `save_predictions` wrote them.

    Raises:
        UserError: No such file, not one of these files, or nothing called `name` in it.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = {
                key: file[key] for key in file.files if key.partition("/")[0] in (name, ROWS)
            }
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} cannot be read as predictions ({' '.join(str(error).split())}): run the"
            " benchmark again"
        ) from error
    tasks = [key.split("/")[1] for key in columns if key.startswith(f"{name}/")]
    if not tasks:
        raise UserError(f"{path} holds no '{name}' predictions: run the benchmark again")
    try:
        return {
            task: Predicted(
                labels=columns[f"{ROWS}/{task}/labels"],
                values=columns[f"{name}/{task}/values"],
                groups=columns[f"{ROWS}/{task}/groups"],
            )
            for task in tasks
        }
    except KeyError as error:
        raise UserError(
            f"{path} lacks {error}, as an earlier version wrote it: run the benchmark again, which"
            " predicts anew with the adapters that are there"
        ) from error


def _small(column: Column) -> Column:
    """Class indices in as few bytes as they need."""
    whole = np.issubdtype(column.dtype, np.integer)
    return column.astype(np.min_scalar_type(int(column.max(initial=0)))) if whole else column
