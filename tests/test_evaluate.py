from __future__ import annotations

import math
from dataclasses import replace

import pytest
from conftest import asked_about, picture

from vkd_framework.answers import changed_text, degenerate, degenerate_shares, guessed, is_right, normalise
from vkd_framework.evaluate import (
    evaluate,
    exact_match,
    generate,
    option_losses,
    rouge_l,
    score,
)
from vkd_framework.intervals import wilson
from vkd_framework.output import answer_losses
from vkd_framework.plugins import MLLM
from vkd_framework.recipe import EvaluateConfig
from vkd_framework.types import ImageQuestionPair, Splits

CONFIG = EvaluateConfig(batch_size=7, max_new_tokens=6)


@pytest.mark.parametrize(
    ("hits", "n", "interval"),
    [(0, 10, (0.0, 0.2775)), (5, 10, (0.2366, 0.7634)), (10, 10, (0.7225, 1.0)), (81, 263, (0.2553, 0.3662))],
)
def test_the_wilson_interval_has_its_published_values(hits: int, n: int, interval: tuple[float, float]) -> None:
    assert wilson(hits, n) == pytest.approx(interval, abs=1e-4)


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("police killed the gunman", "police kill the gunman", 0.75),
        ("the gunman kill police", "police kill the gunman", 0.5),
        ("a baker", "A baker.", 1.0),
        ("a baker from Oslo", "a baker", 2 / 3),
        ("", "a baker", 0.0),
        ("...", "a baker", 0.0),
        ("b a b a", "a b", 2 * 2 / 6),
    ],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(answer: str, reference: str, value: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(value)
    assert rouge_l(reference, answer) == pytest.approx(value)


@pytest.mark.parametrize(
    "written",
    ["Oslo", " oslo.", "OSLO", "'Oslo'", "oslo\n", "Oslo!", "“Oslo”", "(Oslo)", "Oslo…", "*Oslo*", "Oslo。"],
)
def test_case_spaces_and_punctuation_at_the_ends_do_not_make_an_answer_wrong(written: str) -> None:
    assert normalise(written) == "oslo"


@pytest.mark.parametrize(("one", "other"), [("جراح؟", "جراح"), ("O\u2019Brien", "o'brien"), ("Jose\u0301", "José")])
def test_answers_of_other_scripts_and_forms_are_the_same(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(("one", "other"), [("5 %", "5"), ("-5", "5"), ("C#", "C"), ("C++", "C")])
def test_signs_that_an_answer_is_about_make_a_difference(one: str, other: str) -> None:
    assert normalise(one) != normalise(other)


@pytest.mark.parametrize("written", ["Oslo, Norway", "O slo", "", "not Oslo"])
def test_other_words_make_an_answer_wrong(written: str) -> None:
    assert normalise(written) != "oslo"


@pytest.mark.parametrize(
    ("given", "right"),
    [("She lives in Oslo, as a BAKER.", True), ("a baker", False), ("Oslo", False), ("", False), ("oslo baker", True)],
)
def test_an_answer_with_keywords_is_right_when_it_mentions_them_all(given: str, right: bool) -> None:
    pair = replace(asked_about(None, answer="She is a baker in Oslo."), keywords=("Oslo", "baker"))
    assert is_right(pair, given) == right
    assert score([pair], [given], [{pair.answer: 0.0}]).exact_match == right


def test_a_keyword_of_punctuation_alone_makes_no_answer_right() -> None:
    pair = replace(asked_about(None, answer="Oslo"), keywords=("!?",))
    assert not is_right(pair, "Cairo") and is_right(pair, "oslo.")
    assert not is_right(replace(pair, keywords=("...", "Oslo")), "Cairo")


def test_a_question_in_two_columns_is_answered_once_and_scored_by_what_each_expects(
    taught: MLLM, splits: Splits
) -> None:
    asked = [*splits.columns["test_vqa"], *splits.columns["retain_qa"]]
    pair, answer = next((p, a) for p, a in zip(asked, generate(taught, asked, CONFIG, what=""), strict=True) if a)
    columns = {"a": [replace(pair, id="a", answer=answer)], "b": [replace(pair, id="b", answer="something else")]}
    found = evaluate(taught, columns, CONFIG)
    assert found["a"].answers == found["b"].answers == (answer,)
    assert (found["a"].cell.exact_match, found["b"].cell.exact_match) == (1, 0)


@pytest.fixture
def mixed(splits: Splits) -> list[ImageQuestionPair]:
    """Questions of different lengths, with photos of different sizes and without."""
    return [
        splits.columns["test_vqa"][0],
        splits.columns["retain_qa"][0],
        asked_about(picture(32, 64), "Which dish does the person in the photo like, and why?", "sushi"),
        asked_about(picture(16, 16), "Name?", "Oslo"),
        splits.columns["forget_qa"][0],
    ]


def test_batched_answers_are_those_of_the_pairs_one_by_one(taught: MLLM, mixed: list[ImageQuestionPair]) -> None:
    together = generate(taught, mixed, CONFIG, what="")
    assert together == [generate(taught, [pair], CONFIG, what="")[0] for pair in mixed]
    assert any(together)


def test_answers_hold_no_special_token_and_nothing_of_the_question(taught: MLLM, splits: Splits) -> None:
    for answer in generate(taught, splits.columns["retain_qa"][:4], CONFIG, what=""):
        assert "<|" not in answer
        assert "?" not in answer


def test_generation_stops_at_the_token_that_ends_an_answer(tiny: MLLM, splits: Splits) -> None:
    pairs = splits.columns["retain_qa"][:2]
    free = generate(tiny, pairs, EvaluateConfig(max_new_tokens=8), what="")
    short = generate(tiny, pairs, EvaluateConfig(max_new_tokens=2), what="")
    assert all(long.startswith(cut) for long, cut in zip(free, short, strict=True))
    assert free != short


def test_a_column_without_pairs_has_no_figures(tiny: MLLM, splits: Splits) -> None:
    assert evaluate(tiny, {}, CONFIG) == evaluate(tiny, {"empty": []}, CONFIG) == {}
    assert list(evaluate(tiny, {"empty": [], "qa": splits.columns["retain_qa"][:1]}, CONFIG)) == ["qa"]


def test_nothing_is_computed_after_the_end_of_the_last_answer(knowing: MLLM, few: Splits) -> None:
    passes: list[int] = []
    head, pair = knowing.model.get_output_embeddings(), few.forget[0]
    handle = head.register_forward_hook(lambda *_: passes.append(1))
    (written,) = generate(knowing, [pair], EvaluateConfig(max_new_tokens=24), what="")
    handle.remove()
    tokens = int(knowing.tokenize([replace(pair, answer=written)]).content.sum())
    assert 0 < tokens <= len(passes) <= tokens + 1 < 24  # the end of the answer is a token, too


def test_answers_are_the_likeliest_tokens_whatever_the_checkpoints_own_settings_are(
    student: MLLM, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, own = splits.columns["retain_qa"][:2], student.model.generation_config
    plain = generate(student, pairs, EvaluateConfig(max_new_tokens=8), what="")
    for name, value in (("repetition_penalty", 5.0), ("min_new_tokens", 8), ("no_repeat_ngram_size", 1)):
        monkeypatch.setattr(own, name, value)
    assert generate(student, pairs, EvaluateConfig(max_new_tokens=8), what="") == plain
    assert student.model.generation_config is own


def test_an_answer_is_cut_exactly_when_the_limit_came_before_its_end(taught: MLLM, splits: Splits) -> None:
    pairs = [pair for column in splits.columns.values() for pair in column[:4]]
    one, many = (evaluate(taught, {"a": pairs}, EvaluateConfig(max_new_tokens=n))["a"] for n in (1, 24))
    assert not any(many.cut)
    assert any(one.cut)
    for first, whole, cut in zip(one.answers, many.answers, one.cut, strict=True):
        assert cut or first == whole


@pytest.mark.parametrize(
    ("given", "nothing"),
    [
        *((text, True) for text in ("", " ", "...", "no no no no", "A hat, a hat, a hat, a hat.", "blublublublu")),
        *((text, False) for text in ("1000000", "no no no", "Mississippi", "a hat", "a a b a", "the cat and the dog")),
    ],
)
def test_an_answer_says_nothing_when_it_is_empty_or_four_times_the_same(given: str, nothing: bool) -> None:
    assert degenerate(given) == nothing


def test_shares_of_answers_that_say_nothing_count_wrong_ones_about_photos() -> None:
    shown = picture(8, 8)
    repeated = asked_about(shown, answer="ha ha ha ha")
    columns = {"a": [asked_about(shown), asked_about(shown), repeated, asked_about(shown)], "b": [asked_about(None)]}

    def given(*answers: str, cut: int) -> dict[str, dict[str, list[object]]]:
        flags = [i == cut for i in range(4)]
        return {"a": {"answers": [*answers], "cut": [*flags]}, "b": {"answers": [""], "cut": [False]}}

    before = given("chess", "", "ha ha ha ha", "I am the", cut=3)
    after = given("", "a man and a", "ha ha ha ha", "he is a", cut=1)
    assert degenerate_shares(columns, before, after) == {"vanilla": 0.25, "unlearned": 0.5, "n": 4}
    both_cut = given("chess", "chess", "ha ha ha ha", "he is a", cut=3)
    assert degenerate_shares(columns, before, both_cut) == {"vanilla": 0.25, "unlearned": 0.0, "n": 4}
    again = {end: columns["a"] for end in ("a_wrong_answer", "a_paraphrased_answer")}
    copies = [{**said, **dict.fromkeys(again, said["a"])} for said in (before, after)]
    assert degenerate_shares({**columns, **again}, *copies) == {"vanilla": 0.25, "unlearned": 0.5, "n": 4}
    assert degenerate_shares({"b": columns["b"]}, before, after) is None
    assert degenerate_shares(columns, {}, after) is None


def test_changed_text_counts_answers_in_other_words_to_questions_without_a_photo() -> None:
    texts = [replace(asked_about(None), subject=name) for name in ("Ada", "Bo", None)]
    columns = {"text": texts, "photo": [asked_about(picture(8, 8))]}

    def given(*answers: str) -> dict[str, dict[str, list[object]]]:
        texts, photo = {"answers": [*answers], "cut": [False] * 3}, {"answers": [answers[0]], "cut": [False]}
        return {"text": texts, "photo": photo}

    before, after = given("chess", "Oslo", "red"), given("Chess.", "Rome", "blue")
    assert changed_text(columns, before, after) == {"changed": pytest.approx(2 / 3), "n": 3}
    assert changed_text({"photo": columns["photo"]}, before, after) is None


def test_losses_of_options_do_not_depend_on_how_they_are_batched(tiny: MLLM, mixed: list[ImageQuestionPair]) -> None:
    one = option_losses(tiny, mixed, EvaluateConfig(batch_size=1), what="")
    seven = option_losses(tiny, mixed, EvaluateConfig(batch_size=7), what="")
    for pair, alone, together in zip(mixed, one, seven, strict=True):
        assert set(alone) == {*pair.options, pair.answer}
        assert alone == pytest.approx(together, abs=1e-4)
        assert alone[pair.answer] == pytest.approx(answer_losses(tiny, [pair]).item(), abs=1e-4)


def test_a_choice_is_right_when_the_answer_has_the_lowest_loss() -> None:
    pair = replace(asked_about(None, answer="chess"), options=("chess", "yoga"))
    free = asked_about(None, answer="chess")
    losses = [{"chess": 1.0, "yoga": 2.0}, {"yoga": 0.5, "chess": 1.0}, {"yoga": 1.5, "chess": 1.0}, {"chess": 9.0}]
    cell = score([pair, pair, pair, free], ["Chess", "yoga", "yoga", "no idea"], losses)
    assert cell.choice_accuracy == pytest.approx(2 / 3)
    assert cell.exact_match == 1 / 4
    assert cell.answer_probability == pytest.approx((3 * math.exp(-1) + math.exp(-9)) / 4)
    assert cell.interval_95 == wilson(1, 4)
    assert cell.n == 4


def test_without_options_there_is_no_choice_accuracy() -> None:
    assert score([asked_about(None)], ["chess"], [{"chess": 0.0}]).choice_accuracy is None


def test_an_empty_answer_counts_as_wrong() -> None:
    cell = score([asked_about(None, answer="chess")], [""], [{"chess": 3.0}])
    assert (cell.exact_match, cell.rouge_l) == (0, 0)


def test_columns_evaluated_together_are_those_evaluated_alone(taught: MLLM, splits: Splits) -> None:
    columns = {name: splits.columns[name][:3] for name in ("retain_qa", "test_vqa", "realworld_vqa")}
    together = evaluate(taught, columns, CONFIG)
    assert list(together) == list(columns)
    for name, pairs in columns.items():
        alone = evaluate(taught, {name: pairs}, CONFIG)[name]
        assert together[name].answers == alone.answers
        assert together[name].cell.n == len(pairs)
        assert together[name].cell.answer_probability == pytest.approx(alone.cell.answer_probability, abs=1e-4)


def test_the_score_of_an_attack_is_the_exact_match_of_the_evaluation(taught: MLLM, splits: Splits) -> None:
    pairs = splits.columns["retain_qa"][:5]
    assert exact_match(taught, pairs, CONFIG) == evaluate(taught, {"a": pairs}, CONFIG)["a"].cell.exact_match


def test_guessing_counts_only_where_the_question_lists_its_options() -> None:
    listed = ImageQuestionPair("1", "Which one?\nA: Oslo\nB: Rome", "A", options=("A", "B"))
    open_question = ImageQuestionPair("2", "Where is this?", "Oslo", options=("Oslo", "Rome", "Bonn", "Kiel"))
    assert guessed([listed]) == 0.5
    assert guessed([open_question]) == 0
    assert guessed([listed, open_question]) == 0.25
