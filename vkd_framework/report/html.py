"""The report as one HTML file that needs nothing else: no script, no font, no picture, no request."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from vkd_framework.report import charts, findings, trials
from vkd_framework.report.attack import gather_attacks, measured_steps
from vkd_framework.report.formatting import flatten
from vkd_framework.report.gallery import Answer, Gallery, Person, build_gallery
from vkd_framework.report.people import HEADER
from vkd_framework.report.table import (
    MEASURES,
    MODEL_MEANINGS,
    MODELS,
    cell_of,
    column_rows,
    measured_models,
    taught_sentence,
)
from vkd_framework.types import AttackCurve, Photo, Sample

SMALL = 128
LARGEST = 384


@dataclass(frozen=True, eq=False)
class Picture:
    """A photo ready to be put into the page; `uri` is empty when the file cannot be read."""

    uri: str
    pixelated: bool = False


@dataclass(frozen=True, eq=False)
class PhotoAnswers:
    """The answers about the same photo or photos (`pictures` is empty for text-only questions)."""

    pictures: list[Picture]
    answers: list[Answer]


def render_html(
    metrics: Mapping[str, Any],
    curves: Sequence[AttackCurve],
    samples: Sequence[Sample],
    *,
    environment: Mapping[str, Any],
    recipe_text: str,
    history: Sequence[Mapping[str, Any]] = (),
    people: Sequence[Sequence[str]] = (),
) -> str:
    """The whole report as self-contained HTML.

    `metrics` is the content of `metrics.json` (shares of 1, not per cent), `history` the rows of `history.jsonl`,
    `people` those of `people_rows`.
    """
    attacks = gather_attacks(curves)
    vanilla = cell_of(metrics, "vanilla", "test_vqa").get("exact_match")
    gallery = build_gallery(samples)
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return jinja.get_template("report.html.j2").render(
        identity=findings.identity(metrics),
        verdict=findings.verdict_sentences(metrics),
        verdict_kind=(metrics.get("verdict") or {}).get("kind", ""),
        summary=findings.summary(metrics),
        headline=findings.headline(metrics),
        gallery=gallery,
        pictures=_pictures(gallery),
        by_photo=_by_photo,
        rows=column_rows(metrics),
        models=[(MODELS[model], MODEL_MEANINGS[model]) for model in measured_models(metrics)],
        measures=MEASURES,
        taught=taught_sentence(metrics),
        people_header=HEADER,
        people=people,
        attacks=attacks,
        attack_groups=[
            (scope, [(attack, charts.attack_chart(attack, vanilla)) for attack in group])
            for scope, group in groupby(attacks, key=lambda attack: attack.tuned)
        ],
        attack_steps=measured_steps(attacks),
        attack_figures=findings.attack_figures(metrics),
        attack_explanation=findings.attack_explanation(metrics),
        trials=(tried := trials.trial_rows(metrics)),
        trial_models=[(model, MODELS[model]) for model in trials.trial_models(tried)],
        trial_explanation=trials.EXPLANATION,
        over_forgotten=trials.over_forgotten_sentence(metrics),
        history_charts=charts.history_charts(history),
        history_table=charts.history_table(history),
        proofs=findings.proof_rows(metrics),
        cost=findings.cost_rows(metrics),
        environment=flatten(environment),
        recipe_text=recipe_text,
        method_note=findings.method_note(metrics),
        evidence_note=findings.EVIDENCE_NOTE,
        box=charts,
    )


def embed(photo: Photo) -> Picture:
    """The photo as a `data:` URI without its metadata: small ones exactly, as PNG, large ones as a JPEG of 384 px."""
    try:
        picture = photo.open().convert("RGB")
    except OSError:
        return Picture("")
    small = max(picture.size) <= SMALL
    picture.thumbnail((LARGEST, LARGEST))
    # A new image carries pixels only: colour profiles, comments and the place where a photo was taken stay behind.
    bare = Image.new("RGB", picture.size)
    bare.paste(picture)
    stream = BytesIO()
    if small:
        bare.save(stream, "PNG", optimize=True)
    else:
        bare.save(stream, "JPEG", quality=85)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return Picture(f"data:image/{'png' if small else 'jpeg'};base64,{data}", pixelated=small)


def _pictures(gallery: Gallery) -> dict[str, Picture]:
    photos = {
        photo.key: photo
        for person in (*gallery.forgotten, *gallery.others)
        for answer in person.answers
        for photo in answer.photos
    }
    return {key: embed(photo) for key, photo in photos.items()}


def _by_photo(person: Person, pictures: Mapping[str, Picture]) -> list[PhotoAnswers]:
    groups: dict[tuple[str, ...], list[Answer]] = {}
    for answer in person.answers:
        groups.setdefault(answer.sample.pair.photo_keys, []).append(answer)
    return [PhotoAnswers([pictures[key] for key in keys], answers) for keys, answers in groups.items()]
