"""The table of tuned tiles: what is in it is taken, the rest goes by rule, and a wrong one is named in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import expertmesh
from numerics import assert_close

from expertmesh.kernels import grouped_gemm_triton as kernels
from expertmesh.kernels import tuned_tiles
from expertmesh.kernels.tiles import SM_90, Tile, choose_tile
from expertmesh.kernels.tuned_tiles import Product, Timed, product_of, read_table, tile_of, write_table

PRODUCT = Product("multiply", 8, 24, 16, "float32", "sm_90")
RULE, TUNED = Tile(16, 128, 32, 4, 3), Tile(32, 64, 16, 2, 2)
ROW: dict[str, Any] = {
    **PRODUCT._asdict(),
    "tile": list(TUNED),
    "milliseconds": 0.5,
    "rule_milliseconds": 0.75,
}


def write(path: Path, *rows: Any) -> Path:
    path.write_text(json.dumps({"tiles": rows}))
    return path


def test_a_table_that_is_written_is_read_again(tmp_path):
    rows = [Timed(PRODUCT._replace(n=n), TUNED, 0.5, 0.75) for n in (48, 24)]
    write_table(tmp_path / "tiles.json", rows)
    assert read_table(tmp_path / "tiles.json") == rows[::-1], "in order of the products"
    assert [path.name for path in tmp_path.iterdir()] == ["tiles.json"]
    write_table(tmp_path / "tiles.json", [])
    assert read_table(tmp_path / "tiles.json") == []


OTHERS = [
    ({}, TUNED, "the product itself"),
    ({"kernel": "outer"}, RULE, "another kernel"),
    ({"tokens_per_expert": 16}, RULE, "more tokens an expert"),
    ({"n": 16}, RULE, "another width"),
    ({"k": 24}, RULE, "another inner width"),
    ({"dtype": "bfloat16"}, RULE, "another dtype"),
    ({"chip": "sm_100"}, RULE, "another chip"),
]


@pytest.mark.parametrize(("changes", "tile"), [o[:2] for o in OTHERS], ids=[o[2] for o in OTHERS])
def test_the_table_is_for_its_products_alone(changes, tile, tmp_path, monkeypatch):
    monkeypatch.setenv("EXPERTMESH_TILES", str(write(tmp_path / "tiles.json", ROW)))
    assert tile_of(PRODUCT._replace(**changes), RULE) == tile


def test_without_a_table_the_rule_holds(monkeypatch):
    monkeypatch.delenv("EXPERTMESH_TILES", raising=False)
    assert tile_of(PRODUCT, RULE) == RULE


@pytest.mark.parametrize(("rows", "each"), [(0, 1), (1, 1), (8, 1), (9, 2), (300 * 8, 512), (512 * 8, 512)])
def test_tokens_per_expert_are_rounded_up_to_a_power_of_2(rows, each):
    assert product_of("up", torch.zeros(1), rows, 8, 4, 2) == Product("up", each, 4, 2, "float32", "sm_90")


def test_a_product_runs_with_the_tile_of_the_table(tmp_path, monkeypatch):
    """Seen in the table of tiles, which is cut by their height; and the result is what it was."""
    heights = []
    cut = kernels.tile_table
    monkeypatch.setattr(kernels, "tile_table", lambda *args: heights.append(args[2]) or cut(*args))
    generator = torch.Generator().manual_seed(0)
    rows_RK, weights_ENK = (torch.randn(s, generator=generator) for s in ((15, 16), (2, 24, 16)))
    counts_E = torch.tensor([9, 6])
    by_rule = kernels.multiply(rows_RK, weights_ENK, counts_E)
    monkeypatch.setenv("EXPERTMESH_TILES", str(write(tmp_path / "tiles.json", ROW)))
    assert_close(kernels.multiply(rows_RK, weights_ENK, counts_E), by_rule)
    assert heights == [choose_tile(15, 2, 24, 4, SM_90).rows, TUNED.rows]


WRONG = [
    ({"kernel": "combine"}, "kernel is 'combine'", "a kernel that has no tiles to choose"),
    ({"chip": "sm_75"}, "chip is 'sm_75'", "a chip that nothing is shipped for"),
    ({"dtype": "float16"}, "dtype is 'float16'", "a dtype that no kernel takes"),
    ({"tokens_per_expert": 12}, "tokens_per_expert is 12", "not a power of 2: it would never be found"),
    ({"n": 0}, "n is 0", "no width"),
    ({"k": True}, "k is True", "not a number"),
    ({"tile": [128, 128, 64, 8]}, "tile is", "four numbers"),
    ({"tile": [128, 96, 64, 8, 3]}, "powers of 2", "a side that Triton cannot cut"),
    ({"tile": [128, 128, 64, 8, 0]}, "stages 1 to 8", "no stages"),
    ({"milliseconds": 0}, "milliseconds is 0", "a time of nothing"),
    ({"colour": "red"}, "colour: unknown", "a key that means nothing"),
]


@pytest.mark.parametrize(("changes", "says"), [w[:2] for w in WRONG], ids=[w[2] for w in WRONG])
def test_a_wrong_row_is_named(changes, says, tmp_path):
    path = write(tmp_path / "tiles.json", ROW, {**ROW, "n": 48, **changes})
    with pytest.raises(ValueError, match=f"row 2: .*{says}"):
        read_table(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tiles": 3}', '{"tiles": [3]}', '{"tiles": [{}]}'])
def test_what_is_no_table_is_named(text, tmp_path):
    (tmp_path / "tiles.json").write_text(text)
    with pytest.raises(ValueError, match="tiles.json"):
        read_table(tmp_path / "tiles.json")


def test_two_rows_for_one_product_are_refused(tmp_path):
    with pytest.raises(ValueError, match="row 2: a second tile"):
        read_table(write(tmp_path / "tiles.json", ROW, ROW))


def test_every_kernel_that_asks_is_known():
    """A name misspelt where a kernel asks would never find its row."""
    folder = Path(tuned_tiles.__file__).parent
    asking = "".join((folder / f"{name}.py").read_text() for name in ("grouped_gemm_triton", "grouped_swiglu_triton"))
    assert all(f'"{kernel}"' in asking for kernel in tuned_tiles.KERNELS)


def test_the_command_says_what_is_wrong_with_the_table(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPERTMESH_TILES", str(write(tmp_path / "tiles.json", {**ROW, "chip": "sm_75"})))
    done = expertmesh("recipes", folder=tmp_path)
    assert done.returncode == 2 and "row 1: chip" in done.stderr and len(done.stderr.splitlines()) == 1
