"""Adding up adapters of a language model: seconds from files to file, and how exact the sum is.

    python -m benchmarks.performance.summation                  # three of SmolLM2-135M's shape
    python -m benchmarks.performance.summation --adapters 8 --targets '[q_proj, k_proj, v_proj]'

Random adapters of that shape are written as stock PEFT directories. Timed are reading them, adding
them and writing the sum as one of rank R. The error is that of the model with the sum as a LoRA
against the model with every adapter merged into its dense weights, on random weights and tokens;
both compute in float64, so that it is the sum's own.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.performance.command import run_as_command
from merge_algorithms import Adapter, merge

# What config.json of SmolLM2-135M says.
SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "rope_theta": 100000.0,
}


@dataclass(frozen=True)
class Summed:
    """What adding up took.

    Attributes:
        parameters: Of the base model.
        seconds: Reading, adding and writing, the fastest of the repetitions.
        error: Largest difference of a logit from that of the dense merge, over the largest logit.
    """

    parameters: int
    seconds: float
    error: float


def write_adapter(model: nn.Module, path: Path, rank: int, targets: list[str], seed: int) -> None:
    """A stock PEFT directory with random factors, as large as trained ones are."""
    config = LoraConfig(r=rank, lora_alpha=64, target_modules=targets, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data = 1e-3 * torch.randn(parameter.shape, generator=generator)
        elif "lora_A" in name:
            scale = parameter.shape[1] ** -0.5
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(str(path), save_embedding_layers=False)
    wrapped.unload()


def measure(
    config: LlamaConfig, adapters: int, rank: int, targets: list[str], repeats: int
) -> Summed:
    """Write random adapters, time their summation, compare with the dense merge."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / f"adapter{index}" for index in range(adapters)]
        for seed, path in enumerate(paths):
            write_adapter(model, path, rank, targets, seed)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            merged = merge([Adapter.load(path) for path in paths], "lora_sum")
            merged.save_adapter(Path(folder) / "sum", overwrite=True)
            seconds.append(time.perf_counter() - start)
        ids = torch.randint(0, config.vocab_size, (2, 16))
        model.double()
        with torch.no_grad():
            dense = copy.deepcopy(model)
            for path in paths:
                merge([Adapter.load(path)]).apply_to(dense)
            expected = dense(ids).logits
            found = PeftModel.from_pretrained(model, Path(folder) / "sum").double()(ids).logits
    error = float((found - expected).abs().max() / expected.abs().max())
    return Summed(sum(p.numel() for p in model.parameters()), min(seconds), error)


def main(
    adapters: PositiveInt = 3,
    rank: PositiveInt = 4,
    targets: list[str] = ["q_proj", "v_proj"],  # noqa: B006  (jsonargparse shows it)
    repeats: PositiveInt = 3,
) -> None:
    """Time the summation of adapters of SmolLM2-135M's shape.

    Args:
        adapters: How many are added.
        rank: Of each.
        targets: Modules that they change.
        repeats: The fastest of so many runs counts.
    """
    result = measure(LlamaConfig(**SMOLLM2), adapters, rank, targets, repeats)
    print(
        f"{adapters} adapters of rank {rank} of a model with {result.parameters / 1e6:.0f} M"
        f" parameters: read, added and written in {result.seconds:.3f} s; logits differ from the"
        f" dense merge's by at most {result.error:.1e} of the largest"
    )


if __name__ == "__main__":
    run_as_command(main)
