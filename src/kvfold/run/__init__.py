"""A run: every stage of one recipe, over its grid and seeds."""

from kvfold.run.runner import demo_recipe, run

__all__ = ["demo_recipe", "run"]
