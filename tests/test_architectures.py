"""Every shipped recipe is an architecture that holds what its page says, and the page says it of every recipe.

`launch/recipes/README.md` is made from the recipes and the table below. The three checks that all of them pass are in
test_variants.py, which runs this file's recipes; the further ones are in the files named here. After a change, write
the page again with

    python tests/test_architectures.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from expertmesh.launch.recipe import SHIPPED, load_recipe, shipped_recipes

HERE = Path(__file__).parent
PAGE = SHIPPED / "README.md"

# What is shown of an architecture besides the three checks, and where.
TRANSFORMERS = "logits and 64 greedy tokens are those of transformers, both ways (`test_huggingface.py`)"
EXACT: dict[str, str] = {
    "quickstart": "the identities and equations of the paper, in float64 (`test_moe.py`, `test_router.py`, "
    "`test_balance_loss.py`, `test_transformer.py`); its four published sizes (`test_config.py`)",
    "moe-plus-plus-released": "released gates and capacities (`test_moe.py`, `test_router.py`, `test_capacity.py`); "
    "the released checkpoint layout against a twin of its equations (`test_huggingface.py`)",
    "mixtral": f"{TRANSFORMERS}; 46.7 B (`test_config.py`)",
    "qwen3-moe": f"{TRANSFORMERS}; 30.5 B, 3.3 B active (`test_config.py`)",
    "qwen2-moe": TRANSFORMERS,
    "olmoe": TRANSFORMERS,
    "deepseek-v3": f"{TRANSFORMERS}; 671 B, 37 B active (`test_config.py`); the bias follows the load "
    "(`test_variants.py`)",
    "step-3": "316 B, 38 B active (`test_config.py`); its checkpoint layout against a twin of its equations "
    "(`test_huggingface.py`)",
    "llama": TRANSFORMERS,
    "deepspeed-moe": "dispatch by table is that by DeepSpeed's einsum (`test_capacity.py`); "
    "the sizes of the paper's tables (`test_published.py`)",
    "deepspeed-moe-top2": "the second choice by lot, weights of those that serve add up to 1 (`test_router.py`, "
    "`test_capacity.py`)",
    "pr-moe": "coefficients (0, 1) are the dense network (`test_shared_expert.py`); 4.11 B and 31.4 B "
    "(`test_published.py`)",
    "widenet": "an extra layer costs its norms; same norms, same function (`test_block.py`); 29.7, 40.9 and 63.3 M "
    "(`test_published.py`)",
    "adamoe": "a scale adapter of 0 is a plain router, and never changes who is chosen (`test_router.py`)",
    "matformer": "each width is the model cut to it, bit for bit; no gradient beyond a width (`test_experts.py`, "
    "`test_extract.py`)",
    "structured-ffn": "factors merged are factors apart; the guide changes nothing at first "
    "(`test_structured_experts.py`)",
    "structured-ffn-blocks": "the shuffle is a permutation; published sizes (`test_structured_experts.py`)",
    "spark": "how many units of Gaussian rows are kept (`test_statistical_top_k.py`); a twin (`test_spark_experts.py`)",
    "mofme": "scale 1 and shift 0 answer the same whoever is chosen; a twin (`test_modulated_experts.py`)",
    "versatile-ffn": "all slices together are the network, the last loop is it that many times (`test_versatile.py`)",
    "gated-attention": "a gate of 0 halves, an open one changes nothing (`test_attention.py`)",
    "moduleformer": "weights and what is left of the stick are 1; a twin; the loss at its three extremes "
    "(`test_stick_breaking.py`, `test_mixture_attention.py`, `test_mutual_information.py`)",
    "bam": "equal experts are the dense attention, whatever the router (`test_mixture_attention.py`)",
    "mixture-of-depths": "keeping all is the block; who is past it is not touched nor seen (`test_depth.py`)",
}


def page() -> str:
    rows = []
    for name in shipped_recipes():
        recipe = load_recipe(name, [])
        what, _, source = recipe.about.rpartition(" (")
        rows.append(f"| [{name}]({name}.yaml) | {what} | {source.rstrip(')')} | {EXACT[name]} |")
    return f"""# Architectures

`expertmesh train NAME` trains one of these here, small; its `model` section is the place to make it larger. All are
the same block with other parts (`system/model/`), and each of them passes the same three checks
(`tests/test_variants.py`): on two expert-parallel ranks it has the losses, loads, drops and gradients of one rank;
served in two pools it says token for token what it says in one process; its parameters are those that
`ModelConfig.num_params()` counts. What else is shown of it, and where, is in the last column.

| recipe | architecture | source | besides |
|---|---|---|---|
{chr(10).join(rows)}

A test writes and compares this page: `tests/test_architectures.py`.
"""


def test_each_recipe_has_its_row_and_no_other():
    assert sorted(EXACT) == shipped_recipes()
    assert PAGE.read_text() == page(), "recipes and page differ: python tests/test_architectures.py"


@pytest.mark.parametrize("name", sorted(EXACT))
def test_the_tests_that_it_names_are_there(name):
    named = [part for part in EXACT[name].split("`") if part.startswith("test_")]
    assert all((HERE / test).is_file() for test in named)


if __name__ == "__main__":
    PAGE.write_text(page())
