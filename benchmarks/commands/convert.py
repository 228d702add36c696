"""`osrm convert`: what was trained without a subspace, put into one afterwards (warm start)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from benchmarks.commands.common import (
    MODEL_HELP,
    check_adapter_directory,
    check_apart,
    resolve,
)
from benchmarks.commands.statistics import check_padded, check_untuned, named, read_files
from merge_algorithms import Adapter
from merge_algorithms.errors import UserError
from trainers.settings import SubspaceSettings, effective, idle

if TYPE_CHECKING:
    from osrm import Converted, Covariance, Energies
    from trainers.backbone import ModelRef

EXAMPLE = (
    "Example: osrm convert adapters/trec --covariances covariances/trec.safetensors"
    " covariances/stsb.safetensors -o converted/trec. Every update dW becomes B A, the rows of A in"
    " the directions in which the other tasks' inputs have the least energy and B the closest fit:"
    " nothing is trained. It interferes less and does less, so train on from there, or judge it"
    " with osrm eval. A larger --rank and --subspace.init contrastive keep more of the update."
)


def add_arguments(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Flags of `osrm convert`."""
    parser.epilog = EXAMPLE
    parser.add_argument(
        "source",
        type=str,
        help="PEFT LoRA directory (or Hub id), whose head comes along; with --base the directory,"
        " safetensors file or Hub id of a model that was fine-tuned whole",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these arguments")
    parser.add_argument(
        "--base",
        type=str | None,
        default=None,
        help=f"for a model that was fine-tuned whole, what it was before; {MODEL_HELP}",
    )
    parser.add_argument(
        "--task",
        type=str | None,
        default=None,
        help="its own task among the covariances (default: the task that the adapter records, or"
        " its directory's name); needed with --base",
    )
    parser.add_argument(
        "--covariances",
        nargs="+",
        type=str,
        default=[],
        help="covariance files from osrm covariance, of its own task and of the others; TASK=PATH"
        " names the task of a file that does not record it",
    )
    parser.add_argument(
        "--rank",
        type=int | None,
        default=None,
        help="rank of the result (default: the adapter's largest; needed with --base)",
    )
    parser.add_class_arguments(
        SubspaceSettings,
        "subspace",
        skip={"constraint", "k", "energy", "output_mu", "leak_penalty"},
    )
    parser.set_defaults({"subspace.init": "osrm"})
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="adapter directory to write"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing adapter")


def run(config: Namespace, raw: Namespace) -> None:
    """Convert, save, say what was kept."""
    from osrm import (
        Covariance,
        convert_adapter,
        convert_checkpoint,
        module_energies,
        with_prefix_of,
    )
    from trainers.subspace import task_subspace

    check_adapter_directory(config.output, config.overwrite)
    if config.output.resolve() == Path(config.source).resolve():
        raise UserError(f"{config.output} is what is to be converted: choose another -o")
    files = [path for _, path in map(named, config.covariances)]
    check_apart([config.output], [config.source, *files, *filter(None, [config.base])])
    subspace = _subspace(config)
    model = None if config.base is None else resolve(config.base)
    adapter = _adapter(config) if model is None else None
    task, rank = _task_and_rank(config, adapter)
    trained_on = _fingerprint(model, adapter)
    covariances = read_files(Covariance, config.covariances, lambda name: trained_on)
    if adapter is not None:
        covariances = with_prefix_of(covariances, adapter.updates)
    own = _own(covariances, task, subspace)
    moments = own.by_module()
    transposed = model is not None and _is_transposed(model, own)
    if adapter is not None:
        _check_modules(adapter, own, task)
    state = task_subspace(covariances, task, rank, subspace, progress=True)
    assert state is not None, "plain LoRA is refused"
    before = None
    if adapter is not None:
        converted = convert_adapter(adapter, state, moments)
        before = module_energies(adapter, covariances, task)
    else:
        assert model is not None
        converted = convert_checkpoint(
            model.path,
            config.source,
            state,
            name=task,
            base_model=model.name,
            fan_in_fan_out=transposed,
            own=moments,
            progress=True,
        )
    fingerprints = {name: covariance.fingerprint for name, covariance in covariances.items()}
    made = replace(converted.adapter, info=_info(converted, task, model, subspace, fingerprints))
    made.save(config.output, config.overwrite)
    print(
        f"{config.output}: task '{task}' in the {subspace.init} subspace, rank {rank},"
        f" {len(made.updates)} modules\n"
        f"kept of the update's energy: {_spread(converted.kept)}\n"
        f"kept of its output energy on its own inputs: {_spread(converted.output_kept)}\n"
        f"{_leaked(module_energies(made, covariances, task), before)}"
    )


def _subspace(config: Namespace) -> SubspaceSettings:
    """What to convert into; UserError for settings that nothing can be converted into."""
    subspace: SubspaceSettings = config.subspace
    if not subspace.has_rows:
        raise UserError(
            f"--subspace.init {subspace.init} is no subspace: choose osrm, official or contrastive"
        )
    if useless := idle(subspace):
        raise UserError(
            f"--subspace.{useless[0]} has no effect with init '{subspace.init}': leave it out, or"
            " choose another"
        )
    if config.rank is not None and config.rank < 1:
        raise UserError(f"--rank {config.rank} is not possible: give a rank of at least 1")
    return subspace


def _fingerprint(model: ModelRef | None, adapter: Adapter | None) -> str | None:
    """Of the base model, as far as it is known."""
    if model is not None:
        return model.fingerprint
    return adapter.info.get("model_fingerprint") if adapter is not None else None


def _adapter(config: Namespace) -> Adapter:
    path = Path(config.source)
    if (path / "config.json").exists() and not (path / "adapter_config.json").exists():
        raise UserError(
            f"{path} is a model, not an adapter: say with --base what it was before it was"
            " fine-tuned"
        )
    return Adapter.load(config.source)


def _task_and_rank(config: Namespace, adapter: Adapter | None) -> tuple[str, int]:
    """As given, else the adapter's."""
    if adapter is not None:
        ranks = [update.rank for update in adapter.updates.values()]
        return config.task or adapter.name, config.rank or max(ranks)
    if config.task is None or config.rank is None:
        missing = "--task" if config.task is None else "--rank"
        raise UserError(f"{missing} is missing: a fine-tuned model does not say which")
    return config.task, config.rank


def _own(
    covariances: Mapping[str, Covariance], task: str, subspace: SubspaceSettings
) -> Covariance:
    """The task's own covariance, after checking that there are others of the same kind."""
    from osrm.covariance import others_of

    if not covariances:
        raise UserError(
            f"--covariances is missing: give the files of '{task}' and of the other tasks, from"
            " osrm covariance"
        )
    others_of(covariances, task)
    check_untuned(covariances.values())
    if subspace.init == "official":
        check_padded(covariances.values())
    return covariances[task]


def _check_modules(adapter: Adapter, own: Covariance, task: str) -> None:
    """UserError unless the covariances are of the adapter's modules."""
    for module, update in adapter.updates.items():
        if module not in own.modules:
            own.matrix(module)  # says which there are
        width = len(own.means[own.modules[module]])
        if width != update.shape[1]:
            raise UserError(
                f"{module} reads {width} features in the covariance of '{task}' and"
                f" {update.shape[1]} in the adapter: collect it on the adapter's model"
            )


def _is_transposed(model: ModelRef, own: Covariance) -> bool:
    """Whether weights are stored (d_in, d_out); UserError if the model lacks the modules."""
    from merge_algorithms.modules import is_transposed
    from osrm import resolve_targets
    from trainers.backbone import auto_class, load_skeleton

    skeleton = load_skeleton(model.path)
    if any(module.startswith(f"{skeleton.base_model_prefix}.") for module in own.modules):
        skeleton = load_skeleton(model.path, auto_class("causal_lm"))
    resolve_targets(skeleton, list(own.modules))
    found = {is_transposed(skeleton.get_submodule(module)) for module in own.modules}
    if len(found) > 1:
        raise UserError(
            f"{model.name} stores some of the modules' weights transposed and others not (Conv1D"
            " and Linear): collect the covariances of one kind, and convert that"
        )
    return found.pop()


def _info(
    converted: Converted,
    task: str,
    model: ModelRef | None,
    subspace: SubspaceSettings,
    covariances: Mapping[str, str],
) -> dict[str, Any]:
    """The adapter's osrm.json without what is true of the original only."""
    if model is not None:
        info = {"format": 1, "task": task, "model": model.name}
        info["model_fingerprint"] = model.fingerprint
    else:
        outdated = {"validation", "diagnostics"}
        info = {k: v for k, v in converted.adapter.info.items() if k not in outdated}
        info = {"format": 1, "task": task} | info
    kept = {"kept": converted.kept, "output_kept": converted.output_kept}
    return info | {"subspace": effective(subspace), "covariances": covariances, "converted": kept}


def _leaked(after: Mapping[str, Energies], before: Mapping[str, Energies] | None) -> str:
    """How much is left of what the update does to the other tasks' inputs, and beside its own."""
    from osrm import leaked_over_own

    ratio = f"leaked / own energy: {leaked_over_own(after.values()):.3g}"
    if before is None:
        return ratio
    left, was = (sum(e.leaked_shift for e in found.values()) for found in (after, before))
    share = _percent(left / was) if was > 0 else "there was none"
    earlier = f", {leaked_over_own(before.values()):.3g} before" if was > 0 else ""
    return f"kept of its output energy on the other tasks' inputs: {share}\n{ratio}{earlier}"


def _spread(shares: Mapping[str, float]) -> str:
    """Mean, least and most, and where."""
    least, most = (pick(shares, key=lambda module: shares[module]) for pick in (min, max))
    mean = sum(shares.values()) / len(shares)
    return (
        f"mean {_percent(mean)}, least {_percent(shares[least])} ({least}),"
        f" most {_percent(shares[most])} ({most})"
    )


def _percent(share: float) -> str:
    """Three digits, however small it is."""
    return f"{100 * share:.3g}%"
