from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import asked_about, picture

from vkd_framework.cli import main
from vkd_framework.errors import AdapterError, DataError, ModelError, RecipeError
from vkd_framework.generic import locate_vision_modules, tokenize_pairs
from vkd_framework.hookspecs import hookimpl
from vkd_framework.plugins import MLLM, Adapter, load_adapter, partition
from vkd_framework.types import DistillationLayer, EncodedBatch, FeatureGrid, FeatureRows, VisionModules

TYPE = "qwen2_vl"


def adapter_with(**hooks: Callable[..., Any]) -> Adapter:
    """An adapter named `mine` with these hooks, and the model type of the tiny model."""
    plugin = types.ModuleType("mine")
    hooks.setdefault("vkd_model_types", lambda: [TYPE])
    for name, function in hooks.items():
        setattr(plugin, name, hookimpl(function))
    return Adapter("mine", plugin)


def test_an_unknown_adapter_is_answered_with_the_nearest() -> None:
    with pytest.raises(AdapterError, match=r"'qwen_v1' is not installed; did you mean 'qwen_vl'\?"):
        load_adapter("qwen_v1")


def test_a_misspelt_hook_is_named_with_the_nearest() -> None:
    with pytest.raises(AdapterError, match=r"'mine'.*'vkd_feature_row'.*did you mean 'vkd_feature_rows'\?"):
        adapter_with(vkd_feature_row=lambda model: None)


def test_an_unknown_parameter_of_a_hook_is_named() -> None:
    with pytest.raises(AdapterError, match=r"'mine'.*vkd_stop_token_ids.*tokeniser"):
        adapter_with(vkd_stop_token_ids=lambda tokeniser: [1])


def test_a_class_is_refused_where_an_instance_is_due() -> None:
    class Mine:
        @hookimpl
        def vkd_model_types(self) -> list[str]:
            return [TYPE]

    with pytest.raises(AdapterError, match="class Mine; register an instance"):
        Adapter("mine", Mine)
    assert Adapter("mine", Mine()).model_types == (TYPE,)


def test_an_adapter_without_model_types_is_refused() -> None:
    plugin = types.ModuleType("mine")
    plugin.vkd_stop_token_ids = hookimpl(lambda model: [1])  # type: ignore[attr-defined]
    with pytest.raises(AdapterError, match="'mine': the required hook vkd_model_types is missing"):
        Adapter("mine", plugin)


def test_parameters_with_defaults_are_refused() -> None:
    def stop(model: Any, processor: Any = None) -> list[int]:
        return [1]

    with pytest.raises(AdapterError, match=r"vkd_stop_token_ids.*default values"):
        adapter_with(vkd_stop_token_ids=stop)


@pytest.mark.parametrize("answer", ["qwen2_vl", [], [1], 5, {}, [None]])
def test_model_types_must_be_a_list_of_texts(answer: Any) -> None:
    with pytest.raises(AdapterError, match="'mine', hook vkd_model_types"):
        _ = adapter_with(vkd_model_types=lambda: answer).model_types


@pytest.mark.parametrize("answer", ["x", [("a", {})], {"a": 3}, 5])
def test_presets_must_be_configs_by_name(answer: Any) -> None:
    with pytest.raises(AdapterError, match="'mine', hook vkd_model_presets"):
        _ = adapter_with(vkd_model_presets=lambda: answer).presets


@pytest.mark.parametrize("answer", [3, "x", [], ["a"], {"a": 1}])
def test_stop_tokens_must_be_a_list_of_ids(tiny: MLLM, answer: Any) -> None:
    with pytest.raises(AdapterError, match="'mine', hook vkd_stop_token_ids"):
        adapter_with(vkd_stop_token_ids=lambda: answer).stop_token_ids(tiny.model, tiny.processor)


@pytest.mark.parametrize("answer", [3, [], ["vision.0"], "x", (layer for layer in ())])
def test_layers_must_be_a_list_of_layers(tiny: MLLM, answer: Any) -> None:
    with pytest.raises(AdapterError, match="'mine', hook vkd_list_distillation_layers"):
        adapter_with(vkd_list_distillation_layers=lambda: answer).list_distillation_layers(tiny.model, tiny.modules)


