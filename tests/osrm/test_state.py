from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from merge_algorithms.errors import UserError
from osrm import (
    Covariance,
    bottom_subspace,
    contrastive_subspace,
    initialize_lora_osrm_weights,
    lora_a,
    official_subspace,
    others_moments,
    project_lora_a,
    subspace_state,
)


def test_the_state_is_the_bottom_subspace_of_the_mean_of_the_others(random_covariance):
    tasks = {name: random_covariance(name, seed=i, tokens=9) for i, name in enumerate("abc")}
    state = subspace_state(tasks, "b", rank=3, k=5)
    assert set(state) == {"0.query", "0.value", "1.query", "1.value"}
    for module, rows in state.items():
        a, b, c = (tasks[name].matrix(module).double() for name in "abc")
        expected = bottom_subspace((a + c) / 2, 5, own=b)
        torch.testing.assert_close(rows, expected, atol=1e-5, rtol=0)


def test_the_official_state_comes_from_the_means_of_the_others(random_covariance):
    tasks = {name: random_covariance(name, seed=i) for i, name in enumerate("abcde")}
    state = subspace_state(tasks, "b", rank=2, mode="official")
    for module, rows in state.items():
        means = torch.stack([tasks[name].means[tasks[name].modules[module]] for name in "acde"])
        torch.testing.assert_close(rows, official_subspace(means, 2))


def test_the_first_rows_do_not_depend_on_k_and_the_order_of_tasks_is_free(random_covariance):
    tasks = {name: random_covariance(name, seed=i, tokens=9) for i, name in enumerate("abcd")}
    small = subspace_state(tasks, "c", 2)
    large = subspace_state(dict(reversed(tasks.items())), "c", 2, k=8)
    for module, rows in small.items():
        assert torch.equal(rows, large[module][:2])


def test_a_state_can_be_saved_although_modules_share_an_input(tmp_path, random_covariance):
    state = subspace_state({name: random_covariance(name) for name in "ab"}, "a", 2)
    save_file(state, tmp_path / "state.safetensors")
    loaded = load_file(tmp_path / "state.safetensors")
    assert all(torch.equal(loaded[module], rows) for module, rows in state.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "d"}, "no covariance of task 'd'; known: a, b"),
        ({"mode": "offical"}, "did you mean 'official'"),
        ({"k": 1}, "k is 1, below the rank 2"),
        ({"rank": 13}, r"0\.query reads 12 features, .* choose a smaller rank"),
        ({"k": 13}, r"0\.query reads 12 features, .* choose a smaller k"),
        ({"rank": 0}, "choose 1 to 12"),
        ({"scale": "matching"}, "unknown subspace scale 'matching'; did you mean 'matched'"),
        ({"solver": "eig"}, "unknown subspace solver 'eig'; did you mean 'eigh'"),
        ({"k": 3, "energy": 0.1}, "both k and an energy budget"),
        ({"energy": 1.5}, "energy budget is 1.5: give a share between 0 and 1"),
        ({"weights": {"c": 1.0}}, "weight for 'c', which is no other task; known: b"),
        ({"weights": {"a": 1.0}}, "weight for 'a', which is no other task"),
        ({"weights": {"b": -1.0}}, "weight of task 'b' is -1.0"),
        ({"weights": {"b": 0.0}}, "weights of all other tasks are 0"),
    ],
)
@pytest.mark.parametrize("mode", ["osrm", "contrastive"])
def test_states_that_do_not_exist(options, message, mode, random_covariance):
    tasks = {name: random_covariance(name) for name in "ab"}
    with pytest.raises(UserError, match=message):
        subspace_state(tasks, **({"task": "a", "rank": 2, "mode": mode} | options))


def test_the_official_mode_has_no_weights(random_covariance):
    tasks = {name: random_covariance(name) for name in "ab"}
    with pytest.raises(UserError, match="mode 'official' stacks the other tasks' means"):
        subspace_state(tasks, "a", 2, "official", weights={"b": 1.0})


@pytest.mark.parametrize("options", [{"mode": "contrastive"}, {"scale": "matched"}, {}])
def test_the_own_covariance_must_be_there(options, random_covariance):
    with pytest.raises(UserError, match="there is no covariance of task 'a'"):
        subspace_state({name: random_covariance(name) for name in "bc"}, "a", 2, **options)


def test_other_tasks_must_exist_and_be_of_the_same_model(random_covariance):
    alone = {"a": random_covariance("a")}
    with pytest.raises(UserError, match="only task"):
        subspace_state(alone, "a", 2)
    with pytest.raises(UserError, match="different models"):
        subspace_state(alone | {"b": random_covariance("b", model="big")}, "a", 2)
    with pytest.raises(UserError, match=r"different modules \(1\.query differs\)"):
        subspace_state(alone | {"b": random_covariance("b", modules=1)}, "a", 2)


