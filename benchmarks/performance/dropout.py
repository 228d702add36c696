"""Dropout merging at run time: a forward pass against stock PEFT's with the same active adapters.

    python -m benchmarks.performance.dropout                      # T = 2, 3, 8 on both models
    python -m benchmarks.performance.dropout --targets all-linear # instead of query and value

Random models of MiniLM's and SmolLM2-135M's shapes; PEFT's own forward pass with T active adapters,
and the three run-time merges of the same adapters, one after the other in every round. Times are
CPU seconds of the process (on CUDA seconds to completion), ratios medians over rounds. The masked
part is what is added to one module's output, from A_t x on: with one random word per element, and
in the paper's sequential form of T Bernoulli draws and running products. Memory is the peak of
tensors alive in one call of a layer, beyond its input and factors.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveInt
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from benchmarks.performance.command import run_as_command
from merge_algorithms import attach
from merge_algorithms.dropout import orthogonal_mc_dropout_at_run_time
from merge_algorithms.runtime_peft import as_adapters
from merge_algorithms.task_vectors import align

ModelName = Literal["MiniLM", "SmolLM2-135M", "tiny"]
Targets = Literal["attention", "all-linear"]
METHODS = ("direct", "mc_dropout", "orthogonal_mc_dropout")
ATTENTION = ["query", "value", "q_proj", "v_proj"]
LINEAR = [*ATTENTION, "key", "dense", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 1000  # rows that are looked up: their number costs nothing


def build(name: ModelName, count: int, rank: int, targets: Targets) -> nn.Module:
    """A random model with `count` active adapters, called task0, task1 and so on."""
    torch.manual_seed(0)
    model: nn.Module
    if name == "SmolLM2-135M":
        model = LlamaModel(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=30,
                num_attention_heads=9,
                num_key_value_heads=3,
            )
        )
    else:
        sizes = (384, 6, 12, 1536) if name == "MiniLM" else (64, 1, 2, 96)
        width, layers, heads, inner = sizes
        model = BertModel(
            BertConfig(
                vocab_size=VOCABULARY,
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=inner,
            ),
            add_pooling_layer=False,
        )
    wanted = ATTENTION if targets == "attention" else LINEAR
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=wanted)
    for task in names(count):
        inject_adapter_in_model(config, model, adapter_name=task)
    for layer in lora_layers(model):
        for factor in layer.lora_B.values():
            nn.init.normal_(factor.weight, std=0.02)
        layer.set_adapter(names(count))
    return model.eval().requires_grad_(False)


def names(count: int) -> list[str]:
    return [f"task{t}" for t in range(count)]


def lora_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def form(model: nn.Module, method: str, count: int) -> AbstractContextManager[Any]:
    """The context in which the model computes as `method` says; 'peft' is stock PEFT."""
    return nullcontext() if method == "peft" else attach(model, names(count), method)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """CPU seconds that the work takes; on CUDA the seconds until it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    work()
    return time.process_time() - start


class Peak(TorchDispatchMode):
    """The most bytes of tensors, made within the context, that were alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        self.bytes = max(self.bytes, self.now)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def extra_memory(model: nn.Module, method: str, count: int, tokens: int) -> float:
    """Peak memory of a call of the first adapted layer beyond stock PEFT's, in its outputs."""
    layer = lora_layers(model)[0]
    x = torch.randn(tokens, layer.in_features).to(layer.weight)
    peaks = []
    for kind in ("peft", method):
        with torch.no_grad(), form(model, kind, count), Peak() as peak:
            layer(x)
        peaks.append(peak.bytes)
    return (peaks[1] - peaks[0]) / (tokens * layer.out_features * x.element_size())


def sequential(outputs: Iterator[Tensor], rates: Sequence[float]) -> Tensor:
    """The masked sum as the paper writes it (arXiv 2510.03262).

    sum_j m_j o_j, z_j ~ Bern((1 - p_j) / (1 - sum_{i<j} (1 - p_i))), m_j = z_j prod_{i<j} (1 - z_i)
    """
    total = free = None
    left = 1.0
    for output, rate in zip(outputs, rates, strict=True):
        z = torch.empty_like(output).bernoulli_(min(1.0, (1 - rate) / left))
        mask = z if free is None else z * free
        total = mask * output if total is None else total + mask * output
        free = 1 - z if free is None else free * (1 - z)
        left -= 1 - rate
    assert total is not None
    return total


