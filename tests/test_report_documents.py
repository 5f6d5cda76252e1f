from __future__ import annotations

import base64
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from reported import HISTORY, NAME, NASTY, Page, page, photo, poisoned, sample, text_page

from vkd_framework.report import render_model_card, terminal_table
from vkd_framework.report.findings import summary
from vkd_framework.types import AttackCurve, Photo, Sample


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


def test_the_report_imports_no_torch() -> None:
    code = "import sys, vkd_framework.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
