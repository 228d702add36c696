"""A multi-task job as stages, each keyed by a hash of its inputs: finished or absent, never half.

covariance(task) -> subspace(task) -> train(task); merging and evaluation use the same store.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_algorithms import Adapter, UserError, merge
from merge_algorithms.files import atomic_directory
from osrm import Covariance, collect_covariance
from trainers.backbone import (
    ModelRef,
    auto_class,
    bare,
    load_backbone,
    model_inputs,
    pick_device,
    pick_dtype,
)
from trainers.data import TaskData
from trainers.joint import JOINT, train_joint
from trainers.settings import (
    AdapterSettings,
    HeadSettings,
    SubspaceSettings,
    TrainSettings,
    effective,
    rows_settings,
)
from trainers.subspace import task_subspace
from trainers.training import (
    TrainerOptions,
    no_trainer_options,
    train_task,
    versions,
)

log = logging.getLogger(__name__)

Report = Callable[[int, int], None]

FILE = "covariance.safetensors"


class Progress:
    """Told what a job does; this one says it to the log, the command line's draws bars."""

    def started(self, stage: str) -> Report:
        """A stage begins; returns the function that takes (steps done, steps in all)."""
        log.info("%s", stage)
        return lambda done, total: None

    def finished(self, stage: str, reused: bool) -> None:
        """A stage is there, computed now or found finished."""


