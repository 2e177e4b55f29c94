"""The shipped recipe learns, in three quarters of its steps: better than word frequencies, and better than itself
without its routed experts."""

from __future__ import annotations

from commands import expertmesh_json


def test_quickstart_beats_unigrams_and_itself_without_routed_experts(tmp_path):
    shorter = ("train", "quickstart", "train.steps=600")
    whole = expertmesh_json(*shorter, folder=tmp_path, timeout=1800)
    switched_off = ("name=without", "model.moe.ffn_experts=0", "parallel.ep=1")
    without = expertmesh_json(*shorter, *switched_off, folder=tmp_path, timeout=1800)
    losses = (whole["validation_loss"], without["validation_loss"], whole["unigram_loss"])
    print("\nheld-out loss {:.3f}; routed experts switched off {:.3f}; unigram model {:.3f}".format(*losses))
    assert whole["unigram_loss"] == without["unigram_loss"], "not the same data"
    assert whole["validation_loss"] < whole["unigram_loss"] - 2.0
    assert whole["validation_loss"] < without["validation_loss"] - 0.1
