"""How much memory is free, inside a container too."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from osrm.spill import _group_limit, free_memory

STAT = "anon 500\ninactive_anon 7\nactive_file 30\ninactive_file 200\nslab 4"


@pytest.fixture
def group(tmp_path):
    """A control group's files."""

    def write(most="1000", used="900", stat=STAT):
        for name, text in (("max", most), ("current", used), ("stat", stat)):
            (tmp_path / f"memory.{name}").write_text(f"{text}\n")
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1000 - 900 + 200),
        ({"used": "100"}, 1000 - 100 + 200),
        ({"stat": "anon 500"}, 1000 - 900),
        ({"used": "1500"}, 0),  # the limit was lowered below what is used
        ({"most": "max"}, None),
    ],
)
def test_a_group_leaves_its_limit_less_what_it_uses_but_caches_give_way(files, expected, group):
    assert _group_limit(group(**files)) == expected


@pytest.mark.parametrize("missing", ["max", "current", "stat"])
def test_a_group_without_one_of_its_files_sets_no_limit(missing, group):
    folder = group()
    (folder / f"memory.{missing}").unlink()
    assert _group_limit(folder) is None


@pytest.mark.parametrize(
    ("host", "limit", "card", "expected"),
    [
        (700, None, None, 700),
        (700, 300, None, 300),
        (700, 900, None, 700),
        (700, 0, None, 0),
        (700, 300, 200, 200),
        (700, 300, 400, 300),
    ],
)
def test_the_least_of_host_group_and_gpu_is_free(host, limit, card, expected, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=host))
    monkeypatch.setattr("osrm.spill._group_limit", lambda group: limit)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (card, 1000))
    assert free_memory(torch.device("cpu" if card is None else "cuda")) == expected
