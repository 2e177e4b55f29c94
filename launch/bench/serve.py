"""`expertmesh bench serve`: our engine joined and split, and transformers, with one checkpoint and the same prompts.

The model is Qwen3-MoE's with random weights, which both read. Each contender is a process of its own that has loaded
it; all of them wait while one answers. For each number of concurrent requests a round draws prompts that nobody has
seen, and every contender answers all of them, in turn: greedy, so many new tokens each, no early end. Prompts are of
one length and so are answers, which is how `generate` is at its best: nothing is padded.

Before a time counts, tokens are compared with those of `generate` in float32. A bfloat16 checkpoint is computed in
bfloat16 by transformers and in float32 by us (system/serve/workers.py), so there the share of equal tokens is told and
nobody is left out.

    parent ── prompts ──► contender (loads, then answers) ── tokens, seconds ──► parent
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import logging
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, NamedTuple

from expertmesh.launch.bench.timing import speed
from expertmesh.launch.pools import Pools
from expertmesh.system.serve.config import ServeConfig

OURS = "expertmesh, joined"
NEEDED = 0.98  # share of tokens, in float32: a close call may fall otherwise and changes what follows it
VOCABULARY, WORDS = 4096, 300  # of the model; of the tokenizer beside it, which nobody reads with
PEER_PAGE = 32  # tokens
DTYPES = ("float32", "bfloat16")
Row = dict[str, Any]
Say = Callable[[str], None]
Tokens = list[list[int]]
Answer = Callable[[Tokens, int], Tokens]
"""(prompts, new tokens of each) -> their answers."""


@dataclass(frozen=True)
class ServeCase:
    """The size of one run."""

    concurrent: Sequence[int] = (1, 4, 16, 32)
    prompt_tokens: int = 64
    new_tokens: int = 32
    layers: int = 4
    hidden_size: int = 512
    ffn_size: int = 512
    experts: int = 16
    top_k: int = 2
    dtype: str = "float32"
    rounds: int = 5

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "layers", "ffn_size", "experts", "top_k", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be 1 or more")
        if not self.concurrent or min(self.concurrent) < 1:
            raise ValueError(f"concurrent={','.join(map(str, self.concurrent))}: such as 1,4,16")
        if self.hidden_size < 64 or self.hidden_size % 64:
            raise ValueError(f"hidden_size={self.hidden_size}: it must be a multiple of 64, the width of a head")
        if self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k} is more than experts={self.experts}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype}: it must be one of {', '.join(DTYPES)}")


class Contender(NamedTuple):
    what: str
    open: Callable[[Path, ServeCase], AbstractContextManager[Answer]]
    """(checkpoint, case) -> a context in which it answers."""
    note: str = ""


def bench_serve(case: ServeCase, say: Say, contenders: Sequence[Contender] | None = None) -> Iterator[list[Row]]:
    """The rows of one table after another: a number of concurrent requests each.

    A row has `what, dtype, concurrent, prompt_tokens, new_tokens, seconds` (from the first request to the last token;
    None where it was not timed), `ratio_to_ours` (its speed over that of our joined engine), `tokens_per_second` (new
    ones), `same_tokens` (share of those that `generate` says in float32), `rounds, note`.

    Raises:
        RuntimeError: if our own engine says something else than `generate`, or either cannot be had.
    """
    if importlib.util.find_spec("transformers") is None:
        raise RuntimeError("transformers is not installed: it writes the model, and its answers are what is right")
    contenders = everyone(case.dtype) if contenders is None else contenders
    draw = Random(1)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as processes:
        checkpoint = Path(folder) / "random"
        say(f"writing a model with {case.layers} layers of {case.experts} experts")
        _in_process(_write_checkpoint, checkpoint, case)
        running: dict[str, _Process] = {}
        reasons: dict[str, str] = {}
        for contender in [REFERENCE, *contenders]:
            say(f"loading {contender.what}")
            process = processes.enter_context(_started(contender, checkpoint, case))
            if not process.failure:
                running[contender.what] = process
            elif contender.what in (REFERENCE.what, OURS):
                raise RuntimeError(f"{contender.what}: {process.failure}")
            else:
                reasons[contender.what] = process.failure
        reference = running.pop(REFERENCE.what)
        notes = {contender.what: contender.note for contender in contenders} | reasons
        for concurrent in case.concurrent:
            prompts = [_prompts(case, concurrent, draw) for _ in range(case.rounds + 1)]
            expected = [reference.answer(batch, case.new_tokens)[0] for batch in prompts]
            say(f"{concurrent} requests at once: {case.rounds} rounds of {len(running)} contenders")
            seconds, same = _in_turn(running, prompts, expected, case.new_tokens)
            for what, share in same.items():
                if case.dtype == "float32" and share < NEEDED:
                    reason = f"wrong: {share:.0%} of its tokens are those of generate"
                    if what == OURS:
                        raise RuntimeError(f"our own engine is {reason}")
                    seconds[what], notes[what] = [], reason
            yield [
                _row(c.what, case, concurrent, seconds.get(c.what, []), seconds[OURS], same.get(c.what), notes[c.what])
                for c in contenders
            ]


def _in_turn(
    running: dict[str, _Process], prompts: list[Tokens], expected: list[Tokens], new_tokens: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each by round, and its share of tokens as expected. The first prompts warm up, who begins moves on."""
    names = list(running)
    seconds: dict[str, list[float]] = {what: [] for what in names}
    equal = dict.fromkeys(names, 0)
    for number, (batch, want) in enumerate(zip(prompts, expected, strict=True)):
        first = number % len(names)
        for what in names[first:] + names[:first]:
            said, taken = running[what].answer(batch, new_tokens)
            pairs = zip(itertools.chain(*said), itertools.chain(*want), strict=True)
            equal[what] += sum(token == wanted for token, wanted in pairs)
            if number:
                seconds[what].append(taken)
    of = sum(len(answer) for batch in expected for answer in batch)
    return seconds, {what: count / of for what, count in equal.items()}


