"""Qwen2-VL.

model.visual.blocks.{i}      vision encoder; rows packed over the batch, [patches, D], no batch dimension
model.visual.merger          projector, nested in the encoder; 2 x 2 patches -> one visual token
model.language_model         language model, with lm_head beside `model`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vkd_framework.generic import locate_vision_modules
from vkd_framework.hookspecs import hookimpl
from vkd_framework.types import VisionModules

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

IMAGE, VIDEO, VISION_START, VISION_END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@hookimpl
def vkd_model_types() -> Sequence[str]:
    """Qwen2-VL."""
    return ["qwen2_vl"]


@hookimpl
def vkd_locate_vision_modules(model: PreTrainedModel) -> VisionModules:
    """The merger lies inside the encoder."""
    return locate_vision_modules(model, nested_projector=("merger",))


@hookimpl
def vkd_model_presets() -> Mapping[str, Mapping[str, Any]]:
    """The published Qwen2-VL sizes; what is not named here is the config class's default."""
    vision = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14}
    common = {"model_type": "qwen2_vl", "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    small = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "vocab_size": 151936}
    large = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
    small |= {"num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True}
    large |= {"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False}
    return {
        "Qwen/Qwen2-VL-2B-Instruct": {**common, **small, "vision_config": {**vision, "hidden_size": 1536}},
        "Qwen/Qwen2-VL-7B-Instruct": {**common, **large, "vision_config": {**vision, "hidden_size": 3584}},
    }


@hookimpl
def vkd_tiny_model(
    model_type: str, texts: Sequence[str], image_size: int, seed: int
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """About a million parameters: three vision blocks of 96 channels, three language layers of 128."""
    import torch
    from transformers import Qwen2TokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    from vkd_framework.tiny import byte_level_bpe

    with byte_level_bpe(texts) as folder:
        tokenizer = Qwen2TokenizerFast.from_pretrained(
            folder, additional_special_tokens=[TURN, TURN_END, VISION_START, VISION_END, IMAGE, VIDEO]
        )
    token = tokenizer.convert_tokens_to_ids
    patch, merge = 8, 2
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 8) * 8, "hidden_size": 128, "intermediate_size": 256,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "bos_token_id": token(END), "eos_token_id": token(TURN_END), "pad_token_id": token(END),
            "tie_word_embeddings": True, "initializer_range": 0.05,
            "rope_theta": 10_000.0, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        },
        vision_config={
            "depth": 3, "embed_dim": 96, "num_heads": 4, "mlp_ratio": 3, "hidden_size": 128,
            "patch_size": patch, "spatial_merge_size": merge, "temporal_patch_size": 2, "initializer_range": 0.05,
        },
        image_token_id=token(IMAGE), video_token_id=token(VIDEO),
        vision_start_token_id=token(VISION_START), vision_end_token_id=token(VISION_END),
        tie_word_embeddings=True, initializer_range=0.05,  # from the usual 0.02 so small a model learns much slower
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = [token(TURN_END), token(END)]
    model.generation_config.pad_token_id = token(END)
    return model.eval(), _processor(tokenizer, patch, merge, image_size)


def _processor(tokenizer: Any, patch: int, merge: int, image_size: int) -> ProcessorMixin:
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    sizes = {"patch_size": patch, "merge_size": merge, "temporal_patch_size": 2}
    pixels = {"min_pixels": (patch * merge) ** 2, "max_pixels": image_size**2}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes, **pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**sizes, **pixels),
        chat_template=CHAT_TEMPLATE,
    )
