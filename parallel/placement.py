"""Which rank holds which expert: by default equal contiguous blocks; or a `Placement`, where load decides.

A placement lists physical slots, rank after rank; each holds a copy of one expert:

    slot       0  1  2 | 3  4  5          4 experts, 2 ranks, 3 slots a rank
    expert     2  0  3 | 2  1  0          experts 2 and 0 have two copies each

Slots are to the wire what experts were: rank r has slots `expert_shard(slots, r, ranks)`. So a dispatcher that is
handed slot ids in place of expert ids, and the number of slots in place of that of experts, works unchanged
(placed_dispatcher.py). Which copy serves a token, two functions say: `place_slots` gives each copy the same share of
the rows; `place_on_fewest` wakes as few experts on the busiest rank as it can.

Legend: T tokens, K choices a token, E experts, P slots, C copies of one expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch


def expert_shard(num_experts: int, rank: int, size: int) -> range:
    """The experts that rank `rank` of `size` holds: a contiguous range of [0, num_experts), possibly empty."""
    return range(num_experts * rank // size, num_experts * (rank + 1) // size)


def shard_sizes(num_experts: int, size: int) -> list[int]:
    """How many experts each of `size` ranks holds, in rank order."""
    return [len(expert_shard(num_experts, rank, size)) for rank in range(size)]


@dataclass(frozen=True)
class Placement:
    """The experts of one layer on `ranks` ranks, every expert at least once and never twice on one rank."""

    num_experts: int
    ranks: int
    experts_P: tuple[int, ...]
    """The expert in each slot, rank after rank."""

    def __post_init__(self) -> None:
        unknown = set(self.experts_P) - set(range(self.num_experts))
        missing = set(range(self.num_experts)) - set(self.experts_P)
        if unknown or missing:
            which = f"expert {min(unknown)} does not exist" if unknown else f"expert {min(missing)} has no slot"
            raise ValueError(f"experts_P={list(self.experts_P)} of {self.num_experts} experts: {which}")
        for rank in range(self.ranks):
            held = self.held(rank)
            if len(set(held)) < len(held):
                raise ValueError(f"rank {rank} holds an expert twice: {list(held)}")

    @classmethod
    def contiguous(cls, num_experts: int, ranks: int) -> Placement:
        """What `expert_shard` says."""
        return cls(num_experts, ranks, tuple(range(num_experts)))

    @classmethod
    def of_ranks(cls, num_experts: int, experts_of_rank: Sequence[Iterable[int]]) -> Placement:
        """The experts of each rank, in the order of its slots; as many on each as `expert_shard` would give it."""
        placement = cls(num_experts, len(experts_of_rank), tuple(e for held in experts_of_rank for e in held))
        assert all(placement.held(r) == tuple(held) for r, held in enumerate(experts_of_rank)), "uneven ranks"
        return placement

    @property
    def slots(self) -> int:
        return len(self.experts_P)

    def held(self, rank: int) -> tuple[int, ...]:
        """The experts of one rank, in the order of its slots."""
        shard = expert_shard(self.slots, rank, self.ranks)
        return self.experts_P[shard.start : shard.stop]

    @cached_property
    def rank_of_slot(self) -> tuple[int, ...]:
        sizes = shard_sizes(self.slots, self.ranks)
        return tuple(rank for rank, size in enumerate(sizes) for _ in range(size))

    @cached_property
    def slots_of_expert(self) -> tuple[tuple[int, ...], ...]:
        """The slots that hold each expert, in rising order."""
        slots: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(self.experts_P):
            slots[expert].append(slot)
        return tuple(map(tuple, slots))

    def load_of_ranks(self, load_E: Sequence[float]) -> list[float]:
        """The load on each rank where an expert's copies share its load evenly."""
        load_R = [0.0] * self.ranks
        for rank, expert in zip(self.rank_of_slot, self.experts_P, strict=True):
            load_R[rank] += load_E[expert] / len(self.slots_of_expert[expert])
        return load_R