def _row(
    what: str,
    case: ServeCase,
    concurrent: int,
    taken: list[float],
    ours: list[float],
    same: float | None,
    note: str,
) -> Row:
    seconds = median(taken) if taken else None
    return {
        "what": what,
        "dtype": case.dtype,
        "concurrent": concurrent,
        "prompt_tokens": case.prompt_tokens,
        "new_tokens": case.new_tokens,
        "seconds": seconds,
        "ratio_to_ours": speed(taken, ours) if taken else None,
        "tokens_per_second": concurrent * case.new_tokens / seconds if seconds else None,
        "same_tokens": same,
        "rounds": len(taken),
        "note": note,
    }


def _prompts(case: ServeCase, count: int, draw: Random) -> Tokens:
    return [[draw.randrange(WORDS, VOCABULARY) for _ in range(case.prompt_tokens)] for _ in range(count)]


def _write_checkpoint(folder: Path, case: ServeCase) -> None:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from expertmesh.system.tokenizer import Tokenizer

    _hush()
    torch.manual_seed(1)
    heads = case.hidden_size // 64
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=case.hidden_size,
        num_hidden_layers=case.layers,
        num_attention_heads=heads,
        num_key_value_heads=2 if heads % 2 == 0 else 1,
        head_dim=64,
        num_experts=case.experts,
        num_experts_per_tok=case.top_k,
        moe_intermediate_size=case.ffn_size,
        norm_topk_prob=True,
        max_position_embeddings=case.prompt_tokens + case.new_tokens,
        tie_word_embeddings=False,
    )
    Qwen3MoeForCausalLM(config).to(getattr(torch, case.dtype)).save_pretrained(folder)
    Tokenizer.train(iter(["a text"]), WORDS).save(folder)


