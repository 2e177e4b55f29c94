"""The base of every section of a recipe: a misspelt key is an error, and a value never changes after it was checked."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class RecipeSection(BaseModel):
    """A frozen group of recipe keys. It lives beside the code that reads it and knows nothing of the other sections."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def kind_or(default: str) -> BeforeValidator:
    """For a section that comes in several kinds, told apart by its key `kind`: left out, it is `default`."""

    def fill_in(value: Any) -> Any:
        return {"kind": default, **value} if isinstance(value, dict) else value

    return BeforeValidator(fill_in)
