"""How many floating-point operations a step takes, from the shapes of the model's weights.

A weight matrix of n numbers takes 2 n operations for each token, attention of width D over L tokens 4 L D for each of
them. Going back takes the same again for the gradient of a part's input, where that part or one before it is trained,
and once more for its weights, where they are trained: a frozen language model has no gradient for its weights, but
passes one on to the encoder.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from vkd_framework.estimate.tokens import Tokens, patch_embedding
from vkd_framework.plugins import Anatomy
from vkd_framework.recipe import Recipe
from vkd_framework.types import PARTS, SCOPES, Part


@dataclass(frozen=True)
class Pass:
    """One way through the model: how many pairs, whether to the end, and which parts' weights get a gradient.

    Without any part in `trained` it goes forward only. `times`: how often a step does it. `everywhere`: whether the
    vocabulary is asked at every token, or only where an answer is predicted. `recomputed`: whether blocks keep their
    inputs alone and are computed again on the way back. `most`: how many pairs are in the model at once, where that is
    bounded.
    """

    what: str
    pairs: int
    output: bool
    trained: tuple[Part, ...]
    times: float = 1.0
    everywhere: bool = False
    recomputed: bool = False
    most: int | None = None

    @property
    def at_once(self) -> int:
        """How many pairs take memory at the same time."""
        return min(self.pairs, self.most or self.pairs)


@dataclass(frozen=True)
class Flops:
    """Operations of one pass: forward, backward for activations, backward for weights."""

    forward: float
    activations: float
    weights: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.forward + self.activations + self.weights


@dataclass(frozen=True)
class Sizes:
    """What a model's shapes say: for each part the numbers in its weight matrices, blocks and width of attention."""

    matrices: dict[Part, int]
    convolution: int
    blocks: dict[Part, int]
    width: dict[Part, int]
    inner: dict[Part, int]
    vocabulary: int
    hidden: int
    channels: tuple[int, int]
    """Input and output channels of the language model's linear layers, each added up."""
    reaching: float = 1.0
    """Share of the encoder's blocks that reach the language model; the others have no way back."""


def sizes(anatomy: Anatomy) -> Sizes:
    """The sizes of a model, which may be on the meta device."""
    from torch import nn

    config = anatomy.model.config.get_text_config()
    head = anatomy.model.get_output_embeddings()
    patch = patch_embedding(anatomy)
    matrices: dict[Part, int] = dict.fromkeys(PARTS, 0)
    inner: dict[Part, int] = dict.fromkeys(PARTS, 0)
    channels = (0, 0)
    owner = {name: part for part, names in anatomy.parts.items() for name in names}
    for name, module in anatomy.model.named_modules():
        part = owner.get(f"{name}.weight")
        if isinstance(module, nn.Linear) and part and module is not head and module.weight is not patch:
            matrices[part] += module.weight.numel()
            inner[part] = max(inner[part], module.out_features, module.in_features)
            if part == "language_model":
                channels = (channels[0] + module.in_features, channels[1] + module.out_features)
    heads = config.num_attention_heads
    vision = [layer for layer in anatomy.layers if layer.name.startswith("vision.")]
    return Sizes(
        matrices=matrices,
        convolution=patch.numel(),
        blocks={"encoder": len(vision), "projector": 0, "language_model": config.num_hidden_layers},
        width={
            "encoder": next((layer.width for layer in vision if layer.width), 0),
            "projector": 0,
            "language_model": heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        },
        inner=inner,
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        channels=channels,
        reaching=sum(layer.reaches_language_model for layer in vision) / max(len(vision), 1),
    )


def passes(recipe: Recipe) -> list[Pass]:
    """What one step of the recipe's unlearning runs; nothing for methods that do not train with losses."""
    if recipe.procedure != "tune":
        return []
    terms, config, attack = recipe.losses, recipe.unlearn, recipe.simulated_attack
    found = []
    again, most = recipe.model.gradient_checkpointing, config.micro_batch
    often = 0.5 if attack.weight and attack.turns else 1.0
    if terms.forget_output.weight or terms.repel.weight:
        to_the_end = terms.forget_output.weight > 0
        found.append(Pass("forget", config.forget_batch, to_the_end, recipe.train, often, recomputed=again, most=most))
    output = terms.retain_output.weight > 0 or terms.retain_kl.weight > 0
    asked = _asked(recipe) if output else 0
    if asked:
        found.append(Pass("retain", asked, True, recipe.train, recomputed=again, most=most))
    if terms.attract.weight and asked < config.retain_batch:
        rest = config.retain_batch - asked
        found.append(Pass("retain, photos alone", rest, False, recipe.train, recomputed=again, most=most))
    if terms.retain_kl.weight:
        found.append(Pass("retain, as before", asked, True, (), most=most))
    if attack.weight:
        for scope, drawn in Counter(attack.scopes).items():
            own = tuple(part for part in SCOPES[scope] if part != "language_model" or attack.rank is None)
            trained = tuple(part for part in PARTS if part in (*own, *recipe.train))
            times = often * drawn / len(attack.scopes)
            found.append(Pass(f"attacker, {scope}", attack.batch_size, True, trained, times, most=most))
    return found


def _asked(recipe: Recipe) -> int:
    """How many pairs of a retain batch go to the end; as if attract held all where the recipe has no shares."""
    terms, config = recipe.losses, recipe.unlearn
    if not terms.attract.weight:
        return config.retain_batch
    shares = config.retain_shares or {"others": 1.0}
    held = round(config.retain_batch * (1 - shares.get("forgotten", 0.0) / sum(shares.values())))
    return config.retain_batch - held + terms.retain_output.asked_of(held)


def flops(size: Sizes, tokens: Tokens, each: Pass) -> dict[Part, Flops]:
    """The operations of one pass, by part; the language model's with the map to the vocabulary."""
    reached: tuple[Part, ...] = PARTS if each.output else ("encoder", "projector")
    found: dict[Part, Flops] = {}
    for part in reached:
        count, seen = _tokens_of(part, tokens)
        matrices = 2 * count * size.matrices[part]
        attention = 4 * count * seen * size.width[part] * size.blocks[part]
        pixels = 2 * count * size.convolution if part == "encoder" else 0.0
        if part == "language_model":
            matrices += 2 * (count if each.everywhere else tokens.answer) * size.hidden * size.vocabulary
        passed_on = any(one in each.trained for one in PARTS[: PARTS.index(part) + 1])
        back = each.pairs * (size.reaching if part == "encoder" else 1.0)
        found[part] = Flops(
            forward=each.pairs * (matrices + attention + pixels),
            activations=back * (matrices + 2 * attention + each.recomputed * (matrices + attention)) * passed_on,
            weights=(back * matrices + each.pairs * pixels) * (part in each.trained),
        )
    return found


def step_flops(size: Sizes, tokens: Tokens, run: Sequence[Pass]) -> float:
    """The operations of one step."""
    return sum(each.times * part.total for each in run for part in flops(size, tokens, each).values())


def fetches(run: Sequence[Pass]) -> float:
    """How often a step needs all matrices of a frozen language model: there, back, and once more where recomputed."""
    return sum(
        each.times * math.ceil(each.pairs / each.at_once) * (1 + bool(each.trained) * (1 + each.recomputed))
        for each in run
        if each.output
    )


def _tokens_of(part: Part, tokens: Tokens) -> tuple[float, float]:
    """How many tokens of a pair a part works on, and how many of them each attends to."""
    return {
        "encoder": (tokens.patches, tokens.tile),
        "projector": (tokens.image, 0.0),
        "language_model": (tokens.text, tokens.text),
    }[part]
