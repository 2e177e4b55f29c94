"""The experts of a layer: a shard answers as the whole does for its experts, and ids mean what `expert_names` says."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_close
from twin import expert, shared_weights

from expertmesh.kernels.routing import Routing
from expertmesh.kernels.rows import Rows
from expertmesh.parallel.placement import expert_shard, shard_sizes
from expertmesh.system.model.build_experts import build_experts
from expertmesh.system.model.experts import ZeroComputationExperts
from expertmesh.system.model.moe_config import MoEConfig
from expertmesh.system.model.weights import initialise

CONFIG = MoEConfig(ffn_experts=5, expert={"hidden_size": 4}, zero_experts=2, copy_experts=2, constant_experts=2)
WIDTH = 6


def test_shards_together_answer_as_the_whole():
    counts_E = torch.tensor([2, 0, 3, 1, 4])
    rows_RD = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(0))
    whole = build_experts(CONFIG, WIDTH, range(5))
    initialise(whole, 1, 0.5)
    expected_RD = whole(Rows(rows_RD, None, counts_E))
    for size in (2, 3, 7):  # 7: two ranks hold nothing and answer no rows
        answers = []
        sizes = shard_sizes(5, size)
        rows = rows_RD.split([int(c.sum()) for c in counts_E.split(sizes)])
        for rank, (mine, counts) in enumerate(zip(rows, counts_E.split(sizes), strict=True)):
            shard = build_experts(CONFIG, WIDTH, expert_shard(5, rank, size))
            # In a model the shard's names make its weights; here the whole's are copied.
            shard.gate_up.data = whole.gate_up.data[shard.shard.start : shard.shard.stop]
            shard.down.data = whole.down.data[shard.shard.start : shard.shard.stop]
            answers.append(shard(Rows(mine, None, counts)))
        assert_close(torch.cat(answers), expected_RD, what=f"{size} shards")


@pytest.mark.parametrize("expert", [{"hidden_size": 4}, {"kind": "mlp", "hidden_size": 4}], ids=["swiglu", "mlp"])
def test_rows_are_read_where_they_lie_and_answers_weighted(expert):
    experts = build_experts(MoEConfig(ffn_experts=2, expert=expert, top_k=1), WIDTH, range(2))
    initialise(experts, 1, 0.5)
    generator = torch.Generator().manual_seed(0)
    source_XD, weights_R = torch.randn(3, WIDTH, generator=generator), torch.rand(4, generator=generator)
    index_R, counts_E = torch.tensor([2, 0, 2, 1]), torch.tensor([1, 3])
    expected_RD = weights_R[:, None] * experts(Rows(source_XD[index_R], None, counts_E))
    assert_close(experts(Rows(source_XD, index_R, counts_E, weights_R)), expected_RD)


@pytest.mark.parametrize("id_and_name", list(enumerate(CONFIG.expert_names)), ids=lambda pair: pair[1])
def test_each_id_is_the_kind_its_name_says(id_and_name):
    i, name = id_and_name
    experts = ZeroComputationExperts(CONFIG, WIDTH)
    initialise(experts, 1, 0.5)
    x_TD = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    chosen_TK, one_TK = torch.full((3, 1), i), torch.ones(3, 1)
    y_TD = experts(x_TD, Routing(chosen_TK, one_TK, one_TK, one_TK, chosen_TK)).answer(one_TK)
    kind, number = name.split()
    if kind == "constant":
        a = (x_TD @ experts.mix[int(number)].T).softmax(-1)
        assert_close(y_TD, a[:, :1] * x_TD + a[:, 1:] * experts.constant[int(number)])
    else:
        expected = {"ffn": torch.zeros_like(x_TD), "copy": x_TD, "zero": torch.zeros_like(x_TD)}[kind]
        assert torch.equal(y_TD, expected)  # an FFN expert's answer comes from the dispatcher instead
    if kind != "ffn":
        w = {f"zero_computation.{k}": v for k, v in shared_weights(experts).items()}
        for x_D, y_D in zip(x_TD, y_TD, strict=True):
            assert_close(y_D, expert(CONFIG, w, "", i, x_D.double()), what="against the twin")
