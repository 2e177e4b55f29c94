"""What one forward pass is given besides its tokens, handed from layer to layer, and what the layers decided."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from expertmesh.kernels.routing import Routing
from expertmesh.parallel.dispatchers import Dispatcher
from expertmesh.parallel.sequence_split import SequenceSplit
from expertmesh.parallel.token_split import TokenSplit
from expertmesh.system.model.attend import Attend
from expertmesh.system.model.skip_ffn import FFNSkip


@dataclass(frozen=True)
class TrainingStep:
    """Which step of training a pass belongs to. Only in one is anything dropped, drawn by lot or made noisy.

    Lots depend on the seed, the step and the place of a sequence in the whole batch: not on which rank holds it.
    """

    step: int  # from 1
    steps: int  # of the whole run
    seed: int
    sequences: range  # those held here, numbered within the whole batch
    sequence_length: int

    @property
    def progress(self) -> float:
        """From 0 at the first step to 1 at the last."""
        return (self.step - 1) / max(self.steps - 1, 1)

    def lots(self, layer: int, purpose: str, width: int, device: torch.device) -> torch.Tensor:
        """[T, width] float32, uniform in (0, 1)."""
        rows = [self._draw(f"{layer}:{purpose}:{sequence}", width) for sequence in self.sequences]
        return torch.cat(rows).to(device) if rows else torch.empty(0, width, device=device)

    def _draw(self, what: str, width: int) -> torch.Tensor:
        digest = hashlib.sha256(f"{self.seed}:{self.step}:{what}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        # Double first: a float32 draw can be 0, and so can 1 minus a small one round to 1.
        drawn = torch.rand(self.sequence_length, width, generator=generator, dtype=torch.float64)
        return drawn.clamp(1e-6, 1 - 1e-6).float()


class Spread(NamedTuple):
    """Where the tokens of some sequences lie between two halves of a block: positions on context-parallel ranks, and
    of these an equal run on each rank of a tensor group."""

    sequences: SequenceSplit
    tokens: TokenSplit

    def mine(self, x_TX: torch.Tensor) -> torch.Tensor:
        """What belongs to this rank's tokens of something that every rank has."""
        return self.tokens.mine(self.sequences.mine(x_TX))

    def whole(self, x_TX: torch.Tensor, where: str) -> torch.Tensor:
        """From what each rank has of its tokens, that of all, sequence by sequence. `where`: in the model."""
        return self.sequences.gather(self.tokens.gather(x_TX, where), where)


class Context(NamedTuple):
    """What every layer of one pass may need."""

    positions_T: torch.Tensor  # int64, of each token in its sequence
    attend: Attend
    dispatcher: Dispatcher
    training: TrainingStep | None = None
    width: float = 1.0  # share of the hidden units of nested experts that is used
    layer: int = 0  # the one that is being computed
    spread: Spread | None = None  # the tokens are a part of all tokens of the sequences; None: they are all of them
    replay: Mapping[int, torch.Tensor] | None = None  # by layer, the experts that its tokens use; None: routers choose
    skip: FFNSkip | None = None  # which tokens go past the FFN half of a layer; None: no token does


class ExpertContext(NamedTuple):
    """What routed experts need to know of a pass: all that a worker of the FFN pool is told."""

    width: float = 1.0
    training: TrainingStep | None = None


AnyContext = Context | ExpertContext
AS_TRAINED = ExpertContext()


class DepthChoice(NamedTuple):
    """Which tokens of a layer went through it."""

    logits_T2: torch.Tensor  # past it, through it
    chosen_T: torch.Tensor  # bool


class Decisions(NamedTuple):
    """What one layer decided for the tokens it was given: what losses and statistics are made from."""

    experts: Routing | None = None
    attentions: Routing | None = None
    depth: DepthChoice | None = None
