"""What the kernels compile to, for GPUs that are not here: limits that a change of a kernel or of Triton must not pass.

Kernels are compiled by the command, in a process of its own: in this one they are interpreted.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from tempfile import gettempdir
from typing import Any, NamedTuple

import pytest
from commands import expertmesh

from expertmesh.kernels import ahead_of_time
from expertmesh.kernels.scheme import Scheme
from expertmesh.kernels.tiles import CHIPS

KEYS = {
    *("kernel", "tile", "target", "registers", "spill_bytes", "shared_bytes", "tensor_core_instructions", "tma"),
    *("instructions_per_step", "issue_share"),
}
PRODUCTS = r"^(multiply|outer|up|hidden|quantised)"
FULL_HEIGHT = PRODUCTS + r".*, (128|256)x|^quantised.*, 64x"
DECODING = r"^(paged [\w ]+|few rows (multiply|up)( in parts)?)$"
HEAVIEST = r"^paged [\w ]+(?<!in parts), |^few rows up, "


@cache
def judged(target: str) -> list[dict[str, Any]]:
    """Everything for sm_90; for the others what can go wrong: products at their full height, decoding."""
    only = [] if target == "sm_90" else ["--only", f"{FULL_HEIGHT}|{HEAVIEST}"]
    # 20 seconds on two free cores, and many times that on busy ones.
    done = expertmesh("kernels", "--target", target, *only, "--json", folder=Path(gettempdir()), timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_shipped_tile_was_compiled():
    got = {(row["kernel"], row["tile"]) for row in judged("sm_90")}
    assert got == {(build.name, str(build.tile)) for build in ahead_of_time.shipped(CHIPS["sm_90"])}
    assert all(row.keys() >= KEYS for row in judged("sm_90"))


@pytest.mark.parametrize("target", CHIPS)
def test_nothing_spills_and_everything_fits(target):
    for row in judged(target):
        assert row["spill_bytes"] == 0, row
        assert row["shared_bytes"] <= CHIPS[target].shared_bytes, row
        assert row["registers"] <= 255, row


@pytest.mark.parametrize("target", CHIPS)
def test_products_use_tensor_cores_and_wide_accesses(target):
    products = [row for row in judged(target) if re.match(PRODUCTS, row["kernel"])]
    assert {row["kernel"] for row in products} >= {
        *("multiply", "multiply transposed", "outer", "up", "hidden"),
        *(f"quantised {scheme}" for scheme in Scheme),
    }
    for row in products:
        assert row["tensor_core_instructions"] > 0 and row["load_bytes"] == 16, row
        # A column of a matrix instruction is 4 numbers on AMD.
        assert row["store_bytes"] >= (8 if target.startswith("gfx") else 16), row
        assert (row["tma"] > 0) == CHIPS[target].descriptors, row


@pytest.mark.parametrize("target", CHIPS)
def test_decoding_uses_tensor_cores_and_16_byte_loads(target):
    rows = [row for row in judged(target) if re.match(DECODING, row["kernel"])]
    assert {row["kernel"] for row in rows} >= {"paged grouped queries", "paged MFA", "paged MLA", "few rows up"}
    for row in rows:
        assert row["tensor_core_instructions"] > 0 and row["load_bytes"] == 16, row


H100_BYTES_PER_CLOCK = 3.35e12 / 132 / 1.755e9  # that memory brings to a multiprocessor: 14.5


def test_decoding_is_bound_by_memory_on_sm_90():
    """A step's instructions take less of a multiprocessor's time than what they wait for, keys and values or weights.

    Not those of MLA: its 128 query heads do 242 flops for a byte, close to the 295 that the chip can, in 4 tiles."""
    for row in judged("sm_90"):
        if re.match(DECODING, row["kernel"]) and "MLA" not in row["kernel"]:
            _, columns, depth, warps = map(int, re.findall(r"\d+", row["tile"])[:4])
            fetched = 2 if "paged" in row["kernel"] or "up" in row["kernel"] else 1  # keys, values; gate, up
            issued = row["instructions_per_step"] * warps / ahead_of_time.ISSUE_SLOTS_PER_CLOCK
            assert issued < 0.6 * fetched * columns * depth * 2 / H100_BYTES_PER_CLOCK, row


def test_tokens_are_read_and_written_16_bytes_at_a_time():
    rows = [row for row in judged("sm_90") if re.match("combine|sum rows", row["kernel"])]
    assert len(rows) == 5
    assert all(row["load_bytes"] == row["store_bytes"] == 16 for row in rows), rows


class Limit(NamedTuple):
    kernel: str
    tile: str
    share: float
    registers: int
    reason: str


LIMITS = [
    Limit("multiply", "128x128x64", 0.29, 200, "triton_kernels' loop at this tile"),
    Limit("multiply", "128x256x64", 0.20, 170, "the issue's limit"),
    Limit("multiply transposed", "128x256x64", 0.20, 170, "the issue's limit"),
    Limit("outer", "128x256x64", 0.20, 180, "the issue's limit"),
    Limit("outer gathered", "256x128x64", 0.20, 180, "the issue's limit, to its two places: 103 instructions, 0.201"),
    Limit("up", "128x128x64", 0.29, 200, "two accumulators; rows gathered by pointer"),
    Limit("hidden", "128x128x64", 0.20, 248, "4 warps: two programs share a multiprocessor"),
    # FP8 multiplies twice as fast, and every step's sums are added once more, in float32:
    Limit("quantised fp8-channel", "128x128x128", 0.62, 255, "half of a step is that addition"),
    Limit(
        "quantised fp8-block", "128x128x128", 1.15, 255, "32 scales of rows a thread and step; bound by instructions"
    ),
    Limit("quantised int4-fp8", "128x128x128", 1.85, 255, "unpacks 64 numbers a thread and step; bound by that"),
]


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: f"{limit.kernel} {limit.tile}: {limit.reason}")
def test_inner_loops_on_sm_90(limit):
    rows = [r for r in judged("sm_90") if r["kernel"] == limit.kernel and r["tile"].startswith(limit.tile)]
    assert len(rows) == 1
    assert round(rows[0]["issue_share"], 2) <= limit.share and rows[0]["registers"] <= limit.registers, rows[0]


def test_two_programs_of_the_backward_epilogue_share_a_multiprocessor():
    (row,) = [r for r in judged("sm_90") if r["kernel"] == "hidden" and r["tile"].startswith("128x128")]
    assert row["programs_per_multiprocessor"] == 2


@pytest.mark.parametrize(
    ("words", "says"), [(["--target", "sm_75"], "sm_75"), (["--only", "("], "--only")], ids=["chip", "pattern"]
)
def test_wrong_input(words, says, tmp_path):
    done = expertmesh("kernels", *words, folder=tmp_path)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1


def test_interpreted_kernels_are_not_compiled():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        ahead_of_time.judge_all("sm_90", "sum rows")
