"""Time, memory and precision of the chunked divergence (../kl.py) against its alternatives.

    python bench/kl.py                                         # two CPU cores: over an hour
    python bench/kl.py --tokens 16384 --student-hidden 1536    # a GPU, in bfloat16

Each variant, a mean KL over N tokens with its gradient, is first held against the naive one in
float32. Time: rounds A B C A B C ..., median over rounds of the time over the bare matmuls' of that
round; CPU time on CPU (others may use the cores), wall time on a GPU. Memory: one pass's peak above
what is there before, in a fresh process per variant (CPU: VmHWM, which clear_refs resets).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from dataclasses import dataclass
from importlib import import_module, metadata
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that waits must not cost CPU time
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for its kl.py, before this one
import torch
import tyro
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kl


@dataclass
class Args:
    tokens: int = 1024  # N, supervised tokens
    vocab: int = 151936  # V of the Qwen2.5 and Qwen3 heads
    student_hidden: int = 896  # D_s of Qwen2.5-0.5B
    teacher_hidden: int = 2048  # D_t of Qwen3-1.7B
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # bfloat16 on CUDA, float32 on CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"  # cuda when there is one
    runs: int = 5  # timed rounds, after one warm-up
    variants: tuple[str, ...] = ()  # names as in the table; all when empty
    objectives: tuple[str, ...] = ()  # forward, reverse, clamped, trainable; all when empty
    precision_tokens: int = 256  # tokens of the precision tables; 0 leaves them out
    hidden: str = ""  # .pt with real hidden, weight, teacher_hidden, teacher_weight: (N, D), (V, D)
    out: str = ""  # bench/kl_cpu.json or bench/kl_<gpu>.json when empty


Inputs = namedtuple("Inputs", "hidden weight teacher_hidden teacher_weight")  # (N, D), (V, D)
OBJECTIVES = {  # divergence, beta of TRL and Liger (None: not offered), does the head train
    "forward": (kl.forward_kl, 0.0, False),
    "reverse": (kl.reverse_kl, 1.0, False),
    "clamped": (lambda s, t: (t.exp() * (t - s)).clamp(max=0.05).sum(-1), None, False),
    "trainable": (kl.forward_kl, 0.0, True),
}


def cast(x: Inputs, kind: Any, tokens: int | None = None, vocab: int | None = None) -> Inputs:
    pairs = zip(x, (tokens, vocab) * 2, strict=True)
    return Inputs(*(t.detach()[:rows].to(kind) for t, rows in pairs))


def make_inputs(args: Args) -> Inputs:
    """Logits as of a language model: spread 2, four entries lifted by 16, 8, 4, 2 (+- a quarter),
    a teacher whose logits are 0.6 apart. Or the real ones of --hidden."""
    if args.hidden:
        return cast(Inputs(**torch.load(args.hidden)), torch.float32)
    torch.manual_seed(0)
    num, width, wide = args.tokens, args.student_hidden, args.teacher_hidden
    heads = [torch.randn(args.vocab, d) / d**0.5 for d in (width, wide)]
    margin = (16 + 4 * torch.randn(num, 1)) * 0.5 ** torch.arange(4)  # (N, 4)
    peaks = margin[:, :, None] * heads[0][torch.randint(args.vocab, (num, 4))]  # (N, 4, D_s)
    states = [2 * torch.randn(num, width) + peaks.sum(1), 0.6 * torch.randn(num, wide)]
    states[1][:, :width] += states[0][:, :wide]
    heads[1][:, :width] = heads[0][:, :wide]
    return Inputs(states[0], heads[0], states[1], heads[1])


def bare(x: Inputs, objective: tuple, chunk: int) -> None:  # the others: (N,) values or their mean
    logits, teacher_logits = x.hidden.new_empty(2, min(chunk, len(x.hidden)), len(x.weight))
    grad_weight = torch.empty_like(x.weight)  # on CPU no memory until it is written
    for h, t in zip(x.hidden.split(chunk), x.teacher_hidden.split(chunk), strict=True):
        torch.mm(h, x.weight.T, out=logits[: len(h)])
        torch.mm(t, x.teacher_weight.T, out=teacher_logits[: len(h)])
        torch.mm(logits[: len(h)], x.weight)
        if objective[2]:
            torch.mm(logits[: len(h)].T, h, out=grad_weight)


def naive(x: Inputs, objective: tuple, option: torch.dtype | int) -> Tensor:
    if isinstance(option, int):  # torch checkpoint per chunk
        chunks = zip(x.hidden.split(option), x.teacher_hidden.split(option), strict=True)
        parts = [(Inputs(h, x[1], t, x[3]), objective, torch.float32) for h, t in chunks]
        return torch.cat([checkpoint(naive, *part, use_reentrant=False) for part in parts])
    student = torch.log_softmax((x.hidden @ x.weight.T).to(option), -1)  # (N, V)
    teacher = torch.log_softmax((x.teacher_hidden @ x.teacher_weight.T).to(option), -1)
    return objective[0](student, teacher)


def ours(x: Inputs, objective: tuple, chunk: int) -> Tensor:
    inputs = x.hidden, kl.Head(x.weight), x.teacher_hidden, kl.Head(x.teacher_weight)
    weights = x.hidden.new_full((len(x.hidden),), 1 / len(x.hidden), dtype=torch.float32)
    return kl.chunked_divergence(objective[0], *inputs, weights=weights, chunk_size=chunk)


def peer(x: Inputs, objective: tuple, which: str | tuple[int, int]) -> Tensor:
    beta, labels = objective[1], torch.zeros_like(x.hidden[:, 0], dtype=torch.long)
    if which == "GKD":
        logits = (x.hidden @ x.weight.T)[None], (x.teacher_hidden @ x.teacher_weight.T)[None]
        trainer = import_module("trl.experimental.gkd").GKDTrainer
        return trainer.generalized_jsd_loss(*logits, labels[None], beta)
    if which == "tiled":
        inputs = x.hidden[None], x.teacher_hidden[None], x.weight, x.teacher_weight
        loss = import_module("trl.trainer.distillation_trainer")._chunked_divergence_loss
        return loss(*inputs, labels[None] + 1, beta)[0]
    if which == "Triton":  # CUDA only
        loss = import_module("liger_kernel.transformers.fused_linear_jsd").LigerFusedLinearJSD
        return loss(beta)(*x, None)
    loss = import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss  # plain torch
    return loss(0.0, 1.0, beta, compiled=bool(which[1]), chunk_size=which[0])(*x, labels)


VARIANTS = {
    "bare matmuls": (bare, 512), "naive, all logits": (naive, torch.float32),
    "torch checkpoint, 256": (naive, 256), "TRL GKD": (peer, "GKD"), "TRL tiled": (peer, "tiled"),
    **{f"Liger{c * ' compiled'}, {n}": (peer, (n, c)) for c in (0, 1) for n in (256, 1024)},
    "Liger Triton": (peer, "Triton"), "ours, 256": (ours, 256), "ours, 512": (ours, 512),
}  # fmt: skip


def one_pass(x: Inputs, objective: str, variant: str) -> tuple[list[Tensor], float, float]:
    """Mean KL and gradients ([] for the bare matmuls), CPU seconds, wall seconds."""
    x, (function, option) = cast(x, x.hidden.dtype), VARIANTS[variant]
    objective = OBJECTIVES[objective]
    leaves = [t.requires_grad_(function is not bare) for t in x[: 1 + objective[2]]]
    cpu, wall, found = time.process_time(), time.perf_counter(), []
    if (values := function(x, objective, option)) is not None:
        values.mean().backward()
        found = [values.detach().mean(), *(leaf.grad for leaf in leaves)]
    if x.hidden.is_cuda:
        torch.cuda.synchronize()
    return found, time.process_time() - cpu, time.perf_counter() - wall


def why_not(x: Inputs, objective: str, variant: str) -> str:
    """'' when the variant computes what the naive one does in float32, else why it is left out."""
    if VARIANTS[variant][0] is peer and OBJECTIVES[objective][1] is None:
        return "not offered"
    small = cast(x, torch.float32, tokens=48, vocab=8192)
    try:
        found = one_pass(small, objective, variant)[0]
    except ImportError as error:
        return f"not installed ({error.name})"
    exact = one_pass(small, objective, "naive, all logits")[0]
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=False)]
    print(f"  check {variant:22s} off by", *(f"{e:.0e}" for e in errors), flush=True)
    return f"computes something else ({max(errors):.0e})" if max(errors, default=0) > 1e-3 else ""


def extra_memory(file: str, objective: str, variant: str) -> float:
    """Peak MB above what is there before one pass; runs in a fresh process."""
    x, status = Inputs(*torch.load(file)), Path("/proc/self/status")
    small = cast(x, x.hidden.dtype, tokens=8, vocab=512)
    one_pass(x if "compiled" in variant else small, objective, variant)  # compiling takes memory
    if x.hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")  # makes VmHWM what VmRSS is
    marks = [(status.read_text(), torch.cuda.max_memory_allocated())]
    one_pass(x, objective, variant)
    marks.append((status.read_text(), torch.cuda.max_memory_allocated()))
    host, gpu = zip(*marks, strict=True)
    host = [1024 * int(text.split("VmHWM:")[1].split()[0]) for text in host]
    return (gpu[1] - gpu[0] if x.hidden.is_cuda else host[1] - host[0]) / 1e6


def measure(x: Inputs, name: str, args: Args) -> list[dict]:
    print(f"\n## {name}: {len(x.hidden)} tokens, {len(x.weight)} entries")
    chosen, on_gpu = dict.fromkeys(["bare matmuls", *(args.variants or VARIANTS)]), x.hidden.is_cuda
    absent = {v: why_not(x, name, v) for v in chosen}
    present = [v for v in chosen if not absent[v]]
    with tempfile.NamedTemporaryFile() as file, get_context("spawn").Pool(1, None, (), 1) as pool:
        torch.save(tuple(x), file.name)
        mb = {v: pool.apply(extra_memory, (file.name, name, v)) for v in present}
    rounds = [{v: one_pass(x, name, v)[1:] for v in present} for _ in range(args.runs + 1)][1:]
    print(f"\n| variant | {('CPU', 'wall')[on_gpu]}/bare | CPU s | wall s | MB |\n{'|---' * 5}|")
    rows = [{"objective": name, "variant": v, "absent": absent[v]} for v in chosen]
    for v, row in zip(chosen, rows, strict=True):
        if v in present:
            row["ratios"] = [r[v][on_gpu] / r["bare matmuls"][on_gpu] for r in rounds]
            row["cpu_s"], row["wall_s"] = (median(r[v][i] for r in rounds) for i in (0, 1))
            row |= {"ratio": median(row["ratios"]), "extra_mb": mb[v]}
        form = "| {variant} | {ratio:.2f} | {cpu_s:.3f} | {wall_s:.3f} | {extra_mb:,.0f} |"
        print((form if v in present else "| {variant} | {absent} | | | |").format(**row))
    return rows


def precision(x: Inputs, name: str) -> list[dict]:  # bfloat16 inputs; float64 is the first row
    columns = ["error, median", "p99", "negative KLs", "gradient error", "cosine, worst 1 %"]
    print(f"\n## precision, {name}\n\n| arithmetic | {' | '.join(columns)} |\n{'|---' * 6}|")
    rows, reference, bf16 = [], (), torch.bfloat16
    for label, dtype, function, option in (
        ("float64", torch.float64, naive, torch.float64), ("ours", bf16, ours, 256),
        ("bf16 logits, float32 softmax", bf16, naive, torch.float32),
        ("bf16 logits, bf16 log-probs", bf16, naive, bf16),
    ):  # fmt: skip
        hidden = x.hidden.detach().to(dtype).requires_grad_()
        values = function(cast(x, dtype)._replace(hidden=hidden), OBJECTIVES[name], option)
        grad = torch.autograd.grad(values.sum(), hidden)[0].double()
        found = values.detach().double()
        exact, true = reference = reference or (found, grad)
        error, cosine = (found - exact).abs(), torch.cosine_similarity(grad, true, dim=-1)
        row = [error.median(), error.quantile(0.99), (found < 0).sum()]
        row += [(grad - true).norm() / true.norm(), cosine.quantile(0.01)]
        print(f"| {label} | {' | '.join(f'{number:.2g}' for number in row)} |", flush=True)
        numbers = {c: number.item() for c, number in zip(columns, row, strict=True)}
        rows.append({"objective": name, "arithmetic": label, **numbers})
    return rows


def main(args: Args) -> None:
    gpu = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    dtype = args.dtype if args.dtype != "auto" else ("bfloat16" if gpu else "float32")
    full = cast(make_inputs(args), "cuda" if gpu else "cpu")
    git = f"cd {Path(__file__).parent}; git rev-parse -q --verify HEAD; git status -s | head -c 1"
    names = "torch", "transformers", "trl", "liger_kernel", "triton"
    record = {
        "date": time.strftime("%Y-%m-%d %H:%M"), "args": vars(args) | {"dtype": dtype},
        "git": subprocess.getoutput(git).split(),  # a mark behind the commit: not clean
        "device": torch.cuda.get_device_name() if gpu else "cpu", "load_average": [os.getloadavg()],
        "cpu": Path("/proc/cpuinfo").read_text().split("model name\t: ")[-1].splitlines()[0],
        "versions": {d.name: d.version for d in metadata.distributions() if d.name in names},
    }  # fmt: skip
    print(json.dumps(record))
    names, x = args.objectives or OBJECTIVES, cast(full, getattr(torch, dtype))
    record["rows"] = [row for name in names for row in measure(x, name, args)]
    record["load_average"].append(os.getloadavg())
    print("\nload average before, after:", *record["load_average"])
    few = cast(full, torch.bfloat16, args.precision_tokens)
    names = ("forward", "reverse") if args.precision_tokens else ()
    record["precision"] = [row for name in names for row in precision(few, name)]
    out = Path(args.out or Path(__file__).parent / f"kl_{record['device'].replace(' ', '_')}.json")
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
