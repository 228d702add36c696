"""Tiny random models and a suite of learnable toy tasks, made on the spot: no downloads."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from files import write_rows
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# A test that reached for the Hub would pass or fail by the weather.
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
# A shell that starts the tests in the background lets them ignore Ctrl-C, and their children too.
signal.signal(signal.SIGINT, signal.default_int_handler)

WORDS = 60
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]

SMALL = {
    "vocab_size": WORDS + len(SPECIAL),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**SMALL),
    "roberta": lambda: transformers.RobertaConfig(**SMALL),
    "llama": lambda: transformers.LlamaConfig(**SMALL, num_key_value_heads=2),
    "t5": lambda: transformers.T5Config(
        vocab_size=SMALL["vocab_size"],
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=3,
        decoder_start_token_id=0,
    ),
}


def word_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """w0 .. w59 are words; <s> a </s> b </s>, a </s> b </s> for T5, <s> a b for Llama."""
    vocabulary = [*SPECIAL, *(f"w{i}" for i in range(WORDS))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    start = "" if kind == "t5" else "<s> "
    end = "" if kind == "llama" else " </s>"
    core.post_processor = processors.TemplateProcessing(
        single=f"{start}$A{end}",
        pair=f"{start}$A{end} $B:1{end}",
        special_tokens=[("<s>", 2), ("</s>", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token=None if kind == "llama" else "<pad>",
        model_max_length=64,
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny random model of a kind (bert, roberta, t5, llama), with tokenizer."""
    made: dict[str, Path] = {}

    def build(kind: str) -> Path:
        if kind not in made:
            path = tmp_path_factory.mktemp("models") / kind
            with torch.random.fork_rng():
                torch.manual_seed(0)
                transformers.AutoModel.from_config(CONFIGS[kind]()).save_pretrained(path)
            word_tokenizer(kind).save_pretrained(path)
            made[kind] = path
        return made[kind]

    return build


def _rows(task: str, count: int, seed: int) -> list[dict[str, object]]:
    """`half`: is the mean word in the upper half; `size`: the mean word; `same`: equal texts."""
    rng = random.Random(f"{task} {seed}")
    rows: list[dict[str, object]] = []
    for _ in range(count):
        low = rng.choice([0, 30])
        words = [rng.randrange(low, low + 30) for _ in range(rng.randint(2, 8))]
        text = " ".join(f"w{word}" for word in words)
        if task == "half":
            rows.append({"text": text, "label": ["low", "high"][low // 30]})
        elif task == "size":
            rows.append({"text": text, "label": sum(words) / len(words)})
        else:
            other = text if rng.random() < 0.5 else " ".join(f"w{rng.randrange(60)}" for _ in words)
            rows.append({"text": text, "other": other, "label": int(other == text)})
    return rows


@pytest.fixture(scope="session")
def toy_suite(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> Path:
    """A user's own suite file over local jsonl: three tasks, a tiny BERT, seconds to run."""
    folder = tmp_path_factory.mktemp("suite")
    for task in ("half", "size", "same"):
        write_rows(folder / "data" / task / "train.jsonl", _rows(task, 600, 0))
        write_rows(folder / "data" / task / "test.jsonl", _rows(task, 80, 1))
    path = folder / "toy.yaml"
    path.write_text(
        f"""
model: {tiny_model("bert")}
data: {{dir: data}}
adapter: {{rank: 4, alpha: 8, targets: [query, value]}}
train: {{max_length: 24, batch_size: 16}}
presets:
  smoke:
    rows: {{train: 64, validation: 16, test: 24, covariance: 32}}
    train: {{epochs: 1, max_length: 24}}
    coefficients: [0.5, 1.0]
    samples: 2
default_preset: smoke
tasks:
  half: {{text: [text], metrics: [accuracy, f1]}}
  size: {{text: [text], kind: regression, metrics: [pearson+spearman]}}
  same: {{text: [text, other], metrics: [accuracy]}}
""",
        encoding="utf-8",
    )
    return path


LANGUAGE_CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=SMALL["vocab_size"],
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=2,
        eos_token_id=3,
    ),
    "llama": CONFIGS["llama"],
}


@pytest.fixture(scope="session")
def tiny_language_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny random language model (gpt2, llama) whose tokenizer never pads."""
    made: dict[str, Path] = {}

    def build(kind: str) -> Path:
        if kind not in made:
            path = tmp_path_factory.mktemp("language") / kind
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = transformers.AutoModelForCausalLM.from_config(LANGUAGE_CONFIGS[kind]())
            model.save_pretrained(path)
            word_tokenizer("llama").save_pretrained(path)
            made[kind] = path
        return made[kind]

    return build


def _answers(domain: int, count: int, seed: int) -> list[dict[str, object]]:
    """Questions of a domain's own 20 words; the answer is the question backwards."""
    rng = random.Random(f"{domain} {seed}")
    rows: list[dict[str, object]] = []
    for _ in range(count):
        words = [
            f"w{rng.randrange(20 * domain, 20 * domain + 20)}" for _ in range(rng.randint(3, 8))
        ]
        rows.append({"question": " ".join(words), "answer": " ".join(reversed(words))})
    return rows


@pytest.fixture(scope="session")
def make_qa_suite(
    tmp_path_factory: pytest.TempPathFactory, tiny_language_model: Callable[[str], Path]
) -> Callable[..., Path]:
    """A suite file of three tiny question answering tasks, for a tiny gpt2 or llama."""

    def build(kind: str = "gpt2", **rows: dict[str, list[dict[str, object]]]) -> Path:
        """`rows` replaces splits of tasks: {task: {split: rows}}."""
        folder = tmp_path_factory.mktemp("qa")
        for domain, task in enumerate(("math", "medicine", "finance")):
            splits = {"train": _answers(domain, 90, 0), "test": _answers(domain, 20, 1)}
            for split, found in (splits | rows.get(task, {})).items():
                write_rows(folder / "data" / task / f"{split}.jsonl", found)
        path = folder / "toyqa.yaml"
        targets = {"gpt2": "c_attn", "llama": "q_proj, v_proj"}[kind]
        path.write_text(
            f"""
extends: _qa
model: {tiny_language_model(kind)}
data: {{dir: data}}
adapter: {{targets: [{targets}]}}
train: {{learning_rate: 1.0e-2}}
default_preset: smoke
presets:
  smoke:
    rows: {{train: 40, validation: 6, test: 10, covariance: 16}}
    train: {{epochs: 2, max_length: 24}}
tasks:
  math: &answers {{kind: causal_lm, text: [question], label: answer, group: question}}
  medicine: *answers
  finance: *answers
""",
            encoding="utf-8",
        )
        return path

    return build
