"""The whole recipe, and which of its sections go together."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from vkd_framework import methods
from vkd_framework.recipe.attacks import EVERY_ATTACK, AnyAttack, RelearnConfig
from vkd_framework.recipe.data import AnyData
from vkd_framework.recipe.for_methods import wrong_entry
from vkd_framework.recipe.forgetting import (
    Losses,
    MaskConfig,
    PruneConfig,
    RepelTarget,
    SimulatedAttack,
    TeacherConfig,
    UnlearnConfig,
)
from vkd_framework.recipe.messages import nearest
from vkd_framework.recipe.sections import (
    TUNING,
    EvaluateConfig,
    ModelConfig,
    ReadWith,
    Section,
    Seed,
    TeachConfig,
    is_tiny,
)
from vkd_framework.types import PARTS, Part


class Recipe(Section):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="letters, digits, '_', '.' and '-'")
    description: str = ""
    adapter: str
    method: str = Field(
        default=methods.DEFAULT,
        description="fills in procedure, train, losses, mask, prune, phases and floor; see `vkd methods`",
    )
    for_methods: dict[str, dict[str, Any]] = Field(
        default={},
        exclude=True,
        description="method -> recipe values that hold when this method is run; a resolved recipe has none left",
    )
    seed: Seed = 0
    model: ModelConfig = ModelConfig()
    data: Annotated[AnyData, Field(discriminator="kind")]
    teach: TeachConfig | None = None
    reference: Literal["none", "retain_only"] = "none"
    procedure: Literal["tune", "prune", "reteach"] = Field(
        default="tune", description="train with the losses, switch neurons off, or teach anew without the forgotten"
    )
    train: tuple[Part, ...] = Field(default=("encoder", "projector"), min_length=1, description="what may change")
    layers: tuple[str, ...] = Field(
        default=(), description="canonical names, see `vkd inspect-layers`; needed by attract and repel"
    )
    teacher: Annotated[TeacherConfig, TUNING] = TeacherConfig()
    losses: Annotated[Losses, TUNING] = Losses()
    mask: MaskConfig = MaskConfig()
    prune: Annotated[PruneConfig, ReadWith("procedure", ("prune",))] = PruneConfig()
    unlearn: Annotated[UnlearnConfig, TUNING] = UnlearnConfig()
    simulated_attack: Annotated[SimulatedAttack, TUNING] = SimulatedAttack()
    evaluate: EvaluateConfig = EvaluateConfig()
    relearn: RelearnConfig = RelearnConfig()
    attacks: tuple[Annotated[AnyAttack, Field(discriminator="kind")], ...] = Field(
        default=EVERY_ATTACK, description="what else is tried on the models; [] tries nothing"
    )

    @model_validator(mode="before")
    @classmethod
    def _filled_by_method(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        if problem := wrong_entry(raw, cls):
            raise ValueError(problem)
        return methods.fill(raw)

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        if method not in methods.METHODS:
            close = nearest(method, methods.METHODS)
            raise ValueError(f"there is no such method{close}; there are {', '.join(methods.METHODS)}")
        return method

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        if is_tiny(self.model.source) and self.teach is None:
            raise ValueError(
                f"model.source: {self.model.source} starts from random weights and needs a `teach` section"
            )
        if self.teach is not None and self.data.kind != "celebs":
            raise ValueError("`teach` works with data.kind: celebs; remove it, or use the celebs cast")
        if self.reference == "retain_only" and self.teach is None:
            raise ValueError("reference: retain_only needs a `teach` section to teach it with")
        self._teacher_fits()
        if self.model.frozen_language_model:
            self._leaves_language_model()
        if self.procedure == "tune":
            self._terms_fit()
        elif self.mask.kind != "none":
            raise ValueError(f"mask.kind: {self.mask.kind} goes with procedure: tune; set mask.kind to none")
        if self.procedure == "reteach" and self.teach is None:
            raise ValueError(f"method: {self.method} teaches a model anew and needs a `teach` section")
        if self.procedure == "reteach" and set(self.train) != set(PARTS):
            raise ValueError(f"procedure: reteach changes every part; set train to [{', '.join(PARTS)}]")
        return self

    def _leaves_language_model(self) -> None:
        rounded = self.model.quantize is not None
        held = f"model.quantize: {self.model.quantize}" if rounded else "model.offload: true"
        if wrong := self.moves_language_model(held, rounds=rounded):
            raise ValueError(wrong)

    def moves_language_model(self, held: str, *, rounds: bool) -> str | None:
        """What is wrong when `held` leaves a language model that nothing can tune, and that `rounds` cannot either."""
        simulated = self.simulated_attack
        tuned = {
            "language_model out of train": "language_model" in self.train,
            "full out of simulated_attack.scopes (or give it a rank)": simulated.weight > 0
            and "full" in simulated.scopes
            and simulated.rank is None,
            "full out of relearn.scopes": "full" in self.relearn.scopes,
            "quantize out of attacks": rounds and any(attack.kind == "quantize" for attack in self.attacks),
            "language_model out of the parts of module_restore": rounds
            and any(attack.kind == "module_restore" and "language_model" in attack.parts for attack in self.attacks),
        }
        found = [mend for mend, wrong in tuned.items() if wrong]
        what = "tune or round" if rounds else "tune"
        return f"{held} holds a language model that nothing can {what}; take {', '.join(found)}" if found else None

    def _terms_fit(self) -> None:
        attack = self.simulated_attack
        his = math.ceil(self.unlearn.checkpoint_every / (2 if attack.turns else 1))
        if attack.weight and attack.head_start >= his:
            raise ValueError(
                f"simulated_attack.head_start: an attack also ends at every checkpoint, with {his} made, so "
                f"{attack.head_start} steps are never over; make unlearn.checkpoint_every "
                f"({self.unlearn.checkpoint_every}) larger"
            )
        if attack.weight and self.model.dtype == "float16":
            raise ValueError(
                "simulated_attack.weight: what the attacker holds is in model.dtype, and float16 is too narrow for it; "
                "take bfloat16 or float32, or a weight of 0"
            )
        terms = self.losses
        if terms.forget_output.weight == 0 and terms.repel.weight == 0:
            raise ValueError(
                "nothing would be forgotten: losses.forget_output.weight and losses.repel.weight are both 0"
            )
        if self.unlearn.retain_floor and not any(
            t.weight for t in (terms.retain_output, terms.retain_kl, terms.attract)
        ):
            raise ValueError(
                "unlearn.retain_floor: below it only the retain terms are left, and all have a weight of 0, so that "
                "nothing would be repaired; give losses.retain_output a weight, or set unlearn.retain_floor to null"
            )
        pushes = (terms.forget_output.weight, terms.retain_output.weight, attack.weight, self.unlearn.weight_decay)
        if self.teacher.kind == "self" and self.repel_target == "repel" and not any(pushes):
            raise ValueError(
                "nothing would move: with teacher.kind: self the student starts where its teacher is, and attract and "
                "repel have no gradient there; give losses.forget_output or losses.retain_output a weight, or set "
                "losses.repel.target to mean, stranger or noise"
            )
        features = {"attract": terms.attract, "repel": terms.repel}
        if lacking := [name for name, term in features.items() if term.weight and not (term.layers or self.layers)]:
            raise ValueError(
                f"layers: missing; losses.{lacking[0]} needs at least 1 (see `vkd inspect-layers`), or a weight of 0"
            )
        output = terms.forget_output
        if output.weight and output.form == "npo" and output.reference != "vanilla" and self.reference == "none":
            raise ValueError(
                "losses.forget_output.reference: retain_only needs that model; set reference to retain_only"
            )

    @property
    def distilled(self) -> tuple[str, ...]:
        """The layers whose features enter a term, each once."""
        terms = (self.losses.attract, self.losses.repel)
        return tuple(dict.fromkeys(name for term in terms if term.weight for name in term.layers or self.layers))

    @property
    def keeps_masked_weights(self) -> bool:
        """Whether there is a mask outside of which no weight may move at all."""
        return self.procedure == "prune" or (self.mask.kind != "none" and self.mask.scope == "all")

    def _teacher_fits(self) -> None:
        if self.teacher.source == "retain_only" and self.reference != "retain_only":
            raise ValueError("teacher.source: retain_only needs that model; set reference to retain_only")
        target, kind = self.losses.repel.target, self.teacher.kind
        if target == "repel" and kind == "ignorant":
            raise ValueError(
                "losses.repel.target: repel moves away from a teacher that knew the forgotten, and this one is "
                "ignorant; take teacher, mean, stranger or noise"
            )
        if target == "teacher" and kind != "ignorant":
            raise ValueError(
                f"losses.repel.target: teacher would keep how the forgotten are seen, with teacher.kind: {kind}; "
                "take repel, mean, stranger or noise"
            )

    @property
    def repel_target(self) -> RepelTarget:
        """Where the repel term leads, the default resolved."""
        return self.losses.repel.target or ("teacher" if self.teacher.kind == "ignorant" else "repel")

    def to_yaml(self) -> str:
        """The resolved recipe, every default spelled out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def digest(self) -> str:
        """A hash of everything the recipe decides."""
        return digest(self.model_dump(mode="json"))


def digest(value: Any) -> str:
    """The first 16 hex digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
