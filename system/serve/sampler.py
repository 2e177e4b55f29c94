"""From logits to the next token, in this order:

    0  schema       l = -inf for tokens that the schema of the answer does not allow            (constraint.py)
    1  bias         l += logit_bias;  before min_tokens, l = -inf for tokens that would end the answer
    2  repetition   l = l / r where l > 0, else l * r, for each token seen so far, prompt included   (arXiv 1909.05858)
    3  frequency    l -= f * (times it was generated)            presence: l -= p if it was generated     (OpenAI's API)
    4  temperature  l / t;  t = 0 takes the largest and ends here
    5  min_p        keep tokens with at least min_p times the likeliest one's probability            (arXiv 2407.01082)
    6  top_k        keep the k likeliest, and those equal to the last of them
    7  top_p        keep the fewest tokens whose probabilities reach top_p                           (arXiv 1904.09751)
    8  draw         by a generator made from (seed, number of tokens so far) and nothing else

Every row is treated by itself, so no token depends on who else is in the batch. Logprobs are those of the model: the
log-softmax of the logits as they came.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from expertmesh.system.serve.request import Logprobs, Sampling, TokenLogprob

LARGEST = torch.finfo(torch.float64).max / 2  # of a logit: what is taken from it leaves it finite


class Place(NamedTuple):
    """Where a token is drawn: after `token_ids`, the first `prompt` of which are the prompt."""

    sampling: Sampling
    seed: int
    token_ids: Sequence[int]
    prompt: int
    ends: frozenset[int] = frozenset()  # tokens that would end the answer
    allowed: Callable[[], torch.Tensor | None] | None = None  # bool [V]: those that may come; None: all


class Drawn(NamedTuple):
    token_id: int
    logprobs: Logprobs | None = None


def sample(logits_SV: torch.Tensor, places: Sequence[Place]) -> list[Drawn | Exception]:
    """The next token of each of S requests, or why it cannot be drawn, which is no other's concern.

    logits_SV: [S, V] after its last token, any float dtype.
    """
    if not places:
        return []
    likeliest = logits_SV.argmax(-1).tolist()  # one wait for the device, and all there is to do in most batches
    return [_sample_one(*one) for one in zip(logits_SV, places, likeliest, strict=True)]


def _sample_one(logits_V: torch.Tensor, place: Place, likeliest: int) -> Drawn | Exception:
    try:
        token_id = draw(logits_V, place) if _changes(place) or place.sampling.temperature > 0 else likeliest
        return Drawn(token_id, _told(logits_V, token_id, place.sampling.logprobs))
    except Exception as error:
        return error


def draw(logits_V: torch.Tensor, place: Place) -> int:
    """The next token of one request, step by step as the head of this file says."""
    sampling = place.sampling
    # Float64 and relative to the largest: no temperature is too small for it, nor any vocabulary too large for sums.
    wide_V = penalised(logits_V.double().cpu(), place) if _changes(place) else logits_V.double().cpu()
    if sampling.temperature == 0:
        return int(wide_V.argmax())
    scaled_V = (wide_V - wide_V.max()) / sampling.temperature
    if sampling.min_p > 0:
        probabilities_V = scaled_V.softmax(-1)
        scaled_V = scaled_V.masked_fill(probabilities_V < sampling.min_p * probabilities_V.max(), -torch.inf)
    if 0 < sampling.top_k < len(scaled_V):
        smallest_kept = scaled_V.topk(sampling.top_k).values[-1]
        scaled_V = scaled_V.masked_fill(scaled_V < smallest_kept, -torch.inf)
    probabilities_V = scaled_V.softmax(-1)
    if sampling.top_p < 1:
        probabilities_V = _nucleus(probabilities_V, sampling.top_p)
    digest = hashlib.sha256(f"{place.seed}:{len(place.token_ids)}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return int(torch.multinomial(probabilities_V, 1, generator=generator))


def penalised(logits_V: torch.Tensor, place: Place) -> torch.Tensor:
    """A copy of the logits with steps 0 to 3 done."""
    sampling, logits_V = place.sampling, logits_V.clone()
    if (
        place.allowed is not None and (known_V := place.allowed()) is not None
    ):  # a model may have more logits than its tokenizer has tokens
        allowed_V = torch.zeros(len(logits_V), dtype=torch.bool).masked_scatter(
            torch.arange(len(logits_V)) < len(known_V), known_V
        )
        logits_V.masked_fill_(~allowed_V, -torch.inf)
    answer = place.token_ids[place.prompt :]
    for token_id, bias in sampling.logit_bias.items():
        logits_V[token_id] += bias
    if place.ends and len(answer) < sampling.min_tokens:
        going_on_V = logits_V.index_fill(0, torch.tensor(list(place.ends)), -torch.inf)
        if going_on_V.max() > -torch.inf:  # else nothing but an end may come
            logits_V = going_on_V
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(place.token_ids)))
        seen_logits = logits_V[seen]
        factor = torch.where(seen_logits > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
        # A penalty near 0 passes float64: without a largest finite logit, no difference to it is a number.
        logits_V[seen] = (seen_logits * factor).clamp(max=LARGEST)
    if answer and (sampling.frequency_penalty or sampling.presence_penalty):
        times = Counter(answer)
        counts = torch.tensor(list(times.values()), dtype=logits_V.dtype)
        penalties = sampling.frequency_penalty * counts + sampling.presence_penalty
        logits_V[torch.tensor(list(times))] -= penalties
    return logits_V


def told_prompt(logits_TV: torch.Tensor, token_ids: Sequence[int], top: int) -> list[Logprobs]:
    """What the model thought of `token_ids`, each after the logits of its row."""
    told = (_told(logits_V, token_id, top) for logits_V, token_id in zip(logits_TV, token_ids, strict=True))
    return [one for one in told if one is not None]


def _changes(place: Place) -> bool:
    """Whether steps 0 to 3 do anything."""
    sampling = place.sampling
    if place.allowed is not None:
        return True
    penalties = sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1
    return bool(penalties or sampling.logit_bias or sampling.min_tokens)


def _told(logits_V: torch.Tensor, token_id: int, top: int | None) -> Logprobs | None:
    if top is None:
        return None
    logprobs_V = logits_V.double().cpu().log_softmax(-1)
    likeliest = logprobs_V.topk(min(top, len(logprobs_V)))
    pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    return Logprobs(TokenLogprob(token_id, float(logprobs_V[token_id])), tuple(TokenLogprob(*pair) for pair in pairs))


def _nucleus(probabilities_V: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero all but the fewest tokens whose probabilities reach `top_p` (Holtzman et al., arXiv 1904.09751)."""
    descending_V, order_V = probabilities_V.sort(descending=True)
    before_V = descending_V.cumsum(0) - descending_V
    before_V[0] = -1.0  # the likeliest stays, also with top_p 0
    return probabilities_V.index_fill(0, order_V[before_V >= top_p], 0.0)
