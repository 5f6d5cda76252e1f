"""Module restore: put the vanilla model's visual modules back.

What was forgotten by tuning those modules alone comes back entirely when all of them are restored. That is no weakness
of a method but what tuning only a part means; the single modules show where the forgetting sits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from vkd_framework.attacks.target import NotPossibleError, Target
from vkd_framework.plugins import MLLM
from vkd_framework.recipe import ModuleRestoreAttack
from vkd_framework.types import Part


def attack(config: ModuleRestoreAttack, target: Target) -> dict[str, Any]:
    """Exact match of Test VQA with the parts restored."""
    restored = restore(target.mllm, target.vanilla(), config.parts)
    return {"exact_match": target.exact_match(restored, target.test)}


def restore(mllm: MLLM, vanilla: MLLM, parts: Iterable[Part]) -> MLLM:
    """A copy of `mllm` with the parameters of `parts` as in `vanilla`. Raises NotPossibleError when they do not fit."""
    wanted = tuple(parts)
    copied = mllm.copy(share=[part for part in mllm.parts if part not in wanted])
    given = vanilla.parameters(wanted)
    with torch.no_grad():
        for name, parameter in copied.parameters(wanted).items():
            if name not in given or given[name].shape != parameter.shape:
                raise NotPossibleError(f"the vanilla model has no parameter {name} of the same shape")
            parameter.copy_(given[name])
    return copied
