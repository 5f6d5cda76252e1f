"""What a model consists of, without its weights: the rows of `vkd inspect-layers` and the counts of `--dry-run`."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vkd_framework.cache import cache_folder
from vkd_framework.checkpoint import read_json, write_json
from vkd_framework.errors import AdapterError, ModelError
from vkd_framework.plugins import Adapter, Anatomy, adapter_for_model_type, installed_adapters, load_adapter
from vkd_framework.recipe import TINY, Recipe, digest, is_tiny, nearest
from vkd_framework.types import Part

PART_TITLES: dict[Part, str] = {
    "encoder": "vision encoder",
    "projector": "projector",
    "language_model": "language model",
}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def describe(source: str, adapter: Adapter | None = None) -> Anatomy:
    """The anatomy of a model on the meta device.

    `source`: a preset's name, a local folder or config.json, a hub id, or `tiny:NAME` for the tiny model of an adapter
    or of a model type (with `adapter`, also just `tiny`).
    Without `adapter`, the one that serves the model's type is looked up. Raises ModelError when nothing is found.
    """
    if is_tiny(source):
        return _tiny(source.partition(":")[2], adapter)
    import torch
    from transformers import AutoModelForImageTextToText

    config = _config(source, adapter)
    adapter = adapter or adapter_for_model_type(config.model_type)
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except (ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{source}: its config does not build an image-text-to-text model ({error})") from error
    return adapter.anatomy(model)


def inspect(source: str) -> dict[str, Any]:
    """What `inspect-layers` shows. Kept under a hash of the config, because importing torch takes seconds."""
    config = _config_file(source, None)
    if config is None:
        return rows(describe(source))
    versions = [importlib.metadata.version(name) for name in ("vkd-framework", "transformers", "torch")]
    adapters = [(a.name, a.distribution, a.version) for a in installed_adapters()]
    kept = cache_folder() / "layers" / f"{digest([config, versions, adapters])}.json"
    with suppress(OSError, ValueError):
        found: dict[str, Any] = read_json(kept)
        return found
    found = rows(describe(source))
    with suppress(OSError):
        write_json(kept, found)
    return found


def _tiny(name: str, adapter: Adapter | None) -> Anatomy:
    installed = [adapter.name for adapter in installed_adapters()]
    if adapter is None and not name:
        raise ModelError(f"{TINY}: say whose tiny model is meant: {' or '.join(f'{TINY}:{a}' for a in installed)}")
    if adapter is None and name in installed:
        adapter = load_adapter(name)
    if adapter is None:
        try:
            adapter = adapter_for_model_type(name)
        except AdapterError as error:
            raise AdapterError(f"{TINY}:{name}: no adapter of that name{nearest(name, installed)}; {error}") from None
    model_type = None if name in ("", adapter.name) and name not in adapter.model_types else name
    return adapter.tiny_model(["What is shown?"], image_size=48, seed=0, model_type=model_type)


def _config(source: str, adapter: Adapter | None) -> Any:
    """The transformers config of a preset, a local folder or file, or a hub id."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    contents = _config_file(source, adapter)
    try:
        if contents is None:
            contents = PretrainedConfig.get_config_dict(source)[0]
        model_type = contents.get("model_type")
        if refused := _refused(str(model_type)):
            raise ModelError(f"{source}: {refused}")
        if model_type not in CONFIG_MAPPING:
            raise ModelError(
                f"{source}: transformers knows no model_type {model_type!r}"
                f"{nearest(str(model_type), list(CONFIG_MAPPING))}"
            )
        return CONFIG_MAPPING[model_type].from_dict(dict(contents))
    except (OSError, ValueError) as error:
        known = list(all_presets())
        raise ModelError(
            f"{source}: no preset, no local folder with a config.json, and not to be had from the hub"
            f"{nearest(source, known)}; presets: {', '.join(known)}"
        ) from error


def _refused(model_type: str) -> str | None:
    """What some adapter says about a near relative of its family that it does not serve."""
    for installed in installed_adapters():
        try:
            refused = load_adapter(installed.name).refused_model_types
        except AdapterError:
            continue
        if model_type in refused:
            return refused[model_type]
    return None


