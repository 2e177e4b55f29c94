"""Which positions of every sequence a context-parallel rank has, and how keys and values come together.

Each rank has two runs of a sequence, one from each end, so that causal attention costs all of them the same (as
Megatron-Core and the ring attention of Llama 3, arXiv 2407.21783, section 3.3.2, have it):

    cp = 2    sequence  | 0 1 | 2 3 | 4 5 | 6 7 |        rank 0 has 0 1 6 7, rank 1 has 2 3 4 5

Only attention looks at other positions, and only at their keys and values. These are gathered, as Llama 3 does it: with
few key-value heads they are small beside the queries, and any kind of mask needs nothing further.

Legend: B sequences, S positions of one, C = S/cp of them here.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from expertmesh.parallel.token_split import TokenSplit


class SequenceSplit:
    """Sequences of `length` positions over the ranks of `group`; None: one rank has them whole."""

    def __init__(self, group: dist.ProcessGroup | None, length: int) -> None:
        self.group, self.length = group, length
        self._ranks = 1 if group is None else group.size()
        self._rank = 0 if group is None else group.rank()
        assert group is None or length % (2 * self._ranks) == 0, f"{length} positions over 2 x {self._ranks} runs"

    def positions_C(self, device: torch.device) -> torch.Tensor:
        """int64 [C]: the positions here, in rising order."""
        return self._positions(self._rank, device)

    def _positions(self, rank: int, device: torch.device) -> torch.Tensor:
        positions_S = torch.arange(self.length, device=device)
        if self.group is None:
            return positions_S
        runs = positions_S.view(2 * self._ranks, -1)
        return torch.cat([runs[rank], runs[2 * self._ranks - 1 - rank]])

    def mine(self, x_TX: torch.Tensor) -> torch.Tensor:
        """[B*S, ...] -> [B*C, ...]: what lies here of something that every rank has, without a gradient."""
        if self.group is None:
            return x_TX
        return x_TX.unflatten(0, (-1, self.length))[:, self.positions_C(x_TX.device)].flatten(0, 1)

    def gather(self, x_TX: torch.Tensor, where: str = "") -> torch.Tensor:
        """[B*C, ...] -> [B*S, ...] in order of positions. Its gradient is summed and cut up again.

        `where`: in the model; with it a hang is told.
        """
        if self.group is None:
            return x_TX
        gathered_TX = TokenSplit(self.group, "context").gather(x_TX, where)
        x_RBCX = gathered_TX.unflatten(0, (self._ranks, -1, self.length // self._ranks))
        as_gathered_S = torch.cat([self._positions(rank, x_TX.device) for rank in range(self._ranks)])
        return x_RBCX.transpose(0, 1).flatten(1, 2)[:, as_gathered_S.argsort()].flatten(0, 1)
