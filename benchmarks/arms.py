"""What a bench compares: arms, each a name for settings that differ from the suite's."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import yaml

from benchmarks.schema import checked, read_yaml
from benchmarks.suites import Suite
from merge_algorithms.errors import UserError
from merge_algorithms.files import atomic_file
from trainers.settings import (
    AdapterSettings,
    Init,
    SubspaceSettings,
    TrainSettings,
    effective,
)

NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"
# What a study chooses beside the subspace.
SEARCHED = frozenset({"targets", "rank", "alpha", "rslora", "learning_rate"})


@dataclass(frozen=True)
class ArmSettings:
    """How the adapters of one arm are trained.

    Attributes:
        name: What tables and results.csv call it.
        adapter: LoRA settings.
        train: Training settings.
        subspace: Where A starts and what it may do.
        joint: One adapter for all tasks, trained on their rows together: the upper reference.
    """

    name: str
    adapter: AdapterSettings
    train: TrainSettings
    subspace: SubspaceSettings
    joint: bool = False

    def overrides(self, suite: Suite, always: Collection[str] = ()) -> dict[str, Any]:
        """What an arms file says of this arm: all about A, and what differs from the suite.

        Args:
            suite: Says the rest.
            always: Names of settings that are said even where they are the suite's.
        """
        said: dict[str, Any] = {} if self.joint else {"subspace": effective(self.subspace)}
        for key, own, base in (
            ("adapter", asdict(self.adapter), asdict(suite.adapter)),
            ("train", asdict(self.train), asdict(suite.train)),
        ):
            worth = {k: value for k, value in own.items() if k in always or value != base[k]}
            if worth:
                said[key] = worth
        if self.joint:
            said["joint"] = True
        return said


def arms_of_inits(
    inits: Sequence[Init], subspace: SubspaceSettings, suite: Suite
) -> list[ArmSettings]:
    """An arm for every initialisation, all else being equal; plain LoRA is not confined."""
    return [
        ArmSettings(
            name=init,
            adapter=suite.adapter,
            train=suite.train,
            subspace=SubspaceSettings("lora")
            if init == "lora"
            else _completed(replace(subspace, init=init), suite),
        )
        for init in inits
    ]


class _Overrides(TypedDict, total=False):
    """One arm of an arms file."""

    adapter: AdapterSettings
    train: TrainSettings
    subspace: SubspaceSettings
    joint: bool


class _File(TypedDict, total=False):
    """An arms file."""

    arms: dict[str, _Overrides]


def load_arms(path: Path, suite: Suite) -> list[ArmSettings]:
    """Read an arms file: `arms: {name: {subspace: {..}, adapter: {..}, train: {..}}}`.

    An arm is plain LoRA with the suite's settings, but for what it says.

    Raises:
        UserError: No such file, an unknown key, a value of the wrong type or one that plain LoRA
            has no use for; the message names the file.
    """
    raw = read_yaml(path)
    tree = checked(raw if raw is not None else {}, _File, str(path), "")
    if not tree.get("arms"):
        raise UserError(f"{path} has no arms: write 'arms: {{name: {{subspace: {{..}}}}}}'")
    return [_arm(name, values, suite, path) for name, values in tree["arms"].items()]


def save_arms(path: Path, arms: Sequence[ArmSettings], suite: Suite) -> None:
    """Write an arms file that `load_arms` reads back, given the same suite.

    What a study chooses stays as it is with other flags, presets or suites too.
    """
    tree = {"arms": {arm.name: arm.overrides(suite, SEARCHED) for arm in arms}}
    text = yaml.safe_dump(tree, sort_keys=False)
    with atomic_file(path) as file:
        file.write_text(text, encoding="utf-8")


def _arm(name: str, values: Mapping[str, Any], suite: Suite, path: Path) -> ArmSettings:
    if not re.fullmatch(NAME, name):
        raise UserError(f"{path} calls an arm '{name}': use letters, digits, '.', '+', '-' and '_'")
    given = values.get("subspace", {})
    subspace = _completed(SubspaceSettings(**{"init": "lora"} | given), suite)
    # All that was written counts, a default too: who writes it expects it to do something.
    if useless := [key for key in given if key not in effective(subspace)]:
        raise UserError(
            f"{path} gives arm '{name}' a subspace.{useless[0]}, which has no effect with init"
            f" '{subspace.init}' and constraint '{subspace.kept}': name others, or leave out"
            f" {useless[0]}"
        )
    joint = values.get("joint", False)
    if joint and subspace != SubspaceSettings("lora"):
        raise UserError(
            f"{path} gives arm '{name}' a subspace, but joint training has no other tasks to stay"
            " clear of: leave out its subspace"
        )
    return ArmSettings(
        name=name,
        joint=joint,
        adapter=replace(suite.adapter, **values.get("adapter", {})),
        train=replace(suite.train, **values.get("train", {})),
        subspace=subspace,
    )


def _completed(subspace: SubspaceSettings, suite: Suite) -> SubspaceSettings:
    """With the init's own `output_mu`: a bench collects the gradients, of tasks with heads."""
    language = any(task.kind == "causal_lm" for task in suite.tasks.values())
    return subspace if language else subspace.with_gradients()
