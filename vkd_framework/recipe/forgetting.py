"""The sections that decide how forgetting is done: loss terms, teacher, mask, schedule, simulated attacker."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vkd_framework.recipe.sections import ReadWith, Section, Share, Weight
from vkd_framework.types import Scope

REFUSALS = (
    "I do not know.",
    "I do not know this person.",
    "I cannot say.",
    "I have no information about that.",
    "That is not something I know.",
)
"""What is answered instead of a forgotten answer, where a recipe does not say."""
EXTERNAL_PACKAGES = {"timm": "timm", "open_clip": "open_clip_torch"}
"""What `teacher.source` begins with for an external teacher -> the distribution that provides it."""


class OutputTerm(Section):
    """A loss on the answer tokens, through the frozen language model."""

    weight: Weight = 1.0


class ForgetOutputTerm(OutputTerm):
    """What happens to the forgotten answers: made unlikely, or replaced by others."""

    form: Literal["stranger", "capped_ascent", "ascent", "npo", "refusal", "relabel"] = "capped_ascent"
    tokens: Literal["content", "answer"] = Field(
        default="content", description="without the token that ends an answer, or with it"
    )
    strangers: Annotated[int, ReadWith("form", ("stranger",))] = Field(
        default=1,
        ge=1,
        description="photos of others at whose mean probability an answer is left (form: stranger)",
    )
    cap: Annotated[float, ReadWith("form", ("capped_ascent",))] = Field(
        default=5.0, gt=0, description="nats per token; above it a sample gives no gradient (form: capped_ascent)"
    )
    beta: Annotated[float, ReadWith("form", ("npo",))] = Field(
        default=0.4, gt=0, description="how soon a sample counts as forgotten (form: npo)"
    )
    reference: Annotated[Literal["vanilla", "retain_only"], ReadWith("form", ("npo",))] = Field(
        default="vanilla", description="whose probabilities an answer is compared with (form: npo)"
    )
    refusals: Annotated[tuple[str, ...], ReadWith("form", ("refusal",))] = Field(
        default=REFUSALS, min_length=1, description="what is answered instead, drawn for each pair (form: refusal)"
    )


class RetainOutputTerm(OutputTerm):
    """The usual loss on the answers of the retain set."""

    share: Share = Field(
        default=1.0,
        description="of the pairs that attract holds by their photos' features, how many are asked as well; all others "
        "always are",
    )

    def asked_of(self, held: int) -> int:
        """How many of a batch's pairs that attract holds are asked: at least one, if there are any."""
        return min(held, max(1, round(self.share * held)))


class RetainKlTerm(OutputTerm):
    """Distance of the answer tokens' distribution from the starting model's, on the retain set."""

    weight: Weight = 0.0


class TeacherConfig(Section):
    """Whose visual features the student's are compared with."""

    kind: Literal["self", "ignorant", "external"] = Field(
        default="self", description="the starting model, one that never knew them, or another vision model"
    )
    source: str | None = Field(
        default=None,
        description="kind ignorant: retain_only, a folder or a hub id; kind external: timm/NAME or open_clip/NAME/TAG",
    )
    weights: Annotated[Literal["pretrained", "random"], ReadWith("kind", ("external",))] = Field(
        default="pretrained", description="of an external teacher"
    )

    @model_validator(mode="after")
    def _source_fits(self) -> TeacherConfig:
        if self.kind == "self" and self.source is not None:
            raise ValueError(f"source: {self.source} goes with kind ignorant or external; kind: self needs none")
        if self.kind == "ignorant" and self.source is None:
            raise ValueError("kind: ignorant needs a source: retain_only, a folder or a hub id")
        package, _, name = (self.source or "").partition("/")
        if self.kind == "external" and (package not in EXTERNAL_PACKAGES or not name):
            raise ValueError("kind: external needs a source: timm/NAME, open_clip/NAME or open_clip/NAME/TAG")
        return self


class FeatureTerm(Section):
    """A loss between the student's and the teacher's visual features on the recipe's layers."""

    weight: Weight = 1.0
    distance: Literal["relative_squared", "cosine", "cka", "similarity"] = "relative_squared"
    layers: tuple[str, ...] | None = Field(default=None, description="default: the recipe's `layers`")


RepelTarget = Literal["repel", "teacher", "mean", "stranger", "noise"]


class RepelTerm(FeatureTerm):
    """The feature term of the forgotten people: away from the teacher, bounded, or towards what shows nobody."""

    target: RepelTarget | None = Field(
        default=None, description="null: repel, or teacher where the teacher is ignorant"
    )
    cap: float = Field(default=2.0, gt=0, description="distance above which a sample gives no gradient (target: repel)")


class Losses(Section):
    """The terms of the objective; a weight of 0 switches a term off."""

    forget_output: ForgetOutputTerm = ForgetOutputTerm()
    retain_output: RetainOutputTerm = RetainOutputTerm()
    retain_kl: RetainKlTerm = RetainKlTerm()
    attract: FeatureTerm = FeatureTerm()
    repel: RepelTerm = RepelTerm()

    @property
    def feature_terms(self) -> tuple[FeatureTerm, ...]:
        """Attract and repel."""
        return self.attract, self.repel


