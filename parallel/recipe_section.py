"""The base of every section of a recipe: a misspelt key is an error, and a value never changes after it was checked."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class RecipeSection(BaseModel):
    """A frozen group of recipe keys. It lives beside the code that reads it and knows nothing of the other sections."""

    model_config = ConfigDict(extra="forbid", frozen=True)
