"""What a model consists of, without its weights: the rows of `vkd inspect-layers` and the counts of `--dry-run`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import socket
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from vkd_framework.cache import cache_folder
from vkd_framework.checkpoint import read_json, write_json
from vkd_framework.errors import AdapterError, ModelError, RecipeError
from vkd_framework.methods import METHODS
from vkd_framework.plugins import (
    Adapter,
    Anatomy,
    Installed,
    adapter_for_model_type,
    installed_adapters,
    load_adapter,
    the_one,
    working_adapters,
)
from vkd_framework.recipe import TINY, Recipe, digest, is_tiny, load_recipe, nearest
from vkd_framework.types import Part

PART_TITLES: dict[Part, str] = {
    "encoder": "vision encoder",
    "projector": "projector",
    "language_model": "language model",
}
LAYOUT = 2
"""Raise when the rows change, so that older ones are not read from the cache."""
UNKNOWN: dict[str, Any] = {"accuracy": None, "interval_95": None}
LONGEST = 300
"""Characters of a foreign error that are shown."""


def describe(source: str, adapter: Adapter | None = None) -> Anatomy:
    """The anatomy of a model on the meta device.

    `source`: a preset's name, a local folder or config.json, a hub id, or `tiny:NAME` for the tiny model of an adapter
    or of a model type (with `adapter`, also just `tiny`).
    Without `adapter`, a preset is described by the adapter that offers it, anything else by the one that serves the
    model's type. Raises ModelError when nothing is found, AdapterError when several adapters claim it.
    """
    if is_tiny(source):
        return _tiny(source.partition(":")[2], adapter)
    import torch
    from transformers import AutoModelForImageTextToText

    contents, owner = _contents(source, adapter)
    config = _config(source, _from_hub(source, adapter) if contents is None else contents, owner)
    adapter = owner or adapter_for_model_type(config.model_type)
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except Exception as error:  # model classes refuse a config in ways of their own
        raise ModelError(f"{source}: its config does not build an image-text-to-text model ({_told(error)})") from error
    return adapter.anatomy(model)


def inspect(source: str, adapter_name: str | None = None) -> dict[str, Any]:
    """What `inspect-layers` shows. Kept under a hash of the config, because importing torch takes seconds."""
    adapter = load_adapter(adapter_name) if adapter_name else None
    contents, owner = (None, adapter) if is_tiny(source) else _contents(source, adapter)
    if contents is None:
        return rows(describe(source, adapter))
    versions = [importlib.metadata.version(name) for name in ("vkd-framework", "transformers", "torch")]
    adapters = [(a.name, a.distribution, a.version, source_hash(a)) for a in installed_adapters()]
    asked = [LAYOUT, contents, versions, adapters, owner.name if owner else None]
    kept = cache_folder() / "layers" / f"{digest(asked)}.json"
    with suppress(OSError, ValueError):
        found: dict[str, Any] = read_json(kept)
        return found
    found = rows(describe(source, adapter))
    with suppress(OSError):
        write_json(kept, found)
    return found


def inspect_recipe(reference: str, overrides: Sequence[str] = (), model: str | None = None) -> dict[str, Any]:
    """What `inspect-layers --recipe` shows: the rows of the recipe's starting model, with what `probe` found.

    The recipe's `layers` need not exist: this is for choosing them. `model`, when given, must be the recipe's own.
    """
    recipe = load_recipe(reference, overrides)
    if model not in (None, recipe.model.source):
        raise RecipeError(
            f"MODEL {model}: the recipe's own is {recipe.model.source}; leave MODEL out, "
            f"or add --set model.source={model}"
        )
    adapter = load_adapter(recipe.adapter)
    describe(recipe.model.source, adapter)
    from vkd_framework import data
    from vkd_framework.probe import RULE, probe
    from vkd_framework.vanilla import device_of, load, starting_model

    device = device_of(recipe)
    splits = data.load(recipe.data)
    source = starting_model(adapter, recipe, splits, device)
    mllm = load(adapter, recipe.model, source, device)
    found = probe(mllm, splits, pairs=recipe.mask.pairs, seed=recipe.seed)
    shown = rows(mllm)
    for layer in shown["layers"]:
        name = layer["name"]
        layer |= {
            "identity": asdict(found.identity[name]) if found.identity else None,
            "gradient": asdict(found.gradient[name]),
            "suggested": name in found.suggested,
            "in_recipe": name in recipe.layers,
        }
    one = next(iter(found.identity.values()), None)
    return shown | {
        "recipe": recipe.name,
        "recipe_layers": list(recipe.layers),
        "suggested_layers": list(found.suggested),
        "rule": RULE,
        "people": found.people,
        "photos": one.photos if one else 0,
        "chance": one.chance if one else None,
        "pairs": {"forget": found.forget_pairs, "retain": found.retain_pairs},
    }


def source_hash(installed: Installed) -> str | None:
    """A hash of the adapter's file, which its author edits without raising a version; None where there is none."""
    with suppress(Exception):  # a module that cannot be found or read is reported when it is asked for
        spec = importlib.util.find_spec(installed.module.partition(":")[0])
        if spec is not None and spec.origin is not None:
            return digest(Path(spec.origin).read_bytes().hex())
    return None


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


