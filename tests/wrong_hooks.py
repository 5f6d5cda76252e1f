"""Hooks with something wrong in them, laid over a family's own adapter, for the suites of the conformance kit."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vkd_framework import generic
from vkd_framework.hookspecs import hookimpl
from vkd_framework.plugins import Adapter
from vkd_framework.testing import CheckResult, check_adapter
from vkd_framework.testing.checks import ADAPTER_CHECKS, MODEL_CHECKS
from vkd_framework.types import (
    DistillationLayer,
    EncodedBatch,
    FeatureGrid,
    FeatureRows,
    ImageQuestionPair,
    VisionModules,
)

NAMES = [check.name for check in (*ADAPTER_CHECKS, *MODEL_CHECKS)]
Hooks = Mapping[str, Callable[..., Any]]
QWEN, IDEFICS2, INTERNVL, LLAVA = (
    ("qwen_vl", "qwen2_vl"),
    ("idefics", "idefics2"),
    ("internvl", "internvl"),
    ("llava", "llava"),
)


def checked(base: str, model_type: str, hooks: Hooks) -> dict[str, CheckResult]:
    """The failed checks of a family's own adapter with some hooks replaced."""
    plugin = types.ModuleType("wrong")
    vars(plugin).update({name: hook for name, hook in vars(family(base)).items() if name.startswith("vkd_")})
    vars(plugin).update({name: hookimpl(hook) for name, hook in hooks.items()})
    results = check_adapter(Adapter("wrong", plugin), f"tiny:{model_type}")
    assert {result.name for result in results} <= {*NAMES, "the-model-loads"}
    return {result.name: result for result in results if not result.ok}


def family(name: str) -> types.ModuleType:
    return importlib.import_module(f"vkd_adapters.{name}")


def own_layers(model: Any) -> list[DistillationLayer]:
    return generic.list_distillation_layers(model, family("qwen_vl").vkd_locate_vision_modules(model))


def layer_changed(index: int, **changes: Any) -> Hooks:
    """One layer of the list is described otherwise."""

    def layers(model: Any) -> list[DistillationLayer]:
        listed = own_layers(model)
        listed[index] = replace(listed[index], **changes)
        return listed

    return {"vkd_list_distillation_layers": layers}


def first_two_exchanged(model: Any) -> list[DistillationLayer]:
    first, second, *rest = own_layers(model)
    return [replace(second, name=first.name), replace(first, name=second.name), *rest]


def tokens_as(
    change: Callable[[EncodedBatch], EncodedBatch] = lambda batch: batch,
    ask: Callable[[ImageQuestionPair], ImageQuestionPair] = lambda pair: pair,
    side: str | None = None,
) -> Hooks:
    """The generic encoding, with the pairs changed before it or the batch after it."""

    def tokenize(processor: Any, pairs: Any, stop_ids: Any, with_answer: bool, padding_side: str) -> EncodedBatch:
        asked = [ask(pair) for pair in pairs]
        return change(generic.tokenize_pairs(processor, asked, stop_ids, with_answer, side or padding_side))

    return {"vkd_tokenize_pairs": tokenize}


def rows_as(change: Callable[[Any, Mapping[str, Tensor], DistillationLayer, FeatureRows], FeatureRows]) -> Hooks:
    def rows(model: Any, inputs: Any, layer: DistillationLayer, rows: int) -> FeatureRows:
        return change(model, inputs, layer, generic.feature_rows(model, inputs, layer, rows))

    return {"vkd_feature_rows": rows}


def grid_as(change: Callable[[FeatureGrid], FeatureGrid], base: str = "qwen_vl") -> Hooks:
    def grid(model: Any, inputs: Any, layer: DistillationLayer, assigned: FeatureRows, photos: Any) -> FeatureGrid:
        return change(family(base).vkd_feature_grid(model, inputs, layer, assigned, photos))

    return {"vkd_feature_grid": grid}


def column_by_column(grid: FeatureGrid) -> FeatureGrid:
    return replace(grid, box=grid.box[:, [1, 0, 3, 2]])


def loaded_as(change: Callable[[Any], None]) -> Hooks:
    def load(source: str, dtype: torch.dtype, device: str) -> Any:
        model, processor = generic.load_model(source, dtype, device)
        change(model)
        return model, processor

    return {"vkd_load_model": load}


def tiny_as(change: Callable[[Any, Any], None], base: str = "qwen_vl") -> Hooks:
    def tiny(model_type: str, texts: Sequence[str], image_size: int, seed: int) -> Any:
        model, processor = family(base).vkd_tiny_model(model_type, texts, image_size, seed)
        change(model, processor)
        return model, processor

    return {"vkd_tiny_model": tiny}


