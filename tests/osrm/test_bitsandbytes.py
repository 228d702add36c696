"""The method on bases that bitsandbytes has quantised, with the real package, on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import lightning as L
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaModel

from osrm import (
    Covariance,
    LeakPenalty,
    collect_covariance,
    initialize_lora_osrm_weights,
    leaked_energy,
    lora_a,
    others_moments,
    subspace_state,
)
from trainers.callbacks import OrthogonalSubspace

TARGETS = ["q_proj", "v_proj", "down_proj"]
KINDS = {
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
# int8 rounds what a layer reads as well, nf4 the weights alone (as int8 does while training).
TOLERANCE = {"nf4": 1e-5, "int8": 5e-2}

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def load(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], nn.Module]:
    """A tiny Llama, quantised as it is loaded."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    LlamaModel(
        LlamaConfig(
            vocab_size=50,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.2,
        )
    ).save_pretrained(path)

    def make() -> nn.Module:
        model: nn.Module = LlamaModel.from_pretrained(
            path, quantization_config=KINDS[kind], device_map={"": "cpu"}
        )
        return model

    return make


def quantised(model: nn.Module) -> dict[str, Any]:
    """The layers by their names in the bare model."""
    layers = bnb.nn.Linear4bit, bnb.nn.Linear8bitLt
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, layers)
    }


def weight_of(layer: Any) -> Tensor:
    """The (d_out, d_in) float32 weight that the integers stand for."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return layer.weight.data.float() * scales[:, None] / 127
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def float_twin(model: nn.Module) -> nn.Module:
    """The same model with these weights in plain linear layers."""
    twin = copy.deepcopy(model)
    for name, layer in quantised(model).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight = nn.Parameter(weight_of(layer), requires_grad=False)
        twin.set_submodule(name, plain)
    twin.is_loaded_in_4bit = twin.is_loaded_in_8bit = False  # PEFT asks
    return twin


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    def contents() -> dict[str, list[Tensor]]:
        found = {}
        for name, layer in quantised(model).items():
            state = getattr(layer.weight, "quant_state", None)
            found[name] = [layer.weight.data.clone(), weight_of(layer)]
            found[name] += [state.absmax.clone()] if state is not None else []
        return found

    before = contents()
    assert before
    yield
    for name, tensors in contents().items():
        for tensor, old in zip(tensors, before[name], strict=True):
            assert tensor.dtype == old.dtype
            assert torch.equal(tensor, old), name


def batches(task: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(task)
    low = 3 + 15 * task
    mask = (torch.arange(9) < torch.randint(4, 10, (8, 1), generator=generator)).long()
    ids = torch.randint(low, low + 15, (8, 9), generator=generator)
    return [{"input_ids": ids * mask, "attention_mask": mask}]


def collect(model: nn.Module) -> dict[str, Covariance]:
    return {t: collect_covariance(model, batches(i), TARGETS) for i, t in enumerate("abc")}


def adapted(model: nn.Module, rank: int = 2) -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=rank, target_modules=TARGETS))


def test_covariance_and_start_leave_the_integers_alone(
    kind: str, load: Callable[[], nn.Module]
) -> None:
    model = load().eval()
    twin = float_twin(model)
    with untouched(model):
        covariances = collect(model)
        assert not any(module.training for module in model.modules())
        for task, expected in collect(twin).items():
            assert covariances[task].modules == expected.modules
            for key, matrix in expected.matrices.items():
                error = (covariances[task].matrices[key] - matrix).norm() / matrix.norm()
                assert error < TOLERANCE[kind], key
        model.train()
        (batch,) = batches(0)
        before = model(**batch).last_hidden_state
        peft_model, others = adapted(model), others_moments(covariances, "a")
        default = {m: leaked_energy(a, others[m]) for m, a in lora_a(peft_model).items()}
        initialize_lora_osrm_weights(peft_model, subspace_state(covariances, "a", 2))
        assert torch.equal(peft_model(**batch).last_hidden_state, before)
        for module, a in lora_a(peft_model).items():
            assert leaked_energy(a, others[module]) < default[module]


def test_the_penalty_is_that_of_the_weights_the_integers_stand_for(
    kind: str, load: Callable[[], nn.Module]
) -> None:
    model = load().eval()
    twin = float_twin(model)
    others = others_moments(collect(twin), "a")
    with untouched(model):
        found, expected = (
            LeakPenalty(with_output(adapted(each)), others, 0.3)() for each in (model, twin)
        )
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[kind], atol=0)


def with_output(peft_model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return peft_model


class Descent(L.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        states: Tensor = self.model(**batch).last_hidden_state
        return (states - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)


def test_training_is_confined_and_goes_where_a_float_model_goes(
    kind: str, load: Callable[[], nn.Module]
) -> None:
    """The covariances are collected on the very model that is trained, as one does."""
    model = load()
    twin = float_twin(model)
    covariances = collect(model)
    state = subspace_state(covariances, "a", 2, k=6)
    others = others_moments(covariances, "a")
    trained = []
    with untouched(model):
        for each in (model, twin):
            peft_model = adapted(each.train())
            trainer = L.Trainer(
                max_steps=3,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[OrthogonalSubspace(state, "project", leak_penalty=0.1, others=others)],
            )
            rows = DataLoader(batches(0) * 3, batch_size=None)  # type: ignore[arg-type]
            trainer.fit(Descent(peft_model), rows)
            trained.append({n: p.detach() for n, p in peft_model.named_parameters() if "lora" in n})
            for module, a in lora_a(peft_model).items():
                v = state[module].double()
                start = state[module][:2]
                assert (a - start).norm() > 1e-4, "A has learned"
                assert (a - a.double() @ v.T @ v).norm() < 1e-5 * a.norm()
    for name, expected in trained[1].items():
        error = (trained[0][name] - expected).norm() / expected.norm()
        assert error < 1e-4, name
