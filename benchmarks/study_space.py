"""What a study of the ways to confine A chooses from, and what it measures first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import PreTrainedModel

from benchmarks.arms import ArmSettings
from benchmarks.suites import Suite
from osrm.targets import resolve_targets
from trainers.backbone import ModelRef, auto_class, load_skeleton
from trainers.settings import AdapterSettings, SubspaceSettings, effective
from trainers.training import check_targets

if TYPE_CHECKING:
    from optuna import Trial

INITS = ("lora", "official", "osrm", "contrastive", "wiener")
RHOS = (0.01, 0.05, 0.2)
MUS = (0.05, 0.15, 1.0)
CONSTRAINTS = ("init", "freeze", "project")
SCALES = ("unit", "matched")
PENALTIES = (0.0, 3.0, 30.0, 300.0)
# Relative to the suite's: 8, 16, 32 where its rank is 8, and k 16, 48, 96.
RANKS = (1, 2, 4)
DIMENSIONS = (2, 6, 12)
RATES = (0.5, 1.0, 2.0)

REFERENCES: dict[str, dict[str, Any]] = {
    "plain LoRA": {"init": "lora"},
    "the paper": {"init": "osrm", "constraint": "init", "scale": "unit"},
    "the released code": {"init": "official", "constraint": "init", "scale": "unit"},
    "contrastive": {
        "init": "contrastive",
        "rho": 0.05,
        "constraint": "project",
        "k": 6,
        "scale": "matched",
    },
}
REFERENCES["contrastive, penalised"] = REFERENCES["contrastive"] | {"leak_penalty": 30.0}
REFERENCES["wiener, penalised"] = {"init": "wiener", "mu": 0.15, "leak_penalty": 30.0}
# Measured first only where PEFT's own choice of modules is another than the suite's.
ELSEWHERE = {
    "plain LoRA at PEFT's modules": {"init": "lora", "modules": "peft"},
    "the paper at PEFT's modules": REFERENCES["the paper"] | {"modules": "peft"},
}


class Space:
    """What the search chooses from, sized for the suite and its model.

    Args:
        suite: Says where to start from.
        model: Says what fits.
    """

    def __init__(self, suite: Suite, model: ModelRef) -> None:
        self.suite = suite
        (kind, *_) = {auto_class(task.kind) for task in suite.tasks.values()}
        skeleton = load_skeleton(model.path, kind)
        self.targets = _targets(skeleton, suite.adapter)
        modules = [m for names in self.targets.values() for m in resolve_targets(skeleton, names)]
        self.width = min(min(skeleton.get_parameter(f"{m}.weight").shape) for m in modules)

    @property
    def ranks(self) -> list[int]:
        """Those that fit the model."""
        ranks = [factor * self.suite.adapter.rank for factor in RANKS]
        return [rank for rank in ranks if rank <= self.width]

    @property
    def rates(self) -> list[float]:
        """Learning rates."""
        return [factor * self.suite.train.learning_rate for factor in RATES]

    def choices(self) -> list[Any]:
        """All there is to choose from: a journal of other choices cannot be continued."""
        fixed = [INITS, RHOS, MUS, CONSTRAINTS, SCALES, PENALTIES, DIMENSIONS]
        return [*fixed, self.targets, self.ranks, self.rates]

    def propose(self, trial: Trial) -> ArmSettings:
        """The arm that a trial stands for: only what applies is asked for."""
        choose = trial.suggest_categorical
        chosen: dict[str, Any] = {"init": choose("init", INITS)}
        if chosen["init"] == "contrastive":
            chosen["rho"] = choose("rho", RHOS)
        if chosen["init"] == "wiener":
            chosen["mu"] = choose("mu", MUS)
        if chosen["init"] not in ("lora", "wiener"):
            chosen["constraint"] = choose("constraint", CONSTRAINTS)
            chosen["scale"] = choose("scale", SCALES)
        if chosen.get("constraint") == "project":
            chosen["k"] = choose("k", DIMENSIONS)
        chosen["leak_penalty"] = choose("leak_penalty", PENALTIES)
        chosen["modules"] = choose("modules", list(self.targets))
        rank = choose("rank", self.ranks)
        return self.arm(chosen, rank, choose("learning_rate", self.rates))

    def arm(
        self, chosen: dict[str, Any], rank: int | None = None, rate: float | None = None
    ) -> ArmSettings:
        """An arm from what was chosen about modules and A ('k' relative to the suite's rank)."""
        base = self.suite.adapter
        chosen = dict(chosen)
        targets = self.targets[chosen.pop("modules", "suite")]
        rank = rank or base.rank
        if "k" in chosen:
            chosen["k"] = min(max(chosen["k"] * base.rank, rank), self.width)
        # The same scale at every rank: alpha / rank, or rsLoRA's alpha / sqrt(rank).
        alpha = base.alpha * (rank / base.rank) ** (0.5 if base.rslora else 1)
        adapter = replace(base, rank=rank, alpha=alpha, targets=targets)
        train = self.suite.train
        train = replace(train, learning_rate=train.learning_rate if rate is None else rate)
        arm = ArmSettings("", adapter, train, SubspaceSettings(**chosen))
        return replace(arm, name=self.name(arm))

    def plain(self, arm: ArmSettings) -> ArmSettings:
        """Plain LoRA at the same modules, with the same rank and learning rate."""
        plain = replace(arm, subspace=SubspaceSettings("lora"))
        return replace(plain, name=self.name(plain))

    def name(self, arm: ArmSettings) -> str:
        """What distinguishes the arm, such as contrastive0.05+project48+matched+leak30."""
        subspace = effective(arm.subspace)
        parts = [subspace["init"]]
        if subspace["init"] in ("contrastive", "wiener"):
            parts[0] += f"{subspace['mu' if 'mu' in subspace else 'rho']:g}"
        if subspace.get("constraint") in ("freeze", "project"):
            parts.append(f"{subspace['constraint']}{subspace.get('k', '')}")
        if subspace.get("scale") == "matched":
            parts.append("matched")
        if subspace["leak_penalty"]:
            parts.append(f"leak{subspace['leak_penalty']:g}")
        if arm.adapter.rank != self.suite.adapter.rank:
            parts.append(f"r{arm.adapter.rank}")
        if arm.adapter.targets != self.suite.adapter.targets:
            parts.append("-".join(arm.adapter.targets))
        if arm.train.learning_rate != self.suite.train.learning_rate:
            parts.append(f"lr{arm.train.learning_rate:g}")
        return "+".join(parts)

    def references(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Names and parameters of what is measured first."""
        common = {
            "leak_penalty": 0.0,
            "modules": "suite",
            "rank": self.suite.adapter.rank,
            "learning_rate": self.suite.train.learning_rate,
        }
        references = REFERENCES | (ELSEWHERE if "peft" in self.targets else {})
        for name, chosen in references.items():
            yield name, common | chosen


def _targets(skeleton: PreTrainedModel, adapter: AdapterSettings) -> dict[str, list[str]]:
    """The suite's target modules, and what PEFT adapts where nobody says what to, if different."""
    suite = check_targets(skeleton, adapter)
    targets = {"suite": adapter.targets}
    peft = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(skeleton.config.model_type)
    if isinstance(peft, list) and resolve_targets(skeleton, peft) != suite:
        targets["peft"] = peft
    return targets