@lru_cache(maxsize=4096)
def _tables(placement: Placement, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """slots_EC and copies_E on a device: a few for each layer, for as long as it keeps its placement.

    The last row stands for all ids that are no expert of the placement.
    """
    slots_of_expert = [*placement.slots_of_expert, (0,)]
    most = max(map(len, slots_of_expert))
    padded = [slots + (0,) * (most - len(slots)) for slots in slots_of_expert]
    copies_E = torch.tensor([len(slots) for slots in slots_of_expert], device=device)
    return torch.tensor(padded, device=device), copies_E


def place_slots(experts_TK: torch.Tensor, placement: Placement, source: int = 0) -> torch.Tensor:
    """[T, K] int64: the slot that serves each choice. Copies of one expert take turns, by token and by rank.

    Token t of rank `source` goes to copy (t + source) mod C. Two tokens in a row never ask the same copy, nor do the
    single tokens that many ranks have while decoding. The answer depends on nothing else, so a batch that is computed
    again takes the same way.

    Args:
        experts_TK: [T, K] int64 expert ids. Those from `num_experts` on have no row anywhere (zero-computation
            experts, dropped slots); they stay in their order and follow the slots: E + i becomes P + i.
        source: the rank that has these tokens.
    """
    slots_EC, copies_E = _tables(placement, experts_TK.device)
    known_TK = experts_TK.clamp(max=placement.num_experts)
    tokens_T1 = torch.arange(source, source + len(experts_TK), device=experts_TK.device)[:, None]
    slots_TK = slots_EC[known_TK, tokens_T1 % copies_E[known_TK]]
    return torch.where(known_TK < placement.num_experts, slots_TK, experts_TK + placement.slots - placement.num_experts)


def place_slots_ref(experts_TK: torch.Tensor, placement: Placement, source: int = 0) -> torch.Tensor:
    """The definition of `place_slots`."""
    placed_TK = experts_TK.clone()
    for t, experts in enumerate(experts_TK.tolist()):
        for k, expert in enumerate(experts):
            if expert < placement.num_experts:
                slots = placement.slots_of_expert[expert]
                placed_TK[t, k] = slots[(t + source) % len(slots)]
            else:
                placed_TK[t, k] = placement.slots + expert - placement.num_experts
    return placed_TK


def place_on_fewest(experts_TK: torch.Tensor, placement: Placement, source: int = 0) -> torch.Tensor:
    """Like `place_slots`, but all rows of an expert go to one copy: where the fewest other experts are active.

    For decoding. With few rows an expert's cost is the reading of its weights, so the time of a rank goes by the
    number of distinct experts that it must read, and a layer's by the busiest rank (Janus, arXiv 2512.13525, which
    chooses so too: T_moe = beta * a_max + c). Greedy: experts with the fewest copies choose first, each the rank with
    the fewest active ones so far; equal ranks take turns, beginning at `source`. Beside the best of all choices the
    busiest rank had one expert too many in 1 of 500 random small cases, never two (test_placement.py).

    The list of active experts is read on the host: on a GPU this waits for the device.
    """
    num_experts = placement.num_experts
    active = [expert for expert in experts_TK.unique().tolist() if expert < num_experts]
    active.sort(key=lambda expert: len(placement.slots_of_expert[expert]))  # stable: by id among equals
    active_R = [0] * placement.ranks
    slot_E = [0] * (num_experts + 1)
    for expert in active:
        slot_E[expert] = min(
            placement.slots_of_expert[expert],
            key=lambda slot: (active_R[rank := placement.rank_of_slot[slot]], (rank - source) % placement.ranks),
        )
        active_R[placement.rank_of_slot[slot_E[expert]]] += 1
    known_TK = experts_TK.clamp(max=num_experts)
    slots_TK = torch.tensor(slot_E, device=experts_TK.device)[known_TK]
    return torch.where(known_TK < num_experts, slots_TK, experts_TK + placement.slots - num_experts)
