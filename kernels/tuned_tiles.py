"""Tiles that were measured, in place of the written rule: a table that `expertmesh kernels tune` makes, once, offline.

Nothing is timed when a program starts. The environment variable EXPERTMESH_TILES names a table; a product that it lists
runs with the tile given there, any other with that of the rule (`tiles.choose_tile` and its like).

    {"tiles": [{"kernel": "multiply", "tokens_per_expert": 512, "n": 2048, "k": 768, "dtype": "bfloat16",
                "chip": "sm_90", "tile": [128, 256, 64, 8, 4], "milliseconds": 0.41, "rule_milliseconds": 0.44}]}

`tile` is rows, columns, depth, warps and stages; the times are for people. Tokens per expert are rounded up to a power
of 2, since each step has its own: 300 rows an expert are found under 512.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from expertmesh.kernels.tiles import CHIPS, Tile, chip_of

VARIABLE = "EXPERTMESH_TILES"
KERNELS = ("multiply", "outer", "outer gathered", "up", "hidden")
DTYPES = {"bfloat16": 2, "float32": 4}  # bytes


class Product(NamedTuple):
    """What a tile is chosen for."""

    kernel: str
    tokens_per_expert: int  # a power of 2
    n: int  # output width; of `up` and `hidden` the hidden width F
    k: int  # inner width; of `outer`, whose inner dimension is the rows, the other output width
    dtype: str
    chip: str


class Timed(NamedTuple):
    """A row of a table."""

    product: Product
    tile: Tile
    milliseconds: float
    rule_milliseconds: float  # of the rule's tile, in the same run


def product_of(kernel: str, like: torch.Tensor, rows: int, experts: int, n: int, k: int) -> Product:
    """The product of `rows` rows of `experts` with the dtype and on the chip of a tensor."""
    each = triton.next_power_of_2(max(1, triton.cdiv(rows, max(experts, 1))))
    return Product(kernel, each, n, k, str(like.dtype).removeprefix("torch."), chip_of(like).name)


def tile_of(product: Product, rule: Tile) -> Tile:
    """The table's tile, or the rule's where there is no table, or none for this product."""
    path = os.environ.get(VARIABLE)
    return _tiles(path).get(product, rule) if path else rule


@cache
def _tiles(path: str) -> dict[Product, Tile]:
    return {timed.product: timed.tile for timed in read_table(Path(path))}


def read_table(path: Path) -> list[Timed]:
    """The rows of a table.

    Raises:
        ValueError: naming the file, the row and what is wrong with it.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no table of tiles: {error}") from None
    rows = content.get("tiles") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f'{path}: no table of tiles: {{"tiles": [...]}} is wanted')
    table: dict[Product, Timed] = {}
    for number, row in enumerate(rows, 1):
        try:
            timed = _read_row(row)
        except ValueError as error:
            raise ValueError(f"{path}: row {number}: {error}") from None
        if timed.product in table:
            raise ValueError(f"{path}: row {number}: a second tile for {timed.product.kernel} of the same sizes")
        table[timed.product] = timed
    return list(table.values())


def _read_row(row: Any) -> Timed:
    if not isinstance(row, dict):
        raise ValueError(f"{row!r} is not an object")
    wanted = {*Product._fields, "tile", "milliseconds", "rule_milliseconds"}
    if odd := wanted ^ row.keys():
        raise ValueError(f"{', '.join(sorted(odd))}: {'missing' if odd & wanted else 'unknown'}")
    product = Product(*(row[field] for field in Product._fields))
    for key, known in (("kernel", KERNELS), ("dtype", DTYPES), ("chip", CHIPS)):
        if row[key] not in known:
            raise ValueError(f"{key} is {row[key]!r}; it must be one of {', '.join(known)}")
    for key in ("tokens_per_expert", "n", "k"):
        if type(row[key]) is not int or row[key] < 1:
            raise ValueError(f"{key} is {row[key]!r}; it must be a whole number above 0")
    if not _is_power_of_2(product.tokens_per_expert):
        raise ValueError(f"tokens_per_expert is {product.tokens_per_expert}; it must be a power of 2")
    numbers = row["tile"]
    if not isinstance(numbers, list) or len(numbers) != 5 or any(type(n) is not int for n in numbers):
        raise ValueError(f"tile is {numbers!r}; it must be 5 whole numbers: {', '.join(Tile._fields)}")
    tile = Tile(*numbers)
    if not all(map(_is_power_of_2, tile[:4])) or min(tile[:3]) < 16 or tile.warps > 16 or not 1 <= tile.stages <= 8:
        raise ValueError(
            f"tile is {numbers}; sides must be powers of 2 from 16 on, warps 1, 2, 4, 8 or 16, stages 1 to 8"
        )
    for key in ("milliseconds", "rule_milliseconds"):
        if not isinstance(row[key], int | float) or not row[key] > 0:
            raise ValueError(f"{key} is {row[key]!r}; it must be above 0")
    return Timed(product, tile, row["milliseconds"], row["rule_milliseconds"])


def _is_power_of_2(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def as_row(timed: Timed) -> dict[str, Any]:
    """A row as the table has it."""
    times = {key: getattr(timed, key) for key in ("milliseconds", "rule_milliseconds")}
    return {**timed.product._asdict(), "tile": list(timed.tile), **times}


def write_table(path: Path, rows: Iterable[Timed]) -> None:
    """Write a table aside, and put it in place whole."""
    lines = ",\n".join(f"  {json.dumps(as_row(timed))}" for timed in sorted(rows))
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w") as file:
            file.write(f'{{"tiles": [\n{lines}\n]}}\n')
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
