"""OrthogonalSubspace on somebody else's LightningModule."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from merge_algorithms import UserError
from osrm import lora_a
from trainers.callbacks import (
    OrthogonalSubspace,
    OrthogonalSubspaceTrainerCallback,
    StepProgress,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.last = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


class Foreign(L.LightningModule):
    """Knows nothing of osrm."""

    def __init__(self, wrap: bool) -> None:
        super().__init__()
        config = LoraConfig(r=2, target_modules=["first"])
        if wrap:
            self.net: Any = get_peft_model(Net(), config)
        else:
            self.net = inject_adapter_in_model(config, Net())

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        return (self.net(x) - y).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trainable = [p for p in self.parameters() if p.requires_grad]
        self.trained = len(trainable)
        return torch.optim.AdamW(trainable, lr=0.1)


def _fit(module: L.LightningModule, *callbacks: L.Callback) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 8)
    rows = list(zip(x, x.sum(dim=1, keepdim=True), strict=True))
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, DataLoader(rows, batch_size=8))  # type: ignore[arg-type]


@pytest.mark.parametrize("constraint", ["init", "freeze", "project"])
@pytest.mark.parametrize("wrap", [True, False], ids=["PeftModel", "injected layers"])
def test_any_module_with_lora_layers(constraint: Any, wrap: bool) -> None:
    module = Foreign(wrap)
    basis = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64))[0].T.float()
    name = "first" if wrap else "net.first"
    _fit(module, OrthogonalSubspace({name: basis}, constraint))
    (a,) = lora_a(module.net).values()
    outside = float((a - a @ basis.T @ basis).norm())
    if constraint == "freeze":
        assert torch.equal(a, basis[:2])
        assert module.trained == 1, "a frozen A must not reach the optimiser"
    else:
        assert not torch.allclose(a, basis[:2], atol=1e-2)
        assert (outside < 1e-5) == (constraint == "project")


def test_layers_under_a_wrapper_keep_their_names() -> None:
    module = Foreign(wrap=True)
    model = module.net.base_model.model
    model.first = checkpoint_wrapper(model.first)
    callback = OrthogonalSubspace(
        {"first": torch.eye(8)[:2]}, "freeze", leak_penalty=1.0, others={"first": _moment()}
    )
    _fit(module, callback)
    assert torch.equal(lora_a(module.net)["first"], torch.eye(8)[:2])


def _inputs() -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    return x, x.sum(dim=1, keepdim=True)


def _moment() -> Tensor:
    h = torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    return h.T @ h / 50


B = torch.randn(8, 2, generator=torch.Generator().manual_seed(4))
FILTER = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))


def _expected_step(net: Any, gamma: float, rate: float, filtered: bool) -> dict[str, Tensor]:
    """A and B after one step of gradient descent on the loss plus the penalty's definition.

    With a filter the step is one on M, where A = M F, and M starts as the A that is there.
    """
    x, y = _inputs()
    net = copy.deepcopy(net)
    layer = net.base_model.model.first
    s, w0 = _moment(), layer.base_layer.weight
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    b.data.copy_(B)
    if filtered:
        a.data = a.data @ FILTER
    dw = layer.scaling["default"] * b @ a
    leaked = (dw @ s @ dw.T).trace() / (w0 @ s @ w0.T).trace()
    loss = (net(x) - y).square().mean() + gamma * leaked
    gradients = torch.autograd.grad(loss, [a, b])
    if filtered:
        gradients = gradients[0] @ FILTER.T @ FILTER, gradients[1]
    moved = [p.detach() - rate * g for p, g in zip((a, b), gradients, strict=True)]
    return dict(zip("ab", moved, strict=True))


def _lora_net() -> Any:
    torch.manual_seed(0)
    return get_peft_model(Net(), LoraConfig(r=2, target_modules=["first"]))


def _set_b(net: Any) -> None:
    """B as it may be in the middle of a training: A gets a gradient."""
    net.base_model.model.first.lora_B.default.weight.data.copy_(B)


def _holding(filtered: bool) -> dict[str, Any]:
    """Arguments of a callback: the penalty, and perhaps the filter."""
    filters = {"filters": {"first": FILTER}}
    penalty = {"leak_penalty": 3.0, "others": {"first": _moment()}}
    return penalty | (filters if filtered else {})


class Descent(Foreign):
    """Gradient descent from a B in the middle of a training."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__(wrap=True)
        self.net = _lora_net()
        self.fused = fused

    def on_train_start(self) -> None:
        _set_b(self.net)

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trainable, lr=0.05, fused=self.fused)


