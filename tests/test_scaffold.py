from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers import CONFIG_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from vkd_framework import scaffold
from vkd_framework.cli import main
from vkd_framework.errors import AdapterError
from vkd_framework.plugins import Adapter
from vkd_framework.recipe import load_recipe
from vkd_framework.scaffold import Written, check_model_type, check_name, new_adapter
from vkd_framework.scaffold.render import Findings, literal, render_adapter
from vkd_framework.scaffold.shrink import Code, Draft, draft
from vkd_framework.scaffold.trial import execute, repairs
from vkd_framework.testing import assert_conforms, check_adapter

TYPES = {
    "gemma3": "a projector that the family leaves at zero",
    "vipllava": "a class token, and a last block that the language model does not read",
}
"""Architectures that no adapter of ours serves and every transformers we support has, with what is peculiar in each."""
if importlib.metadata.version("transformers") >= "5":  # 4.57 finds no image processor for it
    TYPES["aya_vision"] = "tiles, and the whole photo as one more"


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name == "aya_vision")) for name in TYPES]
)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return new_adapter(f"my_{request.param}", request.param, tmp_path_factory.mktemp("new") / "package")


def test_what_is_written_is_a_package(written: Written) -> None:
    name = written.module.stem.removeprefix("vkd_adapter_")
    found = {str(path.relative_to(written.folder)) for path in written.folder.rglob("*") if path.is_file()}
    expected = {"README.md", "pyproject.toml", f"{written.module.stem}.py", f"{name}_celeb.yaml"}
    assert found == set(written.files) == expected | {f"tests/test_{name}.py"}
    assert written.missing is None
    assert load_recipe(str(written.folder / f"{name}_celeb.yaml")).adapter == name


def test_the_adapter_as_written_conforms(written: Written) -> None:
    assert written.adapter is not None
    assert_conforms(execute(written.module.read_text(encoding="utf-8"), written.adapter.name))


def test_what_is_peculiar_is_written_out(written: Written) -> None:
    adapter, source = written.adapter, written.module.read_text(encoding="utf-8")
    assert adapter is not None
    if "gemma3" in written.module.stem:
        assert "for checkpoints to fill" in source
        assert "vkd_feature_rows" not in adapter.hooks
    elif "aya_vision" in written.module.stem:
        assert "vkd_feature_grid" in adapter.hooks
    else:
        assert "vkd_feature_grid" not in adapter.hooks
        assert "vkd_feature_rows" in adapter.hooks
        layers = adapter.tiny_model(["chess"], 48, 0).layers
        assert [layer.reaches_language_model for layer in layers] == [True, True, False, True]


def test_the_code_as_written_needs_no_formatting(written: Written) -> None:
    assert_well_formed(written.folder)


