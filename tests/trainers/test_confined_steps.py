"""A step behind the penalty and the filter, in every way that Lightning makes steps."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from loops import Foreign, expected_step, holding, inputs, lora_net, set_b
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trainers.callbacks import OrthogonalSubspace


class Descent(Foreign):
    """Gradient descent from a B in the middle of a training."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__(wrap=True)
        self.net = lora_net()
        self.fused = fused

    def on_train_start(self) -> None:
        set_b(self.net)

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trainable, lr=0.05, fused=self.fused)


def _assert_makes_the_step(
    module: Descent, filtered: bool, batch: int = 8, tolerance: float = 1e-5, **options: Any
) -> None:
    """Training by a Trainer with these options makes the one step of the definition."""
    expected = expected_step(module.net, gamma=3.0, rate=0.05, filtered=filtered)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[OrthogonalSubspace(None, **holding(filtered))],
        **options,
    )
    rows = list(zip(*inputs(), strict=True))
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
