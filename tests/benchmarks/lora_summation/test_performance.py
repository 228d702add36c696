from __future__ import annotations

from transformers import LlamaConfig

from benchmarks.performance.summation import SMOLLM2, measure


def test_the_sum_is_exact_and_fast() -> None:
    """The real shape, but two layers and few words; the real one takes 2 s at most."""
    config = LlamaConfig(**SMOLLM2 | {"num_hidden_layers": 2, "vocab_size": 512})
    result = measure(config, adapters=3, rank=4, targets=["q_proj", "v_proj"], repeats=2)
    assert result.error < 1e-6
    assert result.seconds < 2