def _contents(source: str, adapter: Adapter | None) -> tuple[Mapping[str, Any] | None, Adapter | None]:
    """The contents of a config.json, from disk or from a preset, and the adapter to ask when it is known already.

    The contents are None for what only the hub can know.
    """
    if os.path.exists(source):
        path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
        if not path.is_file():
            if (Path(source) / "adapter_config.json").is_file():
                raise ModelError(
                    f"{source}: holds an adapter of low rank (adapter_config.json) and no config.json; merge it into "
                    "its model, save that and the processor in a folder, and give that"
                )
            raise ModelError(f"{source}: holds no config.json; give the folder of a saved model, or a hub id")
        return _read_config(path), adapter
    wanted = source.lower()
    presets = all_presets(adapter)
    whole = [name for name in presets if name.lower() == wanted]
    fitting = whole or [name for name in presets if name.lower().rpartition("/")[2] == wanted]
    if not fitting:
        return None, adapter
    if len(fitting) > 1:
        raise ModelError(f"{source}: may be {' or '.join(fitting)}; give the whole name")
    owner = the_one(presets[fitting[0]], f"preset {fitting[0]} is offered")
    return owner.presets[fitting[0]], owner


def _read_config(path: Path) -> dict[str, Any]:
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(contents, dict):
        raise ModelError(f"{path}: a model's config is a JSON object, this is a {type(contents).__name__}")
    return contents


def _config(source: str, contents: Mapping[str, Any], adapter: Adapter | None) -> Any:
    """The transformers config that the contents of a config.json describe."""
    from transformers import CONFIG_MAPPING

    model_type = contents.get("model_type")
    if model_type is None:
        raise ModelError(f"{source}: its config names no model_type, so it is no model of transformers")
    if refused := _refused(str(model_type), adapter):
        raise ModelError(f"{source}: {refused}")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"{source}: transformers knows no model_type {model_type!r}{nearest(str(model_type), list(CONFIG_MAPPING))}"
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(dict(contents))
    except Exception as error:  # and so do config classes
        raise ModelError(f"{source}: transformers does not take this config ({_told(error)})") from error


def _told(error: Exception) -> str:
    """An error in one line, without the end of the lists that some of them hold."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", LONGEST, placeholder=" ...")


def _refused(model_type: str, adapter: Adapter | None) -> str | None:
    """What an adapter says about a near relative of its family that it does not serve, unless another serves it."""
    asked = [adapter] if adapter else list(working_adapters()[0].values())
    if any(model_type in each.model_types for each in asked):
        return None
    return next(
        (each.refused_model_types[model_type] for each in asked if model_type in each.refused_model_types), None
    )


def _from_hub(source: str, adapter: Adapter | None) -> dict[str, Any]:
    """The config.json of a hub id; without the hub, what the hub's cache on this machine has."""
    from transformers import PretrainedConfig

    trouble = _hub_trouble()
    try:
        contents: dict[str, Any] = PretrainedConfig.get_config_dict(source, local_files_only=trouble is not None)[0]
    except (OSError, ValueError) as error:
        known = list(all_presets(adapter))
        raise ModelError(
            f"{source}: no preset, no local folder with a config.json, and not to be had from the hub"
            f"{f' ({trouble})' if trouble else ''}{nearest(source, known)}; presets: {', '.join(known)}"
        ) from error
    return contents


