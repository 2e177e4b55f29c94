"""What attention and FFN workers say to each other, in one of two forms.

routed      A -> F  the tokens that chose an expert of F, each once; which token each row is; rows of each expert
            F -> A  the answer to each row, to be weighted and summed where the token is

broadcast   A -> F  every token that chose an FFN expert anywhere, with its choices and their weights (Step-3's form,
            F -> A  the weighted sum of F's experts for each of these tokens           arXiv 2507.19427, section 3.2)

With T tokens of K choices over F workers, routed sends about min(1, K/F) T tokens to each and gets K/F T rows from
each; broadcast sends T and gets T. So broadcast is for few workers and many choices, and needs no sorting on the
attention side. Answers of a routed exchange give the bits of serving joined; sums of a broadcast one are added worker
by worker.

Tokens travel in a wire format (wire.py); answers as the experts give them, since they are summed.

Legend: T tokens of a micro-batch, U tokens sent, K choices a token, E experts of one worker, R rows, D width.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from expertmesh.kernels.combine import combine_rows
from expertmesh.kernels.routing import sort_slots
from expertmesh.kernels.rows import Rows
from expertmesh.parallel.dispatchers import ExpertLayer
from expertmesh.parallel.link import LastingLink, Link, as_bytes
from expertmesh.parallel.wire import Wire

_QUESTION = struct.Struct("<diiii")  # width, layer, tokens, second number, bytes of one token
_ANSWER = struct.Struct("<qqq")  # bytes, nanoseconds that the rows lay, nanoseconds of work


class Answered(NamedTuple):
    """What an FFN worker says of its own time, in nanoseconds."""

    waited: int
    worked: int


class Work(NamedTuple):
    """Rows for the experts of one layer here, and what becomes of their answers before they are sent."""

    layer: int
    width: float
    rows: Rows
    finish: Callable[[torch.Tensor], torch.Tensor]


class Layout(NamedTuple):
    """What both ends know without saying it."""

    wire: Wire
    width: int
    dtype: torch.dtype  # of a token where it is computed


class Form(Protocol):
    """How a question reads, on both sides."""

    def ask(self, link: LastingLink, layer: ExpertLayer, parts: Any, layout: Layout) -> None: ...

    def hear(self, link: Link, layout: Layout, experts: Callable[[int], range]) -> Work:
        """The next question of a link; `experts(layer)`: those held here. Raises OSError when nobody is there."""
        ...


class RoutedParts(NamedTuple):
    """What a routed question to one worker is made of."""

    x_UD: torch.Tensor
    index_R: torch.Tensor  # int32: row r is token index[r], sorted by expert
    counts_E: torch.Tensor  # int32 rows of each of the worker's experts


class Routed:
    def ask(self, link: LastingLink, layer: ExpertLayer, parts: RoutedParts, layout: Layout) -> None:
        packed_UW = layout.wire.pack(parts.x_UD.cpu())
        head = _QUESTION.pack(layer.width, layer.layer, len(parts.x_UD), len(parts.index_R), _row_bytes(packed_UW))
        link.send([head, as_bytes(parts.counts_E), as_bytes(parts.index_R), as_bytes(packed_UW)])

    def hear(self, link: Link, layout: Layout, experts: Callable[[int], range]) -> Work:
        width, layer, tokens, rows, token_bytes = _hear_head(link)
        held = len(experts(layer))
        counts_E, index_R, packed = _hear(link, [(held, torch.int32), (rows, torch.int32)], tokens * token_bytes)
        x_UD = _unpacked(packed, tokens, layout)
        return Work(layer, width, Rows(x_UD, index_R.long(), counts_E.long()), lambda answers_RD: answers_RD)


class BroadcastParts(NamedTuple):
    """What a broadcast question to any worker is made of."""

    x_UD: torch.Tensor
    experts_UK: torch.Tensor  # int32
    weights_UK: torch.Tensor  # float32


class Broadcast:
    def ask(self, link: LastingLink, layer: ExpertLayer, parts: BroadcastParts, layout: Layout) -> None:
        packed_UW = layout.wire.pack(parts.x_UD.cpu())
        tokens, choices = parts.experts_UK.shape
        head = _QUESTION.pack(layer.width, layer.layer, tokens, choices, _row_bytes(packed_UW))
        link.send([head, as_bytes(parts.experts_UK), as_bytes(parts.weights_UK), as_bytes(packed_UW)])

    def hear(self, link: Link, layout: Layout, experts: Callable[[int], range]) -> Work:
        width, layer, tokens, choices, token_bytes = _hear_head(link)
        numbers = tokens * choices
        chosen, weights, packed = _hear(link, [(numbers, torch.int32), (numbers, torch.float32)], tokens * token_bytes)
        x_UD, held = _unpacked(packed, tokens, layout), experts(layer)
        chosen_UK = chosen.view(tokens, choices).long()
        here_UK = (chosen_UK >= held.start) & (chosen_UK < held.stop)
        order = sort_slots(torch.where(here_UK, chosen_UK - held.start, len(held)), len(held))
        weights_UK = weights.view(tokens, choices).clone()

        def summed(answers_RD: torch.Tensor) -> torch.Tensor:
            device = answers_RD.device
            return combine_rows(answers_RD, order.slots_R.to(device), weights_UK.to(device))

        return Work(layer, width, Rows(x_UD, order.slots_R // choices, order.counts_E), summed)


FORMS: dict[str, Form] = {"routed": Routed(), "broadcast": Broadcast()}


def tell(link: Link, answer: torch.Tensor, answered: Answered) -> None:
    """FFN side: send an answer, [rows or tokens, D] on the CPU."""
    data = as_bytes(answer.contiguous())
    link.send([_ANSWER.pack(len(data), *answered), data])


def hear_answer(link: LastingLink, into: torch.Tensor) -> Answered:
    """Attention side: fill `into`, contiguous on the CPU, with the answer."""
    head = bytearray(_ANSWER.size)
    link.receive(memoryview(head))
    size, *times = _ANSWER.unpack(head)
    data = as_bytes(into)
    assert size == len(data), f"an answer of {size} bytes, expected {len(data)}"
    link.receive(data)
    return Answered(*times)


def _hear_head(link: Link) -> tuple[float, int, int, int, int]:
    head = bytearray(_QUESTION.size)
    link.receive(memoryview(head))
    return _QUESTION.unpack(head)


def _hear(link: Link, before: Sequence[tuple[int, torch.dtype]], rest: int) -> list[torch.Tensor]:
    """Receive tensors of so many numbers, of 4 bytes each, and `rest` bytes: views of the link's own buffer."""
    sizes = [count * dtype.itemsize for count, dtype in before]
    memory = link.memory(sum(sizes) + rest)
    link.receive(memory)
    whole = torch.frombuffer(memory, dtype=torch.uint8) if len(memory) else torch.empty(0, dtype=torch.uint8)
    parts = whole.split([*sizes, rest])
    return [*(part.view(dtype) for part, (_, dtype) in zip(parts, before, strict=False)), parts[-1]]


def _row_bytes(packed_UW: torch.Tensor) -> int:
    return packed_UW.element_size() * packed_UW.shape[1]


def _unpacked(packed: torch.Tensor, tokens: int, layout: Layout) -> torch.Tensor:
    """x_UD from the bytes of `tokens` packed rows."""
    probe = layout.wire.pack(torch.empty(0, layout.width, dtype=layout.dtype))
    return layout.wire.unpack(packed.view(probe.dtype).view(tokens, probe.shape[1]), layout.dtype)
