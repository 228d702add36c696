from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from merge_algorithms.errors import UserError
from trainers.data import PooledData, TaskData
from trainers.rows import Row
from trainers.tasks import Task
from trainers.texts import (
    IGNORED,
    check_vocabulary,
    collate,
    encode_rows,
    pack,
    vocabulary_fingerprint,
)

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
CLS, SEP = 2, 3  # the toy tokenizer's beginning and end; "7" is token 11
FIRST = 4


def task(**changes: Any) -> Task:
    given = {"name": "qa", "text": ("q",), "label": "a", "kind": "causal_lm", "data": {"dir": "."}}
    return Task(**{**given, **changes})


def row(prompt: str, answer: str | None = None) -> Row:
    return Row((prompt,) if answer is None else (prompt, answer), 0, prompt)


@pytest.fixture
def tokenizer(word_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    made = word_tokenizer()
    made.bos_token = "[CLS]"
    return made


def test_a_row_is_beginning_prompt_answer_end(tokenizer: PreTrainedTokenizerFast) -> None:
    (all_tokens,), cut = encode_rows(task(), tokenizer, [row("1 2", "7")], 16)
    assert all_tokens["input_ids"] == [CLS, 1 + FIRST, 2 + FIRST, 7 + FIRST, SEP]
    assert all_tokens["labels"] == all_tokens["input_ids"]
    assert (cut.rows, cut.tokens, cut.of_rows) == (0, 0, 1)
    (answers,), _ = encode_rows(task(loss="answer"), tokenizer, [row("1 2", "7")], 16)
    assert answers["labels"] == [IGNORED, IGNORED, IGNORED, 7 + FIRST, SEP]
    (plain,), _ = encode_rows(task(label=None), tokenizer, [row("1 2")], 16)
    assert plain["input_ids"] == [CLS, 1 + FIRST, 2 + FIRST, SEP]


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    answer=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    room=st.integers(4, 40),
    answers_only=st.booleans(),
)
def test_too_long_rows_keep_the_prompts_end_and_the_answers_beginning(
    word_tokenizer_once: PreTrainedTokenizerFast,
    prompt: list[int],
    answer: list[int],
    room: int,
    answers_only: bool,
) -> None:
    texts = row(" ".join(map(str, prompt)), " ".join(map(str, answer)))
    of = task(loss="answer" if answers_only else "all")
    (found,), cut = encode_rows(of, word_tokenizer_once, [texts], room + 1)
    head = [number + FIRST for number in prompt]
    tail = [*(number + FIRST for number in answer), SEP]
    assert len(found["input_ids"]) == 1 + min(room, len(head) + len(tail))
    assert cut.tokens == max(0, len(head) + len(tail) - room)
    assert cut.rows == (cut.tokens > 0)
    kept_tail = min(len(tail), max(room - len(head), room // 2))
    assert found["input_ids"][-kept_tail:] == tail[:kept_tail]
    kept_head = found["input_ids"][1:-kept_tail]
    assert not kept_head or kept_head == head[-len(kept_head) :]
    counted = [label for label in found["labels"] if label != IGNORED]
    assert counted == (tail[:kept_tail] if answers_only else found["input_ids"])


@pytest.fixture(scope="module")
def word_tokenizer_once() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(str, range(10))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]"
    )


