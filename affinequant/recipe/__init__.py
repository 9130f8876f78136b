"""What is asked for: pure data."""

from affinequant.recipe.recipe import Recipe as Recipe
from affinequant.recipe.scheme import Scheme as Scheme
