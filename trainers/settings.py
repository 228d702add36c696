"""What can be set about one adapter's training. No heavy imports: the command line reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Init = Literal["lora", "osrm", "official", "contrastive", "wiener"]
Constraint = Literal["init", "freeze", "project", "filter"]
Scale = Literal["unit", "matched"]

# The settings that confine A: plain LoRA has no use for them.
CONFINING = frozenset({"constraint", "k", "energy", "scale", "mu", "rho"})


@dataclass
class AdapterSettings:
    """The LoRA adapter.

    Attributes:
        rank: Rank r of every update.
        alpha: LoRA alpha; the update is (alpha / rank) * B @ A.
        dropout: Dropout probability on the adapter's input while training.
        targets: Names of the modules that get an adapter, matched as PEFT does (by suffix).
            'outputs' stands for the output projections of attention and feed-forward blocks
            (BERT's output.dense, Llama's o_proj and down_proj), where the tasks' inputs differ
            most: see osrm separability.
        rslora: Scale by alpha / sqrt(rank) instead of alpha / rank.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["outputs"])
    rslora: bool = False


@dataclass
class SubspaceSettings:
    """Where A starts and what it may do while training.

    Attributes:
        init: 'lora' is PEFT's default; 'osrm' the bottom eigenvectors of the other tasks' input
            covariance (the paper); 'official' the released code's variant from mean vectors;
            'contrastive' (ours) the directions with the most own-task energy per leaked energy;
            'wiener' (ours) is PEFT's default behind a filter that passes each direction by how much
            of its energy is the task's own; at query and value a task that compares two texts
            learns less behind it than with 'lora', at output projections hardly.
        constraint: 'init' only starts A there (the paper); 'freeze' keeps A fixed; 'project'
            keeps A inside the k-dimensional subspace; 'filter', for init 'wiener' only, lets A move
            through the filter only. Default: 'filter' for init 'wiener', 'init' for the others.
        k: Dimension of the subspace for 'project', at least the rank.
        energy: For 'project', a budget in place of k: each module's subspace has as many
            dimensions as let through at most this share of the other tasks' energy.
        scale: Length of A's rows at the start: 'unit' (the paper), or 'matched', at which they let
            through as much own-task energy as plain LoRA's, so that B learns as fast.
        mu: For 'wiener', what a unit of another task's energy that passes the filter costs beside
            one of the own that is lost: the larger, the stricter.
        rho: Damping of 'contrastive' and 'wiener', as a share of the others' mean energy per
            feature; where a few enormous activations are most of it, of ten times the mean
            without them.
        weights: How much each other task counts, in the subspace, the filters and the leak penalty,
            such as {trec: 2.0}; tasks that are not named weigh 1, a pool of covariances as many as
            the tasks in it, and a weight of the task's own is left aside.
        output_mu: Strictness of the filter on what B writes, 0 for none (ours): directions that the
            other tasks' losses read pass it weakly. Works with every init. Which directions those
            are is known once the tasks have been trained without it: see osrm gradients. Default:
            0.15 for init 'wiener' in a bench of tasks with heads, which then trains them twice, and
            in osrm train --gradients; else 0.
        leak_penalty: Weight gamma of the term of the loss that keeps the adapter's outputs on the
            other tasks' inputs small beside the base weights' (ours); 0 for none. Works with every
            init, 'lora' included. Default: 30 for init 'wiener', 0 for the others.
    """

    init: Init = "wiener"
    constraint: Constraint | None = None
    k: int = 48
    energy: float | None = None
    scale: Scale = "unit"
    mu: float = 0.05
    rho: float = 0.05
    weights: dict[str, float] = field(default_factory=dict)
    output_mu: float | None = None
    leak_penalty: float | None = None

    @property
    def kept(self) -> Constraint:
        """The constraint, by default the init's own."""
        return self.constraint or ("filter" if self.init == "wiener" else "init")

    @property
    def gamma(self) -> float:
        """The weight of the leak penalty, by default the init's own."""
        if self.leak_penalty is None:
            return 30.0 if self.init == "wiener" else 0.0
        return self.leak_penalty

    @property
    def nu(self) -> float:
        """Strictness of the filter on what B writes: none, unless one is chosen."""
        return self.output_mu or 0.0

    @property
    def has_rows(self) -> bool:
        """Whether A starts in rows that are computed before training."""
        return self.init not in ("lora", "wiener")

    @property
    def needs_others(self) -> bool:
        """Whether training reads the covariances of other tasks."""
        return self.init != "lora" or self.gamma != 0

    @property
    def needs_gradients(self) -> bool:
        """Whether training reads the gradients of other tasks."""
        return self.nu != 0

    @property
    def confines(self) -> bool:
        """Whether training is other than plain LoRA's."""
        return self.needs_others or self.needs_gradients

    def with_gradients(self) -> SubspaceSettings:
        """The same where the other tasks' gradients are at hand: the init's own `output_mu`."""
        if self.output_mu is None and self.init == "wiener":
            return replace(self, output_mu=0.15)
        return self


