from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from reported import HISTORY, NAME, NASTY, Page, cell, page, sample, text_page

from vkd_framework.report import render_model_card, terminal_table, verdict_text
from vkd_framework.report.attack import gather_attacks
from vkd_framework.report.charts import attack_chart, history_table, history_terms, nice_ticks
from vkd_framework.report.findings import attack_sentence, cost_rows, proof_rows, summary
from vkd_framework.report.formatting import ABSENT, duration, percent, points, size
from vkd_framework.report.gallery import ANSWERS_PER_PERSON, PEOPLE_SHOWN, build_gallery
from vkd_framework.report.people import people_rows
from vkd_framework.report.trials import over_forgotten_sentence, trial_models, trial_rows
from vkd_framework.types import AttackCurve, Sample, Splits


def test_the_summary_states_the_numbers_and_names_no_success(metrics: dict[str, Any]) -> None:
    text = " ".join(summary(metrics)).replace("\N{NO-BREAK SPACE}", " ")
    for part in (
        "gave 97.4 % exact answers before unlearning and 2.1 % after it (95 % interval 0.0 to 12.1 %)",
        "a model that never knew them gives 4.2 %",
        "questions about everybody else went from 96.2 % to 95.1 %",
        "stayed at 100.0 %",
        "Text-only answers are bit-identical",
        "changed by +18.4 points on average. It then scores 9.3 points less than",
    ):
        assert part in text
    assert not re.search(r"success|excellent|robust|perfect|only \d", text, re.IGNORECASE)


@pytest.mark.parametrize(
    ("unseen", "said"),
    [
        ({"test_vqa": ["photos", "phrasings"]}, "photos and phrasings"),
        ({"test_vqa": ["photos"]}, "photos"),
        ({"test_vqa": ["phrasings"]}, "phrasings"),
        ({"test_vqa": []}, "pairs of photo and question"),
        (None, "photos"),
    ],
)
def test_only_what_unlearning_never_saw_is_called_unseen(
    metrics: dict[str, Any], unseen: dict[str, list[str]] | None, said: str
) -> None:
    metrics |= {} if unseen is None else {"unseen": unseen}
    card = render_model_card(metrics, base_model="x", environment={}, forget_count=1)
    for text in (Page(page(metrics)).words, text_page(metrics), card):
        assert f"Asked about the forgotten people on {said} that unlearning never saw (Test VQA" in text
        assert f"The forgotten people, on {said} that unlearning never saw." in text
        assert f"is then scored on {said} that the attack did not use" in text
        assert "Everybody else, on photos that unlearning never saw." in text


def test_the_summary_says_when_text_answers_differ_and_checks_fail(metrics: dict[str, Any]) -> None:
    metrics["proofs"] |= {"text_only_max_logit_difference": 1e-6, "reload_identical": False}
    text = " ".join(summary(metrics))
    assert "NOT bit-identical (largest logit difference 1e\N{MINUS SIGN}06)" in text
    assert "Failed checks: Text-only answers are bit-identical; The saved model is the measured model." in text


@pytest.mark.parametrize(
    ("advantage", "said"),
    [(0.05, "5.0 points more than"), (-0.05, "5.0 points less than"), (0.0, "equally"), (None, "not known")],
)
def test_recovery_is_compared_with_a_model_that_never_knew(
    metrics: dict[str, Any], advantage: float | None, said: str
) -> None:
    metrics["relearn"]["advantage_over_retain_only"] = advantage
    assert said in attack_sentence(metrics)


def test_an_attack_by_people_who_have_no_pairs_of_the_forgotten_is_told_as_such(metrics: dict[str, Any]) -> None:
    metrics["relearn"] |= {"average_recovery": None, "recovery_from_others": 0.25}
    assert attack_sentence(metrics).startswith("Under attackers who only had other people, exact match on Test VQA")


