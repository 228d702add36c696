"""`osrm convert` on adapters and fine-tuned models on disk, with good and with bad input."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, GPT2Config, GPT2Model

from benchmarks.cli import main
from merge_algorithms import Adapter
from osrm import Covariance, collect_covariance, leaked_own_ratio, module_energies

TASKS = ("half", "size", "same")
Run = Callable[..., str]


@pytest.fixture
def files(trained: Path) -> list[Path]:
    return [trained / f"{task}.safetensors" for task in TASKS]


def bottom(covariances: dict[str, Covariance], task: str, module: str, rank: int) -> Tensor:
    """The eigenvectors of the others' mean second moment with the smallest eigenvalues."""
    others = [c.matrix(module).double() for name, c in covariances.items() if name != task]
    vectors = torch.linalg.eigh(torch.stack(others).mean(0)).eigenvectors
    return vectors[:, :rank].T


def load_all(files: list[Path]) -> dict[str, Covariance]:
    return {path.stem: Covariance.load(path) for path in files}


def ids() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(4, 50, (3, 7), generator=torch.manual_seed(0))}


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**ids())[0]
    return found


def with_updates(model: nn.Module, adapter: Adapter, transposed: bool = False) -> nn.Module:
    """The model with every dW, formed, added to its weights."""
    with torch.no_grad():
        for module, update in adapter.updates.items():
            dw = update.dense()
            model.get_submodule(module).weight.add_(dw.T if transposed else dw)
    return model


def percent(text: str) -> list[float]:
    """Mean, least and most of a line of the summary."""
    return [float(number) for number in re.findall(r"([\d.e+-]+)%", text)]


