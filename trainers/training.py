"""Training one task's adapter and writing it as a stock PEFT directory with its head."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from merge_algorithms import Adapter, UserError
from osrm import (
    Covariance,
    adapter_leaked_energy,
    leaked_own_ratio,
    lora_a,
    others_moments,
    resolve_targets,
    subspace_state,
)
from trainers.backbone import ModelRef, load_backbone
from trainers.callbacks import OrthogonalSubspace, StepProgress
from trainers.data import TaskData
from trainers.heads import TaskHead
from trainers.module import TaskModule
from trainers.settings import (
    AdapterSettings,
    Constraint,
    HeadSettings,
    SubspaceSettings,
    TrainSettings,
)

TrainerOptions = Callable[[], Mapping[str, Any]]


def no_trainer_options() -> Mapping[str, Any]:
    """The default: nothing beyond what train_task sets on Lightning's Trainer."""
    return {}


def task_seed(seed: int, task: str) -> int:
    """A seed of its own for every task, as teams that train apart from each other have."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task}".encode()).digest()[:4], "big")


def make_adapter(model: ModelRef, settings: AdapterSettings) -> PeftModel:
    """The frozen backbone with a freshly initialised LoRA adapter named 'default'."""
    backbone = load_backbone(model.path)
    modules = check_targets(backbone, settings)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=settings.dropout,
        target_modules=modules,
        use_rslora=settings.rslora,
    )
    peft_model = get_peft_model(backbone, config)
    config.base_model_name_or_path = model.name
    return peft_model


def check_targets(
    backbone: nn.Module, settings: AdapterSettings, subspace: SubspaceSettings | None = None
) -> list[str]:
    """The target modules' names; UserError if they, the rank or k do not fit the model.

    Args:
        backbone: The base model; its weights are not read.
        settings: Targets and rank.
        subspace: With constraint 'project', k is checked too.
    """
    modules = resolve_targets(backbone, settings.targets)
    projected = subspace is not None and subspace.constraint == "project"
    for name in modules:
        width = min(backbone.get_parameter(f"{name}.weight").shape)
        if not 1 <= settings.rank <= width:
            raise UserError(
                f"rank {settings.rank} is larger than {width}, the smaller side of module"
                f" '{name}', or below 1: choose a rank from 1 to {width}"
            )
        if subspace is not None and projected and not settings.rank <= subspace.k <= width:
            raise UserError(
                f"k {subspace.k} is not between the rank {settings.rank} and {width}, the width of"
                f" module '{name}': A needs that many dimensions to move in"
            )
    return modules


def make_head(model: PeftModel, data: TaskData, settings: HeadSettings) -> TaskHead:
    """A fresh head with as many outputs as the task has classes (1 for regression)."""
    regression = data.task.kind == "regression"
    return TaskHead(
        width=model.config.hidden_size,
        outputs=1 if regression else data.num_labels,
        settings=settings,
        target_mean=data.target_mean if regression else 0.0,
        target_std=data.target_std if regression else 1.0,
    )


def task_subspace(
    covariances: Mapping[str, Covariance], task: str, rank: int, settings: SubspaceSettings
) -> dict[str, Tensor] | None:
    """Rows for A of every module (k, d_in) as the settings say; None for plain LoRA.

    Raises:
        UserError: as `osrm.subspace_state`, such as for a task without others.
    """
    if settings.init == "lora":
        return None
    projected = settings.constraint == "project"
    energy = settings.energy if projected else None
    return subspace_state(
        covariances,
        task,
        rank,
        settings.init,
        k=settings.k if projected and energy is None else None,
        energy=energy,
        scale=settings.scale,
        rho=settings.rho,
    )


def train_task(
    model: ModelRef,
    data: TaskData,
    output: Path,
    *,
    adapter: AdapterSettings,
    head: HeadSettings,
    train: TrainSettings,
    subspace: SubspaceSettings,
    state: Mapping[str, Tensor] | None = None,
    covariances: Mapping[str, Covariance] | None = None,
    seed: int = 0,
    trainer_options: TrainerOptions = no_trainer_options,
    report: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Fine-tune one task and write adapter, head, osrm.json and the training log to `output`.

    Args:
        model: The base model.
        data: The task's rows.
        output: An existing directory to write into.
        adapter: LoRA's rank, scale and targets.
        head: Pooling and shape of the head.
        train: Epochs, batch size, learning rates.
        subspace: What `state` is and what A may do; with init 'lora' there is no state.
        state: Module -> rows (k, d_in) for A, from `task_subspace`.
        covariances: Task -> covariance, to record leaked energy before and after training, and for
            the leak penalty.
        seed: Decides initialisation, order of the rows and dropout, together with the task's name.
        trainer_options: Gives further keyword arguments for Lightning's Trainer.
        report: Called with (steps done, steps in all).

    Returns:
        The task's metrics on its validation rows after the last step.
    """
    L.seed_everything(task_seed(seed, data.task.name), verbose=False)
    peft_model = make_adapter(model, adapter)
    _set_modes(peft_model, train.backbone_dropout)
    module = TaskModule(peft_model, make_head(peft_model, data, head), data.task, train)
    callbacks: list[L.Callback] = []
    if state is not None or subspace.leak_penalty:
        gamma = subspace.leak_penalty
        others = others_moments(covariances or {}, data.task.name) if gamma else None
        constraint: Constraint = "init" if state is None else subspace.constraint
        callbacks.append(OrthogonalSubspace(state, constraint, leak_penalty=gamma, others=others))
    if report is not None:
        callbacks.append(StepProgress(report))
    trainer = _make_trainer(output, train, callbacks, trainer_options())
    before = (
        lora_a(peft_model)
        if state is None
        else {name: rows[: adapter.rank] for name, rows in state.items()}
    )
    _run(trainer, lambda: trainer.fit(module, data))
    scores = _run(trainer, lambda: trainer.validate(module, data, verbose=False))[0]
    validation = {name.removeprefix("val/"): float(value) for name, value in scores.items()}

    # The embeddings are never trained; looking whether they changed would ask the Hub.
    peft_model.save_pretrained(str(output), save_embedding_layers=False)
    # PEFT's card is an empty form that names this machine's copy of the base model.
    (output / "README.md").unlink(missing_ok=True)
    head_tensors = {k: v.detach().cpu().contiguous() for k, v in module.head.state_dict().items()}
    save_file(head_tensors, output / "head.safetensors")
    info = {
        "format": 1,
        "task": data.task.name,
        "tasks": {
            data.task.name: {
                "kind": data.task.kind,
                "labels": list(data.labels),
                "text": list(data.task.text),
                "max_length": train.max_length,
                "head": asdict(head) | {"outputs": module.head.out.out_features},
            }
        },
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "train": asdict(train),
        "subspace": asdict(subspace),
        "seed": seed,
        "validation": validation,
        "versions": versions(),
    }
    if covariances and len(covariances) > 1:
        info["covariances"] = {name: cov.fingerprint for name, cov in covariances.items()}
        info["diagnostics"] = _diagnostics(
            Adapter.load(output, name=data.task.name), before, lora_a(peft_model), covariances
        )
    (output / "osrm.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    return validation


def _diagnostics(
    trained: Adapter,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    covariances: Mapping[str, Covariance],
) -> dict[str, float]:
    """Leaked energy of A before and after training, leaked / own energy of the update."""
    task = trained.name
    return {
        "leaked_before": adapter_leaked_energy(before, covariances, task),
        "leaked_after": adapter_leaked_energy(after, covariances, task),
        "leaked_own_ratio": leaked_own_ratio(trained, covariances, task),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    return {name: version(name) for name in ("osrm-merge", "torch", "transformers", "peft")}


def _set_modes(peft_model: PeftModel, backbone_dropout: bool) -> None:
    """Training mode for the adapter's dropout always, for the backbone's if wanted.

    Lightning keeps each module's mode.
    """
    peft_model.train(backbone_dropout)
    for name, module in peft_model.named_modules():
        if name.endswith("lora_dropout"):
            module.train()


def _make_trainer(
    output: Path,
    train: TrainSettings,
    callbacks: list[L.Callback],
    options: Mapping[str, Any],
) -> L.Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*number of training batches .* is smaller than")
    warnings.filterwarnings("ignore", message=".*Found .* module.* in eval mode")
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning)
    defaults: dict[str, Any] = {
        "devices": 1,
        "logger": CSVLogger(output, name="", version="logs"),
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "limit_val_batches": None,
        "num_sanity_val_steps": 0,
    }
    try:
        trainer = L.Trainer(
            **(defaults | dict(options)),
            max_epochs=train.epochs,
            check_val_every_n_epoch=train.epochs + 1,
            callbacks=callbacks,
            default_root_dir=output,
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"Lightning refuses the --trainer options: {reason}") from error
    if trainer.world_size > 1:
        raise UserError(
            f"--trainer options ask for {trainer.world_size} processes, but one adapter is trained"
            " by one: use --trainer.devices 1"
        )
    return trainer


def _run(trainer: L.Trainer, call: Callable[[], Any]) -> Any:
    """Lightning turns Ctrl-C into SystemExit(1); hand on what it was."""
    try:
        return call()
    except SystemExit as error:
        if trainer.interrupted:
            raise KeyboardInterrupt from error
        raise
