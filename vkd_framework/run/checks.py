"""What is checked before anything is taught or written: the recipe, its layers, its teacher, its device."""

from __future__ import annotations

from contextlib import suppress

from vkd_framework import external, ranks, relearn
from vkd_framework.errors import AdapterError, RecipeError
from vkd_framework.estimate.known import local_processor
from vkd_framework.forgetting import check_forget_pairs
from vkd_framework.layers_table import describe
from vkd_framework.plugins import Adapter, Anatomy, load_adapter
from vkd_framework.recipe import Recipe, is_tiny, load_recipe
from vkd_framework.types import ImageQuestionPair, Splits
from vkd_framework.unlearn import retain_batches
from vkd_framework.vanilla import device_of


def checked(reference: str, overrides: tuple[str, ...] = ()) -> tuple[Recipe, Adapter]:
    """The recipe and its adapter, when its layers are there and its device is; reads no weights and writes nothing."""
    recipe = load_recipe(reference, overrides)
    adapter = load_adapter(recipe.adapter)
    check_model(recipe, adapter)
    return recipe, adapter


def check_model(recipe: Recipe, adapter: Adapter) -> Anatomy:
    """The model without its weights. Raises RecipeError where the recipe asks for what it does not have."""
    anatomy = describe(recipe.model.source, adapter)
    terms = recipe.losses
    for where, names in (
        ("layers", recipe.layers),
        ("losses.attract.layers", terms.attract.layers),
        ("losses.repel.layers", terms.repel.layers),
    ):
        for name in names or ():
            layer = anatomy.layer(name, where)
            if not layer.reaches_language_model:
                raise RecipeError(
                    f"{where}: {name} does not reach the language model, distilling it changes no answer; "
                    "see `vkd inspect-layers`"
                )
    check_language_model(recipe, anatomy)
    check_divided(recipe)
    teacher = recipe.teacher
    if teacher.kind == "external":
        external.check(teacher)
    elif teacher.source not in (None, "retain_only"):
        describe(teacher.source, adapter)
    device_of(recipe)
    return anatomy


def check_pairs(recipe: Recipe, splits: Splits) -> None:
    """Raise RecipeError where the data has not the pairs that the recipe's losses, batches and attacks ask for."""
    relearn.attackers(recipe.relearn, splits)
    if recipe.procedure == "tune":
        check_forget_pairs(recipe, splits)
        retain_batches(splits, recipe.unlearn, recipe.seed)


def check_photos(recipe: Recipe, adapter: Adapter, splits: Splits) -> None:
    """Raise DataError for a photo of a shape that the model's processor refuses, rather than when its turn comes.

    Of the widest, the highest, the smallest and the largest photo, where the processor is on this machine.
    """
    processor = None if is_tiny(recipe.model.source) else local_processor(recipe.model.source)
    unusual = with_unusual_photos(splits)
    if processor is None or not unusual:
        return
    with suppress(AdapterError):  # one that can encode nothing is told about where it is needed
        stop_ids = adapter.stop_token_ids(describe(recipe.model.source, adapter).model, processor)
        adapter.tokenize_pairs(processor, unusual, stop_ids, True, "right")


def with_unusual_photos(splits: Splits) -> list[ImageQuestionPair]:
    """Pairs with the widest, the highest, the smallest and the largest photo, and one with the most nearly square."""
    pairs = [pair for part in (splits.forget, splits.retain, *splits.columns.values()) for pair in part]
    shown = {photo.size: pair for pair in pairs for photo in pair.photos}
    if not shown:
        return []
    by_shape = sorted(shown, key=lambda size: size[0] / size[1])
    by_area = sorted(shown, key=lambda size: size[0] * size[1])
    square = min(shown, key=lambda size: max(size) / min(size))
    return [shown[size] for size in dict.fromkeys((square, by_shape[-1], by_shape[0], by_area[0], by_area[-1]))]


def check_language_model(recipe: Recipe, anatomy: Anatomy) -> None:
    """Raise RecipeError where the recipe wants linear layers of a language model that has none."""
    attack = recipe.simulated_attack
    needed = {
        "model.offload: true": recipe.model.offload,
        "model.quantize: int8": recipe.model.quantize is not None,
        "relearn.scopes: low_rank": "low_rank" in recipe.relearn.scopes,
        f"simulated_attack.rank: {attack.rank}": attack.weight > 0
        and attack.rank is not None
        and "full" in attack.scopes
        and "language_model" not in recipe.train,
    }
    if (asked := [what for what, wanted in needed.items() if wanted]) and not anatomy.language_model_layers():
        raise RecipeError(f"{asked[0]} needs linear layers in the language model, and this one has none; leave it out")


def check_divided(recipe: Recipe) -> None:
    """Raise RecipeError where processes that divide the language model are to change it, or to hold it elsewhere."""
    if not ranks.divide():
        return
    if recipe.model.offload:
        raise RecipeError(
            "model.offload: true keeps each process's language model in the computer's memory, and with FSDP the "
            "processes divide it among their GPUs; leave one of the two out"
        )
    if wrong := recipe.moves_language_model("accelerate launch: FSDP", rounds=True):
        raise RecipeError(wrong)
