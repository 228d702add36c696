"""Merged.save_checkpoint: the same weights as apply_to and save_pretrained, to the last bit."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from merge_algorithms import Adapter, LowRank, Merged, UserError, merge
from merge_algorithms.layout import Layout

TOKENS = torch.arange(24).reshape(3, 8) * 7 % 64


def bert(name: str = "BertForSequenceClassification") -> PreTrainedModel:
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        num_labels=3,
    )
    return getattr(transformers, name)(config)


def llama(**changes) -> PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        **changes,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=64,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config)


BERT = ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"]
LLAMA = [f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.v_proj", "mlp.down_proj")]
# c_proj of the attention is square: its orientation is not seen in its shape.
GPT2 = [f"transformer.h.{i}.attn.{m}" for i in (0, 1) for m in ("c_attn", "c_proj")]
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], list[str]]] = {
    "bert": (bert, BERT),
    "llama": (llama, LLAMA),
    "gpt2": (gpt2, GPT2),
}


def saved(model: PreTrainedModel, path: Path, dtype: torch.dtype = torch.float32, **how) -> Path:
    model.to(dtype).save_pretrained(path, **how)
    return path


def merged_for(model: PreTrainedModel, modules: list[str], method="task_arithmetic") -> Merged:
    def shape(module: str) -> tuple[int, int]:
        layer = model.get_submodule(module)
        weight = layer.weight
        return tuple(weight.T.shape if type(layer).__name__ == "Conv1D" else weight.shape)

    draw = torch.Generator().manual_seed(0)
    adapters = []
    for name in ("one", "two"):
        updates = {}
        for module in modules:
            d_out, d_in = shape(module)
            b = torch.randn(d_out, 3, generator=draw) / 30
            updates[module] = LowRank(b, torch.randn(3, d_in, generator=draw))
        heads = {name: {"classifier.bias": torch.randn(3, generator=draw)}}
        adapters.append(Adapter(name, updates, heads, info={"tasks": {name: {"kind": "c"}}}))
    return merge(adapters, method)


def read(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("model*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def assert_same_tensors(actual: Path, expected: Path) -> None:
    x, y = read(actual), read(expected)
    assert x.keys() == y.keys()
    for key in x:
        assert x[key].dtype == y[key].dtype
        assert torch.equal(x[key], y[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "method"),
    [("bert", "task_arithmetic"), ("llama", "ties"), ("gpt2", "task_arithmetic")],
)
def test_equals_apply_and_save_to_the_last_bit(tmp_path, kind, method, dtype):
    build, modules = MODELS[kind]
    torch.manual_seed(0)
    model = build()
    merged = merged_for(model, modules, method).scaled(0.7)
    size = {"max_shard_size": "20KB"} if kind == "llama" else {}
    base = saved(model, tmp_path / "base", dtype, **size)
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert (len(shards) > 1) == (kind == "llama")
    before = {path.name: path.read_bytes() for path in base.iterdir()}

    merged.save_checkpoint(tmp_path / "out", base)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before

    again = type(model).from_pretrained(base, dtype=dtype)
    merged.apply_to(again)
    saved(again, tmp_path / "expected", dtype, **size)
    assert_same_tensors(tmp_path / "out", tmp_path / "expected")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == shards

    with torch.no_grad():
        out, expected = (
            type(model).from_pretrained(tmp_path / name, dtype=dtype).eval()(TOKENS).logits
            for name in ("out", "expected")
        )
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("trained", "stored"),
    [("BertForSequenceClassification", "BertModel"), ("BertModel", "BertForMaskedLM")],
)
def test_names_may_differ_by_a_prefix(tmp_path, trained, stored):
    """Adapters of a classifier fit the bare backbone's checkpoint, and the other way round."""
    torch.manual_seed(0)
    model = bert(stored)
    base = saved(model, tmp_path / "base")
    names = [name if trained != "BertModel" else name.removeprefix("bert.") for name in BERT]
    merged = merged_for(bert(trained), names)
    merged.save_checkpoint(tmp_path / "out", base)
    own = model if stored == "BertModel" else model.bert
    changed = {
        name.removeprefix("bert."): merged.updates[n] for name, n in zip(BERT, names, strict=True)
    }
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "out")
    for key, x in own.state_dict().items():
        update = changed.get(key.removesuffix(".weight"))
        expected = x if update is None else x + update.rows(0, update.shape[0])
        assert torch.equal(loaded.state_dict()[key], expected)


