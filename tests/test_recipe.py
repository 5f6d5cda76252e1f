from __future__ import annotations

import json
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import make_recipe

from vkd_framework.errors import RecipeError
from vkd_framework.methods import METHODS
from vkd_framework.recipe import Recipe, bundled_recipes, find_recipe, load_recipe

MINIMAL = {
    "name": "mine",
    "adapter": "qwen_vl",
    "data": {"kind": "celebs"},
    "teach": {"steps": 5},
    "layers": ["projector"],
}


def written(folder: Path, text: str | None = None, **changes: Any) -> Path:
    """A recipe file: the minimal one with `changes`, or this text."""
    path = folder / "mine.yaml"
    path.write_text(text if text is not None else yaml.safe_dump(MINIMAL | changes), encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path), overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_status == 2
    return message


@pytest.mark.parametrize("name", bundled_recipes())
def test_every_shipped_recipe_is_valid_and_round_trips(name: str) -> None:
    recipe = load_recipe(name)
    again = Recipe.model_validate(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe
    assert again.digest() == recipe.digest()
    assert recipe.name == name
    assert recipe.description


def test_a_jsonl_recipe_round_trips_with_its_paths(tmp_path: Path) -> None:
    data = {"kind": "jsonl", "rows": "rows.jsonl", "forget": ["Jane Roe"], "images": "photos"}
    path = written(tmp_path, data=data, teach=None, model={"source": "some/model"})
    recipe = load_recipe(str(path))
    assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe


BROKEN: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown key": ({"unlern": {"steps": 3}}, ("unlern: unknown key", "did you mean 'unlearn'?")),
    "self with a source": (
        {"teacher": {"source": "timm/x"}},
        ("teacher: source: timm/x goes with kind ignorant or external",),
    ),
    "ignorant without a source": ({"teacher": {"kind": "ignorant"}}, ("teacher: kind: ignorant needs a source",)),
    "external from nowhere": (
        {"teacher": {"kind": "external", "source": "torchvision/resnet18"}},
        ("teacher: kind: external needs a source: timm/NAME",),
    ),
    "random weights of the model itself": (
        {"teacher": {"weights": "random"}},
        ("teacher.weights goes with teacher.kind: external, and it is self here",),
    ),
    "ignorant without the reference": (
        {"teacher": {"kind": "ignorant", "source": "retain_only"}},
        ("teacher.source: retain_only needs that model", "set reference to retain_only"),
    ),
    "away from an ignorant teacher": (
        {"teacher": {"kind": "ignorant", "source": "some/model"}, "losses": {"repel": {"target": "repel"}}},
        ("losses.repel.target: repel moves away", "take teacher, mean, stranger or noise"),
    ),
    "towards a teacher that knows": (
        {"losses": {"repel": {"target": "teacher"}}},
        ("losses.repel.target: teacher would keep", "teacher.kind: self"),
    ),
    "unknown target": ({"losses": {"repel": {"target": "away"}}}, ("losses.repel.target", "'stranger'")),
    "unknown key below": ({"unlearn": {"step": 3}}, ("unlearn.step: unknown key", "did you mean 'steps'?")),
    "unknown key of a term": (
        {"losses": {"repel": {"wieght": 1}}},
        ("losses.repel.wieght: unknown key", "did you mean 'weight'?"),
    ),
    "unknown key of the data": (
        {"data": {"kind": "celebs", "peple": 3}},
        ("data.peple: unknown key", "did you mean 'people'?"),
    ),
    "unknown key of a phase": (
        {"unlearn": {"phases": [{"share": 1, "forgot": 1}]}},
        ("unlearn.phases.0.forgot: unknown key", "did you mean 'forget'?"),
    ),
    "a number that is text": ({"unlearn": {"steps": "many"}}, ("unlearn.steps", "'many'")),
    "out of range": ({"mask": {"kind": "salun", "density": 1.5}}, ("mask.density", "less than or equal to 1", "1.5")),
    "negative weight": ({"losses": {"attract": {"weight": -1}}}, ("losses.attract.weight", "-1")),
    "not a number": ({"unlearn": {"learning_rate": float("nan")}}, ("unlearn.learning_rate", "nan")),
    "infinite": ({"losses": {"repel": {"weight": float("inf")}}}, ("losses.repel.weight", "inf")),
    "no kind of data": ({"data": {"people": 8}}, ("data: kind is missing", "'celebs', 'jsonl'", "or 'fiubench'")),
    "another kind of data": ({"data": {"kind": "csv"}}, ("data", "csv", "celebs", "jsonl")),
    "misspelt kind of data": (
        {"data": {"kind": "jsonlines"}},
        ("data.kind: should be 'celebs', ", "did you mean 'jsonl'? (given: 'jsonlines')"),
    ),
    "misspelt name of a form": (
        {"losses": {"forget_output": {"form": "stanger"}}},
        ("losses.forget_output.form", "did you mean 'stranger'? (given: 'stanger')"),
    ),
    "text where a list is wanted": (
        {"layers": "vision.17"},
        ("layers: should be a list; write [vision.17], with --set 'layers=[vision.17]' (given: 'vision.17')",),
    ),
    "a section where a list of them is wanted": (
        {"attacks": {"kind": "noise"}},
        ("attacks: should be a list; write [{kind: noise}], with --set 'attacks=[{kind: noise}]'",),
    ),
    "what is wrong in a list too": ({"unlearn": {"phases": 3}}, ("unlearn.phases: should be a list (given: 3);",)),
    "a name where names are wanted": (
        {"data": {"kind": "celebs", "forget": "Jane Roe"}},
        (
            "data.forget: should be how many people are forgotten, or their names; write [Jane Roe]",
            "with --set 'data.forget=[Jane Roe]' (given: 'Jane Roe'); `vkd",
        ),
    ),
    "a number where names are wanted": (
        {"data": {"kind": "jsonl", "rows": "rows.jsonl", "forget": 3}},
        ("data.forget: should be names, or a text file with one name a line (given: 3); `vkd",),
    ),
    "another dtype": ({"model": {"dtype": "float8"}}, ("model.dtype", "bfloat16", "float8")),
    "an attacker in float16": (
        {"model": {"dtype": "float16"}, "simulated_attack": {"weight": 1}},
        ("simulated_attack.weight", "float16 is too narrow", "bfloat16 or float32"),
    ),
    "an int8 language model put back": (
        {
            "model": {"quantize": "int8"},
            "relearn": {"scopes": ["visual"]},
            "attacks": [{"kind": "module_restore", "parts": ["language_model"]}],
        },
        ("model.quantize", "language_model out of the parts of module_restore"),
    ),
    "another device": ({"model": {"device": "tpu"}}, ("model.device", "tpu")),
    "no layers": ({"layers": []}, ("layers: missing", "losses.attract needs at least 1")),
    "nothing trained": ({"train": []}, ("train", "at least 1")),
    "another part trained": ({"train": ["tail"]}, ("train.0", "encoder", "language_model", "tail")),
    "a form without a name": (
        {"losses": {"forget_output": {"form": "shout"}}},
        ("losses.forget_output.form", "capped_ascent", "npo", "shout"),
    ),
    "a reference that is not made": (
        {"method": "npo", "losses": {"forget_output": {"reference": "retain_only"}}},
        ("losses.forget_output.reference", "set reference to retain_only"),
    ),
    "no refusal": ({"losses": {"forget_output": {"refusals": []}}}, ("losses.forget_output.refusals", "at least 1")),
    "a mask that nothing is trained with": (
        {"method": "manu", "mask": {"kind": "salun", "density": 0.5}},
        ("mask.kind: salun goes with procedure: tune",),
    ),
    "half a model taught anew": (
        {"method": "retain_only", "train": ["projector"]},
        ("procedure: reteach changes every part", "language_model"),
    ),
    "teaching anew what is not taught": (
        {"method": "retain_only", "teach": None, "model": {"source": "a/b"}},
        ("method: retain_only teaches a model anew", "`teach`"),
    ),
    "shares of phases": (
        {"unlearn": {"phases": [{"share": 0.5}, {"share": 0.4}]}},
        ("unlearn", "shares of the phases add up to 0.9", "1"),
    ),
    "shares of teaching": ({"teach": {"shares": {"names": 0.5}}}, ("teach", "shares add up to 0.5", "1")),
    "two cuts": (
        {"mask": {"kind": "ratio", "density": 0.5, "threshold": 1}},
        ("mask", "exactly one of density and thr"),
    ),
    "no cut": ({"mask": {"kind": "ratio"}}, ("mask", "exactly one of density and threshold")),
    "a cut of another kind": ({"mask": {"kind": "salun", "threshold": 1}}, ("mask", "salun takes density")),
    "nothing forgotten": (
        {"losses": {"forget_output": {"weight": 0}, "repel": {"weight": 0}}},
        ("nothing would be forgotten", "losses.forget_output.weight", "losses.repel.weight"),
    ),
    "a floor that nothing could repair to": (
        {"method": "npo", "unlearn": {"retain_floor": 0.8}},
        ("unlearn.retain_floor: ", "would be repaired", "set unlearn.retain_floor to null"),
    ),
    "no way out of the teacher": (
        {"losses": {"forget_output": {"weight": 0}, "retain_output": {"weight": 0}, "repel": {"weight": 1}}}
        | {"simulated_attack": {"weight": 0}},
        ("nothing would move", "losses.repel.target to mean, stranger or noise"),
    ),
    "no teaching": ({"teach": None}, ("model.source: tiny", "`teach`")),
    "no teaching for the reference": (
        {"teach": None, "model": {"source": "a/b"}, "reference": "retain_only"},
        ("reference: retain_only needs a `teach`",),
    ),
    "teaching from jsonl": (
        {"data": {"kind": "jsonl", "rows": "a.jsonl", "forget": ["a"]}},
        ("`teach` works with data.kind: celebs",),
    ),
    "steps that do not increase": ({"relearn": {"steps": [10, 5]}}, ("relearn", "steps must increase")),
    "no steps": ({"relearn": {"steps": []}}, ("relearn.steps",)),
    "no shares": ({"relearn": {"shares": []}}, ("relearn.shares",)),
    "no scopes": ({"relearn": {"scopes": []}}, ("relearn.scopes",)),
    "no such attack": (
        {"attacks": [{"kind": "quantise"}]},
        ("attacks.0.kind", "did you mean 'quantize'? (given: 'quantise')"),
    ),
    "attack without a kind": ({"attacks": [{"bits": 4}]}, ("attacks.0: kind is missing", "'quantize'")),
    "misspelt key of an attack": (
        {"attacks": [{"kind": "noise"}, {"kind": "quantize", "bit": 4}]},
        ("attacks.1.bit: unknown key", "did you mean 'bits'?"),
    ),
    "value of an attack out of range": ({"attacks": [{"kind": "quantize", "bits": 9}]}, ("attacks.0.bits", "9")),
    "attacks that are no list": ({"attacks": {"kind": "noise"}}, ("attacks",)),
    "no photos": ({"relearn": {"photos": []}}, ("relearn.photos",)),
    "no such photos": ({"relearn": {"photos": ["mine"]}}, ("relearn.photos.0", "'known'", "'others'")),
    "no seeds": ({"relearn": {"seeds": []}}, ("relearn.seeds",)),
    "a name that is a path": ({"name": "../mine"}, ("name", "../mine")),
    "an attack that never counts": (
        {"unlearn": {"checkpoint_every": 3}},
        ("simulated_attack.head_start", "3 steps are never over", "unlearn.checkpoint_every"),
    ),
    "an attack that takes turns and never counts": (
        {"unlearn": {"checkpoint_every": 6}, "simulated_attack": {"turns": True}},
        ("with 3 made, so 3 steps are never over", "unlearn.checkpoint_every (6)"),
    ),
    "a seed that is a date and a time": ({"seed": 20261129153259}, ("seed", "less than 4294967296")),
    "seeds of attacks that are too large": ({"relearn": {"seeds": [0, 2**32]}}, ("relearn.seeds.1",)),
    "values for a method that there is not": (
        {"for_methods": {"gaa": {"unlearn": {"steps": 3}}}},
        ("for_methods.gaa: there is no such method", "did you mean 'ga'?"),
    ),
    "unknown key for a method that is not run": (
        {"for_methods": {"ga": {"unlearn": {"step": 3}}}},
        ("for_methods.ga.unlearn.step: unknown key", "did you mean 'steps'?"),
    ),
    "unknown section for a method that is run": (
        {"for_methods": {"vkd": {"unlern": {"steps": 3}}}},
        ("for_methods.vkd.unlern: unknown key", "did you mean 'unlearn'?"),
    ),
    "a value that a method cannot have": (
        {"for_methods": {"npo": {"losses": {"forget_output": {"beta": -1}}}}},
        ("for_methods.npo.losses.forget_output.beta", "greater than 0", "-1"),
    ),
    "a mask that a method cannot have": (
        {"for_methods": {"salun": {"mask": {"threshold": 1}}}},
        ("for_methods.salun.mask", "exactly one of density and threshold"),
    ),
    "other data for one method": (
        {"for_methods": {"ga": {"data": {"people": 9}}}},
        ("for_methods.ga.data: the same for all methods", "simulated_attack"),
    ),
    "methods without names": ({"for_methods": ["ga"]}, ("for_methods: write names of methods",)),
    "nothing for a method": ({"for_methods": {"ga": None}}, ("for_methods.ga: write recipe values", "None")),
    "a number as a section": ({"mask": 3}, ("mask", "3")),
    "a true seed": ({"seed": 1.5}, ("seed", "1.5")),
}


