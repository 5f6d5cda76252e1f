from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from wrong_hooks import (
    NAMES,
    QWEN,
    checked,
    family,
    needs_weights,
    ragged,
    tiny_as,
    tokens_as,
    without_grids,
)

from vkd_framework import testing
from vkd_framework.cli import main
from vkd_framework.errors import AdapterError
from vkd_framework.hookspecs import hookimpl
from vkd_framework.plugins import Adapter, installed_adapters, load_adapter
from vkd_framework.testing import CheckResult, assert_conforms, check_adapter, find_adapter, table
from vkd_framework.testing.checks import ADAPTER_CHECKS, MODEL_CHECKS
from vkd_framework.testing.outcomes import one_line
from vkd_framework.types import (
    EncodedBatch,
)

PAGE = Path(__file__).parent.parent / "docs" / "conformance.md"
FIRST = "a-question-about-a-photo-is-answered"


BUILT_IN = {
    adapter.name: load_adapter(adapter.name).model_types
    for adapter in installed_adapters()
    if adapter.distribution == "vkd-framework"
}
"""Every adapter that comes with vkd -> the model types that it serves."""


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        pytest.param(name, model_type, marks=[pytest.mark.slow] * (index > 0))
        for name, model_types in BUILT_IN.items()
        for index, model_type in enumerate(model_types)
    ],
)
def test_every_built_in_architecture_conforms_and_nothing_is_printed_on_the_way(
    name: str, model_type: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    if model_type == "smolvlm" and importlib.util.find_spec("num2words") is None:
        pytest.skip("until num2words is installed, without which transformers does not make this processor")
    assert_conforms(name, f"tiny:{model_type}")
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_every_family_is_among_the_built_in_ones() -> None:
    assert {"idefics", "internvl", "llava", "qwen_vl"} <= set(BUILT_IN)


def test_a_family_that_cannot_mix_sizes_fails_one_check_and_no_other() -> None:
    failed = checked(*QWEN, {"vkd_tokenize_pairs": ragged})
    assert list(failed) == ["differently-sized-photos-share-a-batch"]
    assert "cannot stack photos of 4 sizes" in failed["differently-sized-photos-share-a-batch"].found


@pytest.mark.parametrize("model_type", ["llava", "llava_onevision"])
def test_photos_that_a_template_writes_with_nothing_in_between_are_told_apart(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def adjoining(model: Any, processor: Any) -> None:
        template = processor.chat_template.replace("<image>\n", "<image>")
        assert template != processor.chat_template
        processor.chat_template = template

    looking = [check for check in MODEL_CHECKS if check.look.startswith("vkd_feature_rows")]
    monkeypatch.setattr(testing, "MODEL_CHECKS", looking)
    assert checked("llava", model_type, tiny_as(adjoining, "llava")) == {}


def test_checks_that_stop_at_the_same_error_are_told_in_one() -> None:
    failed = checked(*QWEN, tokens_as(without_grids))
    assert set(failed) == {"a-question-about-a-photo-is-answered", "every-key-of-the-processor-is-kept"}
    first = failed["a-question-about-a-photo-is-answered"]
    assert len(first.also) > 9
    assert f"{len(first.also)} further checks stopped" in first.look
    assert set(first.also) < set(NAMES) - set(failed)


def test_checks_that_are_told_in_one_are_counted_one_by_one() -> None:
    results = [CheckResult("a", True, "x", "", "y"), CheckResult("b", False, "x", "z", "y", also=("c", "d"))]
    assert testing.count(results) == 4
    assert table(results).endswith("\n4 checks, 3 failed")
    assert table(results[1:], testing.count(results)).endswith("\n4 checks, 3 failed")


def test_every_check_is_counted_whatever_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [check for check in MODEL_CHECKS if check.look == MODEL_CHECKS[0].look][:3]
    monkeypatch.setattr(testing, "MODEL_CHECKS", few)
    plugin = types.ModuleType("wrong")
    own = {name: hook for name, hook in vars(family("qwen_vl")).items() if name.startswith("vkd_")}
    vars(plugin).update(own | {"vkd_tokenize_pairs": hookimpl(lambda processor: 3)})
    with pytest.raises(AssertionError, match=f"{len(ADAPTER_CHECKS) + len(few)} checks, {len(few)} failed$"):
        assert_conforms(Adapter("wrong", plugin), "tiny:qwen2_vl")


def test_an_error_that_names_a_hook_sends_the_author_there(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [FIRST, "answers-end-with-the-first-stop-token"]
    monkeypatch.setattr(testing, "MODEL_CHECKS", [check for check in MODEL_CHECKS if check.name in chosen])
    failed = checked(*QWEN, {"vkd_stop_token_ids": lambda: [3.5]})[FIRST]
    assert "hook vkd_stop_token_ids: must return" in failed.found
    assert failed.look.startswith("vkd_stop_token_ids (docs/hooks.md); vkd_framework.generic.stop_token_ids;")


def test_a_model_that_does_not_load_for_another_hook_sends_the_author_to_that_one() -> None:
    failed = checked(*QWEN, {"vkd_locate_vision_modules": lambda: 3})["the-model-loads"]
    assert "hook vkd_locate_vision_modules: must return" in failed.found
    assert failed.look.startswith("vkd_locate_vision_modules (docs/hooks.md)")


def test_what_an_adapter_refuses_to_place_is_told_and_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "rows-lie-where-the-grid-says"
    monkeypatch.setattr(testing, "MODEL_CHECKS", [check for check in MODEL_CHECKS if check.name == name])
    *_, result = check_adapter("idefics", "tiny:idefics2")
    assert result.ok
    assert result.found == "refused: projector at 48x48, 32x48, 96x48, 144x48"
    assert f"ok    {name} ({result.found})" in table([result])


def without_photos(batch: EncodedBatch) -> EncodedBatch:
    """Image tokens without what they stand for, which Qwen2-VL's own code refuses."""
    return replace(batch, inputs={**batch.inputs, "pixel_values": batch.inputs["pixel_values"][:4]})


def test_a_foreign_error_is_told_with_its_place_in_the_familys_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "MODEL_CHECKS", [check for check in MODEL_CHECKS if check.name == FIRST])
    failed = checked(*QWEN, tokens_as(without_photos))
    assert re.search(r"^raised \w+Error: .* \(modeling_qwen2_vl\.py:\d+, \w+\)$", failed[FIRST].found), failed[
        FIRST
    ].found


def test_a_hooks_own_error_is_told_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(processor: Any) -> list[int]:
        raise KeyError("gone")

    monkeypatch.setattr(testing, "MODEL_CHECKS", [check for check in MODEL_CHECKS if check.name == FIRST])
    found = checked(*QWEN, {"vkd_stop_token_ids": forgetful})[FIRST].found
    assert re.search(r"raised KeyError: 'gone' \(test_conformance\.py:\d+, forgetful\)$", found), found


def test_an_error_below_a_hook_is_told_with_the_hooks_own_line_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def asks_for_nothing(processor: Any) -> EncodedBatch:
        return processor(images=[3], text=["a"])  # type: ignore[no-any-return]

    monkeypatch.setattr(testing, "MODEL_CHECKS", [check for check in MODEL_CHECKS if check.name == FIRST])
    found = checked(*QWEN, {"vkd_tokenize_pairs": asks_for_nothing})[FIRST].found
    assert re.search(r" \(test_conformance\.py:\d+, asks_for_nothing(; \w+qwen2_vl\w*\.py:\d+, \w+)?\)$", found), found


def test_a_message_that_holds_a_whole_model_keeps_its_two_ends() -> None:
    told = one_line(TypeError(f"Model({'layer ' * 1000}) got multiple values for keyword argument 'labels'"))
    assert told.startswith("TypeError: Model(layer") and told.endswith("keyword argument 'labels'")
    assert " … " in told and len(told) < 450


def test_a_check_that_raises_does_not_keep_the_others_from_running(monkeypatch: pytest.MonkeyPatch) -> None:
    meta = next(check for check in MODEL_CHECKS if check.name == "the-meta-device-shows-the-same-model")
    last = next(check for check in MODEL_CHECKS if check.name == "parameter-counts-are-true")
    ran: list[str] = []

    @wraps(last.run)
    def watched(subject: Any) -> None:
        ran.append(last.name)
        last.run(subject)

    monkeypatch.setattr(testing, "MODEL_CHECKS", [meta, replace(last, run=watched)])
    failed = checked(*QWEN, {"vkd_list_distillation_layers": needs_weights})
    assert set(failed) == {"presets-can-be-described", "the-meta-device-shows-the-same-model"}
    assert ran == [last.name]


def test_a_model_that_does_not_load_is_one_failed_check() -> None:
    failed = checked(*QWEN, {"vkd_stop_token_ids": lambda: [1], "vkd_load_model": lambda source: 3})
    assert list(failed) == ["the-model-loads"]
    assert "vkd_load_model: must return (model, processor)" in failed["the-model-loads"].found


def test_an_adapter_without_a_tiny_model_is_told_what_to_do() -> None:
    plugin = types.ModuleType("wrong")
    vars(plugin)["vkd_model_types"] = hookimpl(lambda: ["qwen2_vl"])
    *fine, last = check_adapter(Adapter("wrong", plugin))
    assert all(result.ok for result in fine)
    assert last.name == "there-is-a-model-to-check" and not last.ok
    assert "vkd_tiny_model" in last.look and "--model" in last.look


def test_names_bear_the_model_type_when_there_are_several() -> None:
    plugin = types.ModuleType("two")
    own = {name: hook for name, hook in vars(family("qwen_vl")).items() if name.startswith("vkd_")}
    vars(plugin).update(own | {"vkd_load_model": hookimpl(lambda source: 3)})
    names = [result.name for result in check_adapter(Adapter("two", plugin)) if not result.ok]
    assert names == [f"{model_type}: the-model-loads" for model_type in load_adapter("qwen_vl").model_types]


def test_assert_conforms_shows_the_failures_and_nothing_else() -> None:
    plugin = types.ModuleType("wrong")
    vars(plugin)["vkd_model_types"] = hookimpl(lambda: ["qwen2_vl"])
    with pytest.raises(AssertionError) as caught:
        assert_conforms(Adapter("wrong", plugin))
    text = str(caught.value)
    assert "FAIL  there-is-a-model-to-check" in text
    assert all(f"      {what} " in text for what in ("expected", "found", "look"))
    assert "\nok " not in text
    assert text.endswith(f"{len(ADAPTER_CHECKS) + 1} checks, 1 failed")


def test_the_table_counts_and_names_every_check() -> None:
    results = [CheckResult("a", True, "x", "", "y"), CheckResult("b", False, "this", "that", "there")]
    assert table(results).splitlines() == [
        "ok    a",
        "FAIL  b",
        "      expected  this",
        "      found     that",
        "      look      there",
        "2 checks, 1 failed",
    ]
    assert table(results[:1]).endswith("1 checks, all hold")


WRONG = """
from vkd_framework.hookspecs import hookimpl
from vkd_adapters.qwen_vl import *
@hookimpl
def vkd_stop_token_ids(processor):
    return [processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The working folder holds a package with an adapter that is not installed."""
    (tmp_path / "unreleased").mkdir()
    (tmp_path / "unreleased" / "__init__.py").touch()
    (tmp_path / "unreleased" / "family.py").write_text(WRONG, encoding="utf-8")
    (tmp_path / "unreleased" / "broken.py").write_text("import nothing_of_that_name", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "unreleased.family"
    for name in [name for name in sys.modules if name.startswith("unreleased")]:
        del sys.modules[name]


def test_the_command_checks_a_module_before_it_is_installed_and_fails(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "answers-end-with-the-first-stop-token"
    monkeypatch.setattr(testing, "MODEL_CHECKS", [check for check in MODEL_CHECKS if check.name in (FIRST, name)])
    done = CliRunner().invoke(main, ["check-adapter", module, "--model", "tiny:qwen2_vl"])
    assert done.exit_code == 1
    assert f"FAIL  {name}" in done.stdout and f"ok    {FIRST}" in done.stdout
    assert done.stdout.endswith(f"{len(ADAPTER_CHECKS) + 2} checks, 1 failed\n")


def test_the_command_prints_json_for_programs(module: str) -> None:
    done = CliRunner().invoke(main, ["check-adapter", module, "--model", "tiny:no_such_type", "--json"])
    assert done.exit_code == 1
    rows = json.loads(done.stdout)
    assert set(rows[0]) == {"name", "ok", "expected", "found", "look", "also"}
    assert "no_such_type" in rows[-1]["found"] and not rows[-1]["ok"]


@pytest.mark.slow
def test_the_command_passes_a_built_in_adapter() -> None:
    code = "from vkd_framework.cli import entry_point; entry_point()"
    command = [sys.executable, "-c", code, "check-adapter", "qwen_vl", "--model", "tiny:qwen2_vl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"{len(NAMES)} checks, all hold\n")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("qwen_v", r"'qwen_v' is not installed; did you mean 'qwen_vl'\?"),
        ("unreleased.famly", "neither installed nor a module that can be imported"),
        ("no_such.module", "neither installed nor a module that can be imported"),
        ("unreleased.broken", "'unreleased.broken' does not import: .*nothing_of_that_name"),
        ("os.path", "'os.path': the required hook vkd_model_types is missing"),
    ],
)
def test_an_adapter_that_is_not_there_is_one_line_and_status_2(module: str, name: str, told: str) -> None:
    done = CliRunner().invoke(main, ["check-adapter", name])
    assert done.exit_code == 2
    assert re.search(told, done.stderr)
    assert done.stderr.count("\n") == 1
    with pytest.raises(AdapterError, match=told):
        find_adapter(name)


def test_the_page_lists_every_check_in_order_with_the_hook_to_look_at() -> None:
    rows = re.findall(
        r"^\| `([a-z0-9-]+)` \| .+? \| `(vkd_\w+)` \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert rows == [(check.name, check.look.split()[0]) for check in (*ADAPTER_CHECKS, *MODEL_CHECKS)]


@pytest.mark.parametrize("name", ["README.md", "docs/writing_an_adapter.md"])
def test_a_page_that_counts_the_checks_counts_them_all(name: str) -> None:
    told = re.findall(r"(\d+) checks", (PAGE.parent.parent / name).read_text(encoding="utf-8"))
    assert told and {int(count) for count in told} == {len(NAMES)}