class Inside(nn.Module):
    """A block inside another module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Twice(Inside):
    def forward(self, hidden_states: Tensor, **named: Any) -> Any:
        self.inner(hidden_states, **named)
        return self.inner(hidden_states, **named)


class Aside(Inside):
    def forward(self, hidden_states: Tensor, **named: Any) -> Any:
        self.inner(hidden_states, **named)
        return hidden_states


def wrapped(kind: type[Inside], index: int) -> Hooks:
    """The loaded model keeps a block inside `kind`; the layer's path leads to the block."""

    def change(model: Any) -> None:
        model.model.visual.blocks[index] = kind(model.model.visual.blocks[index])

    def layers(model: Any) -> list[DistillationLayer]:
        blocks = model.model.visual.blocks
        block = blocks[index]
        if not isinstance(block, Inside):
            return own_layers(model)
        blocks[index] = block.inner
        listed = own_layers(model)
        blocks[index] = block
        listed[index] = replace(listed[index], path=f"model.visual.blocks.{index}.inner")
        return listed

    return {**loaded_as(change), "vkd_list_distillation_layers": layers}


def reentrant(model: Any) -> None:
    """What a loader does that saves memory: recompute blocks, the old way."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


def inside_the_blocks(model: Any) -> list[DistillationLayer]:
    """What the blocks add, rather than what they put out."""
    listed = own_layers(model)
    inner = [replace(layer, path=f"{layer.path}.mlp") for layer in listed[:-1]]
    counts = [sum(p.numel() for p in model.get_submodule(layer.path).parameters()) for layer in inner]
    return [*(replace(layer, parameters=count) for layer, count in zip(inner, counts, strict=True)), listed[-1]]


def off_by_one(batch: EncodedBatch) -> EncodedBatch:
    covered = (batch.labels != -100).roll(-1, dims=1)
    return replace(batch, labels=batch.inputs["input_ids"].masked_fill(~covered, -100))


def without_grids(batch: EncodedBatch) -> EncodedBatch:
    """Without a key that other families do not have."""
    return replace(batch, inputs={key: value for key, value in batch.inputs.items() if key != "image_grid_thw"})


def without_stop_in_labels(batch: EncodedBatch) -> EncodedBatch:
    return replace(batch, labels=batch.labels.masked_fill(~batch.content, -100))


def stop_in_content(batch: EncodedBatch) -> EncodedBatch:
    return replace(batch, content=batch.labels != -100)


def all_supervised(batch: EncodedBatch) -> EncodedBatch:
    """Everything but padding, as many training scripts do."""
    ids = batch.inputs["input_ids"]
    return replace(batch, labels=ids.masked_fill(batch.inputs["attention_mask"] == 0, -100))


def one_photo_a_pair(pair: ImageQuestionPair) -> ImageQuestionPair:
    return replace(pair, photos=(pair.photos[0],))


def two_bos(processor: Any, pairs: Any, stop_ids: Any, with_answer: bool, padding_side: str) -> EncodedBatch:
    """The tokenizer's special tokens on top of the template's."""

    class Careless(type(processor)):  # type: ignore[misc]
        def __call__(self, **named: Any) -> Any:
            return super().__call__(**{**named, "add_special_tokens": True})

    careless = copy.copy(processor)
    careless.__class__ = Careless
    return generic.tokenize_pairs(careless, pairs, stop_ids, with_answer, padding_side)


def ragged(processor: Any, pairs: Any, stop_ids: Any, with_answer: bool, padding_side: str) -> EncodedBatch:
    """A processor that stacks photos without padding them."""
    sizes = {photo.open().size for pair in pairs for photo in pair.photos}
    if len(sizes) > 1:
        raise ValueError(f"cannot stack photos of {len(sizes)} sizes")
    return generic.tokenize_pairs(processor, pairs, stop_ids, with_answer, padding_side)


def blank_at_the_end(model: Any, processor: Any) -> None:
    processor.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}"
        "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )


def reseeded(model: Any, processor: Any) -> None:
    torch.seed()
    nn.init.normal_(model.model.visual.blocks[0].mlp.fc1.weight)


def lenient(source: str, dtype: torch.dtype, device: str) -> Any:
    """Without looking at what was missing."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
    return model.eval(), AutoProcessor.from_pretrained(source)


def forgetful(source: str, dtype: torch.dtype, device: str) -> Any:
    """A loader that renews a weight."""
    model, processor = generic.load_model(source, dtype, device)
    nn.init.zeros_(model.model.visual.blocks[1].mlp.fc1.weight)
    return model, processor


UNTIED = {"model_type": "qwen2_vl", "tie_word_embeddings": False}


