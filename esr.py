r"""ESR: Early Stopping Rollout, on-policy distillation on the first N tokens only.

Paper: "Less is More: Early Stopping Rollout for On-Policy Distillation", arXiv:2605.27028. No code
is public.

On-policy distillation lets the student write, and pulls its next-token distribution towards the
teacher's along what it wrote. Late in a weak student's text the teacher itself goes wrong: it is
asked to continue a text it would not have written. ESR stops the rollout after N tokens, so that
only early tokens, where the teacher is still reliable, are trained. That also costs a tenth of the
sampled tokens. With a long N this file is plain OPD.

    for each step:
        x ~ problems;  y ~ student(. | x), generation stopped at N tokens         # Eq. 2
        loss = mean over all tokens t of the step of
               KL(student(. | x, y_<t) || teacher(. | x, y_<t))       # Eq. 1, full vocabulary
        update the student; put its new weights into the sampler

Run it:
    python esr.py --student tiny/student --teacher tiny/teacher --problems tiny/train.jsonl \
        --benchmark tiny/test.jsonl --max-new-tokens 24 --steps 60 --learning-rate 2e-3 \
        --prompts-per-step 32 --micro-batch 32 --eval-max-new-tokens 96      # laptop CPU, minutes
    python esr.py --student Qwen/Qwen2.5-Math-1.5B --teacher Qwen/Qwen3-1.7B \
        --problems AI-MO/NuminaMath-CoT --benchmark HuggingFaceH4/MATH-500   # the paper, 1 GPU
    python esr.py ... --max-new-tokens 2048                   # plain OPD, the paper's baseline

Differences from the paper:
1. Mean over the step's tokens where Eq. 1 has a sum: the text of Sec. 2 says "averaged".
2. Pairs whose token ids agree (Qwen2.5-Math and Qwen3 do, on all 151,665 shared ids) get the full
   vocabulary; the paper aligns their texts. Other pairs are aligned as in Sec. 4.1, and the
   divergence runs over the vocabulary entries that both sides have (--cross-tokenizer sampled: the
   sampled tokens only, which is how the paper's sentence can also be read).
3. Rollouts are drawn at T = 0.7 and the divergence is taken at T = 1, as the paper's numbers imply;
   for --cross-tokenizer sampled this makes the gradient a biased estimate.
4. Not stated there, chosen here and marked [ours] below: optimizer, schedule, clip, prompt.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

import common
from align import match_vocabularies, print_alignment, teacher_rollouts
from common import Problem, Rollout
from eval import Exam
from sampler import Sampler

Select = Literal[
    "prefix",
    "top_rkl",
    "top_student_entropy",
    "top_teacher_entropy",
    "rkl_x_hs",
    "ht_x_hs",
    "rkl_x_ht_x_hs",
]


# ---- 1. Arguments --------------------------------------------------------------------------------
@dataclass
class Args:
    # method
    student: str  # model to train: local directory or hub id
    teacher: str  # frozen model, any tokenizer
    problems: str  # .jsonl, .parquet or hub id with problem, answer, solution columns
    max_new_tokens: int = 100  # N, where generation stops; 2048 is plain OPD [paper]
    select: Select = "prefix"  # which tokens are trained; others pick from the full rollout [paper]
    select_k: int = 100  # tokens kept per rollout, unless prefix [paper]
    cross_tokenizer: Literal["shared", "sampled"] = "shared"  # on aligned tokens [Sec. 4.1]
    # rollouts
    prompts_per_step: int = 16  # problems per update [paper]
    num_generations: int = 1  # rollouts per problem [paper]
    temperature: float = 0.7  # of sampling, in training and evaluation [paper]
    top_p: float = 1.0  # of sampling; below 1 is off-policy [ours]
    thinking: bool = False  # enable_thinking in both chat templates [ours: teacher lengths fit]
    sampler: Literal["auto", "vllm", "hf"] = "auto"  # vLLM where it is installed [ours]
    memory_fraction: float = 0.4  # of the GPU for vLLM while it is awake [ours]
    # optimisation
    lora_rank: int = 32  # 0 trains every weight [paper]
    lora_alpha: int = 64  # LoRA scale is alpha / rank [paper]
    learning_rate: float = 5e-5  # AdamW, constant, no weight decay [paper]
    max_grad_norm: float = 1.0  # global L2 clip [ours]
    steps: int = 200  # updates [paper]
    micro_batch: int = 4  # rollouts per forward pass; memory only [ours]
    gradient_checkpointing: bool = False  # recompute activations; memory only [ours]
    # evaluation
    benchmark: str = ""  # known name, .jsonl or hub id; empty: no evaluation [ours]
    eval_n: int = 4  # samples per problem [paper]
    eval_max_new_tokens: int = 2048  # cap of evaluation samples [ours: 90th pct is 1,800]
    save_every: int = 50  # steps between checkpoints, each evaluated [paper]
    # run
    run_dir: str = ""  # where the run is written; default runs/<names, seed, time> [ours]
    resume: str = ""  # directory of a run to continue, same arguments [ours]
    seed: int = 0  # of LoRA initialisation, problem order and sampling [ours]
    device: str = "auto"  # cuda where there is one, else cpu [ours]
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # bfloat16 on GPU, float32 on CPU [ours]


# ---- 2. Method -----------------------------------------------------------------------------------
PROMPT = (
    "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."  # [ours]
)


def student_prompt(problem: Problem) -> str:
    """What the student reads in training."""
    return common.fill(PROMPT, problem=problem.prompt)


def teacher_prompt(problem: Problem) -> str:
    """What the teacher reads: the student's own prompt, in the teacher's chat template."""
    return student_prompt(problem)


def make_rollouts(
    sampler: Sampler, prompts: list[list[int]], seeds: list[int], **knobs: float
) -> list[Rollout]:
    """y ~ student(. | x), where generation itself stops at N = max_new_tokens [Eq. 2].

    A rollout that ends earlier keeps its EOS; one that is cut at N gets none.
    """
    return sampler.sample(prompts, seeds, **knobs)


def token_weights(
    completion_mask: Tensor, *, num_tokens: int, scores: Tensor | None = None, k: int = 0
) -> Tensor:
    """(B, T) bool -> (B, T): 1 / num_tokens on each trained token of the step, 0 elsewhere.

    With `scores` (N,), one per True of the mask, only each row's k best are trained.
    """
    if scores is not None:
        ranked = scores.new_full(completion_mask.shape, -torch.inf)  # (B, T)
        ranked[completion_mask] = scores
        best = ranked.topk(min(k, ranked.shape[1]), dim=1).indices
        completion_mask = completion_mask & torch.zeros_like(completion_mask).scatter(1, best, True)
    return completion_mask.float() / num_tokens


divergence = common.reverse_kl  # KL(student || teacher) over the full vocabulary, nats [Eq. 1]


def sampled_reverse_kl(
    student_logprobs: Tensor, teacher_logprobs: Tensor, student_ids: Tensor, teacher_ids: Tensor
) -> Tensor:
    """One-sample estimate of the reverse KL: (n, V_s), (n, V_t), (n,), (n,) -> (n,) nats.

    The value is log p(y) - log q(y); the gradient is the score function's, (log p - log q) grad
    log p, because the value's own gradient has mean zero. Unbiased where y ~ p, so at T = 1.
    """
    log_p = student_logprobs.gather(1, student_ids[:, None])[:, 0]
    log_q = teacher_logprobs.gather(1, teacher_ids[:, None])[:, 0]
    value = (log_p - log_q).detach()
    return value + value * (log_p - log_p.detach())


def selection_score(student_logprobs: Tensor, teacher_logprobs: Tensor, *, select: str) -> Tensor:
    """What the token-selection ablation ranks tokens by: (n, V), (n, V) -> (n,)."""
    rkl = common.reverse_kl(student_logprobs, teacher_logprobs)
    h_s, h_t = common.entropy(student_logprobs), common.entropy(teacher_logprobs)
    scores = {"top_rkl": rkl, "top_student_entropy": h_s, "top_teacher_entropy": h_t}
    scores |= {"rkl_x_hs": rkl * h_s, "ht_x_hs": h_t * h_s, "rkl_x_ht_x_hs": rkl * h_t * h_s}
    return scores[select]


# ---- 3. Training ---------------------------------------------------------------------------------
def check(args: Args) -> None:
    """Stop on arguments that cannot mean anything, before anything is loaded."""
    common.check_ranges(args)
    if args.select != "prefix" and not 1 <= args.select_k <= args.max_new_tokens:
        raise common.Stop(
            f"--select-k {args.select_k} must lie between 1 and the rollout length, "
            f"--max-new-tokens {args.max_new_tokens}."
        )


def main(args: Args) -> Path:
    """Train, evaluate and save; returns the run directory."""
    # -- Setup: run, data, models, optimizer, resume, sampler
    check(args)
    world = common.World(args.device)
    run = common.Run(args, __file__, world)
    problems = common.load_problems(args.problems)
    exam = Exam(
        args.benchmark, PROMPT, args.eval_n, args.eval_max_new_tokens, args.temperature,
        args.top_p, args.thinking, args.seed,
    )  # fmt: skip
    tokenizer = common.load_tokenizer(args.student)
    teacher_tokenizer = common.load_tokenizer(args.teacher)
    vocabulary = match_vocabularies(tokenizer, teacher_tokenizer)
    torch.manual_seed(args.seed)
    teacher = common.load_model(args.teacher, dtype=args.dtype, device=world.device)
    student = common.load_student(
        args.student, args.lora_rank, args.lora_alpha, dtype=args.dtype, device=world.device,
        checkpointing=args.gradient_checkpointing,
    )  # fmt: skip
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)  # [ours]
    chat = partial(common.chat_prompt_ids, thinking=args.thinking)
    used = common.problems_for_step(problems, 0, args.steps * args.prompts_per_step, args.seed)
    asked = [chat(tokenizer, student_prompt(problem)) for problem in used]
    heard = [chat(teacher_tokenizer, teacher_prompt(problem)) for problem in used]
    common.context_needed(teacher, heard, args.max_new_tokens, "--max-new-tokens")
    max_len = max(
        common.context_needed(student, asked, args.max_new_tokens, "--max-new-tokens"),
        exam.context(student, tokenizer),
    )
    sampler = Sampler(
        args.student, student, tokenizer, backend=args.sampler, max_len=max_len,
        memory_fraction=args.memory_fraction, seed=args.seed,
    )  # fmt: skip
    sampled = vocabulary.aligned and args.cross_tokenizer == "sampled"
    if sampled and args.select != "prefix":
        raise common.Stop("--select needs whole distributions: use --cross-tokenizer shared.")
    student_rows = None if sampled else vocabulary.student_ids
    teacher_head = common.head_of(teacher, None if sampled else vocabulary.teacher_ids)
    start = run.begin(student, optimizer)  # 0, or the step of the checkpoint to go on from
    if world.rank == 0:
        common.print_setup(tokenizer, teacher_tokenizer, (asked[0], heard[0]))

    knobs = {"temperature": args.temperature, "top_p": args.top_p}  # of sampling
    bar = tqdm(total=args.steps, initial=start, disable=world.rank > 0, desc="esr")
    for step in range(start, args.steps + 1):
        times: dict[str, float] = {}
        with sampler.awake():
            with common.timed(times, "time/sync_s"):
                sampler.sync()

            # -- Evaluate: before the update, so that step 0 is the untrained student
            if step % args.save_every == 0 or step == args.steps:
                exam.sit(step, run, sampler, tokenizer)
            if step == args.steps:
                break

            # -- Roll out: this rank's share of the step's problems
            todo = common.problems_for_step(problems, step, args.prompts_per_step, args.seed)
            jobs = [(n, g) for n in range(len(todo)) for g in range(args.num_generations)]
            jobs = jobs[world.rank :: world.size]
            with common.timed(times, "time/rollout_s"):
                rollouts = make_rollouts(
                    sampler,
                    [chat(tokenizer, student_prompt(todo[n])) for n, _ in jobs],
                    [common.request_seed(args.seed, step, n, g) for n, g in jobs],
                    max_new_tokens=args.max_new_tokens,
                    **knobs,
                )
        prompts = [chat(teacher_tokenizer, teacher_prompt(todo[n])) for n, _ in jobs]
        views = teacher_rollouts(rollouts, prompts, vocabulary, teacher_tokenizer)

        # -- Score and learn: num_tokens is the whole step's, so micro_batch is memory only
        k = args.max_new_tokens if args.select == "prefix" else args.select_k
        (num_tokens,) = world.sum(sum(min(k, sum(r.supervised)) for r in rollouts))
        if num_tokens == 0:
            raise common.Stop(f"step {step}: the rollouts hold no token that can be supervised.")
        totals = np.zeros(4)  # loss, kl, log-prob gap, scored tokens: sums, so they are the step's
        with common.timed(times, "time/train_s"):
            for i in range(0, len(rollouts), args.micro_batch):
                part = slice(i, i + args.micro_batch)
                batch, view, student_hidden, teacher_hidden = common.both_sides(
                    student, teacher, rollouts[part], views[part], world.device
                )  # hidden: (N, D_s), (N, D_t)
                if step == start and i == 0:
                    sides = {"student": (student, batch), "teacher": (teacher, view)}
                    common.check_first_batch(sides, rollouts[part], divergence)
                student_head = common.head_of(student, student_rows)
                pair = student_hidden, student_head, teacher_hidden, teacher_head
                ids, teacher_ids = (b.input_ids[b.completion_mask] for b in (batch, view))  # (N,)
                scores = None
                if args.select != "prefix":
                    score = partial(selection_score, select=args.select)
                    with torch.no_grad():
                        scores = common.chunked_divergence(score, *pair)  # (N,)
                mask = batch.completion_mask  # (B, T)
                weights = token_weights(mask, num_tokens=num_tokens, scores=scores, k=k)[
                    mask
                ]  # (N,)
                kl = common.chunked_divergence(
                    sampled_reverse_kl if sampled else divergence, *pair, weights=weights,
                    rows=(ids, teacher_ids) if sampled else (),
                )  # fmt: skip  # (N,) nats
                loss = (weights * kl).sum()  # Eq. 1, mean over the step's tokens
                loss.backward()
                head = common.head_of(student)
                gap = common.logprob_gap(student_hidden, head, ids, rollouts[part])
                if step == start and i == 0 and vocabulary.aligned and world.rank == 0:
                    teacher_side = teacher_hidden, common.head_of(teacher)
                    print_alignment(vocabulary, rollouts, (student_hidden, head), teacher_side)
                totals += [loss.item(), kl.sum().item(), gap.sum().item(), len(kl)]
        loss_sum, kl_sum, gap_sum, num_scored, *counts = world.sum(
            *totals,
            sum(len(r.completion_ids) for r in rollouts),
            sum(r.finish_reason == "stop" for r in rollouts),
            len(rollouts),
            run.interrupted,
        )
        num_sampled, num_stopped, num_rollouts, interrupted = counts

        # -- Update
        world.sum_gradients(parameters)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item()
        common.check_finite(step + 1, run, loss=loss_sum, grad_norm=grad_norm)
        common.check_logprob_gap(step, gap_sum / num_scored, student.compute_dtype)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # -- Log and save
        metrics = {
            "loss": loss_sum,
            "kl/mean": kl_sum / num_scored,
            "grad_norm": grad_norm,
            "lr": args.learning_rate,
            "tokens/supervised": num_tokens,
            "tokens/sampled": num_sampled,
            "rollout/len_mean": num_sampled / num_rollouts,
            "rollout/stop_frac": num_stopped / num_rollouts,
            "rollout/logprob_gap": gap_sum / num_scored,
            "rollout/aligned_frac": num_scored / num_sampled,
            **times,
            "mem/peak_gb": common.peak_memory_gb(world.device),
        }
        run.log("metrics", {"step": step + 1, **metrics})
        run.log_rollouts(step + 1, rollouts[:2], tokenizer)
        bar.set_postfix(loss=f"{loss_sum:.4f}", tok_s=f"{num_sampled / sum(times.values()):.0f}")
        bar.update()
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps or interrupted:
            run.save_checkpoint(step + 1, student, tokenizer, optimizer)
        if interrupted:
            break
    bar.close()
    run.report(f"avg@{args.eval_n}")
    return run.dir


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
