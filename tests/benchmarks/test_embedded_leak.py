"""The promise of the method on the real model and the eight real tasks."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.assets import resolve_model
from benchmarks.suites import load_suite
from osrm import adapter_leaked_energy, lora_a, subspace_state
from trainers.backbone import ModelRef, load_tokenizer
from trainers.data import TaskData
from trainers.jobs import task_covariance
from trainers.training import make_adapter


def test_osrm_starts_with_a_tenth_of_the_leaked_energy_of_plain_lora_on_every_task() -> None:
    suite = load_suite("embedded", "full")
    model = ModelRef(suite.model, resolve_model(suite.model))
    tokenizer = load_tokenizer(model.path)
    targets = ["query", "value"]  # the paper's
    adapter = replace(suite.adapter, targets=targets)
    covariances = {
        name: task_covariance(model, TaskData(task, tokenizer, suite.train, suite.rows), targets)
        for name, task in suite.tasks.items()
    }
    assert len(covariances) == 8
    torch.manual_seed(0)
    plain = lora_a(make_adapter(model, adapter))
    for task in covariances:
        state = subspace_state(covariances, task, adapter.rank)
        osrm = adapter_leaked_energy(state, covariances, task)
        lora = adapter_leaked_energy(plain, covariances, task)
        assert osrm <= lora / 10, f"{task}: {osrm:.4f} against {lora:.4f}"
