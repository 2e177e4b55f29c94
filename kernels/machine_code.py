"""Reads what a kernel was compiled to: how it uses a multiprocessor, and what one step of its inner loop costs.

NVIDIA: `cuobjdump` gives registers and stack, `nvdisasm` the instructions, both shipped with Triton. The inner loop is
the innermost natural loop (by dominators) that does tensor-core work; a step is its shortest pass that does all of it,
since an epilogue or a tail behind a branch is not part of every step. AMD: the comments in the assembly, and its
backward branches.

What is not seen: cache hits, bank conflicts, clocks, waves. The numbers rank variants of a kernel and catch a lost
vector width or a spill; they are not a speed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

TENSOR_CORE = ("HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA", "QMMA", "DMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA", "v_mfma")
TENSOR_MEMORY = ("UTMALDG", "UTMASTG", "UBLKCP")
BRANCHES = ("BRA", "EXIT", "BRX", "RET", "JMP")
BITS = re.compile(r"\.(16|64|128|256)(?:\.|$)")


class Code(NamedTuple):
    """What was found."""

    registers: int
    spill_bytes: int  # of a thread's stack: Triton's kernels have nothing else there
    tensor_core_instructions: int
    tma_instructions: int
    step_instructions: int | None  # of one step of the inner loop; None where no loop does tensor-core work
    load_bytes: int  # of the widest access to global memory; 0: none
    store_bytes: int


class Instruction(NamedTuple):
    address: int
    predicated: bool
    opcode: str
    operands: str


def read_nvidia(cubin: bytes) -> Code:
    """Read a compiled kernel of an NVIDIA chip."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
        listing = _output(triton.knobs.nvidia.nvdisasm.path, "-c", str(path))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, f"no resource usage in {usage[:200]!r}"
    instructions, labels = _parse(listing)
    opcodes = [i.opcode for i in instructions]
    loads = [_bytes(o) for o in opcodes if o.startswith(("LDG.", "LDGSTS"))]
    stores = [_bytes(o) for o in opcodes if o.startswith("STG")]
    if any(o.startswith("UTMALDG") for o in opcodes):
        loads.append(16)
    return Code(
        registers=int(found[1]),
        spill_bytes=int(found[2]),
        tensor_core_instructions=sum(map(_is_tensor_core, opcodes)),
        tma_instructions=sum(o.startswith(TENSOR_MEMORY) for o in opcodes),
        step_instructions=_shortest_step(instructions, labels),
        load_bytes=max(loads, default=0),
        store_bytes=max(stores, default=0),
    )


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _is_tensor_core(opcode: str) -> bool:
    return opcode.split(".")[0] in TENSOR_CORE or opcode.startswith("v_mfma")


def _bytes(opcode: str) -> int:
    found = BITS.search(opcode)
    return int(found[1]) // 8 if found else 4


