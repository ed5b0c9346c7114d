"""Objectives that 2605.21606 compares with, on the chassis of pw_opsd.py: EOPD and REOPOLD.

The losses are pure: (n, V) log-probs at the training temperature in, (n,) out, to be handed to
`chunked_divergence`. Both papers' objectives are given as 2605.21606's code @35303e0 reads them.
"""

import math

import torch
from torch import Tensor, nn

import common
from common import Rollout

EOPD_ENTROPY = 0.8  # nats, above which EOPD adds its forward KL [2603.07079]
IGNORED = {  # flags of pw_opsd.py that a method has no use for
    "pw_opsd": (),
    "opsd": ("schedule", "weights", "reduction"),
    "eopd": ("clip", "schedule", "weights", "reduction"),
    "reopold": ("clip", "schedule", "weights", "reduction"),
}
REOPOLD_LAMBDA = 0.1  # relaxation: the reward's floor is ln(0.1) / 0.9 = -2.56 [2603.11137]


def eopd_loss(
    student_logprobs: Tensor, teacher_logprobs: Tensor, ids: Tensor, *,
    old_logprobs: Tensor | None = None, threshold: float = EOPD_ENTROPY, k: int = 16,
    epsilon: float = 0.2,
) -> Tensor:  # fmt: skip
    """EOPD [2603.07079 Eq. 7-10]: (n, V), (n, V), (n,) -> (n,).

    max(-r A, -clip(r, 1 -+ epsilon) A) with A = sg(log q(y) - log p(y)) and r = p(y) / p_old(y),
    plus, where the teacher's entropy exceeds `threshold` nats, a forward KL over the teacher's k
    best entries: the teacher is renormalised on them, the student is not. `ids` are the sampled
    tokens, `old_logprobs` (n,) their log p_old; None: the present p, where r is 1.
    """
    log_p = student_logprobs.gather(1, ids[:, None])[:, 0]
    log_q = teacher_logprobs.gather(1, ids[:, None])[:, 0]
    advantage = (log_q - log_p).detach()
    ratio = (log_p - (log_p.detach() if old_logprobs is None else old_logprobs)).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    sampled = torch.maximum(-ratio * advantage, -clipped * advantage)
    top, entries = teacher_logprobs.topk(min(k, teacher_logprobs.shape[1]))  # (n, K)
    top = top.log_softmax(-1)
    kl = (top.exp() * (top - student_logprobs.gather(1, entries))).sum(-1)
    return sampled + kl * (common.entropy(teacher_logprobs) > threshold)


def reopold_floor(lam: float = REOPOLD_LAMBDA) -> float:
    """The lowest reward that counts in full, ln(lam) / (1 - lam) nats."""
    return math.log(lam) / (1 - lam)


def reopold_loss(
    student_logprobs: Tensor, teacher_logprobs: Tensor, ids: Tensor, *, lam: float = REOPOLD_LAMBDA
) -> Tensor:
    """-max(R, ln(lam) / (1 - lam)) log p(y), R = sg(log q(y) - log p(y)) [2603.11137]: -> (n,).

    (n, V), (n, V), (n,) sampled tokens; a token that the teacher finds impossible costs a bounded
    amount. `reopold_mask` says which tokens count.
    """
    log_p = student_logprobs.gather(1, ids[:, None])[:, 0]
    log_q = teacher_logprobs.gather(1, ids[:, None])[:, 0]
    return -(log_q - log_p).detach().clamp_min(reopold_floor(lam)) * log_p


def reopold_statistics(
    student_logprobs: Tensor, teacher_logprobs: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """R and the student's entropy, nats, which choose REOPOLD's tokens: -> (n,), (n,)."""
    log_ratio = (teacher_logprobs - student_logprobs).gather(1, ids[:, None])[:, 0]
    return log_ratio, common.entropy(student_logprobs)


def reopold_mask(
    reward: Tensor, entropy: Tensor, step_entropy: Tensor, *, second_phase: bool,
    lam: float = REOPOLD_LAMBDA, beta: float = 0.2,
) -> Tensor:  # fmt: skip
    """Which tokens count: (N,) R, (N,) student entropy, that of all the step's tokens -> (N,) bool.

    Phase I: R not below the floor, which therefore never acts. Phase II: the share beta of the
    step's tokens where the student is least certain.
    """
    if second_phase:
        return entropy >= torch.quantile(step_entropy, 1 - beta)
    return reward >= reopold_floor(lam)


@torch.no_grad()
def reopold_choose(
    student: nn.Module, teacher: nn.Module, rollouts: list[Rollout], views: list[Rollout],
    world: common.World, *, vocab_size: int, temperature: float, micro_batch: int,
    second_phase: bool,
) -> list[Tensor]:  # fmt: skip
    """`reopold_mask` of each rollout's supervised tokens; two forward passes over the step."""
    stats = torch.zeros(2, 0)
    for i in range(0, len(rollouts), micro_batch):
        part = slice(i, i + micro_batch)
        batch, _, student_hidden, teacher_hidden = common.both_sides(
            student, teacher, rollouts[part], views[part], world.device
        )
        more = common.chunked_divergence(
            reopold_statistics, student_hidden, common.head_of(student, vocab_size),
            teacher_hidden, common.head_of(teacher, vocab_size), temperature=temperature,
            rows=(batch.input_ids[batch.completion_mask],),
        )  # fmt: skip
        stats = torch.cat([stats, torch.stack(more).cpu()], 1)
    step_entropy = torch.tensor(world.gather(stats[1].tolist()))
    kept = reopold_mask(*stats, step_entropy, second_phase=second_phase)
    return list(kept.float().split([sum(r.supervised) for r in rollouts]))
