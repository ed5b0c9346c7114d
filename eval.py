r"""Scores a model on benchmarks: avg@n, pass@k, maj@n, lengths; compares one run with another.

Every problem is sampled n times per seed and judged by its kind (benchmarks.py): math by its boxed
answer, function calls by BFCL's rules. The table gives mean and sample std (ddof 1) over seeds and
a 95 % bootstrap interval over problems; --against adds the difference to an earlier result file,
problems paired: an interval that holds 0 separates nothing. A killed evaluation with --out goes on
when the same command is given again, and gives the same numbers.

    python eval.py --model Qwen/Qwen3-1.7B --adapter runs/X/checkpoints/step_000200 \
        --benchmark math500 aime24 --protocol esr               # 1 GPU
    python eval.py --model tiny/student --benchmark tiny/test.jsonl \
        --max-new-tokens 96 --seeds 0 --sampler hf              # laptop CPU, a minute
    python eval.py --compare evals/a.json evals/b.json          # intervals, sign test, figures

Benchmarks: a short name of benchmarks.KNOWN, its hub id, or a local .jsonl or .parquet file. The
training scripts use `Exam`.
"""

import hashlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import peft
import tyro
from torch import nn

import common
from benchmarks import KINDS, PROMPT, chat_ids, grade, load_benchmark, same_answer, short_name
from common import Problem, Stop
from compare import compare
from sampler import Sampler


# ---- 1. Arguments --------------------------------------------------------------------------------
@dataclass
class Args:
    # what is scored
    model: str = ""  # local directory or hub id [ours: needed unless --compare]
    benchmark: tuple[str, ...] = ()  # known names, hub ids of them, .jsonl or .parquet files [ours]
    compare: tuple[str, ...] = ()  # two result files: compare them and do nothing else [ours]
    adapter: str = ""  # PEFT directory on top of the model; empty: the model itself [ours]
    limit: int = 0  # first K problems of each benchmark; 0: all [ours]
    against: str = ""  # result file of another model to compare with [ours]
    # sampling
    protocol: str = ""  # a paper's settings of the flags below: see PROTOCOLS [ours]
    n: int = 4  # samples per problem and seed [2605.27028 Sec. 4.1]
    temperature: float = 0.7  # 0 is greedy [2605.27028 Sec. 4.1]
    top_p: float = 1.0  # 1 is off [ours]
    top_k: int = 0  # 0 is off [ours]
    max_new_tokens: int = 2048  # cap in tokens [ours: 2605.27028's 90th percentile is 1,800]
    thinking: bool = False  # enable_thinking in the chat template [ours]
    prompt: str = "esr"  # a name of PROMPTS, or a text with {problem}; for math only [ours]
    seeds: tuple[int, ...] = (0, 1, 2)  # one whole evaluation each [2605.21606 code: three seeds]
    # run
    sampler: Literal["auto", "vllm", "hf"] = "auto"  # vLLM where it is installed [ours]
    memory_fraction: float = 0.4  # of the GPU for vLLM while it is awake [ours]
    out: str = ""  # result file, also of a run to go on with; default evals/<names, time> [ours]
    batch: int = 256  # problems sampled together; what a stop can lose; keep it to go on [ours]
    device: str = "auto"  # cuda where there is one, else cpu [ours]
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # bfloat16 on GPU, float32 on CPU [ours]


PROTOCOLS: dict[str, dict[str, Any]] = {  # how the papers evaluate math; code in 2605.27028: T = 0
    "esr": {"n": 4, "temperature": 0.7, "top_p": 1.0, "top_k": 0, "max_new_tokens": 2048,
            "thinking": False, "prompt": "esr"},  # [2605.27028; cap and prompt ours]
    "pw_opsd": {"n": 12, "temperature": 1.0, "top_p": 0.95, "top_k": 0, "max_new_tokens": 38912,
                "thinking": True, "prompt": "pw_opsd"},  # [2605.21606 code: run_eval.sh]
    "trd": {"n": 16, "temperature": 0.6, "top_p": 0.95, "top_k": 0, "max_new_tokens": 38912,
            "thinking": True, "prompt": "trd"},  # [2606.08432 code: math_evaluation]
}  # fmt: skip
PROMPTS = {"esr": PROMPT, "pw_opsd": PROMPT.replace("\n", "\n\n"), "trd": PROMPT.replace("\n", " ")}


