"""A smaller model out of a nested one: the first hidden units of each network (MatFormer, arXiv 2310.07707).

    gate, up  [F, D]  ->  rows [:m]            down  [D, F]  ->  columns [:m]            all else as it is

What is written is an ordinary checkpoint without nested parts. It says what the large model says at that width.
"""

from __future__ import annotations

import math
from pathlib import Path

from expertmesh.system.convert.huggingface import Conversion, copy_tokenizer, match_tensors, tensor_shapes
from expertmesh.system.convert.stream import SHARD_BYTES, Stored, copy_of, read_headers, write_shards, written_aside
from expertmesh.system.model.checkpoint import open_checkpoint, write_config
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.experts_config import SwiGLUConfig


def extract(path: Path, out: Path, share: float, shard_bytes: int = SHARD_BYTES) -> Conversion:
    """Write the model that the nested checkpoint in `path` is at `share` of its width to `out`.

    Raises ValueError with one line for a share that was not trained, CheckpointError for a damaged checkpoint.
    """
    large = open_checkpoint(path)
    shares = large.config.nested_shares
    if share not in shares:
        told = f"shares are {', '.join(f'{known:g}' for known in shares)}" if shares else "no part of it is nested"
        raise ValueError(f"--width {share:g}: {path} was not trained for it; {told}")
    small = narrowed(large.config, share)
    shapes = tensor_shapes(small)
    parts = match_tensors(tensor_shapes(large.config), read_headers(path), path)
    copies = [copy_of(name, _first_units(parts[name].stored, shape)) for name, shape in shapes.items()]
    with written_aside(out) as folder:
        peak_bytes = write_shards(copies, folder, shard_bytes)
        write_config(folder, small, large.dtype)
        copy_tokenizer(path, folder)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    active = small.num_active_params()
    return Conversion(out.absolute(), "expertmesh", parameters, active, len(shapes), peak_bytes, {})


def narrowed(config: ModelConfig, share: float) -> ModelConfig:
    """`config` with every nested network at `share` of its width and no longer nested."""

    def small(network: object) -> object:
        if not isinstance(network, SwiGLUConfig) or not network.nested:
            return network
        return SwiGLUConfig(hidden_size=network.width(share))

    moe = config.moe.model_copy(update={"expert": small(config.moe.expert)})
    return config.model_copy(update={"moe": moe, "dense": small(config.dense)})


def _first_units(stored: Stored, shape: tuple[int, ...]) -> Stored:
    """The first rows of a matrix, and the first columns of those."""
    if stored.shape == shape:
        return stored
    rows, columns = shape
    first = stored.cut(0, (rows, stored.shape[1]))
    return first if first.shape == shape else first.columns(columns)