class Store:
    """Finished stages below one directory, each in `<kind>/<label>-<hash of its inputs>/`.

    Several processes may build stages at the same time, the same one even: the first to finish it
    wins. One of them holds `lock`, and it starts the others after that.

    Args:
        root: The run directory.
        progress: Told about every stage.

    Attributes:
        known: Stages that are there and were told of.
    """

    def __init__(self, root: str | Path, progress: Progress | None = None) -> None:
        self.root = Path(root)
        self.progress = progress or Progress()
        self.known: set[Path] = set()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run directory for this process; UserError if another one holds it."""
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"the run directory {self.root} is in use by another process: wait for it, or"
                " choose another --name"
            ) from error
        try:
            # Left over by processes that were killed: those to come have not begun.
            for left_over in self.root.rglob(".*.tmp"):
                if left_over.is_file():
                    left_over.unlink()
                else:
                    shutil.rmtree(left_over, ignore_errors=True)
            yield
        finally:
            lock.release()

    def run(
        self,
        kind: str,
        label: str,
        inputs: Mapping[str, Any],
        build: Callable[[Path, Report], None],
    ) -> Path:
        """The stage's directory, built now unless it is already there.

        Args:
            kind: Folder of the stage, such as 'adapters'.
            label: Readable name, such as 'osrm-seed0/stsb'.
            inputs: Everything the outcome depends on, as JSON; earlier stages by their key.
            build: Writes the outcome into the (temporary) directory it is given.
        """
        machine = {"versions": versions(), "dtype": str(pick_dtype())}
        text = json.dumps({"kind": kind, **machine, **inputs}, sort_keys=True)
        directory = self.root / kind / f"{label}-{stage_key(text)}"
        if directory in self.known:
            return directory
        title = f"{kind} {label}"
        reused = (directory / "stage.json").exists()
        report = self.progress.started(title)
        if not reused:
            try:
                with atomic_directory(directory) as temporary:
                    build(temporary, report)
                    (temporary / "stage.json").write_text(
                        json.dumps(json.loads(text), indent=2) + "\n", encoding="utf-8"
                    )
            except (OSError, UserError):
                # Another process of this run may have built the same meanwhile: one is enough.
                if not (directory / "stage.json").exists():
                    raise
        self.known.add(directory)
        self.progress.finished(title, reused)
        return directory


def stage_key(text: str) -> str:
    """Short hash of a stage's inputs."""
    return hashlib.sha256(text.encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Job:
    """Everything that decides the adapters of one arm: one initialisation, one seed, all tasks.

    Attributes:
        store: Where the stages are kept.
        model: The base model.
        data: The tasks' rows, by task.
        adapter: LoRA settings.
        head: Head settings.
        train: Training settings.
        subspace: Initialisation and constraint of A.
        seed: Seed of this arm.
        trainer_options: Gives further keyword arguments for Lightning's Trainer.
        trainer_key: The same as JSON, for the stages' keys.
    """

    store: Store
    model: ModelRef
    data: Mapping[str, TaskData]
    adapter: AdapterSettings
    head: HeadSettings
    train: TrainSettings
    subspace: SubspaceSettings
    seed: int = 0
    trainer_options: TrainerOptions = no_trainer_options
    trainer_key: str = "{}"

    @property
    def arm(self) -> str:
        """Readable name of the arm, such as 'osrm-init-seed0'."""
        return f"{self.subspace.init}-{self.subspace.kept}-seed{self.seed}"

    def covariance(self, task: str) -> Path:
        """Directory with the task's covariance.safetensors."""
        padded = self.subspace.init == "official"
        inputs = {
            "model": self.model.fingerprint,
            "targets": self.adapter.targets,
            "max_length": self.train.max_length,
            "data": self.data[task].fingerprint("covariance"),
            "padded": padded,
        }

        def build(directory: Path, report: Report) -> None:
            covariance = task_covariance(self.model, self.data[task], self.adapter.targets, padded)
            covariance.save(directory / FILE)

        label = f"{task}-padded" if padded else task
        return self.store.run("covariances", label, inputs, build)

    def covariances(self) -> dict[str, Covariance]:
        """The covariances of all tasks."""
        return {task: Covariance.load(self.covariance(task) / FILE) for task in self.data}

    def tuned_covariance(self, task: str) -> Path:
        """The same of the model that carries the task's trained adapter.

        RegMean is defined on the inputs that each fine-tuned model sees (arXiv 2212.09849, section
        3), which are known only after training.
        """
        adapter, base = self.train_adapter(task), self.covariance(task)

        def build(directory: Path, report: Report) -> None:
            tuned = Adapter.load(adapter, name=task)
            found = task_covariance(self.model, self.data[task], self.adapter.targets, tuned=tuned)
            found.save(directory / FILE)

        inputs = {"base": base.name, "adapter": adapter.name}
        return self.store.run("covariances", f"{self.arm}/{task}", inputs, build)

    def statistics(self, tasks: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """Task -> module -> tuned covariance, for merging methods that need them."""
        return {
            task: Covariance.load(self.tuned_covariance(task) / FILE).by_module() for task in tasks
        }

    def subspace_of(self, task: str) -> Path:
        """Directory with the task's subspace.safetensors: module -> orthonormal rows."""
        settings = self.subspace
        inputs = {
            **rows_settings(settings),
            "rank": self.adapter.rank,
            "task": task,
            "covariances": {name: self.covariance(name).name for name in self.data},
        }

        def build(directory: Path, report: Report) -> None:
            state = task_subspace(self.covariances(), task, self.adapter.rank, settings)
            assert state is not None, "plain LoRA has no subspace"
            save_file(state, directory / "subspace.safetensors")

        return self.store.run("subspaces", f"{settings.init}/{task}", inputs, build)

    def train_adapter(self, task: str) -> Path:
        """Directory with the task's trained adapter, head and osrm.json."""
        settings = self.subspace
        wiener = {"mu", "rho", "weights"} if settings.init == "wiener" else set()
        inputs = {
            "model": self.model.fingerprint,
            "data": [self.data[task].fingerprint(split) for split in ("train", "validation")],
            "adapter": asdict(self.adapter),
            "metrics": self.data[task].task.metrics,
            "head": asdict(self.head),
            "train": asdict(self.train),
            "subspace": self.subspace_of(task).name if settings.has_rows else None,
            "constraint": settings.kept if settings.init != "lora" else None,
            "leak_penalty": settings.gamma,
            "weights": settings.weights if settings.gamma else {},
            "covariances": {name: self.covariance(name).name for name in self.data},
            "seed": self.seed,
            "trainer": json.loads(self.trainer_key),
            **{key: value for key, value in effective(settings).items() if key in wiener},
        }

        def build(directory: Path, report: Report) -> None:
            state: dict[str, Tensor] | None = None
            if settings.has_rows:
                state = load_file(self.subspace_of(task) / "subspace.safetensors")
            train_task(
                self.model,
                self.data[task],
                directory,
                adapter=self.adapter,
                head=self.head,
                train=self.train,
                subspace=self.subspace,
                state=state,
                covariances=self.covariances(),
                seed=self.seed,
                trainer_options=self.trainer_options,
                report=report,
            )

        return self.store.run("adapters", f"{self.arm}/{task}", inputs, build)

    def train_joint(self) -> Path:
        """Directory with one adapter that was trained on all tasks, and all heads."""
        inputs = {
            "model": self.model.fingerprint,
            "data": {task: rows.fingerprint("train") for task, rows in self.data.items()},
            "order": list(self.data),
            "adapter": asdict(self.adapter),
            "head": asdict(self.head),
            "train": asdict(self.train),
            "seed": self.seed,
            "trainer": json.loads(self.trainer_key),
        }

        def build(directory: Path, report: Report) -> None:
            train_joint(
                self.model,
                self.data,
                directory,
                adapter=self.adapter,
                head=self.head,
                train=self.train,
                seed=self.seed,
                trainer_options=self.trainer_options,
                report=report,
            )

        return self.store.run("adapters", f"{JOINT}-seed{self.seed}/{JOINT}", inputs, build)


def scoring_dtype(trainer_key: str) -> torch.dtype:
    """What a run's scores are computed in: bfloat16 if its adapters are trained in that.

    Args:
        trainer_key: The options of Lightning's Trainer as JSON.
    """
    half = "bf16" in str(json.loads(trainer_key).get("precision", ""))
    return torch.bfloat16 if half else torch.float32


def dtype_inputs(dtype: torch.dtype) -> dict[str, str]:
    """What a stage of scores adds to its inputs for what they are computed in; float32, nothing."""
    return {} if dtype == torch.float32 else {"dtype": str(dtype)}


def task_covariance(
    model: ModelRef,
    data: TaskData,
    targets: list[str],
    padded: bool = False,
    progress: bool = False,
    tuned: Adapter | None = None,
    **options: Any,
) -> Covariance:
    """Input covariance of the target modules on a task's training rows.

    Args:
        model: The base model.
        data: The task's rows.
        targets: Target modules.
        padded: Pad every row to max_length, as the `official` variant's means need.
        progress: Show a bar.
        tuned: An adapter that the base model carries meanwhile.
        **options: How to sum up, as in `osrm.collect_covariance`: dtype, sketch, spill.
    """
    device = pick_device()
    # Rounded to bfloat16, a weight hardly changes by an adapter's update.
    dtype = None if tuned is None else torch.float32
    backbone = load_backbone(model.path, dtype, auto_class(data.task.kind)).to(device)
    meta = {
        "task": data.task.name,
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "data_fingerprint": data.fingerprint("covariance"),
        "padded": str(padded),
    }
    if tuned is not None:
        merge([bare(tuned, backbone)], "lora_sum").apply_to(backbone)
        meta |= {"tuned": tuned.name, "tuned_fingerprint": tuned.fingerprint}
    loader = data.covariance_dataloader(pad_to_max_length=padded)
    batches = [model_inputs(backbone, batch) for batch in loader]
    return collect_covariance(backbone, batches, targets, meta=meta, progress=progress, **options)
