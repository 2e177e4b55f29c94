"""Measures tiles on the GPU that is here, for the products of one mixture-of-experts layer, forward and backward.

Every tile near the rule's that the chip can hold is compiled, compared with the rule's result and timed; the fastest
makes a row of a table (tuned_tiles.py). A tile that compiles to something wrong must not win a race.

Legend: T tokens, E experts, D model width, F hidden width, R = T * top_k rows, evenly spread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from triton.runtime.errors import TritonError

from expertmesh.kernels.grouped_gemm_triton import multiply, outer, outer_tile
from expertmesh.kernels.grouped_swiglu_triton import hidden, swiglu_tile, up
from expertmesh.kernels.tiles import Chip, Tile, chip_of, choose_tile
from expertmesh.kernels.tuned_tiles import Product, Timed, product_of

Launch = Callable[[Tile], torch.Tensor]


class Layer(NamedTuple):
    """The sizes of a mixture-of-experts layer and of what it is given."""

    tokens: int
    experts: int
    top_k: int
    hidden: int
    ffn: int
    dtype: torch.dtype


class Contest(NamedTuple):
    """A product whose tile is looked for."""

    product: Product
    rule: Tile
    accumulators: int
    launch: Launch


def contests(layer: Layer, device: torch.device) -> Iterator[Contest]:
    """The products of a layer: up, hidden, down (forward), and the gradients of both weights and of the rows."""
    T, E, top_k, D, F, dtype = layer
    R = T * top_k
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype) / shape[-1] ** 0.5

    source_TD, gate_up_EGD, down_EDF = some(T, D), some(E, 2 * F, D), some(E, D, F)
    rows_RD, rows_RF, rows_RG = some(R, D), some(R, F), some(R, 2 * F)
    weights_R = torch.rand(R, generator=generator).to(device)
    index_R = torch.randperm(R, generator=generator).to(device) // top_k
    counts_E = torch.full((E,), R // E, device=device)
    counts_E[: R % E] += 1
    chip, size = chip_of(rows_RD), dtype.itemsize

    def contest(kernel: str, n: int, k: int, rule: Tile, launch: Launch, accumulators: int = 1) -> Contest:
        return Contest(product_of(kernel, rows_RD, R, E, n, k), rule, accumulators, launch)

    rule = swiglu_tile(R, E, size, chip, accumulators=2)
    arguments = source_TD, index_R, counts_E, gate_up_EGD, weights_R
    yield contest("up", F, D, rule, lambda tile: up(*arguments, saved=True, tile=tile).a_RF, 2)
    rule = swiglu_tile(R, E, size, chip, accumulators=1)
    backward = rows_RD, rows_RG, counts_E, down_EDF, weights_R
    yield contest("hidden", F, D, rule, lambda tile: hidden(*backward, kept=True, tile=tile).grad_h_RG)
    rule = choose_tile(R, E, D, size, chip)
    yield contest("multiply", D, F, rule, lambda tile: multiply(rows_RF, down_EDF, counts_E, tile))
    up_EDG = gate_up_EGD.transpose(1, 2)
    yield contest("multiply", D, 2 * F, rule, lambda tile: multiply(rows_RG, up_EDG, counts_E, tile))
    rule = outer_tile(size, chip, gathered=False)
    yield contest("outer", D, F, rule, lambda tile: outer(rows_RD, rows_RF, counts_E, tile=tile))
    rule = outer_tile(size, chip, gathered=True)
    yield contest(
        "outer gathered", 2 * F, D, rule, lambda tile: outer(rows_RG, source_TD, counts_E, index_R, tile=tile)
    )


def candidates(rule: Tile, accumulators: int, itemsize: int, chip: Chip) -> list[Tile]:
    """Tiles of half, the same and twice the rule's sides that fit the chip's registers and shared memory."""
    near = []
    for rows, columns, warps, stages in product((1, 2, 4), (1, 2, 4), (4, 8), (2, 3, 4, 5)):
        tile = Tile(max(16, rule.rows * rows // 2), max(32, rule.columns * columns // 2), rule.depth, warps, stages)
        buffers = (tile.rows + accumulators * tile.columns) * tile.depth * itemsize * (stages - 1)
        held = tile.rows * tile.columns * accumulators // (warps * 32)  # accumulators of a thread, of 255 registers
        if buffers <= chip.shared_bytes and held <= 128 and max(tile[:2]) <= 256:
            near.append(tile)
    return list(dict.fromkeys([rule, *near]))


def tune(
    layer: Layer,
    device: torch.device,
    milliseconds: Callable[[Callable[[], object]], float],
    say: Callable[[str], None],
) -> list[Timed]:
    """The fastest tile of each product; `milliseconds` times a call, such as triton.testing.do_bench."""
    return [_fastest(contest, milliseconds, say) for contest in contests(layer, device)]


def _fastest(
    contest: Contest, milliseconds: Callable[[Callable[[], object]], float], say: Callable[[str], None]
) -> Timed:
    kernel, rule, launch = contest.product.kernel, contest.rule, contest.launch
    want = launch(rule)
    bound = 2e-2 * float(want.float().abs().max())
    times: dict[Tile, float] = {}
    for tile in candidates(rule, contest.accumulators, want.element_size(), chip_of(want)):
        try:
            if float((launch(tile).float() - want.float()).abs().max()) <= bound:
                times[tile] = milliseconds(partial(launch, tile))
            else:
                say(f"{kernel}, {tile}: a wrong result; passed over")
        except TritonError:  # more shared memory or registers than there are
            continue
    best = min(times, key=times.__getitem__)
    gain = times[rule] / times[best]
    say(f"{kernel}, n {contest.product.n}, k {contest.product.k}: {best}; {gain:.2f} times as fast as the rule's tile")
    return Timed(contest.product, best, times[best], times[rule])