@pytest.mark.parametrize(
    ("names", "paths", "fragment"),
    [
        (("a", "a"), ("model.visual", "model.visual"), "'a' occurs twice"),
        (("a", "b"), ("model.visual", "model.vis"), "'model.vis', which the model does not have"),
    ],
)
def test_layers_must_have_names_of_their_own_and_real_modules(
    tiny: MLLM, names: tuple[str, str], paths: tuple[str, str], fragment: str
) -> None:
    layers = [DistillationLayer(name, path, 8, 1) for name, path in zip(names, paths, strict=True)]
    with pytest.raises(AdapterError, match=fragment):
        adapter_with(vkd_list_distillation_layers=lambda: layers).list_distillation_layers(tiny.model, tiny.modules)


@pytest.mark.parametrize(
    ("modules", "fragment"),
    [
        ("model.visual", "must return VisionModules, returned str"),
        (VisionModules("model.visuals", ("model.language_model",)), r"'model\.visuals'.*did you mean 'model\.visual'"),
        (VisionModules("model.visual", ("model.language_model", "lm_head")), "leaves the projector without"),
        (VisionModules("model", ("lm_head",), ("model.visual.merger",)), "leaves the language model without"),
    ],
)
def test_modules_must_exist_and_leave_no_part_empty(tiny: MLLM, modules: Any, fragment: str) -> None:
    with pytest.raises(AdapterError, match=f"'mine', hook vkd_locate_vision_modules.*{fragment}"):
        adapter_with(vkd_locate_vision_modules=lambda: modules).locate_vision_modules(tiny.model)


def encoded(mllm: MLLM, answer: Any) -> EncodedBatch:
    adapter = adapter_with(vkd_tokenize_pairs=lambda: answer)
    return adapter.tokenize_pairs(mllm.processor, [asked_about(None)], mllm.stop_ids, True, "right")


@pytest.mark.parametrize(
    "answer",
    [
        {"input_ids": torch.ones(1, 3)},
        EncodedBatch({}, torch.ones(1, 3), torch.ones(1, 3)),
        EncodedBatch({"input_ids": torch.ones(1, 3)}, torch.ones(1, 2), torch.ones(1, 3)),
        EncodedBatch({"input_ids": torch.ones(2, 3)}, torch.ones(2, 3), torch.ones(2, 3)),
        EncodedBatch({"input_ids": torch.ones(1, 3)}, torch.ones(1, 3), torch.zeros(1, 3)),
        EncodedBatch({"input_ids": torch.ones(1, 3)}, [[1, 1, 1]], [[1, 1, 1]]),  # type: ignore[arg-type]
    ],
    ids=["dict", "no input_ids", "labels of another length", "too many rows", "no answer token", "lists"],
)
def test_an_encoded_batch_must_fit_its_pairs(tiny: MLLM, answer: Any) -> None:
    with pytest.raises(AdapterError, match="'mine', hook vkd_tokenize_pairs"):
        encoded(tiny, answer)


def test_of_several_pairs_the_one_that_cannot_be_encoded_is_named(tiny: MLLM) -> None:
    strip = replace(asked_about(picture(3, 900)), id="rows.jsonl:7")
    with pytest.raises(DataError, match=rf"^rows\.jsonl:7: .* with '{strip.photo_keys[0]}'; change it .*aspect ratio"):
        tiny.tokenize([asked_about(picture(48, 48)), asked_about(None), strip])
    with pytest.raises(AdapterError, match="hook vkd_tokenize_pairs: raised ValueError: absolute aspect ratio"):
        tiny.tokenize([strip])  # nothing tells whose fault it is


def test_labels_of_the_processors_own_must_not_reach_the_model(tiny: MLLM) -> None:
    ids = torch.ones(1, 3)
    with pytest.raises(AdapterError, match="hook vkd_tokenize_pairs: must leave the processor's own labels out"):
        encoded(tiny, EncodedBatch({"input_ids": ids, "labels": ids}, ids, ids))


