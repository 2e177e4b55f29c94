"""Tokens guessed ahead, so that one pass of the model can answer for several (speculative decoding, arXiv 2211.17192).

    drafter                                      d_1 ... d_k                 cheap: a search, or a narrow model
    one pass over  [last token, d_1 ... d_k]     logits for k + 1 places
    sampler draws  y_1 ... y_(k+1)               each as if the drafts before it were the text
    kept           y_1 ... y_(a+1)               a: how many drafts were drawn, y_i = d_i for all i <= a

A draw depends on the seed and the place alone (sampler.py), and y_i is drawn from the logits after y_1 ... y_(i-1): so
the text is what it would be without drafts, token for token, and not only alike in distribution. Keys and values of
drafts that were not drawn lie past the end of the text, where nobody looks, and the next pass writes over them.

    lookup    what followed when the text's last tokens stood together before (prompt lookup); for any model
    nested    what the same weights say at a part of their width (MatFormer, arXiv 2310.07707, section 4). It reads the
              keys and values that the whole model has written, and draws with the noise that the whole model will draw
              with: the exponential race in torch.multinomial is won by the same token wherever the two nearly agree.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from expertmesh.system.model.config import ModelConfig
from expertmesh.system.serve.config import ServeConfig

LONGEST, SHORTEST = 4, 2  # tokens at the end of the text that must have stood together before


# (chosen, drafts, width) -> the next token of each text that was chosen, after its draft so far, at a part of the width
NarrowStep = Callable[[list[int], list[list[int]], float], list[int]]


class Drafter(Protocol):
    def length(self, token_ids: Sequence[int], most: int) -> int:
        """How many tokens, `most` at most, `draft` will put after this text."""
        ...

    def draft(self, texts: Sequence[Sequence[int]], counts: Sequence[int], step: NarrowStep) -> list[list[int]]:
        """`counts` tokens after each of the texts."""
        ...


class NoDrafts:
    def length(self, token_ids: Sequence[int], most: int) -> int:
        return 0

    def draft(self, texts: Sequence[Sequence[int]], counts: Sequence[int], step: NarrowStep) -> list[list[int]]:
        return [[] for _ in texts]


NO_DRAFTS = NoDrafts()


class Lookup(NamedTuple):
    most: int

    def length(self, token_ids: Sequence[int], most: int) -> int:
        return len(look_up(token_ids, min(most, self.most)))

    def draft(self, texts: Sequence[Sequence[int]], counts: Sequence[int], step: NarrowStep) -> list[list[int]]:
        return [look_up(text, count) for text, count in zip(texts, counts, strict=True)]


class Nested(NamedTuple):
    most: int
    width: float

    def length(self, token_ids: Sequence[int], most: int) -> int:
        return min(most, self.most)

    def draft(self, texts: Sequence[Sequence[int]], counts: Sequence[int], step: NarrowStep) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in texts]
        for place in range(max(counts, default=0)):
            chosen = [i for i, count in enumerate(counts) if place < count]
            for i, token_id in zip(chosen, step(chosen, drafts, self.width), strict=True):
                drafts[i].append(token_id)
        return drafts


def look_up(token_ids: Sequence[int], most: int) -> list[int]:
    """What followed the last place where the text's last tokens stood before: 4 of them, else 3, else 2; else nothing.

    Where the text ends before `most` tokens, what followed follows again: a text that runs in a circle goes on so.
    """
    text = array("q", token_ids)
    raw, size = text.tobytes(), text.itemsize
    for length in range(min(LONGEST, len(text) - 1), SHORTEST - 1, -1):
        end = len(raw) - size  # of where the same tokens may lie: one place before themselves at the latest
        while (at := raw.rfind(raw[-length * size :], 0, end)) >= 0:
            if at % size == 0:
                after = at // size + length
                return [text[after + i % (len(text) - after)] for i in range(most)]
            end = at + length * size - 1  # bytes of two tokens that look like one
    return []


def build_drafter(config: ServeConfig, model: ModelConfig) -> Drafter:
    """Raises ValueError, one line, where the model cannot draft so."""
    if config.drafts == "none":
        return NO_DRAFTS
    if config.drafts == "lookup":
        return Lookup(config.draft_tokens)
    shares = [share for share in model.nested_shares if share < 1]
    if not shares:
        raise ValueError("serve.drafts=nested: no network of this model is nested; take serve.drafts=lookup")
    width = shares[0] if config.draft_width is None else config.draft_width
    if width not in shares:
        known = ", ".join(f"{share:g}" for share in shares)
        raise ValueError(f"serve.draft_width={width:g}: the model was trained for {known}")
    return Nested(config.draft_tokens, width)
