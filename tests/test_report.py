from __future__ import annotations

import base64
import copy
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vkd_framework.report import render_html, render_markdown, render_model_card, terminal_table, verdict_text
from vkd_framework.report.attack import gather_attacks
from vkd_framework.report.charts import attack_chart, history_table, history_terms, nice_ticks
from vkd_framework.report.findings import attack_sentence, cost_rows, proof_rows, summary
from vkd_framework.report.formatting import duration, percent, points, size
from vkd_framework.report.gallery import ANSWERS_PER_PERSON, PEOPLE_SHOWN, build_gallery
from vkd_framework.report.trials import over_forgotten_sentence, trial_models, trial_rows
from vkd_framework.types import AttackCurve, ImageQuestionPair, Photo, Sample

NASTY = "<script>alert(\"x\")</script> & 'q' {{ 7 * 7 }} {% raw %} | `tick` \\ end\nnext"
NAME = "Zoë Ærø-山田"
VOID = {"meta", "img", "br", "link", "hr", "input"}


def cell(exact: float, choice: float | None = 0.5, n: int = 40) -> dict[str, Any]:
    interval = [max(0.0, exact - 0.1), min(1.0, exact + 0.1)]
    return {
        "exact_match": exact,
        "choice_accuracy": choice,
        "rouge_l": exact,
        "answer_probability": exact,
        "n": n,
        "interval_95": interval,
    }


def columns(forget: float, retain: float) -> dict[str, Any]:
    return {
        "forget_vqa": cell(forget),
        "test_vqa": cell(forget),
        "retain_vqa": cell(retain),
        "forget_qa": cell(1.0),
        "retain_qa": cell(1.0),
        "realworld_vqa": cell(retain, None),
    }


@pytest.fixture
def metrics() -> dict[str, Any]:
    return {
        "schema": 1,
        "recipe": "qwen2vl_celeb",
        "adapter": "qwen_vl",
        "method": "vkd",
        "seed": 7,
        "models": {
            "vanilla": columns(0.974, 0.962),
            "unlearned": columns(0.021, 0.951),
            "retain_only": columns(0.042, 0.968),
        },
        "proofs": {
            "text_only_max_logit_difference": 0.0,
            "frozen_parameters_identical": True,
            "masked_parameters_identical": True,
            "reload_identical": True,
        },
        "relearn": {"average_recovery": 0.184, "average_gap": 0.77, "advantage_over_retain_only": -0.093, "curves": []},
        "cost": {
            "teach_seconds": 214.2,
            "mask_seconds": 3.81,
            "unlearn_seconds": 92.6,
            "evaluate_seconds": 31,
            "relearn_seconds": 7260,
            "total_seconds": 7601.6,
            "peak_memory_bytes": 1.5 * 1024**3,
            "trainable_parameters": 400,
            "active_parameters": 100,
            "total_parameters": 1000,
            "mask_bytes": 512,
        },
    }


@pytest.fixture
def curves() -> list[AttackCurve]:
    return [
        AttackCurve(model, scope, share, 5, seed, (0, 10, 20), (0.02, 0.2 + seed / 10, 0.4 + seed / 10))
        for model in ("retain_only", "unlearned")
        for scope in ("full", "visual")
        for share in (1.0, 0.05)
        for seed in (0, 2)
    ]


def photo(key: str, side: int = 8) -> Photo:
    return Photo(key, Image.new("RGB", (side, side), (200, 30, 60)))


def sample(column: str, subject: str | None, *, before: str = "yes", after: str = "no", shown: Photo | None) -> Sample:
    return Sample(
        column,
        ImageQuestionPair(f"{column}-{subject}", "Who?", "yes", (shown,) if shown else (), subject),
        before,
        after,
    )


@pytest.fixture
def samples() -> list[Sample]:
    return [
        sample("forget_vqa", NAME, shown=photo("a")),
        sample("forget_qa", NAME, after="Yes.", shown=None),
        sample("retain_vqa", "Oda Quill", after="yes", shown=photo("b")),
    ]