@pytest.mark.parametrize(
    "answer",
    [
        torch.zeros(4),
        FeatureRows(torch.zeros(3, dtype=torch.long), torch.ones(4, dtype=torch.bool)),
        FeatureRows(torch.zeros(4, dtype=torch.long), torch.ones(3, dtype=torch.bool)),
        FeatureRows([0, 0, 0, 0], [True] * 4),  # type: ignore[arg-type]
    ],
    ids=["tensor", "too few samples", "too few flags", "lists"],
)
def test_feature_rows_must_cover_every_row(tiny: MLLM, answer: Any) -> None:
    adapter = adapter_with(vkd_feature_rows=lambda: answer)
    with pytest.raises(AdapterError, match="'mine', hook vkd_feature_rows"):
        adapter.feature_rows(tiny.model, {"input_ids": torch.zeros(1, 4)}, tiny.layers[0], 4)


@pytest.mark.parametrize("answer", [None, "model", ("model", "processor"), 3])
def test_a_tiny_model_must_be_a_model_and_its_processor(answer: Any) -> None:
    with pytest.raises(AdapterError, match="'mine', hook vkd_tiny_model"):
        adapter_with(vkd_tiny_model=lambda: answer).tiny_model(["a"], 48, 0)


def test_a_hook_that_raises_is_named_with_its_error(tiny: MLLM) -> None:
    def broken() -> None:
        return {}["gone"]  # type: ignore[no-any-return]

    with pytest.raises(AdapterError, match="'mine', hook vkd_stop_token_ids: raised KeyError: 'gone'") as caught:
        adapter_with(vkd_stop_token_ids=broken).stop_token_ids(tiny.model, tiny.processor)
    assert "\n" not in str(caught.value)


def test_an_error_of_many_lines_is_told_in_one(tiny: MLLM) -> None:
    def broken() -> None:
        raise ValueError("first\nsecond\nthird")

    with pytest.raises(AdapterError) as caught:
        adapter_with(vkd_stop_token_ids=broken).stop_token_ids(tiny.model, tiny.processor)
    assert "\n" not in str(caught.value)


def test_the_adapters_answer_wins_and_none_falls_back_to_the_generic_one(tiny: MLLM) -> None:
    own = adapter_with(vkd_stop_token_ids=lambda: [42]).stop_token_ids(tiny.model, tiny.processor)
    fallen_back = adapter_with(vkd_stop_token_ids=lambda: None).stop_token_ids(tiny.model, tiny.processor)
    assert own == (42,)
    assert fallen_back == adapter_with().stop_token_ids(tiny.model, tiny.processor) == tiny.stop_ids != own


def test_an_adapter_may_reuse_a_generic_function_with_one_thing_changed(tiny: MLLM) -> None:
    def tokenize(processor: Any, pairs: Any, stop_ids: Any, with_answer: bool, padding_side: str) -> EncodedBatch:
        return tokenize_pairs(processor, pairs, stop_ids, with_answer, "left")

    adapter = adapter_with(
        vkd_locate_vision_modules=lambda model: locate_vision_modules(model, nested_projector=("merger",)),
        vkd_tokenize_pairs=tokenize,
    )
    batch = adapter.bind(tiny.model, tiny.processor).tokenize([asked_about(None), asked_about(picture(48, 48))])
    assert not batch.inputs["attention_mask"][0, 0]


def test_a_model_of_another_family_is_refused(tiny: MLLM) -> None:
    other = adapter_with(vkd_model_types=lambda: ["some_vl", "another"])
    with pytest.raises(ModelError, match=r"'qwen2_vl', adapter 'mine' serves some_vl, another; name another adapter"):
        other.bind(tiny.model, tiny.processor)


def test_every_parameter_is_in_exactly_one_part(tiny: MLLM) -> None:
    names = [name for part in tiny.parts.values() for name in part]
    assert sorted(names) == sorted(name for name, _ in tiny.model.named_parameters())


def test_the_merger_inside_the_encoder_belongs_to_the_projector(tiny: MLLM) -> None:
    assert tiny.parts["projector"]
    assert all(".merger." in name for name in tiny.parts["projector"])
    assert not any(".merger." in name for name in tiny.parts["encoder"])
    assert all(name.startswith("model.visual.") for name in tiny.parts["encoder"])


