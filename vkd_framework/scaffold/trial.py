"""Try a draft as a run would use it, mend what its errors complain about, and look at what works."""

from __future__ import annotations

import re
import types
from contextlib import suppress
from dataclasses import replace
from typing import Any

from PIL import Image

from vkd_framework import generic
from vkd_framework.errors import AdapterError, VKDError, on_one_line, with_its_kind
from vkd_framework.features import FeatureTap, photo_features, vision_forward
from vkd_framework.plugins import MLLM, Adapter
from vkd_framework.scaffold import shrink
from vkd_framework.scaffold.render import Findings, quoted, render_adapter
from vkd_framework.scaffold.shrink import PICTURE, Draft, token_code
from vkd_framework.tiny import PATCH
from vkd_framework.types import ImageQuestionPair, Photo

TEXTS = ("What is shown?", "chess")
TRIALS = 12
LEADS_OUT = re.compile("merg|proj|connector|adapter|align")
"""How modules are named that lie in the encoder and map into the language model's space."""

SEES, SPEAKS = re.compile("vision|visual|image"), re.compile("language|text|decoder|lm$|llm")
"""How modules are named that take photos, and those that answer."""

LARGEST = 20_000_000
"""Parameters above which a model is not tiny: a size that no name gave away was left as it is."""


def execute(source: str, name: str) -> Adapter:
    """The rendered module, as an adapter that is not installed."""
    return Adapter(name, _module(source, name))


