from __future__ import annotations

import re
from dataclasses import replace

import pytest
from wrong_hooks import (
    IDEFICS2,
    INTERNVL,
    LLAVA,
    NAMES,
    QWEN,
    UNTIED,
    Aside,
    Hooks,
    Twice,
    all_in_one_corner,
    all_supervised,
    blank_at_the_end,
    checked,
    column_by_column,
    decoder_as_encoder,
    decoder_only,
    first_row_lost,
    first_two_exchanged,
    forgetful,
    grid_as,
    in_reverse,
    inside_the_blocks,
    layer_changed,
    lenient,
    loaded_as,
    needs_weights,
    no_photo,
    no_tiny_photo_alone,
    off_by_one,
    one_image_token_less,
    one_photo_a_pair,
    one_square,
    only_one_photo,
    overflowing,
    own_layers,
    padding_attended,
    reentrant,
    reseeded,
    rows_as,
    scaling_on_the_way,
    seen_from_both_sides,
    stop_in_content,
    text_rows,
    tiny_as,
    tokens_as,
    two_bos,
    unchanged,
    unplaced,
    untied,
    unused_norm,
    without_grids,
    without_stop_in_labels,
    wrapped,
)

from vkd_framework import generic, testing

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
    "photo that cannot be encoded alone": (
        QWEN,
        {"vkd_tokenize_pairs": no_tiny_photo_alone},
        "neighbours-do-not-change-a-samples-rows",
        "ValueError: no patch left with 'tiny' 8x8 alone ",
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
    "answer that sees itself": (
        QWEN, loaded_as(seen_from_both_sides), "answers-do-not-see-what-follows", "apart with another last token"
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
    "tiles taken for a square": (
        INTERNVL, {"vkd_feature_grid": one_square}, "rows-lie-where-the-grid-says", "they change .* on average, and the"
    ),
    "rows whose places crash": (
        QWEN, {"vkd_feature_grid": unplaced}, "rows-lie-where-the-grid-says", "vkd_feature_grid: raised KeyError"
    ),
    "rows without a place": (
        QWEN, grid_as(all_in_one_corner), "rows-lie-where-the-grid-says", "must give boxes within 0 and 1"
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