def _assert_makes_the_step(
    module: Descent, filtered: bool, batch: int = 8, tolerance: float = 1e-5, **options: Any
) -> None:
    """Training by a Trainer with these options makes the one step of the definition."""
    expected = _expected_step(module.net, gamma=3.0, rate=0.05, filtered=filtered)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[OrthogonalSubspace(None, **_holding(filtered))],
        **options,
    )
    rows = list(zip(*_inputs(), strict=True))
    trainer.fit(module, DataLoader(rows, batch_size=batch))  # type: ignore[arg-type]
    layer = module.net.base_model.model.first
    for name, factor in (("a", layer.lora_A), ("b", layer.lora_B)):
        torch.testing.assert_close(
            factor.default.weight.detach(), expected[name], rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_penalty_and_filter_make_the_step_of_their_definition(
    accumulated: int, filtered: bool
) -> None:
    _assert_makes_the_step(
        Descent(),
        filtered,
        batch=8 // accumulated,
        max_steps=1,
        accumulate_grad_batches=accumulated,
    )


def test_penalty_counts_once_a_step_under_manual_optimisation() -> None:
    class Manual(Descent):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], index: int) -> None:  # type: ignore[override]
            self.manual_backward(super().training_step(batch, index) / 4)
            if index == 3:
                self.optimizers().step()  # type: ignore[union-attr]

    _assert_makes_the_step(Manual(), True, batch=2, max_epochs=1)


