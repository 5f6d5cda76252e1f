"""A model as its adapter sees it: its parts, its distillation layers, and how it is asked."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vkd_framework.encodings import Encodings
from vkd_framework.errors import ModelError, RecipeError
from vkd_framework.recipe import nearest
from vkd_framework.types import DistillationLayer, EncodedBatch, ImageQuestionPair, Part, VisionModules

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel, ProcessorMixin

    from vkd_framework.plugins.adapter import Adapter


def partition(model: nn.Module, modules: VisionModules) -> dict[Part, tuple[str, ...]]:
    """Every parameter name in exactly one part: the longest matching path decides, the rest is projector."""
    owners: list[tuple[str, Part]] = [(modules.encoder, "encoder")]
    owners += [(path, "language_model") for path in modules.language_model]
    owners += [(path, "projector") for path in modules.projector]
    owners.sort(key=lambda owner: len(owner[0]), reverse=True)
    parts: dict[Part, list[str]] = {"encoder": [], "projector": [], "language_model": []}
    for name, _ in model.named_parameters():
        owner = [part for path, part in owners if name == path or name.startswith(f"{path}.")][:1]
        parts[owner[0] if owner else "projector"].append(name)
    return {part: tuple(names) for part, names in parts.items()}


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A model and its parts, as its adapter sees them. The model may be on the meta device, without weights."""

    adapter: Adapter
    model: PreTrainedModel
    modules: VisionModules
    layers: tuple[DistillationLayer, ...]

    @cached_property
    def parts(self) -> dict[Part, tuple[str, ...]]:
        """Part -> names of its parameters."""
        return partition(self.model, self.modules)

    def parameters(self, parts: Iterable[Part]) -> dict[str, nn.Parameter]:
        """Name -> parameter of the given parts, in the model's order."""
        wanted = {name for part in parts for name in self.parts[part]}
        return {name: parameter for name, parameter in self.model.named_parameters() if name in wanted}

    def count(self, parts: Iterable[Part]) -> int:
        """How many weights the given parts hold."""
        return sum(parameter.numel() for parameter in self.parameters(parts).values())

    def layer(self, name: str, where: str = "layers") -> DistillationLayer:
        """The distillation layer of that name. Raises RecipeError naming place and nearest when there is none."""
        by_name = {layer.name: layer for layer in self.layers}
        if name not in by_name:
            raise RecipeError(
                f"{where}: {name!r} is no layer of this model{nearest(name, by_name)}; "
                f"it has {', '.join(_ranges(by_name))} (see `vkd inspect-layers`)"
            )
        return by_name[name]

    def language_model_layers(self) -> dict[str, nn.Linear]:
        """Path -> linear layer of the language model, the output layer left out."""
        from torch import nn

        names, head = set(self.parts["language_model"]), self.model.get_output_embeddings()
        return {
            path: module
            for path, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and f"{path}.weight" in names and module is not head
        }


@dataclass(frozen=True, eq=False)
class MLLM(Anatomy):
    """A loaded multimodal language model, ready to be asked, bound to the adapter that knows its parts."""

    processor: ProcessorMixin

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return self.adapter.stop_token_ids(self.model, self.processor)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    def tokenize(
        self, pairs: Sequence[ImageQuestionPair], *, with_answer: bool = True, padding_side: str = "right"
    ) -> EncodedBatch:
        """Encode pairs and move them to the model's device, which is not waited for."""
        batch = self._encodings.batch(pairs, with_answer, padding_side)

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(self.device, non_blocking=True)

        inputs = {name: moved(value) for name, value in batch.inputs.items()}
        return EncodedBatch(inputs, moved(batch.labels), moved(batch.content))

    @cached_property
    def _encodings(self) -> Encodings:
        return self.adapter.encodings(self.processor, self.stop_ids)

    def check_prompt_is_prefix(self, pair: ImageQuestionPair) -> None:
        """Raise ModelError when a full text does not begin with its prompt's tokens."""
        prompt = self.tokenize([pair], with_answer=False).inputs["input_ids"][0].tolist()
        full = self.tokenize([pair]).inputs["input_ids"][0].tolist()
        if full[: len(prompt)] != prompt:
            raise ModelError(
                "the chat template's prompt is tokenized differently when an answer follows (often for a blank at its "
                "end); what is trained would not be what is generated. Mend the template or override vkd_tokenize_pairs"
            )

    def copy(self, share: Sequence[Part] = ()) -> MLLM:
        """An independent copy; parameters of the parts in `share` stay the same objects in both."""
        shared = {id(parameter): parameter for parameter in self.parameters(share).values()}
        memo: dict[int, Any] = dict(shared)
        return MLLM(self.adapter, copy.deepcopy(self.model, memo), self.modules, self.layers, self.processor)


def _ranges(names: Iterable[str]) -> list[str]:
    """`vision.0 to vision.31, projector` for a long list of layers."""
    listed = list(names)
    numbered = [name for name in listed if name.rpartition(".")[2].isdigit()]
    rest = [name for name in listed if name not in numbered]
    return [f"{numbered[0]} to {numbered[-1]}", *rest] if len(numbered) > 1 else listed


def trainable(mllm: MLLM, parts: Iterable[Part]) -> Mapping[str, nn.Parameter]:
    """Freeze everything but the given parts and return those parameters."""
    chosen = mllm.parameters(parts)
    mllm.model.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return chosen
