"""mergekit, installed in an environment of its own, and this package on the same adapters."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from merge_algorithms import Adapter, Merged, merge

ENVIRONMENT = Path(__file__).parents[2] / ".venv-mergekit"
# The function behind mergekit-yaml, called once per configuration: importing takes the longest.
DRIVER = """
import sys
from mergekit.scripts.run_yaml import main
for file in sys.argv[1:]:
    flags = ["--lora-merge-cache=cache", "--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
    main.main([file + ".yaml", file, *flags], standalone_mode=False)
"""

# As they are stored: different ranks, scales and target modules, the last saved by this package.
LORAS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 2, "target_modules": ["q_proj", "v_proj", "up_proj"], "use_rslora": True},
    "ours": {"r": 3, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"0.*q_proj": 5}},
}
WEIGHTS = [0.5, 1.0, 0.75]


@dataclass(frozen=True)
class Case:
    """One merge in the words of both."""

    peer: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    per_model: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    weights: list[float] = field(default_factory=lambda: WEIGHTS)
    coefficient: float = 1.0
    names: list[str] = field(default_factory=lambda: list(LORAS))
    weighted: bool = True  # the weights are this package's as well
    based: bool = True  # mergekit's configuration names the base model


CASES = {
    "linear": Case("linear", "linear", weights=[1.0, 2.0, 0.5], based=False),
    "task_arithmetic": Case(
        "task_arithmetic",
        "task_arithmetic",
        weights=[0.5, -1.0, 0.75],
        parameters={"lambda": 0.7},
        coefficient=0.7,
    ),
    "task_arithmetic, normalised": Case(
        "task_arithmetic", "average", parameters={"normalize": True}
    ),
    "nuslerp": Case(
        "nuslerp",
        "slerp",
        {"t": 0.3, "scope": "tensor"},
        weights=[0.7, 0.3],
        weighted=False,
        names=["plain", "ours"],  # where one of two updates is zero, mergekit takes 90 degrees
    ),
    "ties": Case(
        "ties", "ties", {"density": 0.3, "variant": "mergekit"}, per_model={"density": 0.3}
    ),
    "ties, one weight negative": Case(
        "ties",
        "ties",
        {"density": 0.6, "variant": "mergekit"},
        weights=[0.5, 1.0, -0.25],
        per_model={"density": 0.6},
        parameters={"lambda": 0.4},
        coefficient=0.4,
    ),
    "ties, not normalised": Case(
        "ties",
        "ties",
        {"density": 0.3, "variant": "mergekit", "combine": "sum"},
        per_model={"density": 0.3},
        parameters={"normalize": False},
    ),
    "breadcrumbs": Case(
        "breadcrumbs",
        "breadcrumbs",
        {"density": 0.4, "gamma": 0.05, "variant": "mergekit"},
        per_model={"density": 0.4, "gamma": 0.05},
    ),
    "breadcrumbs_ties": Case(
        "breadcrumbs_ties",
        "breadcrumbs_ties",
        {"density": 0.4, "gamma": 0.05, "variant": "mergekit"},
        per_model={"density": 0.4, "gamma": 0.05},
    ),
    # Nothing is dropped, so that chance plays no part: the election and the combination are left.
    **{
        name: Case(
            name, name, {"density": 1.0, "variant": "mergekit"} | more, per_model={"density": 1.0}
        )
        for name, more in {
            "dare_linear": {},
            "dare_ties": {},
            "della_linear": {"epsilon": 0.0},
            "della": {"epsilon": 0.0},
        }.items()
    },
}

# One adapter alone, half of whose entries are dropped at random.
DROPPED = {
    "dare_linear, dropped": Case(
        "dare_linear",
        "dare_linear",
        {"density": 0.5, "variant": "mergekit"},
        per_model={"density": 0.5},
        weights=[1.0],
        names=["plain"],
    ),
    "della_linear, dropped": Case(
        "della_linear",
        "della_linear",
        {"density": 0.5, "epsilon": 0.2, "variant": "mergekit"},
        per_model={"density": 0.5, "epsilon": 0.2},
        weights=[1.0],
        names=["plain"],
    ),
}
MERGED = Case("task_arithmetic", "task_arithmetic", weights=[1.0], names=["merged"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model, the adapters, and a merge of them."""
    folder = tmp_path_factory.mktemp("mergekit")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    for name, settings in LORAS.items():
        model = get_peft_model(base(folder), LoraConfig(task_type="CAUSAL_LM", **settings))
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / name)
    Adapter.load(folder / "ours").save(folder / "ours", overwrite=True)
    merge(adapters(folder), "task_arithmetic", WEIGHTS).save_adapter(folder / "merged")
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Callable[[str], dict[str, Tensor]]:
    """Name of a case -> the weights that mergekit writes."""
    cases = CASES | DROPPED | {"merged": MERGED}
    files = {name: f"case{number}" for number, name in enumerate(cases)}
    for name, case in cases.items():
        (folder / f"{files[name]}.yaml").write_text(configuration(case), encoding="utf-8")
    assert ENVIRONMENT.exists(), "mergekit is not installed: `make peers` does that"
    command = [ENVIRONMENT / "bin" / "python", "-c", DRIVER, *files.values()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return lambda name: load_file(folder / files[name] / "model.safetensors")


def configuration(case: Case) -> str:
    models = [
        {"model": f"base+{name}", "parameters": {"weight": weight} | case.per_model}
        for name, weight in zip(case.names, case.weights, strict=True)
    ]
    config = {"merge_method": case.peer, "dtype": "float32", "models": models}
    config |= {"base_model": "base"} if case.based else {}
    return yaml.safe_dump(config | {"parameters": case.parameters})


def base(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)


def adapters(folder: Path, names: Iterable[str] = LORAS) -> list[Adapter]:
    return [Adapter.load(folder / name) for name in names]


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], before: nn.Module) -> None:
    """Equal weights; where they were changed, equal updates as well."""
    assert actual.keys() == expected.keys()
    changed = 0
    for name, weight in before.state_dict().items():
        assert actual[name].dtype == torch.float32
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-6)
        update = actual[name] - weight
        if update.any():
            changed += 1
            assert (actual[name] - expected[name]).norm() < 1e-5 * update.norm(), name
    assert changed >= 4  # q_proj and v_proj of two layers