def _module(source: str, name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    exec(compile(source, f"{name}.py", "exec"), module.__dict__)
    return module


def trial_pairs() -> list[ImageQuestionPair]:
    """A square, a wide and a tall photo, and a question without any."""
    sizes = ((PICTURE, PICTURE), (2 * PICTURE, PICTURE), (PICTURE, 2 * PICTURE))
    photos = [Photo(f"{w}x{h}", Image.effect_noise((w, h), 80).convert("RGB")) for w, h in sizes]
    asked = [ImageQuestionPair(photo.key, "What is shown?", "chess", (photo,)) for photo in photos]
    return [*asked, ImageQuestionPair("text", "What is shown?", "chess")]


def trial(adapter: Adapter) -> MLLM:
    """Use the tiny model as a run would. Raises whatever goes wrong."""
    import torch

    with torch.device("meta"):
        sizes = {n: p.numel() for n, p in adapter.tiny_model(TEXTS, PICTURE, 0).model.named_parameters()}
    if sum(sizes.values()) > LARGEST:
        name = max(sizes, key=lambda name: sizes[name])
        raise AdapterError(f"the tiny model has {sum(sizes.values()):,} parameters, {sizes[name]:,} of them in {name}")
    mllm = adapter.tiny_model(TEXTS, PICTURE, 0)
    pairs = trial_pairs()
    mllm.check_prompt_is_prefix(pairs[0])
    for batch in (pairs[:1], pairs[:1] * 2, pairs[-1:], pairs):
        inputs = mllm.tokenize(batch).inputs
        with torch.no_grad(), FeatureTap(mllm.model, mllm.layers) as tap:
            mllm.model(**inputs)
            if any(pair.photos for pair in batch) and (still := [a for a in mllm.layers if a.name not in tap.features]):
                raise AdapterError(f"layer {still[0].name!r} ({still[0].path}) is not run on photos")
            if any(pair.photos for pair in batch):
                photo_features(mllm, inputs, tap)
                vision_forward(mllm, inputs)
    inputs = mllm.tokenize(pairs, with_answer=False, padding_side="left").inputs
    mllm.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    return mllm


def work_out(proposal: Draft) -> tuple[Draft, Findings, str | None]:
    """The first draft that works, by trying and mending; else the one mended most, and what is wrong with it."""
    waiting = [(0, proposal, Findings())]
    seen: set[str] = set()
    deepest, best, problem = -1, (proposal, Findings()), ""
    while waiting and len(seen) < TRIALS:
        depth, draft, found = waiting.pop(0)
        source = render_adapter(draft, found)
        if source in seen:
            continue
        seen.add(source)
        try:
            found = observe(trial(execute(source, "draft")), found)
            if found.zeros:  # only a model that lets photos through shows what is read
                found = observe(trial(execute(render_adapter(draft, found), "draft")), found)
            trial(execute(render_adapter(draft, found), "draft"))
        except Exception as error:
            told = on_one_line(error) if isinstance(error, VKDError) else with_its_kind(error)
            text = told.removeprefix("adapter 'draft', ")
            if depth > deepest:
                deepest, best, problem = depth, (draft, found), text
            with suppress(Exception):  # what cannot even be looked at is not mended
                waiting = [(depth + 1, *mended) for mended in repairs(draft, found, text)] + waiting
        else:
            return draft, found, None
    return (*best, problem)


def repairs(draft: Draft, found: Findings, error: str) -> list[tuple[Draft, Findings]]:
    """Drafts in which what an error complains about is different, most likely first."""
    if match := re.search(r"total number of (\S+) tokens in the prompts", error):
        return [(replace(draft, picture=match[1]), found)]
    if "image tokens but received" in error:
        others = [token for token in draft.named_tokens.values() if token != draft.picture]
        return [(replace(draft, picture=token), found) for token in others]
    if "projector without any parameter" in error and not found.nested:
        return [(draft, replace(found, nested=_leading_out(draft, found)))]
    if "no vision encoder and language model found" in error and found.modules is None:
        return [(draft, replace(found, modules=_likely_modules(draft, found)))]
    if match := re.search(r"do not match[,:] tokens: (\d+), features:? (\d+)", error):
        tokens, features = int(match[1]), int(match[2])
        counts = (features // shrink.WIDTH, features)  # of rows, or of all their channels
        mended = [_with_image_token(draft, found), *(d for rows in counts for d in _with_rows(draft, rows, tokens))]
        return [(changed, found) for changed in mended]
    if match := re.search(r"sum exactly to (\d+) .*split_sizes=\[\d+, \d+, \d+\]", error):
        return [(_with_rope_sections(draft, int(match[1]) // 3), found)]
    if match := re.search(r"shapes cannot be multiplied \(\d+x(\d+) and (\d+)x\d+\)", error):
        return [(_with_size(draft, before=int(match[2]), after=int(match[1])), found)]
    if match := re.search(r"normalized_shape=\[(\d+)\].*size\[.*?(\d+)\]", error):
        return [(_with_size(draft, before=int(match[1]), after=int(match[2])), found)]
    return []


def _built(draft: Draft, found: Findings) -> tuple[Any, Any]:
    """Model, without weights, and processor of a draft."""
    import torch

    module = _module(render_adapter(draft, found), "draft")
    with torch.device("meta"):  # not through the facade, which refuses what is not located yet
        answer: tuple[Any, Any] = module.vkd_tiny_model(draft.model_type, TEXTS, PICTURE, 0)
    return answer


def _leading_out(draft: Draft, found: Findings) -> tuple[str, ...]:
    """Modules inside the encoder whose names say that they lead to the language model."""
    model, _ = _built(draft, found)
    children = model.get_submodule(generic.locate_vision_modules(model).encoder).named_children()
    return tuple(name for name, child in children if LEADS_OUT.search(name) and list(child.parameters()))


def _likely_modules(draft: Draft, found: Findings) -> tuple[str, tuple[str, ...]] | None:
    """Encoder and language model with its head, by what their names and sizes say."""
    model, _ = _built(draft, found)
    inner = model.base_model
    prefix = next((f"{name}." for name, child in model.named_children() if child is inner), "")
    sizes = {name: sum(p.numel() for p in child.parameters()) for name, child in inner.named_children()}
    encoder, decoder = (
        max((name for name in sizes if pattern.search(name)), key=lambda name: sizes[name], default=None)
        for pattern in (SEES, SPEAKS)
    )
    if encoder is None or decoder is None or encoder == decoder:
        return None
    head = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    return prefix + encoder, (prefix + decoder, *head)


def _with_image_token(draft: Draft, found: Findings) -> Draft:
    """The config's image token is the special token that the processor repeats most often for a photo."""
    _, processor = _built(draft, found)
    inputs = generic.tokenize_pairs(processor, trial_pairs()[:1], [0], with_answer=False, padding_side="right").inputs
    ids = [i for i in inputs["input_ids"][0].tolist() if processor.tokenizer.convert_ids_to_tokens(i) in draft.tokens]
    repeated = processor.tokenizer.convert_ids_to_tokens(max(ids, key=ids.count))
    names = [name for name in generic.IMAGE_TOKEN_NAMES if name in draft.config]
    return replace(draft, config=draft.config | dict.fromkeys(names[:1], token_code(quoted(repeated))))


def _with_rows(draft: Draft, rows: int, tokens: int) -> list[Draft]:
    """The processor writes `rows` tokens for a photo instead of `tokens`, by whichever setting says how many."""
    found = []
    for name in shrink.PER_PHOTO:
        if name in draft.processor:
            found.append(replace(draft, processor={**draft.processor, name: rows}))
        for part, (cls, arguments) in draft.parts.items():
            if name in arguments:
                found.append(replace(draft, parts={**draft.parts, part: (cls, {**arguments, name: rows})}))
    if rows - tokens == 1:  # for a class token that the model drops
        found.append(replace(draft, processor={**draft.processor, "num_additional_image_tokens": 1}))
    return found


def _with_rope_sections(draft: Draft, section: int) -> Draft:
    """The rotary channels are shared out evenly over time, height and width."""
    config = dict(draft.config)
    for name, part in vars(_default_config(draft)).items():
        rope = getattr(part, "rope_parameters", None)
        if isinstance(rope, dict) and isinstance(config.get(name), dict):
            config[name] = {**config[name], "rope_parameters": {**rope, "mrope_section": [section] * 3}}
    return replace(draft, config=config)


def _with_size(draft: Draft, before: int, after: int) -> Draft:
    """Every setting of the config whose default is `before` becomes `after`."""

    def settle(default: Any, settings: dict[str, Any]) -> dict[str, Any]:
        changed = dict(settings)
        for name, value in vars(default).items():
            if hasattr(value, "to_dict"):
                changed[name] = settle(value, settings[name])
            elif isinstance(value, int) and value == before and not name.startswith("_"):
                changed[name] = after
        return changed

    return replace(draft, config=settle(_default_config(draft), draft.config))


def _default_config(draft: Draft) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[draft.model_type]()


def observe(mllm: MLLM, found: Findings) -> Findings:
    """Class tokens, tiles, blocks that no answer depends on, and the parts, seen on a tiny model that works."""
    inputs = mllm.tokenize(trial_pairs()[:1]).inputs
    mllm.model.requires_grad_(True)
    with FeatureTap(mllm.model, mllm.layers[:1]) as tap:
        mllm.model(**inputs).logits.float().square().sum().backward()
    rows, patches = len(next(iter(tap.features.values()))), (PICTURE // PATCH) ** 2
    blocks = [layer for layer in mllm.layers if layer.name != "projector"]
    read = [
        any(p.grad is not None and bool(p.grad.any()) for p in mllm.model.get_submodule(block.path).parameters())
        for block in blocks
    ]
    unread = next((count for count, one in enumerate(reversed(read)) if one), 0)
    known = all(block.reaches_language_model == one for block, one in zip(blocks, read, strict=True))
    projector = [layer for layer in mllm.layers if layer.name == "projector"]
    parts = [
        (f"{blocks[0].path.rpartition('.')[0]}.{{i}}", "the vision encoder's blocks"),
        *((layer.path, "projector") for layer in projector),
        *((path, "language model") for path in mllm.modules.language_model),
    ]
    return replace(
        found,
        class_token=1 + patches if rows % (patches + 1) == 0 else 0,
        tiles=_tiles(mllm),
        zeros=found.zeros or (() if any(read) else _zeros(mllm)),
        unread=0 if known else unread,
        parts=tuple(parts),
        layers=tuple(layer.name for layer in [*blocks[: len(blocks) - unread][-2:], *projector]),
    )


def _tiles(mllm: MLLM) -> bool:
    """Whether a photo three times as wide as high has four times the rows of a square one, in four pictures of one."""
    import torch

    counts = []
    for width in (PICTURE, 3 * PICTURE):
        photo = Photo(str(width), Image.effect_noise((width, PICTURE), 80).convert("RGB"))
        inputs = mllm.tokenize([ImageQuestionPair(photo.key, "What is shown?", "chess", (photo,))]).inputs
        with torch.no_grad(), FeatureTap(mllm.model, mllm.layers) as tap:
            vision_forward(mllm, inputs)
        counts.append([len(inputs.get("pixel_values", ())), *map(len, tap.features.values())])
    square, long = counts
    return square[0] == 1 and long == [4 * count for count in square]


def _zeros(mllm: MLLM) -> tuple[str, ...]:
    return tuple(name for name, weight in mllm.model.named_parameters() if weight.ndim > 1 and not weight.any())