def decoder_only(model: Any) -> VisionModules:
    return VisionModules("model.visual", ("model.language_model",), ("model.visual.merger",))


def decoder_as_encoder(model: Any) -> VisionModules:
    return VisionModules("model.language_model.layers", ("model.language_model", "lm_head"), ("model.visual",))


def unused_norm(model: Any) -> VisionModules:
    """The norm after the last block, of a family whose projector reads the last block but one."""
    norm = next(name for name, _ in model.named_modules() if name.endswith("post_layernorm"))
    return VisionModules(
        "model.vision_tower", ("model.language_model", "lm_head", "model.multi_modal_projector"), (norm,)
    )


def untied(model: Any, processor: Any) -> None:
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def only_one_photo(pair: ImageQuestionPair) -> ImageQuestionPair:
    if len(pair.photos) > 1:
        raise ValueError("one photo a question")
    return pair


def no_tiny_photo_alone(
    processor: Any, pairs: Any, stop_ids: Any, with_answer: bool, padding_side: str
) -> EncodedBatch:
    """A processor that squeezes away the only patch of a batch."""
    if len(pairs) == 1 and any(min(photo.size) < 16 for photo in pairs[0].photos):
        raise ValueError("no patch left")
    return generic.tokenize_pairs(processor, pairs, stop_ids, with_answer, padding_side)


def no_photo(pair: ImageQuestionPair) -> ImageQuestionPair:
    if pair.photos:
        raise ValueError("no photo, please")
    return pair


def padding_attended(batch: EncodedBatch) -> EncodedBatch:
    return replace(batch, inputs={**batch.inputs, "attention_mask": torch.ones_like(batch.inputs["attention_mask"])})


def one_image_token_less(batch: EncodedBatch) -> EncodedBatch:
    ids = batch.inputs["input_ids"].clone()
    row, token = (ids == ids.flatten().mode().values).nonzero()[0]
    ids[row, token] = 0
    return replace(batch, inputs={**batch.inputs, "input_ids": ids})


def scaling_on_the_way(model: Any) -> None:
    """The whole model scales pixels once more, which its vision modules alone do not."""

    def scale(_module: nn.Module, positional: Any, named: dict[str, Any]) -> Any:
        if named.get("pixel_values") is not None:
            named["pixel_values"] = named["pixel_values"] * 2
        return positional, named

    model.register_forward_pre_hook(scale, with_kwargs=True)


def seen_from_both_sides(model: Any) -> None:
    """Every token attends to all others, as in a prompt of PaliGemma whose token types are left at 0."""

    def see(_module: nn.Module, positional: Any, named: dict[str, Any]) -> Any:
        attended = named["attention_mask"][:, None, None].bool()
        unseen = torch.zeros(1).masked_fill(~attended, torch.finfo(torch.float32).min)
        named["attention_mask"] = unseen.expand(-1, -1, attended.shape[-1], -1)
        return positional, named

    model.model.language_model.register_forward_pre_hook(see, with_kwargs=True)


def one_square(model: Any, inputs: Any, layer: DistillationLayer, assigned: FeatureRows, photos: Any) -> FeatureGrid:
    """As if there were no tiles."""
    return generic.feature_grid(model, inputs, layer, assigned, photos)


def unplaced(model: Any, inputs: Any, layer: DistillationLayer, assigned: FeatureRows, photos: Any) -> FeatureGrid:
    """What cannot be placed is not refused, it crashes."""
    raise KeyError("image_grid")


def all_in_one_corner(grid: FeatureGrid) -> FeatureGrid:
    """Boxes without any extent, which no grid has."""
    return replace(grid, box=torch.zeros_like(grid.box))


def overflowing(model: Any) -> None:
    nn.init.constant_(model.model.visual.blocks[0].mlp.fc2.bias, float("inf"))


def needs_weights(model: Any) -> list[DistillationLayer]:
    float(model.lm_head.weight.detach().sum())
    return own_layers(model)


def first_row_lost(model: Any, inputs: Any, layer: DistillationLayer, rows: FeatureRows) -> FeatureRows:
    real = rows.real.clone()
    real[0] = False
    return replace(rows, real=real)


def in_reverse(model: Any, inputs: Any, layer: DistillationLayer, rows: FeatureRows) -> FeatureRows:
    return replace(rows, sample=rows.sample.flip(0))


def text_rows(model: Any, inputs: Any, layer: DistillationLayer, rows: FeatureRows) -> FeatureRows:
    """Samples with photos are numbered as if there were no others."""
    return replace(rows, sample=torch.unique(rows.sample, return_inverse=True)[1])


def unchanged(model: Any, inputs: Any, layer: DistillationLayer, rows: FeatureRows) -> FeatureRows:
    return rows