def projector(rows):
    return rows.double().T @ rows.double() / float(rows[0].double().square().sum())


def test_the_contrastive_state_weighs_own_energy_against_the_mean_of_the_others(random_covariance):
    tasks = {name: random_covariance(name, seed=i, tokens=50) for i, name in enumerate("abc")}
    state = subspace_state(tasks, "b", rank=3, k=5, mode="contrastive", rho=0.2)
    for module, rows in state.items():
        a, b, c = (tasks[name].matrix(module).double() for name in "abc")
        expected = contrastive_subspace(b, (a + c) / 2, 5, rho=0.2)
        torch.testing.assert_close(rows, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["osrm", "contrastive"])
def test_weights_decide_how_much_each_other_task_counts(mode, random_covariance):
    tasks = {name: random_covariance(name, seed=i, tokens=50) for i, name in enumerate("abcd")}
    weights = {"b": 3.0, "d": 0.0}  # c weighs 1
    state = subspace_state(tasks, "a", 3, mode, weights=weights)
    moments = others_moments(tasks, "a", weights)
    for module, rows in state.items():
        own, b, c = (tasks[name].matrix(module).double() for name in "abc")
        mean = (3 * b + c) / 4
        torch.testing.assert_close(moments[module].double(), mean, atol=1e-6, rtol=1e-6)
        expected = (
            bottom_subspace(mean, 3, own) if mode == "osrm" else contrastive_subspace(own, mean, 3)
        )
        torch.testing.assert_close(projector(rows), projector(expected), atol=1e-4, rtol=0)


def test_a_task_that_arrives_later_needs_only_the_sum_of_the_earlier_ones(random_covariance):
    """Stored as one file: pooled by tokens, so equal to the mean where all have as many."""
    tasks = {name: random_covariance(name, seed=i) for i, name in enumerate(["new", *"abc"])}
    earlier = tasks["a"] + tasks["b"] + tasks["c"]
    together = subspace_state(tasks, "new", 3)
    later = subspace_state({"new": tasks["new"], "earlier": earlier}, "new", 3)
    for module, rows in together.items():
        torch.testing.assert_close(projector(later[module]), projector(rows), atol=1e-4, rtol=0)
    pool = tasks["a"] + tasks["b"]
    beside = {"new": tasks["new"], "pool": pool, "c": tasks["c"]}
    mixed = subspace_state(beside, "new", 3, weights={"pool": 2})
    for module, rows in together.items():
        torch.testing.assert_close(projector(mixed[module]), projector(rows), atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["osrm", "official", "contrastive"])
@pytest.mark.parametrize("energy", [1e-4, 0.05, 0.5])
def test_an_energy_budget_takes_as_many_rows_as_fit(mode, energy, random_covariance):
    """Oracle: one row more would exceed the budget, or there is none."""
    tasks = {name: random_covariance(name, d=30, seed=i, tokens=90) for i, name in enumerate("abc")}
    state = subspace_state(tasks, "a", 2, mode, energy=energy)
    everything = subspace_state(tasks, "a", 2, mode, k=30)
    for module, rows in state.items():
        mean = (tasks["b"].matrix(module).double() + tasks["c"].matrix(module).double()) / 2

        def leak(v, mean=mean):
            return float(torch.trace(v.double() @ mean @ v.double().T) / mean.trace())

        k = len(rows)
        assert torch.allclose(rows, everything[module][:k], atol=1e-5)
        assert k == 2 or leak(rows) <= energy
        assert k == 30 or leak(everything[module][: k + 1]) > energy


def test_matched_rows_let_as_much_own_energy_through_as_plain_lora_does(random_covariance):
    """Oracle: PEFT's own initialisation, many times."""
    tasks = {name: random_covariance(name, seed=i, d=24) for i, name in enumerate("ab")}
    state = subspace_state(tasks, "a", rank=3, k=6, scale="matched")
    unit = subspace_state(tasks, "a", rank=3, k=6)
    for module, rows in state.items():
        own = tasks["a"].matrix(module).double()
        lengths = rows.double().norm(dim=1)
        torch.testing.assert_close(lengths, lengths[:1].expand(6))
        torch.testing.assert_close(rows / rows.norm(dim=1, keepdim=True), unit[module])
        first = rows[:3].double()
        energy = float(torch.trace(first @ own @ first.T))
        assert energy == pytest.approx(3 * float(own.trace()) / (3 * 24), rel=1e-5)
        layer = torch.nn.Sequential()
        layer.add_module("x", torch.nn.Linear(24, 4))
        model = get_peft_model(layer, LoraConfig(r=3, target_modules=["x"]))
        drawn = []
        for _ in range(300):
            model.get_base_model().x.reset_lora_parameters("default", True)
            a = lora_a(model)["x"].double()
            drawn.append(float(torch.trace(a @ own @ a.T)))
        assert sum(drawn) / 300 == pytest.approx(energy, rel=0.1)