def _hub_trouble() -> str | None:
    """Why the hub need not be asked; asking one whose name does not resolve costs half a minute of retries."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    host = urlsplit(constants.ENDPOINT).hostname or ""
    if getproxies():
        return None  # a proxy resolves names itself
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return f"{host} cannot be found from this machine"
    return None


def all_presets(adapter: Adapter | None = None) -> dict[str, dict[Installed, Adapter]]:
    """Hub id -> the adapters that offer it as a preset: of every adapter that works, or of `adapter` alone."""
    working = working_adapters()[0] if adapter is None else {Installed(adapter.name, "", "", ""): adapter}
    presets: dict[str, dict[Installed, Adapter]] = {}
    for installed, each in working.items():
        for name in each.presets:
            presets.setdefault(name, {})[installed] = each
    return presets


def rows(anatomy: Anatomy) -> dict[str, Any]:
    """Parts with their counts and layers in order, as plain data."""
    total = anatomy.count(PART_TITLES)
    tuned = anatomy.count(["encoder", "projector"])
    layers = [
        {
            "name": layer.name,
            "part": _part_of(anatomy, layer.path),
            "width": layer.width,
            "parameters": layer.parameters,
            "reaches_language_model": layer.reaches_language_model,
            "path": layer.path,
        }
        for layer in anatomy.layers
    ]
    return {
        "model": type(anatomy.model).__name__,
        "model_type": anatomy.model.config.model_type,
        "adapter": anatomy.adapter.name,
        "total_parameters": total,
        "tuned_parameters": tuned,
        "tuned_share": tuned / total,
        "parts": [
            {
                "part": part,
                "parameters": anatomy.count([part]),
                "share": anatomy.count([part]) / total,
                "tuned": part != "language_model",
                "inside_encoder": any(path.startswith(f"{anatomy.modules.encoder}.") for path in modules),
                "modules": list(modules),
                "layers": [layer["name"] for layer in layers if layer["part"] == part],
            }
            for part, modules in _part_modules(anatomy).items()
        ],
        "layers": layers,
    }


def table(data: Mapping[str, Any]) -> str:
    """The same as text: the parts as a tree, then the layers; for a recipe, with what was found there."""
    return "\n".join([*_tree(data), "", *(_found_lines(data) if "recipe" in data else _layer_lines(data))])


def _tree(data: Mapping[str, Any]) -> list[str]:
    """The parts, each with its layers in one line however many there are."""
    heading = f"{data['model']} ({data['model_type']}), adapter {data['adapter']}"
    lines = [f"{heading}, {data['total_parameters']:,} parameters, {data['tuned_share']:.2%} tuned by default", ""]
    by_name = {layer["name"]: layer for layer in data["layers"]}
    for part in data["parts"]:
        indent = "  " if part["inside_encoder"] else ""
        where = ", ".join(part["modules"]) or "whatever lies between the two"
        where += " (inside the encoder)" if part["inside_encoder"] else ""
        lines.append(
            f"{indent + PART_TITLES[part['part']]:<23}{part['parameters']:>15,}{part['share']:>9.2%}  "
            f"{'tuned' if part['tuned'] else 'frozen':<8}{where}"
        )
        layers = [by_name[name] for name in part["layers"]]
        for alike in _alike([layer for layer in layers if layer["path"] not in part["modules"]]):
            first, last = alike[0], alike[-1]
            names = first["name"] if len(alike) == 1 else f"{first['name']} … {last['name']}"
            count = f"{first['parameters']:,}" if len(alike) == 1 else f"{len(alike)} x {first['parameters']:,}"
            dead = "" if first["reaches_language_model"] else "  does not reach the language model"
            where = f"{_span(first['path'], last['path'])}{dead}"
            lines.append(f"{indent + '  ' + names:<22} {count:>15}{'':>19}{where}")
    return lines


def _alike(layers: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Neighbours of the same width and size that reach the language model alike, together."""
    groups: list[list[Mapping[str, Any]]] = []
    for layer in layers:
        if groups and all(
            groups[-1][-1][key] == layer[key] for key in ("width", "parameters", "reaches_language_model")
        ):
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups


def _span(first: str, last: str) -> str:
    """`model.blocks.0 … 31`: two paths that differ in their last name only; other pairs in full."""
    if first == last:
        return first
    parent, _, end = last.rpartition(".")
    return f"{first} … {end if first.rpartition('.')[0] == parent else last}"


