"""Training one task's adapter and writing it as a stock PEFT directory with its head."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from merge_algorithms import Adapter, UserError
from merge_algorithms.card import CARD_FILE, adapter_card
from osrm import (
    Covariance,
    Gradients,
    adapter_leaked_energy,
    drift,
    leaked_own_ratio,
    lora_a,
    resolve_targets,
)
from osrm.targets import input_width
from trainers.backbone import (
    ModelRef,
    auto_class,
    frozen_dtype,
    load_backbone,
    pick_device,
)
from trainers.callbacks import StepProgress
from trainers.causal import CausalModule
from trainers.data import TaskData
from trainers.heads import TaskHead
from trainers.module import TaskModule
from trainers.settings import (
    AdapterSettings,
    HeadSettings,
    SubspaceSettings,
    TrainerOptions,
    TrainSettings,
    effective,
)
from trainers.store import versions
from trainers.subspace import check_constraint, make_confinement
from trainers.tasks import Kind
from trainers.texts import vocabulary_fingerprint

START = "start.safetensors"


def task_seed(seed: int, task: str) -> int:
    """A seed of its own for every task, as teams that train apart from each other have."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task}".encode()).digest()[:4], "big")


def make_adapter(
    model: ModelRef,
    settings: AdapterSettings,
    kind: Kind = "classification",
    dtype: torch.dtype | None = None,
) -> PeftModel:
    """The frozen backbone for tasks of a kind, with a freshly initialised adapter 'default'.

    `dtype` is as for `load_backbone`.
    """
    backbone = load_backbone(model.path, dtype, auto_class(kind))
    modules = check_targets(backbone, settings)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=settings.dropout,
        target_modules=modules,
        use_rslora=settings.rslora,
        task_type="CAUSAL_LM" if kind == "causal_lm" else None,
    )
    with warnings.catch_warnings():
        # GPT-2's Conv1D, which PEFT then handles as it should.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
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
        subspace: Its constraint is checked too, and with constraint 'project' k.
    """
    if subspace is not None:
        check_constraint(subspace)
    if not 0 <= settings.dropout < 1:
        raise UserError(f"adapter.dropout is {settings.dropout}: use a probability below 1")
    modules = resolve_targets(backbone, settings.targets)
    projected = subspace is not None and subspace.kept == "project" and subspace.energy is None
    for name in modules:
        width = min(backbone.get_parameter(f"{name}.weight").shape)
        d_in = input_width(backbone.get_submodule(name))
        if not 1 <= settings.rank <= width:
            raise UserError(
                f"rank {settings.rank} is larger than {width}, the smaller side of module"
                f" '{name}', or below 1: choose a rank from 1 to {width}"
            )
        if subspace is not None and projected and not settings.rank <= subspace.k <= d_in:
            raise UserError(
                f"k {subspace.k} is not between the rank {settings.rank} and {d_in}, the features"
                f" that module '{name}' reads: A needs that many dimensions to move in"
            )
    return modules


def make_head(model: PeftModel, data: TaskData, settings: HeadSettings) -> TaskHead:
    """A fresh head with as many outputs as the task has classes (1 for regression)."""
    return TaskHead(
        width=model.config.hidden_size,
        outputs=data.num_labels,
        settings=settings,
        target_mean=data.target_mean,
        target_std=data.target_std,
    )


def make_module(
    model: PeftModel, data: TaskData, head: HeadSettings, train: TrainSettings
) -> TaskModule | CausalModule:
    """What trains a task of this kind: with a fresh head, or with the language model's own."""
    if data.task.kind == "causal_lm":
        return CausalModule(model, data.task, train)
    return TaskModule(model, make_head(model, data, head), data.task, train)


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
    gradients: Mapping[str, Gradients] | None = None,
    seed: int = 0,
    measure: bool = True,
    trainer_options: TrainerOptions = TrainerOptions(),  # noqa: B008  # frozen
    report: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Fine-tune one task and write adapter, head, osrm.json and the training log to `output`.

    Args:
        model: The base model.
        data: The task's rows.
        output: An existing directory to write into.
        adapter: LoRA's rank, scale and targets.
        head: Pooling and shape of the head.
        train: Epochs, learning rates; batch size and maximal length are those of `data`.
        subspace: What `state` is and what A may do; with init 'lora' there is no state.
        state: Module -> rows (k, d_in) for A, from `task_subspace`.
        covariances: Task -> covariance, to record leaked energy before and after training, and for
            the filter and the leak penalty.
        gradients: Task -> gradients, for the filter on what B writes.
        seed: Decides initialisation, order of the rows and dropout, together with the task's name.
        measure: Whether to record what training itself does not read: validation scores and
            leaked energy. If not, the A that it starts from is kept for `leaks`, in START.
        trainer_options: Further keyword arguments for Lightning's Trainer.
        report: Called with (steps done, steps in all).

    Returns:
        The task's metrics on its validation rows after the last step; none if not measured.
    """
    train = data.settings_of(train)
    L.seed_everything(task_seed(seed, data.task.name), verbose=False)
    options = trainer_options.make()
    dtype = frozen_dtype(options.get("precision"))
    peft_model = make_adapter(model, adapter, data.task.kind, dtype)
    set_modes(peft_model, train.backbone_dropout)
    module = make_module(peft_model, data, head, train)
    callbacks: list[L.Callback] = []
    before = lora_a(peft_model)
    if subspace.confines:
        confinement = make_confinement(
            data.task.name, state, subspace, covariances or {}, gradients or {}
        )
        before = confinement.starts(before)
        callbacks.append(confinement)
    compared = covariances if measure and covariances and len(covariances) > 1 else None
    if compared:
        # Before hours of training, for it refuses covariances that do not fit.
        adapter_leaked_energy(before, compared, data.task.name)
    if report is not None:
        callbacks.append(StepProgress(report))
    trainer = make_trainer(output, train, callbacks, options)
    run_trainer(trainer, lambda: trainer.fit(module, data))
    check_finite(module, data.task.name)
    validated: list[Mapping[str, float]] = []  # stays empty with --trainer.limit_val_batches 0
    if measure:
        validated = run_trainer(trainer, lambda: trainer.validate(module, data, verbose=False))
    scores = validated[0] if validated else {}
    data.trainer = None  # it holds the model, and the rows outlive both
    validation = {name.removeprefix("val/"): float(value) for name, value in scores.items()}

    # The embeddings are never trained; looking whether they changed would ask the Hub.
    peft_model.save_pretrained(str(output), save_embedding_layers=False)
    head_tensors = {k: v.detach().cpu().contiguous() for k, v in module.head.state_dict().items()}
    save_file(head_tensors, output / "head.safetensors")
    info = {
        "format": 1,
        "task": data.task.name,
        "tasks": {
            data.task.name: {
                **describe(data),
                **_described(module, data, head, measure),
            }
        },
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "train": asdict(train),
        "subspace": effective(subspace),
        "seed": seed,
        **({"validation": validation} if measure else {}),
        "versions": versions(),
    }
    if covariances and len(covariances) > 1:
        info["covariances"] = {name: cov.fingerprint for name, cov in covariances.items()}
    diagnostics = _drift(before, lora_a(peft_model))
    if compared:
        diagnostics |= leaks(before, Adapter.load(output, name=data.task.name), compared)
    info["diagnostics"] = diagnostics
    if not measure:
        save_file({name: a.contiguous() for name, a in before.items()}, output / START)
    write_record(output, info, data.task.name)
    return validation


def describe(data: TaskData) -> dict[str, Any]:
    """What osrm.json says of the task, whatever its kind."""
    return {
        "kind": data.task.kind,
        "labels": list(data.labels),
        "text": list(data.task.text),
        "max_length": data.max_length,
    }


def write_record(output: Path, info: Mapping[str, Any], name: str) -> None:
    """Write osrm.json and the model card of the adapter that is there.

    In place of PEFT's card, an empty form that names this machine's copy of the base model.
    """
    (output / "osrm.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    card = adapter_card(Adapter.load(output, name=name))
    (output / CARD_FILE).write_text(card, encoding="utf-8")


def leaks(
    start: Mapping[str, Tensor], trained: Adapter, covariances: Mapping[str, Covariance]
) -> dict[str, float]:
    """How much energy of the other tasks' inputs an adapter let through and lets through.

    The other tasks count alike, whatever their weights in training: figures stay comparable.

    Args:
        start: Module -> the A (r, d_in) that training started from, as START holds it.
        trained: The adapter, called as its task.
        covariances: Task -> covariance; the own one and at least one other.
    """
    return {
        "leaked_before": adapter_leaked_energy(start, covariances, trained.name),
        "leaked_after": adapter_leaked_energy(trained, covariances, trained.name),
        "leaked_own_ratio": leaked_own_ratio(trained, covariances, trained.name),
    }


def _described(
    module: TaskModule | CausalModule, data: TaskData, head: HeadSettings, measure: bool
) -> dict[str, Any]:
    """What only tasks of this kind have to say of the head and the texts."""
    if isinstance(module, TaskModule):
        return {"head": asdict(head) | {"outputs": module.head.out.out_features}}
    return {
        "prompt": data.task.prompt,
        "answer": data.task.label,
        "loss": data.task.loss,
        "vocabulary": vocabulary_fingerprint(data.tokenizer),
        "truncated": {
            part: asdict(data.truncation(part))
            for part in (("train", "validation") if measure else ("train",))
        },
    }


def _drift(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """How far the span of A has turned while training, in radians, over all modules."""
    angles = torch.cat([drift(before[module], rows) for module, rows in after.items()])
    return {"drift_mean": float(angles.mean()), "drift_max": float(angles.max())}


def set_modes(peft_model: PeftModel, backbone_dropout: bool) -> None:
    """Training mode for the adapter's dropout always, for the backbone's if wanted.

    Lightning keeps each module's mode.
    """
    peft_model.train(backbone_dropout)
    for name, module in peft_model.named_modules():
        if name.endswith("lora_dropout"):
            module.train()


def make_trainer(
    output: Path,
    train: TrainSettings,
    callbacks: list[L.Callback],
    options: Mapping[str, Any],
) -> L.Trainer:
    """Lightning's Trainer for one adapter, quiet, in this process.

    Raises:
        UserError: Options that Lightning refuses, or that ask for more processes.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*number of training batches .* is smaller than")
    warnings.filterwarnings("ignore", message=".*Found .* module.* in eval mode")
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning)
    defaults: dict[str, Any] = {
        "accelerator": pick_device().type,  # not what else Lightning may find, such as MPS
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
            gradient_clip_val=train.max_grad_norm or None,
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


def run_trainer(trainer: L.Trainer, call: Callable[[], Any]) -> Any:
    """Lightning turns Ctrl-C into SystemExit(1); hand on what it was."""
    try:
        with _attention(trainer):
            return call()
    except SystemExit as error:
        if trainer.interrupted:
            raise KeyboardInterrupt from error
        raise


def check_finite(module: nn.Module, name: str) -> None:
    """UserError if the training of this name has left NaN or infinite weights."""
    if not all(bool(p.isfinite().all()) for p in module.parameters() if p.requires_grad):
        raise UserError(
            f"the training of '{name}' diverged, it left weights that are NaN or infinite: lower"
            " --train.learning_rate, or clip gradients to a smaller --train.max_grad_norm"
        )


def _attention(trainer: L.Trainer) -> AbstractContextManager[Any]:
    """Plain attention for bfloat16 on a CPU: PyTorch's fused one goes backwards far more slowly."""
    half = "bf16" in str(trainer.precision) and trainer.strategy.root_device.type == "cpu"
    return sdpa_kernel(SDPBackend.MATH) if half else nullcontext()
