"""Whether a model can be split over the ranks that a recipe asks for: known before anything heavy is imported.

The split itself is in tensor_parallel.py.
"""

from __future__ import annotations

from expertmesh.parallel.sizes import ParallelSizes, divisors
from expertmesh.system.model.attention_config import AttentionConfig, MixtureAttentionConfig
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.experts_config import AnyDense, AnyExpert, MLPConfig, SwiGLUConfig


def check_split(config: ModelConfig, sizes: ParallelSizes) -> None:
    """Raise ValueError, in one line, where a model of `config` cannot be split over the ranks of `sizes`.

    A vocabulary that is not known yet is not looked at.
    """
    tp, etp = sizes.tp, sizes.etp
    if sizes.pp > 1:
        _check_stages(config, sizes)
    for degree, ranks in (("tp", tp), ("cp", sizes.cp)):
        if config.depth and ranks > 1:
            raise ValueError(
                "model.depth: the choice among all tokens of a sequence is not split over ranks yet; "
                f"take parallel.{degree}=1, not {ranks}"
            )
    attention, moe = config.attention, config.moe
    if tp > 1:
        _check_halves(config, tp)
        if not isinstance(attention, MixtureAttentionConfig):
            _must_divide("attention.heads", attention.heads, "tp", tp)
        if isinstance(attention, AttentionConfig):
            # With fewer key-value heads than ranks, several ranks would have to hold the same one.
            _must_divide("attention.kv_heads", attention.kv_heads, "tp", tp)
        if config.dense is not None and config.dense_layers:
            _check_network("dense", config.dense, "tp", tp)
        if moe.shared is not None and config.moe_layers:
            _must_divide("moe.shared.hidden_size", moe.shared.hidden_size, "tp", tp)
        if config.vocab_size is not None:
            _must_divide("vocab_size", config.vocab_size, "tp", tp)
    if etp > 1 and config.moe_layers:
        _check_network("moe.expert", moe.expert, "etp", etp)


def _check_stages(config: ModelConfig, sizes: ParallelSizes) -> None:
    pp, stages = sizes.pp, sizes.stages
    if stages > config.layers:
        runs = f" x interleave={sizes.interleave} = {stages}" if sizes.interleave > 1 else ""
        raise ValueError(f"model.layers={config.layers} are fewer than parallel.pp={pp}{runs}; each needs one or more")
    # What several layers have in common would be on several stages.
    if config.share_layers:
        raise ValueError(f"model.share_layers=true: shared layers have no stages; take parallel.pp=1, not {pp}")
    if config.depth and config.depth.shared_router:
        raise ValueError(
            f"model.depth.shared_router=true: a router of several stages is not built; take parallel.pp=1, not {pp}"
        )


def _check_halves(config: ModelConfig, tp: int) -> None:
    """What holds together over all heads is not split (yet)."""
    attention, refused = config.attention, None
    if isinstance(attention, MixtureAttentionConfig):
        refused = "model.attention.kind=mixture: attention experts are"
    elif isinstance(attention, AttentionConfig) and attention.qk_norm == "width":
        refused = "model.attention.qk_norm=width: a norm over all heads is"
    elif isinstance(attention, AttentionConfig) and attention.output_bias:
        refused = "model.attention.output_bias=true: a bias behind a sum over ranks is"
    if refused:
        raise ValueError(f"{refused} not split over ranks yet; take parallel.tp=1, not {tp}")


def _check_network(key: str, network: AnyDense | AnyExpert, degree: str, ranks: int) -> None:
    refused = f"not split over ranks yet; take parallel.{degree}=1, not {ranks}"
    if not isinstance(network, SwiGLUConfig | MLPConfig):
        raise ValueError(f"model.{key}.kind={network.kind}: this kind of network is {refused}")
    if isinstance(network, SwiGLUConfig) and network.nested:
        raise ValueError(f"model.{key}.nested: prefixes of the hidden units are {refused}")
    _must_divide(f"{key}.hidden_size", network.hidden_size, degree, ranks)


def _must_divide(key: str, size: int, degree: str, ranks: int) -> None:
    if size % ranks:
        raise ValueError(
            f"model.{key}={size}: parallel.{degree}={ranks} does not divide it; "
            f"take a multiple of {ranks}, or {degree} one of {divisors(size)[:8]}"
        )
