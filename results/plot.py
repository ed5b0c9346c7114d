"""Draw the README's figure from results.jsonl, which is its only source; a missing row raises.

python results/plot.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
COLOURS = {"esr": "#1b6ca8", "opd": "#c8553d"}
NAMES = {"esr": "ESR, N = 24", "opd": "OPD, full rollouts"}
SEEDS = range(5)


def main() -> None:
    """Accuracy against sampled tokens: the untrained student and each checkpoint, 5 seeds."""
    rows = [json.loads(line) for line in (HERE / "results.jsonl").read_text().splitlines()]
    found = {(r["method"], r["seed"]): r for r in rows if r["world"] == "tiny"}
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    for method, colour in COLOURS.items():
        runs = [found[method, seed] for seed in SEEDS]
        for run in runs:
            x = [0, run["sampled_tokens"] / 1000]
            y = [100 * run["before"], 100 * run["after"]]
            axes.plot(x, y, color=colour, alpha=0.45, marker="o", markersize=4)
        mean = sum(100 * r["after"] for r in runs) / len(runs)
        end = sum(r["sampled_tokens"] / 1000 for r in runs) / len(runs)
        axes.annotate(f"{NAMES[method]}: {mean:.0f} %", (end, mean), xytext=(-6, 10),
                      textcoords="offset points", ha="right", color=colour)  # fmt: skip
    axes.set(xlabel="tokens sampled in training (thousands)", ylabel="held-out avg@4 (%)")
    axes.set(ylim=(0, 100), xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "tiny_tokens.png", dpi=150)


if __name__ == "__main__":
    main()
