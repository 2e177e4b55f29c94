"""A checkpoint with its routed experts quantised, one matrix at a time; all else is copied as it is.

    layers.2.mlp.experts.5.down_proj.weight  F32 [D, F]   ->  .weight            F8_E4M3 [D, F], or U8 [D, F' / 2]
                                                              .weight_scale_inv  F32, or of INT4 F8_E4M3
                                                              .weight_factor     F32 [1], of INT4 alone

Attention, router, shared and zero-computation experts keep their dtype: they are few bytes, and every token meets them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from expertmesh.kernels.quantised_weights import layout, quantise_weights
from expertmesh.kernels.scheme import Scheme
from expertmesh.system.convert.huggingface import HuggingFaceCheckpoint, copy_texts, match_tensors, tensor_shapes
from expertmesh.system.convert.quality import Quality, compare
from expertmesh.system.convert.stream import (
    DTYPE_BYTES,
    SHARD_BYTES,
    Copy,
    Made,
    copy_of,
    read_headers,
    read_tensor,
    write_shards,
    written_aside,
)
from expertmesh.system.model.checkpoint import Checkpoint, open_checkpoint, write_config
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.moe_config import MoEConfig, QuantizationConfig
from expertmesh.system.model.quantised_experts import SUFFIXES
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.model.weights import weights

NAMES = {torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8", torch.float32: "F32"}


@dataclass(frozen=True)
class Quantisation:
    """What was written, and what it cost."""

    checkpoint: Path
    scheme: str
    parameters: int
    active_parameters: int  # those that a token meets
    tensors: int
    bytes: int  # of all tensors
    bytes_before: int
    peak_bytes: int  # most bytes of tensors in memory at once, while it was written
    quality: Quality

    def summary(self) -> str:
        """For people: size, quality, place."""
        quality = self.quality
        lines = [
            f"{self.scheme}: {self.parameters:,} parameters, {self.active_parameters:,} active, "
            f"in {self.bytes:,} bytes of {self.bytes_before:,}"
        ]
        if quality.cross_entropy_before is not None and quality.cross_entropy_after is not None:
            lost = quality.cross_entropy_after - quality.cross_entropy_before
            lines.append(
                f"held-out cross entropy of {quality.tokens:,} tokens: {quality.cross_entropy_before:.4f} before, "
                f"{quality.cross_entropy_after:.4f} after ({lost:+.4f})"
            )
        read = "the first of them" if quality.held_out else "a prompt"
        lines.append(
            f"logits over {read}: {quality.max_logit_difference:.3g} apart at most, up to {quality.largest_logit:.3g}"
        )
        return "\n".join([*lines, f"checkpoint  {self.checkpoint}"])


def quantise(
    found: Checkpoint,
    out: Path,
    scheme: Scheme,
    held_out_BS1: torch.Tensor | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Quantisation:
    """Write `found` with quantised experts to `out`, and measure what that changes.

    `held_out_BS1`: the tokens to measure it on, see `quality.compare`.

    Raises:
        ValueError: with one line, for a model whose experts cannot be quantised, or an `out` that is taken.
        CheckpointError: for a damaged checkpoint.
    """
    config = quantised_config(found, scheme)
    before = _copies(found)
    experts = _expert_names(found.config)
    copies = [part for copy in before for part in (_quantised(copy, scheme) if copy.name in experts else [copy])]
    assert {copy.name: copy.shape for copy in copies} == tensor_shapes(config), "config and copies disagree"
    with written_aside(out) as folder:
        peak_bytes = write_shards(copies, folder, shard_bytes)
        write_config(folder, config, found.dtype)
        copy_texts(found, folder)
        quality = compare(found, open_checkpoint(folder), held_out_BS1)
    return Quantisation(
        checkpoint=out.absolute(),
        scheme=scheme.value,
        parameters=config.num_params(),
        active_parameters=config.num_active_params(),
        tensors=len(copies),
        bytes=sum(copy.nbytes for copy in copies),
        bytes_before=sum(copy.nbytes for copy in before),
        peak_bytes=peak_bytes,
        quality=quality,
    )


def quantised_config(found: Checkpoint, scheme: Scheme) -> ModelConfig:
    """The checkpoint's config with its experts quantised. Raises ValueError."""
    config = found.config
    if config.moe.quantization:
        raise ValueError(f"{found.folder}: its experts are {config.moe.quantization.scheme} already")
    if not config.moe_layers or not config.moe.ffn_experts:
        raise ValueError(f"{found.folder}: the model has no routed experts to quantise")
    try:
        moe = MoEConfig(**config.moe.model_dump() | {"quantization": QuantizationConfig(scheme=scheme)})
    except ValidationError as error:
        raise ValueError(f"{found.folder}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    return config.model_copy(update={"moe": moe})


def _copies(found: Checkpoint) -> list[Copy]:
    if isinstance(found, HuggingFaceCheckpoint):
        return list(found.copies.values())
    parts = match_tensors(tensor_shapes(found.config), read_headers(found.folder), found.folder)
    return [copy_of(name, part.stored, part.scale) for name, part in parts.items()]


def _expert_names(config: ModelConfig) -> set[str]:
    """The routed experts' matrices."""
    with torch.device("meta"):
        model = Transformer(config)
    return {name for weight in weights(model) if weight.is_expert for name in weight.split(weight.parameter)}


def _quantised(copy: Copy, scheme: Scheme) -> list[Copy]:
    """What is kept of a matrix. It is read and quantised for each anew: a file has its widest tensors first."""
    n, k = copy.shape
    told = layout(scheme, n, k)
    made = 3 * 4 * n * k  # the matrix in float32, divided by its scales, and rounded

    def kept(field: int) -> Callable[[], torch.Tensor]:
        def make() -> torch.Tensor:
            quantised = quantise_weights(read_tensor(copy)[None], scheme)
            tensor = (quantised.values, quantised.scales, quantised.factors_EP)[field]
            assert tensor is not None
            return tensor[0]

        return make

    copies = []
    for field, (name, kept_as) in enumerate(told._asdict().items()):
        if kept_as is not None:
            shape, dtype = kept_as
            held = copy.nbytes + made
            copies.append(Copy(copy.name + SUFFIXES[name], NAMES[dtype], shape, (Made(kept(field), held),)))
    assert all(copy.dtype in DTYPE_BYTES for copy in copies)
    return copies
