"""Foreign tensors made of ours and ours of foreign ones: the same numbers at the same places, both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from expertmesh.system.convert.layout import Piece, Shapes, Theirs, ours_from_theirs, theirs_from_ours
from expertmesh.system.convert.stream import Part, read_headers, read_tensor

OURS: Shapes = {"whole": (3, 2), "a": (2, 2), "b": (2, 2), "vectors": (2, 3), "up": (1, 2), "gate": (1, 2)}
LAYOUT = [
    Theirs("w", (3, 2), (Piece("whole", (3, 2)),)),
    Theirs("stack", (2, 2, 2), (Piece("a", (2, 2)), Piece("b", (2, 2)))),
    Theirs("v1", (3,), (Piece("vectors", (3,), 1),)),  # an order of theirs
    Theirs("v0", (3,), (Piece("vectors", (3,), 0),)),
    Theirs("joined", (2, 2), (Piece("gate", (1, 2)), Piece("up", (1, 2)))),
    Theirs("spare", (2, 1), ()),
]


def stored(tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, Part]:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return {name: Part(tensor) for name, tensor in read_headers(folder).items()}


def test_both_ways(tmp_path):
    torch.manual_seed(0)
    ours = {name: torch.randn(shape) for name, shape in OURS.items()}
    expected = {
        "w": ours["whole"],
        "stack": torch.stack([ours["a"], ours["b"]]),
        "v1": ours["vectors"][1],
        "v0": ours["vectors"][0],
        "joined": torch.cat([ours["gate"], ours["up"]]),
        "spare": torch.zeros(2, 1).bfloat16(),
    }
    made = {copy.name: read_tensor(copy) for copy in theirs_from_ours(LAYOUT, stored(ours, tmp_path / "ours"), "BF16")}
    assert list(made) == list(expected)
    for name, tensor in expected.items():
        assert made[name].dtype == tensor.dtype and torch.equal(made[name], tensor), name
    del made["spare"]
    back = ours_from_theirs(LAYOUT, stored({n: t.clone() for n, t in made.items()}, tmp_path / "theirs"), OURS)
    assert [copy.name for copy in back] == list(OURS)
    for copy in back:
        assert torch.equal(read_tensor(copy), ours[copy.name]), copy.name


FP8_ROWS = [(0, 128, "one block"), (1, 256, "rows of the second matrix"), (0, 200, "a block that ends early")]


@pytest.mark.parametrize("matrix, rows", [c[:2] for c in FP8_ROWS], ids=[c[2] for c in FP8_ROWS])
def test_fp8_rows_keep_their_factors(tmp_path, matrix, rows):
    torch.manual_seed(0)
    weight = torch.randn(2, 300, 140).to(torch.float8_e4m3fn)
    factors = torch.rand(2, 3, 2) + 0.5
    whole = stored({"w": weight, "s": factors}, tmp_path / "theirs")
    part = Part(whole["w"].stored, whole["s"].stored).cut(matrix * 300 * 140, (rows, 140))
    layout = [Theirs("w", (rows, 140), (Piece("w", (rows, 140)),))]
    (copy,) = theirs_from_ours(layout, {"w": part}, "F32")
    spread = factors[matrix].repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :140]
    assert torch.equal(read_tensor(copy), (weight[matrix, :rows].float() * spread).bfloat16())
