from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import transformers
from factories import covariance_of
from torch import Tensor, nn

from osrm import Covariance

VOCABULARY = 50


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def _bert(cls: type = transformers.BertModel, **options: object) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        **options,
    )
    return cls(config)


def _gpt2() -> nn.Module:
    return transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2)
    )


def _llama() -> nn.Module:
    return transformers.LlamaModel(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


def _t5(cls: type = transformers.T5Model) -> nn.Module:
    return cls(
        transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=16,
            d_ff=48,
            num_layers=2,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


MODELS: dict[str, Callable[..., nn.Module]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "llama": _llama,
    "t5": _t5,
}


@pytest.fixture
def make_model() -> Callable[..., nn.Module]:
    def make(kind: str, *args: object, **options: object) -> nn.Module:
        torch.manual_seed(0)
        return MODELS[kind](*args, **options)

    return make


def _texts(count: int, seed: int, shortest: int = 3, longest: int = 9) -> list[list[int]]:
    """Token rows of different lengths; they end in 1, which is T5's end of sequence."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for _ in range(count):
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        ids = torch.randint(2, VOCABULARY, (length - 1,), generator=generator)
        texts.append([*ids.tolist(), 1])
    return texts


@pytest.fixture
def texts() -> Callable[..., list[list[int]]]:
    return _texts


def _pad(rows: Sequence[Sequence[int]], length: int, side: str) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, where] = torch.tensor(row)
        mask[i, where] = 1
    return ids, mask


def _batches(
    rows: Sequence[Sequence[int]], size: int = 4, length: int | None = None, side: str = "right"
) -> list[dict[str, Tensor]]:
    result = []
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        ids, mask = _pad(chunk, length or max(map(len, chunk)), side)
        result.append({"input_ids": ids, "attention_mask": mask})
    return result


@pytest.fixture
def batches() -> Callable[..., list[dict[str, Tensor]]]:
    return _batches


def _random_covariance(
    task: str, d: int = 12, tokens: int = 40, seed: int = 0, model: str = "tiny", modules: int = 2
) -> Covariance:
    """Two keys' worth of made-up inputs; the modules "k.query" and "k.value" share a key."""
    generator = torch.Generator().manual_seed(seed)
    inputs, names = {}, {}
    for k in range(modules):
        h = torch.randn(tokens, d, generator=generator, dtype=torch.float64)
        key = f"{k}.query"
        inputs[key] = h * torch.logspace(0, -1, d, dtype=torch.float64) + 0.3
        names |= {key: key, f"{k}.value": key}
    return covariance_of(inputs, names, model=model, task=task)


@pytest.fixture
def random_covariance() -> Callable[..., Covariance]:
    return _random_covariance
