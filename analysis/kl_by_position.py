"""Divergence of a student from its teacher by token position, before and after training.

Both students write their own rollouts on the same problems with the same seeds; each bin averages
the tokens that fall into it. With --teacher it is the reverse KL by absolute position [2605.27028
Sec. 5: late positions fall untrained]. Without, the student with its LoRA off and the solution in
its prompt teaches, as in pw_opsd.py: forward KL, what the clip leaves of it, and that times the
schedule's weight, by relative position, with the share of clamped tokens.

    python analysis/kl_by_position.py --student tiny/student --teacher tiny/teacher \
        --adapter runs/X/checkpoints/step_000060 --problems tiny/test.jsonl --out kl.json
    python analysis/kl_by_position.py --student tiny/student --clip 1 \
        --adapter runs/Y/checkpoints/step_000060 --problems tiny/test.jsonl --out kl.json
"""

import itertools
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import peft
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import esr
import pw_opsd
from align import match_vocabularies, teacher_rollouts
from sampler import Sampler


@dataclass
class Args:
    student: str  # the untrained model
    adapter: str  # checkpoint of the trained student
    problems: str  # .jsonl, .parquet or hub id
    out: str  # JSON file to write
    teacher: str = ""  # a frozen model; empty: the untrained student with the solution [ours]
    count: int = 32  # problems, the first of the file [ours]
    max_new_tokens: int = 64  # rollout length, beyond the trained window [ours]
    edges: tuple[int, ...] = (0, 8, 16, 32, 64)  # bins of positions, with --teacher [ours]
    bins: int = 5  # equal bins of relative position, without --teacher [ours]
    clip: float = 0.05  # pw_opsd's, without --teacher [2605.21606 code]
    schedule: tuple[float, float, float] = (0.25, 0.3, 0.1)  # likewise [2605.21606 code]
    temperature: float = (
        0.0  # of sampling, and of pw_opsd's divergence; 0: 0.7, pw_opsd 1.1 [papers]
    )
    seed: int = 0  # of sampling [ours]
    sampler: Literal["auto", "vllm", "hf"] = "hf"  # [ours]
    device: str = "auto"  # [ours]
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # [ours]


@torch.no_grad()
def measure(student: Any, teacher: Any, tokenizers: tuple, problems: list, args: Args) -> dict:
    """Along the student's own rollouts: position "at", relative position "f", "kl" in nats and, for
    pw_opsd, "clipped", "weighted" and "clamped" (0 or 1); (N,) each."""
    tokenizer, teacher_tokenizer = tokenizers
    method, privileged = (pw_opsd, True) if not args.teacher else (esr, False)
    knobs = {"temperature": args.temperature or 0.7}
    if privileged:
        knobs = {"temperature": args.temperature or 1.1, "top_p": 0.95, "top_k": 20}
    vocabulary = match_vocabularies(tokenizer, teacher_tokenizer)
    ask, teach = (partial(common.chat_prompt_ids, t) for t in tokenizers)
    prompts = [ask(method.student_prompt(p)) for p in problems]
    teacher_prompts = [teach(method.teacher_prompt(p), thinking=privileged) for p in problems]
    sampler = Sampler(
        args.student, student, tokenizer, backend=args.sampler, memory_fraction=0.4, seed=args.seed,
        max_len=max(map(len, prompts)) + args.max_new_tokens,
    )  # fmt: skip
    seeds = [common.request_seed(args.seed, "position", n) for n in range(len(prompts))]
    with sampler.awake():
        sampler.sync()
        rollouts = sampler.sample(prompts, seeds, max_new_tokens=args.max_new_tokens, **knobs)
    views = teacher_rollouts(rollouts, teacher_prompts, vocabulary, teacher_tokenizer)
    objective = partial(pw_opsd.divergence, method="pw_opsd", clip=args.clip)
    rows: list[dict] = []
    for rollout, view in zip(rollouts, views, strict=True):
        batch, _, student_hidden, teacher_hidden = common.both_sides(
            student, teacher, [rollout], [view], args.device
        )
        values = common.chunked_divergence(
            objective if privileged else common.reverse_kl,
            student_hidden, common.head_of(student, vocabulary.student_ids),
            teacher_hidden, common.head_of(teacher, vocabulary.teacher_ids),
            rows=(batch.input_ids[batch.completion_mask],) if privileged else (),
            temperature=knobs["temperature"] if privileged else 1.0,
        )  # fmt: skip
        length = sum(rollout.supervised)
        at = np.flatnonzero(rollout.supervised)
        row = {"at": at, "f": (at + 0.5) / length}
        if privileged:
            clipped, kl, clamped = (v.float().cpu().numpy() for v in values)
            weights = pw_opsd.position_weights(torch.tensor([length]), *args.schedule)[0].numpy()
            row |= {"kl": kl, "clipped": clipped, "weighted": weights * clipped}
            rows.append(row | {"clamped": clamped})
        else:
            rows.append(row | {"kl": values.cpu().numpy()})
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def main(args: Args) -> None:
    """Measure both students, print the table and write args.out."""
    args.device = common.World(args.device).device
    problems = common.load_problems(args.problems)[: args.count]
    tokenizers = tuple(
        common.load_tokenizer(n) for n in (args.student, args.teacher or args.student)
    )
    if not args.teacher:
        common.require_solutions(problems, args.problems)
    load = partial(common.load_model, dtype=args.dtype, device=args.device)
    student = load(args.student)
    teacher = load(args.teacher) if args.teacher else student
    before = measure(student, teacher, tokenizers, problems, args)
    dtype = student.compute_dtype
    student = peft.PeftModel.from_pretrained(student, args.adapter)
    student.compute_dtype = dtype
    teacher = teacher if args.teacher else student  # as_teacher: LoRA off
    after = measure(student, teacher, tokenizers, problems, args)
    place, edges = ("at", args.edges) if args.teacher else ("f", np.linspace(0, 1, args.bins + 1))
    result = {"args": vars(args) | {}, **common.environment(), "bins": []}
    names = [name for name in before if name not in ("at", "f")]
    print("bin          " + "".join(f"{name + ' before':>16}{'after':>10}" for name in names))
    for low, high in itertools.pairwise(edges):
        row: dict[str, Any] = {"from": float(low), "to": float(high)}
        for when, values in (("before", before), ("after", after)):
            inside = (values[place] >= low) & (values[place] < high)
            row[f"tokens {when}"] = int(inside.sum())
            for name in names:
                row[f"{name} {when}"] = float(values[name][inside].mean()) if inside.any() else None
        result["bins"].append(row)
        cells = [row[f"{n} {w}"] for n in names for w in ("before", "after")]
        cells = [
            f"{'-' if v is None else f'{v:.4f}':>{10 if n % 2 else 16}}"
            for n, v in enumerate(cells)
        ]
        print(f"{low:<5.4g}-{high:>6.4g} " + "".join(cells))
    Path(args.out).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