def test_a_batch_that_is_left_out_makes_no_step() -> None:
    class Sparing(Descent):
        def training_step(self, batch: list[Tensor], index: int) -> Any:
            return None if self.current_epoch else super().training_step(batch, index)

    _assert_makes_the_step(Sparing(), True, max_epochs=2)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_float16_skips_leaves_the_next_one_as_it_is(fused: bool) -> None:
    """The scale overflows with the first batch, and holds with the second."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-34)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    _assert_makes_the_step(Descent(fused), True, tolerance=0.02, max_epochs=2, plugins=[precision])


def test_of_two_optimisers_the_one_that_moves_a_filters_its_gradient() -> None:
    class Two(Descent):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.head = nn.Parameter(torch.zeros(1))

        def configure_optimizers(self) -> Any:
            lora = [p for p in self.net.parameters() if p.requires_grad]
            return [torch.optim.SGD([self.head], lr=0.05), torch.optim.SGD(lora, lr=0.05)]

        def training_step(self, batch: list[Tensor], index: int) -> None:  # type: ignore[override]
            self.manual_backward(super().training_step(batch, index))
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()

    _assert_makes_the_step(Two(), True, max_epochs=1)


def test_a_second_fit_goes_on_behind_the_same_filter() -> None:
    class Still(Foreign):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)

    module = Still(wrap=True)
    (before,) = lora_a(module.net).values()
    callback = OrthogonalSubspace(constraint="filter", filters={"first": FILTER})
    for _ in range(2):
        _fit(module, callback)
        (a,) = lora_a(module.net).values()
        torch.testing.assert_close(a, before @ FILTER)


def test_a_reset_adapter_starts_behind_the_filter_again() -> None:
    class Noting(Foreign):
        def on_train_start(self) -> None:
            (self.begun,) = lora_a(self.net).values()

    module = Noting(wrap=True)
    (before,) = lora_a(module.net).values()
    initial = copy.deepcopy(module.state_dict())
    callback = OrthogonalSubspace(filters={"first": FILTER})
    for _ in range(2):  # two folds, or seeds
        module.load_state_dict(initial)
        _fit(module, callback)
        torch.testing.assert_close(module.begun, before @ FILTER)


def test_a_training_that_begins_anew_after_a_failure_filters_once() -> None:
    class Failing(Foreign):
        def on_train_start(self) -> None:
            raise RuntimeError("before the first step")

    module = Failing(wrap=True)
    (before,) = lora_a(module.net).values()
    for filter_ in (FILTER, FILTER, FILTER.T):
        with pytest.raises(RuntimeError, match="before the first step"):
            _fit(module, OrthogonalSubspace(filters={"first": filter_}))
        torch.testing.assert_close(lora_a(module.net)["first"], before @ filter_)


@pytest.mark.parametrize("confined", ["state", "filters"])
def test_a_trained_adapter_goes_on_from_where_it_is(
    confined: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Noting(Foreign):
        def on_train_start(self) -> None:
            layer = self.net.base_model.model.first
            self.begun = [p.detach().clone() for p in layer.parameters()]

    module = Noting(wrap=True)
    arguments: Any = {confined: {"first": torch.linalg.qr(FILTER)[0]}}
    first = OrthogonalSubspace(**arguments)
    caplog.set_level(logging.WARNING, "trainers")
    for callback, warnings in ((first, 0), (first, 0), (OrthogonalSubspace(**arguments), 1)):
        layer = module.net.base_model.model.first
        before = [p.detach().clone() for p in layer.parameters()]
        trained = bool(layer.lora_B.default.weight.any())
        _fit(module, callback)
        assert all(map(torch.equal, before, module.begun)) == trained
        assert len(caplog.records) == warnings
    assert "trained already" in caplog.text


def test_a_trained_adapter_is_warned_of_the_projection(caplog: pytest.LogCaptureFixture) -> None:
    module = Foreign(wrap=True)
    _set_b(module.net)
    caplog.set_level(logging.WARNING, "trainers")
    _fit(module, OrthogonalSubspace({"first": torch.linalg.qr(FILTER)[0][:3]}, "project"))
    assert "drops what of A is outside the subspace" in caplog.text


def test_a_trained_adapter_goes_on_in_transformers_trainer(tmp_path: Path) -> None:
    net = get_peft_model(Net(), LoraConfig(r=2, target_modules=["first"]))
    callback = OrthogonalSubspaceTrainerCallback({"first": torch.eye(8)[:2]}, "freeze")
    b = net.base_model.model.first.lora_B.default.weight
    _trainer(net, tmp_path, callback, max_steps=3, learning_rate=0.1).train()
    trained = b.detach().clone()
    _trainer(net, tmp_path, callback, max_steps=3, learning_rate=0.0).train()
    assert trained.any()
    assert torch.equal(b, trained)


@pytest.mark.parametrize("confined", ["state", "filters"])
def test_an_adapter_that_does_not_train_is_refused_and_left_as_it_is(confined: str) -> None:
    module = Foreign(wrap=True)
    _set_b(module.net)
    module.net.add_adapter("new", LoraConfig(r=2, target_modules=["first"]))
    module.net.set_adapter("new")
    before = lora_a(module.net)["first"]
    basis = torch.linalg.qr(FILTER)[0][:3]
    arguments: Any = {"filters": {"first": basis.T @ basis}}
    if confined == "state":
        arguments = {"state": {"first": basis}, "constraint": "project"}
    with pytest.raises(UserError, match=r"'default' does not train.*active is new.*adapter_name"):
        _fit(module, OrthogonalSubspace(**arguments))
    _fit(module, OrthogonalSubspace(adapter_name="new", **arguments))
    (a,) = lora_a(module.net, "new").values()
    torch.testing.assert_close(a @ basis.T @ basis, a)
    assert torch.equal(lora_a(module.net)["first"], before)


def test_a_student_is_confined_and_its_teacher_left_as_it_is() -> None:
    class Student(Foreign):
        def __init__(self) -> None:
            super().__init__(wrap=True)
            student = self.net
            del self.net  # the teacher comes first
            self.teacher = _lora_net()
            self.net = student

    module = Student()
    basis = torch.linalg.qr(FILTER)[0][:3]
    callback = OrthogonalSubspace({"first": basis}, "project")
    with pytest.raises(UserError, match="2 PeftModels in Student train an adapter 'default'"):
        _fit(module, callback)
    module.teacher.requires_grad_(False)
    (before,) = lora_a(module.teacher).values()
    _fit(module, callback)
    assert torch.equal(lora_a(module.teacher)["first"], before)
    (a,) = lora_a(module.net).values()
    torch.testing.assert_close(a @ basis.T @ basis, a)


def test_what_averages_the_weights_reads_them_projected() -> None:
    module = Foreign(wrap=True)
    basis = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64))[0].T.float()
    average = EMAWeightAveraging(decay=0.5)
    _fit(module, average, OrthogonalSubspace({"first": basis}, "project"))
    (a,) = lora_a(module.net).values()  # the average, which replaces the weights in the end
    assert float((a - a @ basis.T @ basis).norm()) < 1e-5


def test_deepspeed_is_refused_where_it_would_leave_the_subspace() -> None:
    callback = OrthogonalSubspace({"first": torch.eye(8)[:2]}, "project")
    trainer: Any = SimpleNamespace(strategy=object.__new__(DeepSpeedStrategy))
    with pytest.raises(UserError, match="DeepSpeed"):
        callback.setup(trainer, Foreign(wrap=True), "fit")
    arguments: Any = SimpleNamespace(deepspeed_plugin=object())
    nothing: Any = None
    with pytest.raises(UserError, match="DeepSpeed"):
        OrthogonalSubspaceTrainerCallback({}).on_train_begin(arguments, nothing, nothing)


def test_a_frozen_a_stays_frozen_where_the_base_is_a_reference() -> None:
    class Reference(Foreign):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            with self.net.disable_adapter(), torch.no_grad():
                reference = self.net(batch[0])
            return super().training_step(batch, index) + (self.net(batch[0]) - reference).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            with self.net.disable_adapter():  # as an evaluation before the training
                pass
            return super().configure_optimizers()

    module = Reference(wrap=True)
    _fit(module, OrthogonalSubspace({"first": torch.eye(8)[:2]}, "freeze"))
    assert module.trained == 2, "A reaches the optimiser"
    assert torch.equal(lora_a(module.net)["first"], torch.eye(8)[:2])


class _Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = _inputs()
        return {"x": x[index], "y": y[index]}


class _Loss(nn.Module):
    """What transformers' Trainer trains: a forward that returns the loss."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.net(x) - y).square().mean()}


