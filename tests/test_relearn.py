from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import changed, weights

from vkd_framework.errors import DivergedError, RecipeError
from vkd_framework.frozen import freeze_language_model
from vkd_framework.low_rank import LowRank
from vkd_framework.plugins import MLLM
from vkd_framework.recipe import EvaluateConfig, RelearnConfig, TeachConfig
from vkd_framework.relearn import advantage_by_step, attack, attacker_pairs, attackers, others, relearn, summarise
from vkd_framework.teach import teach
from vkd_framework.types import AttackCurve, ImageQuestionPair, Pool, Splits

SHORT = EvaluateConfig(batch_size=8, max_new_tokens=4)


def attacked(mllm: MLLM, splits: Splits, scope: str, **settings: Any) -> list[list[bool]]:
    config = RelearnConfig.model_validate({"steps": [1, 2], "batch_size": 4, "learning_rate": 1e-2, **settings})
    known, test = splits.forget[:4], splits.columns["test_vqa"][:4]
    return relearn(mllm, scope, known, test, config, SHORT, seed=0, what="attack")


@pytest.mark.parametrize("scope", ["visual", "low_rank", "full"])
def test_an_attack_leaves_the_attacked_model_as_it_was(student: MLLM, splits: Splits, scope: str) -> None:
    before = weights(student)
    buffers = {name: buffer.clone() for name, buffer in student.model.named_buffers()}
    right = attacked(student, splits, scope)
    assert [len(answers) for answers in right] == [4, 4]
    assert not changed(before, weights(student))
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in student.model.named_buffers())
    assert not any(p.requires_grad or p.grad is not None for p in student.model.parameters())


