"""A recipe: one YAML file that ties adapter, model, data, losses, mask, evaluation and attack together.

Everything a run does is decided here and nowhere else. Unknown keys are errors, values may be overridden with
`--set a.b=c`, and the resolved recipe is written into the run directory. `whole` has the keys of the top; the sections
below them stand in the rooms beside it, and `loading` makes a recipe of a file.
"""

from vkd_framework.recipe.attacks import (
    ATTACK_KINDS,
    EVERY_ATTACK,
    AnyAttack,
    CropAttack,
    InContextAttack,
    MembershipAttack,
    ModuleRestoreAttack,
    NoiseAttack,
    ProbeAttack,
    QuantizeAttack,
    RelearnConfig,
    RephraseAttack,
)
from vkd_framework.recipe.data import (
    DATA_KINDS,
    AnyData,
    CelebsData,
    ClearData,
    FiuBenchData,
    JsonlData,
    MllmuBenchData,
)
from vkd_framework.recipe.forgetting import (
    EXTERNAL_PACKAGES,
    REFUSALS,
    FeatureTerm,
    ForgetOutputTerm,
    Losses,
    MaskConfig,
    OutputTerm,
    Phase,
    PruneConfig,
    RepelTarget,
    RepelTerm,
    RetainKlTerm,
    SimulatedAttack,
    TeacherConfig,
    UnlearnConfig,
)
from vkd_framework.recipe.loading import bundled_recipes, find_recipe, load_recipe, overrides_without_effect
from vkd_framework.recipe.messages import nearest
from vkd_framework.recipe.sections import (
    TINY,
    EvaluateConfig,
    ModelConfig,
    Section,
    TeachConfig,
    is_tiny,
)
from vkd_framework.recipe.whole import Recipe, digest

__all__ = [
    "ATTACK_KINDS",
    "DATA_KINDS",
    "EVERY_ATTACK",
    "EXTERNAL_PACKAGES",
    "REFUSALS",
    "TINY",
    "AnyAttack",
    "AnyData",
    "CelebsData",
    "ClearData",
    "CropAttack",
    "EvaluateConfig",
    "FeatureTerm",
    "FiuBenchData",
    "ForgetOutputTerm",
    "InContextAttack",
    "JsonlData",
    "Losses",
    "MaskConfig",
    "MembershipAttack",
    "MllmuBenchData",
    "ModelConfig",
    "ModuleRestoreAttack",
    "NoiseAttack",
    "OutputTerm",
    "Phase",
    "ProbeAttack",
    "PruneConfig",
    "QuantizeAttack",
    "Recipe",
    "RelearnConfig",
    "RepelTarget",
    "RepelTerm",
    "RephraseAttack",
    "RetainKlTerm",
    "Section",
    "SimulatedAttack",
    "TeachConfig",
    "TeacherConfig",
    "UnlearnConfig",
    "bundled_recipes",
    "digest",
    "find_recipe",
    "is_tiny",
    "load_recipe",
    "nearest",
    "overrides_without_effect",
]
