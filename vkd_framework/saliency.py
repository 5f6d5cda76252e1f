"""The saliency mask: which of the trained weights may move for forgetting.

Sources: the ratio of squared gradients is MMUnlearner's selection (Huo et al., arXiv 2502.11051), top-k of the forget
gradient is SalUn's (Fan et al., arXiv 2310.12508). Differences from the public code: gradients are squared and summed
in float32 whatever the model's dtype; the retain term's floor is relative to its mean, so that it cannot vanish in low
precision; the cut is found by `kthvalue`, not by sorting; a mask takes one bit a weight.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from vkd_framework import ranks
from vkd_framework.batches import in_parts
from vkd_framework.checkpoint import atomic_path
from vkd_framework.errors import DataError, RecipeError
from vkd_framework.gradients import as_gradients_come
from vkd_framework.output import answer_losses
from vkd_framework.plugins import MLLM
from vkd_framework.progress import Progress, say
from vkd_framework.recipe import MaskConfig
from vkd_framework.types import PARTS, ImageQuestionPair

Mask = dict[str, Tensor]
"""Parameter name -> bool tensor of the parameter's shape, True where a weight may move."""

PART = 2
"""Pairs that go through the model at once, where visual modules alone of a large model are scored."""

LARGE = 2**25
"""Weights of a model that memory is saved for; a smaller one would only be slower."""

FLOOR = 1e-3
"""What is added to a retain score before dividing by it, as a share of the mean retain score."""


def accumulate(
    mllm: MLLM,
    pairs: Sequence[ImageQuestionPair],
    parameters: Mapping[str, nn.Parameter],
    *,
    squared: bool,
    batch_size: int,
    what: str,
) -> dict[str, Tensor]:
    """Mean over batches of the (squared) gradient of the answers' cross-entropy, in float32.

    Gradients are computed for `parameters` only, all others must be frozen. A parameter that gets no gradient counts
    as 0: it does not influence any answer.
    """
    total = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    add_up(mllm, pairs, parameters, total, squared=squared, batch_size=batch_size, what=what)
    return total


def add_up(
    mllm: MLLM,
    pairs: Sequence[ImageQuestionPair],
    parameters: Mapping[str, nn.Parameter],
    total: Mapping[str, Tensor],
    *,
    squared: bool,
    batch_size: int,
    what: str,
) -> set[str]:
    """Add what `accumulate` describes to `total`, where it has a parameter; returns whom a gradient reached at all.

    Each gradient is added as soon as it is there, and forgotten: there is never more than one. But where visual modules
    of a large model alone are scored, all gradients of a batch take less memory than what a forward pass keeps: then a
    batch goes through the model `PART` pairs at a time, and its gradients are added up in float32 before they count.
    """
    chunks = in_parts(pairs, batch_size)
    small = mllm.count(PARTS) < LARGE or parameters.keys() & set(mllm.parts["language_model"])
    size = batch_size if small else PART
    reached: set[str] = set()
    summed: dict[str, Tensor] = {}
    if not ranks.is_main():  # what is in it already counts once
        for one in total.values():
            one.zero_()

    def count_in(name: str, gradient: Tensor) -> None:
        if name not in reached and bool(gradient.any()):
            reached.add(name)
        if name in total and squared:
            g = gradient.float()
            total[name].addcmul_(g, g, value=1 / len(chunks))
        elif name in total:
            total[name].add_(gradient, alpha=1 / len(chunks))

    def take(name: str, gradient: Tensor) -> None:
        if name in summed:
            summed[name].add_(gradient)
        elif size < batch_size:
            summed[name] = gradient.float()
        else:
            count_in(name, gradient)

    with torch.enable_grad(), as_gradients_come(parameters, take):
        for chunk in Progress(ranks.part(chunks), what):
            for part in in_parts(chunk, size):
                loss = answer_losses(mllm, part).sum() / len(chunk)
                if loss.requires_grad:  # text alone meets nothing that is trained, where only visual modules are
                    torch.autograd.backward(loss, inputs=list(parameters.values()))
            while summed:
                count_in(*summed.popitem())
    ranks.add(total, total)
    return set().union(*ranks.gather(reached))


