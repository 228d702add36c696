"""Texts as token ids for a causal language model: which tokens count, truncation, packing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from merge_algorithms import UserError
from trainers.rows import Row
from trainers.tasks import Task

IGNORED = -100
Feature = dict[str, list[int]]


@dataclass(frozen=True)
class Truncation:
    """What the maximal length cost.

    Attributes:
        rows: Rows that were longer.
        tokens: Tokens that were cut off, of all rows together.
        of_rows: Rows in all.
    """

    rows: int = 0
    tokens: int = 0
    of_rows: int = 0

    def __add__(self, other: Truncation) -> Truncation:
        return Truncation(
            self.rows + other.rows, self.tokens + other.tokens, self.of_rows + other.of_rows
        )


def encode_rows(
    task: Task, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int
) -> tuple[list[Feature], Truncation]:
    """Token ids of every row, and which of them count.

    A row is [beginning of text] prompt [space answer] [end of text], with the special tokens that
    the tokenizer has; prompt and answer are tokenised apart, so that where the answer begins does
    not depend on it. A row that is too long keeps the end of its prompt and the beginning of its
    answer, which gets at least half of the room where it needs it.

    Args:
        task: Says whether all tokens count or those of the answer.
        tokenizer: The model's.
        rows: Of a causal_lm.
        max_length: The most tokens of a row.

    Returns:
        Features of input_ids, attention_mask and labels, the last being IGNORED where a token
        does not count; and what was cut off.
    """
    start = _start(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompts = _plain(tokenizer, [row.texts[0] for row in rows])
    plain = task.label is None
    answers = [[] for _ in rows] if plain else _plain(tokenizer, _answers(rows))
    room = max_length - len(start)
    features = []
    cut_rows = cut_tokens = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        if plain:
            head, tail = (prompt + end)[:room], []
            lost = len(prompt) + len(end) - len(head)
        else:
            tail = (answer + end)[: max(room - len(prompt), room // 2)]
            head = prompt[max(len(prompt) - (room - len(tail)), 0) :]
            lost = len(prompt) + len(answer) + len(end) - len(head) - len(tail)
        cut_rows += lost > 0
        cut_tokens += lost
        head = start + head
        counted = head if task.loss == "all" else [IGNORED] * len(head)
        features.append(
            {
                "input_ids": head + tail,
                "attention_mask": [1] * len(head + tail),
                "labels": counted + tail,
            }
        )
    return features, Truncation(cut_rows, cut_tokens, len(rows))


def pack(features: Sequence[Feature], max_length: int) -> list[Feature]:
    """Rows put one behind the other into sequences of at most max_length, first fit by length.

    Each keeps to itself: positions start at 0 with every row, which transformers takes as the sign
    of a packed sequence, and no row predicts the first token of the next.

    Returns:
        Features of input_ids, position_ids and labels.
    """
    order = sorted(range(len(features)), key=lambda i: -len(features[i]["input_ids"]))
    bins: list[list[Feature]] = []
    left: list[int] = []
    for feature in (features[i] for i in order):
        size = len(feature["input_ids"])
        place = next((i for i, room in enumerate(left) if room >= size), None)
        if place is None:
            bins.append([])
            left.append(max_length)
            place = len(bins) - 1
        bins[place].append(feature)
        left[place] -= size
    return [
        {
            "input_ids": [token for row in rows for token in row["input_ids"]],
            "position_ids": [i for row in rows for i in range(len(row["input_ids"]))],
            "labels": [label for row in rows for label in [IGNORED, *row["labels"][1:]]],
        }
        for rows in bins
    ]


def collate(
    pad: int, features: Sequence[Mapping[str, Sequence[int]]], length: int | None = None
) -> dict[str, Tensor]:
    """Features padded on the right to the longest, or to `length`: (n, length) int64 each.

    Padding gets token `pad`, label IGNORED, mask 0 and, in packed rows, position 0: there every
    padded token is a row of its own.
    """
    length = length or max(len(feature["input_ids"]) for feature in features)
    fills = {"input_ids": pad, "labels": IGNORED}
    return {
        name: torch.tensor(
            [[*f[name], *[fills.get(name, 0)] * (length - len(f[name]))] for f in features]
        )
        for name in features[0]
    }


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of which token is which number."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(repr(words).encode()).hexdigest()[:16]


def check_vocabulary(task: str, recorded: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError if the adapter of `task` was trained with another tokenizer than this.

    Args:
        task: Name, for the message.
        recorded: What its osrm.json says; None where nothing is known.
        tokenizer: The one in use.
    """
    found = vocabulary_fingerprint(tokenizer)
    if recorded is not None and recorded != found:
        raise UserError(
            f"the adapter of task '{task}' was trained with another tokenizer (vocabulary"
            f" {recorded}) than {tokenizer.name_or_path or 'this one'} ({found}): use the base"
            " model and tokenizer that it was trained on"
        )


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-text token, if the tokenizer puts one in front of a text."""
    start: int | None = tokenizer.bos_token_id
    found = tokenizer("a").input_ids
    return [start] if start is not None and found and found[0] == start else []


def _plain(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids without special tokens; lengths beyond the model's are the caller's matter."""
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _answers(rows: Sequence[Row]) -> list[str]:
    """Each behind the white space that parts it from its prompt, if the prompt has none."""
    return [row.texts[1] if row.texts[0][-1:].isspace() else f" {row.texts[1]}" for row in rows]
