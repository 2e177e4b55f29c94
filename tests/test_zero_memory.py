"""What ranks really have in memory at each ZeRO stage is what the plan says, in runs that give the same losses."""

from __future__ import annotations

import pytest

from expertmesh.launch.bench import zero_memory
from expertmesh.launch.bench.zero_memory import MemoryCase, bench_memory

CASE = MemoryCase(ranks=2, experts=8, top_k=2, hidden_size=128, ffn_size=512)


def test_memory_is_as_planned():
    rows = bench_memory(CASE, lambda line: None)
    assert [row["what"] for row in rows] == [*(f"ZeRO {stage}, ep 1" for stage in range(4)), "ZeRO 1, ep 2"]
    for row in rows:
        assert 0.85 < row["most_bytes"] / row["planned_bytes"] < 1.25, rows
    by_stage = [row["most_bytes"] for row in rows]
    assert by_stage[3] < by_stage[4] < min(by_stage[:3]), "sharding, and experts on one rank each, both take less"


def test_layouts_that_disagree_are_no_result(monkeypatch):
    rows = iter([[{"most_bytes": 1, "losses": [2.0, loss]}] for loss in (1.0, 1.0, 1.01, 1.0, 1.0)])
    monkeypatch.setattr(zero_memory, "activation_bytes", lambda *_: [0])
    monkeypatch.setattr(zero_memory, "tables_of_ranks", lambda ranks, tables, say: [next(rows) for _ in tables.args[2]])
    with pytest.raises(RuntimeError, match=r"ZeRO 2, ep 1 has losses \[2.0, 1.01\], ZeRO 0, ep 1 \[2.0, 1.0\]"):
        bench_memory(CASE, lambda line: None)