def test_embeddings_are_updated_unless_they_are_tied(tmp_path):
    update = {"model.embed_tokens": LowRank(torch.ones(32, 1), torch.ones(1, 64))}
    merged = merge([Adapter("a", update, layouts={"model.embed_tokens": Layout("embedding")})])
    base = saved(llama(), tmp_path / "base")
    merged.save_checkpoint(tmp_path / "out", base)
    key = "model.embed_tokens.weight"
    assert torch.equal(read(tmp_path / "out")[key], read(base)[key] + 1)
    tied = saved(llama(tie_word_embeddings=True), tmp_path / "tied")
    with pytest.raises(UserError, match=r"model\.embed_tokens shares its weight with lm_head"):
        merged.save_checkpoint(tmp_path / "again", tied)


def test_what_lies_beside_the_weights(tmp_path, tiny_model):
    base = tiny_model("llama")
    model = transformers.AutoModel.from_pretrained(base)
    merged = merged_for(model, ["layers.0.self_attn.q_proj"])
    merged.save_checkpoint(tmp_path / "out", base)
    for path in base.glob("*.json"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("w3 w4")["input_ids"] == AutoTokenizer.from_pretrained(base)("w3 w4").input_ids
    for name in ("one", "two"):
        head = load_file(tmp_path / "out" / "heads" / f"{name}.safetensors")
        assert torch.equal(head["classifier.bias"], merged.heads[name]["classifier.bias"])
    info = json.loads((tmp_path / "out" / "osrm.json").read_text())
    assert info["merge"]["adapters"] == ["one", "two"]
    assert info["tasks"] == {"one": {"kind": "c"}, "two": {"kind": "c"}}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert "library_name: transformers" in (tmp_path / "out" / "README.md").read_text()


def test_files_of_other_tokenizers_and_libraries_come_along(tmp_path):
    base = saved(llama(), tmp_path / "base")
    wanted = {"bpe.codes", "source.spm", "sp.vocab", "additional_chat_templates/tool.jinja",
              "modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"}  # fmt: skip
    for name in {*wanted, "pytorch_model.bin", "onnx/model.onnx"}:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    merged_for(llama(), LLAMA).save_checkpoint(tmp_path / "out", base)
    made = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    assert wanted <= made
    assert not {"pytorch_model.bin", "onnx/model.onnx"} & made
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == "1_Pooling/config.json"


def test_bases_from_the_hub(tmp_path, monkeypatch):
    asked = []
    base = saved(llama(), tmp_path / "base")

    def fetch(repo_id, allow_patterns, revision):
        asked.append((repo_id, allow_patterns))
        return str(base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    merged_for(llama(), LLAMA).save_checkpoint(tmp_path / "out", "someone/their-model")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ((repository, patterns),) = asked
    assert repository == "someone/their-model"
    assert {"model*.safetensors", "*.spm", "[0-9]*_*/*"} <= {*patterns}
    assert not any(pattern.endswith((".bin", ".py")) for pattern in patterns)


def edit_config(base: Path, **changes) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_bases_that_do_not_fit(tmp_path):
    merged = merged_for(llama(), LLAMA)
    with pytest.raises(UserError, match="no checkpoint directory"):
        merged.save_checkpoint(tmp_path / "out", tmp_path / "nowhere" / "at" / "all")
    other = saved(bert(), tmp_path / "bert")
    with pytest.raises(UserError, match=r"no weight for model\.layers\.0.*the nearest are"):
        merged.save_checkpoint(tmp_path / "out", other)
    wide = merged_for(llama(), LLAMA)
    name = LLAMA[0]
    wide.updates[name] = LowRank(torch.ones(16, 1), torch.ones(1, 33))
    base = saved(llama(), tmp_path / "base")
    with pytest.raises(UserError, match=rf"{name} has a weight of shape \(16, 32\)"):
        wide.save_checkpoint(tmp_path / "out", base)
    twice = merge(
        [
            Adapter(
                "a",
                {
                    n: LowRank(torch.ones(16, 1), torch.ones(1, 32))
                    for n in ("layers.0.self_attn.v_proj", "x.model.layers.0.self_attn.v_proj")
                },
            )
        ]
    )
    with pytest.raises(UserError, match=r"2 modules of the merge could be model\.layers\.0"):
        twice.save_checkpoint(tmp_path / "out", base)
    short = merge(
        [Adapter("a", {"self_attn.v_proj": LowRank(torch.ones(16, 1), torch.ones(1, 32))})]
    )
    with pytest.raises(UserError, match=r"v_proj could be .*layers\.0.* or .*layers\.1"):
        short.save_checkpoint(tmp_path / "out", base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "bert"]


def test_weights_that_transformers_renames_while_loading(tmp_path):
    """A ViT is stored with the names that its classes had before transformers 5."""
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    model = transformers.ViTForImageClassification(config)
    base = saved(model, tmp_path / "base")
    (name,) = [key for key, _ in model.named_modules() if key.endswith("attention.q_proj")]
    assert f"{name}.weight" not in load_file(base / "model.safetensors")
    reason = rf"no weight for {name}.*transformers renames.*use apply_to\(\) and save_pretrained"
    with pytest.raises(UserError, match=reason):
        merged_for(model, [name]).save_checkpoint(tmp_path / "out", base)


def test_damaged_quantised_and_unknown_bases(tmp_path, caplog):
    merged = merged_for(llama(), LLAMA)
    base = saved(llama(), tmp_path / "base")

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match):
            merged.save_checkpoint(tmp_path / "out", base)

    for name in ("MyOwnModel", "pipeline"):
        edit_config(base, architectures=[name])
        refused(f"names the model class '{name}'.*apply_to")
    edit_config(base, architectures=["LlamaForCausalLM"], model_type="mine")
    with caplog.at_level(logging.CRITICAL):
        refused("transformers cannot read .*apply_to")
    edit_config(base, model_type="llama", hidden_size=64)
    refused("has a weight of shape")
    edit_config(base, hidden_size=32, quantization_config={"bits": 4})
    refused("is quantised")
    edit_config(base, quantization_config=None)

    path = base / "model.safetensors"
    content = path.read_bytes()
    tensors = load_file(path)
    save_file(tensors | {f"{LLAMA[0]}.weight": torch.zeros(16, 32, dtype=torch.int8)}, path)
    refused("is of type I8")
    path.write_bytes(content[:-1])
    refused("not a complete safetensors file")
    path.rename(base / "pytorch_model.bin")
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": "lost.safetensors"}}')
    refused(r"lacks lost\.safetensors")
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    refused("lacks")
    for weights in ({}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}, {"weight_map": {}}):
        (base / "model.safetensors.index.json").write_text(json.dumps(weights))
        refused(r"index\.json has no weight_map of tensor names to file names")
    (base / "model.safetensors.index.json").unlink()
    refused("only the pickle pytorch_model.bin, which is never loaded")
    (base / "config.json").unlink()
    refused(r"has no config\.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_outputs_that_exist(tmp_path):
    merged = merged_for(llama(), LLAMA)
    base = saved(llama(), tmp_path / "base")
    merged.save_checkpoint(tmp_path / "out", base)
    with pytest.raises(UserError, match="already exists"):
        merged.save_checkpoint(tmp_path / "out", base)
    merged.scaled(2.0).save_checkpoint(tmp_path / "out", base, overwrite=True)
    key = f"{LLAMA[0]}.weight"
    update = merged.scaled(2.0).updates[LLAMA[0]]
    assert torch.equal(
        read(tmp_path / "out")[key], read(base)[key] + update.rows(0, update.shape[0])
    )
    with pytest.raises(UserError, match="is the base checkpoint itself"):
        merged.save_checkpoint(base, base, overwrite=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not a checkpoint directory"):
        merged.save_checkpoint(tmp_path / "home", base, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "home", "out"]
