from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from vkd_framework import generic, testing
from vkd_framework.cli import main
from vkd_framework.errors import AdapterError
from vkd_framework.hookspecs import hookimpl
from vkd_framework.plugins import Adapter, installed_adapters, load_adapter
from vkd_framework.testing import CheckResult, assert_conforms, check_adapter, find_adapter, table
from vkd_framework.testing.checks import ADAPTER_CHECKS, MODEL_CHECKS
from vkd_framework.testing.outcomes import one_line
from vkd_framework.types import (
    DistillationLayer,
    EncodedBatch,
    FeatureGrid,
    FeatureRows,
    ImageQuestionPair,
    VisionModules,
)

PAGE = Path(__file__).parent.parent / "docs" / "conformance.md"
NAMES = [check.name for check in (*ADAPTER_CHECKS, *MODEL_CHECKS)]
FIRST = "a-question-about-a-photo-is-answered"
Hooks = Mapping[str, Callable[..., Any]]


def built_in() -> list[tuple[str, str]]:
    """(adapter, model type) of every adapter that comes with vkd."""
    names = [adapter.name for adapter in installed_adapters() if adapter.distribution == "vkd-framework"]
    return [(name, model_type) for name in names for model_type in load_adapter(name).model_types]


@pytest.mark.parametrize(("name", "model_type"), built_in())
def test_every_built_in_architecture_conforms(name: str, model_type: str) -> None:
    if model_type == "smolvlm" and importlib.util.find_spec("num2words") is None:
        pytest.skip("until num2words is installed, without which transformers does not make this processor")
    assert_conforms(name, f"tiny:{model_type}")


def test_every_family_is_among_the_built_in_ones() -> None:
    assert {"idefics", "internvl", "llava", "qwen_vl"} <= {name for name, _ in built_in()}


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


QWEN, IDEFICS2, INTERNVL, LLAVA = (
    ("qwen_vl", "qwen2_vl"),
    ("idefics", "idefics2"),
    ("internvl", "internvl"),
    ("llava", "llava"),
)