def test_an_adapter_becomes_the_closest_one_in_the_subspace(
    osrm: Run,
    trained: Path,
    files: list[Path],
    toy_suite: Path,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    out = tmp_path / "converted"
    said = osrm("convert", trained / "half", "--covariances", *files, "-o", out).splitlines()
    original, made = Adapter.load(trained / "half"), Adapter.load(out)
    covariances = load_all(files)
    kept, outputs = {}, {}
    assert set(made.updates) == set(original.updates)
    for module, update in original.updates.items():
        rows, dw = bottom(covariances, "half", module, 4), update.dense().double()
        nearest = dw @ rows.T @ rows
        torch.testing.assert_close(
            made.updates[module].dense().double(), nearest, atol=1e-5, rtol=0
        )
        kept[module] = float(nearest.square().sum() / dw.square().sum())
        c = covariances["half"].matrix(module).double()
        outputs[module] = float((nearest @ c @ nearest.T).trace() / (dw @ c @ dw.T).trace())
    assert said[0] == f"{out}: task 'half' in the osrm subspace, rank 4, {len(kept)} modules"
    for line, shares in ((said[1], kept), (said[2], outputs)):
        values = list(shares.values())
        expected = [sum(values) / len(values), min(values), max(values)]
        assert percent(line) == pytest.approx([100 * x for x in expected], rel=6e-3)
        assert f"({min(shares, key=shares.__getitem__)}), most" in line
    leaks, ratios = [], []
    for each in (original, made):
        leaks.append(
            sum(e.leaked_shift for e in module_energies(each, covariances, "half").values())
        )
        ratios.append(leaked_own_ratio(each, covariances, "half"))
    assert percent(said[3]) == pytest.approx([100 * leaks[1] / leaks[0]], rel=6e-3)
    assert leaks[1] < leaks[0]
    assert said[4] == f"leaked / own energy: {ratios[1]:.3g}, {ratios[0]:.3g} before"

    assert load_file(out / "head.safetensors").keys() == original.heads["half"].keys()
    for key, tensor in load_file(out / "head.safetensors").items():
        assert torch.equal(tensor, original.heads["half"][key])
    base = AutoModel.from_pretrained(tiny_model("bert"))
    expected = output(with_updates(AutoModel.from_pretrained(tiny_model("bert")), made))
    torch.testing.assert_close(
        output(PeftModel.from_pretrained(base, out)), expected, atol=1e-5, rtol=1e-4
    )
    info = json.loads((out / "osrm.json").read_text())
    assert info["task"] == "half"
    assert not {"validation", "diagnostics"} & set(info)
    assert info["converted"]["kept"] == pytest.approx(kept, rel=1e-4)
    assert set(info["covariances"]) == set(TASKS)
    assert "half" in osrm("eval", out, "--suite", toy_suite)


def test_settings_decide_the_subspace(
    osrm: Run, refused: Run, toy_suite: Path, files: list[Path], tmp_path: Path
) -> None:
    # Plain LoRA: what OSRM's initialisation trained is nearly all in the subspace already.
    half = ["--suite", toy_suite, "--task", "half", "--subspace.init", "lora"]
    osrm("train", *half, "-o", tmp_path / "half")
    command = ["convert", tmp_path / "half", "--covariances", *files]
    settings: dict[str, list[object]] = {
        "plain": [],
        "matched": ["--subspace.scale", "matched"],
        "wide": ["--rank", 16],
        "contrastive": ["--subspace.init", "contrastive"],
        "weighted": ["--subspace.weights", "{size: 0, half: 5}"],
    }
    made, kept = {}, {}
    for name, options in settings.items():
        said = osrm(*command, *options, "-o", tmp_path / name)
        made[name] = Adapter.load(tmp_path / name)
        kept[name] = percent(said.splitlines()[1])[0]
    for module, update in made["plain"].updates.items():
        torch.testing.assert_close(
            made["matched"].updates[module].dense(), update.dense(), atol=1e-5, rtol=0
        )
        assert made["wide"].updates[module].rank == 16
        rows = bottom({"half": load_all(files)["half"], "same": load_all(files)["same"]}, "half",
                      module, 4)  # fmt: skip
        a = made["weighted"].updates[module].a.double()
        torch.testing.assert_close(a.T @ a, rows.T @ rows, atol=1e-4, rtol=0)
    assert kept["wide"] > kept["plain"]
    assert kept["contrastive"] != kept["plain"]
    assert "already exists" in refused(*command, "-o", tmp_path / "plain")
    osrm(*command, "--rank", 2, "-o", tmp_path / "plain", "--overwrite")
    assert Adapter.load(tmp_path / "plain").updates[module].rank == 2


def test_a_classifier_of_plain_peft_keeps_its_head(
    osrm: Run, files: list[Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its modules are called bert.encoder.., those of the covariances encoder.."""
    torch.manual_seed(0)

    def classifier() -> nn.Module:
        torch.manual_seed(1)
        return AutoModelForSequenceClassification.from_pretrained(tiny_model("bert"), num_labels=2)

    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=4, init_lora_weights=False, target_modules=["query"]
    )
    get_peft_model(classifier(), config).save_pretrained(tmp_path / "peft")
    command = ["convert", tmp_path / "peft", "--task", "size", "--covariances", *files]
    said = osrm(*command, "--rank", 6, "-o", tmp_path / "out").splitlines()
    assert percent(said[3])[0] < 2, "this one has never seen a subspace"
    original, made = Adapter.load(tmp_path / "peft"), Adapter.load(tmp_path / "out")
    assert made.heads.keys() == {"size"}
    for module, update in original.updates.items():
        rows = bottom(load_all(files), "size", module.removeprefix("bert."), 6)
        nearest = update.dense().double() @ rows.T @ rows
        torch.testing.assert_close(
            made.updates[module].dense().double(), nearest, atol=1e-5, rtol=0
        )
    model = PeftModel.from_pretrained(classifier(), tmp_path / "out")
    expected = with_updates(classifier(), made)
    (head,) = original.heads.values()
    with torch.no_grad():
        for key, tensor in head.items():
            expected.get_parameter(key).copy_(tensor)
    torch.testing.assert_close(output(model), output(expected), atol=1e-5, rtol=1e-4)
    text = osrm("inspect", f"size={tmp_path / 'out'}", "--covariances", *files)
    assert "leaked/own" in text


def tune(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def check_checkpoint(
    out: Path, base: nn.Module, tuned: nn.Module, covariances: dict[str, Covariance], rank: int
) -> None:
    """The result is the difference of the weights, projected, and stock PEFT computes with it."""
    made = Adapter.load(out)
    transposed = isinstance(base, GPT2Model)
    for module, update in made.updates.items():
        dw = tuned.get_submodule(module).weight - base.get_submodule(module).weight
        dw = (dw.T if transposed else dw).detach().double()
        rows = bottom(covariances, "half", module, rank)
        torch.testing.assert_close(update.dense().double(), dw @ rows.T @ rows, atol=1e-5, rtol=0)
    assert set(made.updates) == set(covariances["half"].modules)
    plain = output(base)
    model = PeftModel.from_pretrained(base, out)
    found = output(model)
    model = model.unload()
    torch.testing.assert_close(
        found, output(with_updates(model, made, transposed)), atol=1e-5, rtol=1e-4
    )
    assert not torch.allclose(found, plain, atol=1e-3)


def test_a_model_fine_tuned_whole(
    osrm: Run, files: list[Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tiny_model("bert")
    tuned = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    tune(tuned)
    tuned.save_pretrained(tmp_path / "tuned")
    said = osrm("convert", tmp_path / "tuned", "--base", path, "--task", "half", "--rank", 5,
                "--covariances", *files, "-o", tmp_path / "out")  # fmt: skip
    assert "rank 5, 4 modules" in said
    assert "before" not in said
    check_checkpoint(
        tmp_path / "out", AutoModel.from_pretrained(path), tuned.bert, load_all(files), 5
    )
    info = json.loads((tmp_path / "out" / "osrm.json").read_text())
    assert info["task"] == "half"
    assert info["model"] == str(path)


def test_a_model_with_transposed_weights(osrm: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = GPT2Model(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2))
    base.save_pretrained(tmp_path / "base")
    covariances, files = {}, []
    for i, task in enumerate(TASKS):
        batch = {"input_ids": torch.randint(0, 16, (8, 9)) + 16 * i}
        covariances[task] = collect_covariance(base, [batch], ["c_attn"], meta={"task": task})
        files.append(tmp_path / f"{task}.safetensors")
        covariances[task].save(files[-1])
    tuned = GPT2Model.from_pretrained(tmp_path / "base")
    tune(tuned)
    tuned.save_pretrained(tmp_path / "tuned")
    osrm("convert", tmp_path / "tuned", "--base", tmp_path / "base", "--task", "half",
         "--rank", 4, "--covariances", *files, "-o", tmp_path / "out")  # fmt: skip
    check_checkpoint(tmp_path / "out", base, tuned, covariances, 4)


def test_bad_input(
    refused: Run,
    trained: Path,
    files: list[Path],
    toy_suite: Path,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    half, out = trained / "half", tmp_path / "out"
    odd = tmp_path / "odd"
    command = ["covariance", "--suite", toy_suite, "--task", "size"]
    other = {
        "roberta": ["--model", tiny_model("roberta")],
        "value": ["--adapter.targets", "[value]"],
    }
    for name, options in other.items():
        made = [*command, *options, "-o", tmp_path / f"{name}.safetensors"]
        assert main([str(argument) for argument in made]) == 0
    adapter = Adapter.load(half)
    updates = {m.replace("query", "qeury"): u for m, u in adapter.updates.items()}
    Adapter("half", updates, {}, adapter.config).save(odd)
    model = tiny_model("bert")
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(files[1].read_bytes()[:1000])
    own, rest = files[0], ["--covariances", *files]
    base: list[object] = ["--base", model]
    cases: list[tuple[list[object], str]] = [
        ([half], "--covariances is missing"),
        ([half, "--covariances", own], "'half' is the only task with a covariance"),
        ([half, "--covariances", *files[1:]], "no covariance of task 'half'"),
        ([half, *rest, "--task", "hlaf"], "no covariance of task 'hlaf'; did you mean 'half'"),
        ([half, *rest, "--rank", 0], "--rank 0 is not possible"),
        ([half, *rest, "--rank", 33], "reads 32 features, fewer than the 33 rows"),
        ([half, *rest, "--rank", "four"], "--rank is four"),
        ([half, *rest, "--subspace.init", "lora"], "lora is no subspace"),
        ([half, *rest, "--subspace.init", "orsm"], "did you mean 'osrm'"),
        ([half, *rest, "--subspace.mu", 2], "--subspace.mu has no effect with init 'osrm'"),
        ([half, *rest, "--subspace.init", "official"], "--padded"),
        ([half, *rest, "--subspace.rho", 0, "--subspace.init", "contrastive"], "rho is 0"),
        ([half, *rest, "--subspace.weights", "{siez: 2}"], "did you mean 'size'"),
        ([half, *rest, "--subspace.weights", "{size: -1}"], "weight of task 'size' is -1"),
        ([half, "--covariances", own, tmp_path / "roberta.safetensors"], "fingerprint"),
        ([half, "--covariances", own, tmp_path / "value.safetensors"], "different modules"),
        ([half, "--covariances", own, truncated], "not a complete safetensors file"),
        ([half, "--covariances", own, own], "second covariance of 'half'"),
        ([odd, *rest, "--task", "half"], "self.qeury', did you mean 'encoder"),
        ([tmp_path / "nowhere", *rest], "no adapter directory"),
        ([model, *rest], "is a model, not an adapter: say with --base"),
        ([model, *rest, *base], "--task is missing"),
        ([model, *rest, *base, "--task", "half"], "--rank is missing"),
        ([model, *rest, *base, "--task", "half", "--rank", 4], "equals the base in every module"),
        ([half, *rest, *base, "--task", "half", "--rank", 4], "cannot be read"),
        ([model, *rest, "--base", tiny_model("t5"), "--task", "half", "--rank", 4], "fingerprint"),
    ]
    for arguments, expected in cases:
        said = refused("convert", *arguments, "-o", out)
        assert expected in said, (arguments, said)
    assert "is a file" in refused("convert", half, *rest, "-o", truncated / "out")
    assert "is not an adapter" in refused("convert", half, *rest, "-o", trained, "--overwrite")
    assert "is what is to be converted" in refused(
        "convert", half, *rest, "-o", half, "--overwrite"
    )
    assert not out.exists()


def test_help_teaches_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    example: Any = re.search(r"Example: osrm (convert .*? -o \S+)\.", said)
    from benchmarks.cli import build_parser

    arguments = example[1].split()
    config = build_parser(arguments).parse_args(arguments)
    assert config.convert.source == "adapters/trec"