def _hush() -> None:
    """No progress bars and no advice of transformers' between our lines."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)


# processes


class _Process:
    """A contender that has loaded the checkpoint, seen from here."""

    def __init__(self, what: str, pipe: Connection, failure: str) -> None:
        self._what, self._pipe, self.failure = what, pipe, failure

    def answer(self, prompts: Tokens, new_tokens: int) -> tuple[Tokens, float]:
        """Its answers, and the seconds that they took it. Raises RuntimeError."""
        self._pipe.send((prompts, new_tokens))
        try:
            said = self._pipe.recv()
        except EOFError:
            said = "its process is gone"
        if isinstance(said, str):
            raise RuntimeError(f"{self._what} failed: {said}")
        return said


@contextmanager
def _started(contender: Contender, checkpoint: Path, case: ServeCase) -> Iterator[_Process]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_contend, args=(there, contender, checkpoint, case))
    process.start()
    there.close()
    try:
        failure = here.recv()
    except EOFError:
        failure = "its process is gone"
    try:
        yield _Process(contender.what, here, failure)
    finally:
        here.close()  # it ends when it can hear no more
        process.join(60)
        process.kill()


def _contend(pipe: Connection, contender: Contender, checkpoint: Path, case: ServeCase) -> None:
    try:
        with contender.open(checkpoint, case) as answer:
            pipe.send("")
            while True:
                try:
                    prompts, new_tokens = pipe.recv()
                except EOFError:
                    return
                start = time.perf_counter()
                said = answer(prompts, new_tokens)
                pipe.send((said, time.perf_counter() - start))
    except Exception as error:  # of somebody else's code: the others are still worth timing
        pipe.send(f"failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}")


def _in_process(call: Callable[..., None], *args: object) -> None:
    """In a process of its own, which gives its memory back and needs no peer imported here. Raises RuntimeError."""
    process = multiprocessing.get_context("spawn").Process(target=call, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{call.__name__.strip('_')} failed")


# contenders


@contextmanager
def _ours(pools: Pools | None, config: ServeConfig, checkpoint: Path, case: ServeCase) -> Iterator[Answer]:
    from expertmesh.launch.client import Client
    from expertmesh.launch.serving import bring_up, look_at
    from expertmesh.system.serve.request import Request, Sampling

    numbers = itertools.count()

    async def text(client: Client, prompt: list[int], new_tokens: int) -> list[int]:
        sampling = Sampling(max_tokens=new_tokens, temperature=0, ignore_eos=True)
        request = Request(str(next(numbers)), prompt, sampling)
        return [output.token_id async for output in client.generate(request)]

    async def texts(client: Client, prompts: Tokens, new_tokens: int) -> Tokens:
        return await asyncio.gather(*(text(client, prompt, new_tokens) for prompt in prompts))

    with asyncio.Runner() as runner:
        running = max(config.max_running, *case.concurrent)  # none waits for another's end
        engine = bring_up(look_at(checkpoint), pools, config.model_copy(update={"max_running": running}))
        client = runner.run(engine.__aenter__()).client
        try:
            yield lambda prompts, new_tokens: runner.run(texts(client, prompts, new_tokens))
        finally:
            runner.run(engine.__aexit__(None, None, None))


@contextmanager
def _transformers(dtype: str, continuous: bool, checkpoint: Path, case: ServeCase) -> Iterator[Answer]:
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig, Qwen3MoeForCausalLM

    _hush()
    model = Qwen3MoeForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    model.eval()

    def settings(new_tokens: int) -> GenerationConfig:
        return GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)

    def generate(prompts: Tokens, new_tokens: int) -> Tokens:
        ids = torch.tensor(prompts)
        said = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings(new_tokens))
        return said[:, ids.shape[1] :].tolist()

    def cache(count: int) -> ContinuousBatchingConfig:
        pages = count * -(-(case.prompt_tokens + case.new_tokens) // PEER_PAGE)
        return ContinuousBatchingConfig(
            num_blocks=pages, page_size=PEER_PAGE, max_batch_tokens=ServeConfig().step_tokens
        )

    of = 0  # prompts that its manager was made for

    def generate_batch(prompts: Tokens, new_tokens: int) -> Tokens:
        nonlocal of
        if of != len(prompts):
            model.destroy_cached_continuous_batching_manager()
        of = len(prompts)
        found = model.generate_batch(prompts, settings(new_tokens), cache(of), persistent_manager=True, warmup=False)
        return [list(one.generated_tokens) for one in found.values()]

    yield generate_batch if continuous else generate
    model.destroy_cached_continuous_batching_manager()


REFERENCE = Contender("generate in float32", partial(_transformers, "float32", False))


def everyone(dtype: str) -> list[Contender]:
    """Ours, joined, is the first: the others are compared with it."""

    def split(what: str, ffn: int, **settings: int) -> Contender:
        return Contender(f"expertmesh, split {what}", partial(_ours, Pools(1, ffn), ServeConfig(**settings)))

    note = f"page_size={PEER_PAGE}, as many pages as are needed, steps as large as ours: faster here than its defaults"
    return [
        Contender(OURS, partial(_ours, None, ServeConfig())),
        split("1:1", 1),
        split("1:1, one micro-batch", 1, micro_batches=1),
        split("1:1, two micro-batches", 1, micro_batches=2),
        split("1:2", 2),
        Contender("transformers generate", partial(_transformers, dtype, False)),
        Contender("transformers continuous batching", partial(_transformers, dtype, True), note),
    ]