def assert_well_formed(folder: Path) -> None:
    config = Path(__file__).parent.parent / "pyproject.toml"
    for command in (["format", "--check"], ["check", "--ignore=D1"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--config", str(config), "--no-cache", str(folder)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("written", ["vipllava"], indirect=True)
def test_the_packages_own_tests_pass_once_it_is_installed(written: Written, tmp_path: Path) -> None:
    build = [
        "install",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--quiet",
        "--target",
        str(tmp_path / "site"),
    ]
    subprocess.run([sys.executable, "-m", "pip", *build, str(written.folder)], check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=written.folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


@pytest.fixture
def not_worked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """No draft of the architecture works."""
    proposal = draft("vipllava")
    assert proposal is not None
    answer = (proposal, Findings(), "Image features and image tokens do not match")
    monkeypatch.setattr("vkd_framework.scaffold.trial.work_out", lambda _: answer)


@pytest.fixture
def unfinished(tmp_path: Path, not_worked_out: None) -> Written:
    return new_adapter("mine", "vipllava", tmp_path / "mine")


def test_the_command_says_what_is_to_do_and_where(tmp_path: Path, not_worked_out: None) -> None:
    done = CliRunner().invoke(
        main, ["new-adapter", "mine", "--model-type", "vipllava", "--out", str(tmp_path / "mine")]
    )
    assert done.exit_code == 1
    where = tmp_path / "mine" / "vkd_adapter_mine.py"
    assert done.stdout.splitlines()[-1] == f"to do in {where}: Image features and image tokens do not match"


def test_a_package_that_could_not_be_worked_out_says_so_in_one_line_everywhere(unfinished: Written) -> None:
    assert unfinished.adapter is None
    assert unfinished.missing == "Image features and image tokens do not match"
    assert f"**Not finished:** {unfinished.missing}" in (unfinished.folder / "README.md").read_text(encoding="utf-8")
    adapter = execute(unfinished.module.read_text(encoding="utf-8"), "mine")
    with pytest.raises(AdapterError, match=rf"^{unfinished.missing}$"):
        adapter.tiny_model(["chess"], 48, 0)


def test_a_package_that_is_mended_is_not_written_over_and_the_checks_name_what_is_left(unfinished: Written) -> None:
    written = unfinished.module.read_text(encoding="utf-8")
    counted = written.replace("tokenizer=tokenizer,", "tokenizer=tokenizer, num_additional_image_tokens=1,")
    mended = re.sub(r"    raise AdapterError\(.*?\n    \)\n", "", counted, flags=re.DOTALL)
    unfinished.module.write_text(mended, encoding="utf-8")
    with pytest.raises(
        AdapterError, match=r"what you changed in it is kept; .* `vkd check-adapter mine` say what is left"
    ):
        new_adapter("mine", "vipllava", unfinished.folder)
    assert unfinished.module.read_text(encoding="utf-8") == mended
    assert "let `vkd check-adapter mine` name them" in (unfinished.folder / "README.md").read_text(encoding="utf-8")
    left = [result for result in check_adapter(execute(mended, "mine")) if not result.ok]
    assert "vkd_feature_rows" in [result.look.split()[0] for result in left]


def test_a_long_reason_is_written_in_several_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proposal = draft("vipllava")
    reason = "hook vkd_tiny_model: raised TypeError: " + "a long reason of transformers, " * 8
    monkeypatch.setattr("vkd_framework.scaffold.trial.work_out", lambda _: (proposal, Findings(), reason))
    written = new_adapter("mine", "vipllava", tmp_path / "mine")
    assert_well_formed(written.folder)
    with pytest.raises(AdapterError) as caught:
        execute(written.module.read_text(encoding="utf-8"), "mine").tiny_model(["chess"], 48, 0)
    assert str(caught.value) == reason


def test_a_package_that_could_not_be_worked_out_is_formatted_and_valid(unfinished: Written) -> None:
    compile(unfinished.module.read_text(encoding="utf-8"), "mine.py", "exec")
    assert load_recipe(str(unfinished.folder / "mine_celeb.yaml")).adapter == "mine"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Pali-Gemma", r"'Pali-Gemma' cannot be an adapter's name: .*; did you mean 'pali_gemma'\?$"),
        ("7b", r"'7b' cannot be an adapter's name: lower-case letters, digits and underscores, a letter first$"),
        ("", "'' cannot be"),
        ("import", "'import' cannot be an adapter's name: it is a word of Python; choose another$"),
        ("generic", "'generic' cannot be an adapter's name"),
        ("qwen_vl", r"adapter 'qwen_vl' is installed already \(vkd-framework .*\); choose another name"),
    ],
)
def test_a_name_that_cannot_be_had_is_refused(name: str, told: str) -> None:
    with pytest.raises(AdapterError, match=told):
        check_name(name)


@pytest.mark.parametrize(
    ("model_type", "told"),
    [
        ("palligemma", r"'palligemma' is no model type that transformers .* knows; did you mean 'paligemma'\?"),
        ("bert", "'bert' is no image-text-to-text model in transformers"),
        ("qwen2_vl", "model type 'qwen2_vl' is served by the installed adapter 'qwen_vl'.*`adapter: qwen_vl`"),
    ],
)
def test_a_model_type_that_cannot_be_had_is_refused(model_type: str, told: str) -> None:
    with pytest.raises(AdapterError, match=told):
        check_model_type(model_type)


@pytest.mark.parametrize("model_type", ["kosmos-2", "fast_vlm"])
def test_an_architecture_without_a_processor_is_written_with_the_processor_left_to_do(
    model_type: str, tmp_path: Path
) -> None:
    if model_type not in CONFIG_MAPPING or PROCESSOR_MAPPING.get(CONFIG_MAPPING[model_type], None) is not None:
        pytest.skip(
            "in a transformers that pairs a processor with it, or does not know it; ends with the oldest of ours"
        )
    done = CliRunner().invoke(
        main, ["new-adapter", "mine", "--model-type", model_type, "--out", str(tmp_path / "mine")]
    )
    assert done.exit_code == 1
    where = tmp_path / "mine" / "vkd_adapter_mine.py"
    told = done.stdout.splitlines()[-1]
    assert told.startswith(f"to do in {where}: transformers pairs no processor with {model_type!r}; write its ")
    adapter = execute(where.read_text(encoding="utf-8"), "mine")
    with pytest.raises(AdapterError, match="into tiny_processor"):
        adapter.tiny_model(["chess"], 48, 0)
    assert_well_formed(tmp_path)


def test_an_architecture_whose_config_has_no_defaults_is_refused(tmp_path: Path) -> None:
    if draft("vision-encoder-decoder") is not None:
        pytest.skip("it has defaults in transformers 5; ends with the support of transformers 4")
    with pytest.raises(AdapterError, match=r"config class of 'vision-encoder-decoder' has no defaults"):
        new_adapter("mine", "vision-encoder-decoder", tmp_path / "mine")


def test_a_folder_that_exists_is_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"exists already; give another folder with --out"):
        new_adapter("mine", "gemma3", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_worked_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AdapterError, match=r"cannot be made \(Not a directory\); give another folder with --out"):
        new_adapter("mine", "gemma3", tmp_path / "file" / "mine")


