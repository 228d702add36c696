"""A multi-task job as stages: covariance(task) -> subspace(task) -> train(task).

Where B is filtered too, all tasks are trained twice: the first adapters say what their losses read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_algorithms import Adapter, merge
from osrm import Covariance, Gradients, collect_covariance, collect_gradients
from trainers.backbone import (
    ModelRef,
    auto_class,
    bare,
    load_backbone,
    model_inputs,
    pick_device,
    token_states,
)
from trainers.data import TaskData
from trainers.heads import TaskHead
from trainers.joint import JOINT, joint_settings, train_joint
from trainers.settings import (
    AdapterSettings,
    HeadSettings,
    SubspaceSettings,
    TrainerOptions,
    TrainSettings,
    effective,
    rows_settings,
)
from trainers.store import Report, Store
from trainers.subspace import task_subspace
from trainers.training import START, leaks, train_task

FILE = "covariance.safetensors"
GRADIENTS = "gradients.safetensors"
DIAGNOSTICS = "diagnostics.json"


@dataclass(frozen=True)
class Job:
    """Everything that decides the adapters of one arm: one initialisation, one seed, all tasks.

    Attributes:
        store: Where the stages are kept.
        model: The base model.
        data: The tasks' rows, by task.
        adapter: LoRA settings.
        head: Head settings.
        train: Training settings; batch size and maximal length are those of `data`.
        subspace: Initialisation and constraint of A.
        seed: Seed of this arm.
        trainer_options: Further keyword arguments for Lightning's Trainer.
    """

    store: Store
    model: ModelRef
    data: Mapping[str, TaskData]
    adapter: AdapterSettings
    head: HeadSettings
    train: TrainSettings
    subspace: SubspaceSettings
    seed: int = 0
    trainer_options: TrainerOptions = field(default_factory=TrainerOptions)

    @property
    def arm(self) -> str:
        """Readable name of the arm, such as 'osrm-init-seed0'."""
        twice = "-twice" if self.subspace.needs_gradients else ""
        return f"{self.subspace.init}-{self.subspace.kept}{twice}-seed{self.seed}"

    def covariance(self, task: str) -> Path:
        """Directory with the task's covariance.safetensors."""
        padded = self.subspace.init == "official"
        inputs = {
            "model": self.model.fingerprint,
            "targets": self.adapter.targets,
            "max_length": self.data[task].max_length,
            "data": self.data[task].inputs_fingerprint("covariance"),
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

    def covariance_keys(self) -> dict[str, str]:
        """What the covariances of all tasks are keyed by, for stages that read them."""
        return {task: self.covariance(task).name for task in self.data}

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
            "covariances": self.covariance_keys(),
        }

        def build(directory: Path, report: Report) -> None:
            state = task_subspace(self.covariances(), task, self.adapter.rank, settings)
            assert state is not None, "plain LoRA has no subspace"
            save_file(state, directory / "subspace.safetensors")

        return self.store.run("subspaces", f"{settings.init}/{task}", inputs, build)

    @property
    def first(self) -> Job:
        """The job whose adapters say what a task's loss reads: the same without filters on B."""
        return replace(self, subspace=replace(self.subspace, output_mu=0.0))

    def gradients_of(self, task: str) -> Path:
        """Directory with the gradients.safetensors of the task's adapter in the first job."""
        adapter = self.first.train_adapter(task)
        texts = self.data[task].inputs_fingerprint("covariance")
        inputs = {"adapter": adapter.name, "texts": texts}

        def build(directory: Path, report: Report) -> None:
            found = task_gradients(self.model, self.data[task], adapter)
            found.save(directory / GRADIENTS)

        return self.store.run("gradients", f"{self.first.arm}/{task}", inputs, build)

    def _gradients(self) -> dict[str, Gradients]:
        return {task: Gradients.load(self.gradients_of(task) / GRADIENTS) for task in self.data}

    def train_adapter(self, task: str) -> Path:
        """Directory with the task's trained adapter, head and osrm.json.

        Its key holds what training reads: other tasks only where they confine A, so that a metric
        or a task more, or other rows to validate on, cost no training.
        """
        settings = self.subspace
        wiener = {"mu", "rho", "weights"} if settings.init == "wiener" else set()
        inputs = {
            "model": self.model.fingerprint,
            "data": self.data[task].fingerprint("train"),
            "adapter": asdict(self.adapter),
            "head": asdict(self.head),
            "train": asdict(self.data[task].settings_of(self.train)),
            "subspace": self.subspace_of(task).name if settings.has_rows else None,
            "constraint": settings.kept if settings.init != "lora" else None,
            "leak_penalty": settings.gamma,
            "weights": settings.weights if settings.gamma else {},
            "covariances": self.covariance_keys() if settings.needs_others else {},
            "seed": self.seed,
            "trainer": self.trainer_options.record(),
            **{key: value for key, value in effective(settings).items() if key in wiener},
        }
        if settings.needs_gradients:
            inputs |= {"output_mu": settings.nu, "weights": settings.weights}
            inputs["gradients"] = {u: self.gradients_of(u).name for u in self.data if u != task}

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
                covariances=self.covariances() if settings.needs_others else None,
                gradients=self._gradients() if settings.needs_gradients else None,
                seed=self.seed,
                measure=False,
                trainer_options=self.trainer_options,
                report=report,
            )

        return self.store.run("adapters", f"{self.arm}/{task}", inputs, build)

    def diagnosed(self, task: str) -> Path:
        """Directory with the diagnostics of the task's adapter that read all tasks' covariances."""
        adapter = self.train_adapter(task)

        def build(directory: Path, report: Report) -> None:
            trained = Adapter.load(adapter, name=task)
            found = leaks(load_file(adapter / START), trained, self.covariances())
            (directory / DIAGNOSTICS).write_text(json.dumps(found) + "\n", encoding="utf-8")

        inputs = {"adapter": adapter.name, "covariances": self.covariance_keys()}
        return self.store.run("diagnostics", f"{self.arm}/{task}", inputs, build)

    def diagnostics(self, task: str) -> dict[str, float]:
        """Diagnostic -> what training recorded, and what `diagnosed` found."""
        recorded = json.loads((self.train_adapter(task) / "osrm.json").read_text(encoding="utf-8"))
        found = json.loads((self.diagnosed(task) / DIAGNOSTICS).read_text(encoding="utf-8"))
        values: dict[str, float] = recorded["diagnostics"] | found
        return values

    def train_joint(self) -> Path:
        """Directory with one adapter that was trained on all tasks, and all heads."""
        inputs = {
            "model": self.model.fingerprint,
            "data": {task: rows.fingerprint("train") for task, rows in self.data.items()},
            "order": list(self.data),
            "adapter": asdict(self.adapter),
            "head": asdict(self.head),
            "train": asdict(joint_settings(self.data, self.train)),
            "seed": self.seed,
            "trainer": self.trainer_options.record(),
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
        "data_fingerprint": data.inputs_fingerprint("covariance"),
        "padded": str(padded),
    }
    if tuned is not None:
        merge([bare(tuned, backbone)], "lora_sum").apply_to(backbone)
        meta |= {"tuned": tuned.name, "tuned_fingerprint": tuned.fingerprint}
    loader = data.covariance_dataloader(pad_to_max_length=padded)
    batches = [model_inputs(backbone, batch) for batch in loader]
    return collect_covariance(backbone, batches, targets, meta=meta, progress=progress, **options)


def task_gradients(model: ModelRef, data: TaskData, adapter: Path) -> Gradients:
    """Second moments of the gradients at what a trained adapter's modules write, on its task.

    Args:
        model: The base model.
        data: The task's rows, of which those for covariances are read.
        adapter: Directory of the task's adapter with its head.
    """
    task, device = data.task.name, pick_device()
    trained = Adapter.load(adapter, name=task)
    backbone = load_backbone(model.path, torch.float32).to(device)
    merge([bare(trained, backbone)], "lora_sum").apply_to(backbone)
    head = TaskHead.load(adapter, task).to(device)

    def predict(batch: dict[str, Any]) -> Tensor:
        logits: Tensor = head(token_states(backbone, batch), batch["attention_mask"])
        return logits

    loader = data.covariance_dataloader()
    return collect_gradients(backbone, loader, list(trained.updates), predict=predict)