def test_what_lies_between_encoder_and_language_model_is_projector() -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(1, 1) for name in ("tower", "tower_extra", "text", "bridge")})
    model.register_parameter("newline", torch.nn.Parameter(torch.ones(1)))
    parts = partition(model, VisionModules("tower", ("text",)))
    assert parts["encoder"] == ("tower.weight", "tower.bias")
    assert parts["language_model"] == ("text.weight", "text.bias")
    assert set(parts["projector"]) == {
        "newline",
        "bridge.weight",
        "bridge.bias",
        "tower_extra.weight",
        "tower_extra.bias",
    }


def test_an_unknown_layer_is_answered_with_its_place_and_the_nearest(tiny: MLLM) -> None:
    with pytest.raises(
        RecipeError,
        match=r"losses\.repel\.layers: 'vison\.1'.*did you mean 'vision\.1'\?.*vision\.0 to vision\.2, projector",
    ):
        tiny.layer("vison.1", "losses.repel.layers")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("grid", "must return FeatureGrid"),
        (FeatureGrid(torch.zeros(4, dtype=torch.long), torch.zeros(4, 2)), "must place 4 rows"),
        (FeatureGrid(torch.full((4,), 2), torch.tensor([[0.0, 0, 1, 1]] * 4)), "beyond the batch's 2 photos"),
        (FeatureGrid(torch.zeros(4, dtype=torch.long), torch.tensor([[0.0, 0, 2, 1]] * 4)), "boxes within 0 and 1"),
        (FeatureGrid(torch.zeros(4, dtype=torch.long), torch.tensor([[1.0, 0, 0, 1]] * 4)), "left before right"),
    ],
)
def test_a_grid_must_place_every_real_row_on_a_photo(tiny: MLLM, answer: Any, told: str) -> None:
    adapter = adapter_with(vkd_feature_grid=lambda: answer)
    assigned = FeatureRows(torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.bool))
    with pytest.raises(AdapterError, match=f"'mine', hook vkd_feature_grid: .*{told}"):
        adapter.feature_grid(tiny.model, {}, tiny.layers[0], assigned, [[(48, 48)], [(48, 48)]])


def test_a_template_whose_prompt_is_no_prefix_is_refused(tiny: MLLM) -> None:
    def tokenize(processor: Any, pairs: Any, stop_ids: Any, with_answer: bool, padding_side: str) -> EncodedBatch:
        batch = tokenize_pairs(processor, pairs, stop_ids, with_answer, padding_side)
        if not with_answer:
            batch.inputs["input_ids"][:, -1] += 1
        return batch

    adapter = adapter_with(
        vkd_locate_vision_modules=lambda model: locate_vision_modules(model, nested_projector=("merger",)),
        vkd_tokenize_pairs=tokenize,
    )
    with pytest.raises(ModelError, match="tokenized differently when an answer follows"):
        adapter.bind(tiny.model, tiny.processor).check_prompt_is_prefix(asked_about(None))


GOOD = """
from vkd_framework.hookspecs import hookimpl
@hookimpl
def vkd_model_types():
    return {types}
"""
ASK = """
from vkd_framework.errors import VKDError
from vkd_framework.plugins import adapter_for_model_type, installed_adapters, load_adapter
def told(ask):
    try:
        return ask()
    except VKDError as error:
        return f"{{type(error).__name__}}: {{error}}"
print({expression})
"""


def install(folder: Path, distribution: str, module: str, source: str, names: tuple[str, ...]) -> None:
    """A distribution as pip leaves it: a module and a dist-info folder with entry points."""
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    entries = "".join(f"{name} = {module}\n" for name in names)
    (info / "entry_points.txt").write_text(f"[vkd_framework]\n{entries}")


def ask(folder: Path, expression: str) -> str:
    command = f"import sys; sys.path.insert(0, {str(folder)!r})\n{ASK.format(expression=expression)}"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_strangers_adapter_is_found_beside_the_built_in_ones(tmp_path: Path) -> None:
    install(tmp_path, "vkd-other", "other_vkd", GOOD.format(types=["other"]), ("other", "third"))
    names = ask(tmp_path, "*[adapter.name for adapter in installed_adapters()]").split()
    assert names == sorted(names)
    assert {"other", "qwen_vl", "third"} <= set(names)
    assert (
        ask(tmp_path, "load_adapter('other').model_types, adapter_for_model_type('other').name") == "('other',) other"
    )


