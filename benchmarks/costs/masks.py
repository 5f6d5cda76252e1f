"""The saliency mask: ours, and MMUnlearner's procedure written anew, on the same pairs in the same batches.

The reference follows the published procedure (Huo et al., arXiv 2502.11051, the mask class of their code) step by step:
every weight of the model gets a gradient, whichever modules are to be masked; the loss is the model's own, over every
token that is not padding, with logits at every place; the squares of the chosen modules' gradients are added up for
the forget set, then for the preserved set; the ratio of the two is compared with the threshold; and the file holds the
mask, a byte a weight, with both sums.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from costs.models import Size, recipe_of
from vkd_framework.plugins import MLLM, trainable
from vkd_framework.saliency import build_mask, save_mask
from vkd_framework.types import ImageQuestionPair, Splits

BATCH = 16
EPSILON = 1e-15


def ours(mllm: MLLM, family: str, size: Size, splits: Splits, folder: Path) -> Path:
    """The mask of `method: vkd_paper`, in its file."""
    recipe = recipe_of(family, size, "vkd_paper", f"mask.pairs={size.pairs}")
    parameters = trainable(mllm, recipe.train)
    mask = build_mask(mllm, recipe.mask, parameters, splits.forget, splits.retain, seed=0, batch_size=_batch(size))
    save_mask(folder / "mask.safetensors", mask, {})
    return folder / "mask.safetensors"


def reference(mllm: MLLM, family: str, size: Size, splits: Splits, folder: Path) -> Path:
    """MMUnlearner's, of the visual modules too, in its file."""
    mllm.model.requires_grad_(True)
    masked = list(mllm.parameters(("encoder", "projector")))
    of_forget = _squares(mllm, splits.forget[: size.pairs], masked, _batch(size))
    of_preserved = _squares(mllm, splits.retain[: size.pairs], masked, _batch(size))
    mask = {name: (of_forget[name] + EPSILON) / (of_preserved[name] + EPSILON) >= 1 for name in of_forget}
    torch.save({"weight": mask, "forget": of_forget, "preserve": of_preserved}, folder / "mask.pt")
    mllm.model.zero_grad()
    return folder / "mask.pt"


PROCEDURES: dict[str, Callable[[MLLM, str, Size, Splits, Path], Path]] = {"ours": ours, "reference": reference}


def file_bytes(name: str, mllm: MLLM, family: str, size: Size, splits: Splits) -> int:
    """Make a mask by the named procedure; returns the length of the file it leaves."""
    with tempfile.TemporaryDirectory() as folder:
        return PROCEDURES[name](mllm, family, size, splits, Path(folder)).stat().st_size


def _batch(size: Size) -> int:
    return min(BATCH, size.pairs)


def _squares(mllm: MLLM, pairs: Sequence[ImageQuestionPair], masked: Sequence[str], batch_size: int) -> dict[str, Any]:
    found: dict[str, Tensor] = {}
    chunks = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    for chunk in chunks:
        inputs = dict(mllm.tokenize(chunk).inputs)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        loss = -mllm.model(**inputs, labels=labels).loss
        mllm.model.zero_grad()
        torch.autograd.backward(loss)
        with torch.no_grad():
            for name, parameter in mllm.model.named_parameters():
                if name in masked and parameter.grad is not None:
                    square = parameter.grad.cpu() ** 2 / len(chunks)
                    found[name] = found[name].add_(square) if name in found else square
    return found
