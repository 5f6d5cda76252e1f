"""Discover adapters, load exactly one, and ask it through a facade that checks every answer.

One `PluginManager` a run holds two plugins: `generic`, registered first, and the adapter, registered last so that its
answer wins. Adapters that no recipe names are never imported by a run.
"""

from __future__ import annotations

import copy
import importlib.metadata
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from vkd_framework import hookspecs
from vkd_framework.encodings import Encodings, fingerprint
from vkd_framework.errors import AdapterError, ModelError, RecipeError, on_one_line
from vkd_framework.generic import GenericPlugin
from vkd_framework.hookspecs import PROJECT
from vkd_framework.recipe import nearest
from vkd_framework.types import (
    DistillationLayer,
    EncodedBatch,
    FeatureGrid,
    FeatureRows,
    ImageQuestionPair,
    Part,
    VisionModules,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel, ProcessorMixin

T = TypeVar("T")


@dataclass(frozen=True)
class Installed:
    """An adapter as its distribution registers it; nothing of it has been imported."""

    name: str
    module: str
    distribution: str
    version: str
    rival: str | None = None
    """Another distribution that claims the same name."""

    def __str__(self) -> str:
        return f"{self.name!r} ({self.distribution} {self.version})"


def installed_adapters() -> list[Installed]:
    """All registered adapters, by name; a name claimed twice is an error only for whoever asks for it."""
    found: dict[str, Installed] = {}
    entries = importlib.metadata.entry_points(group=PROJECT)
    for entry in sorted(entries, key=lambda entry: (entry.name, entry.dist.name if entry.dist else "")):
        distribution, version = (entry.dist.name, entry.dist.version) if entry.dist else ("?", "?")
        first = found.setdefault(entry.name, Installed(entry.name, entry.value, distribution, version))
        if first.distribution != distribution:
            found[entry.name] = replace(first, rival=distribution)
    return list(found.values())


def load_adapter(name: str) -> Adapter:
    """The facade of one adapter. Raises AdapterError when it is unknown, does not import, or is no valid plugin."""
    known = {adapter.name: adapter for adapter in installed_adapters()}
    if name not in known:
        raise AdapterError(
            f"adapter {name!r} is not installed{nearest(name, known)}; "
            f"installed: {', '.join(known) or 'none'} (see `vkd adapters`)"
        )
    if rival := known[name].rival:
        raise AdapterError(
            f"adapter {name!r} is registered by both {known[name].distribution} and {rival}; uninstall one of them"
        )
    entry = next(iter(importlib.metadata.entry_points(group=PROJECT, name=name)))
    try:
        plugin = entry.load()
    except (Exception, SystemExit) as error:
        raise AdapterError(
            f"adapter {known[name]} does not import: {_told(error)}{_mend_of_import(error, known[name])}"
        ) from error
    return Adapter(name, plugin, known[name])


def working_adapters() -> tuple[dict[Installed, Adapter], list[str]]:
    """Every installed adapter that can be asked for its model types and presets, and what is wrong with the others."""
    working: dict[Installed, Adapter] = {}
    broken: list[str] = []
    for installed in installed_adapters():
        try:
            adapter = load_adapter(installed.name)
            _ = adapter.model_types, adapter.presets, adapter.refused_model_types
        except (AdapterError, ModelError) as error:
            broken.append(str(error))
        else:
            working[installed] = adapter
    return working, broken


def adapter_for_model_type(model_type: str) -> Adapter:
    """The one adapter that serves a `config.model_type`.

    Adapters that cannot be asked are passed over unless none fits. Raises AdapterError when none does, and when several
    do: no installed adapter, ours included, wins over another without being chosen.
    """
    working, broken = working_adapters()
    fitting = {installed: adapter for installed, adapter in working.items() if model_type in adapter.model_types}
    if fitting:
        return the_one(fitting, f"model type {model_type!r} is served")
    served = [each for adapter in working.values() for each in adapter.model_types]
    trouble = f"; these could not be asked: {'; '.join(broken)}" if broken else ""
    raise AdapterError(f"no installed adapter serves model type {model_type!r} (served: {', '.join(served)}){trouble}")


def the_one(claims: Mapping[Installed, T], claimed: str) -> T:
    """The only value; with several, AdapterError names who claims it and how to choose. `claimed` begins the sentence.

    Two names for the same module are one claim. Only for what the user can choose with `--adapter` or with a recipe.
    """
    if len({(installed.distribution, installed.module) for installed in claims}) > 1:
        names = " or ".join(installed.name for installed in claims)
        raise AdapterError(
            f"{claimed} by several adapters: {', '.join(str(installed) for installed in claims)}; choose one: "
            f"--adapter {names}, or `adapter:` in a recipe"
        )
    return next(iter(claims.values()))


class Adapter:
    """Typed access to one adapter's hooks. Every method raises AdapterError naming plugin, hook and offence."""

    def __init__(self, name: str, plugin: object, installed: Installed | None = None) -> None:
        self.name = name
        self._who = f"adapter {installed or repr(name)}"
        self._kept_encodings: dict[tuple[str | None, tuple[int, ...]], Encodings] = {}
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._manager.register(GenericPlugin(), name="generic")
        if isinstance(plugin, type):
            raise AdapterError(f"{self._who} is the class {plugin.__name__}; register an instance or a module")
        try:
            self._manager.register(plugin, name=name)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise AdapterError(f"{self._who}: {on_one_line(error)}{self._nearest_hook(plugin)}") from error
        except Exception as error:  # pluggy reads every attribute of a plugin, and reading may raise
            raise AdapterError(f"{self._who} cannot be registered: {_told(error)}") from error
        if unmarked := self._unmarked(plugin):
            raise AdapterError(
                f"{self._who}: {unmarked} is not marked as a hook, it would never be asked; "
                f"mark it with @hookimpl{self._nearest_hook(plugin)}"
            )
        own = self._manager.get_hookcallers(plugin) or []
        if "vkd_model_types" not in {caller.name for caller in own}:
            raise AdapterError(f"{self._who}: the required hook vkd_model_types is missing")
        self.hooks = tuple(sorted(caller.name for caller in own))
        for caller in own:
            for implementation in caller.get_hookimpls():
                if implementation.plugin is plugin and implementation.kwargnames:
                    raise self._offence(
                        caller.name,
                        "gives its parameters default values, which pluggy would use instead of the caller's",
                    )

    @cached_property
    def model_types(self) -> tuple[str, ...]:
        """The `config.model_type` values served."""
        types = self._ask("vkd_model_types")
        if not _is_list_of(str, types):
            raise self._offence("vkd_model_types", f"must return a non-empty list of strings, returned {types!r}")
        return tuple(types)

    @cached_property
    def presets(self) -> dict[str, dict[str, Any]]:
        """Hub id -> config.json of well-known checkpoints."""
        presets = self._ask("vkd_model_presets")
        if not isinstance(presets, Mapping) or not all(isinstance(config, Mapping) for config in presets.values()):
            raise self._offence("vkd_model_presets", f"must return hub id -> config mapping, returned {presets!r}")
        return {name: dict(config) for name, config in presets.items()}

    @cached_property
    def refused_model_types(self) -> dict[str, str]:
        """Near relatives of the family that are not served -> what to use instead."""
        refused = self._ask("vkd_refused_model_types")
        if not isinstance(refused, Mapping) or not all(isinstance(why, str) for why in refused.values()):
            raise self._offence("vkd_refused_model_types", f"must return model type -> reason, returned {refused!r}")
        return dict(refused)

    def load(self, source: str, dtype: torch.dtype, device: str) -> MLLM:
        """Load a model and bind it. Raises ModelError when it is not of this adapter's family."""
        return self.bind(*self._pair("vkd_load_model", source=source, dtype=dtype, device=device))

    def tiny_model(self, texts: Sequence[str], image_size: int, seed: int, model_type: str | None = None) -> MLLM:
        """A tiny real model with random weights of one of the model types served, by default the first."""
        wanted = self.model_types[0] if model_type is None else model_type
        if wanted not in self.model_types:
            raise ModelError(
                f"adapter {self.name!r} does not serve model type {wanted!r}{nearest(wanted, self.model_types)}; "
                f"it serves {', '.join(self.model_types)}"
            )
        answer = self._pair("vkd_tiny_model", model_type=wanted, texts=texts, image_size=image_size, seed=seed)
        if answer[0].config.model_type != wanted:
            raise self._offence(
                "vkd_tiny_model", f"was asked for {wanted!r}, built a model of type {answer[0].config.model_type!r}"
            )
        return self.bind(*answer)

    def bind(self, model: PreTrainedModel, processor: ProcessorMixin) -> MLLM:
        """Check that a loaded model fits this adapter and split its parameters into parts."""
        anatomy = self.anatomy(model)
        return MLLM(self, model, anatomy.modules, anatomy.layers, processor)

    def anatomy(self, model: PreTrainedModel) -> Anatomy:
        """The parts and layers of a model, which may be on the meta device."""
        if model.config.model_type not in self.model_types:
            raise ModelError(
                f"the model is of type {model.config.model_type!r}, adapter {self.name!r} serves "
                f"{', '.join(self.model_types)}; name another adapter in the recipe (see `vkd adapters`)"
            )
        modules = self.locate_vision_modules(model)
        return Anatomy(self, model, modules, self.list_distillation_layers(model, modules))

    def locate_vision_modules(self, model: PreTrainedModel) -> VisionModules:
        """Where the parts are; every path is checked to exist, and encoder and language model to hold parameters."""
        hook = "vkd_locate_vision_modules"
        modules = self._expect(hook, VisionModules, model=model)
        known = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
        for path in (modules.encoder, *modules.language_model, *modules.projector):
            if path not in known:
                raise self._offence(
                    hook, f"names {path!r}, which {type(model).__name__} does not have{nearest(path, sorted(known))}"
                )
        parts = partition(model, modules)
        for part, names in parts.items():
            if not names:
                raise self._offence(hook, f"leaves the {part.replace('_', ' ')} without any parameter")
        return modules

    def list_distillation_layers(self, model: PreTrainedModel, modules: VisionModules) -> tuple[DistillationLayer, ...]:
        """The distillation layers; names are checked to be unique and paths to exist."""
        hook = "vkd_list_distillation_layers"
        layers = self._ask(hook, model=model, modules=modules)
        if not _is_list_of(DistillationLayer, layers):
            raise self._offence(hook, f"must return a non-empty list of DistillationLayer, returned {layers!r}")
        known = {name for name, _ in model.named_modules()}
        names = [layer.name for layer in layers]
        for layer in layers:
            if layer.path not in known:
                raise self._offence(hook, f"layer {layer.name!r} is at {layer.path!r}, which the model does not have")
            if names.count(layer.name) > 1:
                raise self._offence(hook, f"layer name {layer.name!r} occurs twice")
        return tuple(layers)

    def stop_token_ids(self, model: PreTrainedModel, processor: ProcessorMixin) -> tuple[int, ...]:
        """The ids that end an answer."""
        ids = self._ask("vkd_stop_token_ids", model=model, processor=processor)
        if not _is_list_of(int, ids):
            raise self._offence("vkd_stop_token_ids", f"must return a non-empty list of ints, returned {ids!r}")
        return tuple(ids)

    def tokenize_pairs(
        self,
        processor: ProcessorMixin,
        pairs: Sequence[ImageQuestionPair],
        stop_ids: Sequence[int],
        with_answer: bool,
        padding_side: str,
    ) -> EncodedBatch:
        """Encode pairs; labels are checked to cover something in every row when an answer was asked for."""
        hook = "vkd_tokenize_pairs"
        batch = self._expect(
            hook,
            EncodedBatch,
            processor=processor,
            pairs=pairs,
            stop_ids=stop_ids,
            with_answer=with_answer,
            padding_side=padding_side,
        )
        ids = batch.inputs.get("input_ids")
        if not all(hasattr(tensor, "shape") for tensor in (ids, batch.labels, batch.content)) or ids is None:
            raise self._offence(hook, "must return tensors for inputs['input_ids'], labels and content")
        if batch.labels.shape != ids.shape or batch.content.shape != ids.shape or len(ids) != len(pairs):
            raise self._offence(
                hook,
                f"must return [B, L] = [{len(pairs)}, L] for input_ids, labels and content alike, returned "
                f"{list(ids.shape)}, {list(batch.labels.shape)} and {list(batch.content.shape)}",
            )
        if "labels" in batch.inputs:
            raise self._offence(
                hook, "must leave the processor's own labels out of inputs; the model would be given labels twice"
            )
        if with_answer and not bool(batch.content.any(dim=1).all()):
            row = int((~batch.content.any(dim=1)).nonzero()[0])
            raise self._offence(hook, f"found no answer token for {pairs[row].id!r} (answer {pairs[row].answer!r})")
        return batch

    def encodings(self, processor: ProcessorMixin, stop_ids: Sequence[int]) -> Encodings:
        """What keeps the pairs that a processor encoded; models whose processors are alike share it."""
        key = (fingerprint(processor), tuple(stop_ids))
        if key[0] is not None and key in self._kept_encodings:
            return self._kept_encodings[key]

        def encode(pairs: Sequence[ImageQuestionPair], with_answer: bool, padding_side: str) -> EncodedBatch:
            return self.tokenize_pairs(processor, pairs, stop_ids, with_answer, padding_side)

        made = Encodings(encode)
        if key[0] is not None:
            self._kept_encodings[key] = made
        return made

    def feature_rows(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], layer: DistillationLayer, rows: int
    ) -> FeatureRows:
        """Which sample each feature row belongs to; the shapes are checked."""
        hook = "vkd_feature_rows"
        assigned = self._expect(hook, FeatureRows, model=model, inputs=inputs, layer=layer, rows=rows)
        if not all(hasattr(tensor, "shape") for tensor in (assigned.sample, assigned.real)):
            raise self._offence(hook, "must return tensors for sample and real")
        if assigned.sample.shape != (rows,) or assigned.real.shape != (rows,):
            raise self._offence(
                hook,
                f"must assign {rows} rows of {layer.name}, returned {list(assigned.sample.shape)} samples and "
                f"{list(assigned.real.shape)} flags",
            )
        return assigned

    def feature_grid(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Tensor],
        layer: DistillationLayer,
        assigned: FeatureRows,
        photos: Sequence[Sequence[tuple[int, int]]],
    ) -> FeatureGrid:
        """Which part of which photo each row shows; shapes are checked, and that real rows lie within a photo."""
        hook = "vkd_feature_grid"
        grid = self._expect(
            hook, FeatureGrid, model=model, inputs=inputs, layer=layer, assigned=assigned, photos=photos
        )
        rows = len(assigned.sample)
        if not all(hasattr(tensor, "shape") for tensor in (grid.photo, grid.box)):
            raise self._offence(hook, "must return tensors for photo and box")
        if grid.photo.shape != (rows,) or grid.box.shape != (rows, 4):
            raise self._offence(
                hook,
                f"must place {rows} rows of {layer.name}, returned {list(grid.photo.shape)} photos and "
                f"{list(grid.box.shape)} boxes",
            )
        photo, box = grid.photo[assigned.real], grid.box[assigned.real]
        number = sum(len(sizes) for sizes in photos)
        if bool((photo < 0).any() or (photo >= number).any()):
            raise self._offence(hook, f"places rows of {layer.name} beyond the batch's {number} photos")
        if bool((box < -1e-4).any() or (box > 1 + 1e-4).any() or (box[:, :2] >= box[:, 2:]).any()):
            raise self._offence(hook, "must give boxes within 0 and 1, left before right and upper before lower")
        return grid

    def _ask(self, hook: str, **arguments: Any) -> Any:
        try:
            answer = getattr(self._manager.hook, hook)(**arguments)
        except (AdapterError, ModelError):
            raise
        except (Exception, SystemExit) as error:
            raise self._offence(hook, f"raised {_told(error)}") from error
        if answer is None:
            raise self._offence(hook, "gave no answer, and there is no generic one")
        return answer

    def _expect(self, hook: str, kind: type[T], **arguments: Any) -> T:
        answer = self._ask(hook, **arguments)
        if not isinstance(answer, kind):
            raise self._offence(hook, f"must return {kind.__name__}, returned {type(answer).__name__}")
        return answer

    def _pair(self, hook: str, **arguments: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
        answer = self._ask(hook, **arguments)
        if not (isinstance(answer, tuple) and len(answer) == 2 and hasattr(answer[0], "named_parameters")):
            raise self._offence(hook, f"must return (model, processor), returned {type(answer).__name__}")
        return answer

    def _offence(self, hook: str, what: str) -> AdapterError:
        return AdapterError(f"{self._who}, hook {hook}: {what}")

    def _unmarked(self, plugin: object) -> str | None:
        """The first function that is called like a hook and that pluggy did not pick up."""
        return next(
            (
                name
                for name in dir(plugin)
                if name.startswith("vkd_")
                and inspect.isroutine(function := getattr(plugin, name))
                and function is not getattr(hookspecs, name, None)
                and self._manager.parse_hookimpl_opts(plugin, name) is None
            ),
            None,
        )

    def _nearest_hook(self, plugin: object) -> str:
        names = [name for name in dir(hookspecs) if name.startswith("vkd_")]
        unknown = [name for name in dir(plugin) if name.startswith("vkd_") and name not in names]
        return nearest(unknown[0], names) if unknown else ""


def _is_list_of(kind: type, answer: object) -> bool:
    """Whether a hook's answer is a non-empty sequence of `kind`; a generator would be empty the second time."""
    return (
        isinstance(answer, Sequence)
        and not isinstance(answer, str)
        and len(answer) > 0
        and all(isinstance(item, kind) for item in answer)
    )


def _told(error: BaseException) -> str:
    """`KeyError: 'x'`, or the type alone where the error says nothing."""
    return f"{type(error).__name__}: {on_one_line(error)}".removesuffix(": ")


def _mend_of_import(error: BaseException, installed: Installed) -> str:
    """What to do about an adapter that does not import: a missing package is not the adapter's own missing module."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return f"; mend or uninstall {installed.distribution}"
    own = installed.module.partition(":")[0]
    if f"{own}.".startswith(f"{error.name}."):
        return f"; its entry point names a module that is not there, so install {installed.distribution} again"
    return (
        f"; install the package that provides {error.name.partition('.')[0]!r}, or uninstall {installed.distribution}"
    )


def partition(model: nn.Module, modules: VisionModules) -> dict[Part, tuple[str, ...]]:
    """Every parameter name in exactly one part: the longest matching path decides, the rest is projector."""
    owners: list[tuple[str, Part]] = [(modules.encoder, "encoder")]
    owners += [(path, "language_model") for path in modules.language_model]
    owners += [(path, "projector") for path in modules.projector]
    owners.sort(key=lambda owner: len(owner[0]), reverse=True)
    parts: dict[Part, list[str]] = {"encoder": [], "projector": [], "language_model": []}
    for name, _ in model.named_parameters():
        owner = [part for path, part in owners if name == path or name.startswith(f"{path}.")][:1]
        parts[owner[0] if owner else "projector"].append(name)
    return {part: tuple(names) for part, names in parts.items()}


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A model and its parts, as its adapter sees them. The model may be on the meta device, without weights."""

    adapter: Adapter
    model: PreTrainedModel
    modules: VisionModules
    layers: tuple[DistillationLayer, ...]

    @cached_property
    def parts(self) -> dict[Part, tuple[str, ...]]:
        """Part -> names of its parameters."""
        return partition(self.model, self.modules)

    def parameters(self, parts: Iterable[Part]) -> dict[str, nn.Parameter]:
        """Name -> parameter of the given parts, in the model's order."""
        wanted = {name for part in parts for name in self.parts[part]}
        return {name: parameter for name, parameter in self.model.named_parameters() if name in wanted}

    def count(self, parts: Iterable[Part]) -> int:
        """How many weights the given parts hold."""
        return sum(parameter.numel() for parameter in self.parameters(parts).values())

    def layer(self, name: str, where: str = "layers") -> DistillationLayer:
        """The distillation layer of that name. Raises RecipeError naming place and nearest when there is none."""
        by_name = {layer.name: layer for layer in self.layers}
        if name not in by_name:
            raise RecipeError(
                f"{where}: {name!r} is no layer of this model{nearest(name, by_name)}; "
                f"it has {', '.join(_ranges(by_name))} (see `vkd inspect-layers`)"
            )
        return by_name[name]


@dataclass(frozen=True, eq=False)
class MLLM(Anatomy):
    """A loaded multimodal language model, ready to be asked, bound to the adapter that knows its parts."""

    processor: ProcessorMixin

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return self.adapter.stop_token_ids(self.model, self.processor)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    def tokenize(
        self, pairs: Sequence[ImageQuestionPair], *, with_answer: bool = True, padding_side: str = "right"
    ) -> EncodedBatch:
        """Encode pairs and move them to the model's device."""
        batch = self._encodings.batch(pairs, with_answer, padding_side)
        inputs = {name: value.to(self.device) for name, value in batch.inputs.items()}
        return EncodedBatch(inputs, batch.labels.to(self.device), batch.content.to(self.device))

    @cached_property
    def _encodings(self) -> Encodings:
        return self.adapter.encodings(self.processor, self.stop_ids)

    def check_prompt_is_prefix(self, pair: ImageQuestionPair) -> None:
        """Raise ModelError when a full text does not begin with its prompt's tokens."""
        prompt = self.tokenize([pair], with_answer=False).inputs["input_ids"][0].tolist()
        full = self.tokenize([pair]).inputs["input_ids"][0].tolist()
        if full[: len(prompt)] != prompt:
            raise ModelError(
                "the chat template's prompt is tokenized differently when an answer follows (often for a blank at its "
                "end); what is trained would not be what is generated. Mend the template or override vkd_tokenize_pairs"
            )

    def copy(self, share: Sequence[Part] = ()) -> MLLM:
        """An independent copy; parameters of the parts in `share` stay the same objects in both."""
        shared = {id(parameter): parameter for parameter in self.parameters(share).values()}
        memo: dict[int, Any] = dict(shared)
        return MLLM(self.adapter, copy.deepcopy(self.model, memo), self.modules, self.layers, self.processor)


def _ranges(names: Iterable[str]) -> list[str]:
    """`vision.0 to vision.31, projector` for a long list of layers."""
    listed = list(names)
    numbered = [name for name in listed if name.rpartition(".")[2].isdigit()]
    rest = [name for name in listed if name not in numbered]
    return [f"{numbered[0]} to {numbered[-1]}", *rest] if len(numbered) > 1 else listed


def trainable(mllm: MLLM, parts: Iterable[Part]) -> Mapping[str, nn.Parameter]:
    """Freeze everything but the given parts and return those parameters."""
    chosen = mllm.parameters(parts)
    mllm.model.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return chosen