def test_the_verdict_is_the_first_thing_that_report_and_model_card_say(metrics: dict[str, Any]) -> None:
    sentence, further = "Hidden: it comes back & <fast>.", "Damaged: \N{NO-BREAK SPACE}others too."
    metrics["verdict"] = {"kind": "hidden", "sentence": sentence, "reasons": [further]}
    parsed = Page(page(metrics))
    assert parsed.mistakes == []
    assert parsed.words.index(f"{metrics['recipe']} {sentence}") < parsed.words.index("Method")
    assert parsed.every("div")[0] == {"class": "outcome hidden"}
    markdown = text_page(metrics).split("\n\n")
    card = render_model_card(metrics, base_model="x", environment={}, forget_count=1).split("\n\n")
    for parts in (markdown, card[card.index("# Unlearned model") :]):
        assert parts[1:3] == ["**Hidden: it comes back &amp; &lt;fast&gt;.**", "Damaged: others too."]
    assert verdict_text(metrics) == f"{sentence}\nDamaged:  others too."
    del metrics["verdict"]
    assert "outcome" not in [a.get("class") for a in Page(page(metrics)).every("div")]
    assert "**" not in text_page(metrics).split("## Summary")[0]


def test_the_summary_tells_how_long_the_retain_floor_stopped_forgetting(metrics: dict[str, Any]) -> None:
    metrics["retain_floor"] = {"floor": 0.9, "steps_below": 0, "steps": 400}
    assert not [sentence for sentence in summary(metrics) if "repaired" in sentence]
    metrics["retain_floor"]["steps_below"] = 100
    (sentence,) = (sentence for sentence in summary(metrics) if "repaired" in sentence)
    assert "For 100 of 400 steps" in sentence and "less than 90.0" in sentence


def test_a_proof_passes_only_with_evidence(metrics: dict[str, Any]) -> None:
    metrics["proofs"] = {
        "text_only_max_logit_difference": float("nan"),
        "frozen_parameters_identical": False,
        "masked_parameters_identical": None,
    }
    assert [proof.status for proof in proof_rows(metrics)] == ["FAILED", "FAILED", "not applicable", "not applicable"]
    shown = Page(page(metrics)).words
    assert shown.count("FAILED") == 2
    assert "Without a mask, or with mask scope “forget”, every tuned weight may move." in shown
    assert "Not measured in this run." in shown


def test_a_run_without_retain_only_reference_shows_two_models(
    metrics: dict[str, Any], curves: list[AttackCurve]
) -> None:
    del metrics["models"]["retain_only"]
    metrics["relearn"]["advantage_over_retain_only"] = None
    alone = [curve for curve in curves if curve.model == "unlearned"]
    for text in (Page(page(metrics, alone)).words, text_page(metrics, alone), terminal_table(metrics)):
        assert "Unlearned" in text and "Retain-only" not in text
    assert "no reference" in text_page(metrics, alone)


def test_a_column_without_options_shows_a_dash_instead_of_zero(metrics: dict[str, Any]) -> None:
    rows = [line for line in text_page(metrics).splitlines() if line.startswith("| Real-world VQA | Unlearned")]
    assert [row.split(" | ")[4] for row in rows] == ["–"]  # noqa: RUF001 - an en dash is meant


def test_what_vanilla_was_taught_stands_below_the_columns_when_known(metrics: dict[str, Any]) -> None:
    assert "Vanilla knows everybody" not in page(metrics)
    metrics["taught"] = {"test_vqa_all_people": cell(0.965, None, 544)}
    words = Page(page(metrics)).words
    assert words.index("Forget QA The") < words.index("Vanilla knows everybody: asked about all people")
    assert "Vanilla knows everybody" in text_page(metrics)