# ---- 2. Metrics ----------------------------------------------------------------------------------
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


def score_problem(rows: list[dict], kind: str = "math") -> dict[str, float]:
    """Scores of one problem from its n sample rows; fractions in [0, 1], len_mean in tokens."""
    n, num_correct = len(rows), sum(row["correct"] for row in rows)
    ks = sorted({2**i for i in range(n.bit_length())} | {n})
    answers, correct = [row["answer"] for row in rows], [row["correct"] for row in rows]
    majority = {f"maj@{n}": float(majority_correct(answers, correct))}
    return {
        f"avg@{n}": num_correct / n,
        **{f"pass@{k}": pass_at_k(n, num_correct, k) for k in ks},
        **(majority if KINDS[kind].majority else {}),
        **{score: sum(row[score] for row in rows) / n for score in KINDS[kind].scores},
        "len_mean": sum(row["tokens"] for row in rows) / n,
        "stop_frac": sum(row["finish_reason"] == "stop" for row in rows) / n,
        "truncated_frac": sum(row["finish_reason"] == "length" for row in rows) / n,
        KINDS[kind].found: sum(row["answer"] is not None for row in rows) / n,
    }


def score_problems(samples: list[dict], n: int, kind: str = "math") -> dict[str, np.ndarray]:
    """Metric name -> (problems,) float64, from sample rows in problem order, n for each."""
    scores = [score_problem(samples[i : i + n], kind) for i in range(0, len(samples), n)]
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


# ---- 3. Evaluation -------------------------------------------------------------------------------
def evaluate(
    sampler: Any, tokenizer: Any, problems: list[Problem], *, n: int, max_new_tokens: int,
    temperature: float, top_p: float, seed: int, top_k: int = 0, thinking: bool = False,
    world: common.World | None = None, prompt: str = PROMPT, first: int = 0,
) -> tuple[dict[str, float], list[dict]]:  # fmt: skip
    """Sample every problem n times and score: (metrics, one row per completion, problem order).

    Metrics are means over problems, see `score_problem`, and `problems`, their number; all problems
    are of one kind. With a `world`, each rank samples a share and all ranks return the same. A
    problem's seeds depend on its place in the benchmark, `first` + its place in `problems`, not on
    ranks. The sampler must be awake and hold the student's weights.
    """
    if n < 1 or not problems:
        raise Stop("an evaluation needs at least one problem and one sample of each.")
    rank, size = (world.rank, world.size) if world else (0, 1)
    jobs = [(i, s) for i in range(rank, len(problems), size) for s in range(n)]
    prompts = {
        i: chat_ids(tokenizer, problems[i], prompt=prompt, thinking=thinking)
        for i in range(rank, len(problems), size)
    }
    rollouts = sampler.sample(
        [prompts[i] for i, _ in jobs],
        [common.request_seed(seed, "eval", first + i, s) for i, s in jobs],
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
    ) if jobs else []  # fmt: skip
    texts = [tokenizer.decode(r.completion_ids, skip_special_tokens=True) for r in rollouts]
    rows = []
    graded = grade([problems[i] for i, _ in jobs], texts)
    for (i, s), rollout, text, verdict in zip(jobs, rollouts, texts, graded, strict=True):
        row = {"problem_id": problems[i].id, "sample": s, "completion": text, **verdict}
        row |= {"tokens": len(rollout.completion_ids), "finish_reason": rollout.finish_reason}
        rows.append((i, s, row))
    rows = world.gather(rows) if world else rows
    samples = [row for _, _, row in sorted(rows, key=lambda item: item[:2])]
    scores = score_problems(samples, n, problems[0].kind)
    return {name: float(s.mean()) for name, s in scores.items()} | {
        "problems": len(problems)
    }, samples


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
        asked = partial(chat_ids, tokenizer, prompt=self.template, thinking=self.thinking)
        new = self.max_new_tokens if self.problems else 0
        return common.context_needed(model, map(asked, self.problems), new, "--eval-max-new-tokens")

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


# ---- 4. Command line -----------------------------------------------------------------------------
def check(args: Args) -> None:
    """Stop on arguments that cannot work, before anything is loaded."""
    if not args.model or not args.benchmark:
        raise Stop("give --model and --benchmark, or two result files with --compare.")
    common.check_ranges(args)
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


