"""The terms of the objective, as pure functions of logits or features.

Source: Wang et al., "(Robust) MLLM Unlearning via Visual Knowledge Distillation", arXiv 2512.11325. The paper's exact
losses are not public; what follows is a reconstruction from its description: supervision at the output and at
intermediate visual features, with a frozen language model. With F the features of student S and teacher T,

    L =  - a * mean_f min(CE_S(f), c)                                  forget_output
         + b * mean_r CE_S(r)                                          retain_output
         + lam_r * mean_layers mean_r D(F_S(r), F_T(r))                attract
         - lam_f * mean_layers mean_f min(D(F_S(f), F_T(f)), tau)      repel

or, with a target that shows nobody in place of the teacher's features, + lam_f * mean_layers mean_f D(F_S(f), G(f)).

The other forms of the forget term and the distance in distribution belong to the baselines; each names its source.

Shapes: `B` samples, `L` tokens, `V` vocabulary, `R` feature rows, `D` channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Distance = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def answer_cross_entropy(logits: Tensor, input_ids: Tensor, answer: Tensor) -> Tensor:
    """`[B]`: mean cross-entropy in nats over each sample's answer tokens.

    `logits` `[N, V]` as in `answer_rows`, or `[B, L, V]`; `input_ids` `[B, L]`, `answer` `[B, L]` bool, True on the
    tokens to predict (never the first). Only the logits that predict an answer token are looked at.
    """
    sample, position = answer.nonzero(as_tuple=True)
    rows = answer_rows(logits, answer) if logits.dim() == 3 else logits
    token_loss = functional.cross_entropy(rows, input_ids[sample, position], reduction="none")
    total = torch.zeros(len(answer), dtype=token_loss.dtype, device=token_loss.device).index_add(0, sample, token_loss)
    return total / answer.sum(dim=1)


def capped_ascent(cross_entropy: Tensor, cap: float) -> Tensor:
    """Forget term at the output: `- mean min(CE, cap)`; a sample above the cap gives no gradient. `[B]` -> scalar."""
    return -cross_entropy.clamp(max=cap).mean()


def level(cross_entropy: Tensor, target: Tensor) -> Tensor:
    """Forget term at the output that stops by itself: `mean |CE - target|`. `[B]`, `[B]` -> scalar.

    Ours. Ascent leaves answers less likely than they are to a model that never knew, which tells who was forgotten.
    """
    return (cross_entropy - target).abs().mean()


def ascent(cross_entropy: Tensor) -> Tensor:
    """Gradient ascent: `- mean CE`, without a bound. `[B]` -> scalar. Source: Jang et al., arXiv 2210.01504, L_UL."""
    return -cross_entropy.mean()


def npo(log_probability: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Negative preference: `- (2 / beta) mean log sigmoid(- beta (log p - log p_ref))`. `[B]`, `[B]` -> scalar.

    Log-probabilities of whole answers, summed over their tokens. Bounded below by 0; a forgotten sample gives little
    gradient. As beta goes to 0, the gradient becomes that of ascent. Source: Zhang et al., arXiv 2404.05868, L_NPO.
    """
    return -2 / beta * functional.logsigmoid(-beta * (log_probability - reference)).mean()


def answer_rows(logits: Tensor, answer: Tensor) -> Tensor:
    """`[N, V]`: of `logits` `[B, L, V]`, those that predict the `N` answer tokens of the batch, in float32."""
    sample, position = answer.nonzero(as_tuple=True)
    return logits[sample, position - 1].float()


def kl_divergence(reference: Tensor, student: Tensor) -> Tensor:
    """`KL(reference || student)` of two sets of logits `[N, V]`, mean over the `N` tokens -> scalar.

    Source: Maini et al., arXiv 2401.06121, L_KL, here on answer tokens only.
    """
    wanted, found = reference.log_softmax(dim=1), student.log_softmax(dim=1)
    return (wanted.exp() * (wanted - found)).sum(dim=1).mean()


