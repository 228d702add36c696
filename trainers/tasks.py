"""What a task is: where its rows are, which columns are text and label, how it is scored."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from merge_algorithms.errors import UserError, suggest

Kind = Literal["classification", "regression", "causal_lm"]
Loss = Literal["all", "answer"]
Role = Literal["train", "validation", "test"]
SUFFIXES = (".jsonl", ".csv", ".parquet")
ROLES: tuple[Role, ...] = get_args(Role)

METRICS: Mapping[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "causal_lm": ("token_accuracy", "log_likelihood", "perplexity", "perplexity_stderr"),
}
# What a single number for a task may not be: whatever chooses or averages takes more as better.
LESS_IS_BETTER = ("perplexity", "perplexity_stderr")


@dataclass(frozen=True)
class Task:
    """One task: a text or a pair of texts in, a class, a number or further text out.

    Attributes:
        name: Letters, digits, '-' and '_'. 'average' is taken: results use it for the mean of
            all tasks.
        text: The column that holds the text, or the two columns of a pair.
        data: Where the rows are, one of

            - {"dir": path}: path (text, or any os.PathLike) holds <split>.jsonl, <split>.csv or
              <split>.parquet (the first of these that exists);
            - {"files": {split: path}}: jsonl, csv or parquet files;
            - {"hub": {"path": id, "name": config, "splits": {split: name there}}}: a data set of
              the Hugging Face Hub; "name" and "splits" are optional.
        label: The column that holds the label: a class name, a class index into `labels`, a boolean
            if the classes are called true and false, or a number; for a 'causal_lm' the answer, or
            None where the text is all there is.
        kind: 'classification', 'regression', or 'causal_lm': the model's own next-token
            prediction, without a head.
        labels: Names of the classes in index order; None takes those of the training rows.
        metrics: What is measured, the headline first; "a+b" is the mean of a and b. Empty takes
            accuracy, Pearson's correlation, or all there is of a language model.
        splits: Which split plays which role: "train", "validation", "test". Roles left out are
            named as they are called; validation is None (carved from the training rows) unless
            named here, among `files`, or a file of that name in `dir` that plays no other role.
        group: Column whose rows stay together when validation is carved, so that, say, no
            question straddles it, and are drawn together when test scores are compared. None
            keeps rows with equal texts together.
        validation_fraction: Share of the training rows that becomes validation when carved.
        prompt: For a 'causal_lm', what the answer follows: text with {column} for the text
            columns, such as "Question: {question}\nAnswer:". Empty takes one column a line.
        loss: For a 'causal_lm', the tokens that training and scores count: all of them, or those
            of the answer (and the end of it).
        packing: For a 'causal_lm', fill the training sequences up to the maximal length with
            several rows each, none of which sees another.

    Raises:
        UserError: A field that does not fit the others, at construction.
    """

    name: str
    text: tuple[str, ...]
    data: Mapping[str, Any]
    label: str | None = "label"
    kind: Kind = "classification"
    labels: tuple[str, ...] | None = None
    metrics: tuple[str, ...] = ()
    splits: Mapping[str, str | None] = field(default_factory=dict)
    group: str | None = None
    validation_fraction: float = 0.1
    prompt: str = ""
    loss: Loss = "all"
    packing: bool = False

    def __post_init__(self) -> None:
        where = f"task '{self.name}'"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name) or self.name == "average":
            raise UserError(
                f"{where} cannot be called that: use letters, digits, '-' and '_', and not"
                " 'average', which names the mean of all tasks"
            )
        if self.kind not in METRICS:
            raise UserError(
                f"{where} has unknown kind '{self.kind}': {suggest(self.kind, METRICS)}"
            )
        if len(self.text) not in (1, 2):
            raise UserError(
                f"{where} has {len(self.text)} text columns: name one, or two for a pair of texts"
            )
        if self.label in self.text:
            raise UserError(f"{where} uses column '{self.label}' both as text and as label")
        self._check_labels(where)
        self._check_language(where)
        if not self.metrics:
            known = METRICS[self.kind]
            object.__setattr__(self, "metrics", known if self.kind == "causal_lm" else known[:1])
        self._check_metrics(where)
        if not 0 < self.validation_fraction < 1:
            raise UserError(
                f"{where} has validation_fraction {self.validation_fraction}: choose a share of"
                " the training rows between 0 and 1"
            )
        self._check_data(where)
        self._check_splits(where)

    @property
    def headline(self) -> str:
        """The metric that a single number for this task is."""
        return self.metrics[0]

    def _check_labels(self, where: str) -> None:
        if self.labels is None:
            return
        if self.kind != "classification":
            article = "a" if self.kind == "regression" else "of kind"
            raise UserError(f"{where} is {article} {self.kind} but lists labels: leave them out")
        if len(set(self.labels)) != len(self.labels) or len(self.labels) < 2:
            raise UserError(
                f"{where} needs at least two different labels, found: {', '.join(self.labels)}"
            )

    def _check_language(self, where: str) -> None:
        """What a causal_lm needs, and what only it may have."""
        if self.kind != "causal_lm":
            if self.label is None:
                raise UserError(f"{where} has no label column: name the one with its labels")
            if self.prompt or self.loss != "all" or self.packing:
                raise UserError(
                    f"{where} is a {self.kind} but sets prompt, loss or packing: leave them out,"
                    " or make its kind causal_lm"
                )
            return
        if self.label is None and self.loss == "answer":
            raise UserError(
                f"{where} counts the answers alone but has no column with them: name it as label,"
                " or use loss 'all'"
            )
        if not self.prompt:
            lines = [f"{{{column}}}" for column in self.text]
            object.__setattr__(self, "prompt", "\n".join(lines))
        try:
            fields = [field[1:] for field in string.Formatter().parse(self.prompt)]
        except ValueError as error:
            raise UserError(
                f"{where} has a prompt that cannot be read ({error}): write {{column}} for a text"
                " column, {{ and }} for braces"
            ) from error
        for name, form, conversion in fields:
            if form or conversion:
                raise UserError(
                    f"{where} has {{{name}..}} with a format in its prompt: write {{column}} alone,"
                    " and rename columns with ':' or '!' in their names"
                )
            if name is not None and name not in self.text:
                raise UserError(
                    f"{where} has {{{name}}} in its prompt, which is no text column of it:"
                    f" {suggest(str(name), self.text)}"
                )

    def _check_metrics(self, where: str) -> None:
        if len(set(self.metrics)) != len(self.metrics):
            raise UserError(f"{where} names a metric twice: {', '.join(self.metrics)}")
        for metric in self.metrics:
            for part in metric.split("+"):
                if part not in METRICS[self.kind]:
                    raise UserError(
                        f"{where} has unknown metric '{part}' for a {self.kind}:"
                        f" {suggest(part, METRICS[self.kind])}"
                    )
        if any(part in LESS_IS_BETTER for part in self.headline.split("+")):
            raise UserError(
                f"{where} has {self.headline} as its first metric, of which less is better: put"
                " token_accuracy or log_likelihood first, as searches maximise the first"
            )

    def _check_data(self, where: str) -> None:
        known = ("dir", "files", "hub")
        for key in self.data:
            if key not in known:
                raise UserError(f"{where} has unknown data source '{key}': {suggest(key, known)}")
        if len(self.data) != 1:
            raise UserError(f"{where} needs exactly one data source: dir, files or hub")
        if "hub" in self.data:
            hub = self.data["hub"]
            if not isinstance(hub, Mapping) or not isinstance(hub.get("path"), str):
                raise UserError(
                    f"{where} needs the id of its Hub data set: write 'hub: {{path: org/name}}'"
                )
            for key in hub:
                if key not in ("path", "name", "splits"):
                    raise UserError(
                        f"{where} has unknown key '{key}' under data.hub:"
                        f" {suggest(key, ('path', 'name', 'splits'))}"
                    )
        if "files" in self.data and not isinstance(self.data["files"], Mapping):
            raise UserError(
                f"{where} needs a file for each split: write 'files: {{train: .., test: ..}}'"
            )

    def _has_file(self, split: str) -> bool:
        """Whether the directory with the rows, if they are in one, has a file of this split.

        Another path-like object, which may have to be fetched first, is not asked.
        """
        folder = self.data.get("dir")
        return isinstance(folder, str | Path) and any(
            (Path(folder) / f"{split}{suffix}").is_file() for suffix in SUFFIXES
        )

    def _check_splits(self, where: str) -> None:
        for role in self.splits:
            if role not in ROLES:
                raise UserError(f"{where} has unknown split role '{role}': {suggest(role, ROLES)}")
        files = self.data.get("files", {})
        there = "validation" in files or self._has_file("validation")
        taken = "validation" in self.splits.values()
        splits = {
            "train": "train",
            "validation": "validation" if there and not taken else None,
            "test": "test",
            **self.splits,
        }
        named = [name for name in splits.values() if name is not None]
        if splits["train"] is None or splits["test"] is None or len(set(named)) != len(named):
            raise UserError(
                f"{where} needs different splits to train on, to select on and to report on,"
                f" found: {', '.join(f'{role}={name}' for role, name in splits.items())}"
            )
        unread = [name for name in files if name not in named and name not in ROLES]
        if unread:
            raise UserError(
                f"{where} has a file for split '{unread[0]}' that nothing reads:"
                f" {suggest(unread[0], ROLES)}; call it so, or name it under splits"
            )
        used = [files[name] for name in named if name in files]
        if len(set(used)) != len(used):
            raise UserError(f"{where} uses one file for two splits: {', '.join(used)}")
        object.__setattr__(self, "splits", splits)
