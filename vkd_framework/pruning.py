"""Neurons that answer to the forgotten people more than to the others, switched off: no training, no gradient.

Source: MANU, Liu et al., arXiv 2502.15910: four importance functions of a neuron's activations, each as forget over
retain, summed; the top share is set to zero. A neuron here is a hidden unit of an MLP block, and its activation is what
enters the block's last layer. Differences from the public code: see the method's entry in `methods`.

Shapes: `R` activations of a unit (one for each real token of the set), `H` hidden units of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vkd_framework.batches import in_parts
from vkd_framework.errors import RecipeError
from vkd_framework.output import answer_logits
from vkd_framework.plugins import MLLM
from vkd_framework.progress import Progress, say
from vkd_framework.recipe import PruneConfig
from vkd_framework.saliency import FLOOR, Mask, cut, draw
from vkd_framework.types import ImageQuestionPair, Part


@dataclass(frozen=True, eq=False)
class Block:
    """An MLP block: linear layers that widen to `H` hidden units (one, or two where one gates the other), and one back.

    Names are paths of modules.
    """

    widen: tuple[str, ...]
    narrow: str
    units: int


class Moments:
    """Running sums over the activations of `H` units, in float64: enough for the four importance functions."""

    def __init__(self, units: int) -> None:
        self.count = 0
        self._sums = torch.zeros(4, units, dtype=torch.float64)

    def add(self, activations: Tensor) -> None:
        """`[R, H]`."""
        z = activations.detach().double()
        self.count += len(z)
        self._sums += torch.stack([z.abs().sum(0), (z > 0).sum(0).double(), z.sum(0), z.square().sum(0)]).cpu()

    def importance(self) -> Tensor:
        """`[4, H]`: mean of |z|, share of z > 0, standard deviation, root of the mean square."""
        magnitude, frequency, mean, square = self._sums / max(1, self.count)
        return torch.stack([magnitude, frequency, (square - mean.square()).clamp(min=0).sqrt(), square.sqrt()])


def scores(forget: Tensor, retain: Tensor) -> Tensor:
    """`[H]`: the sum over the four importance functions of forget over retain. `forget`, `retain` `[4, H]`.

    What is added to the denominator is relative to the mean over the units, so that a unit that hardly ever answers to
    anything is not taken for one of the forgotten people's.
    """
    floor = FLOOR * retain.mean(dim=1, keepdim=True) + torch.finfo(retain.dtype).tiny
    return (forget / (retain + floor)).sum(dim=0)


def mlp_blocks(model: nn.Module) -> list[Block]:
    """Every MLP block, known by its shapes: one or two linear layers from `D` to a larger `H`, one from `H` to `D`."""
    found = []
    for path, module in model.named_modules():
        linear = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
        last = [name for name, child in linear.items() if child.in_features > child.out_features]
        if len(last) != 1 or len(linear) not in (2, 3):
            continue
        narrow = linear.pop(last[0])
        if all((c.in_features, c.out_features) == (narrow.out_features, narrow.in_features) for c in linear.values()):
            prefix = f"{path}." if path else ""
            widen = tuple(f"{prefix}{name}" for name in linear)
            found.append(Block(widen, f"{prefix}{last[0]}", narrow.in_features))
    return found


@torch.inference_mode()
def moments(
    mllm: MLLM, blocks: Sequence[Block], pairs: Sequence[ImageQuestionPair], *, what: str, batch_size: int = 16
) -> list[Moments]:
    """What each block's units do on the questions and answers of `pairs`. Padding is left out."""
    gathered = [Moments(block.units) for block in blocks]
    language = set(mllm.parts["language_model"])
    real: list[Tensor] = []
    with ExitStack() as hooks:
        for block, moment in zip(blocks, gathered, strict=True):
            reads_text = f"{block.narrow}.weight" in language

            def hook(
                _module: nn.Module, inputs: tuple[Any, ...], moment: Moments = moment, reads_text: bool = reads_text
            ) -> None:
                moment.add(inputs[0][real[0]] if reads_text else inputs[0].flatten(0, -2))

            handle = mllm.model.get_submodule(block.narrow).register_forward_pre_hook(hook)
            hooks.callback(handle.remove)
        for part in Progress(in_parts(pairs, batch_size), what):
            batch = mllm.tokenize(part)
            real[:] = [batch.inputs["attention_mask"].bool()]
            answer_logits(mllm.model, batch.inputs, batch.answer)  # at every place, logits would fill the memory
    return gathered


def build_prune_mask(
    mllm: MLLM,
    config: PruneConfig,
    parts: Sequence[Part],
    forget: Sequence[ImageQuestionPair],
    retain: Sequence[ImageQuestionPair],
    *,
    seed: int,
) -> Mask:
    """For every parameter of `parts`, True on the weights to be set to 0: those into and out of the chosen units.

    Raises RecipeError where the parts have no MLP block.
    """
    parameters = mllm.parameters(parts)
    blocks = [block for block in mlp_blocks(mllm.model) if f"{block.narrow}.weight" in parameters]
    if not blocks:
        raise RecipeError(f"train: {', '.join(parts)} has no MLP block to prune; add encoder or language_model")
    generator = torch.Generator().manual_seed(seed)
    drawn = [draw(pairs, config.pairs, generator) for pairs in (forget, retain)]
    of_forget, of_retain = (
        moments(mllm, blocks, pairs, what=f"activations on the {name} set")
        for name, pairs in zip(("forget", "retain"), drawn, strict=True)
    )
    found = {
        block.narrow: scores(one.importance(), other.importance())
        for block, one, other in zip(blocks, of_forget, of_retain, strict=True)
    }
    chosen = cut(found, density=config.share)
    say(f"prune: {sum(int(c.sum()) for c in chosen.values()):,} of {sum(map(len, found.values())):,} neurons")
    mask = {name: torch.zeros_like(parameter, dtype=torch.bool) for name, parameter in parameters.items()}
    for block in blocks:
        for name, weights in _weights_of(block, mask):
            units = chosen[block.narrow].to(weights.device)
            mask[name] |= units if name == f"{block.narrow}.weight" else units.view(-1, *[1] * (weights.dim() - 1))
    return mask


def prune(parameters: Mapping[str, nn.Parameter], mask: Mask) -> None:
    """Set the masked weights to 0; every other one stays bit for bit."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.masked_fill_(mask[name], 0)


def _weights_of(block: Block, named: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The parameters that hold a block's units: rows of the widening layers with their biases, columns of the last."""
    names = [f"{path}.{kind}" for path in block.widen for kind in ("weight", "bias")] + [f"{block.narrow}.weight"]
    return ((name, named[name]) for name in names if name in named)
