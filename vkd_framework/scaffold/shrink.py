"""How any transformers image-text-to-text architecture is made tiny: a draft of its builder, as settings to write out.

Nothing here knows a family. Sizes are found by the names that config classes share, tokens by what the processor's
source asks its tokenizer for. A draft is a proposal: `trial` runs it, and keeps the first one that works.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vkd_framework.tiny import BLOCKS, HEADS, INITIALIZER_RANGE, PATCH, VISION_WIDTH

WIDTH = VISION_WIDTH
"""Channels of encoder and language model alike: what a size between the two is called then matters less."""

PICTURE = 48
"""Pixels along the side of a photo as the tiny model sees it."""

ROWS = (PICTURE // PATCH // 2) ** 2
"""Tokens of a photo, where a setting says so: most families merge two by two patches."""

END = "<|end|>"

UNKNOWN = "ProcessorMixin"
"""What stands for the processor's class where transformers does not say which it is."""

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "n_embd", "width", "out_hidden_size"), WIDTH),
    **dict.fromkeys(("projection_dim", "projector_hidden_size", "embedding_dim", "text_hidden_size"), WIDTH),
    **dict.fromkeys(("projector_hidden_dim", "projector_dim", "cross_attention_hidden_size", "ffn_hidden_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "mlp_dim", "n_inner", "moe_intermediate_size"), 2 * WIDTH),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp"), 2 * WIDTH),
    **dict.fromkeys(("alignment_intermediate_size", "shared_expert_intermediate_size"), 2 * WIDTH),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "n_layer", "encoder_layers"), BLOCKS),
    **dict.fromkeys(("decoder_layers",), BLOCKS),
    **dict.fromkeys(("num_attention_heads", "num_heads", "attention_heads", "n_head", "num_key_value_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("head_dim", "v_head_dim", "query_pre_attn_scalar"), WIDTH // HEADS),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), WIDTH // HEADS // 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "output_channels"), WIDTH // 2),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_global_layers"), 1),
    "image_size": PICTURE,
    "patch_size": PATCH,
    "max_position_embeddings": 1024,
    "num_position_embeddings": (PICTURE // PATCH) ** 2,
}
"""Setting -> what it becomes, or less where it was less. The names are those that config classes share."""

PER_PHOTO = ("image_seq_length", "image_seq_len", "num_image_tokens", "mm_tokens_per_image", "num_image_token")
"""What configs and processors call the number of tokens that stand for one photo."""

PINPOINTS = [[PICTURE, PICTURE], [PICTURE, 2 * PICTURE], [2 * PICTURE, PICTURE]]
PLUMBING = {"architectures", "id2label", "label2id", "dtype", "transformers_version"}
STANDARD_TOKENS = {f"{name}_token" for name in ("eos", "bos", "pad", "unk", "sep", "cls", "mask", "add_eos", "add_bos")}


@dataclass(frozen=True)
class Code:
    """An expression that the generated module holds as it is."""

    text: str

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Draft:
    """The settings of a tiny model: classes by name, keyword arguments of each, and the tokens they need."""

    model_type: str
    model_class: str
    config: dict[str, Any]
    processor_class: str
    processor: dict[str, Any]
    parts: dict[str, tuple[str, dict[str, Any]]]
    """`image_processor` and the like -> class and arguments."""
    named_tokens: dict[str, str]
    """Attribute of the tokenizer -> token."""
    tokens: tuple[str, ...]
    picture: str
    """What the chat template writes for a photo."""


