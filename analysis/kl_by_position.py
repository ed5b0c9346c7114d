"""Per-position reverse KL of a student to its teacher, before and after training.

Both students write their own rollouts on the same problems with the same seeds; position t is
averaged over the rollouts that reach it [2605.27028 Sec. 5: late positions fall untrained].

    python analysis/kl_by_position.py --student tiny/student --teacher tiny/teacher \
        --adapter runs/X/checkpoints/step_000060 --problems tiny/test.jsonl --out kl.json
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import peft
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from align import match_vocabularies, teacher_rollouts
from eval import PROMPT
from sampler import Sampler


@dataclass
class Args:
    student: str  # the untrained model
    teacher: str  # the frozen model
    adapter: str  # checkpoint of the trained student
    problems: str  # .jsonl, .parquet or hub id
    out: str  # JSON file to write
    count: int = 32  # problems, the first of the file [ours]
    max_new_tokens: int = 64  # rollout length, beyond the trained window [ours]
    edges: tuple[int, ...] = (0, 8, 16, 32, 64)  # bins of token positions [ours]
    temperature: float = 0.7  # of sampling [paper]
    seed: int = 0  # of sampling [ours]
    sampler: Literal["auto", "vllm", "hf"] = "hf"  # [ours]
    device: str = "auto"  # [ours]
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # [ours]


def positions(rollouts: list[common.Rollout]) -> np.ndarray:
    """(N,) index of each supervised token in its completion, in the order of a batch's rows."""
    rows = [np.flatnonzero(r.supervised) for r in rollouts]
    return np.concatenate(rows)


@torch.no_grad()
def measure(student, teacher, tokenizers, problems, args: Args) -> tuple[np.ndarray, np.ndarray]:
    """(N,) token positions and (N,) reverse KL in nats along the student's own rollouts."""
    tokenizer, teacher_tokenizer = tokenizers
    vocabulary = match_vocabularies(tokenizer, teacher_tokenizer)
    texts = [PROMPT.replace("{problem}", p.prompt) for p in problems]
    prompts, teacher_prompts = (
        list(map(partial(common.chat_prompt_ids, t), texts)) for t in tokenizers
    )
    sampler = Sampler(
        args.student, student, tokenizer, backend=args.sampler, memory_fraction=0.4, seed=args.seed,
        max_len=max(map(len, prompts)) + args.max_new_tokens,
    )  # fmt: skip
    seeds = [common.request_seed(args.seed, "position", n) for n in range(len(prompts))]
    with sampler.awake():
        sampler.sync()
        rollouts = sampler.sample(
            prompts, seeds, max_new_tokens=args.max_new_tokens, temperature=args.temperature
        )
    views = teacher_rollouts(rollouts, teacher_prompts, vocabulary, teacher_tokenizer)
    values = []
    for rollout, view in zip(rollouts, views, strict=True):
        batch = common.collate([rollout], args.device)
        teacher_batch = common.collate([view], args.device)
        values.append(
            common.chunked_divergence(
                common.reverse_kl,
                common.completion_hidden(student, batch),
                common.head_of(student, vocabulary.student_ids),
                common.completion_hidden(teacher, teacher_batch),
                common.head_of(teacher, vocabulary.teacher_ids),
            ).cpu()
        )
    return positions(rollouts), torch.cat(values).numpy()


def main(args: Args) -> None:
    """Measure both students, print the table and write args.out."""
    args.device = common.World(args.device).device
    problems = common.load_problems(args.problems)[: args.count]
    tokenizers = common.load_tokenizer(args.student), common.load_tokenizer(args.teacher)
    teacher = common.load_model(args.teacher, dtype=args.dtype, device=args.device)
    student = common.load_model(args.student, dtype=args.dtype, device=args.device)
    result = {"args": vars(args) | {}, **common.environment(), "bins": []}
    before = measure(student, teacher, tokenizers, problems, args)
    dtype = student.compute_dtype
    student = peft.PeftModel.from_pretrained(student, args.adapter)
    student.compute_dtype = dtype
    after = measure(student, teacher, tokenizers, problems, args)
    print("positions    KL before (tokens)    KL after (tokens)    change")
    for low, high in zip(args.edges, args.edges[1:], strict=False):
        cells = [kl[(at >= low) & (at < high)] for at, kl in (before, after)]
        a, b = (float(c.mean()) if len(c) else float("nan") for c in cells)
        print(f"{low:>4}-{high - 1:<5} {a:10.4f} ({len(cells[0])}) {b:14.4f} ({len(cells[1])}) "
              f"{b / a - 1:12.0%}")  # fmt: skip
        row = {"from": low, "to": high, "before": a, "after": b}
        result["bins"].append(row | {"tokens": [len(c) for c in cells]})
    Path(args.out).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
