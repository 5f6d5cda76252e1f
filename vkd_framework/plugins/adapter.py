"""The facade of an adapter: its hooks with types, and every answer checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from vkd_framework import hookspecs
from vkd_framework.encodings import Encodings, fingerprint
from vkd_framework.errors import AdapterError, DataError, HookError, ModelError, on_one_line, with_its_kind
from vkd_framework.generic import GenericPlugin
from vkd_framework.hookspecs import PROJECT
from vkd_framework.plugins.model import MLLM, Anatomy, partition
from vkd_framework.recipe import nearest
from vkd_framework.types import (
    DistillationLayer,
    EncodedBatch,
    FeatureGrid,
    FeatureRows,
    ImageQuestionPair,
    VisionModules,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, ProcessorMixin

    from vkd_framework.plugins.installed import Installed

T = TypeVar("T")
GENERIC = "generic"
"""The name under which pluggy knows what answers for an adapter that does not."""


class Adapter:
    """Typed access to one adapter's hooks. Every method raises AdapterError naming plugin, hook and offence."""

    def __init__(self, name: str, plugin: object, installed: Installed | None = None) -> None:
        self.name = name
        self._who = f"adapter {installed or repr(name)}"
        self._kept_encodings: dict[tuple[str | None, tuple[int, ...]], Encodings] = {}
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._manager.register(GenericPlugin(), name=GENERIC)
        if isinstance(plugin, type):
            raise AdapterError(f"{self._who} is the class {plugin.__name__}; register an instance or a module")
        try:
            self._manager.register(plugin, name=name)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise AdapterError(f"{self._who}: {on_one_line(error)}{self._nearest_hook(plugin)}") from error
        except Exception as error:  # pluggy reads every attribute of a plugin, and reading may raise
            raise AdapterError(f"{self._who} cannot be registered: {with_its_kind(error)}") from error
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
        """Encode pairs; labels are checked to cover something in every row when an answer was asked for.

        Raises DataError where some of the pairs cannot be encoded and others can, naming the first that cannot.
        """
        hook = "vkd_tokenize_pairs"

        def encoded(some: Sequence[ImageQuestionPair]) -> EncodedBatch:
            return self._expect(
                hook,
                EncodedBatch,
                processor=processor,
                pairs=some,
                stop_ids=stop_ids,
                with_answer=with_answer,
                padding_side=padding_side,
            )

        try:
            batch = encoded(pairs)
        except HookError as error:
            refused = _refused(encoded, pairs)
            if not 0 < len(refused) < len(pairs):
                raise
            pair = refused[0]
            photos = f" with {' and '.join(map(repr, pair.photo_keys))}" if pair.photos else ""
            raise DataError(f"{pair.id}: cannot be encoded{photos}; change it or take it out ({error})") from error
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
            raise self._offence(hook, f"raised {with_its_kind(error)}") from error
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

    def _offence(self, hook: str, what: str) -> HookError:
        return HookError(f"{self._who}, hook {hook}: {what}")

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


def _refused(
    encoded: Callable[[Sequence[ImageQuestionPair]], EncodedBatch], pairs: Sequence[ImageQuestionPair]
) -> list[ImageQuestionPair]:
    """The pairs that cannot be encoded each alone."""
    refused = []
    for pair in pairs:
        try:
            encoded([pair])
        except HookError:
            refused.append(pair)
    return refused


def _is_list_of(kind: type, answer: object) -> bool:
    """Whether a hook's answer is a non-empty sequence of `kind`; a generator would be empty the second time."""
    return (
        isinstance(answer, Sequence)
        and not isinstance(answer, str)
        and len(answer) > 0
        and all(isinstance(item, kind) for item in answer)
    )
