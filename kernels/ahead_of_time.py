"""Compiles the kernels for chips that are not here, and says what came out: the check that a machine without a GPU has.

`shipped` of each kernel file lists its kernels with the tiles that they run with; `judge` compiles one for a chip and
reads its machine code. One derived figure tells whether an inner loop keeps the tensor cores fed:

    issue share = instructions a step * warps / 4 issue slots a clock / (multiply-adds a step / multiply-adds a clock)

the part of a multiprocessor's issue slots that the loop needs while its tensor cores work at their full rate; near or
above 1 the loop is bound by its instructions. What was only compiled is not called fast: caches, clocks and waves are
not seen.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource

from expertmesh.kernels import (
    combine_triton,
    grouped_gemm_triton,
    grouped_gemv_triton,
    grouped_swiglu_triton,
    paged_attention_triton,
    quantise_triton,
    quantised_gemm_triton,
    router_sums,
    routing_triton,
    rows,
    slot_order_triton,
)
from expertmesh.kernels.machine_code import read_amd, read_nvidia
from expertmesh.kernels.tiles import CHIPS, Build, Chip

FAMILIES = (
    *(grouped_gemm_triton, grouped_swiglu_triton, rows, combine_triton),
    *(routing_triton, slot_order_triton, router_sums),
    *(quantise_triton, quantised_gemm_triton),
    *(grouped_gemv_triton, paged_attention_triton),
)
MACS_PER_CLOCK = {"sm_80": 1024, "sm_90": 2048, "sm_100": 4096}  # bfloat16, dense, of a multiprocessor; FP8 twice that
ISSUE_SLOTS_PER_CLOCK = 4
REGISTERS, THREADS = 65536, 2048  # of a multiprocessor
SHARED_BYTES = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}  # of it; a program pays 1 KiB more


class Judgement(NamedTuple):
    """A kernel as it was compiled."""

    kernel: str
    tile: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    programs_per_multiprocessor: int | None
    tensor_core_instructions: int
    tma: int
    instructions_per_step: int | None
    issue_share: float | None
    load_bytes: int
    store_bytes: int

    def line(self) -> str:
        """For people: what a kernel takes, and where it has an inner loop, what a step of it costs."""
        taken = f"{self.registers} registers, {self.shared_bytes / 1024:.0f} KiB shared, {self.spill_bytes} B spilled"
        step = f"{self.instructions_per_step} instructions a step" if self.instructions_per_step is not None else ""
        step += f", issue share {self.issue_share:.2f}" if self.issue_share is not None else ""
        step += ", TMA" if self.tma else ""
        return f"{self.target:7}{self.kernel}: {self.tile}; {taken}" + (f"; {step}" if step else "")


def shipped(chip: Chip) -> list[Build]:
    """Every kernel with every tile that it has on this chip."""
    return [build for family in FAMILIES for build in family.shipped(chip)]


def judge_all(target: str, only: str = "") -> list[Judgement]:
    """Judge the kernels shipped for a chip, on all cores; `only` those whose "name, tile" a pattern is found in.

    Raises:
        ValueError: for a chip that nothing is shipped for, or a pattern that is none.
    """
    if target not in CHIPS:
        raise ValueError(f"--target {target}: kernels are shipped for {', '.join(CHIPS)}")
    try:
        pattern = re.compile(only)
    except re.error as error:
        raise ValueError(f"--only {only}: {error}") from None
    chosen = [build for build in shipped(CHIPS[target]) if pattern.search(f"{build.name}, {build.tile}")]
    # Most of the time is the assembler's, a process of its own. Where that refuses, Triton prints all it was given.
    with contextlib.redirect_stdout(io.StringIO()), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda build: judge(build, CHIPS[target]), chosen))


def judge(build: Build, chip: Chip) -> Judgement:
    """Compile for a chip and read the result; takes one to three seconds, or less where Triton has it in its cache."""
    compiled = _compile(build, chip)
    amd = chip.name.startswith("gfx")
    code = read_amd(compiled.asm["amdgcn"]) if amd else read_nvidia(compiled.asm["cubin"])
    shared, warps = compiled.metadata.shared, build.tile.warps
    share = programs = None
    if not amd:
        programs = min(
            REGISTERS // (-(-code.registers // 8) * 8 * warps * 32),
            SHARED_BYTES[chip.name] // (shared + 1024),
            THREADS // (warps * 32),
        )
        if code.step_instructions is not None:
            tile = build.tile
            macs = tile.rows * tile.columns * tile.depth * build.accumulators
            issued = code.step_instructions * warps / ISSUE_SLOTS_PER_CLOCK
            share = round(issued * MACS_PER_CLOCK[chip.name] * 2 / build.operand_bytes / macs, 3)
    return Judgement(
        kernel=build.name,
        tile=str(build.tile),
        target=chip.name,
        registers=code.registers,
        spill_bytes=code.spill_bytes,
        shared_bytes=shared,
        programs_per_multiprocessor=programs,
        tensor_core_instructions=code.tensor_core_instructions,
        tma=code.tma_instructions,
        instructions_per_step=code.step_instructions,
        issue_share=share,
        load_bytes=code.load_bytes,
        store_bytes=code.store_bytes,
    )


def _compile(build: Build, chip: Chip) -> triton.compiler.CompiledKernel:
    if not isinstance(build.kernel, triton.runtime.jit.JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted in this process, and cannot be compiled")
    signature: dict[str, str] = {}
    constants: dict[tuple[int], object] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for i, name in enumerate(build.kernel.arg_names):
        value = build.arguments[name]
        if not isinstance(value, str):
            signature[name], constants[(i,)] = "constexpr", value
        elif value.startswith("desc:"):
            signature[name] = f"tensordesc<{value.removeprefix('desc:')}>"
        else:
            signature[name], _, divisor = value.partition(":")
            if divisor:  # what a launch finds out of a pointer or a size; without it no access is wider than an element
                attributes[(i,)] = [["tt.divisibility", int(divisor)]]
    amd = chip.name.startswith("gfx")
    target = GPUTarget("hip", chip.name, 64) if amd else GPUTarget("cuda", int(chip.name[3:]), 32)
    options = {"num_warps": build.tile.warps, "num_stages": build.tile.stages, "enable_fp_fusion": True}
    return triton.compile(ASTSource(build.kernel, signature, constants, attributes), target=target, options=options)
