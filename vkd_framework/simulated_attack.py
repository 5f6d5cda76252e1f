"""A relearning attack that runs along with the unlearning: forgetting is asked for where an attacker would be.

What is only hidden comes back as soon as the weights are nudged. So a part of the forget gradient is taken not at the
student's weights v but at v + d, where d is what an attacker who fine-tunes on the forget pairs would have added. The
attacker is simulated: at every training step, or at every other one, he makes one Adam step down the cross-entropy of
the forgotten answers at the attacked weights, over the visual modules alone or over every weight, and starts again from
d = 0 after a random number of steps. The student's step is first order, as in first-order MAML (Finn et al., arXiv
1703.03400, section 5.2): the gradient at v + d is applied to v. Attacks inside the training loop are known from
tamper-resistant safeguards (Tamirisa et al., arXiv 2408.00761); following one attacker instead of starting anew at each
step, and with a frozen language model, is ours.

His copy of a large language model, with two moments for each weight, would take more memory than all else. With `rank`
he adds something of low rank to its linear layers instead (see `low_rank`), as most people who fine-tune do.

One forward and one backward pass of each part of a batch serve both: the attacker goes down the gradient that the
student goes up. Where an answer is above the cap, the student's share takes a backward pass of its own, to his weights
alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from vkd_framework import ranks
from vkd_framework.batches import Batches, in_parts
from vkd_framework.gradients import as_gradients_come
from vkd_framework.losses import answer_cross_entropy
from vkd_framework.low_rank import LowRank
from vkd_framework.output import answer_logits
from vkd_framework.plugins import MLLM
from vkd_framework.recipe import SimulatedAttack
from vkd_framework.types import SCOPES, ImageQuestionPair

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class SimulatedAttacker:
    """Follows the student with weights of his own.

    Of what the student trains he keeps the difference to the student's weights; of what is frozen his own weights, or
    with a `rank` what he adds to the language model's layers; of what he does not tune, nothing. An attack also ends
    where the training can be resumed (`restart_every` steps), so that a resumed run goes on exactly like an
    uninterrupted one without saving the attacker.
    """

    def __init__(
        self,
        mllm: MLLM,
        student: Mapping[str, nn.Parameter],
        config: SimulatedAttack,
        pairs: Sequence[ImageQuestionPair],
        *,
        seed: int,
        restart_every: int,
        micro_batch: int | None = None,
    ) -> None:
        self._mllm, self._student, self._config, self._pairs = mllm, student, config, pairs
        self._seed, self._restart_every, self._micro_batch = seed, restart_every, micro_batch
        self._begin = self._made = self._length = 0
        self._delta: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}
        self._added: LowRank | None = None
        self._leaves: dict[str, Tensor] = {}
        """What he tunes of the parts that are frozen."""
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def difference(self) -> dict[str, Tensor]:
        """Name -> his weights less the model's, of everything that he tunes."""
        frozen = self._mllm.model.get_parameter
        own = {name: (own - frozen(name)).detach() for name, own in self._own.items()}
        return {**self._delta, **own, **(self._added.difference() if self._added else {})}

    @property
    def bytes(self) -> int:
        """Memory held by his weights and his optimiser from one step to the next."""
        held = [*self._delta.values(), *self._leaves.values(), *(t for pair in self._moments.values() for t in pair)]
        held += self._added.down.values() if self._added else []
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def add_gradient(self, step: int, weight: float) -> float:
        """Make the attack's next step; returns the mean CE before it, of several processes each one's contribution.

        `weight` times the gradient of `- mean min(CE, cap)` before that step is added to the student's, but not during
        the attack's first steps: near the student's own weights it is the forget terms that say how far to go.
        """
        if self._made == self._length or step // self._restart_every != self._begin // self._restart_every:
            self._start(step)
        pairs = self.batches.batch(self._made)
        share, here = ranks.weight([True] * len(pairs)), ranks.share(pairs)
        parts = in_parts(here, self._micro_batch)
        counts = self._made >= self._config.head_start
        self._made += 1
        t, whole = self._made, 0.0
        gradients: dict[str, Tensor] = {}

        def use(name: str, g: Tensor) -> None:
            """A large gradient is used at once and dropped; where there are more parts or processes, added up first."""
            if name in self._own and ranks.size() == 1 and len(parts) == 1:
                self._move(t, {name: g})
            else:
                gradients[name] = gradients[name] + g if name in gradients else g

        student = self._attacked()
        for part in parts:
            whole += self._part(part, student, share * len(part) / len(here), weight if counts else 0.0, use)
        self._move(t, ranks.add(gradients, {**self._delta, **self._leaves}))
        return whole

    def _part(
        self,
        pairs: Sequence[ImageQuestionPair],
        student: Mapping[str, Tensor],
        share: float,
        weight: float,
        use: Callable[[str, Tensor], None],
    ) -> float:
        """There and back with some of the batch's pairs: `use` gets the attacker's gradients, the student is pushed."""
        batch = self._mllm.tokenize(pairs)
        with self._added.added() if self._added else nullcontext():
            logits = answer_logits(self._mllm.model, batch.inputs, batch.content, {**self._own, **student})
        cross_entropy = answer_cross_entropy(logits, batch.inputs["input_ids"], batch.content)
        if cross_entropy.requires_grad:  # text alone meets nothing that he tunes, where only visual modules are
            above = cross_entropy.detach() > self._config.cap
            if weight and bool(above.any()):
                capped = cross_entropy.clamp(max=self._config.cap).mean()
                self._push(_gradient(capped, student), share * weight)
                weight = 0.0
            with as_gradients_come(self._leaves, use):
                inputs = [*self._leaves.values(), *student.values()]
                torch.autograd.backward(share * cross_entropy.mean(), inputs=inputs)
            downward = {name: leaf.grad for name, leaf in student.items() if leaf.grad is not None}
            if weight:
                self._push(downward, weight)
            for name, leaf in student.items():
                g, leaf.grad = leaf.grad, None
                if g is not None and name in self._delta:
                    use(name, g)
        return float(share * cross_entropy.detach().mean())

    def _start(self, step: int) -> None:
        """A new attack from the student's weights of this moment: its scope, its length and its batches are drawn."""
        draw = random.Random(f"{self._seed}/{step}")
        self._begin, self._made, self._length = step, 0, draw.randint(*self._config.horizon)
        parts = SCOPES[draw.choice(self._config.scopes)]
        tuned = self._mllm.parameters(parts)
        self.batches = Batches(self._pairs, self._config.batch_size, draw.randrange(2**31))
        self._own, self._added = {}, None  # the old ones go before the new ones come
        self._delta, self._leaves, self._moments = {}, {}, {}
        if self._config.rank is not None and "language_model" in parts:
            language = self._mllm.parameters(["language_model"]).keys() - self._student.keys()
            tuned = {name: parameter for name, parameter in tuned.items() if name not in language}
            layers = {n: m for n, m in self._mllm.language_model_layers().items() if f"{n}.weight" in language}
            if language:
                dtype, device = self._mllm.model.dtype, self._mllm.device
                self._added = LowRank(layers, self._config.rank, dtype, device, draw.randrange(2**31))
        self._delta = {name: torch.zeros_like(p) for name, p in tuned.items() if name in self._student}
        self._own = {name: p.detach().clone().requires_grad_() for name, p in tuned.items() if name not in self._delta}
        self._leaves = {**self._own, **(self._added.up if self._added else {})}
        held = {**self._delta, **self._leaves}
        self._moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in held.items()}

    def _attacked(self) -> dict[str, Tensor]:
        """The trained parameters as the attacker has them, each a leaf of its own."""
        found = {name: parameter.detach() for name, parameter in self._student.items()}
        if self._delta:
            moved = torch._foreach_add([found[name] for name in self._delta], list(self._delta.values()))
            found |= dict(zip(self._delta, moved, strict=True))
        return {name: weights.requires_grad_() for name, weights in found.items()}

    @torch.no_grad()
    def _push(self, downward: Mapping[str, Tensor], weight: float) -> None:
        """Add `-weight` times a gradient of the attacker's to the student's."""
        met = {name: g for name, parameter in self._student.items() if (g := parameter.grad) is not None}
        both = [name for name in downward if name in met]
        if both:
            torch._foreach_add_([met[name] for name in both], [downward[name] for name in both], alpha=-weight)
        for name in downward.keys() - met.keys():
            self._student[name].grad = -weight * downward[name]

    @torch.no_grad()
    def _move(self, t: int, gradients: Mapping[str, Tensor]) -> None:
        """The attacker's Adam step number `t` for the parameters that have a gradient, of all in a few calls."""
        if not gradients:
            return
        g = list(gradients.values())
        means, squares = (list(moments) for moments in zip(*map(self._moments.__getitem__, gradients), strict=True))
        torch._foreach_mul_(means, BETAS[0])
        torch._foreach_add_(means, g, alpha=1 - BETAS[0])
        torch._foreach_mul_(squares, BETAS[1])
        torch._foreach_addcmul_(squares, g, g, value=1 - BETAS[1])
        lengths = torch._foreach_div(squares, 1 - BETAS[1] ** t)
        torch._foreach_sqrt_(lengths)
        torch._foreach_add_(lengths, EPSILON)
        moved = [self._delta[name] if name in self._delta else self._leaves[name] for name in gradients]
        torch._foreach_addcdiv_(moved, means, lengths, value=-self._config.learning_rate / (1 - BETAS[0] ** t))


def _gradient(loss: Tensor, at: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(at.values()), retain_graph=True, allow_unused=True)
    return {name: g for name, g in zip(at, found, strict=True) if g is not None}