NO_NUMBERS: dict[str, tuple[dict[str, Any], str]] = {
    "of steps": ({"unlearn": {"steps": True}}, "unlearn.steps: should be a number, which true and false are not"),
    "of the seed": ({"seed": False}, "seed: should be a number, which true and false are not (given: False)"),
    "of a share that may be null": ({"unlearn": {"retain_floor": True}}, "unlearn.retain_floor: should be a number"),
    "of a number that may be names": ({"data": {"kind": "celebs", "forget": True}}, "data.forget: should be a number"),
    "of per cents": (
        {"data": {"kind": "clear", "forget": True}, "teach": None, "model": {"source": "a/b"}},
        "data.forget: should be a number",
    ),
    "in a list": ({"relearn": {"steps": [True, 5]}}, "relearn.steps.0: should be a number"),
    "in a mapping": ({"teach": {"shares": {"names": True}}}, "teach.shares.names: should be a number"),
    "of no name": ({"teach": {"shares": {None: True}}}, "teach.shares.None: should be a number"),
    "of an attack": ({"attacks": [{"kind": "noise", "spread": True}]}, "attacks.0.spread: should be a number"),
    "for one method": (
        {"for_methods": {"ga": {"unlearn": {"steps": True}}}},
        "for_methods.ga.unlearn.steps: should be a number",
    ),
}


