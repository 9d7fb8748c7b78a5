"""Configuration of a run: frozen dataclasses, YAML and validation. Does not import torch."""

from megatron_prealign.recipe.alignment import AlignmentSection
from megatron_prealign.recipe.alignment_guard import AlignmentGuardSection
from megatron_prealign.recipe.alignment_watch import AlignmentWatchSection
from megatron_prealign.recipe.checkpoint import CheckpointSection
from megatron_prealign.recipe.checks import RecipeValueError
from megatron_prealign.recipe.code_switch import CodeSwitchSection
from megatron_prealign.recipe.data import DataSection, DataSource, ParallelText, ValidationSource
from megatron_prealign.recipe.dictionary import DictionarySection
from megatron_prealign.recipe.load import load_recipe, recipe_to_dict, save_recipe
from megatron_prealign.recipe.logging import LoggingSection
from megatron_prealign.recipe.model import ModelSection, RopeScaling
from megatron_prealign.recipe.optimizer import OptimizerSection
from megatron_prealign.recipe.parallel import ParallelSection
from megatron_prealign.recipe.phases import ALIGNMENT, LANGUAGE_MODEL
from megatron_prealign.recipe.recipe import Recipe
from megatron_prealign.recipe.training import TrainingSection

__all__ = [
    "ALIGNMENT",
    "LANGUAGE_MODEL",
    "AlignmentGuardSection",
    "AlignmentSection",
    "AlignmentWatchSection",
    "CheckpointSection",
    "CodeSwitchSection",
    "DataSection",
    "DataSource",
    "DictionarySection",
    "LoggingSection",
    "ModelSection",
    "OptimizerSection",
    "ParallelSection",
    "ParallelText",
    "Recipe",
    "RecipeValueError",
    "RopeScaling",
    "TrainingSection",
    "ValidationSource",
    "load_recipe",
    "recipe_to_dict",
    "save_recipe",
]
