"""From logits to the next token."""

from __future__ import annotations

import hashlib

import torch

from expertmesh.system.serve.request import Sampling


def sample(logits_V: torch.Tensor, sampling: Sampling, seed: int, position: int) -> int:
    """The next token id of one request.

    logits_V: [V] of its last token. `position` is how many tokens it has so far: with `seed` it alone decides the draw,
    so that a request taken over by another worker goes on with the same text.
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # Float64 and relative to the largest: no temperature is too small for it, nor any vocabulary too large for sums.
    wide_V = logits_V.double().cpu()
    scaled_V = (wide_V - wide_V.max()) / sampling.temperature
    if 0 < sampling.top_k < len(scaled_V):
        smallest_kept = scaled_V.topk(sampling.top_k).values[-1]
        scaled_V = scaled_V.masked_fill(scaled_V < smallest_kept, -torch.inf)
    probabilities_V = scaled_V.softmax(-1)
    if sampling.top_p < 1:
        probabilities_V = _nucleus(probabilities_V, sampling.top_p)
    digest = hashlib.sha256(f"{seed}:{position}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return int(torch.multinomial(probabilities_V, 1, generator=generator))


def _nucleus(probabilities_V: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero all but the fewest tokens whose probabilities reach `top_p` (Holtzman et al., arXiv 1904.09751)."""
    descending_V, order_V = probabilities_V.sort(descending=True)
    before_V = descending_V.cumsum(0) - descending_V
    before_V[0] = -1.0  # the likeliest stays, also with top_p 0
    return probabilities_V.index_fill(0, order_V[before_V >= top_p], 0.0)
