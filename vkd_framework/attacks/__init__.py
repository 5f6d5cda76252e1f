"""Attacks beside relearning, one idea a file. Each leaves the attacked model as it was and is scored on Test VQA.

An attack is a function `attack(config, target) -> figures` in a module of its own; `ATTACKS` says which section of the
recipe it belongs to. What it cannot do on a model or on the data it refuses with `NotPossibleError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vkd_framework.attacks import in_context, marked, membership, pixels, probing, quantize, rephrase, restore
from vkd_framework.attacks.target import NotPossibleError, Target
from vkd_framework.recipe import AnyAttack, digest
from vkd_framework.types import ImageQuestionPair

ATTACKS: dict[str, Callable[[Any, Target], dict[str, Any]]] = {
    "module_restore": restore.attack,
    "quantize": quantize.attack,
    "probe": probing.attack,
    "in_context": in_context.attack,
    "rephrase": rephrase.attack,
    "noise": pixels.attack,
    "crop": pixels.attack,
    "membership": membership.attack,
}
"""`kind` of an entry of the recipe's `attacks` -> what does it."""


def attack(
    name: str,
    configs: Sequence[AnyAttack],
    *,
    stage: Callable[[str, Callable[[Target], dict[str, Any]]], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Every attack on one model: `{kind, options, model, ...figures}` each, or `skipped` with the reason.

    `stage(key, work)` gives `work` the target, or returns an earlier result. The restoring of modules is tried on the
    unlearned model only.
    """
    results = []
    for config in configs:
        if config.kind == "module_restore" and name != "unlearned":
            continue
        options = config.model_dump(mode="json", exclude={"kind"})

        def work(target: Target, config: AnyAttack = config) -> dict[str, Any]:
            try:
                return ATTACKS[config.kind](config, target)
            except NotPossibleError as reason:
                return {"skipped": str(reason)}

        figures = stage(f"attacks-{name}-{config.kind}-{digest(options)}", work)
        results.append({"kind": config.kind, "options": options, "model": name, **figures})
    return results


def conclude(
    results: Sequence[Mapping[str, Any]], test: Sequence[ImageQuestionPair]
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """What goes into `metrics.json`: the results without their figures of single questions, and `over_forgotten`.

    The KS tests against the retain-only model are made here, because they need two models' answers.
    """
    asked = {result["model"]: result["per_question"] for result in results if "per_question" in result}
    reference = asked.get("retain_only")
    concluded = []
    for result in results:
        kept = {key: value for key, value in result.items() if key != "per_question"}
        if "per_question" in result and reference is not None and result["model"] != "retain_only":
            kept |= marked.ks_figures(result["per_question"], reference)
        concluded.append(kept)
    if "unlearned" not in asked:
        return concluded, None
    return concluded, marked.over_forgotten(asked["unlearned"], reference, asked.get("vanilla"), test)