@pytest.mark.parametrize("case", NO_NUMBERS)
def test_a_truth_value_in_place_of_a_number_is_refused(tmp_path: Path, case: str) -> None:
    changes, fragment = NO_NUMBERS[case]
    message = refusal(written(tmp_path, **changes))
    assert f"mine.yaml: {fragment}" in message and f"(given: {'seed' not in changes})" in message


def test_a_truth_value_stays_one_where_one_is_due(tmp_path: Path) -> None:
    path = written(tmp_path, unlearn={"master_weights": False})
    assert not load_recipe(str(path), ["relearn.master_weights=no"]).relearn.master_weights


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_recipe_is_one_line_that_names_place_and_mend(tmp_path: Path, case: str) -> None:
    changes, fragments = BROKEN[case]
    message = refusal(written(tmp_path, **changes))
    assert "mine.yaml: " in message
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize("key", ["name", "adapter", "data", "layers"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    rest = {name: value for name, value in MINIMAL.items() if name != key}
    assert f"{key}: missing" in refusal(written(tmp_path, yaml.safe_dump(rest)))


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("name: [", "not valid YAML"),
        ("- a\n- b\n", "this file holds a list"),
        ("", "this file holds nothing"),
        ("name: a\n\tb: c", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, fragment: str) -> None:
    assert fragment in refusal(written(tmp_path, text))


@pytest.mark.parametrize(
    ("more", "fragment"),
    [
        ("\nseed: 2\n", "line 4: 'seed' is given already, on line 3"),
        ("\nunlearn:\n  steps: 3\n  clip: 1\n  steps: 4\n", "line 7: 'steps' is given already, on line 5"),
        ("\nmask: {kind: none, kind: ratio}\n", "line 4: 'kind' is given already, on line 4"),
    ],
)
def test_a_key_that_is_given_twice_is_refused_with_both_lines(tmp_path: Path, more: str, fragment: str) -> None:
    path = written(tmp_path, f"name: mine\nadapter: qwen_vl\nseed: 1{more}")
    assert f"mine.yaml: {fragment}; keep one of them" in refusal(path)


def test_a_key_that_an_override_gives_twice_is_refused(tmp_path: Path) -> None:
    message = refusal(written(tmp_path), "mask={kind: none, kind: ratio}")
    assert message.startswith("--set mask={kind: none, kind: ratio}: line 1: 'kind' is given already")


def test_a_key_beside_the_ones_that_an_anchor_brings_is_no_second_one(tmp_path: Path) -> None:
    shared = "for_methods:\n  ga: &ga {unlearn: &few {steps: 5, clip: 2}}\n  npo:\n    unlearn: {<<: *few, steps: 7}\n"
    path = written(tmp_path, yaml.safe_dump(MINIMAL) + shared)
    assert load_recipe(str(path), ["method=npo"]).unlearn.steps == 7


OTHER_NUMBERS = {
    "010": "YAML reads 010 with its leading 0 as 8; write 10 or 8, or '010' for a text",
    "-0_10": "YAML reads -0_10 with its leading 0 as -8; write -10 or -8, or '-0_10' for a text",
    "1:30": "YAML reads 1:30 as 90, in sixties; write 90, or '1:30' for a text",
    "1:30.5": "YAML reads 1:30.5 as 90.5, in sixties; write 90.5, or '1:30.5' for a text",
}


@pytest.mark.parametrize("number", OTHER_NUMBERS)
def test_a_number_that_yaml_reads_as_another_is_refused_with_both(tmp_path: Path, number: str) -> None:
    expected = OTHER_NUMBERS[number]
    path = written(tmp_path, f"name: mine\nunlearn:\n  clip: {number}\n")
    assert refusal(path) == f"{path}: line 3: unlearn.clip: {expected}"
    path = written(tmp_path, f"name: mine\nrelearn: {{steps: [5, {number}]}}\n")
    assert refusal(path) == f"{path}: line 2: relearn.steps: {expected}"
    assert refusal(written(tmp_path), f"seed={number}") == f"--set seed={number}: line 1: {expected}"


def test_numbers_that_yaml_reads_as_they_are_written_are_taken(tmp_path: Path) -> None:
    recipe = load_recipe(
        str(written(tmp_path)), ["seed=1_000", "unlearn.clip=0.5", "unlearn.warmup=0", "teach.seed=08"]
    )
    assert (recipe.seed, recipe.unlearn.clip, recipe.unlearn.warmup) == (1000, 0.5, 0)
    assert recipe.teach is not None and recipe.teach.seed == 8
    assert load_recipe(str(written(tmp_path)), ["data.forget=['007']"]).data.forget == ("007",)


@pytest.mark.parametrize("value", ["2024-13-45", "1" * 5000])
def test_what_yaml_takes_for_a_date_or_a_number_and_cannot_read_is_refused(tmp_path: Path, value: str) -> None:
    assert "not valid YAML" in refusal(written(tmp_path, f"name: {value}"))
    assert "not valid YAML" in refusal(written(tmp_path), f"name={value}")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    assert "not valid YAML" in refusal(path)


def test_an_unknown_recipe_is_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"qwen2vl_celebs: no such recipe file; did you mean 'qwen2vl_celeb'\?"):
        find_recipe("qwen2vl_celebs")


def test_a_name_longer_than_files_may_have_is_no_recipe() -> None:
    with pytest.raises(RecipeError, match="no such recipe file"):
        find_recipe("a" * 400)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    assert "no such recipe file" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("seed", ("--set seed:", "key=value")),
        ("=3", ("--set =3:", "key=value")),
        ("unlearn.steps=[1", ("--set unlearn.steps=[1:", "not valid YAML")),
        ("seed.deep=1", ("seed: ", "valid integer")),
        ("name.a.b=1", ("--set name.a.b=1:", "plain value")),
        ("layers.7=vision.1", ("--set layers.7=vision.1:", "'7'", "list of 1")),
        ("layers.first=vision.1", ("--set layers.first=vision.1:", "'first'", "list of 1")),
        ("reference.kind=1", ("reference", "plain value")),
        ("unlearn.step=3", ("unlearn.step: unknown key", "did you mean 'steps'?")),
        ("losses.repell.weight=3", ("losses.repell: unknown key", "did you mean 'repel'?")),
        ("unlearn.steps=zero", ("unlearn.steps", "'zero'")),
        ("unlearn.steps=", ("unlearn.steps", "None")),
        ("mask.kind=ration", ("mask.kind", "'ratio'", "'ration'")),
        ("layers.0=5", ("layers.0", "5")),
    ],
)
def test_a_broken_override_is_one_line_that_names_place_and_mend(
    tmp_path: Path, override: str, fragments: tuple[str, ...]
) -> None:
    message = refusal(written(tmp_path, reference="none"), override)
    for fragment in fragments:
        assert fragment in message


