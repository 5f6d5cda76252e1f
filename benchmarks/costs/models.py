"""Models of three sizes, built from a family's published config with random weights; nothing is downloaded.

`8b` has the published widths, depths and vocabulary. `120m` is the same config with fewer heads and blocks and a
smaller vocabulary, all in proportion. Tokenizer and processor are those of the embedded default, whose patches are 8
pixels wide: a picture of `image_size` gives the tokens of a real one that is as many patches wide.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from vkd_framework import data
from vkd_framework.plugins import MLLM, load_adapter
from vkd_framework.recipe import CelebsData, Recipe, load_recipe, overrides_without_effect
from vkd_framework.types import ImageQuestionPair, Splits


@dataclass(frozen=True)
class Family:
    """The recipe and the published config that stand for a family, and what is left of the config at 120m.

    `heads`: attention heads of the language model; every other width shrinks by as much. `depth`: share of the blocks.
    """

    recipe: str
    preset: str
    heads: int
    depth: float


FAMILIES = {
    "qwen_vl": Family("qwen2vl_celeb", "Qwen/Qwen2-VL-7B-Instruct", 5, 0.45),
    "llava": Family("llava_celeb", "llava-hf/llava-1.5-7b-hf", 6, 0.45),
    "internvl": Family("internvl_celeb", "OpenGVLab/InternVL3-8B-hf", 5, 0.45),
    "idefics": Family("idefics_celeb", "HuggingFaceM4/Idefics3-8B-Llama3", 5, 0.6),
}


@dataclass(frozen=True)
class Size:
    """`pairs`: of each set, for a mask. `micro_batch`: the most pairs of a step that are in the model at once."""

    name: str
    image_size: int
    forget_batch: int
    retain_batch: int
    pairs: int
    dtype: str = "float32"
    device: str = "cpu"
    micro_batch: int | None = None


SIZES = {
    "tiny": Size("tiny", 48, 16, 48, 64),
    "120m": Size("120m", 112, 2, 6, 8),
    "8b": Size("8b", 192, 2, 6, 16, "bfloat16", "cuda"),
}

PEOPLE = 6
GEOMETRY = ("patch_size", "image_size", "num_position_embeddings", "image_seq_length")
"""Settings that belong to the pictures, and so to the processor."""
HEADS, BLOCKS = ("num_attention_heads", "num_heads"), ("num_hidden_layers", "depth")
WIDTHS = ("hidden_size", "embed_dim", "intermediate_size", "out_hidden_size")


def cast(size: Size, seed: int = 0) -> dict[str, Any]:
    """The drawn people of the benchmark: few of them, with photos of the size's width."""
    photos = {"train_photos": 4, "test_photos": 2, "attacker_photos": 0, "image_size": size.image_size}
    return {
        "kind": "celebs",
        "seed": seed,
        "people": PEOPLE,
        "forget": 2,
        "strangers": 4,
        "extras": 12,
        "test_pairs": 20,
        **photos,
    }


def splits_of(size: Size, casts: int = 1) -> Splits:
    """The pairs of the benchmark's people; of several casts, all people are retained that the first does not forget."""
    first, *others = (data.load(CelebsData.model_validate(cast(size, seed))) for seed in range(casts))
    retain = [_renamed(pair, f"{seed}/") for seed, other in enumerate(others, start=1) for pair in other.retain]
    return replace(first, retain=(*first.retain, *retain))


def _renamed(pair: ImageQuestionPair, cast: str) -> ImageQuestionPair:
    """The pair with names of its own, where other casts have the same."""
    photos = tuple(replace(photo, key=cast + photo.key) for photo in pair.photos)
    return replace(pair, id=cast + pair.id, photos=photos, subject=pair.subject and cast + pair.subject)


