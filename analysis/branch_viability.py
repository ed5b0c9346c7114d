r"""Where are a privileged teacher's tokens reliable? The branch-viability diagnostic.

Paper: "When Are Teacher Tokens Reliable?", arXiv:2605.21606, Sec. 3 and Appendix A-B. The student's
greedy solution is a spine. Where the teacher, who knows the answer, is uncertain along it, each of
the tokens that the teacher would put there is forced, and the student goes on alone. If two tokens
lead to the answer the teacher's uncertainty was harmless diversity; if none does it was real: the
spine could be continued, but not from the teacher's token. Then: which score tells the two apart,
an uncertainty of the teacher or the mere position?

    A  spine = student(x), greedy, sampled where greedy does not end
    B  truncated entropy of the teacher at every position of the spine
    C  candidates: the most uncertain positions before </think>, with their plausible child tokens
    D  MC dropout on the teacher: predictive entropy, mutual information, Dirichlet precision
    E  student continues [student prompt + spine up to t + child], several times a child
    F  viability of a child = share of right answers; label of a position from its children
    G  AUROC, AUPRC of each score, within-problem residuals, cluster bootstrap; table and figures

Every phase appends to its own <phase>.jsonl in --out and skips the problems it finds there, so the
same command goes on after a stop. Figures and table.json are made again each time.

    python analysis/branch_viability.py --model Qwen/Qwen3-4B --benchmark math500 --count 100 \
        --out viability/qwen3-4b                                                # 1 GPU
    python analysis/branch_viability.py --model tiny/student --benchmark tiny/test.jsonl \
        --out viability/tiny --spacing 2 --max-new-tokens 96 --sampler hf      # laptop CPU, minutes
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from benchmarks import grade, load_benchmark
from common import Problem, Rollout, Stop
from kl import Head, entropy, every_logprob
from pw_opsd import EVAL_PROMPT
from sampler import Sampler

TEACHER_PROMPT = (  # [Appendix A; how its last sentence boxes the answer: ours]
    "You are a privileged teacher. Solve the problem and end your solution with the correct boxed "
    "answer.\nProblem: {problem}\nPrivileged ground-truth final answer: {answer}\nUse the "
    "ground-truth answer above. Produce a complete step-by-step solution that ends with "
    "\\boxed{{answer}}."
)
SCORES = ("position", "truncated_entropy", "predictive_entropy", "mutual_information", "precision")


@dataclass
class Args:
    model: str  # student and, with the answer in its prompt, teacher
    benchmark: str  # known name, .jsonl or hub id with problem and answer columns
    out: str  # directory of this diagnostic; an existing one is continued
    count: int = 100  # first problems of the benchmark [ours]
    thinking: bool = True  # enable_thinking in both templates [paper]
    max_new_tokens: int = 32768  # cap of a spine, and of spine + child + continuation [ours]
    max_model_len: int = 40960  # prompt + completion; the model's context if less [ours]
    fallback_temperature: float = 0.6  # where greedy does not end [ours]
    top_p: float = 0.95  # of the fallback and of continuations [ours]
    entropy_top_k: int = 20  # valid tokens of the truncated entropy [ours]
    plausibility: float = 0.05  # least teacher probability of a child token [ours]
    children: int = 3  # tokens forced at a candidate, at most [ours]
    spacing: int = 32  # least distance of two candidates, tokens [ours]
    candidates: int = 10  # positions of a problem, at most [ours]
    dropout: float = 0.1  # p of MC dropout [ours]
    dropout_layers: int = 4  # last decoder layers that get it [ours]
    dropout_samples: int = 10  # forward passes [ours]
    rollouts: int = 4  # continuations of a child [ours]
    temperature: float = 0.6  # of continuations [ours]
    theta_hi: float = 0.5  # a child from here on is viable [ours]
    theta_lo: float = 0.5  # real-uncertain: every child at most this [ours]
    theta_mean: float = 0.25  # real-uncertain: and their mean at most this [ours]
    precision_floor: float = 1e-6  # of alpha_0, only where its logarithm is taken [ours]
    resamples: int = 1000  # of the cluster bootstrap [ours]
    seed: int = 0  # of sampling, dropout and bootstrap [paper]
    batch: int = 64  # problems sampled together; memory and how much a stop can lose [ours]
    sampler: Literal["auto", "vllm", "hf"] = "auto"  # vLLM where it is installed [ours]
    memory_fraction: float = 0.5  # of the GPU for vLLM while it is awake [ours]
    device: str = "auto"  # cuda where there is one, else cpu [ours]
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # bfloat16 on GPU, float32 on CPU [ours]


class Rows:
    """<phase>.jsonl: one row per problem, written when that problem is done."""

    def __init__(self, out: Path, phase: str) -> None:
        self.path = out / f"{phase}.jsonl"
        text = self.path.read_text() if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line
        if whole != text:
            self.path.write_text(whole)
        self.rows = {row["id"]: row for row in map(json.loads, whole.splitlines())}

    def add(self, row: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows[row["id"]] = row


# ---- A spines, B teacher entropy, C candidates ---------------------------------------------------
def student_ids(args: Args, tokenizer: Any, problem: Problem) -> list[int]:
    """The student's prompt: the one of evaluation."""
    text = common.fill(EVAL_PROMPT, problem=problem.prompt)
    return common.chat_prompt_ids(tokenizer, text, thinking=args.thinking)


