"""The context in which factors are multiplied."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from merge_algorithms.precision import full_precision

CPU = torch.device("cpu")
# Since torch 2.9.
BY_BACKEND = hasattr(torch.backends.cuda.matmul, "fp32_precision")


def settings() -> list[str]:
    if not BY_BACKEND:
        return [torch.get_float32_matmul_precision()]
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    return [backend.fp32_precision for backend in backends]


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("chosen", ["highest", "high", "medium"])
@pytest.mark.parametrize("fails", [False, True])
def test_full_inside_and_as_chosen_after(chosen, fails):
    torch.set_float32_matmul_precision(chosen)
    before = settings()
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            with full_precision(CPU):
                assert set(settings()) <= {"ieee", "highest"}
                assert (x @ x).dtype == torch.float32
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert (x @ x).dtype == torch.bfloat16
    assert settings() == before
    assert torch.get_float32_matmul_precision() == chosen


def test_a_program_that_sets_backends_one_by_one():
    """Or, in torch before 2.9, by the one flag that CUDA had."""
    cuda = torch.backends.cuda.matmul
    name, fast = ("fp32_precision", "tf32") if BY_BACKEND else ("allow_tf32", True)
    setattr(cuda, name, fast)
    with full_precision(CPU):
        assert getattr(cuda, name) != fast
    assert getattr(cuda, name) == fast


def test_threads_share_the_setting_until_the_last_has_left():
    torch.set_float32_matmul_precision("medium")
    before, inside, leave = settings(), threading.Event(), threading.Event()

    def other() -> None:
        with full_precision(CPU):
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with full_precision(CPU):
        thread.start()
        assert inside.wait(60)
    assert set(settings()) <= {"ieee", "highest"}, "the other is still at it"
    leave.set()
    thread.join()
    assert settings() == before
