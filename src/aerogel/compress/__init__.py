"""The main job: from a network and data to a sparse, fast network with a report."""

from __future__ import annotations

from aerogel.compress.recipe import Recipe
from aerogel.compress.resolve import builtin_recipes, load_recipe
from aerogel.compress.sources import RecipeError

__all__ = ["Recipe", "RecipeError", "builtin_recipes", "load_recipe"]
