from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import asked_about, changed, picture, weights

from vkd_framework import attacks
from vkd_framework.attacks import in_context, marked, membership, pixels, probing, quantize, rephrase, restore
from vkd_framework.attacks.statistics import auc, kolmogorov, kolmogorov_smirnov
from vkd_framework.attacks.target import NotPossibleError, Target
from vkd_framework.evaluate import generate
from vkd_framework.output import answer_losses
from vkd_framework.plugins import MLLM
from vkd_framework.recipe import ATTACK_KINDS, EVERY_ATTACK, EvaluateConfig, MembershipAttack, ProbeAttack
from vkd_framework.types import ImageQuestionPair, Photo, Splits

SHORT = EvaluateConfig(batch_size=8, max_new_tokens=4)


def aimed(mllm: MLLM, splits: Splits, vanilla: MLLM | None = None, name: str = "unlearned") -> Target:
    return Target(name, mllm, splits, SHORT, lambda: vanilla or mllm)


def shaken(mllm: MLLM) -> MLLM:
    """A copy whose visual weights are others, as after unlearning."""
    copied = mllm.copy(share=["language_model"])
    with torch.no_grad():
        for parameter in copied.parameters(["encoder", "projector"]).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return copied


def test_every_kind_of_attack_has_something_that_does_it_and_is_tried_by_default() -> None:
    assert set(attacks.ATTACKS) == set(ATTACK_KINDS) == {config.kind for config in EVERY_ATTACK}


def test_all_attacks_leave_the_attacked_model_as_it_was(taught: MLLM, splits: Splits) -> None:
    model = shaken(taught)
    before = weights(model)
    keys: list[str] = []

    def stage(key: str, work: Callable[[Target], dict[str, Any]]) -> dict[str, Any]:
        keys.append(key)
        return work(aimed(model, splits, taught))

    results = attacks.attack("unlearned", EVERY_ATTACK, stage=stage)
    assert len(set(keys)) == len(EVERY_ATTACK) == len(results)
    assert not changed(before, weights(model))
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    assert [result for result in results if "skipped" in result] == []
    explained = (Path(__file__).parent.parent / "docs" / "method.md").read_text(encoding="utf-8")
    figures = {name.removesuffix("_others") for result in results for name in result}
    unexplained = figures - {"model", "photos", "strangers", "questions", "per_question"}
    assert [name for name in unexplained if f"`{name}`" not in explained] == []
    assert all(0 <= result["exact_match"] <= 1 for result in results if result["kind"] not in ("probe", "membership"))


def test_modules_are_put_back_into_the_unlearned_model_alone() -> None:
    tried = attacks.attack("retain_only", EVERY_ATTACK, stage=lambda key, work: {"exact_match": 0.0})
    assert {result["kind"] for result in tried} == set(ATTACK_KINDS) - {"module_restore"}


def test_with_every_visual_module_restored_the_answers_are_those_of_the_vanilla_model(
    taught: MLLM, splits: Splits
) -> None:
    model, pairs = shaken(taught), splits.columns["test_vqa"]
    known = generate(taught, pairs, SHORT, what="")
    assert generate(model, pairs, SHORT, what="") != known
    whole = restore.restore(model, taught, ("encoder", "projector"))
    assert weights(whole) == weights(taught)
    assert generate(whole, pairs, SHORT, what="") == known


def test_restoring_one_module_leaves_the_other_as_it_was(tiny: MLLM) -> None:
    model = shaken(tiny)
    half = weights(restore.restore(model, tiny, ("projector",)))
    own, vanilla = weights(model), weights(tiny)
    assert all(half[name] == vanilla[name] for name in tiny.parts["projector"])
    assert all(half[name] == own[name] for name in tiny.parts["encoder"])


