"""A relearning attack that runs along with the unlearning: forgetting is asked for where an attacker would be.

What is only hidden comes back as soon as the weights are nudged. So a part of the forget gradient is taken not at the
student's weights v but at v + d, where d is what an attacker who fine-tunes on the forget pairs would have added. The
attacker is simulated: at every training step he makes one Adam step down the cross-entropy of the forgotten answers at
the attacked weights, over the visual modules alone or over every weight, and starts again from d = 0 after a random
number of steps. The student's step is first order, as in first-order MAML (Finn et al., arXiv 1703.03400, section 5.2):
the gradient at v + d is applied to v. Attacks inside the training loop are known from tamper-resistant safeguards
(Tamirisa et al., arXiv 2408.00761); following one attacker instead of starting anew at each step, and with a frozen
language model, is ours.

One forward and one backward pass serve both: the attacker goes down the gradient that the student goes up.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vkd_framework.batches import Batches
from vkd_framework.losses import answer_cross_entropy
from vkd_framework.plugins import MLLM
from vkd_framework.recipe import SimulatedAttack
from vkd_framework.types import SCOPES, ImageQuestionPair

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class SimulatedAttacker:
    """Follows the student with weights of his own, kept as differences to the student's.

    An attack also ends where the training can be resumed (`restart_every` steps), so that a resumed run goes on
    exactly like an uninterrupted one without saving the attacker.
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
    ) -> None:
        self._mllm, self._student, self._config, self._pairs = mllm, student, config, pairs
        self._seed, self._restart_every = seed, restart_every
        self._begin = self._end = 0
        self.difference: dict[str, Tensor] = {}
        self._mean: dict[str, Tensor] = {}
        self._square: dict[str, Tensor] = {}

    @property
    def bytes(self) -> int:
        """Memory held by his weights and his optimiser from one step to the next."""
        held = (*self.difference.values(), *self._mean.values(), *self._square.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def add_gradient(self, step: int, weight: float) -> float:
        """Make the attack's next step; returns the mean CE before it.

        `weight` times the gradient of `- mean min(CE, cap)` before that step is added to the student's, but not during
        the attack's first steps: near the student's own weights it is the forget terms that say how far to go.
        """
        if step >= self._end or step // self._restart_every != self._begin // self._restart_every:
            self._start(step)
        batch = self._mllm.tokenize(self.batches.batch(step - self._begin))
        attacked = {name: (p.detach() + self.difference[name]).requires_grad_() for name, p in self._target.items()}
        logits = functional_call(self._mllm.model, dict(attacked), kwargs=dict(batch.inputs)).logits
        cross_entropy = answer_cross_entropy(logits, batch.inputs["input_ids"], batch.content)
        counts = step - self._begin >= self._config.head_start
        over = counts and bool((cross_entropy > self._config.cap).any())
        attackers = _gradient(cross_entropy.mean(), attacked, keep=over)
        upward = attackers if counts else {}
        if over:
            upward = _gradient(cross_entropy.clamp(max=self._config.cap).mean(), attacked)
        for name, parameter in self._student.items():
            if name in upward:
                added = -weight * upward[name]
                parameter.grad = added if parameter.grad is None else parameter.grad.add_(added)
        self._move(attackers, step)
        return float(cross_entropy.detach().mean())

    def _start(self, step: int) -> None:
        """A new attack from the student's weights of this moment: its scope, its length and its batches are drawn."""
        draw = random.Random(f"{self._seed}/{step}")
        self._begin, self._end = step, step + draw.randint(*self._config.horizon)
        names = self._mllm.parameters(SCOPES[draw.choice(self._config.scopes)])
        self._target: dict[str, nn.Parameter] = {**names, **self._student}
        self._moved = tuple(names)
        self.batches = Batches(self._pairs, self._config.batch_size, draw.randrange(2**31))
        self.difference = {name: torch.zeros_like(parameter) for name, parameter in self._target.items()}
        self._mean, self._square = (
            {name: torch.zeros_like(parameter) for name, parameter in names.items()} for _ in range(2)
        )

    def _move(self, gradient: Mapping[str, Tensor], step: int) -> None:
        """One Adam step of the attacker."""
        t = step - self._begin + 1
        for name in self._moved:
            if name not in gradient:
                continue
            g = gradient[name]
            mean = self._mean[name].mul_(BETAS[0]).add_(g, alpha=1 - BETAS[0])
            square = self._square[name].mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
            step_size = self._config.learning_rate / (1 - BETAS[0] ** t)
            self.difference[name].addcdiv_(mean, (square / (1 - BETAS[1] ** t)).sqrt() + EPSILON, value=-step_size)


def _gradient(loss: Tensor, at: Mapping[str, Tensor], *, keep: bool = False) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(at.values()), retain_graph=keep, allow_unused=True)
    return {name: g for name, g in zip(at, found, strict=True) if g is not None}