def apply_protocol(args: Args) -> Args:
    """The arguments with a paper's settings in place; stops where a flag says something else."""
    if not args.protocol:
        return args
    if args.protocol not in PROTOCOLS:
        raise Stop(f"--protocol {args.protocol}: there are {', '.join(PROTOCOLS)}.")
    settings = PROTOCOLS[args.protocol]
    for name, value in settings.items():
        given, default = getattr(args, name), Args.__dataclass_fields__[name].default
        if given not in (default, value):
            flag = f"--{name.replace('_', '-')}"
            raise Stop(f"--protocol {args.protocol} sets {flag} {value}, not {given}: drop one.")
    print(f"protocol {args.protocol}: " + ", ".join(f"{k} {v}" for k, v in settings.items()))
    return replace(args, **settings)


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


class Unfinished:
    """<out>.part.jsonl: what was sampled, a line for each batch; a killed run goes on there."""

    def __init__(self, out: Path, identity: dict, rank: int) -> None:
        self.path, self.rank = out.with_suffix(".part.jsonl"), rank
        text = self.path.read_text() if self.path.exists() else ""
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        old, new = lines[0] if lines else {}, json.loads(json.dumps(identity))
        changed = [f"{k} was {old.get(k)!r}" for k in new if lines and old.get(k) != new[k]]
        if changed:
            raise Stop(f"{self.path} was begun with other arguments: {'; '.join(changed)[:500]}; "
                       "give those, or choose another --out.")  # fmt: skip
        self.done = {tuple(line["key"]): line["samples"] for line in lines[1:]}
        if rank == 0:
            first = [] if lines else [identity]
            write(self.path, "".join(json.dumps(line) + "\n" for line in [*lines, *first]))

    def add(self, key: tuple, samples: list[dict]) -> None:
        """Keep a batch, on disk too; key is (benchmark, seed, place of its first problem)."""
        self.done[key] = samples
        if self.rank == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps({"key": key, "samples": samples}) + "\n")


def main(args: Args) -> Path:
    """Sample, score, write and print; returns the path of the result file."""
    if args.compare:
        if len(args.compare) != 2:
            raise Stop("--compare takes two result files.")
        return compare(*args.compare, args.out)
    # -- Setup
    args = apply_protocol(args)
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
    asked = partial(chat_ids, tokenizer, prompt=knobs["prompt"], thinking=args.thinking)
    every = (asked(problem) for rows in problems.values() for problem in rows)
    max_len = common.context_needed(model, every, args.max_new_tokens, "--max-new-tokens")
    sampler = Sampler(
        args.model, model, tokenizer, backend=args.sampler, max_len=max_len,
        memory_fraction=args.memory_fraction, seed=args.seeds[0],
    )  # fmt: skip

    # -- Sample and score
    identity = {"model": args.model, "adapter": args.adapter, "seeds": args.seeds, "knobs": knobs}
    identity |= {"problems": {name: fingerprint(rows) for name, rows in problems.items()}}
    identity |= {"batch": args.batch, "sampler": sampler.backend, "dtype": str(model.compute_dtype)}
    unfinished = Unfinished(out, identity, world.rank)
    if world.rank == 0:
        print(f"results: {out}; after a stop, go on with the same command and --out {out}")
    world.gather([])  # no rank writes before all have read
    results, lines = {}, []
    with sampler.awake():
        sampler.sync()
        for name, rows in problems.items():
            per_seed, per_problem = {}, []
            for seed in args.seeds:
                samples: list[dict] = []
                for first in range(0, len(rows), args.batch):
                    key = (name, seed, first)
                    if key not in unfinished.done:
                        _, drawn = evaluate(
                            sampler, tokenizer, rows[first : first + args.batch], seed=seed,
                            world=world, first=first, **knobs,
                        )  # fmt: skip
                        unfinished.add(key, drawn)
                    samples += unfinished.done[key]
                scores = score_problems(samples, args.n, rows[0].kind)
                per_seed[str(seed)] = {metric: float(s.mean()) for metric, s in scores.items()}
                per_seed[str(seed)]["problems"] = len(rows)
                per_problem.append(scores)
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
        unfinished.path.unlink()
        print(f"\nwritten: {out} and {samples_out}")
    return out


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
