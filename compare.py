"""Two result files of eval.py, problem by problem: is there a difference, and where does it lie?

`python eval.py --compare A.json B.json` prints, for each benchmark, the mean of both, the paired
bootstrap interval of A - B and an exact sign test over problems; then pass@k for every k, problems
by how often B solves them, and lengths of right answers [2606.08432 Appendix: its three analyses].
Writes all of it as JSON (--out, default evals/) and two figures a benchmark. Refuses files that
were sampled or asked differently.
"""

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from common import Stop


def load(path: str) -> tuple[dict, dict[str, dict[str, list[dict]]]]:
    """(record, benchmark -> problem id -> sample rows) of a result file and its samples."""
    samples = Path(path).with_suffix(".samples.jsonl")
    try:
        record = json.loads(Path(path).read_text())
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        by_problem: dict[str, dict[str, list[dict]]] = {name: {} for name in record["results"]}
        for row in rows:
            by_problem[row["benchmark"]].setdefault(row["problem_id"], []).append(row)
        record["knobs"], record["seeds"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Stop(f"--compare {path}: no result file of eval.py with its samples.") from error
    return record, by_problem


def refuse_unequal(a: dict, b: dict) -> None:
    """Stop unless both were asked the same questions in the same way."""
    if a["results"].keys() != b["results"].keys():
        raise Stop(f"--compare: {sorted(a['results'])} against {sorted(b['results'])}.")
    changed = [f"{k} {a['knobs'].get(k)!r} and {b['knobs'].get(k)!r}"
               for k in sorted(a["knobs"].keys() | b["knobs"].keys())
               if a["knobs"].get(k) != b["knobs"].get(k)]  # fmt: skip
    changed += [f"{len(r['seeds'])} seeds" for r in (a, b) if len(a["seeds"]) != len(b["seeds"])]
    changed += [f"other problems of {name}" for name, result in a["results"].items()
                if result["problems_sha256"] != b["results"][name]["problems_sha256"]]  # fmt: skip
    if changed:
        raise Stop(f"--compare: the two files differ in how they were made: {'; '.join(changed)}.")


def sign_test(a: np.ndarray, b: np.ndarray) -> tuple[int, int, float]:
    """(problems where a is better, worse, exact two-sided p under a fair coin); ties left out."""
    better, worse = int((a > b).sum()), int((a < b).sum())
    n = better + worse
    tail = sum(math.comb(n, i) for i in range(min(better, worse) + 1)) / 2**n
    return better, worse, min(1.0, 2 * tail)


def bucket(count: int, n: int) -> str:
    """never, seldom or often solved: 0, below half, half or more of the n samples.

    Of 16 samples these are 0, 1-7 and 8-16 [ours: the cut points of 2606.08432 are not known].
    """
    return "never" if count == 0 else "seldom" if count < n / 2 else "often"


def analyse(a: dict[str, list[dict]], b: dict[str, list[dict]]) -> dict[str, Any]:
    """Numbers of one benchmark from the sample rows of both files, by problem id."""
    from eval import paired_bootstrap, pass_at_k

    ids, n = list(b), len(next(iter(b.values())))
    counts = {side: np.array([sum(row["correct"] for row in rows[i]) for i in ids])
              for side, rows in (("a", a), ("b", b))}  # fmt: skip
    diff, low, high = paired_bootstrap(counts["a"] / n, counts["b"] / n)
    better, worse, p = sign_test(counts["a"], counts["b"])
    result: dict[str, Any] = {"problems": len(ids), "samples": n, "difference": diff}
    result |= {"interval": [low, high], "better": better, "worse": worse, "sign_test_p": p}
    for side, rows in (("a", a), ("b", b)):
        curve = [float(np.mean([pass_at_k(n, int(c), k) for c in counts[side]]))
                 for k in range(1, n + 1)]  # fmt: skip
        result[side] = {"mean": float(counts[side].mean() / n), "pass_at_k": curve}
        right = [row["tokens"] for i in ids for row in rows[i] if row["correct"]]
        result[side]["lengths_of_right"] = right
    kinds = np.array([bucket(int(c), n) for c in counts["b"]])
    for kind in ("never", "seldom", "often"):
        inside = kinds == kind
        means = {s: float(counts[s][inside].mean() / n) if inside.any() else None for s in "ab"}
        solved = int((counts["a"][inside] > 0).sum())
        result[kind] = {"problems": int(inside.sum()), "a_solves_any": solved, **means}
    return result


def text(name: str, result: dict[str, Any]) -> str:
    """The lines that eval.py prints for a benchmark."""
    low, high = result["interval"]
    verdict = "not separated" if low <= 0 <= high else "A is better" if low > 0 else "B is better"
    lines = [
        f"\n{name}: {result['problems']} problems x {result['samples']} samples",
        f"A {result['a']['mean']:.4f}   B {result['b']['mean']:.4f}   A - B "
        f"{result['difference']:+.4f}, 95 % [{low:+.4f}, {high:+.4f}]: {verdict}",
        f"A better on {result['better']} problems, worse on {result['worse']}; sign test p = "
        f"{result['sign_test_p']:.4f}",
    ]
    for kind in ("never", "seldom", "often"):
        row = result[kind]
        shown = {s: "-" if row[s] is None else f"{row[s]:.3f}" for s in "ab"}
        shares = f"A {shown['a']}, B {shown['b']}"
        once = f"A solves {row['a_solves_any']} of them at least once"
        lines.append(f"B solves {kind:6}: {row['problems']:4} problems, {shares}, {once}")
    return "\n".join(lines)


def draw(name: str, result: dict[str, Any], prefix: Path) -> None:
    """<prefix>.<benchmark>.pass.png and .lengths.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"a": "#1b6ca8", "b": "#c8553d"}
    figure, axes = plt.subplots(figsize=(4.5, 3), layout="constrained")
    for side, colour in colours.items():
        curve = result[side]["pass_at_k"]
        axes.plot(range(1, len(curve) + 1), curve, color=colour, marker="o", label=side.upper())
    axes.set(xlabel="k", ylabel="pass@k", ylim=(0, 1))
    axes.legend(frameon=False)
    figure.savefig(f"{prefix}.{name}.pass.png", dpi=150)
    figure, axes = plt.subplots(figsize=(4.5, 3), layout="constrained")
    lengths = [result[side]["lengths_of_right"] for side in colours]
    axes.hist(lengths, bins=20, color=list(colours.values()), label=["A", "B"])
    axes.set(xlabel="tokens of a right answer", ylabel="samples")
    axes.legend(frameon=False)
    figure.savefig(f"{prefix}.{name}.lengths.png", dpi=150)
    plt.close("all")


def compare(path_a: str, path_b: str, out: str) -> Path:
    """Compare, print, write `out` (JSON) and the figures beside it; returns the JSON's path."""
    if find_spec("matplotlib") is None:
        raise Stop("the figures need matplotlib: pip install matplotlib.")
    (a, samples_a), (b, samples_b) = load(path_a), load(path_b)
    refuse_unequal(a, b)
    target = Path(out or f"evals/{Path(path_a).stem}__against__{Path(path_b).stem}.json")
    if target.exists():
        raise Stop(f"{target} exists already; choose another --out.")
    results = {name: analyse(samples_a[name], samples_b[name]) for name in a["results"]}
    target.parent.mkdir(parents=True, exist_ok=True)
    for name, result in results.items():
        print(text(name, result))
        draw(name, result, target.with_suffix(""))
    target.write_text(json.dumps({"a": path_a, "b": path_b, "results": results}, indent=1))
    print(f"\nwritten: {target} and its figures")
    return target