def effective(settings: SubspaceSettings) -> dict[str, Any]:
    """The settings without those that have no effect beside the others."""
    unused: set[str] = set()
    if settings.init == "lora":
        unused |= CONFINING
    if settings.init not in ("contrastive", "wiener"):
        unused.add("rho")
    unused.add("scale" if settings.init == "wiener" else "mu")
    if settings.kept != "project":
        unused |= {"k", "energy"}
    else:
        unused.add("energy" if settings.energy is None else "k")
    if not settings.needs_gradients and settings.init != "wiener":
        unused.add("output_mu")
    if not settings.weights or not settings.confines:
        unused.add("weights")
    values = asdict(settings) | {
        "constraint": settings.kept,
        "output_mu": settings.nu,
        "leak_penalty": settings.gamma,
    }
    return {name: value for name, value in values.items() if name not in unused}


def idle(settings: SubspaceSettings) -> list[str]:
    """Names of settings that differ from the defaults and have no effect beside the others."""
    used, defaults = effective(settings), SubspaceSettings(settings.init)
    if not settings.needs_gradients:  # no filter is no filter, asked for or not
        settings = replace(settings, output_mu=None)
    return [
        name
        for name, value in asdict(settings).items()
        if name not in used and value != getattr(defaults, name)
    ]


def rows_settings(settings: SubspaceSettings) -> dict[str, Any]:
    """Those that decide the rows of the subspace; what training does with them is apart."""
    rows = effective(settings)
    del rows["leak_penalty"]
    rows.pop("output_mu", None)
    if settings.kept != "project":  # only that needs more rows than the rank
        del rows["constraint"]
    return rows


@dataclass
class HeadSettings:
    """The task head on top of the backbone.

    Attributes:
        pooling: How token states become one vector: the 'mean' over real tokens, the 'cls' (first)
            token, or the 'last' real token (of an encoder-decoder: the decoder state at the
            end-of-sequence token, which is the last).
        hidden: Insert dense + tanh before the output layer, as RoBERTa's and T5's heads do.
        bias: Whether the output layer has a bias (Llama's has none).
        dropout: Dropout probability in front of each layer of the head.
    """

    pooling: Literal["mean", "cls", "last"] = "mean"
    hidden: bool = False
    bias: bool = True
    dropout: float = 0.0


@dataclass
class TrainSettings:
    """How one task is trained.

    Attributes:
        epochs: Passes over the training rows.
        batch_size: Rows in a batch.
        learning_rate: Peak learning rate of the adapter.
        head_learning_rate: Peak learning rate of the head.
        weight_decay: AdamW's weight decay.
        max_grad_norm: A step's gradient that is longer, over adapter and head together, is
            shortened to this length, as transformers' Trainer does; 0 for never. One batch whose
            gradient is far longer than the others' can undo a training.
        warmup: Share of the steps over which the learning rate rises linearly. At a rate this high
            a few steps are not enough: AdamW's first ones all go the same way, and overshoot.
        schedule: What the learning rate does after the warm-up.
        max_length: Longest input in tokens; longer ones are truncated.
        backbone_dropout: Keep the frozen backbone's own dropout on, as transformers' Trainer does.
            Off, training on a CPU is about 1.5 times as fast.
    """

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 3e-3
    head_learning_rate: float = 5e-3
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup: float = 0.2
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_length: int = 128
    backbone_dropout: bool = False


@dataclass
class RowSettings:
    """How many rows of each task are used at most (null: all).

    Attributes:
        train: Rows to train on.
        validation: Rows that hyper-parameters and coefficients are selected on.
        test: Rows that scores are reported on.
        covariance: Training rows that the covariance is collected from.
    """

    train: int | None = None
    validation: int | None = None
    test: int | None = None
    covariance: int | None = 100


@dataclass(frozen=True)
class TrainerOptions:
    """Keyword arguments for Lightning's Trainer, beyond what a training sets itself.

    Attributes:
        chosen: Name -> value.
    """

    chosen: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> dict[str, Any]:
        """Fresh arguments for one training, in any process."""
        return dict(self.chosen)

    def record(self) -> dict[str, Any]:
        """The same as JSON, for records and for what the adapters are keyed by."""
        plain: dict[str, Any] = json.loads(json.dumps(dict(self.chosen), default=str))
        return plain
