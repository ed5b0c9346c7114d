r"""Scores a model on math benchmarks: avg@n, pass@k, maj@n, lengths; tests one run against another.

Every problem is sampled n times per seed. The last \boxed{...} of a completion is its answer, and
math-verify compares it with the reference, as the code of 2605.21606 does. The table gives mean and
sample std (ddof 1) over seeds and a 95 % bootstrap interval over problems; --against adds the
difference to an earlier result file, problems paired: an interval that holds 0 separates nothing.

    python eval.py --model Qwen/Qwen3-1.7B --adapter runs/X/checkpoints/step_000200 \
        --benchmark math500 aime24 --n 4 --seeds 0 1 2          # 1 GPU
    python eval.py --model tiny/student --benchmark tiny/test.jsonl \
        --max-new-tokens 128 --seeds 0 --sampler hf             # laptop CPU, a minute

Benchmarks: a short name of `KNOWN`, its hub id, or a local .jsonl or .parquet file with problem and
answer columns. The training scripts import `evaluate` and `load_benchmark`.
"""

import hashlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import peft
import tyro
from torch import nn

import common
from common import Problem, Stop
from sampler import Sampler


# ---- 1. Arguments --------------------------------------------------------------------------------
@dataclass
class Args:
    # what is scored
    model: str  # local directory or hub id
    benchmark: tuple[str, ...]  # known names, hub ids of them, .jsonl or .parquet files
    adapter: str = ""  # PEFT directory on top of the model; empty: the model itself [ours]
    limit: int = 0  # first K problems of each benchmark; 0: all [ours]
    against: str = ""  # result file of another model to compare with [ours]
    # sampling
    n: int = 4  # samples per problem and seed [2605.27028 Sec. 4.1]
    temperature: float = 0.7  # 0 is greedy [2605.27028 Sec. 4.1]
    top_p: float = 1.0  # 1 is off [ours]
    top_k: int = 0  # 0 is off [ours]
    max_new_tokens: int = 2048  # cap in tokens [ours: 2605.27028's 90th percentile is 1,800]
    thinking: bool = False  # enable_thinking in the chat template [ours]
    prompt: str = "esr"  # the script that trained: esr or pw_opsd; or a text with {problem} [ours]
    seeds: tuple[int, ...] = (0, 1, 2)  # one whole evaluation each [2605.21606 code: three seeds]
    # run
    sampler: Literal["auto", "vllm", "hf"] = "auto"  # vLLM where it is installed [ours]
    memory_fraction: float = 0.4  # of the GPU for vLLM while it is awake [ours]
    out: str = ""  # result file; default evals/<model>__<benchmarks>__<time>.json [ours]
    device: str = "auto"  # cuda where there is one, else cpu [ours]
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # bfloat16 on GPU, float32 on CPU [ours]


# ---- 2. Benchmarks -------------------------------------------------------------------------------
# common.load_problems knows the columns of all but two: problem (MATH-500, AIME, HMMT, BeyondAIME)
# or question (AMC, Minerva, GSM8K), and answer. From public code that reads these sets, not run.
KNOWN: dict[str, tuple[str, str]] = {
    "math500": ("HuggingFaceH4/MATH-500", "test"),  # 500
    "aime24": ("HuggingFaceH4/aime_2024", "train"),  # 30; the set has no other split
    "aime25": ("yentinglin/aime_2025", "train"),  # 30; no other split
    "hmmt25": ("MathArena/hmmt_feb_2025", "train"),  # 30; PW-OPSD has a local copy of it
    "amc23": ("math-ai/amc23", "test"),  # 40
    "minerva": ("math-ai/minervamath", "test"),  # 272
    "olympiad": ("math-ai/olympiadbench", "test"),  # 674
    "beyondaime": ("ByteDance-Seed/BeyondAIME", "test"),  # 100
    "amobench": ("meituan-longcat/AMO-Bench", "test"),  # 50, of which 39 graded by rule
    "gsm8k": ("openai/gsm8k", "test"),  # 1,319
}
CONFIGS = {"gsm8k": "main"}


def olympiad_problem(row: dict) -> Problem:
    """OlympiadBench: final_answer and solution are lists; a context, if any, comes first."""
    prompt = "\n".join(text for text in (row.get("context"), row["question"]) if text)
    answer = ", ".join(str(a).strip(" $") for a in row["final_answer"] or [])
    return Problem(str(row.get("id", "")), prompt, answer, "\n".join(row.get("solution") or []))