def recipe_of(family: str, size: Size, method: str, *overrides: str) -> Recipe:
    """The family's recipe on the benchmark's people, with the size's batches; an attack neither ends nor waits.

    The rate is so low that all methods can be timed on one model, one after the other. There is no room on a GPU for
    the master weights of a method that tunes all of 8 billion.
    """
    settings = (
        f"method={method}",
        f"data={cast(size)}",
        f"model.dtype={size.dtype}",
        f"unlearn.forget_batch={size.forget_batch}",
        f"unlearn.retain_batch={size.retain_batch}",
        f"unlearn.micro_batch={size.micro_batch or 'null'}",
        *("unlearn.steps=100000", "unlearn.checkpoint_every=100000", "unlearn.warmup=0"),
        *("unlearn.learning_rate=1.0e-7", "unlearn.retain_floor=null", "unlearn.master_weights=false"),
        f"simulated_attack.batch_size={size.forget_batch}",
        *("simulated_attack.horizon=[100000,100000]", "simulated_attack.head_start=0"),
        f"evaluate.batch_size={size.forget_batch + size.retain_batch}",
        *overrides,
    )
    recipe = FAMILIES[family].recipe
    unread = overrides_without_effect(recipe, settings)
    return load_recipe(recipe, [setting for setting in settings if setting not in unread])


def build(family: str, size: Size, splits: Splits) -> MLLM:
    """The model with random weights on the size's device, bound to its adapter."""
    adapter = load_adapter(family)
    pairs = [pair for group in (*splits.teach.values(), *splits.columns.values()) for pair in group]
    texts = sorted({text for pair in pairs for text in (pair.question, pair.answer, *pair.options)})
    small = adapter.tiny_model(texts, size.image_size, 0)
    if size.name == "tiny":
        return small
    config = _config(FAMILIES[family], adapter.presets, small.model.config, shrink=size.name == "120m")
    torch.manual_seed(0)
    with torch.device(size.device):
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, size.dtype))
    model.generation_config.eos_token_id = small.model.generation_config.eos_token_id
    model.generation_config.pad_token_id = small.model.generation_config.pad_token_id
    return adapter.bind(model.eval(), small.processor)


def warm_up(family: str, size: Size, splits: Splits) -> None:
    """Have everything imported, opened and encoded once, so that no method pays for it."""
    mllm = load_adapter(family).tiny_model([pair.question for pair in splits.forget], size.image_size, 0)
    mllm.model.to(size.device)
    batch = mllm.tokenize(splits.forget[:1])
    torch.autograd.backward(mllm.model(**batch.inputs).logits.mean())


def _config(family: Family, presets: Any, small: Any, *, shrink: bool) -> Any:
    """The published config, or what is left of it, with the pictures and tokens of `small`."""
    contents = presets[family.preset]
    published = CONFIG_MAPPING[contents["model_type"]].from_dict(dict(contents))
    _take(published, small)
    share = family.heads / published.get_text_config().num_attention_heads
    return _shrunk(published, share, family.depth) if shrink else published


def _take(config: Any, small: Any) -> None:
    """Give `config` the token ids and the geometry of the pictures that `small` has, at every level."""
    for name, value in vars(small).items():
        if name in GEOMETRY or name.endswith(("_token_id", "_token_index")):
            setattr(config, name, value)
        elif hasattr(value, "to_dict") and hasattr(config, name):
            _take(getattr(config, name), value)


def _shrunk(published: Any, share: float, left: float) -> Any:
    """A copy with about `share` of the heads and widths, heads as wide as before, and `left` of the blocks."""
    config = deepcopy(published)
    for part in (config.get_text_config(), config.vision_config):
        named, deep = (next(name for name in names if hasattr(part, name)) for names in (HEADS, BLOCKS))
        heads = int(getattr(part, named))
        groups = heads // int(getattr(part, "num_key_value_heads", None) or heads)
        shared = max(1, round(heads * share / groups))
        kept = shared * groups if shared > 1 or groups == 1 else max(1, round(heads * share))
        if hasattr(part, "num_key_value_heads"):
            part.num_key_value_heads = shared
        setattr(part, named, kept)
        setattr(part, deep, max(4, round(getattr(part, deep) * left)))
        for name in WIDTHS:
            if isinstance(width := getattr(part, name, None), int):
                setattr(part, name, max(1, round(width / heads / 8)) * 8 * kept)
    text, vision = config.get_text_config(), config.vision_config
    text.vocab_size = max(8192, round(text.vocab_size * share * left / 64) * 64)
    if getattr(vision, "embed_dim", None):  # the encoder's own width; hidden_size is then the language model's
        vision.hidden_size = text.hidden_size
    return config
