"""What the method scripts share and no paper would argue about.

1 models, 2 problems and prompts, 3 batches, 4 grading, 5 checks; beside it run.py (runs and ranks),
kl.py (full-vocabulary divergences), sampler.py (vLLM) and align.py (two tokenizers).
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from torch import Tensor, nn

from kl import (  # scripts say common.chunked_divergence and so on
    Divergence, Head, chunked_divergence, entropy, forward_kl, reverse_kl, token_logprobs,
)  # fmt: skip
from run import Run, Stop, World, environment, last_line, load_weights, peak_memory_gb, timed

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


# ---- 1. Models ----------------------------------------------------------------------------------
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


@contextlib.contextmanager
def as_teacher(model: nn.Module) -> Iterator[None]:
    """No gradients, and LoRA off: a student inside is the model that it was before training."""
    lora = isinstance(model, peft.PeftModel)
    with torch.no_grad(), model.disable_adapter() if lora else contextlib.nullcontext():
        yield


def head_of(model: nn.Module, ids: Tensor | int | None = None) -> Head:
    """Output head in the compute dtype: all rows, the first `ids`, or the rows `ids` (a copy)."""
    layer, config = base_model(model).get_output_embeddings(), base_model(model).config
    rows = ids.to(layer.weight.device) if isinstance(ids, Tensor) else slice(ids)
    weight, bias = layer.weight[rows], getattr(layer, "bias", None)
    bias = None if bias is None else bias[rows].to(model.compute_dtype)
    softcap = getattr(config.get_text_config(), "final_logit_softcapping", None)
    return Head(weight.to(model.compute_dtype), bias, softcap)


# ---- 2. Problems and prompts ---------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Problem:
    """One row of a dataset; `solution` is the reference text that only a teacher may see."""

    id: str
    prompt: str
    answer: str
    solution: str | None = None
    kind: str = "math"  # which of benchmarks.py's graders judges it
    row: dict | None = None  # the data set's own columns, for kinds that need more (tests, tools)


def load_rows(name: str, split: str = "train", config: str | None = None) -> Any:
    """Rows (dicts) of a local .jsonl or .parquet file, or of a hub dataset. Stops when empty."""
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
    return rows


def load_problems(name: str, split: str = "train", config: str | None = None) -> list[Problem]:
    """Read a local .jsonl or .parquet file, or a hub dataset.

    Columns: problem (or prompt, question), answer, solution. Without an answer column the
    solution's last boxed answer counts (NuminaMath); GSM8K's "#### 18" is understood.
    """
    rows = load_rows(name, split, config)
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


def require_solutions(problems: list[Problem], name: str) -> None:
    """Stop unless every problem of dataset `name` has the reference that a teacher is to see."""
    lacking = [p.id for p in problems if not (p.solution or "").strip()]
    if len(lacking) == len(problems):
        raise Stop(f"{name!r} has no solution column (or only empty ones): the teacher needs it.")
    if lacking:
        raise Stop(f"{name!r}: {len(lacking)} problems have no solution, first {lacking[0]!r}; "
                   "drop those rows.")  # fmt: skip


def fit_solutions(
    problems: list[Problem], render: Callable[[Problem], str], tokenizer: Any, room: int, *,
    thinking: bool,
) -> tuple[list[Problem], int, int]:  # fmt: skip
    """(problems whose prompt render(problem) takes at most `room` tokens, how many cut, left out).

    A solution that is too long loses its tail; a problem is never cut, and is left out when nothing
    of its solution fits. Stops when none is left.
    """
    fitting, cut = [], 0
    template = len(chat_prompt_ids(tokenizer, "", thinking=thinking)) + 8
    for problem in problems:
        if len(render(problem).encode()) + template <= room:  # a token has a byte at least
            fitting.append(problem)
            continue
        ids = tokenizer(problem.solution, add_special_tokens=False).input_ids
        fitted = problem
        while (
            excess := len(chat_prompt_ids(tokenizer, render(fitted), thinking=thinking)) - room
        ) > 0 and ids:
            ids = ids[: max(0, len(ids) - excess)]
            text = tokenizer.decode(ids, clean_up_tokenization_spaces=False).rstrip("\ufffd")
            fitted = dataclasses.replace(problem, solution=text)
        if excess <= 0 and fitted.solution.strip():
            fitting.append(fitted)
            cut += fitted is not problem
    if not fitting:
        raise Stop(f"no problem fits into {room} tokens of prompt: raise --max-length (up to the "
                   "model's context) or lower --max-new-tokens.")  # fmt: skip
    return fitting, cut, len(problems) - len(fitting)


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


def fill(template: str, **values: str) -> str:
    """`template` with each {name} of `values` replaced, in one pass: braces in a value stay.

    Raises ValueError on a value that is None: a prompt must not lose a part without a word.
    """
    if None in values.values():
        raise ValueError(f"nothing to put into the prompt for one of {[*values]}")
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), template)


def chat_prompt_ids(
    tokenizer: Any, prompt: str | list[dict], *, thinking: bool = False, tools: Any = None
) -> list[int]:
    """Ids of one user turn, or of a whole chat, in the tokenizer's own template, ready for the
    assistant to speak. `tools` are JSON schemas for templates that show them.

    A template that always opens a <think> block (DeepSeek-R1 distils, Olmo 3) has it closed again
    where `thinking` is off [2605.21606 code: data_collator.py].
    """
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    ask = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
    text = tokenizer.apply_chat_template(chat, tools=tools, **ask)
    if not thinking and text.rstrip().endswith("<think>"):
        text += "</think>\n\n"
    return tokenizer(text, add_special_tokens=False).input_ids


# ---- 3. Batches ----------------------------------------------------------------------------------
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


def collate(rollouts: list[Rollout], device: str) -> Batch:
    """Pad prompt + completion on the right; masks come from lengths, so any pad id does: 0."""
    width = max(len(r.prompt_ids) + len(r.completion_ids) for r in rollouts)
    input_ids = torch.zeros(len(rollouts), width, dtype=torch.long)
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


def both_sides(
    student: nn.Module, teacher: nn.Module, rollouts: list[Rollout], views: list[Rollout],
    device: str,
) -> tuple[Batch, Batch, Tensor, Tensor]:  # fmt: skip
    """What student and teacher read, and their hidden states (N, D_s), (N, D_t) of the same tokens.

    `views` are the rollouts as the teacher reads them; the teacher's pass ends before the student's
    begins, so that one model can be both.
    """
    batch, view = collate(rollouts, device), collate(views, device)
    with as_teacher(teacher):
        teacher_hidden = completion_hidden(teacher, view)
    return batch, view, completion_hidden(student, batch), teacher_hidden


# ---- 4. Grading ----------------------------------------------------------------------------------
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


# ---- 5. Step-0 checks ----------------------------------------------------------------------------
AT_LEAST = {  # of the flags that several scripts have
    "max_new_tokens": 1, "prompts_per_step": 1, "num_generations": 1, "steps": 1, "micro_batch": 1,
    "save_every": 1, "eval_n": 1, "eval_max_new_tokens": 1, "lora_rank": 0, "top_k": 0,
    "n": 1, "limit": 0, "batch": 1, "temperature": 0, "eval_temperature": 0, "learning_rate": 0,
    "max_grad_norm": 0,
}  # fmt: skip


def check_ranges(args: Any) -> None:
    """Stop when a flag that scripts share has a value that cannot mean anything."""
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')} {value}"
        if name in AT_LEAST and not value >= AT_LEAST[name]:
            raise Stop(f"{flag} must be at least {AT_LEAST[name]}.")
        if name in ("top_p", "eval_top_p", "memory_fraction") and not 0 < value <= 1:
            raise Stop(f"{flag} must lie above 0 and be at most 1.")


def context_of(model: nn.Module) -> int:
    """The number of tokens, prompt and completion, that the model was made for."""
    return base_model(model).config.get_text_config().max_position_embeddings


def context_needed(model: nn.Module, prompts: Iterable[list[int]], new: int, flag: str) -> int:
    """Longest prompt (token ids) + `new` tokens; stops when the model has no room for that many."""
    longest = max(map(len, prompts), default=0)
    if longest + new > context_of(model):
        raise Stop(
            f"the longest prompt ({longest} tokens) and {flag} {new} exceed the context of "
            f"{model.config.name_or_path} ({context_of(model)}): lower {flag} or drop that problem."
        )
    return longest + new


def print_setup(student: Any, teacher: Any, prompts: tuple[list[int], list[int]]) -> None:
    """Show one prompt of each side as the model reads it, and how the two tokenizers differ."""
    for side, tokenizer, ids in zip(
        ("student", "teacher"), (student, teacher), prompts, strict=True
    ):
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
        mode = as_teacher(model) if side == "teacher" else contextlib.nullcontext()
        row = batch.completion_mask.any(1).int().argmax()  # one rollout: whole logits are large
        one = Batch(*(t[row : row + 1] for t in vars(batch).values()))
        keep = one.completion_mask[0, 1:].nonzero()[:64, 0]  # positions that predict
        ids, head = one.input_ids[0, keep + 1], head_of(model)
        with mode, autocast(model, ids.device):
            hidden = completion_hidden(model, one)[: len(keep)]
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
