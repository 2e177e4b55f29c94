"""Tokens go past FFN halves one by one as the rule says, in any company; attention, prompts and cold layers never."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from serving import answers, pools_in_threads, requests, wait_for_end
from tiny import context_of, prepare_tiny_data, tiny_model, write_random_checkpoint

from expertmesh.kernels.routing import Routing
from expertmesh.parallel.dispatchers import LocalDispatcher
from expertmesh.parallel.timeline import Turns
from expertmesh.system.model.checkpoint import Checkpoint, open_checkpoint
from expertmesh.system.model.context import Context
from expertmesh.system.model.skip_ffn import FFNSkip, SkipRule
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.model.weights import initialise
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.engine import Engine
from expertmesh.system.serve.request import Request
from expertmesh.system.serve.sampler import Place, sample
from expertmesh.system.serve.workers import joined_engine

LAYERS, COLD, NEXT, AFTER = 8, 1, 2, 2
MODEL = tiny_model(layers=LAYERS)  # with gating residuals
FORCED = -1.0  # every cosine is large enough


def config(above: float | None, **changes: Any) -> ServeConfig:
    skipping = {"skip_ffn_above": above, "skip_ffn_layers": NEXT, "skip_ffn_cold": COLD, "skip_ffn_after": AFTER}
    return ServeConfig(**{"page_size": 4, "prefix_cache": False, **skipping, **changes})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    run_dir = tmp_path_factory.mktemp("skipped")
    prepare_tiny_data(run_dir)
    return open_checkpoint(write_random_checkpoint(run_dir, MODEL))


@pytest.fixture(scope="module")
def model() -> Transformer:
    made = Transformer(MODEL)
    initialise(made, seed=3, standard_deviation=0.2)
    return made.eval()


def ref_passes(x_D: torch.Tensor, may: bool, rule: SkipRule, half: Any) -> tuple[torch.Tensor, list[int]]:
    """One token through all layers by the definition: what becomes of it, and the layers it went past."""
    left, past = 0, []
    for layer in range(LAYERS):
        if layer in rule.warm and left:
            left -= 1
            past.append(layer)
            continue
        y_D = half(x_D, layer)
        cosine = x_D @ y_D / (x_D.norm() * y_D.norm())
        if layer in rule.warm and may and cosine >= rule.above:
            left = rule.layers
        x_D = y_D
    return x_D, past


@pytest.mark.parametrize("above", [0.5, 0.9, FORCED, 1.01])
@pytest.mark.parametrize("layers", [1, 2, 9])
def test_the_rule_token_by_token(above: float, layers: int) -> None:
    generator = torch.Generator().manual_seed(1)
    map_LDD = torch.randn(LAYERS, 6, 6, generator=generator) * torch.rand(LAYERS, 1, 1, generator=generator)
    x_TD = torch.randn(40, 6, generator=generator)
    rule, may_T = SkipRule(above, layers, range(1, LAYERS - 1)), torch.arange(40) % 4 > 0
    skip, passed_TD, rows = FFNSkip(rule, may_T), x_TD, 0

    def half(x_RD: torch.Tensor, previous: None, context: Context) -> tuple[torch.Tensor, None]:
        nonlocal rows
        rows += len(x_RD)
        return x_RD + x_RD @ map_LDD[context.layer], None

    for layer in range(LAYERS):
        passed_TD, _ = skip(half, passed_TD, None, context_of(40)._replace(layer=layer))
    ref = [
        ref_passes(x_D, bool(may), rule, lambda x, i: x + x @ map_LDD[i]) for x_D, may in zip(x_TD, may_T, strict=True)
    ]
    torch.testing.assert_close(passed_TD, torch.stack([y_D for y_D, _ in ref]))
    assert rows == 40 * LAYERS - sum(len(past) for _, past in ref)
    assert (rows < 40 * LAYERS) == (above <= 1)


def test_a_token_that_goes_past_hands_on_the_logits_before() -> None:
    rule = SkipRule(FORCED, 1, range(2))
    skip, x_TD, routings = FFNSkip(rule, torch.tensor([True, False])), torch.ones(2, 3), []

    def half(x_RD: torch.Tensor, previous: Routing | None, context: Context) -> tuple[torch.Tensor, Routing]:
        chosen_RK = torch.full((len(x_RD), 1), context.layer)
        logits_RN = torch.full((len(x_RD), 4), float(context.layer + 5))
        return x_RD, Routing(chosen_RK, torch.ones(len(x_RD), 1), logits_RN, logits_RN, chosen_RK)

    for layer in range(2):
        _, routing = skip(half, x_TD, routings[-1] if routings else None, context_of(2)._replace(layer=layer))
        routings.append(routing)
    assert routings[1].experts_TK.tolist() == [[4], [1]], "4 is nobody"
    assert routings[1].weights_TK.tolist() == [[0], [1]] and routings[1].dropped_slots == 0
    assert routings[1].logits_TN[:, 0].tolist() == [5, 6]


@torch.inference_mode()
def alone(model: Transformer, request: Request, serve: ServeConfig) -> list[int]:
    """The definition: the whole text again for each token, each token by its place in it."""
    token_ids, prompt, answer = list(request.prompt_token_ids), len(request.prompt_token_ids), []
    skipping = serve.skipping(model.config)
    while len(answer) < request.sampling.max_tokens:
        length, context = len(token_ids), context_of(len(token_ids))
        if skipping is not None:
            may_T = torch.arange(length) >= prompt + skipping.after
            context = context._replace(skip=FFNSkip(skipping.rule, may_T))
        hidden_TD, _ = model(torch.tensor(token_ids), context)
        place = Place(request.sampling, request.sampling.seed or 0, token_ids, prompt)
        answer.append(sample(model.lm_head(hidden_TD[-1:]), [place])[0].token_id)
        token_ids.append(answer[-1])
    return answer


SOME = 0.99  # a quarter of the cosines of this model are below it
WAYS: list[dict[str, Any]] = [
    {},
    {"max_running": 1},
    {"max_running": 3, "step_tokens": 5},
    {"cache_tokens": 64},  # some are computed twice
    {"drafts": "lookup"},
]


@pytest.fixture(scope="module")
def alone_answers(model: Transformer) -> dict[str, list[int]]:
    some, none, forced = (
        {request.id: alone(model, request, config(above)) for request in requests()} for above in (SOME, None, FORCED)
    )
    assert some != none and some != forced, "a rule that always or never holds proves little"
    return some


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_text_does_not_depend_on_company(
    checkpoint: Checkpoint, alone_answers: dict[str, list[int]], way: dict[str, Any]
) -> None:
    assert answers(joined_engine(checkpoint, config(SOME, **way)), requests()) == alone_answers


def test_beyond_1_nothing_changes(checkpoint: Checkpoint) -> None:
    said = [answers(joined_engine(checkpoint, config(above)), requests()) for above in (None, 1.01)]
    assert said[0] == said[1]


def one(model: Transformer, above: float | None) -> Engine:
    """After an answer of 24 tokens to a prompt of 30."""
    engine = Engine(model, (), config(above), "cpu", [LocalDispatcher()], Turns())
    engine.add(requests()[4])
    while engine.has_work:
        engine.step()
    return engine


def test_forced_the_cache_is_whole_and_the_count_is_the_budget(model: Transformer) -> None:
    engine, tokens = one(model, FORCED), 30 + 24 - 1  # the last token of an answer is not computed
    written_LPB = engine.cache.keys_LPBGd.abs().sum((-1, -2)) > 0
    assert written_LPB.flatten(1).sum(1).tolist() == [tokens] * LAYERS
    warm = LAYERS - 2 * COLD
    budget = warm - -(-warm // (NEXT + 1))  # one of every three is measured
    through = [sum(load) // MODEL.moe.top_k for load in engine.runner.loads().values()]
    assert sum(through) == tokens * LAYERS - budget * (23 - AFTER)
    assert through == [53, 53, 32, 32, 53, 32, 32, 53]
    plain = [sum(load) for load in one(model, None).runner.loads().values()]
    assert plain == [tokens * MODEL.moe.top_k] * LAYERS


def test_split_says_the_same_and_sends_less(checkpoint: Checkpoint) -> None:
    """A token that goes past a layer sends nothing there."""
    sent = {}
    for above in (None, SOME, FORCED):
        (loop,), pool = pools_in_threads(checkpoint, config(above), attention=1, ffn=2)
        assert answers(loop, requests()) == answers(joined_engine(checkpoint, config(above)), requests())
        sent[above] = loop.counts().sent_bytes
        wait_for_end(pool)
    assert sent[FORCED] < sent[SOME] < sent[None]


WRONG = [
    (MODEL, {"prefix_cache": True}, "skip_ffn_above goes with prefix_cache=false"),
    (tiny_model(layers=LAYERS, block="parallel"), {}, "block=sequential and without depth"),
    (MODEL, {"skip_ffn_cold": 4}, "skip_ffn_cold=4 at both ends: of 8 layers that leaves no FFN"),
]


@pytest.mark.parametrize(("model_config", "changes", "message"), WRONG, ids=["pages", "parallel", "cold"])
def test_what_does_not_go_together(model_config: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(0.9, **changes).skipping(model_config)