def _trainer(
    net: nn.Module, tmp_path: Path, *callbacks: TrainerCallback, **settings: Any
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        lr_scheduler_type="constant",
        remove_unused_columns=False,
        **settings,
    )
    return Trainer(_Loss(net), arguments, train_dataset=_Rows(), callbacks=list(callbacks))


@pytest.mark.parametrize("filtered", [False, True])
def test_penalty_and_filter_in_transformers_trainer(filtered: bool, tmp_path: Path) -> None:
    class Later(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            _set_b(net)

    net = _lora_net()
    expected = _expected_step(net, gamma=3.0, rate=0.05, filtered=filtered)
    callback = OrthogonalSubspaceTrainerCallback(None, **_holding(filtered))
    settings = {"max_steps": 1, "learning_rate": 0.05, "optim": "sgd", "max_grad_norm": 0.0}
    _trainer(net, tmp_path, callback, Later(), **settings).train()
    layer = net.base_model.model.first
    torch.testing.assert_close(layer.lora_A.default.weight.detach(), expected["a"])
    torch.testing.assert_close(layer.lora_B.default.weight.detach(), expected["b"])


@pytest.mark.parametrize("constraint", ["init", "freeze", "project"])
def test_the_subspace_in_transformers_trainer(constraint: Any, tmp_path: Path) -> None:
    net = get_peft_model(Net(), LoraConfig(r=2, target_modules=["first"]))
    basis = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64))[0].T.float()
    callback = OrthogonalSubspaceTrainerCallback({"first": basis}, constraint)
    trainer = _trainer(net, tmp_path, callback, max_steps=5, learning_rate=0.1)
    moves = [p.requires_grad for name, p in net.named_parameters() if "lora_A" in name]
    assert moves == [constraint != "freeze"], "DDP notes it before training begins"
    trainer.train()
    (a,) = lora_a(net).values()
    outside = float((a - a @ basis.T @ basis).norm())
    if constraint == "freeze":
        assert torch.equal(a, basis[:2])
    else:
        assert not torch.allclose(a, basis[:2], atol=1e-2)
        assert (outside < 1e-5) == (constraint == "project")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"constraint": "freeze"}, "needs a subspace"),
        ({"constraint": "filter"}, "wiener_filters"),
        ({"constraint": "project", "filters": {"first": FILTER}}, "needs a subspace"),
        ({"state": {"first": FILTER[:2]}, "filters": {"first": FILTER}}, "both"),
        ({"leak_penalty": 1.0}, "others_moments"),
        ({"leak_penalty": -1.0, "others": {}}, "gamma is -1"),
        ({"others": {"first": FILTER}}, "leak_penalty is 0"),
        ({"constraint": "freze"}, "unknown constraint 'freze': did you mean 'freeze'"),
        ({"state": {"first": FILTER[:2]}, "constraint": "Project"}, "did you mean 'project'"),
    ],
)
def test_what_cannot_be_confined_is_refused(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        _fit(Foreign(wrap=True), OrthogonalSubspace(**({"state": None} | arguments)))


def test_a_state_of_another_model_is_refused_before_training() -> None:
    with pytest.raises(UserError, match="first"):
        _fit(Foreign(wrap=True), OrthogonalSubspace({"frist": torch.eye(8)[:2]}))


def test_progress_counts_every_step() -> None:
    seen: list[tuple[int, int]] = []
    _fit(Foreign(wrap=True), StepProgress(lambda done, total: seen.append((done, total))))
    assert seen == [(step, 8) for step in range(1, 9)]