def merge_as(case: Case, folder: Path) -> Merged:
    weights = case.weights if case.weighted else None
    merged = merge(adapters(folder, case.names), case.method, weights, **case.options)
    return merged.scaled(case.coefficient)


@pytest.mark.parametrize("name", CASES)
def test_the_same_weights_as_mergekit(folder, theirs, name):
    model = base(folder)
    with merge_as(CASES[name], folder).apply_to(model):
        assert_same(model.state_dict(), theirs(name), base(folder))


@pytest.mark.parametrize("name", DROPPED)
def test_what_chance_leaves_is_rescaled_as_in_mergekit(folder, theirs, name):
    model, before = base(folder), base(folder).state_dict()
    with merge_as(DROPPED[name], folder).apply_to(model):
        for merged in (model.state_dict(), theirs(name)):
            for module, update in Adapter.load(folder / "plain").updates.items():
                full = update.dense()
                left = merged[f"{module}.weight"] - before[f"{module}.weight"]
                kept = left.abs() > 1e-6
                assert 0.4 < kept.float().mean() < 0.6
                factor = full.abs().sum() / (full * kept).abs().sum()
                torch.testing.assert_close(left, full * kept * factor, rtol=1e-4, atol=1e-5)


def test_mergekit_takes_a_merged_adapter(folder, theirs):
    model = base(folder)
    with merge(adapters(folder), "task_arithmetic", WEIGHTS).apply_to(model):
        assert_same(model.state_dict(), theirs("merged"), base(folder))
