"""Adapter directories on disk to one merged directory on disk: `osrm merge` against mergekit.

    make peers
    python -m benchmarks.performance.mergekit_end_to_end --model 1b

Both start as fresh processes on the same random base model (Llama) and adapters, and every row
says what it wrote. mergekit merges each adapter into a copy of the base model on disk first; it is
told to keep these in the base's dtype, which is faster and half as large as its default.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse.typing import PositiveInt
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.performance.command import run_as_command
from benchmarks.performance.measuring import in_seconds, markdown
from merge_algorithms import Adapter, LowRank, UserError, merge

MERGEKIT = Path(__file__).parents[2] / ".venv-mergekit" / "bin" / "python"
TASKS = 8
RANK = 16
DENSITY = 0.2

Model = Literal["tiny", "160m", "1b"]
MODELS: dict[Model, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "160m": {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    # The shapes of Llama-3.2-1B.
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
}

# The command's own function behind a clock that starts after the imports.
CLOCK = """
import sys, time
{imports}
start = time.perf_counter()
{call}
print(time.perf_counter() - start)
"""
MERGEKIT_YAML = CLOCK.format(
    imports="from mergekit.scripts.run_yaml import main",
    call="main.main(sys.argv[1:], standalone_mode=False)",
)
_OSRM = "import benchmarks.commands.merge\nfrom benchmarks.cli import main"
OSRM_ADAPTER = CLOCK.format(imports=_OSRM, call="main(sys.argv[1:])")
# A checkpoint is read through its model class, which mergekit imports at its start.
OSRM_CHECKPOINT = CLOCK.format(
    imports=f"{_OSRM}\nfrom transformers import AutoModelForCausalLM", call="main(sys.argv[1:])"
)


@dataclass(frozen=True)
class Run:
    """What one command took.

    Attributes:
        whole: Seconds from the start of the process to its end.
        work: Seconds after the imports.
        disk: Bytes that it has left on disk.
    """

    whole: float
    work: float
    disk: int


@dataclass(frozen=True)
class Job:
    """A command.

    Attributes:
        label: What it does.
        python: The interpreter of its environment.
        script: The command behind a clock.
        arguments: Its command line.
        writes: Directories that appear; removed before every run.
    """

    label: str
    python: Path
    script: str
    arguments: tuple[str, ...]
    writes: tuple[str, ...]


def end_to_end(
    model: Model = "160m",
    method: Literal["task_arithmetic", "ties"] = "task_arithmetic",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    repeats: PositiveInt = 1,
    threads: PositiveInt = 2,
    folder: Path | None = None,
) -> None:
    """Run all commands in turn and print a markdown table.

    Args:
        model: Size of the base model; 1b needs 30 GB of disk.
        method: As mergekit defines it; TIES with density 0.2.
        dtype: Of the base model and the result.
        repeats: How often each is run; the median counts.
        threads: Number of threads of torch.
        folder: Where the temporary files are put.
    """
    if not MERGEKIT.exists():
        raise UserError(f"{MERGEKIT} does not exist: `make peers` installs mergekit there")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        directory = Path(temporary)
        adapters = make_inputs(directory, MODELS[model], getattr(torch, dtype))
        (directory / "merge.yaml").write_text(mergekit_yaml(method, dtype), encoding="utf-8")
        rounds = [
            [run(job, directory, threads) for job in jobs(method, dtype)] for _ in range(repeats)
        ]
        medians = [_median(runs) for runs in zip(*rounds, strict=True)]
        options: dict[str, Any] = {"variant": "mergekit", "density": DENSITY}
        merged = merge(adapters, method, **(options if method == "ties" else {}))
        exact = {m: u.rows(0, u.shape[0]) for m, u in merged.updates.items()}
        error = partial(update_error, directory / "base", exact)
        print(
            f"\n{TASKS} adapters of rank {RANK} on q_proj and v_proj, {method},"
            f" Llama {model} in {dtype}, {threads} threads\n"
        )
        print(as_table(jobs(method, dtype), medians))
        print(
            f"\nRelative error of the update in the merged checkpoint, rounding to {dtype}"
            f" included: mergekit {error(directory / 'mergekit'):.2g},"
            f" osrm {error(directory / 'checkpoint'):.2g}"
        )


def jobs(method: str, dtype: str) -> tuple[Job, ...]:
    """mergekit first: what is compared with the others."""
    names = [f"task{t}" for t in range(TASKS)]
    options = ("--variant", "mergekit", "--density", str(DENSITY)) if method == "ties" else ()
    python = Path(sys.executable)
    ours = ("merge", *names, "--method", method, *options)
    return (
        Job(
            "mergekit-yaml, to a checkpoint",
            MERGEKIT,
            MERGEKIT_YAML,
            (
                *("merge.yaml", "mergekit", "--lora-merge-cache", "cache"),
                *("--lora-merge-dtype", dtype, "--no-copy-tokenizer", "--no-write-model-card"),
            ),
            ("cache", "mergekit"),
        ),
        Job(
            "osrm merge, to a checkpoint",
            python,
            OSRM_CHECKPOINT,
            (*ours, "--checkpoint", "checkpoint", "--base", "base"),
            ("checkpoint",),
        ),
        Job(
            "osrm merge, to an adapter",
            python,
            OSRM_ADAPTER,
            (*ours, "--output", "adapter"),
            ("adapter",),
        ),
    )


def run(job: Job, directory: Path, threads: int) -> Run:
    """Run a command in `directory`, without what an earlier run has left."""
    for name in job.writes:
        shutil.rmtree(directory / name, ignore_errors=True)
    command = [str(job.python), "-c", job.script, *job.arguments]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    whole = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{job.label} failed: {done.stderr[-2000:]}")
    work = float(done.stdout.split()[-1])
    return Run(whole, work, sum(_size(directory / name) for name in job.writes))


def make_inputs(directory: Path, settings: Mapping[str, Any], dtype: torch.dtype) -> list[Adapter]:
    """A random base model, and adapters whose updates are some 3 % of its weights in size."""
    torch.manual_seed(0)
    config = LlamaConfig(**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(directory / "base")
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if name.endswith(("q_proj", "v_proj"))
    }
    adapters = []
    for t in range(TASKS):
        updates = {
            name: LowRank(
                torch.randn(d_out, RANK) * 0.03 * config.initializer_range / RANK**0.5,
                torch.randn(RANK, d_in),
            )
            for name, (d_out, d_in) in shapes.items()
        }
        settings = {"base_model_name_or_path": "base", "task_type": "CAUSAL_LM"}
        adapters.append(Adapter(f"task{t}", updates, config=settings))
        adapters[-1].save(directory / f"task{t}")
    return adapters


def mergekit_yaml(method: str, dtype: str) -> str:
    """Its configuration of the same merge."""
    density = {"density": DENSITY} if method == "ties" else {}
    models = [
        {"model": f"base+task{t}", "parameters": {"weight": 1.0} | density} for t in range(TASKS)
    ]
    return yaml.safe_dump(
        {"merge_method": method, "base_model": "base", "dtype": dtype, "models": models}
    )


def update_error(base: Path, exact: Mapping[str, Tensor], merged: Path) -> float:
    """||(W_merged - W_base) - dW|| / ||dW|| over all modules."""
    before, after = (_weights(path) for path in (base, merged))
    wrong = total = 0.0
    for module, update in exact.items():
        difference = after[f"{module}.weight"].float() - before[f"{module}.weight"].float()
        wrong += float((difference - update).square().sum())
        total += float(update.square().sum())
    return float((wrong / total) ** 0.5)


def as_table(jobs: Sequence[Job], runs: Sequence[Run]) -> str:
    """A row per command."""
    peer = runs[0]
    rows = [
        [
            job.label,
            in_seconds(run.whole),
            in_seconds(run.work),
            f"{run.disk / 1e6:.1f}",
            f"{peer.whole / run.whole:.1f}",
            f"{peer.work / run.work:.1f}",
        ]
        for job, run in zip(jobs, runs, strict=True)
    ]
    headers = ["command", "seconds", "of which after imports", "disk written, MB"]
    return "\n".join(markdown([*headers, "times as fast", "times as fast after imports"], rows))


def _median(runs: Sequence[Run]) -> Run:
    return Run(
        statistics.median(run.whole for run in runs),
        statistics.median(run.work for run in runs),
        runs[-1].disk,
    )


def _weights(checkpoint: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(checkpoint.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


if __name__ == "__main__":
    run_as_command(end_to_end)