def build_mask(
    mllm: MLLM,
    config: MaskConfig,
    parameters: Mapping[str, nn.Parameter],
    forget: Sequence[ImageQuestionPair],
    retain: Sequence[ImageQuestionPair],
    *,
    seed: int,
    batch_size: int = 16,
    text: Sequence[ImageQuestionPair] = (),
) -> Mask:
    """Score every weight, cut, and check the mask. Raises RecipeError when it selects none or all.

    `text`: text-only pairs, as many of which count among the retain pairs with `preserve: retain_and_text`.
    A parameter that no gradient of the drawn forget pairs reaches may not move, and `density` is a share of the others.
    That holds for a random mask too, so that it lets as many weights move as another of the same density.
    """
    generator = torch.Generator().manual_seed(seed)
    forget, retain = (draw(pairs, config.pairs, generator) for pairs in (forget, retain))
    if config.preserve == "retain_and_text":
        retain = [*retain, *draw(text, config.pairs, generator)]
    drawn = (forget, retain)
    if config.kind == "ratio" and config.threshold is not None:
        mask, reached = _by_threshold(mllm, drawn, parameters, config.granularity, config.threshold, batch_size)
    else:
        mask, reached = _by_density(mllm, drawn, parameters, config, generator, batch_size)
    if silent := [name for name in parameters if name not in reached]:
        more = f" and {len(silent) - 1} more" if len(silent) > 1 else ""
        say(f"mask: no gradient reaches {silent[0]}{more}: no drawn pair depends on them, they may not move")
    kept, size = count(mask), sum(m.numel() for m in mask.values())
    if kept in (0, size):
        raise RecipeError(
            f"mask: selects {'none' if kept == 0 else 'all'} of the {size:,} trained weights; "
            "change mask.density or mask.threshold, or set mask.kind=none"
        )
    return {
        name: mask[name] if name in mask else torch.zeros_like(p, dtype=torch.bool) for name, p in parameters.items()
    }


def _by_threshold(
    mllm: MLLM,
    drawn: tuple[Sequence[ImageQuestionPair], Sequence[ImageQuestionPair]],
    parameters: Mapping[str, nn.Parameter],
    granularity: str,
    threshold: float,
    batch_size: int,
) -> tuple[Mask, set[str]]:
    """Forget saliency / (retain saliency + floor) >= threshold, and whom a forget gradient reaches.

    Both sides are multiplied out, forget - threshold * retain >= threshold * floor, so that one number a weight does.
    """
    forget, retain = drawn
    total = accumulate(mllm, retain, parameters, squared=True, batch_size=batch_size, what="saliency of the retain set")
    least = threshold * _floor(total)
    for one in total.values():
        one.mul_(-threshold)
    what = "saliency of the forget set"
    reached = add_up(mllm, forget, parameters, total, squared=True, batch_size=batch_size, what=what)
    return {name: _by_unit(one, granularity) >= least for name, one in total.items() if name in reached}, reached


def _by_density(
    mllm: MLLM,
    drawn: tuple[Sequence[ImageQuestionPair], Sequence[ImageQuestionPair]],
    parameters: Mapping[str, nn.Parameter],
    config: MaskConfig,
    generator: torch.Generator,
    batch_size: int,
) -> tuple[Mask, set[str]]:
    """The share of highest scores among the weights that a forget gradient reaches, and whom it reaches."""
    forget, retain = drawn
    scored = parameters if config.kind != "random" else {}
    of_forget = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in scored.items()}
    squared, what = config.kind == "ratio", "saliency of the forget set"
    reached = add_up(mllm, forget, parameters, of_forget, squared=squared, batch_size=batch_size, what=what)
    if config.kind == "random":
        scores = _random_scores(parameters, config.granularity, generator)
    elif config.kind == "ratio":
        what = "saliency of the retain set"
        of_retain = accumulate(mllm, retain, parameters, squared=True, batch_size=batch_size, what=what)
        scores = ratio_scores(of_forget, of_retain, config.granularity)
    else:
        # a mean: rows of all lengths, and single weights, are cut at one level
        scores = {name: _by_unit(g.abs(), config.granularity, torch.mean) for name, g in of_forget.items()}
    heard = {name: score for name, score in scores.items() if name in reached}
    return (cut(heard, density=config.density) if heard else {}), reached


