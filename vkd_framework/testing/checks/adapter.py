"""What the adapter says without a model: the types it serves and refuses, its presets."""

from __future__ import annotations

from transformers import CONFIG_MAPPING

from vkd_framework.errors import VKDError
from vkd_framework.layers_table import describe
from vkd_framework.plugins import Adapter
from vkd_framework.recipe import nearest
from vkd_framework.testing.checks.parts import head_is_language
from vkd_framework.testing.outcomes import Check, Wrong, one_line

TYPES = "vkd_model_types (docs/hooks.md)"
REFUSED = "vkd_refused_model_types (docs/hooks.md)"
PRESETS = "vkd_model_presets (docs/hooks.md); `vkd inspect-layers` shows a preset"


def transformers_knows_the_model_types(adapter: Adapter) -> None:
    """Every model type served is one that transformers builds an image-text-to-text model for."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as MODELS
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    for model_type in adapter.model_types:  # by config class, so that what an adapter registers itself counts
        if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODELS:
            raise Wrong("model types of transformers", f"{model_type!r}{nearest(model_type, list(NAMES))}")


def refused_types_are_not_served(adapter: Adapter) -> None:
    """No model type is both served and refused, and every refusal says what to use instead."""
    for model_type, sentence in adapter.refused_model_types.items():
        if model_type in adapter.model_types:
            raise Wrong("refused types other than the served ones", f"{model_type!r} is served and refused")
        if not sentence.strip():
            raise Wrong(f"{model_type!r}: what to use instead", "an empty sentence")


def presets_can_be_described(adapter: Adapter) -> None:
    """Every preset builds without weights, is of a served type, and has its head in the language model."""
    for name, config in adapter.presets.items():
        if config.get("model_type") not in adapter.model_types:
            raise Wrong(f"a model type of {', '.join(adapter.model_types)}", f"{name}: {config.get('model_type')!r}")
        try:
            anatomy = describe(name, adapter)
        except VKDError as error:
            raise Wrong(f"{name} can be described", one_line(error)) from error
        head_is_language(anatomy, f"{name}: ")


CHECKS = (
    Check(transformers_knows_the_model_types, TYPES),
    Check(refused_types_are_not_served, REFUSED),
    Check(presets_can_be_described, PRESETS),
)
