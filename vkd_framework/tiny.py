"""Help for adapters that build a tiny real model: a tokenizer learnt from the cast's own text, sizes that learn fast.

About a million parameters: an encoder of three blocks with 96 channels, a language model of three with 128.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

VOCABULARY = 4096
"""Most tokens learnt. A cast's text has a few hundred words; each becomes one token long before this is reached."""

WIDTH, VISION_WIDTH, BLOCKS, HEADS = 128, 96, 3, 4
PATCH = 8
"""Pixels along the side of a patch."""

INITIALIZER_RANGE = 0.05
"""From the usual 0.02 so small a model learns much slower: 39 % against 96 % of the unseen photos in 400 steps."""


@contextmanager
def byte_level_bpe(texts: Sequence[str]) -> Iterator[Path]:
    """A folder with the `vocab.json` and `merges.txt` of a byte-level BPE learnt from `texts`.

    Any text can be encoded with it; words that occur in `texts` are single tokens. The folder is removed afterwards.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(list(dict.fromkeys(texts)), trainer)
    with tempfile.TemporaryDirectory(prefix="vkd-tokenizer-") as name:
        folder = Path(name)
        learned = json.loads(learner.to_str())["model"]
        (folder / "vocab.json").write_text(json.dumps(learned["vocab"], ensure_ascii=False), encoding="utf-8")
        merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in learned["merges"]]
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
        yield folder


def tokenizer(
    texts: Sequence[str],
    special: Sequence[str],
    *,
    end: str,
    begin: str | None = None,
    named: Mapping[str, str] | None = None,
    kind: str | None = None,
) -> PreTrainedTokenizerFast:
    """A fast tokenizer that knows `texts` and the `special` tokens, and ends and pads with `end`.

    With `begin` it puts that token in front of every text, as Llama's does. `named`: attribute -> token, for processors
    that ask their tokenizer for `image_token` and the like. `kind`: a tokenizer class of transformers that reads
    `vocab.json` and `merges.txt`, for processors that take no other.
    """
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    common = {
        "eos_token": end,
        "pad_token": end,
        "additional_special_tokens": list(special),
        "model_input_names": ["input_ids", "attention_mask"],
    }
    with byte_level_bpe(texts) as folder:
        if kind:
            return getattr(transformers, kind).from_pretrained(folder, **common)
        backend = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([end, *([begin] if begin else []), *special])
    if begin:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, backend.token_to_id(begin))]
        )
        common["bos_token"] = begin
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=dict(named or {}), **common
    )


def processor(
    model_type: str,
    tokenizer: Any,
    image: Mapping[str, Any],
    options: Mapping[str, Any],
    adapter_file: str,
    *,
    video: Mapping[str, Any] | None = None,
    image_class: str | None = None,
) -> ProcessorMixin:
    """The processor of `model_type`, with image and video processors of the classes that transformers pairs it with.

    The chat template is the `.jinja` file beside `adapter_file`. `image`, `video`: their settings (`video` defaults to
    `image`); `options`: those of the processor itself. `image_class`: where transformers pairs none with the type.
    """
    import transformers
    from transformers.models.auto import image_processing_auto, video_processing_auto
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    if image_class is None:
        image_class = _class_name(image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES[model_type])
        if image_class in getattr(image_processing_auto, "FORCE_FAST_IMAGE_PROCESSOR", ()):  # transformers 4 only
            image_class += "Fast"
    parts = {"image_processor": getattr(transformers, image_class)(**image)}
    if names := video_processing_auto.VIDEO_PROCESSOR_MAPPING_NAMES.get(model_type):
        parts["video_processor"] = getattr(transformers, _class_name(names))(**(image if video is None else video))
    template = Path(adapter_file).with_suffix(".jinja").read_text(encoding="utf-8")
    kind = getattr(transformers, PROCESSOR_MAPPING_NAMES[model_type])
    return kind(tokenizer=tokenizer, chat_template=template, **parts, **options)


def _class_name(entry: Any) -> str:
    """transformers 5 lists names by what they compute with; 4 lists a name, or a slow and a less tried fast one."""
    if isinstance(entry, Mapping):
        entry = entry.get("torchvision") or next(iter(entry.values()))
    return entry if isinstance(entry, str) else next(name for name in entry if name)


def language_sizes(tokenizer: Any, stop: str | None = None) -> dict[str, Any]:
    """What a tiny language model's config needs; `stop` is the token that ends an answer (default: the end token)."""
    return {
        "vocab_size": -(-len(tokenizer) // 8) * 8,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids(stop) if stop else tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
        "initializer_range": INITIALIZER_RANGE,
    }


def vision_sizes(image_size: int) -> dict[str, Any]:
    """What the config of a tiny ViT needs, for pictures of `image_size` pixels squared."""
    return {
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 3 * VISION_WIDTH,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "image_size": image_size,
        "patch_size": PATCH,
        "initializer_range": INITIALIZER_RANGE,
    }


def build(
    model_type: str,
    tokenizer: Any,
    settings: Mapping[str, Any],
    processor: ProcessorMixin,
    *,
    seed: int,
    stop: str | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model of `model_type` with random weights from `seed` and its processor: what `vkd_tiny_model` returns.

    `settings`: the config's. The model stops at the `stop` token and at the tokenizer's end token.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    shared = {"tie_word_embeddings": True, "initializer_range": INITIALIZER_RANGE}
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[model_type](**shared | dict(settings)))
    ends = [tokenizer.convert_tokens_to_ids(stop)] if stop else []
    model.generation_config.eos_token_id = list(dict.fromkeys([*ends, tokenizer.eos_token_id]))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), processor
