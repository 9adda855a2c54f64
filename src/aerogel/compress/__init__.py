"""The main job: from a network and data to a sparse, fast network with a report.

recipe = aerogel.compress.load_recipe("demo", {"sparsity": 0.8})
results = aerogel.compress.run(recipe, "runs/mine")
"""

from __future__ import annotations

from aerogel.compress.measuring import Pair, measure, settings_of
from aerogel.compress.networks import load_run, plain_network, random_networks, vary_norms
from aerogel.compress.pipeline import run, train_dense_network
from aerogel.compress.recipe import Measurement, Recipe
from aerogel.compress.resolve import builtin_recipes, load_measurement, load_recipe
from aerogel.compress.sources import RecipeError
from aerogel.compress.workdir import FolderError

__all__ = [
    "FolderError",
    "Measurement",
    "Pair",
    "Recipe",
    "RecipeError",
    "builtin_recipes",
    "load_measurement",
    "load_recipe",
    "load_run",
    "measure",
    "plain_network",
    "random_networks",
    "run",
    "settings_of",
    "train_dense_network",
    "vary_norms",
]