MISTAKES: dict[str, tuple[tuple[str, str], Hooks, str, str]] = {
    "wrong tower": (
        QWEN,
        {"vkd_locate_vision_modules": decoder_as_encoder, "vkd_list_distillation_layers": own_layers},
        "text-does-not-pass-the-vision-modules",
        r"move by .*model\.language_model\.layers\.0",
    ),
    "hook fires twice": (QWEN, wrapped(Twice, 1), "every-layer-runs-once", "2 times"),
    "hook fires without gradient under checkpointing": (
        QWEN,
        {**loaded_as(reentrant), "vkd_list_distillation_layers": inside_the_blocks},
        "layers-run-once-in-training",
        r"those of vision\.0 carry none",
    ),
    "projector counted twice": (
        QWEN,
        layer_changed(-1, path="model.visual"),
        "layers-share-no-parameter",
        r"blocks\.0\..*vision\.0 and in projector",
    ),
    "block that does not reach the language model": (
        QWEN,
        wrapped(Aside, 2),
        "layers-reach-what-they-say",
        "True, but .* no gradient",
    ),
    "last block of a family that reads the last but one": (
        LLAVA,
        {
            "vkd_list_distillation_layers": lambda model, modules: [
                replace(layer, reaches_language_model=True)
                for layer in generic.list_distillation_layers(model, modules)
            ]
        },
        "layers-reach-what-they-say",
        "True, but .* no gradient",
    ),
    "block that is said not to reach it": (
        QWEN,
        layer_changed(1, reaches_language_model=False),
        "layers-reach-what-they-say",
        "False, but .* a gradient",
    ),
    "rows assigned to the wrong sample": (
        QWEN, rows_as(in_reverse), "rows-belong-to-their-sample", "of other samples change"
    ),
    "rows numbered without the text-only samples": (
        QWEN, rows_as(text_rows), "text-only-samples-have-no-rows", r"rows of samples \[0, 1"
    ),
    "padding counted as patches": (
        IDEFICS2, rows_as(unchanged), "neighbours-do-not-change-a-samples-rows", "in a mixed batch; padding"
    ),
    "padding that every batch has counted as patches": (
        ("llava", "llava_next"), rows_as(unchanged), "only-rows-that-show-a-photo-are-real", "real without showing one"
    ),
    "class token counted as a patch": (
        INTERNVL, rows_as(unchanged), "only-rows-that-show-a-photo-are-real", r"\(0\) real without showing one"
    ),
    "patch taken for a class token": (
        QWEN, rows_as(first_row_lost), "only-rows-that-show-a-photo-are-real", r"\(0\) showing one but not real"
    ),
    "labels off by one": (QWEN, tokens_as(off_by_one), "labels-begin-right-after-the-prompt", r"labels on tokens \d"),
    "everything supervised": (
        QWEN, tokens_as(all_supervised), "labels-cover-no-prompt-image-or-padding", r"labels on image tokens"
    ),
    "labels without the stop token": (
        QWEN, tokens_as(without_stop_in_labels), "labels-cover-the-answer-and-one-stop-token", "'chess'"
    ),
    "stop token counted as content": (QWEN, tokens_as(stop_in_content), "content-is-the-answer-alone", r"<\|im_end\|>"),
    "answer given twice": (
        QWEN,
        tokens_as(ask=lambda pair: replace(pair, answer=f"{pair.answer} {pair.answer}")),
        "labels-cover-the-answer-and-one-stop-token",
        "'chess chess",
    ),
    "double BOS": (IDEFICS2, {"vkd_tokenize_pairs": two_bos}, "texts-have-one-bos", "2 of them"),
    "prompt that is no prefix": (QWEN, tiny_as(blank_at_the_end), "prompts-are-prefixes", "end in a blank"),
    "wrong stop token": (
        QWEN,
        {"vkd_stop_token_ids": lambda processor: [processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")]},
        "answers-end-with-the-first-stop-token",
        r"<\|endoftext\|>",
    ),
    "padding always on the right": (
        QWEN, tokens_as(side="right"), "padding-goes-where-it-is-asked", "left was asked for"
    ),
    "keys of the processor dropped": (
        QWEN, tokens_as(without_grids), "every-key-of-the-processor-is-kept", "without image_grid_thw"
    ),
    "text-only questions broken": (
        QWEN, tokens_as(ask=one_photo_a_pair), "text-and-photos-share-a-batch", "IndexError"
    ),
    "second photo lost": (
        QWEN,
        tokens_as(ask=lambda pair: replace(pair, photos=pair.photos[:1])),
        "photos-of-a-sample-come-in-order",
        "second: no row",
    ),
    "photos in reverse": (
        QWEN,
        tokens_as(ask=lambda pair: replace(pair, photos=pair.photos[::-1])),
        "photos-of-a-sample-come-in-order",
        r"first photo: 36 rows \(96",
    ),
    "projector that nothing passes": (
        LLAVA, {"vkd_locate_vision_modules": unused_norm}, "photos-pass-encoder-and-projector", "post_layernorm"
    ),
    "projector without gradients": (
        LLAVA, {"vkd_locate_vision_modules": unused_norm}, "gradients-reach-the-parts-in-use", "no parameter of 2"
    ),
    "untied head outside the language model": (
        QWEN,
        {"vkd_locate_vision_modules": decoder_only, **tiny_as(untied)},
        "embeddings-and-head-are-language-model",
        r"lm_head\.weight",
    ),
    "one photo a question": (
        QWEN, tokens_as(ask=only_one_photo), "a-question-may-show-two-photos", "ValueError: one photo a question"
    ),
    "padding attended": (
        QWEN, tokens_as(padding_attended), "losses-do-not-depend-on-the-batch", "in a batch padded left"
    ),
    "padding attended in generation": (
        QWEN, tokens_as(padding_attended), "generation-does-not-depend-on-the-batch", "apart in a batch"
    ),
    "first token supervised": (
        QWEN, tokens_as(all_supervised), "losses-are-those-of-transformers", r"\d"
    ),
    "one image token less": (
        QWEN, tokens_as(one_image_token_less), "image-tokens-match-the-features", r"^\d+$"
    ),
    "other features without the language model": (
        QWEN, loaded_as(scaling_on_the_way), "vision-alone-gives-the-same-features", r"vision\.0 differs"
    ),
    "rows placed column by column": (
        QWEN, grid_as(column_by_column), "rows-lie-where-the-grid-says", "they change .* on average, and the"
    ),
    "features that overflow": (QWEN, loaded_as(overflowing), "real-rows-are-finite", r"rows \(0"),
    "rows whose gradients reach other photos": (
        QWEN, rows_as(in_reverse), "gradients-stay-in-their-sample", r"photo \d of sample \d"
    ),
    "photos that cannot be encoded": (
        QWEN, tokens_as(ask=no_photo), "a-question-about-a-photo-is-answered", "no photo, please"
    ),
    "wrong width": (QWEN, layer_changed(0, width=128), "widths-are-true", "128"),
    "wrong parameter count": (QWEN, layer_changed(0, parameters=7), "parameter-counts-are-true", "7"),
    "layers in another order": (
        QWEN,
        {"vkd_list_distillation_layers": first_two_exchanged},
        "layers-run-in-their-order",
        r"vision\.1, vision\.0",
    ),
    "layers with names of their own": (
        QWEN, layer_changed(0, name="blocks.0"), "layers-have-canonical-names", r"blocks\.0"
    ),
    "language model without its head": (
        QWEN,
        {"vkd_locate_vision_modules": decoder_only, "vkd_model_presets": lambda: {"some/model": UNTIED}},
        "presets-can-be-described",
        r"lm_head\.weight",
    ),
    "served type refused": (
        QWEN,
        {"vkd_refused_model_types": lambda: {"qwen2_vl": "use another"}},
        "refused-types-are-not-served",
        "'qwen2_vl' is served and refused",
    ),
    "preset of another family": (
        QWEN,
        {"vkd_model_presets": lambda: {"some/model": {"model_type": "llava"}}},
        "presets-can-be-described",
        "some/model: 'llava'",
    ),
    "layers that need weights": (
        QWEN, {"vkd_list_distillation_layers": needs_weights}, "the-meta-device-shows-the-same-model", "meta"
    ),
    "incomplete checkpoints accepted": (
        QWEN, {"vkd_load_model": lenient}, "incomplete-weights-are-refused", "is missing"
    ),
    "a weight renewed while loading": (
        QWEN, {"vkd_load_model": forgetful}, "a-saved-model-loads-unchanged", r"blocks\.1\.mlp\.fc1\.weight"
    ),
    "tiny model without its seed": (
        QWEN, tiny_as(reseeded), "the-same-seed-gives-the-same-tiny-model", r"blocks\.0\.mlp\.fc1\.weight"
    ),
    "model type of a model that takes no photos": (
        QWEN,
        {"vkd_model_types": lambda: ["qwen2_vl", "bert"]},
        "transformers-knows-the-model-types",
        "'bert'",
    ),
    "model type unknown to transformers": (
        QWEN,
        {"vkd_model_types": lambda: ["qwen2_vl", "qwen2_v"]},
        "transformers-knows-the-model-types",
        "'qwen2_v'; did you mean 'qwen2_vl'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_by_the_check_meant_for_it(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (base, model_type), hooks, name, found = MISTAKES[mistake]
    for checks in ("ADAPTER_CHECKS", "MODEL_CHECKS"):
        monkeypatch.setattr(testing, checks, [check for check in getattr(testing, checks) if check.name == name])
    failed = checked(base, model_type, hooks)
    assert list(failed) == [name]
    assert re.search(found, failed[name].found), failed[name].found
    assert failed[name].expected and failed[name].look
    assert "\n" not in failed[name].found


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_still_told_when_other_checks_fail_for_it_too(mistake: str) -> None:
    (base, model_type), hooks, name, found = MISTAKES[mistake]
    failed = checked(base, model_type, hooks)
    assert re.search(found, failed[name].found), failed[name].found


def test_every_check_finds_a_mistake() -> None:
    tried = {check for _, _, check, _ in MISTAKES.values()} | {"differently-sized-photos-share-a-batch"}
    assert set(NAMES) == tried


def test_a_family_that_cannot_mix_sizes_fails_one_check_and_no_other() -> None:
    failed = checked(*QWEN, {"vkd_tokenize_pairs": ragged})
    assert list(failed) == ["differently-sized-photos-share-a-batch"]
    assert "cannot stack photos of 4 sizes" in failed["differently-sized-photos-share-a-batch"].found


@pytest.mark.parametrize("model_type", ["llava", "llava_onevision"])
def test_photos_that_a_template_writes_with_nothing_in_between_are_told_apart(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def adjoining(model: Any, processor: Any) -> None:
        template = processor.chat_template.replace("<image>\n", "<image>")
        assert template != processor.chat_template
        processor.chat_template = template

    looking = [check for check in MODEL_CHECKS if check.look.startswith("vkd_feature_rows")]
    monkeypatch.setattr(testing, "MODEL_CHECKS", looking)
    assert checked("llava", model_type, tiny_as(adjoining, "llava")) == {}


def test_checks_that_stop_at_the_same_error_are_told_in_one() -> None:
    failed = checked(*QWEN, tokens_as(without_grids))
    assert set(failed) == {"a-question-about-a-photo-is-answered", "every-key-of-the-processor-is-kept"}
    assert re.search(r"\d\d further checks stopped", failed["a-question-about-a-photo-is-answered"].look)


def without_photos(batch: EncodedBatch) -> EncodedBatch:
    """Image tokens without what they stand for, which Qwen2-VL's own code refuses."""
    return replace(batch, inputs={**batch.inputs, "pixel_values": batch.inputs["pixel_values"][:4]})


def test_a_foreign_error_is_told_with_its_place_in_the_familys_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "MODEL_CHECKS", [check for check in MODEL_CHECKS if check.name == FIRST])
    failed = checked(*QWEN, tokens_as(without_photos))
    assert re.search(r"^raised \w+Error: .* \(modeling_qwen2_vl\.py:\d+, \w+\)$", failed[FIRST].found), failed[
        FIRST
    ].found


def test_a_hooks_own_error_is_told_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(processor: Any) -> list[int]:
        raise KeyError("gone")

    monkeypatch.setattr(testing, "MODEL_CHECKS", [check for check in MODEL_CHECKS if check.name == FIRST])
    found = checked(*QWEN, {"vkd_stop_token_ids": forgetful})[FIRST].found
    assert re.search(r"raised KeyError: 'gone' \(test_conformance\.py:\d+, forgetful\)$", found), found


def test_a_message_that_holds_a_whole_model_keeps_its_two_ends() -> None:
    told = one_line(TypeError(f"Model({'layer ' * 1000}) got multiple values for keyword argument 'labels'"))
    assert told.startswith("TypeError: Model(layer") and told.endswith("keyword argument 'labels'")
    assert " … " in told and len(told) < 450


def test_a_check_that_raises_does_not_keep_the_others_from_running() -> None:
    failed = checked(*QWEN, {"vkd_list_distillation_layers": needs_weights})
    assert set(failed) == {"presets-can-be-described", "the-meta-device-shows-the-same-model"}


def test_a_model_that_does_not_load_is_one_failed_check() -> None:
    failed = checked(*QWEN, {"vkd_stop_token_ids": lambda: [1], "vkd_load_model": lambda source: 3})
    assert list(failed) == ["the-model-loads"]
    assert "vkd_load_model: must return (model, processor)" in failed["the-model-loads"].found


def test_an_adapter_without_a_tiny_model_is_told_what_to_do() -> None:
    plugin = types.ModuleType("wrong")
    vars(plugin)["vkd_model_types"] = hookimpl(lambda: ["qwen2_vl"])
    *fine, last = check_adapter(Adapter("wrong", plugin))
    assert all(result.ok for result in fine)
    assert last.name == "there-is-a-model-to-check" and not last.ok
    assert "vkd_tiny_model" in last.look and "--model" in last.look


def test_names_bear_the_model_type_when_there_are_several() -> None:
    plugin = types.ModuleType("two")
    own = {name: hook for name, hook in vars(family("qwen_vl")).items() if name.startswith("vkd_")}
    vars(plugin).update(own | {"vkd_load_model": hookimpl(lambda source: 3)})
    names = [result.name for result in check_adapter(Adapter("two", plugin)) if not result.ok]
    assert names == [f"{model_type}: the-model-loads" for model_type in load_adapter("qwen_vl").model_types]


def test_nothing_but_the_table_is_printed(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    assert all(result.ok for result in check_adapter("qwen_vl", "tiny:qwen2_vl"))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_assert_conforms_shows_the_failures_and_nothing_else() -> None:
    plugin = types.ModuleType("wrong")
    vars(plugin)["vkd_model_types"] = hookimpl(lambda: ["qwen2_vl"])
    with pytest.raises(AssertionError) as caught:
        assert_conforms(Adapter("wrong", plugin))
    text = str(caught.value)
    assert "FAIL  there-is-a-model-to-check" in text
    assert all(f"      {what} " in text for what in ("expected", "found", "look"))
    assert "\nok " not in text
    assert text.endswith(f"{len(ADAPTER_CHECKS) + 1} checks, 1 failed")


def test_the_table_counts_and_names_every_check() -> None:
    results = [CheckResult("a", True, "x", "", "y"), CheckResult("b", False, "this", "that", "there")]
    assert table(results).splitlines() == [
        "ok    a",
        "FAIL  b",
        "      expected  this",
        "      found     that",
        "      look      there",
        "2 checks, 1 failed",
    ]
    assert table(results[:1]).endswith("1 checks, all hold")


WRONG = """
from vkd_framework.hookspecs import hookimpl
from vkd_adapters.qwen_vl import *
@hookimpl
def vkd_stop_token_ids(processor):
    return [processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The working folder holds a package with an adapter that is not installed."""
    (tmp_path / "unreleased").mkdir()
    (tmp_path / "unreleased" / "__init__.py").touch()
    (tmp_path / "unreleased" / "family.py").write_text(WRONG, encoding="utf-8")
    (tmp_path / "unreleased" / "broken.py").write_text("import nothing_of_that_name", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "unreleased.family"
    for name in [name for name in sys.modules if name.startswith("unreleased")]:
        del sys.modules[name]


def test_the_command_checks_a_module_before_it_is_installed_and_fails(module: str) -> None:
    done = CliRunner().invoke(main, ["check-adapter", module, "--model", "tiny:qwen2_vl"])
    assert done.exit_code == 1
    assert "FAIL  answers-end-with-the-first-stop-token" in done.stdout
    assert done.stdout.endswith(f"{len(NAMES)} checks, 1 failed\n")


def test_the_command_prints_json_for_programs(module: str) -> None:
    done = CliRunner().invoke(main, ["check-adapter", module, "--model", "tiny:no_such_type", "--json"])
    assert done.exit_code == 1
    rows = json.loads(done.stdout)
    assert set(rows[0]) == {"name", "ok", "expected", "found", "look"}
    assert "no_such_type" in rows[-1]["found"] and not rows[-1]["ok"]


def test_the_command_passes_a_built_in_adapter() -> None:
    code = "from vkd_framework.cli import entry_point; entry_point()"
    command = [sys.executable, "-c", code, "check-adapter", "qwen_vl", "--model", "tiny:qwen2_vl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"{len(NAMES)} checks, all hold\n")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("qwen_v", r"'qwen_v' is not installed; did you mean 'qwen_vl'\?"),
        ("unreleased.famly", "neither installed nor a module that can be imported"),
        ("no_such.module", "neither installed nor a module that can be imported"),
        ("unreleased.broken", "'unreleased.broken' does not import: .*nothing_of_that_name"),
        ("os.path", "'os.path': the required hook vkd_model_types is missing"),
    ],
)
def test_an_adapter_that_is_not_there_is_one_line_and_status_2(module: str, name: str, told: str) -> None:
    done = CliRunner().invoke(main, ["check-adapter", name])
    assert done.exit_code == 2
    assert re.search(told, done.stderr)
    assert done.stderr.count("\n") == 1
    with pytest.raises(AdapterError, match=told):
        find_adapter(name)


def test_the_page_lists_every_check_in_order_with_the_hook_to_look_at() -> None:
    rows = re.findall(
        r"^\| `([a-z0-9-]+)` \| .+? \| `(vkd_\w+)` \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert rows == [(check.name, check.look.split()[0]) for check in (*ADAPTER_CHECKS, *MODEL_CHECKS)]


@pytest.mark.parametrize("name", ["README.md", "docs/writing_an_adapter.md"])
def test_a_page_that_counts_the_checks_counts_them_all(name: str) -> None:
    told = re.findall(r"(\d+) checks", (PAGE.parent.parent / name).read_text(encoding="utf-8"))
    assert told and {int(count) for count in told} == {len(NAMES)}