UNREAD: dict[str, tuple[tuple[str, ...], str]] = {
    "a density of no mask": (("mask.density=0.5",), "mask.density goes with mask.kind: ratio or salun or random"),
    "a section of no mask": (("mask={kind: none, scope: all}",), "mask.scope goes with mask.kind"),
    "text of a random mask": (
        ("mask={kind: random, density: 0.5, preserve: retain_and_text}",),
        "mask.preserve goes with mask.kind: ratio, and it is random here; set that, or leave mask.preserve out",
    ),
    "a cap of another form": (
        ("losses.forget_output.cap=3",),
        "losses.forget_output.cap goes with losses.forget_output.form: capped_ascent, and it is stranger here",
    ),
    "a beta before its form is changed": (("losses.forget_output.beta=1", "losses.forget_output.form=ascent"), "beta"),
    "a target of no weight": (
        ("losses.repel.target=stranger",),
        "losses.repel.target goes with losses.repel.weight above 0, and it is 0.0 here",
    ),
    "an attacker who is not there": (
        ("method=vkd_paper", "simulated_attack.rank=4"),
        "simulated_attack.rank goes with simulated_attack.weight above 0, and it is 0.0 here",
    ),
    "a distance of no weight": (
        ("losses.attract={weight: 0, distance: cka}",),
        "losses.attract.distance goes with losses.attract.weight above 0",
    ),
    "the pairs of no floor": (
        ("unlearn.retain_floor=null", "unlearn.floor_pairs=8"),
        "unlearn.floor_pairs goes with unlearn.retain_floor above 0, and it is null here",
    ),
    "a share that nothing is pruned with": (("method=ga", "prune.share=0.1"), "prune.share goes with procedure: prune"),
    "steps of a method that takes none": (
        ("method=manu", "unlearn.steps=3"),
        "unlearn.steps goes with procedure: tune, and it is prune here; set that, or leave unlearn.steps out",
    ),
    "a loss of a model that is taught anew": (
        ("method=retain_only", "losses.attract.distance=cka"),
        "losses.attract.distance goes with procedure: tune, and it is reteach here",
    ),
    "memory saved where nothing is trained": (
        ("method=manu", "model.gradient_checkpointing=true"),
        "model.gradient_checkpointing goes with procedure: tune",
    ),
    "a rank of an attack on every weight": (
        ("relearn.rank=4",),
        "relearn.rank goes with relearn.scopes: low_rank, and it is visual and full here",
    ),
    "weights of the model's own features": (("teacher.weights=random",), "teacher.weights goes with teacher.kind"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_an_override_that_nothing_reads_is_refused_with_what_would_read_it(tmp_path: Path, case: str) -> None:
    overrides, fragment = UNREAD[case]
    message = refusal(written(tmp_path), *overrides)
    assert fragment in message and message.startswith(tuple(f"--set {override}: " for override in overrides))


def test_a_setting_of_a_recipe_that_nothing_reads_is_refused_where_it_is_written(tmp_path: Path) -> None:
    path = written(tmp_path, mask={"density": 0.5})
    assert refusal(path).startswith(f"{path}: mask.density goes with mask.kind")
    path = written(tmp_path, for_methods={"ga": {"losses": {"forget_output": {"beta": 0.2}}}})
    assert refusal(path, "method=ga").startswith(f"{path}: for_methods.ga: losses.forget_output.beta goes with")
    path = written(tmp_path, prune={"share": 0.1})
    assert refusal(path).startswith(f"{path}: prune.share goes with procedure: prune")
    path = written(tmp_path, for_methods={"manu": {"unlearn": {"steps": 3}}})
    assert refusal(path, "method=manu").startswith(f"{path}: for_methods.manu: unlearn.steps goes with procedure: tune")


READ: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "what an override switches off": (
        {"mask": {"kind": "ratio", "density": 0.5, "scope": "all"}, "losses": {"repel": {"weight": 1, "cap": 3}}},
        ("mask.kind=none", "losses.repel.weight=0"),
    ),
    "what belongs to another method": ({"method": "manu", "prune": {"share": 0.1}}, ("method=ga",)),
    "what the body says for the methods that tune": (
        {"method": "manu", "unlearn": {"steps": 3}, "losses": {"attract": {"distance": "cka"}}},
        (),
    ),
    "a rank of one attack among others": ({"relearn": {"scopes": ["visual", "low_rank"], "rank": 4}}, ()),
    "an attack in turns that counts in every step": (
        {"unlearn": {"checkpoint_every": 1}, "simulated_attack": {"turns": True, "head_start": 0}},
        (),
    ),
    "what a method has itself": ({"method": "vkd_paper"}, ("losses.forget_output.form=npo", "mask.kind=none")),
    "a default that is spelt out": ({"mask": {"density": None}}, ("losses.forget_output.beta=0.4",)),
    "layers of another model for a method without features": ({}, ("method=ga", "layers=[vision.2]")),
}


@pytest.mark.parametrize("case", READ)
def test_a_setting_that_was_not_given_beside_what_cannot_read_it_is_no_mistake(tmp_path: Path, case: str) -> None:
    changes, overrides = READ[case]
    recipe = load_recipe(str(written(tmp_path, **changes)), overrides)
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(str(resolved)) == recipe


@pytest.mark.parametrize("name", bundled_recipes())
def test_every_shipped_recipe_can_be_run_with_every_method_that_trains(name: str) -> None:
    for method in METHODS.keys() - {"retain_only"}:
        assert load_recipe(name, [f"method={method}"]).method == method


def test_an_override_below_a_section_that_is_switched_off_is_explained(tmp_path: Path) -> None:
    path = written(tmp_path, teach=None, model={"source": "a/b"})
    assert "'teach' is switched off in the recipe" in refusal(path, "teach.steps=3")


def test_overrides_reach_every_depth_and_the_last_one_wins(tmp_path: Path) -> None:
    overrides = (
        "seed=3",
        "seed=4",
        "losses.repel.weight=0.5",
        "unlearn.phases=[{share: 0.25}, {share: 0.75, forget: 0.5}]",
        "unlearn.phases.0.forget=0.125",
        "layers.0=vision.2",
        "train=[projector]",
        "model.source=../other",
        "mask={kind: salun, density: 0.5}",
    )
    recipe = load_recipe(str(written(tmp_path)), overrides)
    assert recipe.seed == 4
    assert recipe.losses.repel.weight == 0.5
    assert [phase.forget for phase in recipe.unlearn.phases] == [0.125, 0.5]
    assert recipe.layers == ("vision.2",)
    assert recipe.train == ("projector",)
    assert recipe.model.source == str(Path("../other").resolve())  # of the command line: relative to the working folder
    assert recipe.mask.density == 0.5


def test_numbers_that_yaml_takes_for_text_become_numbers(tmp_path: Path) -> None:
    path = written(tmp_path, yaml.safe_dump(MINIMAL) + "unlearn: { learning_rate: 1e-4, clip: 1E2 }\n")
    assert isinstance(yaml.safe_load("1e-4"), str)
    recipe = load_recipe(str(path), ["relearn.learning_rate=2e-5"])
    assert recipe.unlearn.learning_rate == 1e-4
    assert recipe.unlearn.clip == 100.0
    assert recipe.relearn.learning_rate == 2e-5


def test_relative_paths_in_a_recipe_start_at_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"kind": "jsonl", "rows": "sub/rows.jsonl", "images": "photos", "forget": "names.txt"}
    path = written(tmp_path, data=data, teach=None, model={"source": "./model"})
    monkeypatch.chdir("/")
    recipe = load_recipe(str(path))
    assert recipe.data.kind == "jsonl"
    assert recipe.data.rows == tmp_path / "sub" / "rows.jsonl"
    assert recipe.data.images == tmp_path / "photos"
    assert recipe.data.forget == tmp_path / "names.txt"
    assert recipe.model.source == str(tmp_path / "model")


