"""Changing a service while it answers: the route, and the command's side of it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from expertmesh.launch.openai_api import ApiError
from expertmesh.launch.pools import check_pools
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.serve.config import ServeConfig

if TYPE_CHECKING:  # serving joined does without Ray
    from expertmesh.launch.split_service import SplitService

PATH = "/scale"


class ScaleBody(BaseModel):
    """The sizes that the pools are to have; null: the present one."""

    model_config = ConfigDict(extra="forbid", strict=True)

    attention: int | None = Field(None, ge=1)
    ffn: int | None = Field(None, ge=1)


def add_scaling(app: FastAPI, model: ModelConfig, config: ServeConfig, split: SplitService | None) -> None:
    """Let callers change the number of workers; what can be wrong about it is answered with one line."""

    @app.post(PATH)
    async def scale(body: ScaleBody) -> dict[str, Any]:
        """Give the pools other sizes. Answers when they have them; requests are answered meanwhile."""
        if split is None:
            raise ApiError(400, "it serves joined, in one process: start it with --attention and --ffn to scale it")
        now = split.pools
        try:
            wanted = check_pools(model, config, body.attention or now.attention, body.ffn or now.ffn)
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        assert wanted is not None
        try:
            return (await split.scale(wanted))._asdict()
        except RuntimeError as error:
            raise ApiError(503, f"{error}; it goes on with what it has") from None


def ask_to_scale(url: str, api_key: str | None, attention: int | None, ffn: int | None) -> dict[str, Any]:
    """Have the service at `url` change its pools; returns when it has. ValueError for what it refuses or where none is.

    Raises RuntimeError where it could not be done.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    body = json.dumps({"attention": attention, "ffn": ffn}).encode()
    address = url.rstrip("/").removesuffix("/v1") + PATH
    try:
        with urllib.request.urlopen(urllib.request.Request(address, body, headers)) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        told = _message(error)
        if error.code >= 500:
            raise RuntimeError(f"{url}: {told}") from None
        raise ValueError(f"{url}: {told}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{url}: no service of ours answers there: {error}") from None


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return json.load(error)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return f"it answers with status {error.code}"