def masked_parts(
    model: nn.Module, count: int, tokens: int
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """What is added to the first adapted layer's output: by attach's mixture, and sequentially."""
    layer = lora_layers(model)[0]
    device = layer.weight.device
    outer = [layer.lora_B[name] for name in names(count)]
    inner = [torch.randn(tokens, b.in_features, device=device) for b in outer]
    zero, rates = torch.zeros(tokens, layer.out_features, device=device), [1 - 1 / count] * count
    tasks = align(as_adapters(model, {"m": layer}, names(count)))
    (mixture,) = orthogonal_mc_dropout_at_run_time(tasks, drop_rates=rates).values()

    def ours() -> Tensor:
        scaled = [z * factor for z, factor in zip(inner, mixture.factors, strict=True)]
        return mixture.combine(zero, scaled, lambda t, z: outer[t](z))

    def papers() -> Tensor:
        scaled = [z * factor for z, factor in zip(inner, mixture.factors, strict=True)]
        return zero + sequential((b(z) for b, z in zip(outer, scaled, strict=True)), rates)

    return ours, papers


def compare(
    models: list[ModelName] | None = None,
    adapters: list[PositiveInt] | None = None,
    targets: Targets = "attention",
    rank: PositiveInt = 8,
    batch: PositiveInt = 8,
    length: PositiveInt = 128,
    rounds: PositiveInt = 7,
    threads: PositiveInt | None = None,
) -> None:
    """Measure all forms, alternating, and print their ratios to stock PEFT.

    Args:
        models: Shapes of the models; MiniLM and SmolLM2-135M by default.
        adapters: How many adapters, one row each; 2, 3 and 8 by default.
        targets: Modules with adapters: query and value, or every linear module.
        rank: Rank of every adapter.
        batch: Rows in a batch.
        length: Tokens in a row.
        rounds: How often each is measured.
        threads: Threads of torch; its own choice by default.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads"
    )
    table = Table(
        title=f"Forward pass over stock PEFT's time, {batch} x {length} tokens, rank {rank},"
        f" {targets}, {where}"
    )
    for heading in (
        "model",
        "T",
        "PEFT s",
        *METHODS,
        "masked part: times as fast",
        "extra memory, outputs",
    ):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    console = Console(width=130)
    for name in models or ["MiniLM", "SmolLM2-135M"]:
        for count in adapters or [2, 3, 8]:
            cells = row(build(name, count, rank, targets).to(device), count, batch, length, rounds)
            console.print(f"{name}, T = {count}: {', '.join(cells)}")
            table.add_row(name, str(count), *cells)
    console.print(table)


@torch.no_grad()
def row(model: nn.Module, count: int, batch: int, length: int, rounds: int) -> list[str]:
    """The measurements of one model with so many adapters."""
    device = next(model.parameters()).device
    ids = torch.randint(VOCABULARY, (batch, length), device=device)
    times: dict[str, list[float]] = {method: [] for method in ("peft", *METHODS)}
    parts: list[float] = []
    ours, papers = masked_parts(model, count, batch * length)
    for number in range(rounds + 1):  # the first warms up
        for method, taken in times.items():
            with form(model, method, count):
                taken.append(seconds(lambda: model(ids), device))
        parts.append(seconds(papers, device) / max(seconds(ours, device), 1e-9))
        if number == 0:
            for taken in (*times.values(), parts):
                taken.clear()
    ratios = [
        statistics.median(a / b for a, b in zip(times[method], times["peft"], strict=True))
        for method in METHODS
    ]
    memory = extra_memory(model, "orthogonal_mc_dropout", count, batch * length)
    return [
        f"{statistics.median(times['peft']):.3f}",
        *(f"{ratio:.2f}" for ratio in ratios),
        f"{statistics.median(parts):.1f}",
        f"{memory:+.2f}",
    ]


if __name__ == "__main__":
    run_as_command(compare)
