"""The sections about attacks on the result: relearning, and everything else that is tried."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vkd_framework.recipe.sections import ReadWith, Section, Seed, Share
from vkd_framework.types import Part, Pool, RelearnScope


class RelearnConfig(Section):
    """The attack on the result: fine-tune a copy on some of the forgotten pairs and ask again."""

    shares: tuple[Share, ...] = Field(
        default=(0.05, 1.0), min_length=1, description="shares of the forget pairs the attacker has"
    )
    steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(10, 30, 60), min_length=1, description="steps after which Test VQA is scored"
    )
    scopes: tuple[RelearnScope, ...] = Field(
        default=("visual", "full"),
        min_length=1,
        description="what the attacker tunes: visual modules, beside them something of low rank, or every weight",
    )
    rank: Annotated[int, ReadWith("scopes", ("low_rank",))] = Field(
        default=16, ge=1, description="of what is added to the language model's layers (scopes: low_rank)"
    )
    photos: tuple[Pool, ...] = Field(
        default=("known", "new", "others"),
        min_length=1,
        description="what the attacker has: forget pairs, new photos of the same people, or only other people",
    )
    seeds: tuple[Seed, ...] = Field(default=(0,), min_length=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    batch_size: int = Field(default=16, ge=1)
    micro_batch: int | None = Field(
        default=None, ge=1, description="most pairs that go through the model at once; null: the whole batch"
    )
    master_weights: bool = Field(
        default=True, description="where the model is of lower precision, take the steps on float32 copies"
    )

    @model_validator(mode="after")
    def _each_once(self) -> RelearnConfig:
        for name in ("shares", "scopes", "photos", "seeds"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{name} names something twice, which would count twice in the averages")
        return self

    @model_validator(mode="after")
    def _steps_increase(self) -> RelearnConfig:
        if list(self.steps) != sorted(set(self.steps)):
            raise ValueError("steps must increase")
        return self


class ModuleRestoreAttack(Section):
    """Put modules of the vanilla model back. What is not kept anywhere else comes back by construction."""

    kind: Literal["module_restore"]
    parts: tuple[Part, ...] = Field(default=("encoder", "projector"), min_length=1)


class QuantizeAttack(Section):
    """Round every weight matrix, which may undo changes that are smaller than the rounding."""

    kind: Literal["quantize"]
    bits: int = Field(default=4, ge=2, le=8, description="bits of a rounded weight")


class ProbeAttack(Section):
    """Tell people apart by the visual features themselves, with a linear probe and with nearest neighbours."""

    kind: Literal["probe"]
    photos: int = Field(
        default=1024, ge=4, description="most training photos the probe learns from, two of two people at least"
    )


class InContextAttack(Section):
    """Show other photos of the same person first, each with another question and its answer."""

    kind: Literal["in_context"]
    examples: int = Field(default=2, ge=1, description="photos with an answer before the one that is asked about")


class RephraseAttack(Section):
    """Ask the same in other words, where the data knows some."""

    kind: Literal["rephrase"]


class NoiseAttack(Section):
    """Add Gaussian noise to every pixel."""

    kind: Literal["noise"]
    spread: float = Field(default=0.1, gt=0, le=1, description="standard deviation, as a share of the pixels' range")


class CropAttack(Section):
    """Cut out the middle of the photo and enlarge it to the old size."""

    kind: Literal["crop"]
    keep: float = Field(default=0.9, gt=0, lt=1, description="share of height and width that is kept")


class MembershipAttack(Section):
    """Tell from the likelihood of an answer whether a photo shows somebody the model was taught."""

    kind: Literal["membership"]
    lowest: Share = Field(default=0.2, description="share of an answer's tokens that Min-K% looks at, at least one")


AnyAttack = (
    ModuleRestoreAttack
    | QuantizeAttack
    | ProbeAttack
    | InContextAttack
    | RephraseAttack
    | NoiseAttack
    | CropAttack
    | MembershipAttack
)
ATTACK_KINDS: dict[str, type[AnyAttack]] = {
    "module_restore": ModuleRestoreAttack,
    "quantize": QuantizeAttack,
    "probe": ProbeAttack,
    "in_context": InContextAttack,
    "rephrase": RephraseAttack,
    "noise": NoiseAttack,
    "crop": CropAttack,
    "membership": MembershipAttack,
}
"""`kind` of an entry of `attacks` -> its section."""

EVERY_ATTACK: tuple[AnyAttack, ...] = (
    ModuleRestoreAttack(kind="module_restore", parts=("encoder",)),
    ModuleRestoreAttack(kind="module_restore", parts=("projector",)),
    ModuleRestoreAttack(kind="module_restore"),
    QuantizeAttack(kind="quantize", bits=8),
    QuantizeAttack(kind="quantize"),
    ProbeAttack(kind="probe"),
    InContextAttack(kind="in_context"),
    RephraseAttack(kind="rephrase"),
    NoiseAttack(kind="noise"),
    CropAttack(kind="crop"),
    MembershipAttack(kind="membership"),
)
