"""The parallel bench compares before it times: all layers agree on two ranks, and bytes are as few as can be."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from expertmesh.launch.bench import parallel
from expertmesh.launch.bench.cases import draw
from expertmesh.launch.bench.contenders import contenders
from expertmesh.launch.bench.parallel import ParallelCase, _least_bytes
from expertmesh.launch.bench.table import parallel_table
from expertmesh.launch.cli import app

KEYS = {"what", "dtype", "ranks", "tokens", "experts", "top_k", "seconds", "ratio_to_ours", "sent_bytes", "note"}


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"ranks": 1}, "ranks=1: parallel begins with 2"),
        ({"ranks": 3}, "ranks=3 must divide experts=16, and 8 for MoE++"),
        ({"tokens": 0}, "tokens=0: it must be 1 or more"),
        ({"top_k": 9}, "top_k=9 is more than experts=16, or the 8 of MoE++"),
        ({"dtype": "int8"}, "dtype=int8: it must be one of float32, bfloat16"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be_run(keys, words):
    with pytest.raises(ValueError) as error:
        ParallelCase(**keys)
    assert str(error.value) == words


def test_wrong_sizes_end_the_command_before_a_rank_starts():
    result = CliRunner().invoke(app, ["bench", "parallel", "--ranks", "3"])
    assert result.exit_code == 2 and "ranks=3" in result.stderr


def test_least_bytes_against_a_loop():
    case = ParallelCase(ranks=2, tokens=5, experts=4, hidden_size=16, ffn_size=16)
    whole = draw(case.of_all_ranks(4))
    logits_TN = whole.inputs_STD[0].double() @ whole.weights.router_ND.double().T
    rows = [0, 0]
    for token, logits_N in enumerate(logits_TN):
        best = torch.argsort(logits_N, descending=True)[:2].tolist()
        other = 1 - token // 5
        if any(expert // 2 == other for expert in best):
            rows[0] += 1  # it leaves one rank, and its sum the other
            rows[1] += 1
    assert _least_bytes(whole, case) == 2 * max(rows) * 16 * 4


MEMORY = {
    key: 1_500_000 for key in ("parameters", "weight_bytes", "gradient_bytes", "optimizer_bytes", "planned_bytes")
}


def test_all_layers_agree_on_two_ranks(monkeypatch):
    """A real run at a small size: whoever is wrong has no time, and its note says why. Memory: test_zero_memory.py."""
    in_memory = {"table": "memory", "what": "ZeRO 1, ep 1", "ranks": 2, "most_bytes": 2_250_000, **MEMORY}
    monkeypatch.setattr(parallel, "bench_memory", lambda case, say: [in_memory])
    size = ["--tokens", "24", "--experts", "8", "--hidden-size", "32", "--ffn-size", "48", "--rounds", "1"]
    result = CliRunner().invoke(app, ["bench", "parallel", *size, "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    rows, memory = ([row for row in rows if row["table"] == table] for table in ("step", "memory"))
    assert all(rows[0].keys() == row.keys() >= KEYS for row in rows)
    plain, least = rows[: len(contenders(2))], "the least possible"
    assert all(row["seconds"] and row["ratio_to_ours"] for row in rows if row["what"] != least), rows
    sent = {row["what"]: row["sent_bytes"] for row in plain}
    bound = rows[len(plain)]
    assert bound["what"] == least
    # With each row there go 2 K + 1 numbers, and K of their gradient: 28 bytes beside 4 times 128.
    assert bound["sent_bytes"] < sent["expertmesh"] <= bound["sent_bytes"] * (1 + 28 / (2 * 128))
    assert sent["expertmesh, 4 chunks"] == sent["expertmesh"]
    assert sent["expertmesh, FP8 on the wire"] < sent["expertmesh, bf16 on the wire"] < sent["expertmesh"]
    assert sent["expertmesh"] < min(sent["DeepSpeed MoE"], sent["Megatron-Core MoELayer"])
    vanilla, plus_plus = rows[len(plain) + 1 : len(plain) + 3]
    assert "MoE++ 8+4" in plus_plus["what"]
    assert plus_plus["sent_bytes"] <= 0.8 * vanilla["sent_bytes"]
    assert parallel_table(rows[: len(plain) + 1]).row_count == len(plain) + 1
    assert memory == [in_memory] and "2.25" in result.stderr