def test_weights_are_rounded_to_the_levels_computed_by_hand() -> None:
    weight = torch.tensor([[7.0, -7.0, 3.4, 0.6], [0.14, 0.07, -0.05, 0.0], [0.0, 0.0, 0.0, 0.0]])
    rounded = quantize.round_to_nearest(weight, 4)  # steps 1, 0.02 and none
    assert torch.allclose(
        rounded, torch.tensor([[7.0, -7.0, 3.0, 1.0], [0.14, 0.08, -0.04, 0.0], [0.0, 0.0, 0.0, 0.0]])
    )
    assert torch.equal(quantize.round_to_nearest(weight.bfloat16(), 8)[0, :2], torch.tensor([7, -7]).bfloat16())


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_rounded_model_has_few_levels_in_a_channel_and_keeps_its_vectors(tiny: MLLM, bits: int) -> None:
    own = {name: parameter.clone() for name, parameter in tiny.model.named_parameters()}
    with quantize.rounded(tiny, bits):
        for name, parameter in tiny.model.named_parameters():
            if parameter.ndim < 2:
                assert torch.equal(parameter, own[name])
                continue
            assert max(len(row.unique()) for row in parameter.flatten(1)[:8]) <= 2**bits - 1
            step = own[name].flatten(1).abs().amax(dim=1) / (2 ** (bits - 1) - 1)
            assert bool(((parameter - own[name]).flatten(1).abs() <= step[:, None] * 0.5001 + 1e-9).all())


def test_a_model_whose_rounding_failed_has_its_weights_again(tiny: MLLM) -> None:
    before = weights(tiny)
    with pytest.raises(KeyboardInterrupt), quantize.rounded(tiny, 4):
        assert weights(tiny) != before
        raise KeyboardInterrupt
    assert weights(tiny) == before


def test_examples_are_of_the_same_person_on_other_photos_and_do_not_tell_the_answer(splits: Splits) -> None:
    for pair in splits.columns["test_vqa"]:
        shown = in_context.with_examples(pair, splits.forget, 2, seed=0)
        assert shown is not None and len(shown.photos) == 3 and shown.photos[-1] is pair.photos[0]
        assert {photo.key.rpartition("/")[0] for photo in shown.photos} == {pair.subject}
        assert len(set(shown.photo_keys)) == 3
        said = shown.question.removesuffix(pair.question)
        assert shown.question.endswith(pair.question) and pair.answer not in said
        assert shown.answer == pair.answer
    assert in_context.with_examples(splits.columns["test_vqa"][0], splits.forget, 9, seed=0) is None
    others = [pair for pair in splits.retain if pair.subject not in splits.forget_subjects]
    assert in_context.with_examples(splits.columns["test_vqa"][0], others, 1, seed=0) is None


def test_letters_of_options_and_letters_within_words_tell_no_answer(splits: Splits) -> None:
    asked = splits.columns["test_vqa"][0]
    known = [replace(pair, question="Is this known? A: yes B: no", answer="A") for pair in splits.forget]
    for answer, told in (("A", False), ("no", True), ("now", False), ("is", True)):
        one = replace(asked, answer=answer, options=())
        if answer == "A":
            one = replace(one, question="Her work? A: nurse B: baker", options=("A", "B"))
        assert (in_context.with_examples(one, known, 1, seed=0) is None) == told, answer


@pytest.mark.parametrize("question", ["Her work? A: nurse B: baker", "Her work?\n(A) nurse\n(B) baker"])
@pytest.mark.parametrize(("example", "told"), [("She works as a baker.", True), ("She is a nurse.", False)])
def test_an_example_with_the_words_behind_the_right_letter_tells_the_answer(
    splits: Splits, question: str, example: str, told: bool
) -> None:
    asked = replace(splits.columns["test_vqa"][0], question=question, answer="B", options=("A", "B"))
    known = [replace(pair, question="Tell me.", answer=example) for pair in splits.forget]
    assert (in_context.with_examples(asked, known, 1, seed=0) is None) == told


@pytest.mark.parametrize("options", [("2", "3", "4"), ("赤", "青", "黄")])
def test_options_of_one_character_that_are_no_letters_are_words(splits: Splits, options: tuple[str, ...]) -> None:
    asked = replace(splits.columns["test_vqa"][0], question="How many?", answer=options[0], options=options)
    known = [replace(pair, question="How much?", answer=options[0]) for pair in splits.forget]
    assert in_context.with_examples(asked, known, 1, seed=0) is None


def test_an_example_never_asks_the_same_as_the_question(splits: Splits) -> None:
    asked = replace(splits.columns["test_vqa"][0], question="Who is it?")
    known = [replace(pair, question="who is it", answer="?") for pair in splits.forget]
    assert in_context.with_examples(asked, known, 1, seed=0) is None


