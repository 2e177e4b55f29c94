"""The names of the schemes by which weights are quantised, as configs say them."""

from __future__ import annotations

from enum import StrEnum


class Scheme(StrEnum):
    """How weights are quantised, see quantised_weights.py."""

    FP8_BLOCK = "fp8-block"
    FP8_CHANNEL = "fp8-channel"
    INT4_FP8 = "int4-fp8"
