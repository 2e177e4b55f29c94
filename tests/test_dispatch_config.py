"""What a recipe may ask for, between expert-parallel ranks."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from expertmesh.parallel.dispatch_config import DispatchConfig


@pytest.mark.parametrize(
    "keys", [{"kind": "all"}, {"wire": "fp4"}, {"chunks": 0}, {"ranks_per_node": 0}, {"chunk": 2}], ids=str
)
def test_what_does_not_exist_is_refused(keys):
    with pytest.raises(ValidationError):
        DispatchConfig(**keys)
