r"""PW-OPSD: Position-Weighted On-Policy Self-Distillation: the model teaches itself.

Paper: "When Are Teacher Tokens Reliable?", arXiv:2605.21606; code: SaFo-Lab/PW-OPSD @35303e0.

There is no second model: the student with its LoRA switched off, and with a reference solution in
its prompt, scores what the student wrote without one. The paper finds its uncertainty harmless late
and real early (analysis/branch_viability.py), so a token's weight grows with its position. A clip
on each vocabulary entry keeps a few entries from ruling the loss.

    for each step:
        x, s ~ problems with solutions;  y ~ student(. | x)
        KL_t = sum_v min(q(v) [log q(v) - log p(v)], clip)     # q: base(. | x, s, y_<t), full
        w_t  = w_min + (1 - w_min) sigmoid((f_t - tau) / s_w)  # Eq. 5, f_t = (t - 0.5) / |y|
        loss = mean over rollouts of the mean over t of w_t KL_t
        update the student's LoRA; put its new weights into the sampler

Run it:
    python pw_opsd.py --student tiny/student --problems tiny/train.jsonl \
        --benchmark tiny/test.jsonl --max-new-tokens 64 --steps 60 --learning-rate 2e-3 \
        --clip 1 --micro-batch 32 --save-every 60 --eval-max-new-tokens 96   # laptop CPU, minutes
    python pw_opsd.py --student Qwen/Qwen3-4B --problems siyanzhao/Openthoughts_math_30k_opsd \
        --benchmark aime24                                               # the paper, 1 GPU
    python pw_opsd.py ... --method opsd                       # the baselines: opsd, eopd, reopold

Differences from the paper:
1. 100 of the schedule's 150 steps are run: the paper trains 150 and evaluates checkpoint 100.
2. Token means (opsd, eopd) and REOPOLD's entropy quantile are over the whole step; the released
   code takes them over a micro-batch, so that a memory flag is part of its objective.
3. No padding between prompt and completion, which shifts positions in the released collator.
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

import baselines
import common
from align import match_vocabularies, teacher_rollouts
from baselines import eopd_loss, reopold_loss
from common import Problem, Rollout
from eval import Exam
from sampler import Sampler


# ---- 1. Arguments --------------------------------------------------------------------------------
@dataclass
class Args:
    # method
    student: str  # model to train: local directory or hub id
    problems: str  # .jsonl, .parquet or hub id with problem, answer, solution columns
    teacher: str = ""  # a second frozen model; empty: the student with LoRA off [paper]
    method: Literal["pw_opsd", "opsd", "eopd", "reopold"] = "pw_opsd"  # the objective [paper]
    schedule: tuple[float, float, float] | str = "moderate"  # w_min tau s, or its name [code]
    clip: float = 0.05  # upper bound of each vocabulary entry's term, nats; inf: none [code]
    weights: Literal["auto", "position", "uniform"] = "auto"  # auto: the method's own [code]
    reduction: Literal["auto", "sequence", "token"] = "auto"  # auto: the method's own [code]
    max_new_tokens: int = 1024  # rollout cap in tokens [code: launchers]
    max_length: int = 20000  # prompt + rollout; longer solutions are cut [code: launchers]
    # rollouts
    prompts_per_step: int = 32  # problems per update [code: 4 GPUs x 4 x 2]
    num_generations: int = 1  # rollouts per problem [code]
    temperature: float = 1.1  # of training rollouts and of both distributions [code]
    top_p: float = 0.95  # of training rollouts only, the divergence is over everything [code]
    top_k: int = 20  # of training rollouts only; 0 is off [code]
    student_thinking: bool = False  # enable_thinking in the student's chat template [code]
    teacher_thinking: bool = True  # enable_thinking in the teacher's chat template [code]
    sampler: Literal["auto", "vllm", "hf"] = "auto"  # vLLM where it is installed [ours]
    memory_fraction: float = 0.4  # of the GPU for vLLM while it is awake [code: Qwen]
    # optimisation
    lora_rank: int = 64  # 0 trains every weight, and needs --teacher [code]
    lora_alpha: int = 128  # LoRA scale is alpha / rank [code]
    learning_rate: float = 5e-6  # AdamW, no weight decay, no warm-up [code]
    max_grad_norm: float = 0.1  # global L2 clip [code]
    steps: int = 100  # updates; the checkpoint that the paper evaluates [code]
    decay_steps: int = 150  # the learning rate falls linearly to 0 over these [code]
    micro_batch: int = 4  # rollouts per forward pass; memory only [code]
    gradient_checkpointing: bool = False  # recompute activations; memory only [ours]
    # evaluation
    benchmark: str = ""  # known name, .jsonl or hub id; empty: no evaluation [ours]
    eval_n: int = 12  # samples per problem [code: val_n]
    eval_temperature: float = 1.0  # of evaluation samples [code]
    eval_top_p: float = 0.95  # of evaluation samples [code]
    eval_thinking: bool = True  # enable_thinking in evaluation [code]
    eval_max_new_tokens: int = 38912  # cap of evaluation samples [code]
    save_every: int = 25  # steps between checkpoints, each evaluated [code]
    # run
    run_dir: str = ""  # where the run is written; default runs/<names, seed, time> [ours]
    resume: str = ""  # directory of a run to continue, same arguments [ours]
    seed: int = 0  # of LoRA initialisation, problem order and sampling [ours]
    device: str = "auto"  # cuda where there is one, else cpu [ours]
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # bfloat16 on GPU, float32 on CPU [ours]


# ---- 2. Method -----------------------------------------------------------------------------------
BOXED = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
PROMPT = "Problem: {problem}" + BOXED  # [code: data_collator.py]
EVAL_PROMPT = "{problem}" + BOXED  # no "Problem:" there [code: evaluation]
TEACHER_PROMPT = (  # [code: data_collator.py], its doubled line breaks too
    "Problem: {problem}\n\nHere is a reference solution to this problem:\n"
    "=== Reference Solution Begin ===\n{solution}\n=== Reference Solution End ===\n\n\n"
    "After reading the reference solution above, make sure you truly understand the reasoning "
    "behind each step — do not copy or paraphrase it. Now, using your own words and independent "
    "reasoning, derive the same final answer to the problem above. Think step by step, explore "
    "different approaches, and don't be afraid to backtrack or reconsider if something doesn't "
    "work out:" + BOXED
)
SCHEDULES = {  # w_min, tau, s; mean weights
    "moderate": (0.25, 0.30, 0.10),  # 0.77 [code: README]
    "mild": (0.50, 0.20, 0.15),  # 0.88 [ours: "higher floor, softest transition"]
    "sharp": (0.10, 0.30, 0.05),  # 0.73 [ours: "lower floor, steeper"]
    "aggressive": (0.05, 0.50, 0.10),  # 0.52 [ours: "strongest early, latest transition"]
}


def student_prompt(problem: Problem) -> str:
    """What the student reads in training."""
    return common.fill(PROMPT, problem=problem.prompt)


def teacher_prompt(problem: Problem) -> str:
    """What the teacher reads: the problem with its reference solution."""
    return common.fill(TEACHER_PROMPT, problem=problem.prompt, solution=problem.solution)


def make_rollouts(
    sampler: Sampler, prompts: list[list[int]], seeds: list[int], **knobs: float
) -> list[Rollout]:
    """y ~ student(. | x), drawn from the truncated distribution."""
    return sampler.sample(prompts, seeds, **knobs)


def position_weights(lengths: Tensor, w_min: float, tau: float, s: float) -> Tensor:
    """w_min + (1 - w_min) sigmoid((f - tau) / s), f = (i - 0.5) / L [Eq. 5]: (B,) -> (B, max L).

    i = 1..L counts a row's own completion tokens; entries beyond a row's L are 0. Not normalised,
    that is `token_weights`' part. SCHEDULES has the published (w_min, tau, s).
    """
    index = torch.arange(int(lengths.max()), device=lengths.device)  # (T,), i - 1
    f = (index + 0.5) / lengths[:, None].clamp_min(1)  # (B, T)
    w = w_min + (1 - w_min) * torch.sigmoid((f - tau) / max(s, 1e-6))  # floor [code]
    return w * (index < lengths[:, None])


def token_weights(
    completion_mask: Tensor, *, num_tokens: int, num_rows: int, reduction: str,
    schedule: tuple[float, float, float],
) -> Tensor:  # fmt: skip
    """(B, T) bool -> (B, T): w / num_tokens ("token") or w / (L num_rows) ("sequence"), else 0;
    num_tokens and num_rows (of rollouts with L > 0) are the whole step's."""
    lengths = completion_mask.sum(1)  # (B,)
    w = position_weights(lengths, *schedule)  # (B, max L)
    w = w / num_tokens if reduction == "token" else w / (lengths[:, None].clamp_min(1) * num_rows)
    weights = torch.zeros(completion_mask.shape, device=w.device)  # (B, T)
    weights[completion_mask] = w[torch.arange(w.shape[1], device=w.device) < lengths[:, None]]
    return weights