def draft(model_type: str) -> Draft | None:
    """A first proposal; None when its config class has no defaults, as that of two models put together."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    processor_class = PROCESSOR_MAPPING.get(config_class, None)
    try:
        config = config_class()
    except ValueError:
        return None
    named, others = processor_tokens(processor_class) if processor_class else ({}, [])
    picture = named.get("image_token") or next((token for token in others if "image" in token.lower()), "<image>")
    named.setdefault("image_token", picture)
    return Draft(
        model_type=model_type,
        model_class=MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type],
        config=tiny_config(config, {name.removesuffix("_token"): token for name, token in named.items()}),
        processor_class=processor_class.__name__ if processor_class else UNKNOWN,
        processor=processor_arguments(processor_class, config) if processor_class else {},
        parts=processor_parts(processor_class, config_class) if processor_class else {},
        named_tokens=named,
        tokens=tuple(sorted({*named.values(), *others})),
        picture=picture,
    )


def tiny_config(config: Any, tokens: Mapping[str, str]) -> dict[str, Any]:
    """What to pass to a config class so that it describes a tiny model: only what differs from its defaults.

    `tokens`: the stem of a `..._token_id` -> the token.
    """
    settings: dict[str, Any] = {}
    values = {name: value for name, value in vars(config).items() if not name.startswith("_") and name not in PLUMBING}
    depth = next((v for k in ("num_hidden_layers", "depth", "num_layers") if isinstance(v := values.get(k), int)), None)
    for name, value in values.items():
        if hasattr(value, "to_dict"):
            inner = tiny_config(value, tokens)
            if "vocab_size" in inner:
                inner |= {"bos_token_id": None, "eos_token_id": token_code("END"), "pad_token_id": token_code("END")}
            settings[name] = {"model_type": value.model_type, **inner}
        else:
            settings |= _small(name, value, depth, tokens)
    return settings


def _small(name: str, value: Any, depth: int | None, tokens: Mapping[str, str]) -> dict[str, Any]:
    """The tiny counterpart of one setting, by its name; nothing where its value can stay."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    listed = isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(item, int) for item in value)
    small: Any = value
    if name == "vocab_size":
        small = Code("vocabulary")
    elif name == "tie_word_embeddings":
        small = True
    elif match := re.fullmatch(r"(\w+?)_token_(?:id|index)", name):
        stem = next((key for key in tokens if key == match[1] or key[0] == match[1][0]), None)
        if stem and f"{match[1]}_token" not in STANDARD_TOKENS:
            small = token_code(f'"{tokens.get(match[1], tokens[stem])}"')
    elif name in PER_PHOTO and whole:
        small = ROWS
    elif name.startswith("vision_feature_layer") and listed:
        small = sorted({max(item, -BLOCKS) if item < 0 else min(item, BLOCKS - 1) for item in value})
    elif name == "window_size" and whole:
        small = 4 * PATCH if value >= 64 else 4  # in pixels, or in patches
    elif name == "initializer_range":
        small = INITIALIZER_RANGE
    elif name == "image_grid_pinpoints" and value:
        small = PINPOINTS
    elif name == "head_dim" and whole:
        small = SIZES[name]
    elif name in SIZES and whole:
        small = min(SIZES[name], value)
    elif name in SIZES and listed:
        small = [min(SIZES[name], item) for item in value]
    elif isinstance(value, (list, tuple)) and depth and len(value) == depth:
        small = [*value[: BLOCKS - 1], value[-1]]
    elif re.search(r"(layers|indexes|indices)$", name) and listed:
        small = sorted({min(item, BLOCKS - 1) for item in value[:2]})
    elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict) and "mrope_section" in value:
        small = {**value, "mrope_section": [WIDTH // HEADS // 6] * 3}  # time, height, width; half the head's channels
    return {} if small is value else {name: small}


def token_code(what: str) -> Code:
    """The id of a token, as the generated module writes it."""
    return Code(f"token({what})")


def processor_tokens(processor_class: Any) -> tuple[dict[str, str], list[str]]:
    """The tokens that a processor asks its tokenizer for by name, and others that its source writes out."""
    source = inspect.getsource(inspect.getmodule(processor_class) or processor_class)
    source = re.sub(r'""".*?"""', "", source, flags=re.DOTALL)
    asked = {name.removesuffix("_id") for name in re.findall(r"tokenizer\.(\w+_token(?:_id)?)\b", source)}
    written = re.findall(r"[\"'](<[^\"'<>\s{}]+>)[\"']", source)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(processor_class).parameters.items()
        if name.endswith("_token") and isinstance(parameter.default, str)
    }
    wanted = sorted(asked - STANDARD_TOKENS) + (["image_token"] if "image_token" in defaults else [])
    named = {name: defaults.get(name) or _likely(name, written) for name in wanted}
    return named, list(dict.fromkeys([*defaults.values(), *written]))


def _likely(name: str, written: Sequence[str]) -> str:
    """The written-out token that has the name in it, or one made from the name."""
    stem = name.removesuffix("_token")
    return next((token for token in written if re.fullmatch(rf"<\|?{stem}\w*\|?>", token)), f"<{stem}>")


def processor_arguments(processor_class: Any, config: Any) -> dict[str, Any]:
    """Sizes among a processor's own arguments; those that its config has too must agree with it."""
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(processor_class).parameters.items():
        if name in ("patch_size", "encoder_patch_size"):
            found[name] = PATCH
        elif name in ("spatial_merge_size", "downsample_factor") and isinstance(getattr(config, name, None), int):
            found[name] = getattr(config, name)
        elif name in ("img_size", "image_size"):
            found[name] = PICTURE
        elif name in PER_PHOTO:
            found[name] = ROWS
        elif name == "vision_feature_select_strategy" and parameter.default is None:
            found[name] = "default"
    return found


def processor_parts(processor_class: Any, config_class: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """The parts of a processor beside the tokenizer, of the classes that transformers pairs with the config."""
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

    listed = getattr(processor_class, "get_attributes", lambda: processor_class.attributes)()
    source = inspect.getsource(processor_class)
    parts = {}
    for name, mapping in (
        ("image_processor", IMAGE_PROCESSOR_MAPPING),
        ("video_processor", VIDEO_PROCESSOR_MAPPING),
        ("feature_extractor", FEATURE_EXTRACTOR_MAPPING),
    ):
        cls = _newest(mapping.get(config_class, None)) or _of_a_relative(processor_class, mapping)
        if name in listed and cls is not None:
            arguments = {} if name == "feature_extractor" else picture_arguments(cls)
            asked = [key for key in PER_PHOTO if f"{name}.{key}" in source]
            parts[name] = (cls.__name__, arguments | dict.fromkeys(asked, ROWS))
    return parts


def _of_a_relative(processor_class: Any, mapping: Any) -> Any:
    """What another architecture with the same processor uses."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    relatives = [name for name, processor in PROCESSOR_MAPPING_NAMES.items() if processor == processor_class.__name__]
    configs: Iterable[Any] = (CONFIG_MAPPING[name] for name in relatives if name in CONFIG_MAPPING)
    return next((cls for config in configs if (cls := _newest(mapping.get(config, None))) is not None), None)


def _newest(listed: Any) -> Any:
    """The class that the Auto class would take: transformers 5 lists them by backend, 4 as (slow, fast)."""
    if isinstance(listed, dict):
        return listed.get("torchvision") or next(iter(listed.values()))
    if isinstance(listed, tuple):
        return listed[1] or listed[0]
    return listed


def picture_arguments(cls: Any) -> dict[str, Any]:
    """Arguments that make an image or video processor resize to the tiny size."""
    found: dict[str, Any] = {}
    for name, value in vars(cls()).items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        if name in ("size", "crop_size", "max_image_size", "pad_size") and isinstance(value, Mapping):
            found[name] = {key: _pixels(key, number) for key, number in value.items() if number}
        elif name == "patch_size" and value:
            keys = [key for key, number in value.items() if number] if isinstance(value, Mapping) else []
            found[name] = dict.fromkeys(keys, PATCH) if keys else PATCH
        elif name == "max_pixels" and value:
            found[name] = PICTURE**2
        elif name == "min_pixels" and value:
            found[name] = (2 * PATCH) ** 2
        elif name in ("tile_size", "image_size") and isinstance(value, int):
            found[name] = PICTURE
        elif name == "image_grid_pinpoints" and value:
            found[name] = PINPOINTS
        elif name in PER_PHOTO and value:
            found[name] = ROWS
    return found


def _pixels(key: str, number: int) -> int:
    """A side, or an area where the default is too large for a side."""
    if number < 4096 and "pixels" not in key:
        return PICTURE
    return (2 * PATCH) ** 2 if key in ("shortest_edge", "min_pixels") else PICTURE**2
