from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from functools import reduce
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import click
import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from vkd_adapters import llava, qwen_vl

from vkd_framework import hookspecs, testing
from vkd_framework.cli import main
from vkd_framework.errors import ModelError, RecipeError
from vkd_framework.features import FeatureTap, photo_features, photo_grid, vision_forward
from vkd_framework.plugins import MLLM, Adapter
from vkd_framework.recipe import ATTACK_KINDS, DATA_KINDS, Recipe, load_recipe
from vkd_framework.testing.checks import MODEL_CHECKS
from vkd_framework.types import ImageQuestionPair, Photo

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
KINDS: dict[str, type[BaseModel]] = {**DATA_KINDS, **ATTACK_KINDS}
HOOKS = {name: spec for name, spec in vars(hookspecs).items() if name.startswith("vkd_")}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
RECIPES_PAGE, HOOKS_PAGE = ROOT / "docs" / "recipes.md", ROOT / "docs" / "hooks.md"

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(text: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(text) if language in languages]


def hook_sections() -> dict[str, str]:
    parts = re.split(r"^## (.*)$", HOOKS_PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {title.strip("` "): body for title, body in zip(parts[1::2], parts[2::2], strict=True)}


def test_every_hook_has_a_section_and_every_section_is_a_hook() -> None:
    assert list(hook_sections()) == list(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hooks_section_lists_exactly_its_arguments(hook: str) -> None:
    section = hook_sections()[hook]
    arguments = list(inspect.signature(HOOKS[hook]).parameters)
    assert re.findall(r"^- `(\w+)`:", section, flags=re.MULTILINE) == arguments
    assert ("Arguments: none." in section) == (not arguments)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hooks_section_says_what_is_returned_checked_and_answered_without_it(hook: str) -> None:
    section = hook_sections()[hook]
    assert all(word in section for word in ("\nReturns: ", "\nChecked: ", "\nGeneric answer: "))


def executed(example: str, hook: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(compile(example, f"{HOOKS_PAGE}:{hook}", "exec"), namespace)
    return namespace


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_has_one_example_and_the_encoding_one_more(hook: str) -> None:
    assert len(blocks(hook_sections()[hook], "python")) == 1 + (hook == "vkd_tokenize_pairs")


def test_the_batch_built_by_hand_passes_every_check_of_an_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    hook = "vkd_tokenize_pairs"
    by_hand, _ = blocks(hook_sections()[hook], "python")
    own = {name: answer for name, answer in vars(llava).items() if name.startswith("vkd_")}
    adapter = Adapter("documented", SimpleNamespace(**{**own, hook: executed(by_hand, hook)[hook]}))
    asked = [check for check in MODEL_CHECKS if check.look.startswith(hook)]
    monkeypatch.setattr(testing, "MODEL_CHECKS", asked)
    testing.assert_conforms(adapter, "tiny:llava")


@pytest.mark.parametrize("kind", [ImageQuestionPair, Photo])
def test_the_page_tells_every_field_of_what_is_encoded(kind: type) -> None:
    told = re.findall(r"^\| (`.*?`) \|", hook_sections()["vkd_tokenize_pairs"], flags=re.MULTILINE)
    assert {field.name for field in dataclasses.fields(kind)} <= set(re.findall(r"\w+", " ".join(told)))


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hooks_example_works_on_top_of_the_qwen_vl_adapter(hook: str, tmp_path: Path) -> None:
    *_, example = blocks(hook_sections()[hook], "python")
    namespace = executed(example, hook)
    if hook not in namespace:
        assert hook.removeprefix("vkd_") in example
        return
    own = {name: answer for name, answer in vars(qwen_vl).items() if name.startswith("vkd_")}
    adapter = Adapter("documented", SimpleNamespace(**{**own, hook: namespace[hook]}))
    mllm = adapter.tiny_model(["What is shown?", "a cat"], image_size=48, seed=0)
    EXERCISES[hook](adapter, mllm, tmp_path)


def _model_types(adapter: Adapter, mllm: MLLM, folder: Path) -> None:
    assert mllm.model.config.model_type in adapter.model_types


def _load_model(adapter: Adapter, mllm: MLLM, folder: Path) -> None:
    import torch

    mllm.model.save_pretrained(folder)
    mllm.processor.save_pretrained(folder)
    assert adapter.load(str(folder), torch.float32, "cpu").count(["encoder"]) == mllm.count(["encoder"])
    with pytest.raises(ModelError, match="quantised"):
        adapter.load("somebody/some-model-AWQ", torch.float32, "cpu")


def _locate(adapter: Adapter, mllm: MLLM, folder: Path) -> None:
    assert mllm.modules.projector == ("model.visual.merger",)


def _layers(adapter: Adapter, mllm: MLLM, folder: Path) -> None:
    assert [layer.reaches_language_model for layer in mllm.layers] == [True, True, False, True]


def _tokenize(adapter: Adapter, mllm: MLLM, folder: Path) -> None:
    batch = mllm.tokenize(_pairs())
    assert "Answer with a word or a phrase." in mllm.processor.tokenizer.decode(batch.inputs["input_ids"][1])
    for pair in _pairs():
        mllm.check_prompt_is_prefix(pair)


def _rows(adapter: Adapter, mllm: MLLM, folder: Path) -> None:
    from PIL import Image

    photos = [Photo(color, Image.new("RGB", (48, 48), color)) for color in ("olive", "teal", "navy")]
    shown = [tuple(photos[:2]), (), (photos[2],)]
    pairs = [ImageQuestionPair(str(i), "What is shown?", "a cat", some) for i, some in enumerate(shown)]
    inputs = mllm.tokenize(pairs).inputs
    with FeatureTap(mllm.model, mllm.layers) as tap:
        vision_forward(mllm, inputs)
    found = photo_features(mllm, inputs, tap)
    first, rest = found["vision.0"].sample.bincount(minlength=3)[[0, 2]].tolist()
    assert len(tap.features["vision.0"]) - len(found["vision.0"].rows) == len(photos)
    assert first == 2 * rest, "of two photos, two class tokens"
    assert len(tap.features["projector"]) == len(found["projector"].rows)


def _grid(adapter: Adapter, mllm: MLLM, folder: Path) -> None:
    from PIL import Image

    photos = [Photo(str(i), Image.new("RGB", (48, 32), "olive")) for i in range(2)]
    pairs = [ImageQuestionPair(photo.key, "What is shown?", "a cat", (photo,)) for photo in photos]
    inputs = mllm.tokenize(pairs).inputs
    with FeatureTap(mllm.model, mllm.layers) as tap:
        vision_forward(mllm, inputs)
    grid = photo_grid(mllm, inputs, tap, mllm.layer("projector"), [[(48, 32)]] * 2)
    assert grid.photo.tolist() == [0] * 6 + [1] * 6
    assert grid.box[1].tolist() == pytest.approx([1 / 3, 0, 2 / 3, 1 / 2])


def _stop_tokens(adapter: Adapter, mllm: MLLM, folder: Path) -> None:
    assert mllm.processor.tokenizer.decode([mllm.stop_ids[0]]) == "<|im_end|>"
    assert len(set(mllm.stop_ids)) == len(mllm.stop_ids)


def _presets(adapter: Adapter, mllm: MLLM, folder: Path) -> None:
    from vkd_framework.layers_table import describe

    real = Adapter("qwen_vl", qwen_vl)
    for name in adapter.presets:
        assert describe(name, adapter).count(["encoder"]) == describe(name, real).count(["encoder"])


def _refused(adapter: Adapter, mllm: MLLM, folder: Path) -> None:
    assert "Qwen/Qwen2-VL-7B-Instruct" in adapter.refused_model_types["qwen"]


EXERCISES = {
    "vkd_model_types": _model_types,
    "vkd_load_model": _load_model,
    "vkd_locate_vision_modules": _locate,
    "vkd_list_distillation_layers": _layers,
    "vkd_tokenize_pairs": _tokenize,
    "vkd_feature_rows": _rows,
    "vkd_feature_grid": _grid,
    "vkd_stop_token_ids": _stop_tokens,
    "vkd_refused_model_types": _refused,
    "vkd_model_presets": _presets,
}


def _pairs() -> list[ImageQuestionPair]:
    from PIL import Image

    photos = [Photo(str(size), Image.new("RGB", size, "olive")) for size in ((48, 48), (32, 48))]
    asked = [ImageQuestionPair(photo.key, "What is shown?", "a cat", (photo,)) for photo in photos]
    return [asked[0], ImageQuestionPair("text", "What is shown?", "a cat"), asked[1]]


@pytest.mark.parametrize("hook", HOOKS)
def test_every_implementation_shown_is_marked_and_takes_only_arguments_the_hook_has(hook: str) -> None:
    for node in ast.parse("".join(blocks(hook_sections()[hook], "python"))).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("vkd_"):
            assert [decorator.id for decorator in node.decorator_list if isinstance(decorator, ast.Name)] == [
                "hookimpl"
            ]
            assert {argument.arg for argument in node.args.args} <= set(inspect.signature(HOOKS[node.name]).parameters)


def links(page: Path) -> Iterator[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pages
def test_relative_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_every_page_of_the_docs_is_linked_from_another() -> None:
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in PAGES
        for link in links(page)
        if link.partition("#")[0]
    }
    records = {page for page in PAGES if page.parent.name == "adr" and page.name != "README.md"}
    assert records and records <= linked


@pytest.mark.parametrize("name", ["run", "tests"])
def test_the_readme_has_exactly_one_command_for_each_set_up(name: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(rf"^<!-- setup: {name} -->\n```\n([^`]+)\n```$", text, flags=re.MULTILINE)
    assert len(found) == text.count(f"<!-- setup: {name} -->") == 1
    assert len(found[0].splitlines()) == 1


def commands(text: str) -> Iterator[list[str]]:
    """The words of every `vkd ...` command in code, up to whatever ends a shell command."""
    code = [
        line for block in blocks(text, "", "bash", "sh", "console") for line in block.replace("\\\n", " ").split("\n")
    ]
    code += re.findall(r"`([^`]+)`", FENCE.sub("", text).replace("\n", " "))
    for line in code:
        for part in re.split(r"&&|\|\||[|;]", line):
            found = re.match(r"\s*(?:\$ )?(?:\S*/bin/)?vkd\s+(.*)", part)
            if found:
                yield shlex.split(found[1], comments=True)


@pages
def test_every_command_named_exists_with_its_options(page: Path) -> None:
    for words in commands(page.read_text(encoding="utf-8")):
        command: click.Command = main
        for word in words:
            if isinstance(command, click.Group) and not word.startswith("-"):
                assert word in command.commands, f"no command vkd {' '.join(words)}"
                command = command.commands[word]
            elif word.startswith("-"):
                known = {name for parameter in command.params for name in parameter.opts} | {"--help", "-h"}
                assert word in known, f"{word} is no option of vkd {' '.join(words)}"


@pages
def test_every_setting_shown_with_set_is_a_key_of_a_recipe(page: Path) -> None:
    known = set(keys(Recipe))
    for code in re.findall(r"--set ('[^']*'|[^\s`]+)", page.read_text(encoding="utf-8").replace("\n", " ")):
        key, equals, _ = code.strip("'").partition("=")
        if equals and key not in ("KEY", "key", "a.b"):
            generic = re.sub(r"\.\d+(?=\.|$)", ".N", re.sub(r"^for_methods\.\w+\.", "", key))
            assert any(path == generic or path.startswith(f"{generic}.") for _, path in known), code


@pytest.mark.parametrize(
    "settings", sorted({line for line in re.findall(r"`(--set [^`]+)`", RECIPES_PAGE.read_text(encoding="utf-8"))})
)
def test_every_ablation_shown_is_a_valid_recipe(settings: str) -> None:
    words = shlex.split(settings)
    try:
        load_recipe("qwen2vl_celeb", words[1::2])
    except RecipeError as error:
        assert "KEY=VALUE" in settings or words[1::2] == ["teach=null"], error


def test_every_run_shown_with_set_is_a_valid_recipe() -> None:
    runs = [
        words for words in commands(RECIPES_PAGE.read_text(encoding="utf-8")) if words[:2] == ["run", "qwen2vl_celeb"]
    ]
    assert len(runs) > 3
    for words in runs:
        overrides = [after for word, after in pairwise(words) if word == "--set"]
        assert load_recipe("qwen2vl_celeb", overrides)


def test_every_whole_recipe_shown_is_valid(tmp_path: Path) -> None:
    shown = blocks(RECIPES_PAGE.read_text(encoding="utf-8"), "yaml")
    assert shown
    for text in shown:
        (tmp_path / "shown.yaml").write_text(text, encoding="utf-8")
        assert load_recipe(str(tmp_path / "shown.yaml"))


def keys(section: type[BaseModel], path: str = "", kind: str = "") -> dict[tuple[str, str], Any]:
    """(kind of data, dotted key) -> its default as JSON, for every key that holds no further keys of its own."""
    found: dict[tuple[str, str], Any] = {}
    for name, field in section.model_fields.items():
        key = f"{path}{name}"
        models = list(models_in(field.annotation))
        repeated = bool(models) and not isinstance(field.default, BaseModel) and "tuple" in str(field.annotation)
        if not models or repeated:
            found[kind, key] = default_of(field)
        for model in models:
            data = next((name for name, section in KINDS.items() if section is model), kind)
            found |= keys(model, f"{key}.N." if repeated else f"{key}.", data)
    return found


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def default_of(field: Any) -> Any:
    if field.default is PydanticUndefined:
        return "required"
    plain = [part.model_dump() for part in field.default] if _holds_models(field.default) else field.default
    return json.loads(json.dumps(plain, default=str))


def _holds_models(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and isinstance(value[0], BaseModel)


def documented_keys() -> dict[tuple[str, str], Any]:
    found: dict[tuple[str, str], Any] = {}
    heading = ""
    for line in FENCE.sub("", RECIPES_PAGE.read_text(encoding="utf-8")).split("\n"):
        if line.startswith("#"):
            heading = line
        elif entry := re.match(r"- `([a-zA-Z_.]+)` \((?:`(.*?)`|required)\):", line):
            kind = next((kind for kind in KINDS if f"kind: {kind}`" in heading), "")
            assert (kind, entry[1]) not in found, f"{entry[1]} is documented twice"
            found[kind, entry[1]] = "required" if entry[2] is None else yaml.safe_load(entry[2])
    return found


def test_recipes_page_documents_every_key_with_its_default_and_no_other() -> None:
    assert documented_keys() == keys(Recipe)


def test_recipes_page_says_what_the_default_method_sets_instead_of_each_default() -> None:
    vkd = Recipe.model_validate(
        {"name": "a", "adapter": "a", "data": {"kind": "celebs"}, "teach": {}, "layers": ["projector"]}
    )
    sections = {"losses", "mask", "prune", "unlearn", "simulated_attack"}
    expected = {}
    for (kind, key), default in keys(Recipe).items():
        if not kind and key.partition(".")[0] in sections and ".N." not in key:
            value = json.loads(json.dumps(reduce(getattr, key.split("."), vkd), default=BaseModel.model_dump))
            expected |= {key: value} if value != default else {}
    told = {}
    page = RECIPES_PAGE.read_text(encoding="utf-8")
    for entry in re.finditer(r"^- `([a-z_.]+)` (.*(?:\n  .*)*)", page, flags=re.MULTILINE):
        if said := re.search(r"The method `vkd` has `?(.+?)`?\.(?: |$)", " ".join(entry[2].split())):
            told[entry[1]] = yaml.safe_load(said[1])
    assert told == expected


def test_recipes_page_has_a_heading_for_every_section() -> None:
    headings = re.findall(r"^#+ `([a-z_.]+)`", RECIPES_PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    sections = {path.rpartition(".")[0].removesuffix(".N") for _, path in keys(Recipe)} - {"", "unlearn.phases"}
    assert set(headings) | {"losses"} == sections | {"losses"}


def test_method_page_defines_every_column_and_every_figure_of_a_cell() -> None:
    from vkd_framework.report.table import COLUMNS
    from vkd_framework.types import Cell

    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    names = [column.key for column in COLUMNS] + [field.name for field in dataclasses.fields(Cell)]
    assert [name for name in names if f"`{name}`" not in text] == []


def test_method_page_defines_every_proof_and_every_figure_of_the_attack() -> None:
    from vkd_framework.relearn import summarise
    from vkd_framework.report.findings import PROOF_STATEMENTS
    from vkd_framework.types import AttackCurve

    figures = summarise([AttackCurve("unlearned", "full", 1.0, 8, 0, (0, 10), (0.0, 0.5))], vanilla=1.0)
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    names = [*PROOF_STATEMENTS, *(name for name in figures if name != "curves")]
    assert [name for name in names if f"`{name}`" not in text] == []