HISTORY = [
    {"step": step, "phase": 1 + step // 5, "lr": 1e-3, "forget_output": step / 2, "note": "text", "gone": None}
    for step in range(10)
]


def page(metrics: dict[str, Any], curves: Any = (), samples: Any = (), **changes: Any) -> str:
    arguments: dict[str, Any] = {"environment": {"python": "3.11"}, "recipe_text": "name: x", **changes}
    return render_html(metrics, curves, samples, **arguments)


def text_page(metrics: dict[str, Any], curves: Any = (), samples: Any = (), **changes: Any) -> str:
    arguments: dict[str, Any] = {"environment": {"python": "3.11"}, "recipe_text": "name: x", **changes}
    return render_markdown(metrics, curves, samples, **arguments)


class Page(HTMLParser):
    """Every tag, in order, with the visible text; complains about tags that are not closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.mistakes: list[str] = []
        self.feed(source)
        self.close()
        self.mistakes += [f"never closed: {tag}" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1] != tag:
            self.mistakes.append(f"</{tag}> inside {self.open[-3:]}")
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data

    def every(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def poisoned(metrics: dict[str, Any]) -> tuple[dict[str, Any], list[Sample]]:
    metrics = copy.deepcopy(metrics)
    metrics |= {"recipe": NASTY, "adapter": NASTY, "method": NASTY}
    metrics["proofs"][NASTY] = True
    for model in metrics["models"].values():
        model[NASTY] = cell(0.5)
    pair = ImageQuestionPair("q", NASTY, NASTY, (photo(NASTY),), NASTY)
    return metrics, [Sample("forget_vqa", pair, NASTY, NASTY), Sample("retain_vqa", pair, NASTY, NASTY)]


def test_every_tag_is_closed_in_order_and_every_id_is_unique(
    metrics: dict[str, Any], curves: list[AttackCurve], samples: list[Sample]
) -> None:
    parsed = Page(page(metrics, curves, samples, history=HISTORY))
    assert parsed.mistakes == []
    identities = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    targets = {(link["href"] or "").removeprefix("#") for link in parsed.every("a")}
    labels = {name for _, a in parsed.tags for name in (a.get("aria-labelledby") or "").split()}
    assert targets | labels <= set(identities)


def test_the_page_asks_the_network_for_nothing_and_runs_nothing(
    metrics: dict[str, Any], curves: list[AttackCurve], samples: list[Sample]
) -> None:
    source = page(metrics, curves, samples, history=HISTORY)
    parsed = Page(source)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in parsed.tags}
    for tag, attributes in parsed.tags:
        assert not [name for name in attributes if name.startswith("on")]
        if "href" in attributes:
            assert (attributes["href"] or "").startswith("#"), (tag, attributes)
        if "src" in attributes:
            assert (attributes["src"] or "").startswith("data:image/"), (tag, attributes)
    assert not re.search(r"url\(|@import|https?://", source)
    policies = [a["content"] for a in parsed.every("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_photos_are_embedded_once_per_sample_group_with_alternative_text(
    metrics: dict[str, Any], samples: list[Sample]
) -> None:
    images = Page(page(metrics, (), samples)).every("img")
    assert [image["alt"] for image in images] == [f"Photo of {NAME}", "Photo of Oda Quill"]


def decoded(metrics: dict[str, Any], shown: Photo) -> tuple[str, Image.Image, bytes]:
    source = Page(page(metrics, (), [sample("forget_vqa", NAME, shown=shown)])).every("img")[0]["src"] or ""
    kind, data = source.split(";base64,")
    raw = base64.b64decode(data)
    return kind, Image.open(BytesIO(raw)), raw


def test_a_small_photo_travels_exactly_and_a_large_one_is_scaled_down(metrics: dict[str, Any]) -> None:
    kind, small, _ = decoded(metrics, photo("s", 48))
    assert (kind, small.size, small.getpixel((5, 5))) == ("data:image/png", (48, 48), (200, 30, 60))
    kind, large, _ = decoded(metrics, Photo("l", Image.new("RGB", (2000, 500))))
    assert (kind, large.size) == ("data:image/jpeg", (384, 96))


def test_the_metadata_of_a_photo_stays_behind(metrics: dict[str, Any], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    Image.new("RGB", (600, 400)).save(tmp_path / "p.jpg", exif=exif, comment=b"a comment", icc_profile=b"a profile")
    _, _, raw = decoded(metrics, Photo("p", tmp_path / "p.jpg"))
    assert not [secret for secret in (b"taken at home", b"a comment", b"a profile") if secret in raw]


def test_a_photo_that_cannot_be_read_is_said_to_be_unreadable(metrics: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    shown = [Photo("m", tmp_path / "missing.jpg"), Photo("b", tmp_path / "broken.jpg")]
    parsed = Page(page(metrics, (), [sample("forget_vqa", NAME, shown=each) for each in shown]))
    assert parsed.words.count("photo cannot be read") == 2
    assert parsed.every("img") == []


def test_data_stays_text_in_the_page(metrics: dict[str, Any]) -> None:
    nasty_metrics, nasty_samples = poisoned(metrics)
    history = [{"step": 0, NASTY: 1.0}, {"step": 1, NASTY: 2.0}]
    nasty = {"environment": {NASTY: {NASTY: [NASTY]}}, "recipe_text": NASTY, "history": history}
    parsed = Page(page(nasty_metrics, (), nasty_samples, **nasty))
    assert parsed.mistakes == []
    assert parsed.every("script") == []
    assert parsed.words.count(" ".join(NASTY.split())) >= 14
    assert "{{ 7 * 7 }}" in parsed.words and " 49 " not in parsed.words


def test_tables_have_headers_with_a_scope(
    metrics: dict[str, Any], curves: list[AttackCurve], samples: list[Sample]
) -> None:
    parsed = Page(page(metrics, curves, samples, history=HISTORY))
    assert len(parsed.every("table")) == 6
    assert {header.get("scope") for header in parsed.every("th")} == {"col", "row", "rowgroup"}


def test_every_chart_has_a_title_a_description_and_a_label(metrics: dict[str, Any], curves: list[AttackCurve]) -> None:
    parsed = Page(page(metrics, curves, history=HISTORY))
    charts = [svg for svg in parsed.every("svg") if svg.get("role") == "img"]
    assert len(charts) == len(parsed.every("title")) - 1 == len(parsed.every("desc")) == 5
    others = [svg for svg in parsed.every("svg") if svg.get("role") != "img"]
    assert all(svg.get("aria-hidden") == "true" for svg in others)


def test_the_sections_come_in_the_promised_order(
    metrics: dict[str, Any], curves: list[AttackCurve], samples: list[Sample]
) -> None:
    order = ["Summary", "Answers", "Columns", "Relearning", "Training", "Proofs", "Cost", "Environment", "Recipe", "On"]
    headings = re.findall(r"<h2[^>]*>(\w+)", page(metrics, curves, samples, history=HISTORY))
    assert headings == order
    assert re.findall(r"^## (\w+)", text_page(metrics, curves, samples, history=HISTORY), re.MULTILINE) == order


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


def test_empty_inputs_still_make_whole_documents(metrics: dict[str, Any]) -> None:
    bare = {"recipe": "r", "adapter": "a", "method": "m", "seed": 0, "models": {}, "proofs": {}, "cost": {}}
    for content in (metrics, bare):
        parsed = Page(page(content, (), (), environment={}, recipe_text=""))
        assert parsed.mistakes == []
        assert "There are no attack curves in this run." in parsed.words
        assert "No answers were kept for the report." in parsed.words
        assert 'id="training"' not in page(content)
    assert "No relearning attack was measured." in text_page(bare)
    assert "No relearning attack was measured." in render_model_card(
        bare, base_model="", environment={}, forget_count=1
    )
    assert terminal_table(bare).startswith("per cent")


def test_what_vanilla_was_taught_stands_below_the_columns_when_known(metrics: dict[str, Any]) -> None:
    assert "Vanilla knows everybody" not in page(metrics)
    metrics["taught"] = {"test_vqa_all_people": cell(0.965, None, 544)}
    words = Page(page(metrics)).words
    assert words.index("Forget QA The") < words.index("Vanilla knows everybody: asked about all people")
    assert "Vanilla knows everybody" in text_page(metrics)


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


def cells_of(line: str) -> list[str]:
    assert line.startswith("| ") and line.endswith(" |")
    return re.split(r"(?<!\\)\|", line)[1:-1]


def test_every_markdown_table_has_rows_of_one_length_whatever_the_data(
    metrics: dict[str, Any], curves: list[AttackCurve]
) -> None:
    nasty_metrics, nasty_samples = poisoned(metrics)
    nasty = {"environment": {NASTY: NASTY}, "recipe_text": "name: x", "history": [{"step": 0, NASTY: 1.0}]}
    tables = re.findall(r"(?:^\|.*\n)+", text_page(nasty_metrics, curves, nasty_samples, **nasty), re.MULTILINE)
    assert len(tables) == 11
    for table in tables:
        lines = table.splitlines()
        assert set(cells_of(lines[1])) == {" --- "}
        assert {len(cells_of(line)) for line in lines} == {len(cells_of(lines[0]))}, table


def test_markdown_escapes_markup_of_every_kind(metrics: dict[str, Any]) -> None:
    nasty_metrics, nasty_samples = poisoned(metrics)
    text = text_page(nasty_metrics, (), nasty_samples, environment={"x": "*a* _b_ [c](d) ~e~ $f$ ![g](h)"})
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert r"\|" in text and r"\`tick\`" in text and r"\\ end next" in text
    assert r"\*a\* \_b\_ \[c\](d) \~e\~ \$f\$ !\[g\](h)" in text


def test_a_recipe_cannot_close_its_code_block(metrics: dict[str, Any]) -> None:
    text = text_page(metrics, recipe_text="a: |\n  ```\n  # Out\n  ````\n")
    assert "\n`````yaml\na: |\n  ```\n  # Out\n  ````\n`````\n" in text


def test_html_markdown_and_model_card_agree_on_the_figures(metrics: dict[str, Any]) -> None:
    card = render_model_card(metrics, base_model="org/name", environment={}, forget_count=4)
    words = Page(page(metrics)).words
    for text in (words, text_page(metrics), card, terminal_table(metrics)):
        for figure in ("97.4", "2.1", "4.2", "95.1"):
            assert figure in text
    for sentence in summary(metrics):
        assert " ".join(sentence.split()) in words
        assert " ".join(sentence.split()) in card


def test_the_model_card_never_names_a_forgotten_person(metrics: dict[str, Any]) -> None:
    name = "Mirela Sandoval"
    metrics |= {"recipe": f"forget_{name}", "forget_subjects": [name]}
    metrics["relearn"]["curves"] = [{"model": name}]
    environment = {"command": f"vkd run {name}", "versions": {"torch": "2.6.0", "folder": f"/home/{name}"}}
    card = render_model_card(metrics, base_model=f"./models/{name}", environment=environment, forget_count=1)
    assert "Sandoval" not in card
    assert "deliberately not listed" in card and "1 person on photos" in card and "2.6.0" in card


def front_matter(card: str) -> list[str]:
    start, *rest = card.splitlines()
    assert start == "---"
    return rest[: rest.index("---")]


@pytest.mark.parametrize(
    ("base_model", "named"),
    [
        ("Qwen/Qwen2-VL-2B-Instruct", True),
        ("tiny", False),
        ("./here/model", False),
        ("/srv/model", False),
        ("a/b/c", False),
        ("org/name\ntags: x", False),
    ],
)
def test_the_front_matter_names_a_base_model_only_from_the_hub(
    metrics: dict[str, Any], base_model: str, named: bool
) -> None:
    lines = front_matter(render_model_card(metrics, base_model=base_model, environment={}, forget_count=2))
    assert (f"base_model: {base_model}" in lines) == named
    rest = [line for line in lines if not line.startswith("base_model")]
    assert rest == [
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "tags:",
        "- machine-unlearning",
        "- vkd",
    ]


def test_a_local_folder_that_reads_like_a_hub_id_is_not_linked(
    metrics: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = render_model_card(metrics, base_model="models/mine", environment={}, forget_count=2)
    assert "models/mine" not in card


def test_every_document_says_that_the_method_is_a_reconstruction(metrics: dict[str, Any]) -> None:
    card = render_model_card(metrics, base_model="tiny", environment={}, forget_count=2)
    for text in (Page(page(metrics)).words, text_page(metrics), card):
        assert "reconstruction" in text and "arXiv 2512.11325" in text


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


def test_the_report_imports_no_torch() -> None:
    code = "import sys, vkd_framework.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