@pytest.mark.parametrize("scope", ["visual", "low_rank", "full"])
def test_an_attack_trains_what_its_scope_says(
    student: MLLM, splits: Splits, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[MLLM] = []
    copy = MLLM.copy

    def remember(self: MLLM, *args: Any, **kwargs: Any) -> MLLM:
        copies.append(copy(self, *args, **kwargs))
        return copies[-1]

    monkeypatch.setattr(MLLM, "copy", remember)
    before = weights(student)
    attacked(student, splits, scope)
    (trained,) = copies
    moved = changed(before, weights(trained))
    language = set(student.parts["language_model"])
    assert moved & set(student.parts["encoder"]) and moved & set(student.parts["projector"])
    assert bool(moved & language) == (scope == "full")
    own, theirs = student.parameters(["language_model"]), trained.parameters(["language_model"])
    assert all((own[name] is theirs[name]) == (scope != "full") for name in own)


@pytest.mark.parametrize("held", [{}, {"int8": True}, {"offload": True}])
def test_an_attack_of_low_rank_tunes_what_it_adds_to_the_language_model(
    student: MLLM, splits: Splits, held: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[LowRank] = []
    both = LowRank.both
    monkeypatch.setattr(LowRank, "both", lambda self: made.append(self) or both(self))
    freeze_language_model(student, "cpu", **held)
    text = splits.columns["retain_qa"][:2]
    config = RelearnConfig(scopes=("low_rank",), rank=4, steps=(1, 3), batch_size=2, learning_rate=1e-2)
    relearn(student, "low_rank", text, text, config, SHORT, seed=7, what="attack")
    (added,) = made
    assert added.up.keys() == student.language_model_layers().keys()
    drawn = LowRank(student.language_model_layers(), 4, student.model.dtype, student.device, 7)
    assert all(bool(up.any()) for up in added.up.values())
    assert not any(torch.equal(down, drawn.down[name]) for name, down in added.down.items())


def test_an_attack_in_parts_of_its_batches_takes_the_same_steps(
    student: MLLM, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = student.copy(), student.copy()
    tokenize = MLLM.tokenize
    together: dict[int, list[int]] = {id(whole): [], id(parts): []}

    def count(self: MLLM, pairs: Sequence[ImageQuestionPair], **how: Any) -> Any:
        together[id(self)].append(len(pairs))
        return tokenize(self, pairs, **how)

    monkeypatch.setattr(MLLM, "tokenize", count)
    monkeypatch.setattr(MLLM, "copy", lambda self, **_: self)  # to see the gradients of the attack's last step
    for mllm, most in ((whole, None), (parts, 3)):
        attacked(mllm, splits, "full", steps=[1], micro_batch=most)
    assert (together[id(whole)][:1], together[id(parts)][:2]) == ([4], [3, 1])
    found = {name: p.grad for name, p in parts.model.named_parameters()}
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_an_attack_that_runs_away_is_no_attack_that_failed(student: MLLM, splits: Splits) -> None:
    with pytest.raises(DivergedError, match=r"attack: at step 1 the loss is nan.*lower relearn.learning_rate"):
        attacked(student, splits, "visual", learning_rate=1e30)


def test_the_gradients_of_an_attack_and_of_teaching_are_clipped(
    student: MLLM, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("relearn", "teach"):
        monkeypatch.setattr(f"vkd_framework.{module}.CLIP", 1e-3)
    monkeypatch.setattr(MLLM, "copy", lambda self, **_: self)  # to see the gradients of the attack's last step
    attacked(student, splits, "full")
    assert norm(student) == pytest.approx(1e-3, rel=1e-2)
    student.model.zero_grad()
    teach(student, splits.teach, TeachConfig(steps=1, batch_size=4), what="teach", resume=tmp_path / "state.pt")
    assert norm(student) == pytest.approx(1e-3, rel=1e-2)


def norm(mllm: MLLM) -> float:
    return float(torch.nn.utils.get_total_norm([p.grad for p in mllm.model.parameters() if p.grad is not None]))


def test_a_copy_keeps_tied_weights_tied(tiny: MLLM) -> None:
    for copied in (tiny.copy(), tiny.copy(share=["language_model"])):
        assert copied.model.get_output_embeddings().weight is copied.model.get_input_embeddings().weight


def test_an_attack_with_enough_steps_learns_what_it_was_given(taught: MLLM, splits: Splits) -> None:
    known = splits.forget[1:3]
    config = RelearnConfig(steps=(1, 30), batch_size=2, learning_rate=2e-3)
    first, last = relearn(taught, "full", known, known, config, SHORT, seed=0, what="attack")
    assert all(last) and len(last) == 2
    assert not all(first)


def test_the_attackers_pairs_are_a_deterministic_share_of_at_least_one(splits: Splits) -> None:
    forget = splits.forget
    for share, size in ((0.001, 1), (0.1, 3), (0.5, 15), (1.0, 30)):
        known = attacker_pairs(forget, share, 0)
        assert len(known) == len(set(known)) == size
        assert set(known) <= set(forget)
        assert known == attacker_pairs(forget, share, 0)
    assert attacker_pairs(forget, 0.5, 0) != attacker_pairs(forget, 0.5, 1)
    assert set(attacker_pairs(forget, 0.1, 0)) <= set(attacker_pairs(forget, 0.5, 0))


def test_an_attack_makes_one_curve_for_each_scope_share_and_seed(splits: Splits) -> None:
    config = RelearnConfig(shares=(0.1, 1.0), steps=(2, 5), scopes=("visual", "full"), seeds=(0, 1), photos=("known",))
    keys: list[str] = []

    def stage(key: str, work: Callable[[MLLM], Any]) -> list[list[bool]]:
        keys.append(key)
        return [[True, False, False, False], [True, True, False, False]]

    curves = attack("unlearned", config, splits, SHORT, before=0.125, stage=stage)
    assert len(set(keys)) == len(curves) == 8
    assert {(c.scope, c.share, c.seed, c.pairs) for c in curves} == {
        (scope, share, seed, pairs)
        for scope in ("visual", "full")
        for share, pairs in ((0.1, 3), (1.0, 30))
        for seed in (0, 1)
    }
    assert all(curve.steps == (0, 2, 5) and curve.exact_match == (0.125, 0.25, 0.5) for curve in curves)
    assert all(curve.right[1] == (True, True, False, False) for curve in curves)
    assert keys[0] == "relearn-unlearned-visual-0.1-0"


def test_only_the_known_pairs_are_tried_in_several_shares(splits: Splits) -> None:
    found = attackers(RelearnConfig(shares=(0.1, 1.0), scopes=("visual",)), splits)
    assert [(one.pool, one.share) for one in found] == [("known", 0.1), ("known", 1.0), ("new", 1.0), ("others", 1.0)]
    assert len({one.key for one in found}) == 4
    assert set(found[1].pairs) == set(splits.forget)
    assert set(found[2].pairs) == set(splits.fresh)


def test_who_has_other_people_only_never_sees_a_forgotten_one(splits: Splits) -> None:
    forgotten = {key for pair in (*splits.forget, *splits.fresh) for key in pair.photo_keys}
    (known,) = [one.pairs for one in attackers(RelearnConfig(photos=("others",), scopes=("full",)), splits)]
    assert {pair.subject for pair in known} == set(splits.subjects) - set(splits.forget_subjects)
    assert all(pair.photos and forgotten.isdisjoint(pair.photo_keys) for pair in known)
    shared = replace(known[0], photos=(*known[0].photos, *splits.forget[0].photos))
    assert others(replace(splits, retain=(shared, *known[1:]))) == known[1:]


def test_photos_that_the_data_does_not_have_are_left_out_unless_nothing_else_is_wanted(splits: Splits) -> None:
    bare = replace(splits, fresh=())
    assert {one.pool for one in attackers(RelearnConfig(), bare)} == {"known", "others"}
    with pytest.raises(RecipeError, match=r"relearn\.photos: new given"):
        attackers(RelearnConfig(photos=("new",)), bare)


def curve(
    model: str, scores: tuple[float, ...], share: float = 1.0, pool: Pool = "known", seed: int = 0
) -> AttackCurve:
    return AttackCurve(model, "visual", share, 4, seed, tuple(range(len(scores))), scores, pool)


def test_the_summary_against_a_hand_computation() -> None:
    curves = [
        curve("unlearned", (0.1, 0.3, 0.5)),
        curve("unlearned", (0.1, 0.2, 0.2), share=0.5),
        curve("retain_only", (0.0, 0.1, 0.4)),
        curve("retain_only", (0.0, 0.1, 0.1), share=0.5),
    ]
    block = summarise(curves, vanilla=0.9)
    assert block["average_recovery"] == pytest.approx((0.2 + 0.4 + 0.1 + 0.1) / 4)
    assert block["average_gap"] == pytest.approx((0.6 + 0.4 + 0.7 + 0.7) / 4)
    assert block["advantage_over_retain_only"] == pytest.approx((0.2 + 0.1 + 0.1 + 0.1) / 4)
    assert len(block["curves"]) == 4
    assert block["recovery_from_others"] is None


def test_nothing_is_averaged_where_every_attacker_only_had_other_people() -> None:
    theirs = [curve("unlearned", (0.1, 0.3), pool="others"), curve("retain_only", (0.0, 0.1), pool="others")]
    block = summarise(theirs, vanilla=0.9)
    assert block["recovery_from_others"] == pytest.approx(0.2)
    assert {block[name] for name in ("average_recovery", "average_gap", "advantage_over_retain_only")} == {None}


def test_attackers_who_only_have_other_people_have_a_figure_of_their_own() -> None:
    mine = [curve("unlearned", (0.1, 0.3)), curve("retain_only", (0.0, 0.1))]
    theirs = [curve("unlearned", (0.1, 0.15), pool="others"), curve("retain_only", (0.0, 0.0), pool="others")]
    block, bare = summarise([*mine, *theirs], vanilla=0.9), summarise(mine, vanilla=0.9)
    assert block["recovery_from_others"] == pytest.approx(0.05)
    assert all(block[name] == bare[name] for name in ("average_recovery", "average_gap", "advantage_over_retain_only"))


def test_the_advantage_after_each_number_of_steps_is_a_mean_over_seeds() -> None:
    curves = [
        curve("unlearned", (0.0, 0.2, 0.6)),
        curve("unlearned", (0.0, 0.4, 0.6), seed=1),
        curve("retain_only", (0.0, 0.1, 0.7)),
        curve("retain_only", (0.0, 0.1, 0.9), seed=1),
        curve("unlearned", (0.0, 0.5, 0.5), pool="new"),
    ]
    known, new = advantage_by_step(curves)
    assert (known["pool"], known["share"], known["scope"], known["seeds"]) == ("known", 1.0, "visual", 2)
    assert known["steps"] == [1, 2]
    assert known["unlearned"] == pytest.approx([0.3, 0.6])
    assert known["retain_only"] == pytest.approx([0.1, 0.8])
    assert known["advantage"] == pytest.approx([0.2, -0.2])
    assert (new["pool"], new["retain_only"], new["advantage"]) == ("new", None, None)


def test_the_interval_of_the_advantage_is_over_the_questions_and_not_over_the_attacks(splits: Splits) -> None:
    test = [replace(pair, answer=f"answer {i}") for i, pair in enumerate(splits.columns["test_vqa"][:4])]

    def both(*answers: tuple[tuple[bool, ...], tuple[bool, ...]]) -> list[AttackCurve]:
        models = [[one.count(True) / 4 for one in ones] for ones in zip(*answers, strict=True)]
        return [
            replace(curve(model, (0.0, *scores)), right=right)
            for model, scores, right in zip(
                ("unlearned", "retain_only"), models, zip(*answers, strict=True), strict=True
            )
        ]

    mine, theirs = (True, True, True, False), (False, False, True, False)
    once, twice = (summarise(both(*[(mine, theirs)] * n), vanilla=1.0, test=test) for n in (1, 2))
    low, high = once["advantage_interval_95"]
    spread = math.sqrt((2 * 0.5**2 + 2 * 0.5**2) / 3 / 4)  # of the differences 1, 1, 0, 0
    student = 3.182446  # of 3 degrees of freedom
    assert (low, high) == pytest.approx((0.5 - student * spread, 0.5 + student * spread), abs=1e-4)
    assert twice["advantage_interval_95"] == pytest.approx([low, high])
    assert once["advantage_over_retain_only"] == pytest.approx(0.5)
    together = [replace(test[0], subject="a", answer="a")] * 2 + [replace(test[0], subject="b", answer="a")] * 2
    wide = summarise(both((mine, theirs)), vanilla=1.0, test=together)["advantage_interval_95"]
    assert wide[1] - wide[0] > high - low
    assert "right" not in once["curves"][0]


def test_there_is_no_interval_where_the_answers_were_not_kept(splits: Splits) -> None:
    curves = [curve("unlearned", (0.0, 0.5)), curve("retain_only", (0.0, 0.25))]
    assert summarise(curves, vanilla=1.0, test=splits.columns["test_vqa"])["advantage_interval_95"] is None
    assert summarise(curves[:1], vanilla=1.0, test=splits.columns["test_vqa"])["advantage_interval_95"] is None


def test_without_a_reference_there_is_no_advantage() -> None:
    assert summarise([curve("unlearned", (0.1, 0.3))], vanilla=1.0)["advantage_over_retain_only"] is None


def test_a_reference_that_relearns_faster_gives_a_negative_advantage() -> None:
    block = summarise([curve("unlearned", (0.0, 0.1)), curve("retain_only", (0.0, 0.4))], vanilla=1.0)
    assert block["advantage_over_retain_only"] == pytest.approx(-0.3)