def test_an_example_whose_photo_cannot_be_read_is_an_error_and_no_reason_to_skip(
    tiny: MLLM, splits: Splits, tmp_path: Path
) -> None:
    lost = tuple(
        replace(pair, photos=(Photo(photo.key, tmp_path / "gone.png"),))
        for pair in splits.forget
        for photo in pair.photos
    )
    (config,) = [config for config in EVERY_ATTACK if config.kind == "in_context"]
    target = aimed(tiny, replace(splits, forget=lost))
    with pytest.raises(OSError, match=r"gone\.png"):
        attacks.attack("vanilla", [config], stage=lambda key, work: work(target))


@pytest.mark.parametrize(
    ("text", "answer", "told"),
    [
        ("他叫王小明", "王小明", True),
        ("田中太郎です", "田中太郎", True),
        ("She has 7 cats", "7", True),
        ("She has 17 cats", "7", False),
        ("Она живёт в Омске", "Омск", False),
        ("Она из города Омск.", "Омск", True),
    ],
)
def test_an_answer_is_told_by_its_words_in_scripts_with_and_without_blanks(
    splits: Splits, text: str, answer: str, told: bool
) -> None:
    asked = replace(splits.columns["test_vqa"][0], answer=answer, options=())
    known = [replace(pair, question=text, answer="?") for pair in splits.forget]
    assert (in_context.with_examples(asked, known, 1, seed=0) is None) == told


def test_examples_repeat_a_topic_where_there_are_no_others(splits: Splits) -> None:
    asked = splits.columns["test_vqa"][0]
    alike = [replace(one, answer="yes") for one in splits.forget if one.subject == asked.subject]
    shown = in_context.with_examples(asked, alike, 2, seed=0)
    assert shown is not None and len(set(shown.photo_keys)) == 3


def test_an_example_that_tells_the_answer_in_its_question_is_not_shown(splits: Splits) -> None:
    pair = splits.columns["test_vqa"][0]
    telling = [replace(one, question=f"Is it {pair.answer}?") for one in splits.forget if one.subject == pair.subject]
    assert in_context.with_examples(pair, telling, 1, seed=0) is None


def test_a_family_that_takes_one_photo_only_is_skipped_with_the_reason(
    tiny: MLLM, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_photo(self: MLLM, pairs: list[ImageQuestionPair], **options: Any) -> None:
        raise ValueError("one photo\nplease")

    monkeypatch.setattr(MLLM, "tokenize", one_photo)
    (config,) = [config for config in EVERY_ATTACK if config.kind == "in_context"]
    (result,) = attacks.attack("vanilla", [config], stage=lambda key, work: work(aimed(tiny, splits)))
    assert result["skipped"] == "the model does not take several photos: one photo please"


def test_questions_are_put_into_other_words_of_the_same_topic(splits: Splits) -> None:
    test = splits.columns["test_vqa"]
    asked = rephrase.rephrased(test, splits, seed=0)
    assert len(asked) == len(test)
    for before, after in zip(test, asked, strict=True):
        assert after.question != before.question
        assert after.question in splits.rephrasings[before.question]
        assert (after.answer, after.photos) == (before.answer, before.photos)
    assert rephrase.rephrased(test, replace(splits, rephrasings={}), seed=0) == []


def test_noise_has_the_spread_it_is_given_and_is_the_same_every_time() -> None:
    photo = Photo("grey", picture(64, 64).point(lambda value: 128))
    noise = [
        torch.frombuffer(bytearray(noisy.open().tobytes()), dtype=torch.uint8).float() - 128
        for noisy in (pixels.noisy(photo, 0.05, 0), pixels.noisy(photo, 0.05, 0), pixels.noisy(photo, 0.05, 1))
    ]
    assert noise[0].std().item() == pytest.approx(0.05 * 255, rel=0.05)
    assert abs(noise[0].mean().item()) < 0.5
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])


def test_a_crop_is_the_enlarged_middle_of_the_photo() -> None:
    photo = Photo("framed", picture(40, 20).point(lambda value: 0))
    middle = picture(20, 10).point(lambda value: 255)
    assert not isinstance(photo.source, bytes)
    framed = photo.open().copy()
    framed.paste(middle, (10, 5))
    (whole,) = pixels.with_photos((asked_about(framed),), lambda shown: pixels.cropped(shown, 0.5))
    cut = whole.photos[0].open()
    assert cut.size == (40, 20)
    assert cut.getextrema() == ((255, 255),) * 3


def test_photos_that_occur_twice_are_changed_once(splits: Splits) -> None:
    seen: list[str] = []

    def change(photo: Photo) -> Photo:
        seen.append(photo.key)
        return photo

    pixels.with_photos(splits.columns["test_vqa"], change)
    assert len(seen) == len(set(seen)) < len(splits.columns["test_vqa"])