@pytest.mark.parametrize("mode", ["osrm", "contrastive"])
@pytest.mark.parametrize("solver", ["eigh", "cholesky"])
def test_rows_beside_an_enormous_feature_are_matched(mode, solver, random_covariance):
    """What they let through is next to nothing beside the mean energy, and yet not nothing."""
    tasks = {name: random_covariance(name, seed=i, d=80, tokens=300) for i, name in enumerate("ab")}
    for task in tasks.values():
        for matrix in task.matrices.values():
            matrix[7] *= 1e4
            matrix[:, 7] *= 1e4
    state = subspace_state(tasks, "a", 3, mode, scale="matched", solver=solver)
    unit = subspace_state(tasks, "a", 3, mode, solver=solver)
    for module, rows in state.items():
        own, others = (tasks[name].matrix(module).double() for name in "ab")
        first = rows.double()
        energy = float(torch.trace(first @ own @ first.T))
        assert energy == pytest.approx(float(own.trace()) / 80, rel=1e-4)
        torch.testing.assert_close(rows / rows.norm(dim=1, keepdim=True), unit[module])
        if mode == "osrm":
            optimum = float(torch.linalg.eigvalsh(others)[:3].sum())
            wide = unit[module].double()
            assert float(torch.trace(wide @ others @ wide.T)) == pytest.approx(optimum, rel=1e-2)


def test_a_matched_state_starts_a_at_its_scale_and_projects_as_a_unit_one(random_covariance):
    tasks = {name: random_covariance(name, seed=i) for i, name in enumerate("ab")}
    names = ["0.query", "1.query"]
    states = [subspace_state(tasks, "a", 2, k=4, scale=scale) for scale in ("unit", "matched")]
    moved = []
    for state in states:
        torch.manual_seed(0)
        modules = torch.nn.ModuleDict(
            {str(i): torch.nn.ModuleDict({"query": torch.nn.Linear(12, 3)}) for i in range(2)}
        )
        model = get_peft_model(modules, LoraConfig(r=2, target_modules=["query"]))
        initialize_lora_osrm_weights(model, state)
        for name in names:
            assert torch.equal(lora_a(model)[name], state[name][:2])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter.copy_(torch.ones(2, 12))
        project_lora_a(model, state)
        moved.append(lora_a(model))
    for name in names:
        torch.testing.assert_close(moved[0][name], moved[1][name])


def test_every_input_is_solved_once_and_threads_change_nothing(random_covariance, monkeypatch):
    tasks = {name: random_covariance(name, seed=i, modules=5) for i, name in enumerate("abc")}
    calls = []
    solve = bottom_subspace

    def counted(*args):
        calls.append(torch.get_num_threads())
        return solve(*args)

    monkeypatch.setattr("osrm.state.bottom_subspace", counted)
    states = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        states.append(subspace_state(tasks, "a", 3))
        assert torch.get_num_threads() == threads
    assert calls == [1] * 10, "ten modules read five inputs"
    assert all(torch.equal(rows, states[1][module]) for module, rows in states[0].items())


def without_energy(covariance: Covariance) -> Covariance:
    """The same, but the task's tokens are zero."""
    matrices = {key: torch.zeros_like(c) for key, c in covariance.matrices.items()}
    return Covariance(
        matrices,
        covariance.means,
        covariance.modules,
        covariance.counts,
        covariance.positions,
        covariance.meta,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "contrastive", "k": 4}, "0.query: the own task has energy in 0 directions, .*k"),
        ({"mode": "contrastive"}, "0.query: the own task has energy in 0 .* smaller rank"),
        ({"scale": "matched"}, "0.query: the 2 rows let nothing of the own task's inputs through"),
    ],
)
def test_modes_that_read_the_own_covariance_need_something_in_it(
    options, message, random_covariance
):
    tasks = {"a": without_energy(random_covariance("a")), "b": random_covariance("b")}
    with pytest.raises(UserError, match=message):
        subspace_state(tasks, "a", 2, **options)


@pytest.mark.parametrize("mode", ["osrm", "contrastive"])
def test_fewer_tokens_than_the_rank_are_too_few(mode, random_covariance):
    for few in "ab":
        tasks = {name: random_covariance(name, tokens=3 if name == few else 9) for name in "ab"}
        assert subspace_state(tasks, "a", 3, mode)
        with pytest.raises(
            UserError, match=f"task '{few}' is over 3 tokens .* fewer than the rank 4"
        ):
            subspace_state(tasks, "a", 4, mode)