def test_two_distributions_that_claim_one_name_are_both_named(tmp_path: Path) -> None:
    install(tmp_path, "vkd-one", "one_vkd", GOOD.format(types=["one"]), ("mine",))
    install(tmp_path, "vkd-two", "two_vkd", GOOD.format(types=["two"]), ("mine",))
    answer = ask(tmp_path, "told(lambda: load_adapter('mine'))")
    assert answer.startswith("AdapterError: ")
    assert "'mine'" in answer and "vkd-one" in answer and "vkd-two" in answer


def test_two_distributions_that_claim_one_name_disturb_no_other_adapter(tmp_path: Path) -> None:
    install(tmp_path, "vkd-one", "one_vkd", GOOD.format(types=["one"]), ("mine",))
    install(tmp_path, "vkd-two", "two_vkd", GOOD.format(types=["two"]), ("mine",))
    assert ask(tmp_path, "told(lambda: load_adapter('qwen_vl').name)") == "qwen_vl"


def test_an_adapter_that_raises_at_import_disturbs_no_other(tmp_path: Path) -> None:
    install(tmp_path, "vkd-broken", "broken_vkd", "raise RuntimeError('no licence')", ("aaa",))
    assert ask(tmp_path, "load_adapter('qwen_vl').name, adapter_for_model_type('qwen2_vl').name") == "qwen_vl qwen_vl"
    answer = ask(tmp_path, "told(lambda: load_adapter('aaa'))")
    assert answer == (
        "AdapterError: adapter 'aaa' (vkd-broken 1.0) does not import: RuntimeError: no licence; "
        "mend or uninstall vkd-broken"
    )


def test_an_adapter_that_breaks_its_contract_disturbs_no_other(tmp_path: Path) -> None:
    install(tmp_path, "vkd-odd", "odd_vkd", GOOD.format(types=[3]), ("aaa",))
    assert ask(tmp_path, "told(lambda: adapter_for_model_type('qwen2_vl').name)") == "qwen_vl"


def test_when_no_adapter_serves_a_type_the_broken_ones_are_named(tmp_path: Path) -> None:
    install(tmp_path, "vkd-broken", "broken_vkd", "raise RuntimeError('no licence')", ("aaa",))
    answer = ask(tmp_path, "told(lambda: adapter_for_model_type('new_vl'))")
    assert "'new_vl'" in answer and "qwen2_vl" in answer and "no licence" in answer


def test_a_run_imports_no_adapter_but_its_own(tmp_path: Path) -> None:
    install(tmp_path, "vkd-other", "other_vkd", GOOD.format(types=["other"]), ("aaa",))
    assert ask(tmp_path, "load_adapter('qwen_vl').name, 'other_vkd' in sys.modules") == "qwen_vl False"


def vkd(folder: Path, *arguments: str) -> Result:
    """The command, with what is installed in `folder` beside everything else.

    In this process, where torch is imported already; what came from `folder` is forgotten afterwards.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.chdir(folder)
        done = CliRunner().invoke(main, arguments)
        for name, module in [*sys.modules.items()]:
            if str(getattr(module, "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]
    return done


def told(done: Result) -> str:
    """The one line that a user's mistake is told in."""
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.strip().splitlines()
    return line


PRESET = "Qwen/Qwen2-VL-7B-Instruct"
UNMARKED = """
def vkd_stop_token_ids(model, processor):
    return [1]
"""
MISBEHAVING = {
    "raises": ("raise RuntimeError('no licence')", ("RuntimeError: no licence", "mend or uninstall vkd-odd")),
    "leaves": ("raise SystemExit('not on this machine')", ("SystemExit: not on this machine",)),
    "needs a package": ("import nowhere_to_be_had.deep", ("install the package that provides 'nowhere_to_be_had'",)),
    "does not parse": ("def (", ("SyntaxError",)),
    "misspelt hook": (
        GOOD.format(types=["odd"]) + "@hookimpl\ndef vkd_feature_row(model): ...\n",
        ("'vkd_feature_row'", "did you mean 'vkd_feature_rows'?"),
    ),
    "unmarked hook": (
        GOOD.format(types=["odd"]) + UNMARKED,
        ("vkd_stop_token_ids is not marked as a hook", "mark it with @hookimpl"),
    ),
    "marked for another project": (
        GOOD.format(types=["odd"]) + "import pluggy\n@pluggy.HookimplMarker('pytest')" + UNMARKED,
        ("vkd_stop_token_ids is not marked as a hook",),
    ),
    "nothing in it": ("", ("the required hook vkd_model_types is missing",)),
    "wrong answer": (GOOD.format(types=[3]), ("hook vkd_model_types", "returned [3]")),
    "leaves when asked": (GOOD.format(types="exit(3)"), ("hook vkd_model_types", "raised SystemExit: 3")),
}