def test_each_forgotten_person_has_a_row_of_their_own(metrics: dict[str, Any], splits: Splits) -> None:
    still_known, gone = splits.forget_subjects
    asked = splits.columns["test_vqa"]
    before = [pair.answer for pair in asked]
    after = [pair.answer if pair.subject == still_known else "no idea" for pair in asked]
    columns = {model: {"test_vqa": {"answers": given}} for model, given in (("vanilla", before), ("unlearned", after))}
    rows = people_rows(splits, columns)
    trained, n = len(splits.forget) // 2, len(asked) // 2
    everything, nothing = "100.0\N{NO-BREAK SPACE}%", "0.0\N{NO-BREAK SPACE}%"
    assert rows == [
        (still_known, str(trained), str(n), everything, everything),
        (gone, str(trained), str(n), everything, nothing),
    ]
    unmeasured = replace(splits, columns={"test_vqa": ()}, forget_subjects=(NASTY,))
    nobody = {model: {"test_vqa": {"answers": []}} for model in columns}
    assert people_rows(unmeasured, nobody) == [(NASTY, "0", "0", ABSENT, ABSENT)]
    rows += people_rows(unmeasured, nobody)
    shown = Page(page(metrics, people=rows))
    assert shown.mistakes == [] and not shown.every("script")
    assert "".join(rows[1]) in shown.text
    assert f"| {gone} | {trained} | {n} | 100.0 % | 0.0 % |" in text_page(metrics, people=rows)
    assert "Each forgotten person" not in page(metrics) + text_page(metrics)


def test_what_the_attacker_had_is_told_and_kept_apart(metrics: dict[str, Any]) -> None:
    curves = [
        AttackCurve(model, "visual", 1.0, pairs, 0, (0, 10), (0.0, score), pool)
        for model, score in (("unlearned", 0.5), ("retain_only", 0.2))
        for pool, pairs in (("others", 9), ("new", 7), ("known", 8))
    ]
    attacks = gather_attacks(curves)
    assert [(attack.pool, len(attack.lines)) for attack in attacks] == [("known", 2), ("new", 2), ("others", 2)]
    known = [attack.known.replace("\N{NO-BREAK SPACE}", " ") for attack in attacks]
    assert known == [
        "100 % of the forget set (8 pairs)",
        "new photos of the forgotten (7 pairs)",
        "other people only (9 pairs)",
    ]
    assert (attacks[0].advantage_at(10), attacks[0].advantage_at(0)) == ("+30.0 points", "")
    for shown in (Page(page(metrics, curves)).words, text_page(metrics, curves)):
        assert "new photos of the forgotten" in shown and "+30.0 points" in shown
    alone = gather_attacks([curve for curve in curves if curve.model == "unlearned"])
    assert not alone[0].compared


TRIED: list[dict[str, Any]] = [
    *(
        {"kind": "quantize", "options": {"bits": bits}, "model": model, "exact_match": 0.1, "retain_exact_match": 0.9}
        for model in ("vanilla", "unlearned")
        for bits in (8, 4)
    ),
    {"kind": "module_restore", "options": {"parts": ["encoder"]}, "model": "unlearned", "exact_match": 0.25},
    {"kind": "in_context", "options": {"examples": 2}, "model": "vanilla", "skipped": "one photo only"},
    {"kind": "probe", "options": {}, "model": "vanilla", "chance": 0.03, "projector_linear": 0.5},
    {"kind": "membership", "options": {}, "model": "unlearned", "loss_auc": 0.25, "ks_statistic": 0.7, "ks_p": 3e-18},
]


def test_every_other_attack_has_its_rows_with_a_figure_for_each_model(metrics: dict[str, Any]) -> None:
    rows = {row.label.replace("\N{NO-BREAK SPACE}", " "): row for row in trial_rows({"attacks": TRIED})}
    assert list(rows) == [
        "Vanilla's encoder put back",
        "Weights rounded to 8 bits",
        "Weights rounded to 4 bits",
        "Linear probe on the projector, chance 3.0 %",
        "After 2 other photos with answers",
        "Membership by answer loss, AUC",
        "Truth ratios against retain-only, KS",
    ]
    shown = [row.value("unlearned").replace("\N{NO-BREAK SPACE}", " ") for row in rows.values()]
    dash = "\N{EN DASH}"
    rounded = "10.0 % (Retain VQA 90.0 %)"
    assert shown == ["25.0 %", rounded, rounded, dash, dash, "0.250", "0.700, p = 3e\N{MINUS SIGN}18"]
    assert "Not possible: one photo only." in rows["After 2 other photos with answers"].meaning
    assert trial_models(list(rows.values())) == ["vanilla", "unlearned"]
    metrics |= {
        "attacks": TRIED,
        "over_forgotten": {"loss": 9.0, "expected": 5.0, "excess": 4.0, "against": "retain_only"},
    }
    for source in (page(metrics), text_page(metrics)):
        assert "Other attacks" in source and "Weights rounded to 4 bits" in source
        assert "9 nats a token; that of a model that never knew them is 5." in source
    assert Page(page(metrics)).mistakes == []