def clipped_forward_kl(student_logprobs: Tensor, teacher_logprobs: Tensor, clip: float) -> Tensor:
    """sum_v min(q(v) [log q(v) - log p(v)], clip): (n, V), (n, V) -> (n,) nats.

    Each vocabulary entry is clamped from above before the sum [code: opsd_trainer.py], so a token's
    loss can be negative. A clamped entry pulls no more: where it is the teacher's own choice, the
    other entries push it down through the softmax (README: clip 0.05 in the tiny world).
    """
    terms = teacher_logprobs.exp() * (teacher_logprobs - student_logprobs)  # (n, V)
    return terms.clamp(max=clip).sum(-1)


def divergence(
    student_logprobs: Tensor, teacher_logprobs: Tensor, ids: Tensor, *, method: str, clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's loss, its forward KL, and whether the method's rule acts there: (n,) each."""
    pair = student_logprobs, teacher_logprobs
    with torch.no_grad():
        kl = common.forward_kl(*pair)
    if method == "eopd":
        gate = common.entropy(teacher_logprobs) > baselines.EOPD_ENTROPY
        return eopd_loss(*pair, ids), kl, gate
    if method == "reopold":
        reward = (teacher_logprobs - student_logprobs.detach()).gather(1, ids[:, None])[:, 0]
        return reopold_loss(*pair, ids), kl, reward < baselines.reopold_floor()
    loss = clipped_forward_kl(*pair, clip)
    return loss, kl, loss != kl  # the same sum, unless an entry was clamped


# ---- 3. Training ---------------------------------------------------------------------------------
def check(args: Args) -> None:
    """Stop on arguments that cannot mean anything, before anything is loaded."""
    common.check_ranges(args)
    if isinstance(args.schedule, str) and args.schedule not in SCHEDULES:
        raise common.Stop(f"--schedule {args.schedule}: use {', '.join(SCHEDULES)} or w_min tau s.")
    w_min, _, s = SCHEDULES.get(args.schedule, args.schedule)
    if not 0 <= w_min <= 1 or not s > 0:
        raise common.Stop(f"--schedule: w_min {w_min} must lie in [0, 1] and s {s} above 0.")
    if not args.clip > 0:
        raise common.Stop(f"--clip {args.clip} must be above 0; inf turns it off.")
    for flag in baselines.IGNORED[args.method] + ("schedule",) * (args.weights == "uniform"):
        if getattr(args, flag) != Args.__dataclass_fields__[flag].default:
            raise common.Stop(
                f"--{flag} does nothing with this --method and --weights: leave it out."
            )
    if not args.lora_rank and not args.teacher:
        raise common.Stop(
            "--lora-rank 0 changes the only copy of the model, which is also the fixed teacher: "
            f"hold a second copy in memory with --teacher {args.student}, or train LoRA."
        )
    if args.steps > args.decay_steps:
        raise common.Stop(f"--steps {args.steps} would end at a rate of 0: raise --decay-steps.")
    if args.temperature == 0:
        raise common.Stop("--temperature must be above 0: the divergence divides by it.")


def ablation_cell(args: Args) -> tuple[str, tuple[float, float, float]]:
    """(reduction, schedule); the baselines are token means of uniform weights, so of w_min = 1."""
    own = args.method == "pw_opsd"
    reduction = args.reduction.replace("auto", "sequence" if own else "token")
    uniform = not own or args.weights == "uniform"
    return reduction, (1, 0, 1) if uniform else SCHEDULES.get(args.schedule, args.schedule)


def main(args: Args) -> Path:
    """Train, evaluate and save; returns the run directory."""
    # -- Setup: run, data, models, optimizer, resume, sampler
    check(args)
    world = common.World(args.device)
    run = common.Run(args, __file__, world)
    problems = common.load_problems(args.problems)
    common.require_solutions(problems, args.problems)
    exam = Exam(
        args.benchmark, EVAL_PROMPT, args.eval_n, args.eval_max_new_tokens, args.eval_temperature,
        args.eval_top_p, args.eval_thinking, args.seed,
    )  # fmt: skip
    tokenizer = common.load_tokenizer(args.student)
    teacher_tokenizer = common.load_tokenizer(args.teacher or args.student)
    vocabulary = match_vocabularies(tokenizer, teacher_tokenizer)
    if vocabulary.aligned:
        raise common.Stop(f"--teacher {args.teacher} must have the student's own tokenizer.")
    torch.manual_seed(args.seed)
    student = common.load_student(
        args.student, args.lora_rank, args.lora_alpha, dtype=args.dtype, device=world.device,
        checkpointing=args.gradient_checkpointing,
    )  # fmt: skip
    teacher = student  # as_teacher: with LoRA off
    if args.teacher:
        teacher = common.load_model(args.teacher, dtype=args.dtype, device=world.device)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)  # [code]
    chat = partial(common.chat_prompt_ids, thinking=args.student_thinking)
    teacher_chat = partial(common.chat_prompt_ids, thinking=args.teacher_thinking)
    room = min(args.max_length, *map(common.context_of, (student, teacher))) - args.max_new_tokens
    problems, num_cut, num_left_out = common.fit_solutions(
        problems, teacher_prompt, teacher_tokenizer, room, thinking=args.teacher_thinking
    )
    used = common.problems_for_step(problems, 0, args.steps * args.prompts_per_step, args.seed)
    asked = [chat(tokenizer, student_prompt(problem)) for problem in used]
    max_len = max(
        common.context_needed(student, asked, args.max_new_tokens, "--max-new-tokens"),
        exam.context(student, tokenizer),
    )
    sampler = Sampler(
        args.student, student, tokenizer, backend=args.sampler, max_len=max_len,
        memory_fraction=args.memory_fraction, seed=args.seed,
    )  # fmt: skip
    objective = partial(divergence, method=args.method, clip=args.clip)
    reduction, schedule = ablation_cell(args)
    start = run.begin(student, optimizer)  # 0, or the step of the checkpoint to go on from
    if world.rank == 0:
        heard = teacher_chat(teacher_tokenizer, teacher_prompt(used[0]))
        common.print_setup(tokenizer, teacher_tokenizer, (asked[0], heard))
        print(f"{room} tokens of prompt: {num_cut} solutions cut, {num_left_out} problems left out")

    knobs = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    bar = tqdm(total=args.steps, initial=start, disable=world.rank > 0, desc=args.method)
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
        prompts = [teacher_chat(teacher_tokenizer, teacher_prompt(todo[n])) for n, _ in jobs]
        views = teacher_rollouts(rollouts, prompts, vocabulary, teacher_tokenizer)

        # -- Score and learn: the normalisers are the whole step's, so micro_batch is memory only
        kept = [torch.ones(sum(r.supervised)) for r in rollouts]  # 0 on what REOPOLD leaves out
        if not any(world.sum(sum(map(len, kept)))):
            raise common.Stop(f"step {step}: the rollouts hold no token that can be supervised.")
        totals = np.zeros(6)  # loss, token loss, kl, rule, log-prob gap, scored tokens: all sums
        with common.timed(times, "time/train_s"):
            if args.method == "reopold":
                kept = baselines.reopold_choose(
                    student, teacher, rollouts, views, world, vocab_size=vocabulary.size,
                    temperature=args.temperature, micro_batch=args.micro_batch,
                    second_phase=step >= args.steps // 2,  # 50 of 100 [code]
                )  # fmt: skip
            num_tokens, num_rows = world.sum(
                sum(k.sum().item() for k in kept), sum(len(k) > 0 for k in kept)
            )
            for i in range(0, len(rollouts), args.micro_batch):
                part = slice(i, i + args.micro_batch)
                batch, view, student_hidden, teacher_hidden = common.both_sides(
                    student, teacher, rollouts[part], views[part], world.device
                )  # hidden: (N, D)
                if step == start and i == 0:
                    sides = {"student": (student, batch), "teacher": (teacher, view)}
                    clipped = partial(clipped_forward_kl, clip=args.clip)
                    common.check_first_batch(sides, rollouts[part], clipped)
                student_head = common.head_of(student, vocabulary.size)
                teacher_head = common.head_of(teacher, vocabulary.size)
                mask, ids = batch.completion_mask, batch.input_ids[batch.completion_mask]  # (N,)
                weights = token_weights(
                    mask, num_tokens=max(1, num_tokens), num_rows=num_rows, reduction=reduction,
                    schedule=schedule,
                )[mask] * torch.cat(kept[part]).to(world.device)  # fmt: skip  # (N,)
                token_loss, kl, rule = common.chunked_divergence(
                    objective, student_hidden, student_head, teacher_hidden, teacher_head,
                    weights=weights, rows=(ids,), temperature=args.temperature,
                )  # fmt: skip  # (N,) nats
                loss = (weights * token_loss).sum()
                loss.backward()
                head = common.head_of(student)
                gap = common.logprob_gap(student_hidden, head, ids, rollouts[part])
                sums = loss, token_loss.sum(), kl.sum(), rule.sum(), gap.sum()
                totals += [*(x.item() for x in sums), len(kl)]
        loss_sum, token_loss_sum, kl_sum, rule_sum, gap_sum, num_scored, *counts = world.sum(
            *totals,
            sum(len(r.completion_ids) for r in rollouts),
            sum(r.finish_reason == "stop" for r in rollouts),
            len(rollouts),
            run.interrupted,
        )
        num_sampled, num_stopped, num_rollouts, interrupted = counts

        # -- Update
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * (1 - step / args.decay_steps)  # linear to 0 [code]
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
            "kl/trained": token_loss_sum / num_scored,
            "rule_frac": rule_sum / num_scored,
            "grad_norm": grad_norm,
            "lr": optimizer.param_groups[0]["lr"],
            "tokens/supervised": num_tokens,
            "tokens/sampled": num_sampled,
            "rollout/len_mean": num_sampled / num_rollouts,
            "rollout/stop_frac": num_stopped / num_rollouts,
            "rollout/logprob_gap": gap_sum / num_scored,
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