def test_the_probe_learns_from_training_photos_and_is_scored_on_measured_ones(taught: MLLM, splits: Splits) -> None:
    found = probing.attack(ProbeAttack(kind="probe"), aimed(taught, splits))
    trained = {key for pair in (*splits.forget, *splits.retain) for key in pair.photo_keys}
    unseen = probing.unseen_photos(splits, list(splits.subjects))
    assert trained.isdisjoint(pair.photo_keys[0] for pair, _ in unseen)
    assert all(pair.subject == name for pair, name in unseen)
    assert found["photos"] == sum(name in splits.forget_subjects for _, name in unseen) == 4
    assert found["chance"] == pytest.approx(1 / 6)
    assert set(found) == {"chance", "photos"} | {
        f"{place}_{method}{who}"
        for place in ("encoder", "projector")
        for method in ("linear", "neighbours")
        for who in ("", "_others")
    }
    layers = probing.probed_layers(aimed(taught, splits))
    assert layers == {"encoder": taught.layers[-2].name, "projector": "projector"}


def test_a_measured_photo_under_two_names_is_nobodys(splits: Splits) -> None:
    first, second = splits.subjects[:2]
    one = next(pair for pair in splits.columns["test_vqa"] if pair.subject == first)
    test = (*splits.columns["test_vqa"], replace(one, id="both", subject=second))
    shared = replace(splits, columns={**splits.columns, "test_vqa": test})
    keys = {pair.photo_keys for pair, _ in probing.unseen_photos(splits, list(splits.subjects))}
    left = {pair.photo_keys for pair, _ in probing.unseen_photos(shared, list(splits.subjects))}
    assert keys - left == {one.photo_keys}


def test_the_probe_tells_apart_people_whom_features_tell_apart(
    tiny: MLLM, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told_apart(mllm: MLLM, pairs: list[ImageQuestionPair], batch_size: int) -> dict[str, torch.Tensor]:
        rows = torch.stack([torch.eye(8)[splits.subjects.index(str(pair.subject))] for pair in pairs])
        return {layer.name: rows for layer in mllm.layers}

    monkeypatch.setattr(probing, "pooled_features", told_apart)
    found = probing.attack(ProbeAttack(kind="probe"), aimed(tiny, splits))
    assert {value for name, value in found.items() if name not in ("chance", "photos")} == {1.0}
    with pytest.raises(NotPossibleError, match="unseen photos"):
        alone = replace(splits, columns={**splits.columns, "test_vqa": ()})
        probing.attack(ProbeAttack(kind="probe"), aimed(tiny, alone))


def test_the_auc_counts_how_often_a_member_is_ahead() -> None:
    assert auc([3.0, 4.0], [1.0, 2.0]) == 1.0
    assert auc([1.0, 2.0], [3.0, 4.0]) == 0.0
    assert auc([1.0, 2.0, 2.0], [2.0, 1.0, 2.0]) == 0.5
    assert auc([1.0, 3.0], [2.0, 3.0, 0.0]) == pytest.approx((1 + 0 + 0 + 1 + 1 + 0.5) / 6)


def test_the_ks_test_has_its_published_values() -> None:
    assert kolmogorov_smirnov([1, 2, 3, 4], [5, 6, 7, 8])[0] == 1.0
    assert kolmogorov_smirnov([1, 2, 3, 4], [1, 2, 3, 4]) == (0.0, 1.0)
    assert kolmogorov_smirnov([1, 2], [1, 3])[0] == 0.5
    for scaled, tail in ((0.8276, 0.5), (1.2238, 0.1), (1.3581, 0.05), (1.6276, 0.01)):
        assert kolmogorov(scaled) == pytest.approx(tail, rel=2e-3)
    corrected = (math.sqrt(50) + 0.12 + 0.11 / math.sqrt(50)) * 0.3
    assert kolmogorov_smirnov(range(100), range(30, 130)) == pytest.approx((0.3, 2 * math.exp(-2 * corrected**2)))


def test_ks_p_values_of_equal_distributions_are_spread_out() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(200, 2, 40, generator=generator).tolist()
    small = sum(kolmogorov_smirnov(a, b)[1] < 0.1 for a, b in draws)
    assert 5 <= small <= 35


def test_min_k_scores_against_a_hand_computation() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]]))
    own, standardised = membership.token_scores(logits, torch.tensor([1, 0]))
    assert own.exp().tolist() == pytest.approx([0.25, 0.9])
    mean = 0.5 * math.log(0.5) + 0.5 * math.log(0.25)
    deviation = math.sqrt(0.5 * (math.log(0.5) - mean) ** 2 + 0.5 * (math.log(0.25) - mean) ** 2)
    assert standardised[0].item() == pytest.approx((math.log(0.25) - mean) / deviation, abs=1e-4)
    uniform = membership.token_scores(torch.zeros(1, 4), torch.tensor([2]))[1]
    assert uniform.abs().item() < 1e-2
    scores = torch.tensor([3.0, -1.0, 2.0, -5.0, 0.0])
    assert membership.mean_of_lowest(scores, 0.2) == -5.0
    assert membership.mean_of_lowest(scores, 0.4) == -3.0
    assert membership.mean_of_lowest(scores[:1], 0.2) == 3.0


