"""What collecting a covariance costs beside a plain forward pass, and what a sketch of it loses.

    python -m benchmarks.performance.covariance                            # both models
    python -m benchmarks.performance.covariance --models '[minilm]' --rounds 15
    python -m benchmarks.performance.covariance --sketches '[16, 64, 128]'

Overhead: the same batches go through the model without gradients and through collect_covariance,
in turns, in every round; the ratio is the median over the rounds of the two times of one round, in
CPU seconds of this process, so that other programs on the machine do not count. MiniLM reads the
embedded suite's rows for covariances, the decoder (the shape of SmolLM2-135M, random weights)
rows of random words.

Sketch: subspaces of rank 8 from sketches, for MiniLM on all tasks of the suite; their leaked
energy beside that of subspaces from the exact covariances, both measured with the exact ones, and
what the sketches themselves say it is. The unit is the mean energy, that of a random subspace.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from benchmarks.assets import resolve_model
from benchmarks.performance.command import run_as_command
from benchmarks.suites import load_suite
from osrm import (
    Covariance,
    collect_covariance,
    leaked_energy,
    others_moments,
    subspace_state,
)
from trainers.backbone import load_backbone, load_tokenizer, model_inputs
from trainers.data import TaskData

Model = Literal["minilm", "decoder"]
Batches = list[dict[str, Tensor]]

TARGETS = {"minilm": ["query", "value"], "decoder": ["q_proj", "v_proj"]}
BOUNDS = {"minilm": 1.25, "decoder": 1.15}
RANK = 8


def compare(
    models: list[Model] | None = None,
    rounds: PositiveInt = 11,
    batches: PositiveInt = 4,
    preset: str = "quick",
    threads: PositiveInt = 1,
    sketches: list[int] | None = None,
) -> None:
    """Print the overhead of the pass, and with --sketches what sketches lose.

    Args:
        models: minilm and decoder; both by default.
        rounds: How often both are timed, in turns.
        batches: Batches a round, of every task in the case of minilm.
        preset: Of the embedded suite: how many rows a task has.
        threads: Of torch.
        sketches: Instead of the overhead, the error of sketches of these sizes.
    """
    torch.set_num_threads(threads)
    console = Console()
    if sketches:
        console.print(sketch_table(sketches, preset))
        return
    table = Table(title=f"CPU seconds a round, median of {rounds}, {threads} thread(s)")
    for heading in ("model", "tokens", "forward", "with covariance", "ratio", "quartiles", "goal"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name in models or ["minilm", "decoder"]:
        model, data = minilm(batches, preset) if name == "minilm" else decoder(batches)
        plain, collecting = time_both(model, data, TARGETS[name], rounds)
        ratios = [b / a for a, b in zip(plain, collecting, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        table.add_row(
            name,
            str(sum(int(batch["attention_mask"].sum()) for batch in data)),
            f"{statistics.median(plain):.3f}",
            f"{statistics.median(collecting):.3f}",
            f"{middle:.3f}",
            f"{low:.3f} .. {high:.3f}",
            f"{BOUNDS[name]:.2f}",
        )
    console.print(table)


def minilm(batches: int, preset: str) -> tuple[nn.Module, Batches]:
    """The model, and the first batches of every task's rows for covariances."""
    model = load_backbone(resolve_model("minilm"), dtype=torch.float32)
    of_tasks = task_batches(model, preset)
    return model, [batch for data in of_tasks.values() for batch in data[:batches]]


def task_batches(model: nn.Module, preset: str) -> dict[str, Batches]:
    """What the model reads of every task of the embedded suite."""
    suite = load_suite("embedded", preset=preset)
    tokenizer = load_tokenizer(resolve_model("minilm"))
    found = {}
    for name, task in suite.tasks.items():
        loader = TaskData(task, tokenizer, suite.train, suite.rows).covariance_dataloader()
        found[name] = [model_inputs(model, batch) for batch in loader]
    return found


def decoder(batches: int) -> tuple[nn.Module, Batches]:
    """A decoder of 135 million parameters, and rows of 64 to 128 random words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        tie_word_embeddings=True,
        use_cache=False,
    )
    data = []
    for _ in range(batches):
        mask = (torch.arange(128) < torch.randint(64, 129, (4, 1))).long()
        data.append({"input_ids": torch.randint(3, 49152, (4, 128)), "attention_mask": mask})
    return LlamaModel(config).eval(), data


def time_both(
    model: nn.Module, batches: Batches, targets: list[str], rounds: int
) -> tuple[list[float], list[float]]:
    """CPU seconds of the plain passes and of the collecting ones, after one of each to warm up."""
    plain, collecting = [], []
    for _ in track(range(rounds + 1), "Rounds", transient=True):
        start = time.process_time()
        forward(model, batches)
        middle = time.process_time()
        collect_covariance(model, batches, targets)
        plain.append(middle - start)
        collecting.append(time.process_time() - middle)
    return plain[1:], collecting[1:]


@torch.no_grad()
def forward(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> None:
    """The model on every batch."""
    for batch in batches:
        model(**batch)


def sketch_table(sketches: Sequence[int], preset: str) -> Table:
    """Leaked energy of subspaces from sketches, mean over tasks and modules."""
    model = load_backbone(resolve_model("minilm"), dtype=torch.float32)
    data = task_batches(model, preset)
    exact = {
        task: collect_covariance(model, batches, TARGETS["minilm"])
        for task, batches in data.items()
    }
    table = Table(title=f"MiniLM, rank {RANK}: leaked energy over that of a random subspace")
    for heading in ("kept directions", "leaks", "the sketch says", "MB a task"):
        table.add_column(heading, justify="right")
    for k in [None, *sketches]:
        known = exact
        if k is not None:
            known = {
                task: collect_covariance(model, batches, TARGETS["minilm"], sketch=k)
                for task, batches in data.items()
            }
        leaks, believed = zip(*(leaked_shares(known, exact, task) for task in exact), strict=True)
        width = len(next(iter(exact[next(iter(exact))].means.values())))
        size = len(exact[next(iter(exact))].means) * width * 4 * (k or width) / 1e6
        table.add_row(
            "all" if k is None else str(k),
            f"{statistics.fmean(leaks):.5f}",
            f"{statistics.fmean(believed):.5f}",
            f"{size:.2f}",
        )
    return table


def leaked_shares(
    known: Mapping[str, Covariance], exact: Mapping[str, Covariance], task: str
) -> tuple[float, float]:
    """Leaked energy of the subspaces from `known`, by the exact covariances and by `known`."""
    state = subspace_state(known, task, RANK)
    shares = []
    for moments in (others_moments(exact, task), others_moments(known, task)):
        shares.append(
            statistics.fmean(
                leaked_energy(rows, moments[module])
                * len(moments[module])
                / moments[module].trace()
                for module, rows in state.items()
            )
        )
    return shares[0], shares[1]


if __name__ == "__main__":
    run_as_command(compare)