def _config_file(source: str, adapter: Adapter | None) -> Mapping[str, Any] | None:
    """The contents of a config.json, from a preset or from disk; None for what only the hub can know."""
    preset = _preset(source, adapter)
    path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
    if preset is not None or not path.is_file():
        return preset
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(contents, dict):
        raise ModelError(f"{path}: a model's config is a JSON object, this is a {type(contents).__name__}")
    return contents


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
    return next(
        (config for name, config in presets.items() if wanted in (name.lower(), name.lower().rpartition("/")[2])), None
    )


def rows(anatomy: Anatomy) -> dict[str, Any]:
    """Parts with their counts and layers in order, as plain data."""
    total = anatomy.count(PART_TITLES)
    return {
        "model": type(anatomy.model).__name__,
        "model_type": anatomy.model.config.model_type,
        "adapter": anatomy.adapter.name,
        "total_parameters": total,
        "parts": [
            {
                "part": part,
                "parameters": anatomy.count([part]),
                "share": anatomy.count([part]) / total,
                "modules": list(modules),
            }
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


def table(data: Mapping[str, Any]) -> str:
    """The same as text."""
    tuned = sum(part["share"] for part in data["parts"] if part["part"] != "language_model")
    lines = [
        f"{data['model']} ({data['model_type']}), adapter {data['adapter']}, {data['total_parameters']:,} parameters",
        "",
    ]
    for part in data["parts"]:
        tune = "frozen" if part["part"] == "language_model" else "tuned by default"
        where = ", ".join(part["modules"]) or "whatever lies between the two"
        lines.append(
            f"{PART_TITLES[part['part']]:<16}{part['parameters']:>16,}{part['share']:>9.2%}  {tune:<17} {where}"
        )
    lines += [
        f"{'tuned in all':<16}{'':>16}{tuned:>9.2%}",
        "",
        f"{'layer':<12}{'width':>7}{'parameters':>16}  {'reaches the language model':<27} module",
    ]
    for layer in data["layers"]:
        reaches = "yes" if layer["reaches_language_model"] else "no: do not distil here"
        lines.append(
            f"{layer['name']:<12}{layer['width'] or '?':>7}{layer['parameters']:>16,}  {reaches:<27} {layer['path']}"
        )
    return "\n".join(lines)


def plan(recipe: Recipe, anatomy: Anatomy) -> str:
    """What a run of `recipe` would train and roughly what memory it needs."""
    total, trained = anatomy.count(PART_TITLES), anatomy.count(recipe.train)
    size, steps = BYTES[recipe.model.dtype], recipe.unlearn
    gradients_and_adam = 3 * trained
    before_mask = trained if recipe.mask.kind != "none" else 0
    facts = {
        "model": f"{type(anatomy.model).__name__}, {total:,} parameters, adapter {anatomy.adapter.name}",
        "trains": f"{' and '.join(PART_TITLES[part] for part in recipe.train)}: {trained:,} parameters "
        f"({trained / total:.2%})",
        "frozen": f"{total - trained:,} parameters, the language model among them",
        "distils": ", ".join(recipe.layers),
        "mask": _mask_line(recipe, trained),
        "steps": f"{steps.steps}, each with {steps.forget_batch} forget and {steps.retain_batch} retain pairs",
        "memory": f"{_size((total + gradients_and_adam + before_mask) * size)} and activations: weights "
        f"{_size(total * size)}, gradients and optimiser {_size(gradients_and_adam * size)}, weights before masking "
        f"{_size(before_mask * size)}",
    }
    if "full" in recipe.relearn.scopes:
        facts["attack"] = f"{_size(4 * total * size)} and activations for a copy with every weight trained (scope full)"
    return "\n".join(f"{name:<9}{fact}" for name, fact in facts.items())


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 100 else f"{count / 2**20:.1f} MiB"


def _mask_line(recipe: Recipe, trained: int) -> str:
    mask = recipe.mask
    if mask.kind == "none":
        return "none"
    amount = (
        f"density {mask.density:g}, about {mask.density * trained:,.0f} weights"
        if mask.density
        else f"threshold {mask.threshold:g}"
    )
    return f"{mask.kind} by {mask.granularity}, {amount}, scope {mask.scope}"


def _part_modules(anatomy: Anatomy) -> dict[Part, tuple[str, ...]]:
    modules = anatomy.modules
    return {"encoder": (modules.encoder,), "projector": modules.projector, "language_model": modules.language_model}