def teacher_ids(args: Args, tokenizer: Any, problem: Problem) -> list[int]:
    """The teacher's prompt: the problem and its final answer."""
    text = common.fill(TEACHER_PROMPT, problem=problem.prompt, answer=problem.answer)
    return common.chat_prompt_ids(tokenizer, text, thinking=args.thinking)


def spines(args: Args, models: "Models", problems: list[Problem], rows: Rows) -> None:
    """Phase A: greedy, then one sample for each problem whose greedy solution did not end."""
    todo = [p for p in problems if p.id not in rows.rows]
    for i in range(0, len(todo), args.batch):
        part = todo[i : i + args.batch]
        prompts = [student_ids(args, models.tokenizer, p) for p in part]
        caps = [args.max_new_tokens] * len(part)
        drawn = models.sample(prompts, [0] * len(part), caps, {"temperature": 0.0})
        again = [n for n, r in enumerate(drawn) if r.finish_reason != "stop"]
        seeds = [common.request_seed(args.seed, "spine", part[n].id) for n in again]
        fallback = {"temperature": args.fallback_temperature, "top_p": args.top_p}
        retried = models.sample([prompts[n] for n in again], seeds, caps[: len(again)], fallback)
        for n, rollout in zip(again, retried, strict=True):
            drawn[n] = rollout
        for n, (problem, r) in enumerate(zip(part, drawn, strict=True)):
            text = models.tokenizer.decode(r.completion_ids, skip_special_tokens=True)
            (verdict,) = grade([problem], [text])
            correct = bool(verdict["correct"] and r.finish_reason == "stop")
            rows.add({"id": problem.id, "spine": r.completion_ids, "answer": verdict["answer"],
                      "correct": correct,
                      "finished": r.finish_reason == "stop", "sampled": n in again})  # fmt: skip


def truncated_entropy(logprobs: Tensor, valid: Tensor, k: int, children: int) -> tuple[Tensor, ...]:
    """(n, V), (V,) bool -> entropy (n,) nats of the k best valid tokens, renormalised; the ids and
    full-vocabulary probabilities of the `children` best of them, (n, children) each."""
    top, ids = logprobs.masked_fill(~valid, -torch.inf).topk(min(k, int(valid.sum())))  # (n, k)
    return entropy(top.log_softmax(-1)), ids[:, :children], top[:, :children].exp()


