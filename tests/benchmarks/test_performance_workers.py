"""The command that measures what several processes gain, at its smallest size."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.performance import workers
from merge_algorithms import UserError


def test_a_bench_with_one_process_and_with_two(
    toy_suite: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--suite", str(toy_suite), "--tasks", "half", "size", "--inits", "lora"]
    arguments += ["--merges", "ties"]
    workers.compare(arguments, workers=2, rounds=1)
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:4]]
    (one, seconds, each), (two, fewer, _) = cells
    assert (one, two) == ("1", "2")
    assert seconds == each
    low, high = (float(lines[4].split()[i]) for i in (0, 2))
    assert low == high == pytest.approx(float(seconds) / float(fewer), rel=0.02)


def test_one_process_is_nothing_to_compare() -> None:
    with pytest.raises(UserError, match="--workers is 1"):
        workers.compare(workers=1)


def test_a_bench_that_fails_says_why() -> None:
    with pytest.raises(UserError, match="unknown suite 'nowhere'"):
        workers.seconds(["--suite", "nowhere"], 1)
