from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from merge_algorithms.errors import UserError
from trainers.data import Part, TaskData
from trainers.settings import RowSettings

PARTS: tuple[Part, ...] = ("train", "validation", "test", "covariance")
Rows = list[dict[str, Any]]
MakeData = Callable[..., TaskData]
MakeRows = Callable[..., Rows]


def first_words(batches: Iterable[dict[str, torch.Tensor]]) -> list[int]:
    return [int(word) - 4 for batch in batches for word in batch["input_ids"][:, 1]]


def test_validation_is_carved_from_train_and_all_rows_are_used(make: MakeData) -> None:
    data = make(validation_fraction=0.2)
    train, validation = set(data.rows("train")), set(data.rows("validation"))
    assert (len(train), len(validation), len(data.rows("test"))) == (80, 20, 20)
    assert not train & validation
    assert len({row.texts for row in train | validation}) == 100
    assert data.rows("covariance") == data.rows("train")


def test_a_split_of_its_own_is_validation(
    make: MakeData, tmp_path: Path, write: Callable[[Path, Rows], Path], examples: MakeRows
) -> None:
    write(tmp_path / "dev.jsonl", examples(6, 300))
    data = make(splits={"validation": "dev"})
    assert {row.texts[0].split()[0] for row in data.rows("validation")} == set(
        map(str, range(300, 306))
    )
    assert len(data.rows("train")) == 100


def test_a_validation_file_in_the_directory_is_validation(
    make: MakeData, tmp_path: Path, write: Callable[[Path, Rows], Path], examples: MakeRows
) -> None:
    write(tmp_path / "validation.csv", examples(6, 300))
    data = make()
    assert {row.texts[0].split()[0] for row in data.rows("validation")} == set(
        map(str, range(300, 306))
    )
    assert len(data.rows("train")) == 100
    for splits in ({"test": "validation"}, {"validation": None}):
        assert make(splits=splits).task.splits["validation"] is None


def test_rows_are_capped_and_the_covariance_sees_training_rows_only(make: MakeData) -> None:
    caps = RowSettings(train=30, validation=5, test=8, covariance=7)
    data = make(caps=caps)
    assert [len(data.rows(part)) for part in PARTS] == [30, 5, 8, 7]
    assert data.rows("covariance") == data.rows("train")[:7]
    assert set(data.rows("train")) <= set(make().rows("train"))