@torch.no_grad()
def teacher_entropies(args: Args, models: "Models", problems: list[Problem], a: Rows, b: Rows):
    """Phase B: the teacher reads its own prompt and the spine; one forward pass a problem."""
    for problem in problems:
        if problem.id in b.rows:
            continue
        hidden = models.hidden(teacher_ids(args, models.tokenizer, problem), a.rows[problem.id])
        parts = [
            truncated_entropy(
                every_logprob(h, models.head), models.valid, args.entropy_top_k, args.children
            )
            for h in hidden.split(256)
        ]
        nats, ids, probs = (torch.cat(x) for x in zip(*parts, strict=True))
        nats, probs = ((x.double() * 1e6).round() / 1e6 for x in (nats, probs))  # half the file
        b.add({"id": problem.id, "entropy": nats.tolist(), "child_ids": ids.tolist(),
               "child_probs": probs.tolist()})  # fmt: skip


def choose(
    nats: list[float], num_children: list[int], allowed: list[bool], spacing: int, count: int
) -> list[int]:
    """Phase C's positions: the highest entropies that are `allowed`, have two children or more and
    lie at least `spacing` tokens apart; at most `count`, in order."""
    chosen: list[int] = []
    for t in sorted(range(len(nats)), key=lambda t: -nats[t]):
        free = all(abs(t - other) >= spacing for other in chosen)
        if allowed[t] and num_children[t] >= 2 and free and len(chosen) < count:
            chosen.append(t)
    return sorted(chosen)


def candidates(args: Args, models: "Models", a: Rows, b: Rows, c: Rows) -> None:
    """Phase C: valid tokens of the spine before </think>; children are plausible to the teacher."""
    end = models.tokenizer.get_vocab().get("</think>")
    for key, row in b.rows.items():
        if key in c.rows:
            continue
        spine = a.rows[key]["spine"]
        last = spine.index(end) if end in spine else len(spine)
        allowed = [t < last and bool(models.valid[i]) for t, i in enumerate(spine)]
        children = [
            [i for i, p in zip(ids, probs, strict=True) if p >= args.plausibility]
            for ids, probs in zip(row["child_ids"], row["child_probs"], strict=True)
        ]
        number = [len(ids) for ids in children]
        where = choose(row["entropy"], number, allowed, args.spacing, args.candidates)
        found = [{"t": t, "truncated_entropy": row["entropy"][t], "children": children[t]}
                 for t in where]  # fmt: skip
        c.add({"id": key, "length": len(spine), "candidates": found})


