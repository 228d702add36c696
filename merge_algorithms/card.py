"""The model card that lies beside an adapter: README.md with the metadata that the Hub reads."""

from __future__ import annotations

import html
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import yaml
from torch import Tensor

from merge_algorithms.hub import is_hub_id
from merge_algorithms.peft_directory import embeds
from merge_algorithms.registry import get_method, methods

if TYPE_CHECKING:
    from merge_algorithms.adapter import Adapter

CARD_FILE = "README.md"
VISIBLE = 1e-6  # the share of energy from which on a loss is more than rounding
Library = Literal["peft", "diffusers", "transformers", "osrm"]

_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")


def model_card(
    record: Mapping[str, Any],
    name: str,
    library: Library,
    config: Mapping[str, Any],
    heads: Mapping[str, Mapping[str, Tensor]],
    lost: Mapping[str, float],
) -> str:
    """The text of README.md.

    Args:
        record: What osrm.json says of the merge: method, options, adapters, weights, coefficient,
            seed, and what is known of its scores.
        name: What the merge is called: its directory.
        library: What loads it: 'peft' or 'diffusers' an adapter, 'transformers' a checkpoint,
            'osrm' a bundle with a model for each adapter.
        config: What the adapters say about their base model, as in adapter_config.json.
        heads: Task -> head, those that lie beside it.
        lost: Module -> share of the energy that truncation lost.

    Returns:
        YAML front matter and Markdown; whatever comes from a file is escaped in both.
    """
    base = config.get("base_model_name_or_path")
    into = {"transformers": "its weights", "osrm": "a bundle with a model for each"}
    metadata = {
        **_base(base, "merge" if library in into else "adapter"),
        "library_name": library,
        "tags": ["merge", "lora", "osrm", record["method"]],
    }
    count = len(record["adapters"])
    weights = zip(record["adapters"], record["weights"], strict=True)
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n",
        f"# {_escape(name)}\n",
        f"{count} LoRA adapter{'' if count == 1 else 's'} of {_code(base or 'an unnamed model')}"
        f" merged into {into.get(library, 'one adapter')} with osrm-merge.\n",
        "## The merge\n",
        _table(["", ""], _facts(record)),
        _table(["adapter", "weight"], [[_code(name), f"{w:g}"] for name, w in weights]),
        *_coefficients(record["coefficient"]),
        *_lost(lost),
        *_scores(record.get("evaluation", {}), lost),
        "## Loading it\n",
        _loading(name, library, config, heads, record.get("evaluation", {}).get("aligned_heads")),
    ]
    return "\n".join(parts)


def adapter_card(adapter: Adapter) -> str:
    """The text of README.md of an adapter that was trained, from its configuration and osrm.json.

    Says what is known and nothing else; escaped as that of a merge is.
    """
    info, config = adapter.info, adapter.config
    subspace = info.get("subspace", {})
    base = adapter.base
    metadata = {
        **_base(base, "adapter"),
        "library_name": "peft",
        "tags": list(dict.fromkeys(["lora", "osrm", subspace.get("init", "lora")])),
    }
    facts = [
        ["rank", f"{config.get('r')}, alpha {config.get('lora_alpha')}"],
        ["modules", _codes(sorted({module.rpartition(".")[2] for module in adapter.updates}))],
    ]
    for part in ("subspace", "train"):
        if settings := info.get(part):
            values = (f"{name} = {json.dumps(value)}" for name, value in settings.items())
            facts.append([part, _codes(values)])
    for part in ("seed", "versions"):
        if value := _listed(info.get(part)):
            facts.append([part, value])
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n",
        f"# {_escape(adapter.name)}\n",
        f"A LoRA adapter of {_code(base or 'an unnamed model')}, trained with osrm-merge.\n",
        *_task(info),
        "## How it was trained\n",
        _table(["", ""], facts),
        *_numbers("Scores on validation rows", ["metric", "score"], info.get("validation")),
        *_numbers("Diagnostics", ["", ""], info.get("diagnostics")),
        "## Loading it\n",
        _loading(adapter.name, "peft", config, adapter.heads),
    ]
    return "\n".join(parts)