def test_a_refusal_is_one_line_and_exit_status_2() -> None:
    done = CliRunner().invoke(main, ["new-adapter", "mine", "--model-type", "gemma33"])
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert "did you mean 'gemma3'?" in done.stderr


def test_a_broken_adapter_does_not_keep_anybody_from_writing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Adapter:
        raise AdapterError(f"adapter {name!r} does not import")

    monkeypatch.setattr(scaffold, "load_adapter", broken)
    check_model_type("qwen2_vl")


def test_an_error_that_says_nothing_about_a_size_or_a_token_is_not_mended() -> None:
    proposal = draft("gemma3")
    assert proposal is not None
    assert repairs(proposal, Findings(), "out of memory") == []


def test_the_token_that_an_error_asks_for_is_put_into_the_template() -> None:
    proposal = draft("gemma3")
    assert proposal is not None
    error = "The total number of <boi> tokens in the prompts should be the same as the number of images passed."
    ((mended, _),) = repairs(proposal, Findings(), error)
    assert mended.picture == "<boi>"
    assert "%}<boi>\\n{%" in render_adapter(mended, Findings())


@pytest.mark.parametrize(
    ("found", "hook"),
    [
        (Findings(unread=1), "vkd_list_distillation_layers"),
        (Findings(nested=("merge",)), "vkd_locate_vision_modules"),
        (Findings(modules=("model.eyes", ("model.mouth", "lm_head"))), "vkd_locate_vision_modules"),
        (Findings(class_token=37), "vkd_feature_rows"),
        (Findings(tiles=True), "vkd_feature_grid"),
        (Findings(tiles=True, class_token=37), "vkd_feature_grid"),
        (Findings(zeros=("model.gate",)), "vkd_tiny_model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_trial_found_becomes_a_hook(found: Findings, hook: str, tmp_path: Path) -> None:
    proposal = draft("gemma3")
    assert proposal is not None
    source = render_adapter(proposal, found)
    assert hook in execute(source, "mine").hooks
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    assert_well_formed(tmp_path)


def test_literals_read_back_as_what_they_were() -> None:
    value = {"a": [1, 2], "b": {"c": 'say "so"\n', "d": None}, "e": "x" * 100, "f": [{"g": ("h",)}] * 9}
    assert eval(literal(value, 0)) == {**value, "f": [{"g": ["h"]}] * 9}
    assert literal({"id": Code("token(END)")}, 0) == '{"id": token(END)}'


def test_names_of_classes_are_those_of_the_installed_transformers() -> None:
    import transformers

    found: Draft | None = draft("gemma3")
    assert found is not None
    for name in (found.model_class, found.processor_class, *(cls for cls, _ in found.parts.values())):
        assert hasattr(transformers, name), (
            f"{name} is not in transformers {importlib.metadata.version('transformers')}"
        )
