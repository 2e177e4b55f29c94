"""The widths of a model, and the same model with others: layers, experts and choices stay as they are."""

from __future__ import annotations

from typing import Any, NamedTuple

from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.system.model.attention_config import AnyAttention, MLAConfig
from expertmesh.system.model.config import ModelConfig

NARROW = 8  # of one rank's part, where the model allows


class Widths(NamedTuple):
    """None: the model has no such part."""

    hidden: int
    vocabulary: int
    expert: int | None
    shared: int | None
    dense: int | None
    heads: int  # those of keys, with as many query heads each as ever; where they all share one, query heads


def widths_of(model: ModelConfig) -> Widths:
    assert model.vocab_size is not None, "the vocabulary is not known yet"
    expert, shared, dense = (getattr(part, "hidden_size", None) for part in _networks(model))
    return Widths(model.hidden_size, model.vocab_size, expert, shared, dense, _heads(model.attention))


def narrowest(model: ModelConfig, sizes: ParallelSizes) -> Widths:
    """So small that a forward costs nothing, and in the same order: a network that is wider than the model stays so.

    With room for one of them to be twice as wide. As small as the parts of the model allow.
    """
    real, narrow = widths_of(model), NARROW
    while 4 * narrow < real.hidden:
        expert, shared, dense = (
            None if width is None else narrow * (4 if width > real.hidden else 1) * ranks
            for width, ranks in zip(real[2:5], (sizes.etp, sizes.tp, sizes.tp), strict=True)
        )
        widths = Widths(2 * narrow, narrow * sizes.tp, expert, shared, dense, min(sizes.tp, real.heads))
        try:
            return widths_of(ModelConfig.model_validate(resized(model, widths).model_dump()))
        except ValueError:
            narrow *= 2
    return real


def resized(model: ModelConfig, widths: Widths) -> ModelConfig:
    expert, shared, dense = (
        part if width is None else part.model_copy(update={"hidden_size": width})
        for part, width in zip(_networks(model), widths[2:5], strict=True)
    )
    moe = model.moe.model_copy(update={"expert": expert, "shared": shared})
    changes = {"hidden_size": widths.hidden, "vocab_size": widths.vocabulary, "moe": moe, "dense": dense}
    return model.model_copy(update=changes | {"attention": _with_heads(model.attention, widths.heads)})


def _heads(attention: AnyAttention) -> int:
    key_heads = 1 if isinstance(attention, MLAConfig) else attention.kv_heads
    return attention.heads if key_heads == 1 else key_heads


def _with_heads(attention: AnyAttention, heads: int) -> AnyAttention:
    if isinstance(attention, MLAConfig) or attention.kv_heads == 1:
        return attention.model_copy(update={"heads": heads})
    of_each = attention.heads // attention.kv_heads
    return attention.model_copy(update={"heads": heads * of_each, "kv_heads": heads})


def _networks(model: ModelConfig) -> tuple[Any, Any, Any]:
    """Of an expert, of what all tokens share, and of dense layers."""
    return model.moe.expert, model.moe.shared, model.dense
