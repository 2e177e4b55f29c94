"""The two kinds of serving workers, and the joined engine: built from a checkpoint, told nothing of clusters.

    joined       Transformer with all experts, one process
    attention    Transformer without experts: cache, router, zero-computation experts, sampling; owns requests
    ffn          the routed experts of every layer, one shard of them; owns no request

Each reads no more of the checkpoint than it holds.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from threading import Lock, Thread

import torch
import torch.distributed as dist

from expertmesh.kernels.device import choose_device
from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.dispatchers import LocalDispatcher
from expertmesh.parallel.link import ATTENTION, FFN, LinkDispatcher, answer_link, open_link
from expertmesh.parallel.placement import largest_shard
from expertmesh.system.model.checkpoint import load_weights, read_config
from expertmesh.system.model.transformer import ExpertPool, Transformer
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.engine import Engine
from expertmesh.system.serve.loop import EngineLoop
from expertmesh.system.tokenizer import Tokenizer


def joined_engine(checkpoint: Path, config: ServeConfig) -> EngineLoop:
    """Attention and experts in this process."""
    device = choose_device().name
    model = Transformer(read_config(checkpoint))
    load_weights(model, checkpoint)
    eos_ids = Tokenizer.load(checkpoint).eos_ids
    return EngineLoop(Engine(model.to(device).eval(), eos_ids, [LocalDispatcher()], Lock(), config.max_running, device))


def attention_engine(
    checkpoint: Path, config: ServeConfig, rank: int, ffn_workers: int, store: dist.Store
) -> EngineLoop:
    """Attention worker `rank`, linked to every FFN worker."""
    device = choose_device().name
    model_config = read_config(checkpoint)
    model = Transformer(model_config, expert_size=0)
    load_weights(model, checkpoint)
    eos_ids = Tokenizer.load(checkpoint).eos_ids
    timeout = timedelta(seconds=config.exchange_timeout_s)
    links = [open_link(store, rank, ffn, ATTENTION, timeout) for ffn in range(ffn_workers)]
    compute, traffic = Lock(), Traffic()
    most = model_config.moe.ffn_experts
    micro_batches = [LinkDispatcher(links, index, compute, traffic, most) for index in range(config.micro_batches)]
    return EngineLoop(Engine(model.to(device).eval(), eos_ids, micro_batches, compute, config.max_running, device))


def run_ffn_worker(
    checkpoint: Path, config: ServeConfig, rank: int, ffn_workers: int, attention_workers: int, store: dist.Store
) -> None:
    """FFN worker `rank`: answers every attention worker until all of them are gone."""
    device = choose_device().name
    model_config = read_config(checkpoint)
    experts = ExpertPool(model_config, rank, ffn_workers)
    load_weights(experts, checkpoint)
    experts.to(device).eval()
    most_here = largest_shard(model_config.moe.ffn_experts, ffn_workers)
    timeout, compute = timedelta(seconds=config.exchange_timeout_s), Lock()

    def answer(attention: int) -> None:
        link = open_link(store, attention, rank, FFN, timeout)
        dtype = next((p.dtype for p in experts.parameters()), torch.float32)  # a dense model has none
        answer_link(link, experts, experts.experts_here, most_here, model_config.hidden_size, dtype, device, compute)

    threads = [Thread(target=answer, args=(a,), name=f"link-{a}", daemon=True) for a in range(attention_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
