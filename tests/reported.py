"""A run as the report sees it, and what reads the report back, for the suites of the report."""

from __future__ import annotations

import copy
from html.parser import HTMLParser
from typing import Any

from PIL import Image

from vkd_framework.report import render_html, render_markdown
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