@pytest.mark.parametrize("case", MISBEHAVING)
def test_an_adapter_that_misbehaves_is_named_with_its_distribution_and_hides_no_other(
    tmp_path: Path, case: str
) -> None:
    source, fragments = MISBEHAVING[case]
    install(tmp_path, "vkd-odd", "odd_vkd", source, ("aaa",))
    install(tmp_path, "vkd-fine", "fine_vkd", GOOD.format(types=["fine"]), ("zzz",))
    done = vkd(tmp_path, "adapters", "--json")
    assert done.exit_code == 0, done.output
    found = {row["name"]: row for row in json.loads(done.stdout)}
    assert {name for name, row in found.items() if "error" in row} == {"aaa"}
    assert PRESET in found["qwen_vl"]["presets"] and found["zzz"]["model_types"] == ["fine"]
    for fragment in ("adapter 'aaa' (vkd-odd 1.0)", *fragments):
        assert fragment in found["aaa"]["error"]


def test_a_class_at_an_entry_point_is_named_with_its_distribution(tmp_path: Path) -> None:
    install(tmp_path, "vkd-odd", "odd_vkd", "class Mine: ...", ("aaa",))
    info = tmp_path / "vkd_odd-1.0.dist-info" / "entry_points.txt"
    info.write_text("[vkd_framework]\naaa = odd_vkd:Mine\n")
    text = vkd(tmp_path, "adapters").stdout
    assert "broken: adapter 'aaa' (vkd-odd 1.0) is the class Mine; register an instance or a module" in text
    info.write_text("[vkd_framework]\naaa = odd_vkd.gone\n")
    assert "names a module that is not there, so install vkd-odd again" in vkd(tmp_path, "adapters").stdout


@pytest.mark.parametrize("case", ["leaves", "needs a package", "unmarked hook", "leaves when asked"])
def test_a_preset_is_described_beside_an_adapter_that_misbehaves(tmp_path: Path, case: str) -> None:
    install(tmp_path, "vkd-odd", "odd_vkd", MISBEHAVING[case][0], ("aaa",))
    done = vkd(tmp_path, "inspect-layers", PRESET)
    assert done.exit_code == 0, done.output
    assert "adapter qwen_vl" in done.stdout


FEW = ("--set", "data.people=8", "--set", "data.forget=2", "--set", "data.strangers=4", "--set", "data.extras=4")
"""A cast that is drawn soon."""


def test_a_dry_run_never_imports_another_adapter(tmp_path: Path) -> None:
    mark = tmp_path / "imported"
    install(tmp_path, "vkd-odd", "odd_vkd", f"open({str(mark)!r}, 'w')\nraise SystemExit(1)", ("aaa",))
    done = vkd(tmp_path, "run", "qwen2vl_celeb", "--dry-run", *FEW)
    assert done.exit_code == 0, done.output
    unknown = vkd(
        tmp_path, "run", "qwen2vl_celeb", "--dry-run", "--set", "teach=null", "--set", "reference=none", "--set",
        "model.source=nobody/nothing",
    )  # fmt: skip
    assert "nobody/nothing: no preset" in told(unknown)
    assert not mark.exists()
    vkd(tmp_path, "adapters")
    assert mark.exists()