def test_groups_never_straddle_train_and_validation(make: MakeData, examples: MakeRows) -> None:
    rows = [{**row, "question": i // 5} for i, row in enumerate(examples(100))]
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        data = make(train=rows, group="question")
        train = {row.group for row in data.rows("train")}
        validation = {row.group for row in data.rows("validation")}
        assert not train & validation
        assert (len(train), len(validation)) == (18, 2)


def test_groups_are_numbered_in_the_order_that_rows_are_scored_in(
    make: MakeData, examples: MakeRows
) -> None:
    """Rows with one number are those of one question; rows without one are none together."""
    asked = [0, 1, 0, None, 2, 1, None, 0, 3, ""] * 3
    rows = [
        {
            "text": " ".join(map(str, [i, *range(i % 7)])),
            "label": ("no", "yes")[i % 2],
            "question": question,
        }
        for i, question in enumerate(asked)
    ]
    data = make(
        train=[{**row, "question": None} for row in examples(100)], test=rows, group="question"
    )
    numbers = data.groups("test")
    scored = first_words(data.test_dataloader())
    assert sorted(scored) == list(range(30))
    for (i, one), (j, other) in itertools.combinations(zip(scored, numbers, strict=True), 2):
        assert (one == other) == (asked[i] == asked[j] and asked[i] not in (None, ""))
    assert data.groups("validation") == list(range(10))


def test_the_groups_have_a_fingerprint_of_their_own(make: MakeData, examples: MakeRows) -> None:
    rows = [{**row, "question": i // 2} for i, row in enumerate(examples(20))]
    others = [{**row, "question": i // 4} for i, row in enumerate(examples(20))]
    train = [{**row, "question": i} for i, row in enumerate(examples(100))]
    data = make(train=train, test=rows, group="question")
    groups, texts = data.groups_fingerprint, data.fingerprint("test")
    data = make(train=train, test=others, group="question")
    assert data.fingerprint("test") == texts
    assert data.groups_fingerprint != groups


def test_equal_texts_never_straddle_train_and_validation(
    make: MakeData, examples: MakeRows
) -> None:
    data = make(train=examples(20) * 5)
    assert not {r.texts for r in data.rows("train")} & {r.texts for r in data.rows("validation")}


def test_rows_are_always_the_same_and_the_global_seed_orders_them(make: MakeData) -> None:
    caps = RowSettings(train=30, validation=5, test=8, covariance=7)
    torch.manual_seed(7)
    first, again = make(caps=caps), make(caps=caps)
    for part in PARTS:
        assert first.rows(part) == again.rows(part)
        assert first.fingerprint(part) == again.fingerprint(part)
    order = first_words(first.train_dataloader())
    torch.rand(3)  # what is drawn in between must not matter, only how torch was seeded
    assert first_words(again.train_dataloader()) == order
    torch.manual_seed(8)
    reordered = first_words(first.train_dataloader())
    assert reordered != order
    assert sorted(reordered) == sorted(order)


def test_epochs_differ_in_order_not_in_rows(make: MakeData) -> None:
    loader = make(caps=RowSettings(train=30)).train_dataloader()
    first, second = first_words(loader), first_words(loader)
    assert first != second
    assert sorted(first) == sorted(second)


@pytest.mark.parametrize("change", ["text", "label", "class"])
def test_the_fingerprint_is_that_of_the_rows(
    make: MakeData, change: str, examples: MakeRows
) -> None:
    rows = examples(100)
    labels: tuple[str, ...] = ("no", "yes")
    before = make(train=rows, labels=labels).fingerprint("train")
    if change == "text":
        for row in rows:
            row["text"] += " 7"
    elif change == "label":
        for row in rows:
            row["label"] = {"no": "yes", "yes": "no"}[row["label"]]
    else:
        labels = ("no", "yes", "maybe")
    assert make(train=rows, labels=labels).fingerprint("train") != before


def test_batches_are_padded_to_their_own_longest_row(make: MakeData) -> None:
    data = make()
    widths = set()
    for batch in data.train_dataloader():
        assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
        assert batch["labels"].dtype == torch.int64
        assert type(batch) is dict
        lengths = batch["attention_mask"].sum(1)
        assert lengths.max() == batch["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"] == 0, batch["attention_mask"] == 0)
        assert (batch["attention_mask"][:, 0] == 1).all()
        widths.add(batch["input_ids"].shape[1])
    assert len(widths) > 3


def test_bucketing_saves_padding(make: MakeData, examples: MakeRows) -> None:
    def padding(batches: Iterable[dict[str, torch.Tensor]]) -> float:
        masks = [batch["attention_mask"] for batch in batches]
        return sum(float((mask == 0).sum()) for mask in masks) / sum(m.numel() for m in masks)

    data = make(train=examples(400))
    shuffled = [data.rows("train")[i : i + 4] for i in range(0, len(data.rows("train")), 4)]
    lengths = [torch.tensor([len(r.texts[0].split()) + 2 for r in rows]) for rows in shuffled]
    unbucketed = 1 - sum(n.sum().item() for n in lengths) / sum(
        n.max().item() * len(n) for n in lengths
    )
    assert padding(data.train_dataloader()) < unbucketed / 4


@pytest.mark.parametrize("part", ["validation", "test", "covariance"])
def test_evaluation_goes_from_long_to_short_over_every_row(make: MakeData, part: Part) -> None:
    data = make()
    loaders = {
        "validation": data.val_dataloader,
        "test": data.test_dataloader,
        "covariance": data.covariance_dataloader,
    }
    batches = list(loaders[part]())
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches])
    assert torch.equal(lengths, lengths.sort(descending=True).values)
    found = sorted(
        zip(first_words(batches), torch.cat([b["labels"] for b in batches]).tolist(), strict=True)
    )
    assert found == sorted((int(r.texts[0].split()[0]), r.label) for r in data.rows(part))


def test_the_covariance_can_be_padded_to_the_full_length(make: MakeData) -> None:
    data = make(max_length=16)
    shapes = {b["input_ids"].shape[1] for b in data.covariance_dataloader(pad_to_max_length=True)}
    assert shapes == {16}


def test_pairs_are_two_segments_and_long_ones_are_cut(make: MakeData) -> None:
    rows = [{"a": "1 2 3", "b": "4 " * 50, "label": i % 2} for i in range(20)]
    rows = [{**row, "a": f"{i} 2 3"} for i, row in enumerate(rows)]
    data = make(train=rows, test=rows, text=("a", "b"), max_length=12)
    batch = next(iter(data.test_dataloader()))
    assert batch["input_ids"].shape == (4, 12)
    assert batch["token_type_ids"][0].tolist() == [0] * 5 + [1] * 7


def test_a_tokenizer_without_padding_pads_with_its_end_of_sequence(
    make: MakeData, word_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    tokenizer = word_tokenizer(pad=False)
    tokenizer.padding_side = "left"
    data = make(tokenizer=tokenizer)
    batch = next(b for b in data.train_dataloader() if (b["attention_mask"] == 0).any())
    assert tokenizer.pad_token == "[SEP]"
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 3).all()
    assert (batch["attention_mask"][:, 0] == 1).all()


def test_regression_keeps_its_unit_and_tells_mean_and_deviation(make: MakeData) -> None:
    rows = [{"text": str(i), "label": i / 4} for i in range(40)]
    data = make(train=rows, test=rows[:9], kind="regression", suffix=".csv")
    labels = torch.tensor([row.label for row in data.rows("train")], dtype=torch.float64)
    assert data.target_mean == pytest.approx(labels.mean().item())
    assert data.target_std == pytest.approx(labels.std(correction=0).item())
    assert (data.num_labels, data.labels) == (1, ())
    batch = next(iter(data.test_dataloader()))
    assert batch["labels"].dtype == torch.float32
    assert set(batch["labels"].tolist()) <= {i / 4 for i in range(9)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caps": RowSettings(train=1)}, "rows.train is 1"),
        ({"caps": RowSettings(covariance=0)}, "rows.covariance is 0"),
        ({"batch_size": 0}, "train.batch_size is 0"),
        ({"max_length": 2}, "train.max_length is 2: use at least 3"),
        ({"max_length": 513}, "reads at most 512 tokens"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_read(
    make: MakeData, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_rows_without_a_group_are_none_together(make: MakeData, examples: MakeRows) -> None:
    """Nor does any large group leave less to train on than to validate."""
    for missing in (None, "", "large"):
        rows = [{**row, "doc": missing if i < 80 else i} for i, row in enumerate(examples(100))]
        for seed in range(12):
            random.Random(seed).shuffle(rows)
            data = make(train=rows, group="doc")
            assert (len(data.rows("train")), len(data.rows("validation"))) == (90, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "train.epochs is 0: use at least 1"),
        ({"batch_size": 0}, "train.batch_size is 0"),
        ({"learning_rate": -1.0}, "train.learning_rate is -1.0: use a finite number of at least 0"),
        ({"head_learning_rate": float("nan")}, "train.head_learning_rate is nan"),
        ({"max_grad_norm": -1.0}, "train.max_grad_norm is -1.0: use a finite number of at least"),
        ({"warmup": 60.0}, "train.warmup is 60.0: it is a share of the steps"),
    ],
)
def test_training_settings_that_cannot_be(
    make: MakeData, changes: dict[str, Any], message: str
) -> None:
    data = make()
    settings = replace(data.train_settings, **changes)
    with pytest.raises(UserError, match=message):
        TaskData(data.task, data.tokenizer, settings, data.row_settings)