def ratio_scores(forget: Mapping[str, Tensor], retain: Mapping[str, Tensor], granularity: str) -> dict[str, Tensor]:
    """Score = forget saliency / (retain saliency + floor), per weight or per unit (row of a weight matrix)."""
    floor = _floor(retain)
    return {
        name: _by_unit(f, granularity) / (_by_unit(retain[name], granularity) + floor) for name, f in forget.items()
    }


def _floor(retain: Mapping[str, Tensor]) -> float:
    mean = sum(float(r.sum()) for r in retain.values()) / sum(r.numel() for r in retain.values())
    return max(FLOOR * mean, torch.finfo(torch.float32).tiny)


def cut(scores: Mapping[str, Tensor], *, density: float | None = None, threshold: float | None = None) -> Mask:
    """True where the score reaches the threshold, or where it is among the `density` share of highest scores."""
    if threshold is None:
        assert density is not None
        every = torch.cat([score.flatten() for score in scores.values()])
        kept = min(max(round(density * every.numel()), 1), every.numel())
        threshold = float(every.kthvalue(every.numel() - kept + 1).values)
    return {name: score >= threshold for name, score in scores.items()}


def count(mask: Mask) -> int:
    """How many weights may move."""
    return sum(int(m.sum()) for m in mask.values())


def mask_gradients(parameters: Mapping[str, nn.Parameter], mask: Mask) -> None:
    """Zero the gradients of the weights that may not move."""
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            parameter.grad.masked_fill_(~mask[name], 0)


def restore_masked(parameters: Mapping[str, nn.Parameter], mask: Mask, start: Mapping[str, Tensor]) -> None:
    """Put the masked-out weights back to `start`: momentum and weight decay move them although their gradient is 0."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.where(mask[name], parameter, start[name]))


def save_mask(path: Path, mask: Mask, metadata: Mapping[str, str]) -> None:
    """Write one bit a weight, with names, shapes and the given metadata, atomically."""
    from safetensors.numpy import save_file

    packed = {name: numpy.packbits(m.cpu().numpy().ravel()) for name, m in mask.items()}
    shapes = {name: list(m.shape) for name, m in mask.items()}
    with atomic_path(path) as temporary:
        save_file(packed, temporary, metadata={**metadata, "shapes": json.dumps(shapes)})


def load_mask(path: Path, expected: Mapping[str, nn.Parameter]) -> Mask:
    """Read a mask and check that it is one for `expected`. Raises DataError when names or shapes differ."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        shapes = json.loads(file.metadata()["shapes"])
        names = set(file.keys())
        if names != set(expected) or any(shapes[n] != list(p.shape) for n, p in expected.items()):
            raise DataError(
                f"{path}: made for other parameters than the {len(expected)} trained here; delete it and run again"
            )
        packed = {name: file.get_tensor(name) for name in expected}
    return {
        name: torch.from_numpy(numpy.unpackbits(packed[name], count=p.numel()).astype(bool)).view(p.shape).to(p.device)
        for name, p in expected.items()
    }


def _random_scores(
    parameters: Mapping[str, nn.Parameter], granularity: str, generator: torch.Generator
) -> dict[str, Tensor]:
    scores = {}
    for name, parameter in parameters.items():
        drawn = parameter.shape if granularity == "weight" else parameter.shape[:1]
        scores[name] = _spread(torch.rand(drawn, generator=generator).to(parameter.device), parameter.shape)
    return scores


def _by_unit(score: Tensor, granularity: str, combine: Callable[..., Tensor] = torch.sum) -> Tensor:
    """Per weight as it is; per neuron, each row's scores combined, spread over the row again."""
    if granularity == "weight" or score.dim() < 2:
        return score
    return _spread(combine(score.flatten(1), dim=1), score.shape)


def _spread(per_unit: Tensor, shape: torch.Size) -> Tensor:
    return per_unit.view(-1, *[1] * (len(shape) - 1)).expand(shape) if per_unit.dim() < len(shape) else per_unit


def draw(pairs: Sequence[ImageQuestionPair], size: int, generator: torch.Generator) -> list[ImageQuestionPair]:
    """At most `size` of `pairs`, in a random order."""
    order: Iterable[int] = torch.randperm(len(pairs), generator=generator)[:size].tolist()
    return [pairs[i] for i in order]
