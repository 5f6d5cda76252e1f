"""What one process and several do alike, for `test_ranks`; run as a script, it is one of several processes."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from conftest import CAST, make_recipe, texts_of

from vkd_framework import data, ranks
from vkd_framework.checkpoint import Stages
from vkd_framework.evaluate import evaluate
from vkd_framework.plugins import MLLM, load_adapter, trainable
from vkd_framework.recipe import CelebsData, EvaluateConfig, MaskConfig, Recipe, RelearnConfig, TeachConfig
from vkd_framework.relearn import relearn
from vkd_framework.saliency import accumulate, build_mask
from vkd_framework.teach import teach
from vkd_framework.types import Splits
from vkd_framework.unlearn import History, unlearn

Found = dict[str, Any]


class Killed(Exception):
    """Stands for whatever ends all processes in the middle of a run."""


def everything(folder: Path) -> Found:
    """Name -> what came out, of tensors and plain values."""
    splits = data.load(CelebsData.model_validate(CAST))
    tiny = load_adapter("qwen_vl").tiny_model(texts_of(splits), 48, 0)
    tiny.model.requires_grad_(False)
    return {
        "start": weights(tiny),
        "taught": weights(taught(tiny, splits, folder)),
        **{name: unlearned(tiny, splits, recipe, folder / name) for name, recipe in RECIPES.items()},
        "resumed": resumed(tiny, splits, folder / "resumed"),
        "saliency": saliency(tiny, splits),
        "answers": answers(tiny, splits),
        "curve": relearn(
            tiny.copy(),
            "visual",
            splits.forget[:9],
            splits.columns["test_vqa"][:9],
            RelearnConfig(steps=(1, 2), batch_size=5),
            EvaluateConfig(batch_size=8, max_new_tokens=4),
            seed=0,
            what="attack",
        ),
        "stage": stage(folder / "stages"),
    }


FAST = {"learning_rate": 1e-3, "warmup": 0, "cosine_share": 0.0}
RECIPES: dict[str, Recipe] = {
    # everything that the default has, in batches that no two processes can halve
    "default": make_recipe(
        method="vkd",
        unlearn={**FAST, "steps": 5, "forget_batch": 3, "retain_batch": 5, "checkpoint_every": 4},
    ),
    "capped": make_recipe(
        mask={"kind": "random", "density": 0.5, "scope": "all", "pairs": 8},
        losses={"retain_kl": {"weight": 1.0}, "forget_output": {"cap": 3.0}, "repel": {"cap": 0.1}},
        unlearn={**FAST, "steps": 3, "forget_batch": 3, "retain_batch": 5},
    ),
    # an attacker who is above his cap with some of his pairs; batches in parts
    "above_cap": make_recipe(
        simulated_attack={"weight": 1.0, "cap": 6.6, "scopes": ["visual"], "head_start": 0, "batch_size": 7},
        unlearn={**FAST, "steps": 2, "forget_batch": 5, "retain_batch": 5, "micro_batch": 2},
    ),
    # what he adds to the language model gets gradients from text alone, too
    "low_rank": make_recipe(
        simulated_attack={"weight": 1.0, "scopes": ["full"], "rank": 2, "head_start": 0, "batch_size": 5},
        unlearn={**FAST, "steps": 3, "forget_batch": 3, "retain_batch": 3},
    ),
    # his attack goes on for several of his steps; of what is asked, groups smaller than the processes
    "turns": make_recipe(
        simulated_attack={"weight": 1.0, "turns": True, "horizon": [9, 9], "head_start": 0, "batch_size": 3},
        losses={"retain_output": {"share": 0.5}, "retain_kl": {"weight": 1.0}},
        unlearn={**FAST, "steps": 6, "forget_batch": 3, "retain_batch": 5},
    ),
    "one_pair": make_recipe(unlearn={**FAST, "steps": 2, "forget_batch": 1, "retain_batch": 1}),
}


def taught(tiny: MLLM, splits: Splits, folder: Path) -> MLLM:
    mllm = tiny.copy()
    teach(mllm, splits.teach, TeachConfig(steps=4, batch_size=7), what="teach", resume=folder / "teach.pt")
    return mllm


def unlearned(start: MLLM, splits: Splits, recipe: Recipe, folder: Path) -> Found:
    mllm, mask = start.copy(), None
    if recipe.mask.kind != "none":
        mask = built(mllm, splits, recipe)
    # text-only pairs among the others: a process may get no photo at all
    forget = (*splits.forget[:9], *(splits.columns["forget_qa"][:3] if recipe.unlearn.forget_batch > 1 else ()))
    mixed = replace(splits, forget=forget, retain=(*splits.retain[:9], *splits.columns["retain_qa"][:9]))
    history = unlearn(mllm, recipe, mixed, mask, resume=folder / "state.pt", record=lambda _: None)
    return {"weights": weights(mllm), "history": history}


def resumed(start: MLLM, splits: Splits, folder: Path) -> Found:
    """Whether a run that was stopped and went on ends like one that was not, bit for bit."""
    recipe = make_recipe(
        simulated_attack={"weight": 0.5, "horizon": [1, 3], "head_start": 0, "batch_size": 3},
        unlearn={**FAST, "steps": 3, "forget_batch": 3, "retain_batch": 3, "checkpoint_every": 1},
    )
    straight, killed, again = start.copy(), start.copy(), start.copy()
    expected = unlearn(straight, recipe, splits, None, resume=folder / "straight.pt", record=lambda _: None)

    def kill(_: History) -> None:
        raise Killed

    try:
        unlearn(killed, recipe, splits, None, resume=folder / "state.pt", record=kill)
    except Killed:
        pass
    history = unlearn(again, recipe, splits, None, resume=folder / "state.pt", record=lambda _: None)
    same = all(torch.equal(a, b) for a, b in zip(weights(straight).values(), weights(again).values(), strict=True))
    return {"history": history == expected, "weights": same}


def built(mllm: MLLM, splits: Splits, recipe: Recipe) -> dict[str, torch.Tensor]:
    parameters = trainable(mllm, recipe.train)
    return build_mask(mllm, recipe.mask, parameters, splits.forget, splits.retain, seed=0, batch_size=4)


def saliency(start: MLLM, splits: Splits) -> Found:
    parameters = trainable(start, ["projector"])
    scores = accumulate(start, splits.forget[:7], parameters, squared=True, batch_size=2, what="saliency")
    cuts: list[dict[str, Any]] = [{"density": 0.3}, {"threshold": 1.0}]
    masks = [
        built(start, splits, make_recipe(train=["projector"], mask=MaskConfig(kind="ratio", pairs=8, **cut)))
        for cut in cuts
    ]
    start.model.requires_grad_(False)
    return {"scores": scores, "mask": masks[0], "threshold": masks[1]}


def answers(start: MLLM, splits: Splits) -> Found:
    columns = {name: splits.columns[name][:9] for name in ("test_vqa", "retain_qa")}
    found = evaluate(start, columns, EvaluateConfig(batch_size=8, max_new_tokens=4))
    return {name: [asdict(one.cell), list(one.answers), list(one.cut)] for name, one in found.items()}


def stage(folder: Path) -> list[int]:
    """Which processes do a stage: all of them. What they write is told by the folder."""
    stages = Stages(folder, lambda: 10 + ranks.rank())
    stages.run("first", lambda: ranks.gather(ranks.rank()))
    peak = stages.peak_memory()
    result = stages.run("first", lambda: ["not done again"])
    return [*result, peak]


def weights(mllm: MLLM) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in mllm.model.named_parameters()}


if __name__ == "__main__":
    with ranks.together():
        target = Path(sys.argv[1])
        results = everything(target)
        # each process writes its own, to be compared; what a run writes, the first one does
        torch.save(results, target / f"found-{ranks.rank()}.pt")