ANCHORED: dict[str, tuple[tuple[str, ...], str, str]] = {
    "rows": (("data.rows=people.jsonl",), "data.rows", "people.jsonl"),
    "images": (("data.images=photos",), "data.images", "photos"),
    "a file of names": (("data.forget=names.txt",), "data.forget", "names.txt"),
    "a whole section": (("data={kind: jsonl, rows: sub/a.jsonl, forget: [A]}",), "data.rows", "sub/a.jsonl"),
    "a section changed after": (("data={kind: jsonl, rows: a, forget: [A]}", "data.rows=b"), "data.rows", "b"),
    "a benchmark": (("data={kind: clear, source: ./CLEAR}",), "data.source", "CLEAR"),
    "a model": (("model.source=./model",), "model.source", "model"),
    "a model's section": (("model={source: ./model}",), "model.source", "model"),
    "a teacher": (("teacher={kind: ignorant, source: ./other}",), "teacher.source", "other"),
    "a method's teacher": (
        ("for_methods.vkd.teacher={kind: ignorant, source: ./other}",),
        "teacher.source",
        "other",
    ),
}


@pytest.mark.parametrize("case", ANCHORED)
def test_relative_paths_of_overrides_start_at_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    overrides, key, expected = ANCHORED[case]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    data = {"kind": "jsonl", "rows": "rows.jsonl", "forget": ["Jane Roe"]}
    recipe = load_recipe(str(written(tmp_path, data=data, teach=None, model={"source": "a/b"})), overrides)
    assert str(reduce(getattr, key.split("."), recipe)) == str(tmp_path.resolve() / "here" / expected)


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("model.source=Qwen/Qwen2-VL-2B-Instruct", "model.source", "Qwen/Qwen2-VL-2B-Instruct"),
        ("model.source=tiny:qwen2_vl", "model.source", "tiny:qwen2_vl"),
        ("model.source=/models/a", "model.source", "/models/a"),
        ("teacher={kind: external, source: timm/resnet10t}", "teacher.source", "timm/resnet10t"),
        ("teacher={kind: ignorant, source: retain_only}", "teacher.source", "retain_only"),
        ("data.forget=[Jane Roe]", "data.forget", ("Jane Roe",)),
    ],
)
def test_what_an_override_gives_that_is_no_relative_path_stays(
    tmp_path: Path, override: str, key: str, expected: object
) -> None:
    recipe = load_recipe(str(written(tmp_path, reference="retain_only")), [override])
    assert reduce(getattr, key.split("."), recipe) == expected