def amobench_problem(row: dict) -> Problem | None:
    """AMO-Bench: the answer may be boxed; the 11 descriptions need a judge and are left out."""
    if row["answer_type"] == "description":
        return None
    answer = common.extract_answer(str(row["answer"])) or str(row["answer"])
    return Problem(str(row["question_id"]), row["prompt"], answer, row.get("solution"))


READERS = {"olympiad": olympiad_problem, "amobench": amobench_problem}  # sets with own columns
LOCAL = (".jsonl", ".parquet")


def load_benchmark(name: str) -> list[Problem]:
    """Problems of a known short name, of its hub id, or of a local .jsonl or .parquet file.

    Stops on any other name, on unreadable data, and on problems without an answer.
    """
    short = short_name(name)
    if name.endswith(LOCAL):
        problems = common.load_problems(name)
    elif short not in KNOWN:
        raise Stop(
            f"unknown benchmark {name!r}: give one of {', '.join(KNOWN)}, the hub id of one of "
            "them, or a local .jsonl or .parquet file."
        )
    elif short in READERS:
        problems = [p for row in hub_rows(*KNOWN[short]) if (p := READERS[short](row))]
    else:
        problems = common.load_problems(*KNOWN[short], config=CONFIGS.get(short))
    unanswered = [p.id for p in problems if p.answer in ("", "None")]  # "None": no answer column
    if unanswered:
        raise Stop(f"{name}: problem {unanswered[0]} has no answer, so it cannot be graded.")
    return problems


def short_name(name: str) -> str:
    """The key of KNOWN for a short name or hub id; the file name of a local file."""
    by_id = {hub: short for short, (hub, _) in KNOWN.items()}
    return Path(name).name if name.endswith(LOCAL) else by_id.get(name, name)


def hub_rows(hub: str, split: str) -> list[dict]:
    """Rows of a hub dataset whose columns common.load_problems does not know."""
    import datasets

    try:
        return list(datasets.load_dataset(hub, split=split))
    except (OSError, ValueError, RuntimeError) as error:
        raise Stop(f"cannot read the dataset {hub!r} ({common.last_line(error)}).") from error


# ---- 3. Prompt and grading: what another kind of benchmark replaces ------------------------------
PROMPT = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."
PROMPTS = {"esr": PROMPT, "pw_opsd": PROMPT.replace("\n", "\n\n")}  # of the training scripts


def math_prompt(problem: Problem, template: str = PROMPT) -> str:
    """The user turn; `template` has {problem} where the problem goes."""
    return template.replace("{problem}", problem.prompt)


def grade(problem: Problem, completion: str) -> tuple[str | None, bool]:
    """(last boxed answer or None, whether it equals the reference)."""
    answer = common.extract_answer(completion)
    return answer, answer is not None and same_answer(problem.answer, answer)


@lru_cache(maxsize=2**16)
def same_answer(a: str, b: str) -> bool:
    """common.same_answer, which is symmetric; samples repeat the same few strings, so cached."""
    return common.same_answer(a, b)


# ---- 4. Metrics ----------------------------------------------------------------------------------
def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased P(at least one of k is right) from c right of n: 1 - C(n-c, k) / C(n, k).

    Source: 2107.03374 Eq. 1; k = n is "any". Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority_correct(answers: list[str | None], correct: list[bool]) -> bool:
    """Whether the majority answer of one problem is right; both lists in sample order.

    Greedy clusters: an answer joins the first cluster whose first member is the same answer. All
    samples without an answer form one cluster, which votes, and is wrong if it wins. Ties go to the
    cluster that came first. The winner's first member is graded [2605.21606 code: maj@12].
    """
    clusters: list[list[int]] = []
    for i, answer in enumerate(answers):
        for cluster in clusters:
            first = answers[cluster[0]]
            both = answer is not None and first is not None
            if same_answer(first, answer) if both else answer is first:
                cluster.append(i)
                break
        else:
            clusters.append([i])
    winner = max(clusters, key=len)[0]  # max keeps the earliest of equals
    return answers[winner] is not None and correct[winner]


def score_problem(rows: list[dict]) -> dict[str, float]:
    """Scores of one problem from its n sample rows; fractions in [0, 1], len_mean in tokens."""
    n, num_correct = len(rows), sum(row["correct"] for row in rows)
    ks = sorted({2**i for i in range(n.bit_length())} | {n})
    answers, correct = [row["answer"] for row in rows], [row["correct"] for row in rows]
    return {
        f"avg@{n}": num_correct / n,
        **{f"pass@{k}": pass_at_k(n, num_correct, k) for k in ks},
        f"maj@{n}": float(majority_correct(answers, correct)),
        "len_mean": sum(row["tokens"] for row in rows) / n,
        "stop_frac": sum(row["finish_reason"] == "stop" for row in rows) / n,
        "truncated_frac": sum(row["finish_reason"] == "length" for row in rows) / n,
        "boxed_frac": sum(row["answer"] is not None for row in rows) / n,
    }