def test_packed_rows_fill_sequences_and_never_predict_each_other(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = [row("1 2 3", "4"), row("5", "6"), row("7 8", "9 1 2"), row("3", "3")]
    features, _ = encode_rows(task(), tokenizer, rows, 16)
    packed = pack(features, 12)
    assert sorted(len(p["input_ids"]) for p in packed) == [10, 11]
    assert sum(packed_row["position_ids"].count(0) for packed_row in packed) == len(rows)
    for p in packed:
        starts = [i for i, position in enumerate(p["position_ids"]) if position == 0]
        assert [p["labels"][i] for i in starts] == [IGNORED] * len(starts)
        assert [p["input_ids"][i] for i in starts] == [CLS] * len(starts)
    tokens = sorted(token for feature in features for token in feature["input_ids"])
    assert sorted(token for p in packed for token in p["input_ids"]) == tokens


def test_padding_is_masked_and_does_not_count() -> None:
    batch = collate(
        9,
        [
            {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": [1, 2, 3]},
            {"input_ids": [4], "attention_mask": [1], "labels": [4]},
        ],
        length=4,
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3, IGNORED], [4, *[IGNORED] * 3]]


def qa_rows(count: int) -> list[dict[str, Any]]:
    return [{"q": f"{i} " * (1 + i % 5), "a": str(i), "c": "9 9"} for i in range(count)]


def test_the_tasks_data_has_prompts_truncation_and_pools(
    make: Callable[..., TaskData], word_tokenizer: MakeTokenizer
) -> None:
    data = make(
        qa_rows(40),
        qa_rows(10),
        kind="causal_lm",
        text=("c", "q"),
        label="a",
        prompt="{c} so {q}",
        max_length=6,
        tokenizer=word_tokenizer(pad=False),
    )
    assert data.rows("test")[0].texts[0].startswith("9 9 so ")
    assert data.truncation("test").rows > 0
    assert data.truncation("test").of_rows == 10
    batch = next(iter(data.test_dataloader()))
    assert batch["labels"].shape == batch["input_ids"].shape
    # The end of text is what pads, and still the one at the end of each answer counts.
    assert (batch["labels"] == SEP).any(dim=1).any()
    pooled = PooledData([data, data])
    assert pooled.task.name == "mood-mood"
    assert len(pooled.rows("train")) == 2 * len(data.rows("train"))
    assert pooled.truncation("test").tokens == 2 * data.truncation("test").tokens
    assert pooled.fingerprint("test") != data.fingerprint("test")


def test_columns_may_be_called_as_they_like(make: Callable[..., TaskData]) -> None:
    rows = [{"0": f"{i}", "a.b": "2", "a[0]": f"{i}", "answer": "4"} for i in range(20)]
    for columns, prompt, expected in (
        (("0", "a.b"), None, "7\n2"),
        (("0", "a.b"), "{a.b} {{{0}}}", "2 {7}"),
        (("a[0]",), "so {a[0]}", "so 7"),
    ):
        given = {} if prompt is None else {"prompt": prompt}
        data = make(rows, rows, kind="causal_lm", text=columns, label="answer", **given)
        assert expected in {row.texts[0] for row in data.rows("test")}


def test_pooled_rows_are_told_apart_by_every_parts_settings(make: Callable[..., TaskData]) -> None:
    kind = {"kind": "causal_lm", "text": ("q",), "label": "a"}
    whole, answers, packed = (
        make(qa_rows(40), qa_rows(10), **kind, **more)
        for more in ({}, {"loss": "answer"}, {"packing": True})
    )
    prints = {PooledData([whole, other]).fingerprint("train") for other in (whole, answers)}
    assert len(prints) == 2
    with pytest.raises(UserError, match="packing is true of one only"):
        PooledData([whole, packed])


def test_packing_is_for_training_only(make: Callable[..., TaskData]) -> None:
    data = make(qa_rows(40), qa_rows(10), kind="causal_lm", text=("q",), label="a", packing=True)
    batch = next(iter(data.train_dataloader()))
    assert batch.keys() == {"input_ids", "position_ids", "labels"}
    assert "attention_mask" in next(iter(data.val_dataloader()))


@pytest.mark.parametrize("answer", ["", "  ", None])
def test_empty_answers_are_refused(make: Callable[..., TaskData], answer: str | None) -> None:
    rows = qa_rows(20)
    rows[6]["a"] = answer
    data = make(rows, qa_rows(10), kind="causal_lm", text=("q",), label="a")
    with pytest.raises(UserError, match=r"1 row\(s\) .* without an answer, the first is row 7"):
        data.setup()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "{qq}"}, "did you mean 'q'"),
        ({"prompt": "{q"}, "cannot be read"),
        ({"prompt": "{q:d}"}, "with a format in its prompt: write {column} alone"),
        ({"prompt": "{q!r}"}, "with a format in its prompt"),
        ({"label": None, "loss": "answer"}, "no column with them"),
        ({"metrics": ("perplexity", "token_accuracy")}, "less is better"),
        ({"metrics": ("accuracy",)}, "unknown metric 'accuracy' for a causal_lm"),
        ({"labels": ("a", "b")}, "lists labels"),
        ({"kind": "classification", "packing": True}, "make its kind causal_lm"),
        ({"kind": "regression", "label": None}, "has no label column"),
    ],
)
def test_tasks_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        task(**changes)


def test_another_tokenizer_is_noticed(word_tokenizer: MakeTokenizer) -> None:
    known, other = word_tokenizer(), word_tokenizer()
    other.add_tokens(["new"])
    check_vocabulary("math", None, other)
    check_vocabulary("math", vocabulary_fingerprint(known), known)
    with pytest.raises(UserError, match="'math' was trained with another tokenizer"):
        check_vocabulary("math", vocabulary_fingerprint(known), other)