def test_a_name_that_is_no_file_of_names_is_shown_as_it_was_given(tmp_path: Path) -> None:
    assert "(given: 'Jane Roe')" in refusal(written(tmp_path), "data.forget=Jane Roe")
    path = written(tmp_path, data={"kind": "jsonl"})
    assert "(given: 'Jane Roe')" in refusal(path, "data.forget=Jane Roe", "data.kind=celebs")


def test_a_runs_own_recipe_is_the_same_recipe_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, teach=None, model={"source": "some/model"})
    (run := tmp_path / "here" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    recipe = load_recipe(str(path), ["data={kind: jsonl, rows: people.jsonl, forget: [Jane Roe]}"])
    (run / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    monkeypatch.chdir("/")
    assert load_recipe(str(run / "recipe.yaml")).digest() == recipe.digest()


def test_a_hub_id_is_not_taken_for_a_path(tmp_path: Path) -> None:
    path = written(tmp_path, teach=None, model={"source": "some/model"})
    assert load_recipe(str(path)).model.source == "some/model"


def test_an_absolute_path_stays_as_it_is(tmp_path: Path) -> None:
    data = {"kind": "jsonl", "rows": "/data/rows.jsonl", "forget": ["Jane Roe"]}
    recipe = load_recipe(str(written(tmp_path, data=data, teach=None, model={"source": "/models/a"})))
    assert recipe.data.kind == "jsonl"
    assert recipe.data.rows == Path("/data/rows.jsonl")
    assert recipe.model.source == "/models/a"


def test_the_schema_describes_every_section() -> None:
    schema = json.loads(json.dumps(Recipe.model_json_schema()))
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert set(schema["required"]) == {"name", "adapter", "data"}
    assert all(
        not section.get("additionalProperties", True) for section in schema["$defs"].values() if "properties" in section
    )


def changes_of_every_setting() -> list[dict[str, Any]]:
    return [
        {"seed": 1},
        {"adapter": "other"},
        {"model": {"dtype": "bfloat16"}},
        {"data": {"kind": "celebs", "seed": 1}},
        {"teach": {"steps": 6}},
        {"teach": {"steps": 5, "shares": {"names": 1.0}}},
        {"reference": "retain_only"},
        {"train": ["projector"]},
        {"layers": ["vision.1", "projector"]},
        {"losses": {"repel": {"cap": 3}}},
        {"losses": {"attract": {"distance": "cosine"}}},
        {"mask": {"kind": "random", "density": 0.5}},
        {"unlearn": {"phases": [{"share": 1, "forget": 1}]}},
        {"unlearn": {"retain_shares": {"others": 1}}},
        {"simulated_attack": {"weight": 0.5}},
        {"evaluate": {"max_new_tokens": 3}},
        {"relearn": {"seeds": [1]}},
        {"attacks": [{"kind": "quantize", "bits": 8}]},
    ]


def test_the_digest_changes_with_every_setting_and_with_nothing_else() -> None:
    digests = [Recipe.model_validate(MINIMAL | change).digest() for change in [{}, *changes_of_every_setting()]]
    assert len(set(digests)) == len(digests)
    spelled_out = Recipe.model_validate(MINIMAL).model_dump(mode="json")
    assert Recipe.model_validate(spelled_out).digest() == digests[0]


def test_a_recipe_cannot_be_changed_after_it_was_read() -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_recipe().unlearn.steps = 3  # type: ignore[misc]


def test_a_method_fills_in_what_the_recipe_leaves_out_and_nothing_else() -> None:
    given = {"losses": {"repel": {"weight": 0.7}}, "mask": {"kind": "random", "density": 0.5}}
    recipe = Recipe.model_validate(MINIMAL | given)
    values = METHODS["vkd"].values
    assert recipe.losses.repel.weight == 0.7
    assert recipe.losses.forget_output.form == values["losses"]["forget_output"]["form"]
    assert (recipe.mask.kind, recipe.mask.density, recipe.mask.threshold) == ("random", 0.5, None)


def test_setting_another_method_takes_back_what_the_recipe_said_for_its_own(tmp_path: Path) -> None:
    path = written(tmp_path, losses={"repel": {"weight": 0.7}})
    recipe = load_recipe(str(path), ["method=vkd_paper", "losses.attract.weight=0.2"])
    assert recipe.losses.repel.weight == METHODS["vkd_paper"].values["losses"]["repel"]["weight"]
    assert recipe.losses.attract.weight == 0.2
    assert len(recipe.unlearn.phases) == 1
    assert recipe.data == Recipe.model_validate(MINIMAL).data


OWN = {
    "vkd": {"unlearn": {"learning_rate": 2e-4}},
    "ga": {"unlearn": {"steps": 60, "learning_rate": 1e-4}, "train": ["projector"]},
    "salun": {"mask": {"density": 0.25}},
}
"""What a bench would give each baseline."""


def test_each_method_runs_with_its_own_values(tmp_path: Path) -> None:
    path = written(tmp_path, unlearn={"steps": 9, "warmup": 3}, mask={"kind": "none"}, for_methods=OWN)
    ours, ga, salun, npo = (load_recipe(str(path), [f"method={name}"]) for name in ("vkd", "ga", "salun", "npo"))
    assert (ours.unlearn.steps, ours.unlearn.learning_rate) == (9, 2e-4)
    assert (ga.unlearn.steps, ga.unlearn.learning_rate, ga.unlearn.warmup) == (60, 1e-4, 3)
    assert ga.train == ("projector",) and npo.train != ("projector",)
    assert (salun.mask.kind, salun.mask.density, salun.unlearn.steps) == ("salun", 0.25, 9)
    assert (npo.unlearn.steps, npo.unlearn.learning_rate) == (9, Recipe.model_validate(MINIMAL).unlearn.learning_rate)


@pytest.mark.parametrize("overrides", [("unlearn.steps=5", "method=ga"), ("method=ga", "unlearn.steps=5")])
def test_what_is_set_by_hand_wins_over_a_methods_own_values(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    recipe = load_recipe(str(written(tmp_path, for_methods=OWN)), overrides)
    assert (recipe.unlearn.steps, recipe.unlearn.learning_rate) == (5, 1e-4)


def test_a_methods_own_values_can_be_set_by_hand_too(tmp_path: Path) -> None:
    path = written(tmp_path, for_methods=OWN)
    recipe = load_recipe(str(path), ["for_methods.npo.unlearn.steps=7", "method=npo"])
    assert recipe.unlearn.steps == 7
    assert "did you mean 'steps'" in refusal(path, "for_methods.npo.unlearn.step=7")


def test_a_resolved_recipe_holds_the_outcome_only(tmp_path: Path) -> None:
    recipe = load_recipe(str(written(tmp_path, method="ga", for_methods=OWN)))
    assert "for_methods" not in recipe.to_yaml()
    again = Recipe.model_validate(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe and again.digest() == recipe.digest()
    alone = load_recipe(str(written(tmp_path, method="ga", for_methods={"ga": OWN["ga"]})))
    assert alone.digest() == recipe.digest()
    by_hand = load_recipe(str(written(tmp_path, method="ga", **OWN["ga"])))
    assert by_hand.digest() == recipe.digest()


def test_a_recipe_may_have_values_for_a_method_that_it_cannot_run(tmp_path: Path) -> None:
    path = written(
        tmp_path, teach=None, model={"source": "a/b"}, for_methods={"retain_only": {"unlearn": {"steps": 1}}}
    )
    assert load_recipe(str(path)).method == "vkd"


def test_a_recipe_made_in_code_has_its_entries_checked_too() -> None:
    with pytest.raises(ValueError, match=r"for_methods\.ga\.unlearn\.step: unknown key; did you mean 'steps'"):
        Recipe.model_validate(MINIMAL | {"for_methods": {"ga": {"unlearn": {"step": 3}}}})
    assert Recipe.model_validate(MINIMAL | {"method": "ga", "for_methods": OWN}).unlearn.steps == 60


def test_what_is_set_for_a_method_goes_with_it_when_another_is_set(tmp_path: Path) -> None:
    overrides = ["unlearn={steps: 5, phases: [{share: 1.0}]}", "mask.kind=random", "seed=3", "method=npo"]
    recipe = load_recipe(str(written(tmp_path)), overrides)
    assert (recipe.unlearn.steps, recipe.seed, recipe.mask.kind) == (5, 3, "none")
    assert recipe.unlearn.phases == load_recipe(str(written(tmp_path)), ["method=npo"]).unlearn.phases


def test_an_unknown_method_is_named_with_the_nearest_and_the_others() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'vkd_paper'\?; there are vkd, vkd_paper"):
        Recipe.model_validate(MINIMAL | {"method": "vkd_papr"})


@pytest.mark.parametrize(
    ("teacher", "target"), [({}, "repel"), ({"kind": "ignorant", "source": "retain_only"}, "teacher")]
)
def test_where_the_forgotten_are_moved_follows_from_the_teacher(teacher: dict[str, str], target: str) -> None:
    assert make_recipe(reference="retain_only", teacher=teacher).repel_target == target
    mean = make_recipe(reference="retain_only", teacher=teacher, losses={"repel": {"target": "mean"}})
    assert mean.repel_target == "mean"


def test_a_teachers_folder_is_looked_for_beside_the_recipe(tmp_path: Path) -> None:
    path = written(tmp_path, teacher={"kind": "ignorant", "source": "./never-knew"})
    assert load_recipe(str(path)).teacher.source == str(tmp_path.resolve() / "never-knew")
    entry = {"teacher": {"kind": "ignorant", "source": "./never-knew"}}
    path = written(tmp_path, method="vkd", for_methods={"vkd": entry})
    assert load_recipe(str(path)).teacher.source == str(tmp_path.resolve() / "never-knew")
