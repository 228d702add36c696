"""What the leak penalty costs: a training step with it beside the same step without.

    python -m benchmarks.performance.penalty                               # MiniLM and a decoder
    python -m benchmarks.performance.penalty --models '[minilm]' --rounds 21 --rank 16

A step is forward, loss, backward and AdamW on the adapter's factors, on the same batch, in turns;
the ratio is the median over the rounds of the two times of one round, in CPU seconds of this
process, so that other programs on the machine do not count. The models and batches are those of
benchmarks.performance.covariance; "tiny" is a model for tests.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveInt
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from benchmarks.performance.command import run_as_command
from benchmarks.performance.covariance import TARGETS, Batches, decoder, minilm
from osrm import LeakPenalty, collect_covariance, others_moments

Model = Literal["minilm", "decoder", "tiny"]
Step = Callable[[Mapping[str, Any]], None]


def compare(
    models: list[Model] | None = None,
    rounds: PositiveInt = 11,
    batches: PositiveInt = 2,
    rank: PositiveInt = 8,
    preset: str = "quick",
    threads: PositiveInt = 1,
) -> None:
    """Print the seconds of a step without and with the penalty, and their ratio.

    Args:
        models: minilm, decoder (135 million parameters) or tiny; the first two by default.
        rounds: How often both are timed, in turns.
        batches: Steps a round; of every task in the case of minilm.
        rank: Of the adapter.
        preset: Of the embedded suite: which rows minilm reads.
        threads: Of torch.
    """
    torch.set_num_threads(threads)
    table = Table(title=f"CPU seconds a step, median of {rounds}, rank {rank}, {threads} thread(s)")
    for heading in ("model", "modules", "step", "with penalty", "ratio", "quartiles"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name in models or ["minilm", "decoder"]:
        model, data = make(name, batches, preset)
        plain, with_penalty, modules = steps_of(model, data, targets_of(name), rank)
        before, after = time_both(plain, with_penalty, data, rounds)
        ratios = [b / a for a, b in zip(before, after, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        table.add_row(
            name,
            str(modules),
            f"{statistics.median(before) / len(data):.4f}",
            f"{statistics.median(after) / len(data):.4f}",
            f"{middle:.3f}",
            f"{low:.3f} .. {high:.3f}",
        )
    Console().print(table)


def make(name: Model, batches: int, preset: str) -> tuple[nn.Module, Batches]:
    """The base model, and the batches that are trained on."""
    if name == "minilm":
        return minilm(batches, preset)
    if name == "decoder":
        return decoder(batches)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    data = [
        {"input_ids": torch.randint(3, 50, (4, 9)), "attention_mask": torch.ones(4, 9).long()}
        for _ in range(batches)
    ]
    return LlamaModel(config).eval(), data


def targets_of(name: Model) -> list[str]:
    return TARGETS["minilm" if name == "minilm" else "decoder"]


def steps_of(
    model: nn.Module, batches: Batches, targets: list[str], rank: int
) -> tuple[Step, Step, int]:
    """A training step of one adapter without and with the penalty, and its number of modules."""
    # Which data the other tasks have does not matter to the clock.
    covariance = collect_covariance(model, batches, targets)
    others = others_moments({"own": covariance, "other": covariance}, "own")
    torch.manual_seed(0)
    peft_model = get_peft_model(model, LoraConfig(r=rank, target_modules=targets))
    penalty = LeakPenalty(peft_model, others, gamma=0.1)
    factors = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=1e-4)

    def step(batch: Mapping[str, Any], extra: Callable[[], Tensor] | None) -> None:
        loss = peft_model(**batch).last_hidden_state.float().square().mean()
        if extra is not None:
            loss = loss + extra()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return (
        lambda batch: step(batch, None),
        lambda batch: step(batch, penalty),
        len(covariance.modules),
    )


def time_both(
    plain: Step, with_penalty: Step, batches: Batches, rounds: int
) -> tuple[list[float], list[float]]:
    """CPU seconds of the rounds of either, after one of each to warm up."""
    before: list[float] = []
    after: list[float] = []
    for _ in track(range(rounds + 1), "Rounds", transient=True):
        for step, seconds in ((plain, before), (with_penalty, after)):
            start = time.process_time()
            for batch in batches:
                step(batch)
            seconds.append(time.process_time() - start)
    return before[1:], after[1:]


if __name__ == "__main__":
    run_as_command(compare)
