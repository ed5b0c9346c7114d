"""README numbers of the tiny world against results/results.jsonl, their only source."""

import json
import statistics
import subprocess
from collections import defaultdict

from conftest import ROOT

ROWS = [json.loads(line) for line in (ROOT / "results/results.jsonl").read_text().splitlines()]
README = (ROOT / "README.md").read_text()
LINES = [line.split("|")[1:-1] for line in README.splitlines() if line.startswith("|")]


def shown(values):
    """Percent, mean ± sample std, as the tables have it."""
    values = [100 * v for v in values]
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def by_method(world):
    found = defaultdict(list)
    for row in ROWS:
        if row["world"] == world:
            found[row["method"]].append(row)
    return found


def table_row(first):
    (cells,) = [line for line in LINES if line[0].strip() == first]
    return [cell.strip() for cell in cells]


def test_esr_against_opd():
    for method, first in (("esr", "ESR, N = 24"), ("opd", "OPD, full rollouts")):
        rows = by_method("tiny")[method]
        assert len(rows) == 5
        cells = table_row(first)
        assert cells[1] == shown([r["before"] for r in rows])
        assert cells[2] == shown([r["after"] for r in rows])
        assert cells[3] == f"{statistics.mean(r['sampled_tokens'] for r in rows):,.0f}"


def test_self_distillation():
    methods = by_method("tiny-self")
    assert len(methods) == 7
    for method, rows in methods.items():
        assert sorted(r["seed"] for r in rows) == [0, 1, 2, 3, 4]
        cells = table_row(method)
        for cell, metric in zip(cells[1:4], ("avg@12", "pass@12", "maj@12"), strict=True):
            assert cell == shown([r[f"{metric}_after"] for r in rows]), (method, metric)
        assert cells[4] == shown([r["greedy_after"] for r in rows]), method
    before = methods["pw_opsd"]
    for metric in ("avg@12", "pass@12", "maj@12"):
        assert shown([r[f"{metric}_before"] for r in before]) in README


def test_the_size_of_a_methods_diff():
    for line in LINES:
        if "diff" not in line[-1] and line[-1].strip().endswith("lines"):
            name = line[0].split("]")[0].strip(" [")
            done = subprocess.run(["diff", "esr.py", name], capture_output=True, text=True)
            changed = sum(row.startswith(("<", ">")) for row in done.stdout.splitlines())
            assert line[-1].strip() == f"{changed} lines", name
