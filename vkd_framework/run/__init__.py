"""A run: from a recipe to a model that has forgotten, with its proofs, attacks and report."""

from vkd_framework.run.checks import checked
from vkd_framework.run.folder import recipe_of
from vkd_framework.run.stages import Run, dry_run, run

__all__ = ["Run", "checked", "dry_run", "recipe_of", "run"]