def _parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in order, and the index of the one that each label stands before."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in map(str.strip, listing.splitlines()):
        if label := re.match(r"(\.L_[\w.]+):", line):
            waiting.append(label[1])
        elif found := re.search(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            predicate, _, body = found[2].partition(" ") if found[2].startswith("@") else ("", "", found[2])
            opcode, _, operands = body.strip().partition(" ")
            if predicate == "@!PT" or opcode == "NOP":  # never executed: padding around fences
                continue
            labels.update(dict.fromkeys(waiting, len(instructions)))
            waiting = []
            instructions.append(Instruction(int(found[1], 16), bool(predicate), opcode, operands))
    return instructions, labels


class _Graph(NamedTuple):
    """Basic blocks, in order: their instructions, the blocks that may follow, and those on every way to them."""

    blocks: list[range]
    after: list[list[int]]
    dominators: list[set[int]]


def _graph(instructions: list[Instruction], labels: dict[str, int]) -> _Graph:
    jumps: dict[int, tuple[int | None, bool]] = {}  # instruction: (target, may fall through)
    starts = {0}
    for i, (_, predicated, opcode, operands) in enumerate(instructions):
        if opcode.startswith(BRANCHES):
            label = re.search(r"`\((\.L_[\w.]+)\)", operands)
            target = labels.get(label[1]) if label else None
            conditional = predicated or bool(re.match(r"!?U?P\d", operands)) or ".DIV" in opcode
            jumps[i] = target, conditional
            starts |= {i + 1} | ({target} if target is not None else set())
    ordered = sorted(s for s in starts if s < len(instructions))
    blocks = [range(a, b) for a, b in zip(ordered, [*ordered[1:], len(instructions)], strict=True)]
    number = {block.start: n for n, block in enumerate(blocks)}
    after: list[list[int]] = []
    for block in blocks:
        target, falls_through = jumps.get(block.stop - 1, (None, True))
        following = [block.stop] if falls_through and block.stop in number else []
        after.append([number[s] for s in (*following, *([target] if target in number else []))])
    before = [[b for b, successors in enumerate(after) if n in successors] for n in range(len(blocks))]
    everything = set(range(len(blocks)))
    dominators = [{0}, *(set(everything) for _ in blocks[1:])]
    changed = True
    while changed:
        changed = False
        for n in range(1, len(blocks)):
            common = set.intersection(*(dominators[p] for p in before[n])) if before[n] else set()
            if (new := common | {n}) != dominators[n]:
                dominators[n], changed = new, True
    return _Graph(blocks, after, dominators)


def _loops(graph: _Graph) -> dict[int, tuple[set[int], set[int]]]:
    """By first block: the blocks that jump back to it, and all of the loop."""
    loops: dict[int, tuple[set[int], set[int]]] = {}
    for block, successors in enumerate(graph.after):
        for head in successors:
            if head in graph.dominators[block]:
                members, todo = {head, block}, [block] if block != head else []
                while todo:
                    for previous in (b for b, s in enumerate(graph.after) if todo[-1] in s and b not in members):
                        members.add(previous)
                        todo.insert(0, previous)
                    todo.pop()
                ends, whole = loops.setdefault(head, (set(), set()))
                ends.add(block)
                whole |= members
    return loops


def _shortest_step(instructions: list[Instruction], labels: dict[str, int]) -> int | None:
    """Instructions of one pass through the innermost loop with most tensor-core work; None where there is none."""
    graph = _graph(instructions, labels)
    work = [sum(_is_tensor_core(instructions[i].opcode) for i in block) for block in graph.blocks]
    loops = {h: loop for h, loop in _loops(graph).items() if any(work[b] for b in loop[1])}
    inner = {h: loop for h, loop in loops.items() if not any(o[1] < loop[1] for o in loops.values())}
    steps = [_pass(graph, work, head, *loop) for head, loop in inner.items()]
    return -max(steps)[1] if steps else None


def _pass(graph: _Graph, work: list[int], head: int, ends: set[int], members: set[int]) -> tuple[int, int]:
    """(tensor-core work, minus instructions) of the pass that does most work in fewest instructions."""
    known: dict[int, tuple[int, int] | None] = {}

    def best(block: int) -> tuple[int, int] | None:  # from this block to the end of the pass
        if block not in known:
            known[block] = None  # a way back within the pass leads nowhere
            rests = [(0, 0)] if block in ends else []
            onward = (b for b in graph.after[block] if b in members and b != head and b not in graph.dominators[block])
            rests += [rest for b in onward if (rest := best(b))]
            here = work[block], -len(graph.blocks[block])
            known[block] = max(((here[0] + r[0], here[1] + r[1]) for r in rests), default=None)
        return known[block]

    return best(head) or (0, 0)


def read_amd(assembly: str) -> Code:
    """Read the assembly of a kernel of an AMD chip."""

    def number(pattern: str) -> int:
        found = re.search(pattern, assembly)
        return int(found[1]) if found else 0

    lines = [line.strip() for line in assembly.splitlines()]
    place = {label[1]: i for i, line in enumerate(lines) if (label := re.match(r"(\.LBB\w+):", line))}
    steps = []
    for i, line in enumerate(lines):
        branch = re.match(r"s_c?branch\w*\s+(\.LBB\w+)", line)
        if branch and place.get(branch[1], i) < i:
            body = [x.split()[0] for x in lines[place[branch[1]] : i + 1] if x and not x.startswith((";", "."))]
            if any(map(_is_tensor_core, body)):
                steps.append(len(body))
    opcodes = [line.split()[0] for line in lines if re.match(r"[a-z]\w+", line)]
    widths = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2}

    def widest(kind: str) -> int:
        mine = [o for o in opcodes if re.match(rf"(global|buffer)_{kind}", o)]
        return max((next((b for w, b in widths.items() if o.endswith(w)), 0) for o in mine), default=0)

    return Code(
        registers=number(r"\.vgpr_count:\s+(\d+)"),
        spill_bytes=4 * number(r"\.vgpr_spill_count:\s+(\d+)"),
        tensor_core_instructions=sum(map(_is_tensor_core, opcodes)),
        tma_instructions=0,
        step_instructions=min(steps, default=None),
        load_bytes=widest("load"),
        store_bytes=widest("store"),
    )