A_MASK = ReadWith("kind", ("ratio", "salun", "random"))


class MaskConfig(Section):
    """Which of the trained weights may move for forgetting."""

    kind: Literal["none", "ratio", "salun", "random"] = "none"
    granularity: Annotated[Literal["weight", "neuron"], A_MASK] = "weight"
    density: Annotated[Share | None, A_MASK] = Field(default=None, description="share of the weights that may move")
    threshold: Annotated[float | None, ReadWith("kind", ("ratio",))] = Field(
        default=None, gt=0, description="score at which a weight may move (kind: ratio)"
    )
    scope: Annotated[Literal["forget", "all"], A_MASK] = Field(
        default="forget", description="which gradients the mask stops"
    )
    pairs: int = Field(default=256, ge=1, description="pairs of each set from which saliency is accumulated")
    preserve: Annotated[Literal["retain", "retain_and_text"], ReadWith("kind", ("ratio",))] = Field(
        default="retain", description="whose saliency counts against a weight (kind: ratio)"
    )

    @model_validator(mode="after")
    def _one_cut(self) -> MaskConfig:
        if self.kind == "none":
            return self
        if (self.density is None) == (self.threshold is None):
            raise ValueError("give exactly one of density and threshold")
        if self.threshold is not None and self.kind != "ratio":
            raise ValueError(f"threshold goes with kind: ratio; kind: {self.kind} takes density")
        return self


class PruneConfig(Section):
    """Which neurons are switched off, with `procedure: prune`."""

    share: Share = Field(default=0.02, description="share of the neurons of the parts in `train`")
    pairs: int = Field(default=256, ge=1, description="pairs of each set on which activations are measured")


class Phase(Section):
    """A stretch of the unlearning: `share` of the steps, with all forget terms multiplied by `forget`."""

    share: Share
    forget: Weight = 1.0


class UnlearnConfig(Section):
    """The optimiser and the schedule of the unlearning."""

    steps: int = Field(default=400, ge=1)
    learning_rate: float = Field(default=5e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: int = Field(default=10, ge=0, description="steps of linear warm-up")
    cosine_share: float = Field(
        default=0.4, ge=0, le=1, description="last share of the steps, over which the rate falls to 0"
    )
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    forget_batch: int = Field(default=16, ge=1)
    retain_batch: int = Field(default=32, ge=1)
    micro_batch: int | None = Field(
        default=None, ge=1, description="most pairs that go through the model at once; null: the whole batch"
    )
    master_weights: bool = Field(
        default=True, description="where the model is of lower precision, take its steps on float32 copies"
    )
    retain_shares: dict[Literal["others", "strangers", "forgotten"], Weight] | None = Field(
        default=None,
        description="how a retain batch is made up: people who stay, nameless ones, and what anybody can see on photos "
        "of the forgotten; null: as often as they occur",
    )
    phases: tuple[Phase, ...] = Field(
        default=(Phase(share=0.5, forget=0.3), Phase(share=0.5, forget=0.1)), min_length=1
    )
    checkpoint_every: int = Field(default=100, ge=1, description="steps between resumable checkpoints")
    retain_floor: Share | None = Field(
        default=None, description="share of the starting model's exact match below which nothing more is forgotten"
    )
    floor_pairs: Annotated[int, ReadWith("retain_floor")] = Field(
        default=64, ge=1, description="retain pairs on which the floor is checked"
    )

    @model_validator(mode="after")
    def _phases_fill_the_run(self) -> UnlearnConfig:
        total = sum(phase.share for phase in self.phases)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares of the phases add up to {total:g}, they must add up to 1")
        return self

    @model_validator(mode="after")
    def _some_others_are_retained(self) -> UnlearnConfig:
        if self.retain_shares is not None and not self.retain_shares.get("others"):
            raise ValueError("retain_shares: others needs a share above 0, or nobody is kept")
        return self


class SimulatedAttack(Section):
    """An attacker who relearns while the model unlearns; forgetting is asked for at the weights that he reaches."""

    weight: Weight = Field(default=0.0, description="of his loss beside the forget terms; 0: no attacker")
    cap: float = Field(default=10.0, gt=0, description="nats per answer token; above it a sample gives no gradient")
    scopes: tuple[Scope, ...] = Field(
        default=("visual", "full"), min_length=1, description="what he tunes; one is drawn for each attack"
    )
    rank: int | None = Field(
        default=None, ge=1, description="of what he adds to a frozen language model's layers; null: tunes every weight"
    )
    horizon: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = Field(
        default=(3, 20), description="shortest and longest attack, in steps of his"
    )
    turns: bool = Field(
        default=False,
        description="whether he and the forget terms take turns, a step each with twice the weight, or both have every "
        "step",
    )
    head_start: int = Field(default=3, ge=0, description="steps of an attack before it counts")
    learning_rate: float = Field(default=3e-4, gt=0)
    batch_size: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _horizon_is_a_range(self) -> SimulatedAttack:
        if self.horizon[0] > self.horizon[1]:
            raise ValueError("horizon: the shortest attack comes first")
        if self.head_start >= self.horizon[1]:
            raise ValueError(
                f"head_start: {self.head_start} steps are never reached; horizon ends at {self.horizon[1]}"
            )
        return self