RIVAL = f"""
from vkd_framework.generic import locate_vision_modules
from vkd_framework.hookspecs import hookimpl
@hookimpl
def vkd_model_types():
    return ["{TYPE}"]
@hookimpl
def vkd_locate_vision_modules(model):
    return locate_vision_modules(model, nested_projector=("merger",))
"""
OFFER = f"""
@hookimpl
def vkd_model_presets():
    return {{"{PRESET}": {{"model_type": "{TYPE}"}}}}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"num_key_value_heads": 2, "vocab_size": 50, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    vision = {"depth": 3, "embed_dim": 64, "num_heads": 2, "hidden_size": 32}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": TYPE, "vision_config": vision} | text | more))
    return "config.json"


def test_of_two_adapters_that_serve_a_model_type_neither_wins_without_being_chosen(tmp_path: Path, config: str) -> None:
    install(tmp_path, "vkd-rival", "rival_vkd", RIVAL, ("zzz",))
    line = told(vkd(tmp_path, "inspect-layers", config))
    assert "'qwen_vl' (vkd-framework " in line and "'zzz' (vkd-rival 1.0)" in line
    assert "--adapter qwen_vl or zzz" in line
    for name in ("qwen_vl", "zzz"):
        chosen = vkd(tmp_path, "inspect-layers", config, "--adapter", name)
        assert f"adapter {name}," in chosen.stdout, chosen.stderr


@pytest.mark.slow
def test_of_two_adapters_that_offer_a_preset_neither_wins_without_being_chosen(tmp_path: Path) -> None:
    install(tmp_path, "vkd-rival", "rival_vkd", RIVAL + OFFER, ("zzz",))
    line = told(vkd(tmp_path, "inspect-layers", PRESET))
    assert f"preset {PRESET} is offered by several adapters" in line
    assert "(vkd-framework " in line and "(vkd-rival 1.0)" in line and "--adapter" in line
    assert "adapter qwen_vl," in vkd(tmp_path, "inspect-layers", PRESET, "--adapter", "qwen_vl").stdout
    assert vkd(tmp_path, "run", "qwen2vl_celeb", "--dry-run", *FEW).exit_code == 0


def test_a_preset_is_described_by_the_adapter_that_offers_it_although_another_serves_its_type(tmp_path: Path) -> None:
    install(tmp_path, "vkd-rival", "rival_vkd", RIVAL, ("aaa",))
    assert "adapter qwen_vl," in vkd(tmp_path, "inspect-layers", PRESET).stdout


def test_a_name_claimed_by_two_distributions_is_refused_to_whoever_asks_for_it_and_to_nobody_else(
    tmp_path: Path,
) -> None:
    install(tmp_path, "vkd-one", "one_vkd", GOOD.format(types=["one"]), ("mine",))
    install(tmp_path, "vkd-two", "two_vkd", GOOD.format(types=["two"]), ("mine",))
    line = told(vkd(tmp_path, "inspect-layers", PRESET, "--adapter", "mine"))
    assert "'mine' is registered by both vkd-one and vkd-two; uninstall one of them" in line
    assert vkd(tmp_path, "inspect-layers", PRESET).exit_code == 0


def test_an_unknown_adapter_given_to_inspect_layers_is_answered_with_the_nearest(tmp_path: Path) -> None:
    assert "did you mean 'qwen_vl'?" in told(vkd(tmp_path, "inspect-layers", PRESET, "--adapter", "qwen_v1"))


@pytest.mark.slow
def test_a_hub_that_cannot_be_found_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    command = [sys.executable, "-m", "vkd_framework", "inspect-layers", "nobody/nothing"]  # asked once, at import
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "not to be had from the hub (hub.invalid cannot be found from this machine)" in line


RENAMING = """
from dataclasses import replace
from vkd_adapters.qwen_vl import *
@hookimpl
def vkd_list_distillation_layers(model, modules):
    layers = generic.list_distillation_layers(model, modules)
    return [replace(layers[0], name={name!r}), *layers[1:]]
"""


def test_an_adapter_that_was_edited_shows_no_stale_layers(tmp_path: Path, tiny: MLLM) -> None:
    install(tmp_path, "vkd-edited", "edited_vkd", RENAMING.format(name="vision.00"), ("aaa",))
    tiny.model.config.save_pretrained(tmp_path)

    def first() -> str:
        done = vkd(tmp_path, "inspect-layers", str(tmp_path), "--adapter", "aaa", "--json")
        return str(json.loads(done.stdout)["layers"][0]["name"])

    assert first() == "vision.00"
    (tmp_path / "edited_vkd.py").write_text(RENAMING.format(name="vision.zero"))
    assert first() == "vision.zero"
