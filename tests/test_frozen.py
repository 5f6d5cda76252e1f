from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CAST, make_recipe, texts_of, weights
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from vkd_framework.frozen import FrozenLinear, freeze_language_model
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
    rounded = FrozenLinear(layer, int8=True)
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
    rounded = FrozenLinear(nn.Linear(300, 200, bias=False), int8=True)
    assert (rounded.weight.dtype, rounded.weight.element_size()) == (torch.int8, 1)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rounded(torch.randn(2, 300, requires_grad=True))
    assert sum(tensor.numel() * tensor.element_size() for tensor in kept) == 200 * 300 + 4 * 200


def test_a_channel_of_zeros_stays_zero() -> None:
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight[0].zero_()
    found = FrozenLinear(layer, int8=True)(torch.ones(1, 4))
    assert float(found[0, 0]) == 0.0 and bool(torch.isfinite(found).all())


@pytest.mark.parametrize("int8", [False, True])
def test_an_offloaded_weight_stays_where_it_is_and_visits_the_device_of_the_input(int8: bool) -> None:
    layer = FrozenLinear(nn.Linear(24, 16), int8=int8, stays=True).to("meta")
    assert (layer.weight.device.type, layer.bias.device.type) == ("cpu", "meta")
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    kept: list[torch.Tensor] = []
    x = torch.ones(3, 24, device="meta", requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made = layer(x)
    assert any(tensor is layer.weight for tensor in kept)
    made.sum().backward()
    assert x.grad is not None and x.grad.device == made.device == x.device


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offloaded_layer_computes_what_the_layer_did_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 16).to(dtype).requires_grad_(False)
    x, y = (torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0)).to(dtype) for _ in range(2))
    got, wanted = FrozenLinear(layer, stays=True)(x.requires_grad_()), layer(y.requires_grad_())
    assert torch.equal(got, wanted)
    got.square().sum().backward()
    wanted.square().sum().backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("adapter", ["qwen_vl", "llava", "internvl", "idefics"])
def test_a_language_model_that_is_offloaded_answers_as_before_and_takes_no_device(splits: Splits, adapter: str) -> None:
    mllm = load_adapter(adapter).tiny_model(texts_of(splits), 48, 0)
    batch = mllm.tokenize(splits.forget[:3])
    with torch.no_grad():
        before = mllm.model(**batch.inputs).logits
        freeze_language_model(mllm, "cpu", offload=True)
        assert torch.equal(mllm.model(**batch.inputs).logits, before)
    layers = {f"{path}.weight" for path in mllm.language_model_layers()}
    freeze_language_model(mllm, "meta", offload=True)
    assert {name for name, p in mllm.model.named_parameters() if p.device.type == "cpu"} == layers
    assert mllm.device.type == "meta"


@pytest.mark.parametrize("adapter", ["qwen_vl", "llava", "internvl", "idefics"])
def test_only_the_language_model_is_rounded_and_its_answers_stay_near(splits: Splits, adapter: str) -> None:
    mllm = load_adapter(adapter).tiny_model(texts_of(splits), 48, 0)
    batch = mllm.tokenize(splits.forget[:3])
    with torch.no_grad():
        before = mllm.model(**batch.inputs).logits
        visual = {name: p.clone() for name, p in mllm.parameters(("encoder", "projector")).items()}
        freeze_language_model(mllm, "cpu", int8=True)
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
    freeze_language_model(student, "cpu", int8=True)
    before = {name: p.clone() for name, p in student.model.named_parameters()}
    unlearn(student, recipe, splits, None, resume=tmp_path / "state.pt", record=lambda _: None)
    moved = {name for name, p in student.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {*student.parts["encoder"], *student.parts["projector"]}


def test_unlearning_beside_an_offloaded_language_model_takes_the_same_steps(
    student: MLLM, splits: Splits, tmp_path: Path
) -> None:
    recipe = make_recipe(
        method="vkd",
        unlearn={"steps": 4, "forget_batch": 3, "retain_batch": 3, "warmup": 0},
        simulated_attack={"head_start": 0, "horizon": [2, 3]},
    )
    other = student.copy()
    freeze_language_model(other, "cpu", offload=True)
    for name, mllm in (("as it is", student), ("offloaded", other)):
        unlearn(mllm, recipe, splits, None, resume=tmp_path / f"{name}.pt", record=lambda _: None)
    assert weights(student) == weights(other)


def test_an_attacker_of_low_rank_adds_to_a_rounded_language_model(student: MLLM, splits: Splits) -> None:
    recipe = make_recipe(
        model={"quantize": "int8"},
        relearn=LEFT_ALONE,
        attacks=[],
        simulated_attack={"weight": 1, "scopes": ["full"], "rank": 2, "head_start": 0},
    )
    freeze_language_model(student, "cpu", int8=True)
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": ["language_model"]}, r"model\.offload: true .* tune; take language_model out of train"),
        ({"method": "retain_only"}, "take language_model out of train"),
        ({"relearn": {"scopes": ["full"]}}, r"take full out of relearn\.scopes"),
    ],
)
def test_what_would_tune_an_offloaded_language_model_is_refused(changes: dict[str, object], words: str) -> None:
    rounded = [{"kind": "quantize"}, {"kind": "module_restore", "parts": ["language_model"]}]
    fits = {"model": {"offload": True}, "relearn": LEFT_ALONE, "attacks": rounded}
    make_recipe(**fits)
    with pytest.raises(ValidationError, match=words):
        make_recipe(**{**fits, **changes})


SMALL = {
    "name": "small",
    "adapter": "qwen_vl",
    "data": CAST,
    "teach": {"steps": 10, "batch_size": 8},
    "layers": ["vision.1", "projector"],
    "unlearn": {"steps": 3, "warmup": 0, "forget_batch": 3, "retain_batch": 3},
    "simulated_attack": {"scopes": ["visual", "full"]},
    "evaluate": {"max_new_tokens": 4},
    "relearn": {**LEFT_ALONE, "shares": [1.0], "steps": [1], "photos": ["known"], "batch_size": 3},
    "attacks": [{"kind": "module_restore"}, {"kind": "membership"}],
}


def small_run(place: Path, **changes: Any) -> tuple[dict[str, Any], Path]:
    place.mkdir()
    (place / "small.yaml").write_text(yaml.safe_dump({**SMALL, **changes}))
    return run(str(place / "small.yaml"), out=place / "run")


@pytest.mark.slow
def test_a_run_with_a_rounded_language_model_proves_itself_and_is_saved_whole(tmp_path: Path) -> None:
    metrics, folder = small_run(tmp_path / "rounded", model={"quantize": "int8"})
    assert metrics["proofs"]["text_only_max_logit_difference"] == 0.0
    assert metrics["proofs"]["frozen_parameters_identical"] is True
    assert metrics["proofs"]["reload_identical"] is True
    saved = load_file(folder / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.slow
def test_a_run_with_an_offloaded_language_model_ends_as_one_without(tmp_path: Path) -> None:
    attacks = [{"kind": "module_restore", "parts": ["language_model"]}, {"kind": "quantize"}]
    (whole, one), (offloaded, other) = (
        small_run(tmp_path / str(offload), model={"offload": offload}, attacks=attacks) for offload in (False, True)
    )
    for key in ("models", "relearn", "attacks", "proofs"):
        assert offloaded[key] == whole[key], key
    saved = [load_file(folder / "model" / "model.safetensors") for folder in (one, other)]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(tensor, saved[1][name]) for name, tensor in saved[0].items())