def score_problems(samples: list[dict], n: int) -> dict[str, np.ndarray]:
    """Metric name -> (problems,) float64, from sample rows in problem order, n for each."""
    scores = [score_problem(samples[i : i + n]) for i in range(0, len(samples), n)]
    return {name: np.array([score[name] for score in scores]) for name in scores[0]}


def bootstrap_interval(
    scores: np.ndarray, seed: int = 0, resamples: int = 10_000
) -> tuple[float, float]:
    """95 % percentile interval of the mean of (problems,) scores, problems resampled."""
    rng = np.random.default_rng(seed)
    picked = rng.integers(len(scores), size=(resamples, len(scores)), dtype=np.int32)
    low, high = np.percentile(scores[picked].mean(1), [2.5, 97.5])
    return float(low), float(high)


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, seed: int = 0, resamples: int = 10_000
) -> tuple[float, float, float]:
    """(mean of a - b, low, high): 95 % interval, the same problems drawn for both.

    a and b are (problems,) means over samples. Raises ValueError when their shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"paired scores must have one shape, got {a.shape} and {b.shape}")
    return float((a - b).mean()), *bootstrap_interval(a - b, seed, resamples)


# ---- 5. Evaluation -------------------------------------------------------------------------------
def evaluate(
    sampler: Any, tokenizer: Any, problems: list[Problem], *, n: int, max_new_tokens: int,
    temperature: float, top_p: float, seed: int, top_k: int = 0, thinking: bool = False,
    world: common.World | None = None, prompt: str = PROMPT,
) -> tuple[dict[str, float], list[dict]]:  # fmt: skip
    """Sample every problem n times and score: (metrics, one row per completion, problem order).

    Metrics are means over problems, see `score_problem`, and `problems`, their number. With a
    `world`, each rank samples a share and all ranks return the same. A problem's seeds depend on
    its place in `problems`, not on ranks. The sampler must be awake and hold the student's weights.
    """
    if n < 1 or not problems:
        raise Stop("an evaluation needs at least one problem and one sample of each.")
    rank, size = (world.rank, world.size) if world else (0, 1)
    jobs = [(i, s) for i in range(rank, len(problems), size) for s in range(n)]
    prompts = {
        i: common.chat_prompt_ids(tokenizer, math_prompt(problems[i], prompt), thinking=thinking)
        for i in range(rank, len(problems), size)
    }
    rollouts = sampler.sample(
        [prompts[i] for i, _ in jobs],
        [common.request_seed(seed, "eval", i, s) for i, s in jobs],
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
    ) if jobs else []  # fmt: skip
    rows = []
    for (i, s), rollout in zip(jobs, rollouts, strict=True):
        text = tokenizer.decode(rollout.completion_ids, skip_special_tokens=True)
        answer, correct = grade(problems[i], text)
        row = {"problem_id": problems[i].id, "sample": s, "completion": text, "answer": answer}
        row |= {"correct": correct, "tokens": len(rollout.completion_ids)}
        rows.append((i, s, row | {"finish_reason": rollout.finish_reason}))
    rows = world.gather(rows) if world else rows
    samples = [row for _, _, row in sorted(rows, key=lambda item: item[:2])]
    metrics = {name: float(s.mean()) for name, s in score_problems(samples, n).items()}
    return metrics | {"problems": len(problems)}, samples


@dataclass
class Exam:
    """A benchmark as a training script sits it: untrained, at each checkpoint and at the end."""

    benchmark: str  # what load_benchmark takes; empty: there is no evaluation
    template: str  # prompt with a {problem}
    n: int  # samples per problem
    max_new_tokens: int
    temperature: float
    top_p: float
    thinking: bool
    seed: int

    def __post_init__(self) -> None:
        self.problems = load_benchmark(self.benchmark) if self.benchmark else []

    def context(self, model: nn.Module, tokenizer: Any) -> int:
        """Tokens of its longest prompt and completion; stops when the model has fewer."""
        return common.context_needed(
            model, tokenizer, [math_prompt(p, self.template) for p in self.problems],
            self.max_new_tokens if self.problems else 0, "--eval-max-new-tokens",
            thinking=self.thinking,
        )  # fmt: skip

    def sit(self, step: int, run: common.Run, sampler: Sampler, tokenizer: Any) -> None:
        """Evaluate and log; does nothing where a resumed run has logged this step already."""
        if not self.problems or step in {row["step"] for row in run.read("eval")}:
            return
        if run.world.rank == 0:
            print(f"\nevaluating {len(self.problems)} problems x {self.n} samples", flush=True)
        metrics, samples = evaluate(
            sampler, tokenizer, self.problems, n=self.n, max_new_tokens=self.max_new_tokens,
            temperature=self.temperature, top_p=self.top_p, seed=self.seed,
            thinking=self.thinking, world=run.world, prompt=self.template,
        )  # fmt: skip
        run.log_evaluation(step, self.benchmark, metrics, samples)


# ---- 6. Command line -----------------------------------------------------------------------------
def check(args: Args) -> None:
    """Stop on arguments that cannot work, before anything is loaded."""
    at_least = {"n": 1, "max_new_tokens": 1, "temperature": 0, "top_k": 0, "limit": 0}
    for name, least in at_least.items():
        if getattr(args, name) < least:
            raise Stop(f"--{name.replace('_', '-')} must be at least {least}.")
    if not 0 < args.top_p <= 1:
        raise Stop("--top-p must be above 0 and at most 1.")
    if "{problem}" not in PROMPTS.get(args.prompt, args.prompt):
        raise Stop(f"--prompt {args.prompt}: give {', '.join(PROMPTS)} or a text with {{problem}}.")
    names = [short_name(name) for name in args.benchmark]
    for flag, values in (("--benchmark", names), ("--seeds", args.seeds)):
        if not values or len(set(values)) < len(values):
            raise Stop(f"{flag} needs at least one value, and none twice.")
    if Path(args.model, "adapter_config.json").exists():
        raise Stop(f"{args.model} is an adapter: give its base with --model and it with --adapter.")
    if args.temperature == 0 and (args.n > 1 or len(args.seeds) > 1):
        print("warning: temperature 0 makes all samples and seeds of a problem identical.")


def output_paths(args: Args, benchmarks: list[str]) -> tuple[Path, Path]:
    """(result file, samples file); stops when either is there already."""
    names = "+".join(Path(name).stem for name in benchmarks)
    model = Path(args.adapter or args.model).resolve().name
    stamp = time.strftime("%Y%m%d-%H%M%S")
    out = Path(args.out or f"evals/{model}__{names}__{stamp}.json")
    samples = out.with_suffix(".samples.jsonl")
    for path in (out, samples):
        if path.exists():
            raise Stop(f"{path} exists already; choose another --out.")
    return out, samples


def load_evaluated(args: Args, device: str) -> nn.Module:
    """The model, under its adapter if there is one; stops when the two do not fit."""
    model = common.load_model(args.model, dtype=args.dtype, device=device)
    if not args.adapter:
        return model
    config = Path(args.adapter, "adapter_config.json")
    if not config.exists():
        raise Stop(f"--adapter {args.adapter}: there is no adapter_config.json in it.")
    try:
        base = json.loads(config.read_text()).get("base_model_name_or_path")
        if base and Path(base).resolve() != Path(args.model).resolve():
            print(f"warning: the adapter was trained on {base!r}, not on {args.model!r}.")
        adapted = peft.PeftModel.from_pretrained(model, args.adapter)
        saved = set(peft.load_peft_weights(args.adapter, device="cpu"))
    except (RuntimeError, ValueError, OSError, KeyError, TypeError) as error:
        raise Stop(
            f"the adapter {args.adapter} does not fit {args.model} ({common.last_line(error)})."
        ) from error
    adapted.peft_config["default"].base_model_name_or_path = args.model  # peft looks it up, to save
    if saved != set(peft.get_peft_model_state_dict(adapted)):  # peft only warns of missing layers
        raise Stop(f"the adapter {args.adapter} has other layers than {args.model}.")
    adapted.compute_dtype = model.compute_dtype
    return adapted.eval()


def fingerprint(problems: list[Problem]) -> str:
    """SHA-256 of ids, texts and answers: two files may both number their problems 0, 1, ..."""
    rows = [(p.id, p.prompt, p.answer) for p in problems]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def load_other(path: str, knobs: dict, problems: dict[str, list[Problem]]) -> dict[str, dict]:
    """Results of the file to compare with; stops unless problems and sampling are the same."""
    try:
        other = json.loads(Path(path).read_text())
        results, other_knobs = other["results"], other["knobs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Stop(f"--against {path}: not a result file of eval.py.") from error
    if set(results) != set(problems):
        raise Stop(f"--against {path} scored {sorted(results)}, this run {sorted(problems)}.")
    changed = [f"{k} {other_knobs.get(k)!r} there, {v!r} here" for k, v in knobs.items()
               if other_knobs.get(k) != v]  # fmt: skip
    if changed:
        raise Stop(f"--against {path} was sampled differently: {'; '.join(changed)}.")
    for name, rows in problems.items():
        if results[name]["problems_sha256"] != fingerprint(rows):
            raise Stop(f"--against {path} scored other problems of {name}; same --limit?")
    return results


def table(name: str, result: dict, other: dict | None) -> str:
    """Lines of one benchmark: mean and std over seeds, intervals over problems."""
    seeds, per_problem = list(result["per_seed"].values()), result["per_problem"]
    head = f"{'metric':16}{'mean':>9}{'std':>9}{'95 % interval':>20}"
    head += f"{'other':>9}{'diff':>9}{'95 % interval':>20}" if other else ""
    lines = [f"\n{name}: {len(result['problem_ids'])} problems, {len(seeds)} seeds", head]
    for metric, scores in per_problem.items():
        places = 1 if metric == "len_mean" else 4
        values, scores = [seed[metric] for seed in seeds], np.array(scores)
        std = f"{np.std(values, ddof=1):.{places}f}" if len(values) > 1 else "-"
        low, high = bootstrap_interval(scores)
        cells = [f"{np.mean(values):>9.{places}f}{std:>9}"]
        cells.append(f"{f'[{low:.{places}f}, {high:.{places}f}]':>20}")
        if other:
            others = np.array(other["per_problem"][metric])
            diff, low, high = paired_bootstrap(scores, others)
            cells.append(f"{others.mean():>9.{places}f}{diff:>+9.{places}f}")
            cells.append(f"{f'[{low:+.{places}f}, {high:+.{places}f}]':>20}")
        lines.append(f"{metric:16}" + "".join(cells))
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Write a whole file or none: a part file takes the name when it is complete."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text)
        os.replace(part, path)
    except OSError as error:
        raise Stop(f"could not write {path} ({error}); choose another --out.") from error


def main(args: Args) -> Path:
    """Sample, score, write and print; returns the path of the result file."""
    # -- Setup
    check(args)
    start, world = time.time(), common.World(args.device)
    problems = {short_name(b): load_benchmark(b)[: args.limit or None] for b in args.benchmark}
    out, samples_out = output_paths(args, list(problems))
    names = ("n", "temperature", "top_p", "top_k", "max_new_tokens", "thinking")
    knobs = {name: getattr(args, name) for name in names}
    knobs["prompt"] = PROMPTS.get(args.prompt, args.prompt)
    others = load_other(args.against, knobs, problems) if args.against else {}
    tokenizer = common.load_tokenizer(args.model)
    model = load_evaluated(args, world.device)
    max_len = common.context_needed(
        model, tokenizer,
        [math_prompt(p, knobs["prompt"]) for rows in problems.values() for p in rows],
        args.max_new_tokens, "--max-new-tokens", thinking=args.thinking,
    )  # fmt: skip
    sampler = Sampler(
        args.model, model, tokenizer, backend=args.sampler, max_len=max_len,
        memory_fraction=args.memory_fraction, seed=args.seeds[0],
    )  # fmt: skip

    # -- Sample and score
    results, lines = {}, []
    with sampler.awake():
        sampler.sync()
        for name, rows in problems.items():
            per_seed, per_problem = {}, []
            for seed in args.seeds:
                metrics, samples = evaluate(
                    sampler, tokenizer, rows, seed=seed, world=world, **knobs
                )
                per_seed[str(seed)] = metrics
                per_problem.append(score_problems(samples, args.n))
                lines += [{"benchmark": name, "seed": seed, **sample} for sample in samples]
            means = {m: np.mean([p[m] for p in per_problem], 0).tolist() for m in per_problem[0]}
            results[name] = {"problem_ids": [p.id for p in rows], "per_seed": per_seed}
            results[name] |= {"problems_sha256": fingerprint(rows), "per_problem": means}

    # -- Write and print
    if world.rank == 0:
        record = {"model": args.model, "adapter": args.adapter or None, "argv": sys.argv}
        record |= {"knobs": knobs, "seeds": args.seeds, "limit": args.limit}
        record |= {"sampler": sampler.backend, "dtype": str(model.compute_dtype)}
        record |= {"device": world.device, "world_size": world.size, "against": args.against}
        record |= {"seconds": round(time.time() - start, 1), **common.environment()}
        write(samples_out, "".join(json.dumps(line) + "\n" for line in lines))
        write(out, json.dumps(record | {"results": results}, indent=2) + "\n")
        for name, result in results.items():
            print(table(name, result, others.get(name)))
        print(f"\nwritten: {out} and {samples_out}")
    return out


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
