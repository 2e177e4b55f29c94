"""What a change of the weights does to a model's answers: held-out cross entropy before and after, and logits.

Where no held-out tokens are known, one prompt is read, and how far its logits moved is all that can be told. The models
are held one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch
from torch.nn import functional

from expertmesh.parallel.dispatchers import LocalDispatcher
from expertmesh.system.model.attend import CausalAttend
from expertmesh.system.model.checkpoint import Checkpoint
from expertmesh.system.model.context import Context
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.tokenizer import Tokenizer

PROMPT = "The quality of a model is what it says about text that it has not seen, such as this sentence here."


@dataclass(frozen=True)
class Quality:
    """Of two models that read the same tokens."""

    tokens: int  # that were predicted
    held_out: bool  # the tokens are a run's held-out ones; else a prompt's, and there is no cross entropy
    cross_entropy_before: float | None  # nats a token
    cross_entropy_after: float | None
    max_logit_difference: float  # over the first sequence
    largest_logit: float  # of it, before


def compare(before: Checkpoint, after: Checkpoint, held_out_BS1: torch.Tensor | None) -> Quality:
    """Read the same tokens with both.

    Args:
        held_out_BS1: [B, S+1] int64 tokens that neither was trained on; position s predicts token s+1. None: a prompt.
    """
    told = held_out_BS1 is not None
    tokens_BS1 = _prompt(before) if held_out_BS1 is None else held_out_BS1
    first, second = _read(before, tokens_BS1), _read(after, tokens_BS1)
    return Quality(
        tokens=tokens_BS1[:, 1:].numel(),
        held_out=told,
        cross_entropy_before=first.cross_entropy if told else None,
        cross_entropy_after=second.cross_entropy if told else None,
        max_logit_difference=float((first.logits_SV - second.logits_SV).abs().max()),
        largest_logit=float(first.logits_SV.abs().max()),
    )


def _prompt(checkpoint: Checkpoint) -> torch.Tensor:
    token_ids = Tokenizer.load(checkpoint.folder).encode(PROMPT)[: checkpoint.config.context_length + 1]
    return torch.tensor([token_ids], dtype=torch.int64)


class _Answers(NamedTuple):
    cross_entropy: float
    logits_SV: torch.Tensor
    """Of the first sequence."""


@torch.inference_mode()
def _read(checkpoint: Checkpoint, tokens_BS1: torch.Tensor) -> _Answers:
    model = Transformer(checkpoint.config)
    checkpoint.load(model)
    inputs_BS, targets_BS = tokens_BS1[:, :-1], tokens_BS1[:, 1:]
    length = inputs_BS.shape[1]
    context = Context(torch.arange(length), CausalAttend(length), LocalDispatcher())
    losses, first_SV = [], None
    for inputs_S, targets_S in zip(inputs_BS, targets_BS, strict=True):
        logits_SV = model.lm_head(model(inputs_S, context).hidden_TD)
        losses.append(functional.cross_entropy(logits_SV, targets_S).item())
        first_SV = logits_SV if first_SV is None else first_SV
    assert first_SV is not None
    return _Answers(fmean(losses), first_SV)