def _layer_lines(data: Mapping[str, Any]) -> list[str]:
    lines = [f"{'layer':<12}{'width':>7}{'parameters':>16}  {'reaches the language model':<27} module"]
    for layer in data["layers"]:
        reaches = "yes" if layer["reaches_language_model"] else "no: do not distil here"
        lines.append(
            f"{layer['name']:<12}{layer['width'] or '?':>7}{layer['parameters']:>16,}  {reaches:<27} {layer['path']}"
        )
    return lines


def _found_lines(data: Mapping[str, Any]) -> list[str]:
    """The layers of a recipe's model with what was found there, and how to read it."""
    lines = [
        f"{'':<41}{'people told apart by':^36}{'forget / retain':>22}",
        f"{'layer':<11}{'width':>6}{'parameters':>14}  {'reaches':<8}{'neighbours':>10}{'95 %':>11}"
        f"{'line':>7}{'95 %':>11}{'gradient':>11}{'95 %':>10}",
    ]
    for layer in data["layers"]:
        identity, gradient = layer["identity"] or {}, layer["gradient"]
        near, line = (identity.get(probe) or UNKNOWN for probe in ("neighbours", "linear"))
        ratio = f"{gradient['ratio']:.2f}" if gradient["ratio"] is not None else "none"
        lines.append(
            f"{layer['name']:<11}{layer['width'] or '?':>6}{layer['parameters']:>14,}  "
            f"{'yes' if layer['reaches_language_model'] else 'no':<8}"
            f"{_share(near['accuracy'], 1):>10}{_range(near['interval_95'], 100, 1):>11}"
            f"{_share(line['accuracy'], 0):>7}{_range(line['interval_95'], 100, 1):>11}"
            f"{ratio:>11}{_range(gradient['interval_95'], 1, 2):>10}{'  distil' if layer['suggested'] else ''}"
        )
    suggested, own = (", ".join(data[key]) or "none" for key in ("suggested_layers", "recipe_layers"))
    told = (
        f"people told apart: which of {data['people']} people is on {data['photos']} photos of those to be forgotten; "
        f"each photo held out once, chance {data['chance']:.1%}"
        if data["photos"]
        else "people told apart: not measured and nothing suggested; it takes two people with two training photos "
        "each, one of them to be forgotten"
    )
    return [
        *lines,
        "",
        told,
        f"gradient: mean squared gradient of {data['pairs']['forget']} forget pairs over that of "
        f"{data['pairs']['retain']} retain pairs",
        f"suggested: {suggested} (the recipe has {own})",
        f"by the rule: {data['rule']}",
    ]


def _share(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}%}"


def _range(ends: Sequence[float] | None, scale: float, digits: int) -> str:
    return "" if ends is None else f"{ends[0] * scale:.{digits}f}-{ends[1] * scale:.{digits}f}"


def plan(recipe: Recipe, anatomy: Anatomy) -> str:
    """What a run of `recipe` would train."""
    total, trained = anatomy.count(PART_TITLES), anatomy.count(recipe.train)
    steps = recipe.unlearn
    tunes = recipe.procedure == "tune"
    among = "" if "language_model" in recipe.train else ", the language model among them"
    facts = {
        "model": f"{type(anatomy.model).__name__}, {total:,} parameters, adapter {anatomy.adapter.name}",
        "method": f"{recipe.method}, {METHODS[recipe.method].summary}",
        {"tune": "trains", "prune": "prunes", "reteach": "teaches"}[recipe.procedure]: (
            f"{' and '.join(PART_TITLES[part] for part in recipe.train)}: {trained:,} parameters "
            f"({trained / total:.2%})"
        ),
        "frozen": f"{total - trained:,} parameters{among}" if trained < total else "nothing",
    }
    if tunes:
        facts |= {
            "distils": ", ".join(recipe.distilled) or "nothing",
            "mask": _mask_line(recipe, trained),
            "steps": f"{steps.steps}, each with {steps.forget_batch} forget and {steps.retain_batch} retain pairs",
        }
    if recipe.procedure == "prune":
        facts["share"] = f"{recipe.prune.share:.1%} of the neurons"
    return "\n".join(f"{name:<9}{fact}" for name, fact in facts.items())


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


def _part_of(anatomy: Anatomy, path: str) -> Part:
    """The part that holds the weights below `path`; a module without weights lies between the other two."""
    return next(
        (part for part, names in anatomy.parts.items() if any(name.startswith(f"{path}.") for name in names)),
        "projector",
    )
