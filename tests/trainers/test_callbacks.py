"""OrthogonalSubspace on somebody else's LightningModule."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from loops import FILTER, Foreign, fit, lora_net, moment, set_b
from peft import LoraConfig
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from merge_algorithms import UserError
from osrm import lora_a
from trainers.callbacks import OrthogonalSubspace, OrthogonalSubspaceTrainerCallback, StepProgress
from trainers.confinement import Confinement


@pytest.mark.parametrize("constraint", ["init", "freeze", "project"])
@pytest.mark.parametrize("wrap", [True, False], ids=["PeftModel", "injected layers"])
def test_any_module_with_lora_layers(constraint: Any, wrap: bool) -> None:
    module = Foreign(wrap)
    basis = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64))[0].T.float()
    name = "first" if wrap else "net.first"
    fit(module, OrthogonalSubspace({name: basis}, constraint))
    (a,) = lora_a(module.net).values()
    outside = float((a - a @ basis.T @ basis).norm())
    if constraint == "freeze":
        assert torch.equal(a, basis[:2])
        assert module.trained == 1, "a frozen A must not reach the optimiser"
    else:
        assert not torch.allclose(a, basis[:2], atol=1e-2)
        assert (outside < 1e-5) == (constraint == "project")


@pytest.mark.parametrize("confined", ["state", "filters", "others"])
def test_injected_layers_go_by_their_names_in_the_model_that_carries_them(confined: str) -> None:
    """As in the covariances of that model, which knows nothing of the module around it."""
    module = Foreign(wrap=False)
    module.peft_config = LoraConfig()  # the module's own, which says nothing of where it went
    start = copy.deepcopy(module.state_dict())
    (before,) = lora_a(module.net).values()
    basis = torch.linalg.qr(FILTER)[0][:3]
    arguments: Any = {
        "state": {"state": {"first": basis}, "constraint": "freeze"},
        "filters": {"filters": {"first": FILTER}, "constraint": "freeze"},
        "others": {"others": {"first": moment()}, "leak_penalty": 1.0},
    }
    fit(module, OrthogonalSubspace(**arguments[confined]))
    (a,) = lora_a(module.net).values()
    expected = {"state": basis[:2], "filters": before @ FILTER}
    if confined in expected:
        torch.testing.assert_close(a, expected[confined])
    else:  # the penalty has acted
        free = Foreign(wrap=False)
        free.load_state_dict(start)
        fit(free)
        assert not torch.allclose(a, lora_a(free.net)["first"], atol=1e-3)


def test_layers_under_a_wrapper_keep_their_names() -> None:
    module = Foreign(wrap=True)
    model = module.net.base_model.model
    model.first = checkpoint_wrapper(model.first)
    callback = OrthogonalSubspace(
        {"first": torch.eye(8)[:2]}, "freeze", leak_penalty=1.0, others={"first": moment()}
    )
    fit(module, callback)
    assert torch.equal(lora_a(module.net)["first"], torch.eye(8)[:2])


def test_a_second_fit_goes_on_behind_the_same_filter() -> None:
    class Still(Foreign):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)

    module = Still(wrap=True)
    (before,) = lora_a(module.net).values()
    callback = OrthogonalSubspace(constraint="filter", filters={"first": FILTER})
    for _ in range(2):
        fit(module, callback)
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
        fit(module, callback)
        torch.testing.assert_close(module.begun, before @ FILTER)


def test_a_training_that_begins_anew_after_a_failure_filters_once() -> None:
    class Failing(Foreign):
        def on_train_start(self) -> None:
            raise RuntimeError("before the first step")

    module = Failing(wrap=True)
    (before,) = lora_a(module.net).values()
    for filter_ in (FILTER, FILTER, FILTER.T):
        with pytest.raises(RuntimeError, match="before the first step"):
            fit(module, OrthogonalSubspace(filters={"first": filter_}))
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
        fit(module, callback)
        assert all(map(torch.equal, before, module.begun)) == trained
        assert len(caplog.records) == warnings
    assert "trained already" in caplog.text


def test_a_trained_adapter_is_warned_of_the_projection(caplog: pytest.LogCaptureFixture) -> None:
    module = Foreign(wrap=True)
    set_b(module.net)
    caplog.set_level(logging.WARNING, "trainers")
    fit(module, OrthogonalSubspace({"first": torch.linalg.qr(FILTER)[0][:3]}, "project"))
    assert "drops what of A is outside the subspace" in caplog.text


@pytest.mark.parametrize("confined", ["state", "filters"])
def test_an_adapter_that_does_not_train_is_refused_and_left_as_it_is(confined: str) -> None:
    module = Foreign(wrap=True)
    set_b(module.net)
    module.net.add_adapter("new", LoraConfig(r=2, target_modules=["first"]))
    module.net.set_adapter("new")
    before = lora_a(module.net)["first"]
    basis = torch.linalg.qr(FILTER)[0][:3]
    arguments: Any = {"filters": {"first": basis.T @ basis}}
    if confined == "state":
        arguments = {"state": {"first": basis}, "constraint": "project"}
    with pytest.raises(UserError, match=r"'default' does not train.*active is new.*adapter_name"):
        fit(module, OrthogonalSubspace(**arguments))
    fit(module, OrthogonalSubspace(adapter_name="new", **arguments))
    (a,) = lora_a(module.net, "new").values()
    torch.testing.assert_close(a @ basis.T @ basis, a)
    assert torch.equal(lora_a(module.net)["first"], before)


@pytest.mark.parametrize("wrap", [True, False], ids=["PeftModel", "injected layers"])
def test_a_student_is_confined_and_its_teacher_left_as_it_is(wrap: bool) -> None:
    class Student(Foreign):
        def __init__(self) -> None:
            super().__init__(wrap)
            student = self.net
            del self.net  # the teacher comes first
            self.teacher = Foreign(wrap).net
            self.net = student

    module = Student()
    basis = torch.linalg.qr(FILTER)[0][:3]
    callback = OrthogonalSubspace({"first": basis}, "project")
    with pytest.raises(UserError, match="2 models in Student train an adapter 'default'"):
        fit(module, callback)
    module.teacher.requires_grad_(False)
    (before,) = lora_a(module.teacher).values()
    fit(module, callback)
    assert torch.equal(lora_a(module.teacher)["first"], before)
    (a,) = lora_a(module.net).values()
    torch.testing.assert_close(a @ basis.T @ basis, a)


def test_what_averages_the_weights_reads_them_projected() -> None:
    module = Foreign(wrap=True)
    basis = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64))[0].T.float()
    average = EMAWeightAveraging(decay=0.5)
    fit(module, average, OrthogonalSubspace({"first": basis}, "project"))
    (a,) = lora_a(module.net).values()  # the average, which replaces the weights in the end
    assert float((a - a @ basis.T @ basis).norm()) < 1e-5


def test_deepspeed_is_refused_where_it_would_leave_the_subspace() -> None:
    trainer: Any = SimpleNamespace(strategy=object.__new__(DeepSpeedStrategy))
    for callback in (
        OrthogonalSubspace({"first": torch.eye(8)[:2]}, "project"),
        OrthogonalSubspace(output_filters={"first": torch.eye(8)}),
    ):
        with pytest.raises(UserError, match="DeepSpeed"):
            callback.setup(trainer, Foreign(wrap=True), "fit")
    arguments: Any = SimpleNamespace(deepspeed_plugin=object())
    nothing: Any = None
    with pytest.raises(UserError, match="DeepSpeed"):
        OrthogonalSubspaceTrainerCallback({}).on_train_begin(arguments, nothing, nothing)


def test_what_fsdp_shards_is_refused(tmp_path: Path) -> None:
    arguments: Any = {"state": {"first": torch.eye(8)[:2]}, "constraint": "project"}
    for strategy in (FSDPStrategy, ModelParallelStrategy):
        trainer: Any = SimpleNamespace(strategy=object.__new__(strategy))
        for given in (arguments, {"output_filters": {"first": torch.eye(8)}}):
            with pytest.raises(UserError, match="FSDP leaves each rank a part of A and B"):
                OrthogonalSubspace(**given).setup(trainer, Foreign(wrap=True), "fit")
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        net = fully_shard(lora_net(), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(UserError, match="FSDP leaves each rank a part of A"):
            Confinement(**arguments).start(net)
    finally:
        torch.distributed.destroy_process_group()


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
    fit(module, OrthogonalSubspace({"first": torch.eye(8)[:2]}, "freeze"))
    assert module.trained == 2, "A reaches the optimiser"
    assert torch.equal(lora_a(module.net)["first"], torch.eye(8)[:2])


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
        fit(Foreign(wrap=True), OrthogonalSubspace(**({"state": None} | arguments)))


def test_a_state_of_another_model_is_refused_before_training() -> None:
    with pytest.raises(UserError, match="first"):
        fit(Foreign(wrap=True), OrthogonalSubspace({"frist": torch.eye(8)[:2]}))


def test_progress_counts_every_step() -> None:
    seen: list[tuple[int, int]] = []
    fit(Foreign(wrap=True), StepProgress(lambda done, total: seen.append((done, total))))
    assert seen == [(step, 8) for step in range(1, 9)]
