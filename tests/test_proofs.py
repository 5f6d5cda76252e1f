from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vkd_framework.plugins import MLLM
from vkd_framework.proofs import Witness, compare, failed, witness
from vkd_framework.saliency import Mask
from vkd_framework.types import Splits
from vkd_framework.vanilla import fingerprint

VISUAL = ("encoder", "projector")


def flip_a_bit(weight: Tensor, index: int = 0) -> None:
    """The smallest change there is."""
    weight.data.view(-1).view(torch.int32)[index] ^= 1


def masked_by_halves(mllm: MLLM) -> Mask:
    return {name: torch.arange(p.numel()).view(p.shape) % 2 == 0 for name, p in mllm.parameters(VISUAL).items()}


def seen(mllm: MLLM, splits: Splits, mask: Mask | None = None) -> Witness:
    pairs = [splits.columns["forget_vqa"][0], splits.columns["retain_qa"][0], splits.columns["retain_vqa"][0]]
    return witness(mllm, pairs, list(mllm.parameters(VISUAL)), mask)


def test_an_untouched_model_passes_every_proof(student: MLLM, splits: Splits) -> None:
    mask = masked_by_halves(student)
    before = seen(student, splits, mask)
    proofs = compare(before, before, seen(student.copy(), splits, mask), masked=True)
    assert proofs == {
        "text_only_max_logit_difference": 0.0,
        "frozen_parameters_identical": True,
        "masked_parameters_identical": True,
        "reload_identical": True,
    }
    assert failed(proofs) == []


def test_trained_weights_may_move(student: MLLM, splits: Splits) -> None:
    before = seen(student, splits)
    for parameter in student.parameters(VISUAL).values():
        parameter.data += 0.1
    after = seen(student, splits)
    proofs = compare(before, after, after, masked=False)
    assert failed(proofs) == []
    assert proofs["masked_parameters_identical"] is None
    assert before.everything != after.everything


def test_a_flipped_bit_in_any_frozen_weight_is_found(student: MLLM, splits: Splits) -> None:
    frozen = list(student.parameters(["language_model"]).values())
    for parameter in (frozen[0], frozen[len(frozen) // 2], frozen[-1]):
        before = seen(student, splits)
        flip_a_bit(parameter, parameter.numel() - 1)
        after = seen(student, splits)
        assert "frozen_parameters_identical" in failed(compare(before, after, after, masked=False))


def test_a_flipped_bit_in_a_masked_weight_is_found_and_one_in_a_free_weight_is_not(
    student: MLLM, splits: Splits
) -> None:
    mask = masked_by_halves(student)
    before = seen(student, splits, mask)
    name = student.parts["projector"][0]
    flip_a_bit(student.model.get_parameter(name), 0)
    free = seen(student, splits, mask)
    assert failed(compare(before, free, free, masked=True)) == []
    flip_a_bit(student.model.get_parameter(name), 1)
    masked = seen(student, splits, mask)
    assert failed(compare(before, masked, masked, masked=True)) == ["masked_parameters_identical"]


def test_another_text_logit_is_found_and_measured(student: MLLM, splits: Splits) -> None:
    before = seen(student, splits)
    student.model.get_output_embeddings().weight.data[5] += 0.25
    after = seen(student, splits)
    proofs = compare(before, after, after, masked=False)
    assert set(failed(proofs)) == {"text_only_max_logit_difference", "frozen_parameters_identical"}
    difference = proofs["text_only_max_logit_difference"]
    assert isinstance(difference, float)
    both = zip(before.text_logits, after.text_logits, strict=True)
    assert difference == max((one - other).abs().max().item() for one, other in both) > 0


def test_a_text_logit_that_is_not_a_number_does_not_pass(student: MLLM, splits: Splits) -> None:
    before = seen(student, splits)
    broken = replace(before, text_logits=tuple(logits.clone() for logits in before.text_logits))
    broken.text_logits[-1][0, 0] = math.nan
    assert failed(compare(before, broken, broken, masked=False)) == ["text_only_max_logit_difference"]


def test_a_reload_with_another_weight_is_found(student: MLLM, splits: Splits) -> None:
    before = seen(student, splits)
    flip_a_bit(student.model.get_parameter(student.parts["encoder"][0]))
    assert failed(compare(before, before, seen(student, splits), masked=False)) == ["reload_identical"]


def test_a_reload_that_answers_differently_with_the_same_weights_is_found(student: MLLM, splits: Splits) -> None:
    before = seen(student, splits)
    again = replace(before, photo_logits="others")
    assert failed(compare(before, before, again, masked=False)) == ["reload_identical"]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e-30, -1.0])
def test_a_difference_that_is_not_exactly_zero_fails(value: float) -> None:
    assert failed({"text_only_max_logit_difference": value}) == ["text_only_max_logit_difference"]


def test_a_proof_that_does_not_apply_neither_fails_nor_counts_as_passed() -> None:
    assert failed({"masked_parameters_identical": None, "reload_identical": False}) == ["reload_identical"]


def test_text_answers_are_promised_unless_the_language_model_may_change() -> None:
    found = {"text_only_max_logit_difference": 0.5, "frozen_parameters_identical": False, "reload_identical": True}
    assert failed(found, ("encoder", "projector")) == [
        "text_only_max_logit_difference",
        "frozen_parameters_identical",
    ]
    assert failed(found, ("encoder", "projector", "language_model")) == ["frozen_parameters_identical"]


def test_a_tensor_that_is_tied_to_a_trained_one_is_not_taken_for_frozen(student: MLLM, splits: Splits) -> None:
    """Tied embeddings have two names among the saved tensors and one among the parameters."""
    trained = list(student.parameters(["language_model"]))
    assert set(student.model.state_dict()) > set(dict(student.model.named_parameters()))
    pairs = [splits.columns["forget_vqa"][0]]
    before = witness(student, pairs, trained, None)
    student.model.get_output_embeddings().weight.data[5] += 0.25
    after = witness(student, pairs, trained, None)
    assert compare(before, after, after, masked=False)["frozen_parameters_identical"] is True
    flip_a_bit(student.model.get_parameter(student.parts["encoder"][0]))
    after = witness(student, pairs, trained, None)
    assert compare(before, after, after, masked=False)["frozen_parameters_identical"] is False


def test_a_photo_is_compared_as_text_alone_too(tiny: MLLM, splits: Splits) -> None:
    pairs = [splits.columns["forget_vqa"][0]]
    found = witness(tiny, pairs, [], None)
    assert 0 < len(found.text_logits) < len(found.photo_logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_fingerprints_see_names_and_values_of_every_dtype(dtype: torch.dtype) -> None:
    ones, zeros = torch.ones(3).to(dtype), torch.zeros(3).to(dtype)
    assert fingerprint({"a": ones, "b": zeros}) == fingerprint({"b": zeros, "a": ones.clone()})
    assert fingerprint({"a": ones, "b": zeros}) != fingerprint({"a": zeros, "b": ones})
    assert fingerprint({"a": ones}) != fingerprint({"c": ones})


def test_fingerprints_look_at_values_not_at_memory_layout() -> None:
    matrix = torch.randn(3, 4)
    assert fingerprint({"a": matrix.t()}) == fingerprint({"a": matrix.t().contiguous()})
    assert fingerprint({"a": torch.tensor(1.0)}) != fingerprint({"a": torch.tensor(2.0)})
