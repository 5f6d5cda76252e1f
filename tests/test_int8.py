from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from conftest import CAST, make_recipe, texts_of
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from vkd_framework.int8 import Int8Linear, hold_language_model_in_int8
from vkd_framework.plugins import MLLM, load_adapter, trainable
from vkd_framework.run import run
from vkd_framework.simulated_attack import SimulatedAttacker
from vkd_framework.types import Splits
from vkd_framework.unlearn import unlearn

LEFT_ALONE = {"scopes": ["visual"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rounded_layer_computes_and_passes_gradients_as_the_layer_with_rounded_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 16).to(dtype)
    rounded = Int8Linear(layer)
    step = layer.weight.float().abs().amax(dim=1, keepdim=True) / 127
    exact = (torch.round(layer.weight.float() / step) * step).to(dtype)
    assert bool(((exact - layer.weight).abs() <= step / 2 + 1e-2 * step * 127).all())
    x = torch.randn(3, 5, 24, dtype=dtype, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    got, wanted = rounded(x), nn.functional.linear(y, exact, layer.bias)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    up = torch.randn_like(got)
    torch.autograd.backward(got, up)
    torch.autograd.backward(wanted, up)
    torch.testing.assert_close(x.grad, y.grad, rtol=tolerance, atol=tolerance)


def test_a_rounded_weight_takes_a_byte_and_none_is_kept_in_full_for_the_way_back() -> None:
    rounded = Int8Linear(nn.Linear(300, 200, bias=False))
    assert (rounded.weight.dtype, rounded.weight.element_size()) == (torch.int8, 1)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rounded(torch.randn(2, 300, requires_grad=True))
    assert sum(tensor.numel() * tensor.element_size() for tensor in kept) == 200 * 300 + 4 * 200


def test_a_channel_of_zeros_stays_zero() -> None:
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight[0].zero_()
    found = Int8Linear(layer)(torch.ones(1, 4))
    assert float(found[0, 0]) == 0.0 and bool(torch.isfinite(found).all())


@pytest.mark.parametrize("adapter", ["qwen_vl", "llava", "internvl", "idefics"])
def test_only_the_language_model_is_rounded_and_its_answers_stay_near(splits: Splits, adapter: str) -> None:
    mllm = load_adapter(adapter).tiny_model(texts_of(splits), 48, 0)
    batch = mllm.tokenize(splits.forget[:3])
    with torch.no_grad():
        before = mllm.model(**batch.inputs).logits
        visual = {name: p.clone() for name, p in mllm.parameters(("encoder", "projector")).items()}
        hold_language_model_in_int8(mllm)
        after = mllm.model(**batch.inputs).logits
    assert 0 < float((after - before).norm() / before.norm()) < 0.05
    assert all(torch.equal(p, visual[name]) for name, p in mllm.parameters(("encoder", "projector")).items())
    held = {name for name, p in mllm.model.named_parameters() if p.dtype == torch.int8}
    linear = [p for p in mllm.parameters(("language_model",)).values() if p.dim() == 2]
    assert held <= set(mllm.parts["language_model"])
    assert len(held) >= 0.7 * len(linear)


def test_the_visual_part_learns_through_a_rounded_language_model(student: MLLM, splits: Splits, tmp_path: Path) -> None:
    recipe = make_recipe(
        method="vkd",
        model={"quantize": "int8"},
        unlearn={"steps": 4, "forget_batch": 3, "retain_batch": 3, "warmup": 0},
        simulated_attack={"weight": 1.0, "head_start": 0, "horizon": [2, 3], **LEFT_ALONE},
        relearn=LEFT_ALONE,
        attacks=[],
    )
    hold_language_model_in_int8(student)
    before = {name: p.clone() for name, p in student.model.named_parameters()}
    unlearn(student, recipe, splits, None, resume=tmp_path / "state.pt", record=lambda _: None)
    moved = {name for name, p in student.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {*student.parts["encoder"], *student.parts["projector"]}


def test_an_attacker_of_low_rank_adds_to_a_rounded_language_model(student: MLLM, splits: Splits) -> None:
    recipe = make_recipe(
        model={"quantize": "int8"},
        relearn=LEFT_ALONE,
        attacks=[],
        simulated_attack={"weight": 1, "scopes": ["full"], "rank": 2, "head_start": 0},
    )
    hold_language_model_in_int8(student)
    attacker = SimulatedAttacker(
        student,
        trainable(student, recipe.train),
        recipe.simulated_attack,
        splits.forget,
        seed=0,
        restart_every=100,
    )
    first = attacker.add_gradient(0, 1.0)
    for step in range(1, 8):
        attacker.add_gradient(step, 0.0)
    moved = [name for name, difference in attacker.difference.items() if bool(difference.any())]
    assert set(moved) & set(student.parts["language_model"])
    assert attacker.add_gradient(8, 0.0) < first


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": ["encoder", "language_model"]}, "language_model out of train"),
        (
            {"simulated_attack": {"weight": 1.0, "scopes": ["full"], "rank": None}},
            r"full out of simulated_attack\.scopes",
        ),
        ({"relearn": {"scopes": ["visual", "full"]}}, r"full out of relearn\.scopes"),
        ({"attacks": [{"kind": "quantize"}]}, "quantize out of attacks"),
    ],
)
def test_what_would_tune_a_rounded_language_model_is_refused(changes: dict[str, object], words: str) -> None:
    fits = {"model": {"quantize": "int8"}, "relearn": LEFT_ALONE, "attacks": []}
    make_recipe(**fits)
    with pytest.raises(ValidationError, match=words):
        make_recipe(**{**fits, **changes})


@pytest.mark.slow
def test_a_run_with_a_rounded_language_model_proves_itself_and_is_saved_whole(tmp_path: Path) -> None:
    recipe = {
        "name": "small",
        "adapter": "qwen_vl",
        "data": CAST,
        "model": {"quantize": "int8"},
        "teach": {"steps": 10, "batch_size": 8},
        "layers": ["vision.1", "projector"],
        "unlearn": {"steps": 3, "warmup": 0, "forget_batch": 3, "retain_batch": 3},
        "simulated_attack": LEFT_ALONE,
        "evaluate": {"max_new_tokens": 4},
        "relearn": {**LEFT_ALONE, "shares": [1.0], "steps": [1], "photos": ["known"], "batch_size": 3},
        "attacks": [{"kind": "module_restore"}, {"kind": "membership"}],
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    metrics, folder = run(str(tmp_path / "small.yaml"), out=tmp_path / "run")
    assert metrics["proofs"]["text_only_max_logit_difference"] == 0.0
    assert metrics["proofs"]["frozen_parameters_identical"] is True
    assert metrics["proofs"]["reload_identical"] is True
    saved = load_file(folder / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
