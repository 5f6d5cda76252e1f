from __future__ import annotations

import pytest
import torch
from conftest import asked_about, picture
from torch import Tensor, nn

from vkd_framework import pruning
from vkd_framework.errors import RecipeError
from vkd_framework.plugins import MLLM, load_adapter
from vkd_framework.pruning import Moments, build_prune_mask, mlp_blocks, moments, scores
from vkd_framework.recipe import PruneConfig
from vkd_framework.types import Splits

BOTH = ("encoder", "language_model")


def importance(activations: Tensor) -> Tensor:
    moment = Moments(activations.shape[1])
    for part in activations.split(3):
        moment.add(part)
    return moment.importance()


def test_the_four_importance_functions_are_those_of_the_formulas() -> None:
    z = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)) + 0.3
    expected = [z.abs().mean(0), (z > 0).float().mean(0), z.std(0, correction=0), z.square().mean(0).sqrt()]
    assert torch.allclose(importance(z).float(), torch.stack(expected), atol=1e-6)


def test_the_score_is_the_sum_of_four_ratios() -> None:
    forget, retain = torch.rand(4, 5, dtype=torch.float64) + 1, torch.rand(4, 5, dtype=torch.float64) + 1
    assert torch.allclose(scores(forget, retain), (forget / retain).sum(0), rtol=2e-3)


def test_a_unit_that_hardly_answers_to_anything_is_not_the_most_forgotten_one() -> None:
    retain = torch.ones(4, 3, dtype=torch.float64)
    forget = torch.tensor([5.0, 1.0, 1e-6], dtype=torch.float64).expand(4, 3).clone()
    retain[:, 2] = 1e-8
    assert scores(forget, retain).argmax() == 0


@pytest.mark.parametrize("adapter", ["qwen_vl", "llava", "internvl", "idefics"])
def test_every_mlp_block_of_every_family_is_found_and_no_attention(adapter: str) -> None:
    mllm = load_adapter(adapter).tiny_model(["What is shown?"], 48, 0)
    blocks = mlp_blocks(mllm.model)
    assert [block.units for block in blocks] == [288] * 3 + [256] * 3
    assert [len(block.widen) for block in blocks] == [1] * 3 + [2] * 3
    assert all(".mlp" in block.narrow for block in blocks)


def test_attention_that_is_wider_inside_is_no_mlp_block() -> None:
    attention = nn.ModuleDict({name: nn.Linear(8, 16) for name in "qkv"} | {"out": nn.Linear(16, 8)})
    gated = nn.ModuleDict({"gate": nn.Linear(8, 16), "up": nn.Linear(8, 16), "down": nn.Linear(16, 8)})
    assert [block.narrow for block in mlp_blocks(nn.ModuleDict({"a": attention, "m": gated}))] == ["m.down"]


def test_padding_does_not_count(tiny: MLLM, splits: Splits) -> None:
    short, long = asked_about(None, "What?", "a"), asked_about(None, "What is shown? " * 8, "a")
    blocks = [block for block in mlp_blocks(tiny.model) if "language_model" in block.narrow]
    tokens = sum(int(tiny.tokenize([pair]).inputs["attention_mask"].sum()) for pair in (short, long))
    together = moments(tiny, blocks, [short, long], what="test")
    apart = [moments(tiny, blocks, [pair], what="test")[0] for pair in (short, long)]
    assert {moment.count for moment in together} == {tokens}
    summed = sum(moment.importance()[0] * moment.count for moment in apart) / tokens
    assert torch.allclose(together[0].importance()[0], summed, atol=1e-6)


def test_exactly_the_units_whose_scores_differ_are_switched_off_and_all_else_stays(
    student: MLLM, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = mlp_blocks(student.model)
    wanted = {(0, 7), (2, 100), (4, 31)}

    def constructed(mllm: MLLM, found: list[pruning.Block], pairs: object, *, what: str) -> list[Moments]:
        made = []
        for number, block in enumerate(found):
            z = torch.ones(2, block.units)
            if "forget" in what:
                for at, unit in wanted:
                    if at == number:
                        z[:, unit] = 3
            moment = Moments(block.units)
            moment.add(z)
            made.append(moment)
        return made

    monkeypatch.setattr(pruning, "moments", constructed)
    share = len(wanted) / sum(block.units for block in blocks)
    mask = build_prune_mask(student, PruneConfig(share=share), BOTH, splits.forget, splits.retain, seed=0)
    before = {name: parameter.detach().clone() for name, parameter in student.model.named_parameters()}
    pruning.prune(student.parameters(BOTH), mask)
    after = dict(student.model.named_parameters())
    expected = {name: torch.ones_like(parameter, dtype=torch.bool) for name, parameter in before.items()}
    for at, unit in wanted:
        for path in blocks[at].widen:
            expected[f"{path}.weight"][unit] = False
            if f"{path}.bias" in expected:
                expected[f"{path}.bias"][unit] = False
        expected[f"{blocks[at].narrow}.weight"][:, unit] = False
    for name, kept in expected.items():
        assert torch.equal(after[name][kept], before[name][kept]), name
        assert not after[name][~kept].any()
        assert name not in mask or torch.equal(mask[name], ~kept)


def test_the_unit_that_tells_two_sets_apart_is_the_one_switched_off(student: MLLM) -> None:
    dark = [asked_about(picture(48, 48).point(lambda _: 0)) for _ in range(3)]
    noise = [asked_about(picture(48, 48, seed=9 * i)) for i in range(3)]
    blocks = [block for block in mlp_blocks(student.model) if f"{block.narrow}.weight" in student.parts["encoder"]]
    gathered = (moments(student, blocks, pairs, what="test") for pairs in (dark, noise))
    found = [scores(one.importance(), other.importance()) for one, other in zip(*gathered, strict=True)]
    best = max(range(len(blocks)), key=lambda at: found[at].max())
    mask = build_prune_mask(student, PruneConfig(share=1e-6), ["encoder"], dark, noise, seed=0)
    columns = {name: m.all(dim=0).nonzero().flatten().tolist() for name, m in mask.items() if m.dim() == 2}
    assert {name: units for name, units in columns.items() if units} == {
        f"{blocks[best].narrow}.weight": [int(found[best].argmax())]
    }


def test_a_pruned_unit_answers_to_nothing(student: MLLM, splits: Splits) -> None:
    mask = build_prune_mask(student, PruneConfig(share=0.1, pairs=8), BOTH, splits.forget, splits.retain, seed=0)
    pruning.prune(student.parameters(BOTH), mask)
    blocks = mlp_blocks(student.model)
    for block, moment in zip(blocks, moments(student, blocks, splits.forget[:4], what="test"), strict=True):
        off = mask[f"{block.narrow}.weight"].all(dim=0)
        assert not moment.importance()[:, off].any()
        assert moment.importance()[0, ~off].all()
    assert sum(int(mask[f"{block.narrow}.weight"].all(dim=0).sum()) for block in blocks) == 163


def test_a_part_without_mlp_blocks_cannot_be_pruned(tiny: MLLM, splits: Splits) -> None:
    with pytest.raises(RecipeError, match="train: projector has no MLP block to prune"):
        build_prune_mask(tiny, PruneConfig(), ["projector"], splits.forget, splits.retain, seed=0)


def test_the_hooks_are_gone_afterwards(tiny: MLLM, splits: Splits) -> None:
    blocks = mlp_blocks(tiny.model)
    (moment, *_) = moments(tiny, blocks, splits.forget[:2], what="test")
    counted = moment.count
    tiny.model(**tiny.tokenize(splits.forget[:2]).inputs)
    assert moment.count == counted