@pytest.mark.parametrize("flag", [True, False])
def test_a_model_that_answers_worse_than_one_that_never_knew_is_said_to_be_over_forgotten(flag: bool) -> None:
    found = {"loss": 9.0, "expected": 5.0, "excess": 4.0, "against": "vanilla_on_strangers", "over_forgotten": flag}
    text = over_forgotten_sentence({"over_forgotten": found})
    assert ("measurably worse: a trace" in text, "not measurably worse" in text) == (flag, not flag)
    assert "when the same is asked about strangers is 5." in text
    assert over_forgotten_sentence({}) == ""


def test_attack_curves_are_averaged_over_seeds_and_ordered_by_strength(curves: list[AttackCurve]) -> None:
    attacks = gather_attacks(curves)
    assert [(attack.scope, attack.share) for attack in attacks] == [
        ("visual", 0.05),
        ("visual", 1.0),
        ("full", 0.05),
        ("full", 1.0),
    ]
    line = attacks[0].lines[0]
    assert (line.model, line.seeds) == ("unlearned", 2)
    assert line.lowest == pytest.approx((0.02, 0.2, 0.4))
    assert line.mean == pytest.approx((0.02, 0.3, 0.5))
    assert line.highest == pytest.approx((0.02, 0.4, 0.6))


def test_seeds_scored_at_different_steps_and_broken_values_are_still_drawn(metrics: dict[str, Any]) -> None:
    uneven = [
        AttackCurve("unlearned", "visual", 0.1, 1, 0, (0, 10), (0.0, 0.5)),
        AttackCurve("unlearned", "visual", 0.1, 1, 1, (0, 20), (0.0, float("nan"))),
        AttackCurve("retain_only", "visual", 0.1, 1, 0, (), ()),
    ]
    line = gather_attacks(uneven)[0].lines[0]
    assert (line.steps, line.mean) == ((0, 10), (0.0, 0.5))
    parsed = Page(page(metrics, uneven))
    assert parsed.mistakes == []
    assert "nan" not in " ".join(str(value) for _, attributes in parsed.tags for value in attributes.values())


def test_a_chart_puts_more_recovery_higher_and_vanilla_at_its_exact_match(curves: list[AttackCurve]) -> None:
    chart = attack_chart(gather_attacks(curves)[0], 1.0)
    heights = [y for _, y in chart.lines[0].markers]
    assert heights == sorted(heights, reverse=True) and heights[0] > heights[-1]
    assert chart.baseline == min(tick.at for tick in chart.y_ticks)
    assert attack_chart(gather_attacks(curves)[0], None).baseline is None


def test_history_keeps_loss_terms_and_leaves_counters_and_texts_out(metrics: dict[str, Any]) -> None:
    assert history_terms(HISTORY) == ["forget_output"]
    rows = history_table([{"step": step, "term": float(step)} for step in range(1000)])
    assert (rows[0], rows[1], rows[-1], len(rows)) == (("step", "term"), ("0", "0"), ("999", "999"), 13)
    assert "<figcaption>forget_output</figcaption>" in page(metrics, history=HISTORY)
    strange = [{"step": "one", "a": 1}, {"b": 2}, {"step": 1, "c": float("inf"), "d": [1]}]
    assert Page(page(metrics, history=strange)).mistakes == []


