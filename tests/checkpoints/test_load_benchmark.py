"""The benchmark of loading runs on a small shape, each job in a process of its own too."""

import os
from pathlib import Path

import pytest
import torch

from benchmarks import load

ROOT = Path(__file__).parents[2]
SMALL = {
    **load.SHAPE,
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "hidden_dim": 96,
    "vocab_size": 128,
    "max_seq_len": 64,
}
CPU = torch.device("cpu")


@pytest.mark.slow
def test_every_row_is_there(monkeypatch):
    monkeypatch.setattr(
        load, "_imports", lambda rounds: {"benchmark": "load", "case": "imports"}
    )  # takes seconds
    rows = load.rows(CPU, SMALL, rounds=1, measure=load.measure)
    cases = [row["case"].split(",")[0] for row in rows]
    assert cases[:3] == ["load and first token", "imports", "peak anonymous memory"]
    assert cases[-2:] == ["convert hf to native", "convert hf to mistral"]
    assert rows[0]["same_token"] == "yes", "both read the same folder"


def test_a_job_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT)]))
    load.write_folder(tmp_path / "hf", SMALL)
    facts = load.in_fresh_process("mistral", str(tmp_path / "hf"), str(tmp_path / "out"), True)
    assert (
        facts["peak_bytes"] >= facts["before_bytes"] > 0
        and facts["seconds"] >= facts["buffered_seconds"] > 0
    )
    assert not (tmp_path / "out").exists(), "room for the next"


def test_memory_that_comes_and_goes_is_seen(monkeypatch):
    def work(folder, word):
        held = torch.ones(1 << 24)  # 64 MiB, for long enough that a sample falls into it
        for _ in range(20):
            held.mul_(1.0)
        return {}

    monkeypatch.setattr(load, "_ours", work)
    facts = load.measure("transom", "", "", True)
    assert facts["peak_bytes"] - facts["before_bytes"] > 60 << 20


def test_a_disk_without_room_is_said(monkeypatch):
    monkeypatch.setattr(load, "NEEDED_BYTES", 1 << 60)
    (row,) = load.rows(CPU)
    assert "left out" in row["case"]
    assert load.rows(torch.device("cuda")) == []