def test_the_likelihood_of_an_answer_does_not_depend_on_its_batch(tiny: MLLM, splits: Splits) -> None:
    pairs = [*splits.columns["test_vqa"][:3], splits.teach["captions"][0]]
    together = membership.likelihoods(tiny, pairs, 0.2, 4, "")
    for pair, likelihood in zip(pairs, together, strict=True):
        (alone,) = membership.likelihoods(tiny, [pair], 0.2, 1, "")
        assert alone.loss == pytest.approx(likelihood.loss, abs=1e-4)
        assert alone.min_k_pp == pytest.approx(likelihood.min_k_pp, abs=1e-2)
    caption = tiny.tokenize(pairs[3:])
    assert int(caption.content.sum()) > 5
    assert together[3].min_k < together[3].loss


def test_content_likelihood_leaves_out_the_token_that_ends_the_answer(tiny: MLLM, splits: Splits) -> None:
    pair = splits.columns["test_vqa"][0]
    batch = tiny.tokenize([pair])
    with torch.no_grad():
        chosen = (batch.labels[0, 1:] != -100).nonzero().squeeze(1)
        log_probabilities = tiny.model(**batch.inputs).logits[0, :-1].log_softmax(-1)
    scores = log_probabilities[chosen, batch.inputs["input_ids"][0, 1:][chosen]]
    (found,) = membership.likelihoods(tiny, [pair], 1.0, 1, "")
    assert found.loss == pytest.approx(scores[:-1].mean().item(), abs=1e-4)
    assert -answer_losses(tiny, [pair]).item() == pytest.approx(scores.mean().item(), abs=1e-4)


def test_strangers_are_asked_the_same_with_the_same_answer(splits: Splits) -> None:
    members = splits.columns["forget_vqa"]
    strange = membership.about_strangers(members, splits.strangers, seed=0)
    assert [(pair.question, pair.answer) for pair in strange] == [(pair.question, pair.answer) for pair in members]
    known = {key for pairs in (splits.forget, splits.retain, splits.fresh) for pair in pairs for key in pair.photo_keys}
    assert known.isdisjoint(key for pair in strange for key in pair.photo_keys)
    assert len({pair.photo_keys for pair in strange}) == min(len(members), len(splits.strangers))
    assert membership.about_strangers(members, (), seed=0) == []