# ---- D MC dropout --------------------------------------------------------------------------------
@contextmanager
def mc_dropout(layers: list[nn.Module], p: float, generator: torch.Generator) -> Iterator[None]:
    """Inverted dropout on the outputs of `layers`; the hooks are gone afterwards, come what may."""

    def drop(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        noise = torch.rand(hidden.shape, generator=generator, device=hidden.device)
        hidden = hidden * (noise >= p) / (1 - p)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hooks = [layer.register_forward_hook(drop) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def dropout_scores(samples: Iterator[Tensor]) -> dict[str, Tensor]:
    """From (n, V) log-probs of M >= 2 passes, one at a time: three scores, (n,) each.

    H(mean p); mutual information H(mean p) - mean H(p_m), nats; Dirichlet precision alpha_0 by
    moment matching, (sum_v mean(1 - mean) - sum_v var) / sum_v var [Appendix B]. It "may be
    negative" there, hence the sample variance [ours]. Two (n, V) sums are all that is held.
    """
    total, squares, entropies, m = 0.0, 0.0, 0.0, 0
    for logprobs in samples:
        p = logprobs.exp()
        total, squares, entropies = total + p, squares + p**2, entropies + entropy(logprobs)
        m += 1
    mean = total / m  # (n, V)
    predictive = -(mean * mean.clamp_min(1e-30).log()).sum(-1)
    variance = ((squares - m * mean**2) / (m - 1)).sum(-1)
    precision = ((mean * (1 - mean)).sum(-1) - variance) / variance.clamp_min(1e-12)
    information = predictive - entropies / m
    return {"predictive_entropy": predictive, "mutual_information": information,
            "precision": precision}  # fmt: skip


@torch.no_grad()
def uncertainties(args: Args, models: "Models", problems: list[Problem], a: Rows, c: Rows, d: Rows):
    """Phase D: the teacher's forward pass again, with dropout; only candidates reach the head."""
    layers = list(common.base_model(models.model).get_decoder().layers)[-args.dropout_layers :]
    for problem in problems:
        where = [found["t"] for found in c.rows[problem.id]["candidates"]]
        if problem.id in d.rows:
            continue
        generator = torch.Generator(models.device)
        generator.manual_seed(common.request_seed(args.seed, "dropout", problem.id))
        prompt = teacher_ids(args, models.tokenizer, problem)
        with mc_dropout(layers, args.dropout, generator):
            scores = dropout_scores(
                every_logprob(models.hidden(prompt, a.rows[problem.id])[where], models.head)
                for _ in range(args.dropout_samples if where else 0)
            ) if where else {}  # fmt: skip
        d.add({"id": problem.id} | {name: x.tolist() for name, x in scores.items()})


# ---- E continuations, F labels -------------------------------------------------------------------
def continuations(
    args: Args, models: "Models", problems: list[Problem], a: Rows, c: Rows, e: Rows
) -> None:
    """Phase E: after the *student's* prompt, the spine up to t and a child, the student goes on."""
    for problem in problems:
        if problem.id in e.rows:
            continue
        spine, prompt = a.rows[problem.id]["spine"], student_ids(args, models.tokenizer, problem)
        where = c.rows[problem.id]["candidates"]
        jobs = [(n, child, s) for n, found in enumerate(where)
                for child in found["children"] for s in range(args.rollouts)]  # fmt: skip
        prefixes = [[*spine[: where[n]["t"]], child] for n, child, _ in jobs]
        drawn = models.sample(
            [prompt + prefix for prefix in prefixes],
            [common.request_seed(args.seed, "branch", problem.id, *job) for job in jobs],
            [max(1, args.max_new_tokens - len(prefix)) for prefix in prefixes],
            {"temperature": args.temperature, "top_p": args.top_p},
        )
        right: list[dict[int, list[bool]]] = [{} for _ in where]
        for (n, child, _), prefix, r in zip(jobs, prefixes, drawn, strict=True):
            ids = prefix + r.completion_ids
            text = models.tokenizer.decode(ids, skip_special_tokens=True)
            right[n].setdefault(child, []).append(bool(grade([problem], [text])[0]["correct"]))
        cut = [0] * len(where)  # continuations that ran out of room; they count as failures
        for (n, _, _), r in zip(jobs, drawn, strict=True):
            cut[n] += r.finish_reason != "stop"
        viability = [[sum(x) / len(x) for x in found.values()] for found in right]
        e.add({"id": problem.id, "viability": viability, "cut": cut})


def label(viability: list[float], theta_hi: float, theta_lo: float, theta_mean: float) -> str:
    """Phase F: "diversity", "real_uncertain" or "gray", from the viability of each child."""
    if sum(v >= theta_hi for v in viability) >= 2:
        return "diversity"
    hopeless = all(v <= theta_lo for v in viability)
    return "real_uncertain" if hopeless and np.mean(viability) <= theta_mean else "gray"


def labelled(args: Args, problems: list[Problem], c: Rows, d: Rows, e: Rows) -> list[dict]:
    """One row per candidate of `problems`: problem, t, label, viability and the scores, each such
    that a real-uncertain position is expected to have more of it."""
    rows = []
    for key, row in ((p.id, c.rows[p.id]) for p in problems):
        for n, found in enumerate(row["candidates"]):
            viability = e.rows[key]["viability"][n]
            kind = label(viability, args.theta_hi, args.theta_lo, args.theta_mean)
            alpha = max(d.rows[key]["precision"][n], args.precision_floor)
            relative = found["t"] / row["length"]
            scores = {name: d.rows[key][name][n] for name in SCORES[2:4]}
            scores |= {"position": 1 - relative, "truncated_entropy": found["truncated_entropy"]}
            rows.append({"problem": key, "t": found["t"], "relative": relative, "label": kind,
                         "viability": viability, "cut": e.rows[key]["cut"][n],
                         "precision": -float(np.log(alpha)), **scores})  # fmt: skip
    return rows


# ---- G statistics --------------------------------------------------------------------------------
def auroc(positive: np.ndarray, score: np.ndarray) -> float:
    """P(score of a positive > score of a negative), ties count half; nan without both classes."""
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # mid-ranks, 1-based
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return float("nan")
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def auprc(positive: np.ndarray, score: np.ndarray) -> float:
    """Average precision: sum over thresholds of recall gained x precision; nan if no positive."""
    values, inverse = np.unique(-score, return_inverse=True)
    found = np.cumsum(np.bincount(inverse, positive, len(values)))  # positives at or above
    flagged = np.cumsum(np.bincount(inverse, minlength=len(values)))
    gained = np.diff(found, prepend=0)
    return float((gained * found / flagged).sum() / found[-1]) if found[-1] else float("nan")


def residuals(score: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    """Score minus its mean within the problem."""
    _, inverse = np.unique(cluster, return_inverse=True)
    return score - (np.bincount(inverse, score) / np.bincount(inverse))[inverse]


def cluster_bootstrap(
    positive: np.ndarray, score: np.ndarray, cluster: np.ndarray, resamples: int, seed: int
) -> dict[str, Any]:
    """AUROC and AUPRC of within-problem residuals, 95 % intervals over resampled problems.

    A problem drawn twice counts twice, as two problems; residuals are taken anew in each resample.
    Resamples that lack a class have no AUROC; `undefined` counts them.
    """
    rng, names = np.random.default_rng(seed), np.unique(cluster)
    members = [np.flatnonzero(cluster == name) for name in names]
    draws = []
    for _ in range(resamples):
        picked = rng.integers(len(names), size=len(names))
        rows = np.concatenate([members[n] for n in picked])
        copies = np.repeat(np.arange(len(names)), [len(members[n]) for n in picked])
        centred = residuals(score[rows], copies)
        draws.append((auroc(positive[rows], centred), auprc(positive[rows], centred)))
    result, centred = {}, residuals(score, cluster)
    defined = [d for d in draws if not np.isnan(d).any()]
    for n, (name, measure) in enumerate((("auroc", auroc), ("auprc", auprc))):
        low, high = np.percentile([d[n] for d in defined], [2.5, 97.5]) if defined else [np.nan] * 2
        result[name] = measure(positive, centred)
        result[f"{name}_interval"] = [float(low), float(high)]
    return result | {"undefined": len(draws) - len(defined)}


def report(args: Args, rows: list[dict], out: Path) -> dict:
    """Print the table, write table.json and two figures; needs both kinds of position."""
    kept = [row for row in rows if row["label"] != "gray"]
    counts = {
        k: sum(r["label"] == k for r in rows) for k in ("real_uncertain", "diversity", "gray")
    }
    table: dict[str, Any] = {"candidates": len(rows), **counts}
    table["problems"] = len({row["problem"] for row in rows})
    table["cut"] = {k: sum(r["cut"] for r in rows if r["label"] == k) for k in counts}
    print(f"{table['problems']} correct spines with candidates, positions: {counts}")
    print(f"continuations cut for length, counted as failures: {table['cut']}")
    if not (counts["real_uncertain"] and counts["diversity"]):
        print("only one kind of position: no score can be judged; more problems are needed.")
    elif min(counts["real_uncertain"], counts["diversity"]) < 10:
        print("fewer than 10 positions of a kind: the numbers below say next to nothing.")
    positive = np.array([row["label"] == "real_uncertain" for row in kept], dtype=bool)
    cluster = np.array([row["problem"] for row in kept])
    print("scores: does more of it mean real_uncertain?")
    for name in SCORES if counts["real_uncertain"] and counts["diversity"] else ():
        score = np.array([row[name] for row in kept])
        table[name] = s = cluster_bootstrap(positive, score, cluster, args.resamples, args.seed)
        (a, b), (c, d) = s["auroc_interval"], s["auprc_interval"]
        cells = (
            f"AUROC {s['auroc']:.3f} [{a:.3f}, {b:.3f}]   AUPRC {s['auprc']:.3f} [{c:.3f}, {d:.3f}]"
        )
        print(f"{name:20} {cells}   {s['undefined']} resamples lack a kind")
    (out / "table.json").write_text(json.dumps(table, indent=1))
    if rows:
        draw(rows, out)
    return table


def draw(rows: list[dict], out: Path) -> None:
    """histogram.png: positions by label; failure.png: share of continuations that fail."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    edges = np.linspace(0, 1, 11)
    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    kinds = [
        [r["relative"] for r in rows if r["label"] == k] for k in ("real_uncertain", "diversity")
    ]
    axes.hist(
        kinds, bins=edges, label=["real-uncertain", "diversity"], color=["#c8553d", "#1b6ca8"]
    )
    axes.set(xlabel="relative position t / L", ylabel="candidate positions")
    axes.legend(frameon=False)
    figure.savefig(out / "histogram.png", dpi=150)
    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    where = np.array([r["relative"] for r in rows])
    failure = np.array([1 - np.mean(r["viability"]) for r in rows])
    at = np.clip(np.digitize(where, edges) - 1, 0, 9)
    full = [n for n in range(10) if (at == n).any()]
    middles = [(edges[n] + edges[n + 1]) / 2 for n in full]
    axes.plot(middles, [failure[at == n].mean() for n in full], marker="o", color="#c8553d")
    axes.set(xlabel="relative position t / L", ylabel="failing continuations", ylim=(0, 1))
    figure.savefig(out / "failure.png", dpi=150)
    plt.close("all")


# ---- Models and phases ---------------------------------------------------------------------------
class Models:
    """The model as the teacher's forward pass and as the student's sampler, each loaded at need."""

    def __init__(self, args: Args) -> None:
        self.args, self.device = args, common.World(args.device).device
        self.tokenizer = common.load_tokenizer(args.model)

    @cached_property
    def model(self) -> nn.Module:
        return common.load_model(self.args.model, dtype=self.args.dtype, device=self.device)

    @cached_property
    def head(self) -> Head:
        return common.head_of(self.model)

    @cached_property
    def max_len(self) -> int:
        return min(self.args.max_model_len, common.context_of(self.model))

    @cached_property
    def sampler(self) -> Sampler:
        return Sampler(
            self.args.model, self.model, self.tokenizer, backend=self.args.sampler,
            max_len=self.max_len, memory_fraction=self.args.memory_fraction, seed=self.args.seed,
        )  # fmt: skip

    @cached_property
    def valid(self) -> Tensor:
        """(V,) bool: ids that spell visible text; not special, blank or part of a character."""
        keep = torch.zeros(len(self.head.weight), dtype=torch.bool)
        added = self.tokenizer.added_tokens_decoder  # <tool_call> is not "special" to all of them
        ids = [i for i in range(min(len(self.tokenizer), len(keep))) if i not in added]
        for i, text in zip(ids, self.tokenizer.batch_decode([[i] for i in ids]), strict=True):
            keep[i] = bool(text.strip()) and "\ufffd" not in text
        return keep.to(self.device)

    def hidden(self, prompt: list[int], row: dict) -> Tensor:
        """(L, D) hidden states that predict the spine's tokens after `prompt`."""
        rollout = Rollout(prompt, row["spine"], "stop", [])
        return common.completion_hidden(self.model, common.collate([rollout], self.device))

    def sample(
        self, prompts: list[list[int]], seeds: list[int], caps: list[int], knobs: dict[str, float]
    ) -> list[Rollout]:
        """One rollout a prompt, each with its own cap and never beyond the model's length."""
        if not prompts:
            return []
        caps = [min(cap, self.max_len - len(p)) for cap, p in zip(caps, prompts, strict=True)]
        with self.sampler.awake():
            return self.sampler.sample(prompts, seeds, max_new_tokens=caps, **knobs)


def check(args: Args, problems: list[Problem]) -> None:
    """Stop on what cannot work, before anything is loaded or written."""
    least = {"count": 1, "children": 2, "spacing": 1, "candidates": 1, "dropout_layers": 1}
    least |= {"dropout_samples": 2, "rollouts": 1, "resamples": 1, "batch": 1, "max_new_tokens": 1}
    for name, bound in least.items():
        if getattr(args, name) < bound:
            raise Stop(f"--{name.replace('_', '-')} must be at least {bound}.")
    common.check_ranges(args)
    if not args.temperature > 0 or not args.fallback_temperature > 0:
        raise Stop(
            "--temperature and --fallback-temperature must be above 0: greedy has no spread."
        )
    if find_spec("matplotlib") is None:
        raise Stop("the figures need matplotlib: pip install matplotlib.")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise Stop("one process only, not torchrun; on several GPUs split the benchmark.")
    if not 0 < args.dropout < 1 or args.entropy_top_k < args.children:
        raise Stop("--dropout must lie between 0 and 1, --entropy-top-k be at least --children.")
    if len({p.id for p in problems}) < len(problems):
        raise Stop(f"{args.benchmark!r} has two problems with the same id; give each its own.")
    config = Path(args.out, "config.json")
    old = json.loads(config.read_text())["args"] if config.exists() else None
    free = {"batch", "sampler", "memory_fraction", "device", "resamples", "count"}
    free |= {"theta_hi", "theta_lo", "theta_mean", "precision_floor"}  # F and G are always redone
    changed = [k for k, v in vars(args).items() if old and k not in free and old.get(k) != v]
    if changed:
        raise Stop(f"{args.out} was begun with other {', '.join(changed)}; choose another --out.")


def main(args: Args) -> dict:
    """All phases, each continued where it stopped; returns the table."""
    problems = load_benchmark(args.benchmark)[: args.count]
    check(args, problems)
    models, out = Models(args), Path(args.out)
    prompts = [f(args, models.tokenizer, p) for f in (student_ids, teacher_ids) for p in problems]
    longest = max(map(len, prompts))
    if longest + 2 > models.max_len:
        raise Stop(f"a prompt has {longest} tokens, the model's length is {models.max_len}.")
    # The teacher must be able to read every spine after its own, longer prompt.
    models.args = dataclasses.replace(
        args, max_new_tokens=min(args.max_new_tokens, models.max_len - longest)
    )
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "config.json").exists():
        config = {"args": vars(args), "argv": sys.argv, **common.environment()}
        (out / "config.json").write_text(json.dumps(config, indent=1))
    a, b, c, d, e = (Rows(out, phase) for phase in "ABCDE")
    spines(args, models, problems, a)
    solved = sum(row["correct"] for row in a.rows.values())
    print(f"A: {solved} of {len(problems)} spines are correct", flush=True)
    problems = [p for p in problems if a.rows[p.id]["correct"]]  # the table's; the rest is idle
    teacher_entropies(args, models, problems, a, b)
    candidates(args, models, a, b, c)
    print(f"C: {sum(len(r['candidates']) for r in c.rows.values())} candidates", flush=True)
    uncertainties(args, models, problems, a, c, d)
    continuations(args, models, problems, a, c, e)
    rows = labelled(args, problems, c, d, e)
    (out / "F.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return report(args, rows, out)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
