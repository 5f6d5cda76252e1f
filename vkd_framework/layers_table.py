"""What a model consists of, without its weights: the rows of `vkd inspect-layers` and the counts of `--dry-run`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vkd_framework.errors import AdapterError, ModelError
from vkd_framework.plugins import Adapter, Anatomy, adapter_for_model_type, installed_adapters, load_adapter
from vkd_framework.recipe import TINY, Recipe, nearest
from vkd_framework.types import Part

PART_TITLES: dict[Part, str] = {"encoder": "vision encoder", "projector": "projector", "language_model": "language model"}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def describe(source: str, adapter: Adapter | None = None) -> Anatomy:
    """The anatomy of a model on the meta device.

    `source`: a preset's name, a local folder or config.json, a hub id, or `tiny:ADAPTER` for an adapter's tiny model.
    Without `adapter`, the one that serves the model's type is looked up. Raises ModelError when nothing is found.
    """
    if source.startswith(f"{TINY}:"):
        return load_adapter(source.partition(":")[2]).tiny_model(["What is shown?"], image_size=48, seed=0)
    if source == TINY:
        if adapter is None:
            names = " or ".join(f"tiny:{installed.name}" for installed in installed_adapters())
            raise ModelError(f"tiny: say which adapter's tiny model is meant: {names}")
        return describe(f"{TINY}:{adapter.name}")
    from transformers import AutoModelForImageTextToText

    config = _config(source, adapter)
    adapter = adapter or adapter_for_model_type(config.model_type)
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except (ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{source}: its config does not build an image-text-to-text model ({error})") from error
    return adapter.anatomy(model)


def _config(source: str, adapter: Adapter | None) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    preset = _preset(source, adapter)
    path = Path(source)
    if preset is None and path.suffix == ".json" and path.is_file():
        try:
            preset = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{source}: not valid JSON: {error}") from error
    if preset is not None:
        model_type = preset.get("model_type")
        if model_type not in CONFIG_MAPPING:
            raise ModelError(f"{source}: transformers knows no model_type {model_type!r}{nearest(str(model_type), list(CONFIG_MAPPING))}")
        return CONFIG_MAPPING[model_type].from_dict(dict(preset))
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        known = list(all_presets())
        raise ModelError(
            f"{source}: no preset, no local folder with a config.json, and not to be had from the hub"
            f"{nearest(source, known)}; presets: {', '.join(known)}"
        ) from error


def all_presets() -> dict[str, Mapping[str, Any]]:
    """Hub id -> config of every adapter that imports."""
    presets: dict[str, Mapping[str, Any]] = {}
    for installed in installed_adapters():
        try:
            presets |= load_adapter(installed.name).presets
        except AdapterError:
            continue
    return presets


def _preset(source: str, adapter: Adapter | None) -> Mapping[str, Any] | None:
    """A preset by its hub id or by the last part of it, in any case."""
    if Path(source).exists():
        return None
    presets = adapter.presets if adapter else all_presets()
    wanted = source.lower()
    return next((config for name, config in presets.items() if wanted in (name.lower(), name.lower().rpartition("/")[2])), None)


def rows(anatomy: Anatomy) -> dict[str, Any]:
    """Everything `inspect-layers` shows, as plain data: parts with their counts, layers in order."""
    total = anatomy.count(PART_TITLES)
    return {
        "model": type(anatomy.model).__name__,
        "model_type": anatomy.model.config.model_type,
        "adapter": anatomy.adapter.name,
        "total_parameters": total,
        "parts": [
            {"part": part, "parameters": anatomy.count([part]), "share": anatomy.count([part]) / total, "modules": list(modules)}
            for part, modules in _part_modules(anatomy).items()
        ],
        "layers": [
            {
                "name": layer.name,
                "width": layer.width,
                "parameters": layer.parameters,
                "reaches_language_model": layer.reaches_language_model,
                "path": layer.path,
            }
            for layer in anatomy.layers
        ],
    }


def table(anatomy: Anatomy) -> str:
    """The same as text."""
    data = rows(anatomy)
    tuned = sum(part["share"] for part in data["parts"] if part["part"] != "language_model")
    lines = [f"{data['model']} ({data['model_type']}), adapter {data['adapter']}, {data['total_parameters']:,} parameters", ""]
    for part in data["parts"]:
        tune = "frozen" if part["part"] == "language_model" else "tuned by default"
        where = ", ".join(part["modules"]) or "whatever lies between the two"
        lines.append(f"{PART_TITLES[part['part']]:<16}{part['parameters']:>16,}{part['share']:>9.2%}  {tune:<17} {where}")
    lines += [f"{'tuned in all':<16}{'':>16}{tuned:>9.2%}", "", f"{'layer':<12}{'width':>7}{'parameters':>16}  {'reaches the language model':<27} module"]
    for layer in data["layers"]:
        reaches = "yes" if layer["reaches_language_model"] else "no: do not distil here"
        lines.append(f"{layer['name']:<12}{layer['width'] or '?':>7}{layer['parameters']:>16,}  {reaches:<27} {layer['path']}")
    return "\n".join(lines)


def plan(recipe: Recipe, anatomy: Anatomy) -> str:
    """What a run of `recipe` would train and roughly what memory it needs."""
    total, trained = anatomy.count(PART_TITLES), anatomy.count(recipe.train)
    size = BYTES[recipe.model.dtype]
    weights, training = total * size, trained * size * 3
    start = trained * size if recipe.mask.kind != "none" else 0
    lines = [
        f"model            {type(anatomy.model).__name__}, {total:,} parameters, adapter {anatomy.adapter.name}",
        f"trains           {' and '.join(PART_TITLES[part] for part in recipe.train)}: {trained:,} parameters ({trained / total:.2%})",
        f"frozen           {total - trained:,} parameters, the language model among them",
        f"distils          {', '.join(recipe.layers)}",
        f"mask             {_mask_line(recipe, trained)}",
        f"steps            {recipe.unlearn.steps}, each with {recipe.unlearn.forget_batch} forget and {recipe.unlearn.retain_batch} retain pairs",
        f"memory at least  {(weights + training + start) / 2**30:.2f} GiB: weights {weights / 2**30:.2f}, gradients and optimiser state "
        f"{training / 2**30:.2f}, starting weights under a mask {start / 2**30:.2f}; activations and teacher features come on top",
    ]
    if "full" in recipe.relearn.scopes:
        lines.append(f"attack           a copy with all weights trained: {total * size * 4 / 2**30:.2f} GiB and activations (scope full)")
    return "\n".join(lines)


def _mask_line(recipe: Recipe, trained: int) -> str:
    mask = recipe.mask
    if mask.kind == "none":
        return "none"
    amount = f"density {mask.density:g}, about {mask.density * trained:,.0f} weights" if mask.density else f"threshold {mask.threshold:g}"
    return f"{mask.kind} by {mask.granularity}, {amount}, scope {mask.scope}"


def _part_modules(anatomy: Anatomy) -> dict[Part, tuple[str, ...]]:
    modules = anatomy.modules
    return {"encoder": (modules.encoder,), "projector": modules.projector, "language_model": modules.language_model}
