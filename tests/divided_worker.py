"""What processes that hold one language model between them find, for `test_ranks`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from conftest import CAST, make_recipe, texts_of

from vkd_framework import data, ranks
from vkd_framework.estimate import memory
from vkd_framework.estimate.tokens import Tokens
from vkd_framework.estimate.work import sizes
from vkd_framework.frozen import freeze_language_model
from vkd_framework.layers_table import describe
from vkd_framework.plugins import load_adapter
from vkd_framework.recipe import CelebsData
from vkd_framework.types import PARTS


def found() -> dict[str, object]:
    """Whether answers stay as they were, and who is seen to have written into each layer's weight."""
    splits = data.load(CelebsData.model_validate(CAST))
    mllm = load_adapter("qwen_vl").tiny_model(texts_of(splits), 48, 0)
    batch = mllm.tokenize(splits.forget[:3])
    with torch.no_grad():
        before = mllm.model(**batch.inputs).logits
        freeze_language_model(mllm, "cpu")
        passes = 1 + 2 * ranks.rank()  # not in step
        same = all(torch.equal(mllm.model(**batch.inputs).logits, before) for _ in range(passes))
        ranks.gather(None)
        weights = [mllm.model.get_submodule(path).weight for path in mllm.language_model_layers()]
        for turn, weight in enumerate(weights):
            if turn % ranks.size() == ranks.rank():
                weight.fill_(ranks.rank())
        ranks.gather(None)
        seen = [weight.unique().tolist() for weight in weights]
    return {"same": same, "seen": seen, **estimated()}


def estimated() -> dict[str, float]:
    """Bytes of weights that a GPU is expected to hold, of the whole model, and of what is divided."""
    recipe = make_recipe()
    anatomy = describe(recipe.model.source, load_adapter("qwen_vl"))
    tokens = Tokens(patches=9, tile=9, image=4, text=20, answer=3, pixels=99)
    [*_, last] = memory.stages(recipe, anatomy, sizes(anatomy), tokens)
    return {
        "estimated": next(line.bytes for line in last.lines if line.what == "weights"),
        "whole": 4 * anatomy.count(PARTS),
        "layers": 4 * sizes(anatomy).matrices["language_model"],
    }


if __name__ == "__main__":
    with ranks.together():
        torch.save(found(), Path(sys.argv[1]) / f"found-{ranks.rank()}.pt")
