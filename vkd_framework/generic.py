"""The default plugin: the answers that hold for every transformers model of the image-text-to-text kind.

Module names are looked up, newest layout first; nothing here knows a family. Adapters reuse the functions with an
argument changed, for example `locate_vision_modules(model, nested_projector=("merger",))`. torch is imported inside
functions, so that listing adapters and presets does not wait for it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkd_framework.errors import AdapterError, ModelError, first_line
from vkd_framework.hookspecs import hookimpl
from vkd_framework.types import (
    IGNORED,
    DistillationLayer,
    EncodedBatch,
    FeatureGrid,
    FeatureRows,
    ImageQuestionPair,
    VisionModules,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel, ProcessorMixin

ENCODER_NAMES = ("vision_tower", "visual", "vision_model")
LANGUAGE_MODEL_NAMES = ("language_model", "text_model")
DEPTH_NAMES = ("num_hidden_layers", "depth")
WIDTH_NAMES = ("embed_dim", "hidden_size", "width")  # Qwen2-VL's vision hidden_size is the language model's width
IMAGE_TOKEN_NAMES = ("image_token_id", "image_token_index")


def load_model(source: str, dtype: torch.dtype, device: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load through the Auto classes; a key that does not match raises ModelError instead of leaving weights random."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(source)
        model, info = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, KeyError) as error:
        hint = "check the folder" if os.path.isdir(source) else "check the id and the network, or give a local folder"
        raise ModelError(f"{source}: cannot be loaded ({first_line(error).rstrip('.')}); {hint}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in info.get(problem) or ())
        if keys:
            import transformers

            raise ModelError(
                f"{source}: {len(keys)} {problem.replace('_', ' ')} while loading into {type(model).__name__} "
                f"(such as {keys[0]}); those weights would be random. The checkpoint was probably saved by another "
                f"transformers version than the {transformers.__version__} installed here"
            )
    model.eval()
    return model.to(device), processor


def locate_vision_modules(model: PreTrainedModel, nested_projector: Sequence[str] = ()) -> VisionModules:
    """Look the encoder and the language model up by name, on the model or one level below it.

    `nested_projector`: names of modules inside the encoder that map into the language model's space.
    """
    for prefix in ("model.", ""):
        encoder = _first_present(model, (prefix + name for name in ENCODER_NAMES))
        decoder = _first_present(model, (prefix + name for name in LANGUAGE_MODEL_NAMES))
        if encoder and decoder:
            break
    else:
        tops = [f"{name}.{child}" for name, module in model.named_children() for child, _ in module.named_children()]
        raise AdapterError(
            f"no vision encoder and language model found in {type(model).__name__}; it has: {', '.join(tops)}. "
            "The adapter has to say where they are (vkd_locate_vision_modules)"
        )
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    return VisionModules(
        encoder=encoder,
        language_model=(decoder, head) if head else (decoder,),
        projector=tuple(f"{encoder}.{name}" for name in nested_projector if _has(model, f"{encoder}.{name}")),
    )


def list_distillation_layers(model: PreTrainedModel, modules: VisionModules) -> list[DistillationLayer]:
    """The encoder's blocks, found as its largest uniform ModuleList of the configured depth, then the projector.

    Where the config has a `vision_feature_layer`, blocks after the last one it names do not reach the language model.
    """
    encoder = model.get_submodule(modules.encoder)
    config = getattr(encoder, "config", None)
    depth = _first_attribute(config, DEPTH_NAMES)
    path, blocks = _block_list(model, modules, depth)
    width = _first_attribute(config, WIDTH_NAMES)
    reaching = _blocks_that_reach(model, len(blocks))
    layers = [
        DistillationLayer(f"vision.{i}", f"{modules.encoder}.{path}.{i}", width, _count(block), i < reaching)
        for i, block in enumerate(blocks)
    ]
    projector = modules.projector or _between(model, modules)
    if projector:
        top = model.get_submodule(projector[0])
        layers.append(DistillationLayer("projector", projector[0], _language_width(model), _count(top)))
    return layers


def tokenize_pairs(
    processor: ProcessorMixin,
    pairs: Sequence[ImageQuestionPair],
    stop_ids: Sequence[int],
    with_answer: bool,
    padding_side: str,
) -> EncodedBatch:
    """Render the chat template to text, call the processor once, find the answer by character offsets.

    The answer is whatever the full text has behind the prompt; its tokens are those that end after the prompt's last
    character, counted from the end so that the processor may expand image tokens in front of it. Labels stop at the
    first stop token; where a template writes none after an answer, it is added, or the model would never learn to stop.
    """
    import torch

    stop = processor.tokenizer.convert_ids_to_tokens(stop_ids[0])
    texts, tails = [], []
    for pair in pairs:
        prompt = render(processor, pair.question, len(pair.photos))
        text = render(processor, pair.question, len(pair.photos), pair.answer) if with_answer else prompt
        begin = _common_prefix(prompt, text)
        if with_answer and stop not in text[begin:]:
            text = text[:begin] + _up_to_its_end(text[begin:], pair.answer) + stop
        texts.append(text)
        tails.append(len(text) - begin)
    photos = [[photo.open() for photo in pair.photos] for pair in pairs]
    bos = getattr(processor.tokenizer, "bos_token", None)
    encoded = processor(
        text=texts,
        images=photos if any(photos) else None,
        padding=True,
        padding_side=padding_side,
        return_tensors="pt",
        return_offsets_mapping=True,
        add_special_tokens=not (bos and texts[0].startswith(bos)),
    )
    inputs = dict(encoded)
    inputs.pop("labels", None)  # what some processors take for labels is not the answer alone
    ends = inputs.pop("offset_mapping")[..., 1] * inputs["attention_mask"]
    starts_of_answer = ends.amax(dim=1) - torch.tensor(tails)
    answer = (ends > starts_of_answer[:, None]) & inputs["attention_mask"].bool()
    stops = answer & torch.isin(inputs["input_ids"], torch.tensor(list(stop_ids)))
    answer &= stops.cumsum(dim=1) - stops.long() == 0
    return EncodedBatch(inputs, inputs["input_ids"].masked_fill(~answer, IGNORED), answer & ~stops)


def feature_rows(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], layer: DistillationLayer, rows: int
) -> FeatureRows:
    """Rows come sample after sample, and each sample has as many as its share of the batch's image tokens.

    Holds wherever a layer's rows are proportional to the image tokens; a class token per picture keeps that true but
    has to be marked as not real by the adapter.
    """
    import torch

    tokens = (inputs["input_ids"] == image_token_id(model)).sum(dim=1)
    total = int(tokens.sum())
    if total == 0 or rows * int(tokens.max()) % total:
        raise AdapterError(
            f"{rows} feature rows of {layer.name} cannot be shared out over {total} image tokens; "
            "the adapter has to assign them (vkd_feature_rows)"
        )
    sample = torch.repeat_interleave(torch.arange(len(tokens), device=tokens.device), tokens * rows // total)
    return FeatureRows(sample=sample, real=torch.ones_like(sample, dtype=torch.bool))


def feature_grid(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layer: DistillationLayer,
    assigned: FeatureRows,
    photos: Sequence[Sequence[tuple[int, int]]],
    tile: int | None = None,
) -> FeatureGrid:
    """The real rows of a photo are a square grid, line by line; a sample's photos have equally many.

    `tile`: the rows of one tile, in families that squeeze a photo into tiles of one size: they come line by line, and
    after them the whole photo as one more tile. Raises AdapterError where that cannot be.
    """
    import torch

    photo, box = torch.zeros_like(assigned.sample), torch.zeros(len(assigned.sample), 4, device=assigned.sample.device)
    first = 0
    for b, sizes in enumerate(photos):
        own = ((assigned.sample == b) & assigned.real).nonzero().squeeze(1)
        each = len(own) // max(len(sizes), 1)
        side = math.isqrt(each if tile is None else tile)
        if sizes and each == side**2 and each * len(sizes) == len(own):
            boxes = grid_boxes(side, side).repeat(len(sizes), 1)
        elif tile is not None and len(sizes) == 1 and each % tile == 0:
            boxes = _tiled_boxes(each // tile - 1, side, sizes[0][0] / sizes[0][1])
        elif sizes:
            raise AdapterError(
                f"where the {len(own)} feature rows of {layer.name} lie on {len(sizes)} photos is not known, so an "
                "external teacher's features cannot be laid over them (vkd_feature_grid)"
            )
        else:
            continue
        photo[own] = first + torch.arange(len(sizes), device=own.device).repeat_interleave(each)
        box[own] = boxes.to(box)
        first += len(sizes)
    return FeatureGrid(photo, box)


def grid_boxes(high: int, wide: int) -> Tensor:
    """`[high * wide, 4]`: the boxes of `FeatureGrid` for patches that lie line by line over the whole photo."""
    import torch

    y, x = torch.meshgrid(torch.arange(high) / high, torch.arange(wide) / wide, indexing="ij")
    return torch.stack([x, y, x + 1 / wide, y + 1 / high], dim=-1).flatten(0, 1)


def _tiled_boxes(tiles: int, side: int, aspect: float) -> Tensor:
    """`[(tiles + 1) * side ** 2, 4]`: tiles arranged as the photo's width over height suggests, then the whole."""
    import torch

    wide = min((n for n in range(1, tiles + 1) if tiles % n == 0), key=lambda n: abs(math.log(n * n / tiles / aspect)))
    whole = grid_boxes(side, side)
    scale = torch.tensor([wide, tiles // wide] * 2)
    corners = [torch.tensor([x, y] * 2) for y in range(tiles // wide) for x in range(wide)]
    return torch.cat([*((whole + corner) / scale for corner in corners), whole])


def stop_token_ids(model: PreTrainedModel, processor: ProcessorMixin) -> list[int]:
    """What the chat template writes after an answer, then the ids of the generation config and the end token."""
    prompt, answer = render(processor, "?", 0), "."
    tail = render(processor, "?", 0, answer)[len(prompt) :].partition(answer)[2].strip()
    tokenizer = processor.tokenizer
    special = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    written = [special[token] for token in sorted(special, key=len, reverse=True) if tail.startswith(token)][:1]
    ids = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = [ids] if isinstance(ids, int) else list(ids or ())
    end = tokenizer.eos_token_id
    return list(dict.fromkeys([*written, *listed, *([end] if end is not None else [])]))


def render(processor: ProcessorMixin, question: str, photos: int, answer: str | None = None) -> str:
    """The chat template's text: up to where the answer begins, or with the answer and whatever ends the turn."""
    if getattr(processor, "chat_template", None) is None:
        raise AdapterError(
            f"{type(processor).__name__} has no chat template to encode questions with; "
            "the adapter has to do it (vkd_tokenize_pairs) and to say what ends an answer (vkd_stop_token_ids)"
        )
    content = [*({"type": "image"} for _ in range(photos)), {"type": "text", "text": question}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return str(processor.apply_chat_template(messages, add_generation_prompt=answer is None))


def image_token_id(model: PreTrainedModel) -> int:
    """The id of the token that stands for one visual token in `input_ids`."""
    found = _first_attribute(model.config, IMAGE_TOKEN_NAMES)
    if found is None:
        raise AdapterError(f"{type(model.config).__name__} names no image token (tried {', '.join(IMAGE_TOKEN_NAMES)})")
    return found


def read_presets(adapter_file: str) -> dict[str, dict[str, Any]]:
    """Hub id -> config, from the `.json` file beside an adapter's file: what `vkd_model_presets` returns."""
    presets: dict[str, dict[str, Any]] = json.loads(Path(adapter_file).with_suffix(".json").read_text(encoding="utf-8"))
    return presets


def _up_to_its_end(text: str, answer: str) -> str:
    """`text` without what a template writes after the answer in it, which it may have stripped or changed."""
    for written in (answer, answer.strip()):
        if (at := text.rfind(written)) >= 0:
            return text[: at + len(written)]
    return text.rstrip()


def _common_prefix(a: str, b: str) -> int:
    """How many characters two texts share at their beginnings."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _first_present(model: nn.Module, paths: Iterable[str]) -> str | None:
    return next((path for path in paths if _has(model, path)), None)


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _first_attribute(config: Any, names: Sequence[str]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)


def _block_list(model: PreTrainedModel, modules: VisionModules, depth: int | None) -> tuple[str, nn.ModuleList]:
    from torch import nn

    encoder = model.get_submodule(modules.encoder)
    projector = tuple(f"{path}." for path in modules.projector)
    lists = [
        (name, module)
        for name, module in encoder.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 1
        and len({type(block) for block in module}) == 1
        and not f"{modules.encoder}.{name}.".startswith(projector)
    ]
    candidates = [item for item in lists if len(item[1]) == depth] or lists
    if not candidates:
        raise AdapterError(
            f"no list of blocks found in {type(encoder).__name__}; the adapter has to name the layers "
            "(vkd_list_distillation_layers)"
        )
    return max(candidates, key=lambda item: _count(item[1]))


def _blocks_that_reach(model: PreTrainedModel, depth: int) -> int:
    """How many blocks the language model sees the work of; `vision_feature_layer` counts the embeddings as 0."""
    chosen = getattr(model.config, "vision_feature_layer", None)
    if chosen is None:
        return depth
    return max(index % (depth + 1) for index in ([chosen] if isinstance(chosen, int) else chosen))


def _between(model: PreTrainedModel, modules: VisionModules) -> tuple[str, ...]:
    """Modules with parameters beside the encoder and the language model."""
    parent = modules.encoder.rpartition(".")[0]
    taken = {modules.encoder, *modules.language_model}
    names = [f"{parent}.{name}".lstrip(".") for name, _ in model.get_submodule(parent).named_children()]
    return tuple(name for name in names if name not in taken and _count(model.get_submodule(name)))


def _language_width(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().weight.shape[1])


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class GenericPlugin:
    """The functions above under their hook names, registered before the adapter so that the adapter's answer wins."""

    vkd_load_model = staticmethod(hookimpl(specname="vkd_load_model")(load_model))
    vkd_list_distillation_layers = staticmethod(
        hookimpl(specname="vkd_list_distillation_layers")(list_distillation_layers)
    )
    vkd_tokenize_pairs = staticmethod(hookimpl(specname="vkd_tokenize_pairs")(tokenize_pairs))
    vkd_feature_rows = staticmethod(hookimpl(specname="vkd_feature_rows")(feature_rows))

    @hookimpl
    def vkd_feature_grid(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Tensor],
        layer: DistillationLayer,
        assigned: FeatureRows,
        photos: Sequence[Sequence[tuple[int, int]]],
    ) -> FeatureGrid:
        """Whole photos in square grids; adapters of families with tiles pass the size of one."""
        return feature_grid(model, inputs, layer, assigned, photos)

    vkd_stop_token_ids = staticmethod(hookimpl(specname="vkd_stop_token_ids")(stop_token_ids))

    @hookimpl
    def vkd_locate_vision_modules(self, model: PreTrainedModel) -> VisionModules:
        """Without modules nested in the encoder; adapters of families that have some pass their names."""
        return locate_vision_modules(model)

    @hookimpl
    def vkd_refused_model_types(self) -> Mapping[str, str]:
        """None known."""
        return {}

    @hookimpl
    def vkd_model_presets(self) -> Mapping[str, Mapping[str, Any]]:
        """None known."""
        return {}
