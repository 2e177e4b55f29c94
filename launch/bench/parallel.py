"""`expertmesh bench parallel`: our expert-parallel layer beside those of others, on gloo ranks, in one run.

Each rank is a process with its share of the cores, its own tokens and its part of the experts. All contenders compute
one problem; what they answer and all their gradients are compared with a float64 loop over all ranks' tokens, and those
that are right are timed, in turn. A step is timed from one barrier to the next: the slowest rank counts.

Bytes are those of token rows that leave the busiest rank in one step, there and back, and their gradients. Ours are
counted; a peer's follow from what it sends, as its note says. The least possible is a row once to each rank that it is
wanted on, one sum back, and the same for gradients.

Legend: T tokens of a rank, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from statistics import median

import torch
import torch.distributed as dist

from expertmesh.launch.bench.cases import DTYPES, Case, Problem, choose, draw, draw_plus_plus
from expertmesh.launch.bench.contenders import Contender, contenders, our_contender
from expertmesh.launch.bench.layer import Layer
from expertmesh.launch.bench.ranks import (
    Row,
    Say,
    answers_of,
    reason_of_any,
    right_of,
    share_of,
    tables_of_ranks,
    time_steps_in_turn,
    train_step,
)
from expertmesh.launch.bench.reference import Right, disagreement, expected
from expertmesh.launch.bench.timing import speed
from expertmesh.launch.bench.zero_memory import MemoryCase, bench_memory

VANILLA = "expertmesh, no zero-computation experts"
PLUS_PLUS = (8, 0.75)  # FFN experts and tau of the MoE++ layer whose bytes are compared with a plain one's


@dataclass(frozen=True)
class ParallelCase:
    """The size of one run."""

    ranks: int = 2
    tokens: int = 2048  # of each rank
    experts: int = 16
    top_k: int = 2
    hidden_size: int = 512
    ffn_size: int = 1024
    dtype: str = "float32"
    rounds: int = 7

    def __post_init__(self) -> None:
        for name in ("tokens", "experts", "top_k", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be 1 or more")
        if self.ranks < 2:
            raise ValueError(f"ranks={self.ranks}: parallel begins with 2")
        if self.experts % self.ranks or PLUS_PLUS[0] % self.ranks:
            raise ValueError(f"ranks={self.ranks} must divide experts={self.experts}, and {PLUS_PLUS[0]} for MoE++")
        if self.top_k > min(self.experts, PLUS_PLUS[0]):
            raise ValueError(f"top_k={self.top_k} is more than experts={self.experts}, or the {PLUS_PLUS[0]} of MoE++")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype}: it must be one of {', '.join(DTYPES)}")

    def of_all_ranks(self, experts: int) -> Case:
        sizes = self.top_k, self.hidden_size, self.ffn_size
        return Case(self.dtype, self.tokens * self.ranks, experts, *sizes)


def bench_parallel(case: ParallelCase, say: Say) -> list[list[Row]]:
    """The rows of three tables: all contenders; MoE++ beside a plain layer; and a rank's memory (zero_memory.py).

    A row of the first two has `table, what, dtype, ranks, tokens (of a rank), experts, top_k, seconds` (of a step,
    forward and backward; None where it was not timed), `ratio_to_ours` (its speed over ours), `sent_bytes,
    bytes_to_ours, rounds, threads, note`.

    Raises:
        RuntimeError: if our own layer disagrees with the reference, or a rank fails.
    """
    memory = MemoryCase(case.ranks, case.experts, case.top_k, case.hidden_size, case.ffn_size)
    return [*tables_of_ranks(case.ranks, partial(_tables, case), say), bench_memory(memory, say)]


def _tables(case: ParallelCase, rank: int, say: Say) -> Iterator[list[Row]]:
    whole = draw(case.of_all_ranks(case.experts))
    yield _table([(contender, whole) for contender in contenders(case.top_k)], rank, case, say)
    experts, tau = PLUS_PLUS
    vanilla, plus_plus = draw_plus_plus(case.of_all_ranks(experts), (tau,))
    others = len(plus_plus.weights.router_ND) - experts
    pair = (
        our_contender(VANILLA, renormalises=False),
        our_contender(f"MoE++ {experts}+{others}, tau {tau}", renormalises=False),
    )
    yield _table(list(zip(pair, (vanilla, plus_plus), strict=True)), rank, case, say)


def _table(entries: list[tuple[Contender, Problem]], rank: int, case: ParallelCase, say: Say) -> list[Row]:
    """The first is ours, and what the others are compared with."""
    first = entries[0][0].what
    steps: dict[str, Callable[[], object]] = {}
    sent: dict[str, int] = {}
    reasons: dict[str, str] = {}

    @cache
    def right(whole: int, renormalises: bool) -> Right:
        return expected(entries[whole][1], renormalises)

    for number, (contender, whole) in enumerate(entries):
        say(f"{contender.what}: comparing answers")
        same = next(n for n, (_, problem) in enumerate(entries) if problem is whole)
        mine = share_of(whole, rank, case.tokens)
        layer, reason = _agreeing(contender, mine, partial(right, same, contender.renormalises), rank, case)
        if layer is None:
            if number == 0:
                raise RuntimeError(f"our own layer is wrong: {reason}")
            reasons[contender.what] = reason
            continue
        steps[contender.what] = partial(train_step, layer, mine)
        steps[contender.what]()  # operators are chosen, memory is fetched
        busiest = torch.tensor(contender.sent(layer, mine))
        dist.all_reduce(busiest, op=dist.ReduceOp.MAX)
        sent[contender.what] = int(busiest)
    say(f"timing {len(steps)} layers in {case.rounds} rounds")
    seconds = time_steps_in_turn(steps, case.rounds)

    rows = []
    for contender, whole in entries:
        what, taken = contender.what, seconds.get(contender.what, [])
        step = median(taken) if taken else None
        ratio = speed(taken, seconds[first]) if taken else None
        note = reasons.get(what, contender.note)
        rows.append(_row(what, whole, case, step, ratio, sent.get(what), sent[first], len(taken), note))
    least = _least_bytes(entries[0][1], case)
    rows.append(_row("the least possible", entries[0][1], case, None, None, least, sent[first], 0, ""))
    return rows


def _row(
    what: str,
    whole: Problem,
    case: ParallelCase,
    seconds: float | None,
    ratio: float | None,
    sent: int | None,
    sent_by_ours: int,
    rounds: int,
    note: str,
) -> Row:
    return {
        "table": "step",
        "what": what,
        "dtype": case.dtype,
        "ranks": case.ranks,
        "tokens": case.tokens,
        "experts": whole.case.experts,
        "top_k": case.top_k,
        "seconds": seconds,
        "ratio_to_ours": ratio,
        "sent_bytes": sent,
        "bytes_to_ours": sent / sent_by_ours if sent is not None and sent_by_ours else None,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "note": note,
    }


def _agreeing(
    contender: Contender, mine: Problem, right: Callable[[], Right], rank: int, case: ParallelCase
) -> tuple[Layer | None, str]:
    """The layer if it is right on all ranks, or why it is not."""
    reason, layer = "", None
    try:
        layer = contender.build(mine, rank, case.ranks)
        answers = answers_of(layer, mine)
        if not contender.narrow:
            reason = disagreement(answers, right_of(right(), mine, rank, case.ranks), case.dtype)
        contender.sent(layer, mine)  # not those of the step that was compared
    except ImportError as error:
        reason = f"not installed: {error.name or error}"
    except Exception as error:  # of somebody else's code: the others are still worth timing
        reason = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    reason = reason_of_any(reason, case.ranks)
    return (None if reason else layer), reason


def _least_bytes(whole: Problem, case: ParallelCase) -> int:
    """Of the busiest rank: rows that leave it and rows that come home from it, and as many gradients."""
    experts = whole.case.experts
    chosen_TK = choose(whole.inputs_STD[0], whole.weights.router_ND, case.top_k)
    rows = [0] * case.ranks
    for token, slots in enumerate(chosen_TK.tolist()):
        owner = token // case.tokens
        for holder in {slot * case.ranks // experts for slot in slots if slot < experts} - {owner}:
            rows[owner] += 1
            rows[holder] += 1
    return 2 * max(rows) * whole.case.hidden_size * DTYPES[case.dtype].itemsize