def test_ticks_are_round_and_stay_inside() -> None:
    assert nice_ticks(0, 80, whole=True) == [0, 20, 40, 60, 80]
    assert nice_ticks(0, 0.3) == [0, 0.1, 0.2, 0.3]
    assert nice_ticks(5, 5) == [5]


def test_the_gallery_spreads_a_handful_over_the_columns(metrics: dict[str, Any]) -> None:
    many = [sample("forget_vqa", "A", shown=None) for _ in range(9)] + [sample("forget_qa", "A", shown=None)]
    answers = build_gallery(many).forgotten[0].answers
    assert len(answers) == ANSWERS_PER_PERSON
    assert {answer.column for answer in answers} == {"Forget VQA", "Forget QA"}
    crowd = [sample("test_vqa", f"Person {index}", shown=None) for index in range(PEOPLE_SHOWN + 3)]
    assert "3 more forgotten people are not shown." in page(metrics, (), crowd)


def test_answers_are_marked_in_words(metrics: dict[str, Any], samples: list[Sample]) -> None:
    words = Page(page(metrics, (), samples)).words
    assert "Before yes right After no wrong" in words
    assert "Before yes right After Yes. right" in words
    silent = [sample("forget_vqa", NAME, after="", shown=None)]
    assert "After (empty answer) wrong" in Page(page(metrics, (), silent)).words


def test_the_terminal_table_fits_a_hundred_characters_and_stays_ascii(metrics: dict[str, Any]) -> None:
    for model in metrics["models"].values():
        model["a_column_with_a_very_long_name"] = cell(1.0, 1.0)
    table = terminal_table(metrics)
    assert max(map(len, table.splitlines())) <= 100
    assert table.isascii()
    assert re.search(r"^Test VQA +97\.4 +87\.4-100\.0 +50\.0 +2\.1 +0\.0-12\.1 +50\.0", table, re.MULTILINE)


def test_parts_of_a_column_are_shown_after_it_and_other_columns_at_the_end(metrics: dict[str, Any]) -> None:
    for model in metrics["models"].values():
        model |= {"crowd_qa": cell(0.5), "retain_vqa_seen_cloze": cell(0.5), "test_vqa_generation": cell(0.25, None)}
    del metrics["models"]["retain_only"]
    order = ["Test VQA", "Test VQA: generation", "Retain VQA", "Retain VQA: seen cloze", "Forget QA", "Crowd QA"]
    for text in (text_page(metrics), terminal_table(metrics), Page(page(metrics)).words):
        table = text[text.rindex("Column and model") :] if "Column and model" in text else text
        places = [table.index(label) for label in order if label not in ("Test VQA", "Retain VQA")]
        assert places == sorted(places)
    shown = [line.split("  ")[0] for line in terminal_table(metrics).splitlines()[2:]]
    assert [label for label in shown if label in order] == order
    assert re.search(r"^Test VQA: generation +25\.0 +15\.0-35\.0 +\. +25\.0", terminal_table(metrics), re.MULTILINE)


def test_cost_is_told_in_human_units(metrics: dict[str, Any]) -> None:
    rows = {name: value.replace("\N{NO-BREAK SPACE}", " ") for name, value in cost_rows(metrics)}
    assert rows["Total"] == "2 h 6 min"
    assert rows["Peak memory"] == "1.5 GiB"
    assert rows["Trainable parameters"] == "400 (40.0 %)"
    assert rows["Saliency mask on disk"] == "512 bytes"


def test_numbers_round_honestly_and_absent_ones_become_a_dash() -> None:
    assert points(-0.0001) == "+0.0 points"
    assert points(-0.05) == "\N{MINUS SIGN}5.0 points"
    assert duration(59.7) == "1 min 0 s"
    assert size(1024) == "1.0 KiB"
    absent = {percent(None), percent(float("nan")), percent(True), duration(None), size("12")}
    assert len(absent) == 1