def _task(info: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, task in info.get("tasks", {}).items():
        rows.append(["task", f"{_code(name)}, {_escape(task.get('kind', 'of unknown kind'))}"])
        for part in ("text", "labels"):
            if task.get(part):
                rows.append([part, _codes(task[part])])
    return ["## The task\n", _table(["", ""], rows)] if rows else []


def _listed(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{_escape(name)} {_escape(item)}" for name, item in value.items())
    return "" if value is None else _escape(value)


def _numbers(title: str, header: Sequence[str], values: Any) -> list[str]:
    """A section with the numbers among the values, if there are any."""
    found = {name: v for name, v in (values or {}).items() if isinstance(v, int | float)}
    rows = [[_code(name), f"{value:.4g}"] for name, value in found.items()]
    return [f"## {title}\n", _table(header, rows)] if rows else []


def _base(base: Any, relation: str) -> dict[str, Any]:
    """The Hub accepts its own ids only, so a local directory is not named there."""
    known = isinstance(base, str) and is_hub_id(base)
    return {"base_model": base, "base_model_relation": relation} if known else {}


def _facts(record: Mapping[str, Any]) -> list[list[str]]:
    name = record["method"]
    # One task's share of a run-time method can be saved too.
    method = get_method(name, runtime=name not in methods())
    paper = ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", _escape(method.paper))
    rows = [["method", f"{_code(method.name)}: {_escape(method.summary)}"], ["paper", paper]]
    if record["options"]:
        options = (f"{name} = {json.dumps(value)}" for name, value in record["options"].items())
        rows.append(["options", _codes(options)])
    if not isinstance(record["coefficient"], Mapping):
        rows.append(["scale", f"{record['coefficient']:g}"])
    if method.needs:
        rows.append(["statistics", f"the {method.needs} of every adapter's data"])
    if method.seeded:
        rows.append(["seed", str(record["seed"])])
    versions = (f"{package} {version(package)}" for package in ("osrm-merge", "torch", "peft"))
    return [*rows, ["versions", ", ".join(versions)]]


def _coefficients(coefficient: Any) -> list[str]:
    if not isinstance(coefficient, Mapping):
        return []
    modules = defaultdict(list)
    for module, value in coefficient.items():
        modules[value].append(module)
    return [_table(["scale", "of"], [[f"{v:g}", _codes(m)] for v, m in sorted(modules.items())])]


def _lost(lost: Mapping[str, float]) -> list[str]:
    worst = max(lost, key=lambda module: lost[module], default="")
    if not worst or lost[worst] < VISIBLE:
        return []
    mean = sum(lost.values()) / len(lost)
    return [
        "## What the rank leaves out\n",
        "The merged updates have a higher rank than this adapter. Truncation lost"
        f" {mean:.2%} of their energy (squared norm) on average over modules, at most"
        f" {lost[worst]:.2%}, at {_code(worst)}.\n",
    ]


def _scores(evaluation: Mapping[str, Any], lost: Mapping[str, float]) -> list[str]:
    scores: Mapping[str, Mapping[str, Mapping[str, float]]] = evaluation.get("scores", {})
    if not scores:
        return []
    said = "Each task with its own head"
    if "suite" in evaluation:
        said += f", on rows of the suite {_code(evaluation['suite'])}"
    if "trials" in evaluation:
        said += (
            f". The values above are the best of {evaluation['trials']} trials on the validation"
            " rows, so those scores are optimistic"
        )
    if max(lost.values(), default=0) >= VISIBLE:
        said += ". Measured with the merge in full, before the truncation"
    rows = {
        (task, metric): None
        for found in scores.values()
        for task in found
        for metric in found[task]
    }
    table = [
        [
            _escape(task),
            _escape(metric),
            *(_score(s.get(task, {}).get(metric)) for s in scores.values()),
        ]
        for task, metric in rows
    ]
    if means := evaluation.get("means"):
        table.append(
            ["all", "mean of the headline metrics", *(_score(means.get(s)) for s in scores)]
        )
    return ["## Scores\n", f"{said}.\n", _table(["task", "metric", *map(_escape, scores)], table)]


def _score(score: float | None) -> str:
    return "" if score is None else f"{score:.3f}"


def _loading(
    name: str,
    library: Library,
    config: Mapping[str, Any],
    heads: Mapping[str, Mapping[str, Tensor]],
    aligned: Mapping[str, float | None] | None = None,
) -> str:
    kind = _model_class(config)
    base = json.dumps(config.get("base_model_name_or_path") or "BASE_MODEL")
    here = f"{json.dumps(name)})  # this directory, or its id on the Hub"
    heads = {name: head for name, head in heads.items() if head}  # a language model's has none
    embedded = library == "peft" and embeds(heads, config)
    labels = f", num_labels={_labels(heads)}" if embedded else ""
    lines = {
        "peft": [
            "from peft import PeftModel",
            f"from transformers import {kind}",
            "",
            f"base = {kind}.from_pretrained({base}{labels})",
            f"model = PeftModel.from_pretrained(base, {here}",
        ],
        "diffusers": [
            "from diffusers import DiffusionPipeline",
            "",
            f"pipeline = DiffusionPipeline.from_pretrained({base})",
            f"pipeline.load_lora_weights({here}",
        ],
        "transformers": [
            f"from transformers import {kind}",
            "",
            f"model = {kind}.from_pretrained({here}",
        ],
        "osrm": [
            "from merge_algorithms import EmrBundle",
            f"from transformers import {kind}",
            "",
            f"model = {kind}.from_pretrained({base})",
            f"bundle = EmrBundle.load({here}",
            "for task in bundle.rescalers:",
            "    with bundle.merged(task).apply_to(model):",
            "        ...  # the model of that task",
        ],
    }
    text = "\n".join(["```python", *lines[library], "```\n"])
    if heads and not embedded:
        alone = library == "peft" and len(heads) == 1
        where = "head.safetensors" if alone else "heads/, one file per task"
        changed = [name for name in heads if (aligned or {}).get(name) is not None]
        how = "Kept apart, never averaged" if changed else "Kept as trained, never averaged"
        text += f"\n{how}: the heads of {_codes(heads)}, in {where}.\n"
        if changed:
            text += f"Those of {_codes(changed)} are aligned with the merged features.\n"
    return text


def _model_class(config: Mapping[str, Any]) -> str:
    mapping = config.get("auto_mapping") or {}
    named = str(mapping.get("base_model_class", ""))
    if str(mapping.get("parent_library", "")).startswith("transformers.") and named.isidentifier():
        return named
    return _CLASSES.get(str(config.get("task_type")), "AutoModel")


def _labels(heads: Mapping[str, Mapping[str, Tensor]]) -> int:
    (head,) = heads.values()
    return min(len(tensor) for tensor in head.values() if tensor.ndim)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _escape(text: object) -> str:
    """Text that is neither HTML nor Markdown, on one line, fit for a table's cell."""
    return re.sub(
        r"([\\`*_\[\]|#])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False)
    )


def _code(text: object) -> str:
    return "`" + " ".join(str(text).split()).replace("`", "'").replace("|", r"\|") + "`"


def _codes(texts: Iterable[object]) -> str:
    return ", ".join(map(_code, texts))
