"""`expertmesh kernels tune`: what is wrong is said in one line, and what was measured is added to the table."""

from __future__ import annotations

import pytest
import torch
from commands import expertmesh

from expertmesh.kernels.tiles import Tile
from expertmesh.kernels.tuned_tiles import Product, Timed, read_table, write_table
from expertmesh.launch import tuning
from expertmesh.launch.tuning import check_sizes, tune_all

SIZES = {"tokens": "1024", "experts": 8, "top_k": 2, "hidden": 64, "ffn": 32, "dtype": "bfloat16"}
TILE = Tile(16, 32, 32, 4, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can measure")
def test_a_machine_without_a_gpu_says_so(tmp_path):
    done = expertmesh("kernels", "tune", "--out", tmp_path / "tiles.json", folder=tmp_path)
    assert done.returncode == 2 and "GPU" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


WRONG = [
    ({"tokens": "many"}, "--tokens many"),
    ({"tokens": "8,0"}, "--tokens 8,0"),
    ({"dtype": "float16"}, "--dtype float16"),
]


@pytest.mark.parametrize(("changes", "says"), WRONG, ids=[says for _, says in WRONG])
def test_wrong_sizes(changes, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        check_sizes(tmp_path / "tiles.json", **{**SIZES, **changes})


def test_a_table_that_cannot_be_written_or_added_to(tmp_path):
    with pytest.raises(ValueError, match="--out"):
        check_sizes(tmp_path / "nowhere" / "tiles.json", **SIZES)
    (tmp_path / "tiles.json").write_text("[]")
    with pytest.raises(ValueError, match="no table"):
        check_sizes(tmp_path / "tiles.json", **SIZES)


def test_rows_are_added_and_replaced_batch_by_batch(tmp_path, monkeypatch):
    def row(tokens: int, milliseconds: float) -> Timed:
        return Timed(Product("up", tokens, 32, 64, "bfloat16", "sm_90"), TILE, milliseconds, 2.0)

    path = tmp_path / "tiles.json"
    write_table(path, [row(256, 1.0), row(4, 1.0)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plan = check_sizes(path, **{**SIZES, "tokens": "1024,64"})
    seen = []

    def measured(layer, *_):
        seen.append((layer.tokens, len(read_table(path))))
        return [row(layer.tokens * layer.top_k // layer.experts, 0.5)]

    monkeypatch.setattr(tuning, "tune", measured)
    rows = tune_all(plan, print)
    assert seen == [(1024, 2), (64, 2)] and [r["tokens_per_expert"] for r in rows] == [256, 16]
    assert read_table(path) == [row(4, 1.0), row(16, 0.5), row(256, 0.5)]
