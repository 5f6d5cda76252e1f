from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_recipe, texts_of
from torch import Tensor, nn

from vkd_framework.checkpoint import load_training, save_training
from vkd_framework.errors import RecipeError
from vkd_framework.gradients import adamw, as_gradients_come, recomputed
from vkd_framework.objective import Objective
from vkd_framework.plugins import MLLM, load_adapter, trainable
from vkd_framework.recipe import Recipe
from vkd_framework.types import Splits
from vkd_framework.vanilla import attend

VISUAL = ("encoder", "projector")


def gradients(mllm: MLLM, recipe: Recipe, splits: Splits) -> tuple[float, int, dict[str, Tensor]]:
    """The retain loss, the bytes that its backward pass found kept, and the gradients it left."""
    objective = Objective(mllm, recipe, splits)
    parameters = trainable(mllm, VISUAL)
    weights = {p.data_ptr() for p in mllm.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = objective.retain(splits.retain[:6])
    torch.autograd.backward(loss)
    found = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    mllm.model.zero_grad()
    return float(loss.detach()), sum(kept.values()), found


@pytest.mark.parametrize("adapter", ["qwen_vl", "llava", "internvl", "idefics"])
def test_what_is_computed_again_gives_the_same_gradients_and_keeps_less(splits: Splits, adapter: str) -> None:
    mllm = load_adapter(adapter).tiny_model(texts_of(splits), 48, 0)
    layers = ["vision.0", "projector"]
    plain = gradients(mllm, make_recipe(layers=layers), splits)
    again = gradients(mllm, make_recipe(layers=layers, model={"gradient_checkpointing": True}), splits)
    assert again[0] == pytest.approx(plain[0], rel=1e-6)
    assert again[1] < 0.6 * plain[1]
    assert again[2].keys() == plain[2].keys()
    for name, gradient in plain[2].items():
        torch.testing.assert_close(again[2][name], gradient, rtol=1e-4, atol=1e-7)


def test_a_model_answers_as_before_once_nothing_is_to_be_computed_again(tiny: MLLM, splits: Splits) -> None:
    before = [module.training for module in tiny.model.modules()]
    with recomputed(tiny.model):
        assert [module.training for module in tiny.model.modules()] != before
    assert [module.training for module in tiny.model.modules()] == before
    assert not any(getattr(module, "gradient_checkpointing", False) for module in tiny.model.modules())


@pytest.mark.parametrize("adapter", ["qwen_vl", "idefics"])
def test_frozen_embeddings_want_no_gradients_while_blocks_are_computed_again_nor_after(
    splits: Splits, adapter: str
) -> None:
    mllm = load_adapter(adapter).tiny_model(texts_of(splits), 48, 0)
    mllm.model.requires_grad_(False)
    trainable(mllm, ("encoder", "projector"))
    text = mllm.tokenize(splits.text[:2]).inputs
    with recomputed(mllm.model):
        assert not mllm.model(**text).logits.requires_grad
    assert not mllm.model(**text).logits.requires_grad


def test_a_model_that_cannot_compute_again_is_an_error_that_says_what_to_do(
    student: MLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(student.model), "supports_gradient_checkpointing", False)
    with (
        pytest.raises(RecipeError, match=r"model\.gradient_checkpointing: .*set it to false"),
        recomputed(student.model),
    ):
        pass


def test_each_gradient_is_handed_over_once_and_not_kept() -> None:
    layers = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    expected = torch.autograd.grad(layers(torch.ones(2, 3)).sum(), list(layers.parameters()))
    found: dict[str, Any] = {}
    with as_gradients_come(dict(layers.named_parameters()), lambda name, g: found.update({name: g.clone()})):
        torch.autograd.backward(layers(torch.ones(2, 3)).sum())
    assert all(parameter.grad is None for parameter in layers.parameters())
    for (name, _), wanted in zip(layers.named_parameters(), expected, strict=True):
        torch.testing.assert_close(found[name], wanted)
    torch.autograd.backward(layers(torch.ones(2, 3)).sum())
    assert all(parameter.grad is not None for parameter in layers.parameters())


def test_attention_is_computed_in_the_way_that_the_recipe_names(student: MLLM, splits: Splits) -> None:
    batch = student.tokenize(splits.forget[:2])
    with torch.no_grad():
        expected = student.model(**batch.inputs).logits
        attend(student, "eager")
        torch.testing.assert_close(student.model(**batch.inputs).logits, expected, rtol=1e-3, atol=1e-4)
    assert student.model.config._attn_implementation == "eager"


@pytest.mark.skipif(torch.cuda.is_available(), reason="ends when the machine has no GPU")
def test_attention_that_cannot_be_had_is_one_line_that_says_what_to_take(student: MLLM) -> None:
    with pytest.raises(RecipeError, match=r"^model\.attention: flash_attention_2 cannot be had .*take sdpa"):
        attend(student, "flash_attention_2")


def test_adamw_takes_the_fused_kernel_and_goes_where_torchs_own_goes() -> None:
    options = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    ours, plain = (nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    optimizers = adamw([ours], **options), torch.optim.AdamW([plain], foreach=False, fused=False, **options)
    assert optimizers[0].defaults["fused"]
    for step in range(5):
        for parameter, optimizer in zip((ours, plain), optimizers, strict=True):
            parameter.grad = torch.linspace(-2, 3, 7) * (step + 1)
            optimizer.step()
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)
    assert (ours.detach() - torch.linspace(-1, 1, 7)).abs().max() > 0.03


def test_steps_too_small_for_a_weight_of_lower_precision_add_up() -> None:
    start = torch.linspace(0.5, 1, 9)
    exact, mastered, rounded = (
        nn.Parameter(start.to(dtype, copy=True)) for dtype in (torch.float32, torch.bfloat16, torch.bfloat16)
    )
    optimizers = adamw([exact], lr=1e-4), adamw([mastered], lr=1e-4), adamw([rounded], master_weights=False, lr=1e-4)
    for _ in range(300):
        for parameter, optimizer in zip((exact, mastered, rounded), optimizers, strict=True):
            parameter.grad = torch.ones(9, dtype=parameter.dtype)
            optimizer.step()
    assert torch.equal(rounded, start.bfloat16())
    assert (exact - start).abs().min() > 0.02
    assert torch.equal(mastered, optimizers[1].param_groups[0]["params"][0].bfloat16())
    torch.testing.assert_close(mastered.float(), exact, rtol=2**-8, atol=0)


def test_of_mixed_weights_only_those_of_lower_precision_have_a_master() -> None:
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
    optimizer = adamw(parameters, lr=0.1)
    assert optimizer.param_groups[0]["params"][0] is parameters[0]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(parameters[0], parameters[1].float(), rtol=2**-8, atol=0)
    assert (parameters[0] < 0.95).all()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in parameters)


def test_training_in_lower_precision_goes_on_from_a_saved_state_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def trained(*stops: int) -> nn.Parameter:
        weight = nn.Parameter(torch.linspace(0.5, 1, 9).bfloat16())
        for begin, end in pairwise((0, *stops, 40)):
            weight = nn.Parameter(torch.zeros_like(weight)) if begin else weight
            optimizer = adamw([weight], lr=1e-4)
            done, _ = load_training(tmp_path / "state", {"weight": weight}, optimizer)
            assert done == begin
            for step in range(begin, end):
                weight.grad = torch.full_like(weight, 1 + step % 3)
                optimizer.step()
            save_training(tmp_path / "state", end, {"weight": weight}, optimizer, [])
        (tmp_path / "state").unlink()
        return optimizer.param_groups[0]["params"][0]

    assert torch.equal(trained(7, 19), trained())