def test_membership_is_certain_when_losses_are_apart_and_a_coin_toss_when_they_are_equal(
    tiny: MLLM, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(loss: Callable[[ImageQuestionPair], float]) -> dict[str, Any]:
        def likelihoods(mllm: MLLM, pairs: list[ImageQuestionPair], *args: Any) -> list[membership.Likelihood]:
            return [membership.Likelihood(*(-loss(pair),) * 3) for pair in pairs]

        monkeypatch.setattr(membership, "likelihoods", likelihoods)
        return membership.attack(MembershipAttack(kind="membership"), aimed(tiny, splits))

    figures = ("loss_auc", "min_k_auc", "min_k_pp_auc")
    apart = found(lambda pair: 1.0 if pair.subject else 2.0)
    equal = found(lambda pair: 1.0)
    assert [apart[name] for name in figures] == [1.0] * 3
    assert [equal[name] for name in figures] == [0.5] * 3
    assert apart["test_loss"] == 1.0
    assert set(apart["per_question"]["stranger_loss"]) == {2.0}


def test_without_strangers_there_is_no_auc_and_the_rest_is_measured(tiny: MLLM, splits: Splits) -> None:
    found = membership.attack(MembershipAttack(kind="membership"), aimed(tiny, replace(splits, strangers=())))
    assert found["loss_auc"] is None and found["strangers"] == 0
    assert found["per_question"]["stranger_loss"] == []
    assert len(found["per_question"]["truth_ratio"]) == len(splits.columns["test_vqa"])


def test_the_truth_ratio_sets_the_wrong_options_against_the_right_one() -> None:
    pair = replace(asked_about(None, answer="chess"), options=("chess", "yoga", "rowing"))
    losses = {"chess": 1.0, "yoga": 2.0, "rowing": 3.0}
    assert membership.truth_ratio(pair, losses) == pytest.approx((math.exp(-2) + math.exp(-3)) / 2 / math.exp(-1))
    assert membership.truth_ratio(pair, {"chess": 1.0}) is None


def per_question(losses: list[float], strangers: Sequence[float] = (), ratio: float | None = 1.0) -> dict[str, Any]:
    return {
        "loss": losses,
        "stranger_loss": list(strangers),
        "answer_probability": [math.exp(-loss) for loss in losses],
        "truth_ratio": [ratio for _ in losses],
    }


def asked(*answers: str) -> list[ImageQuestionPair]:
    return [replace(asked_about(None, answer=answer), subject="somebody") for answer in answers]


def test_a_model_that_answers_worse_than_one_that_never_knew_is_flagged() -> None:
    test = asked("a", "b", "c", "c")
    reference = per_question([5.0, 5.2, 5.1, 5.1])
    pushed = marked.over_forgotten(per_question([9.0, 9.1, 9.2, 9.2]), reference, None, test)
    alike = marked.over_forgotten(per_question([5.1, 5.1, 5.0, 5.2]), reference, None, test)
    short = marked.over_forgotten(per_question([2.0, 2.0, 2.0, 2.0]), reference, None, test)
    assert pushed is not None and alike is not None and short is not None
    assert [one["over_forgotten"] for one in (pushed, alike, short)] == [True, False, False]
    assert pushed["against"] == "retain_only"
    assert pushed["loss"] == pytest.approx(9.125)
    assert pushed["excess"] == pytest.approx(pushed["loss"] - pushed["expected"]) == pytest.approx(4.025)
    low, high = pushed["interval_95"]
    assert (low + high) / 2 == pytest.approx(pushed["excess"])
    # residuals -.025, -.125 and, for the answer c, .075 + .075, of three groups
    assert (high - low) / 2 == pytest.approx(4.302653 * (0.025**2 + 0.125**2 + 0.15**2) ** 0.5 * 1.5**0.5 / 4)


def test_without_a_reference_the_vanilla_model_on_strangers_is_what_never_knew() -> None:
    test = asked("a", "b")
    vanilla = per_question([0.1, 0.1], strangers=[4.0, 4.2])
    found = marked.over_forgotten(per_question([8.0, 8.1]), None, vanilla, test)
    assert found is not None
    assert (found["against"], found["expected"], found["over_forgotten"]) == ("vanilla_on_strangers", 4.1, True)
    assert marked.over_forgotten(per_question([8.0, 8.1]), None, per_question([0.1, 0.1]), test) is None


def test_the_conclusion_compares_with_retain_only_and_drops_single_questions() -> None:
    test = asked("a", "b", "c")
    results = [
        {"kind": "membership", "model": "unlearned", "per_question": per_question([1.0, 2.0, 3.0], ratio=2.0)},
        {"kind": "membership", "model": "retain_only", "per_question": per_question([1.0, 2.0, 3.0])},
        {"kind": "noise", "model": "unlearned", "exact_match": 0.5},
    ]
    concluded, over = attacks.conclude(results, test)
    assert "per_question" not in concluded[0]
    assert (concluded[0]["ks_statistic"], concluded[0]["ks_probability_statistic"]) == (1.0, 0.0)
    assert "ks_statistic" not in concluded[1]
    assert concluded[2] == results[2]
    assert over is not None and over["excess"] == 0.0
    assert attacks.conclude(results[2:], test) == (results[2:], None)


def test_without_options_the_ks_test_compares_answer_probabilities() -> None:
    own, reference = per_question([1.0, 2.0], ratio=None), per_question([3.0, 4.0], ratio=None)
    figures = marked.ks_figures(own, reference)
    assert figures["ks_statistic"] == figures["ks_probability_statistic"] == 1.0