def relative_squared(student: Tensor, teacher: Tensor, sample: Tensor, count: int) -> Tensor:
    """`[count]`: squared distance of each sample's features over the squared length of the teacher's.

    `student`, `teacher` `[R, D]`, `sample` `[R]`. A big picture weighs as much as a small one.
    """
    moved = _sum_by_sample((student.float() - teacher.float()).square().sum(dim=1), sample, count)
    length = _sum_by_sample(teacher.float().square().sum(dim=1), sample, count)
    return moved / length.clamp(min=1e-12)


def cosine(student: Tensor, teacher: Tensor, sample: Tensor, count: int) -> Tensor:
    """`[count]`: mean over each sample's rows of 1 - cosine similarity. Shapes as in `relative_squared`."""
    apart = 1 - functional.cosine_similarity(student.float(), teacher.float(), dim=1)
    return _sum_by_sample(apart, sample, count) / _sum_by_sample(torch.ones_like(apart), sample, count).clamp(min=1)


def cka(student: Tensor, teacher: Tensor, sample: Tensor, count: int) -> Tensor:
    """`[count]`: 1 - linear CKA between each sample's rows as the student and as the teacher sees them; 0 to 1.

    Compares how a photo's rows are alike, so the widths may differ: `student` `[R, D]`, `teacher` `[R, E]`. Blind to
    rotation, to a common scale, and to what all rows of a photo share. With `K` and `L` the Gram matrices of the
    centred rows, CKA = <K, L> / (|K| |L|). Source: Kornblith et al., arXiv 1905.00414, section 3.
    """

    def apart(s: Tensor, t: Tensor) -> Tensor:
        k, m = (_gram(rows - rows.mean(dim=0)) for rows in (s, t))
        lengths = (k.square().sum() * m.square().sum()).clamp(min=1e-12).sqrt()
        return 1 - (k * m).sum() / lengths

    return _one_by_one(apart, student, teacher, sample, count)


def similarity(student: Tensor, teacher: Tensor, sample: Tensor, count: int) -> Tensor:
    """`[count]`: mean squared difference of the cosine similarities between a sample's rows; 0 to 4.

    Shapes as in `cka`. Blind to rotation and to each row's length. Source: Tung and Mori, arXiv 1907.09682, there
    between the images of a batch and normalised row by row, here between the rows of one photo and as cosines.
    """

    def apart(s: Tensor, t: Tensor) -> Tensor:
        k, m = (functional.normalize(rows, dim=1, eps=1e-6) for rows in (s, t))
        return (k @ k.T - m @ m.T).square().mean()

    return _one_by_one(apart, student, teacher, sample, count)


def attract(distance: Tensor) -> Tensor:
    """Keep how the others are seen: the mean distance. `[layers, B]` -> scalar."""
    return distance.mean()


def repel(distance: Tensor, cap: float) -> Tensor:
    """Stop seeing the forgotten as before: `- mean min(D, cap)`, bounded by the cap. `[layers, B]` -> scalar."""
    return -distance.clamp(max=cap).mean()


def _gram(rows: Tensor) -> Tensor:
    """`[n, n]`: inner products of `rows` `[n, D]`, brought to the length 1 together so that nothing overflows."""
    rows = rows / rows.norm().clamp(min=1e-6)
    return rows @ rows.T


def _one_by_one(
    apart: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, sample: Tensor, count: int
) -> Tensor:
    """`[count]`: `apart` of each sample's rows, in float32; 0 for a sample without rows."""
    values = [student.new_zeros((), dtype=torch.float32)] * count
    for b in sorted(set(sample.tolist())):
        own = sample == b
        values[b] = apart(student[own].float(), teacher[own].float())
    return torch.stack(values)


def _sum_by_sample(values: Tensor, sample: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, sample, values)


DISTANCES: dict[str, Distance] = {
    "relative_squared": relative_squared,
    "cosine": cosine,
    "cka": cka,
    "similarity": similarity,
}
RELATIONAL = ("cka", "similarity")
"""Distances that compare relations between rows, so that the teacher's features may have another width."""
