"""Build the tiny world: real checkpoints under 1M parameters that every script here can run on.

Three Qwen3 models trained from scratch on the CPU, each with its fast tokenizer, and a task that
has steps to get wrong: chained arithmetic, written out one step per line.

    Start with 7. Add 5, then multiply by 3. What is the result?
    7 + 5 = 12
    12 * 3 = 36
    The answer is \\boxed{36}.

`teacher` is right nearly always. `student` was trained on steps that are often wrong (a result near
the right one, from which later steps go on) unless a reference solution is in its prompt, so it is
much better with a reference than without: self-distillation needs that. `teacher_other` has another
tokenizer: other special tokens, other ids, numbers in one token. They know the prompts of the
papers (methods.md 1.3, 3.2, 4.4, 5.3) and nothing else; thinking on or off, they reply alike.

Run it:
    python tiny.py --force                       # rebuilds tiny/: about 15 minutes on 2 free cores
    python tiny.py --out /tmp/tiny --scale 0.01  # smoke test: useless models, 1 minute

The same seed, kind of CPU and library versions give the same files; --workers changes nothing.
"""

import json
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)

from tiny_task import (
    CHAT_TEMPLATE,
    LARGEST,
    PROMPTS,
    Chain,
    Example,
    Split,
    draw_example,
    make_chain,
    make_example,
    make_row,
)


# ---- 1. Arguments and models ---------------------------------------------------------------------
@dataclass
class Args:
    out: Path = Path("tiny")  # directory to build
    force: bool = False  # replace an earlier build in that directory
    scale: float = 1.0  # multiplies the training steps; below 1, also the problems scored
    seed: int = 0  # of the data, the initial weights and the scoring
    workers: int = 2  # models trained at the same time, each on one CPU thread


@dataclass(frozen=True)
class Recipe:
    name: str  # folder below --out
    hidden: int  # model width
    steps: int  # optimizer steps
    noise: float  # how often a step (or a tool call) is wrong where no reference is given
    longest: int  # longest chain trained on, in steps
    skills: tuple[float, ...]  # share of each skill of PROMPTS in the second half of training
    split_numbers: bool = True  # tokenizer: one token per digit, else one per number
    turn: str = "<|im_start|>"  # opens a message
    end: str = "<|im_end|>"  # closes a message: the EOS token
    pad: str = "<|endoftext|>"


OTHER = {"split_numbers": False, "turn": "<|turn|>", "end": "<|end|>", "pad": "<|pad|>"}
RECIPES = (  # the slowest first, so that two workers finish together
    Recipe("teacher", 96, 1200, 0.0, 8, (0.25, 0.05, 0.20, 0.15, 0.10, 0.25)),
    Recipe("student", 80, 1200, 0.4, 6, (0.25, 0.05, 0.20, 0.15, 0.10, 0.25)),
    Recipe("teacher_other", 96, 800, 0.0, 8, (1.0, 0.0, 0.0, 0.0, 0.0, 0.0), **OTHER),
)
# ---- 2. Tokenizer and model ----------------------------------------------------------------------
TAGS = [
    f"<{tag}>" for name in ("think", "tool_call", "tool_response") for tag in (name, "/" + name)
]


def render(tokenizer: PreTrainedTokenizerFast, example: Example, *, thinking: bool) -> str:
    """The prompt of an example, chat template applied."""
    messages, tools, _ = example
    options = {"add_generation_prompt": True, "enable_thinking": thinking, "tokenize": False}
    return tokenizer.apply_chat_template(messages, tools=tools, **options)


def make_tokenizer(recipe: Recipe, seed: int, vocab_size: int = 1280) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on rendered examples.

    Merges cross spaces but no punctuation mark, so the papers' boilerplate takes few tokens.
    """
    special = [recipe.pad, recipe.turn, recipe.end]
    pieces = r"\d|\n+|[^\d\n.?!:,]+[.?!:,]*"
    if not recipe.split_numbers:
        pieces = r" [-+*=] |\d{1,3}|\n+| ?[^\d\s]+|\s"
    split = pre_tokenizers.Split(Regex(pieces), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()

    def wrap() -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token=recipe.end,
            pad_token=recipe.pad,
            chat_template=CHAT_TEMPLATE.replace("TURN", recipe.turn).replace("END", recipe.end),
            model_max_length=8192,
        )

    rng, untrained, corpus = np.random.default_rng(seed), wrap(), []
    for _ in range(4000):
        example = draw_example(rng, RECIPES[0], set())  # one corpus: teacher and student share ids
        text = render(untrained, example, thinking=False) + example[2]
        corpus += re.split("|".join(map(re.escape, [*special, *TAGS])), text)
    corpus += [str(number) for number in range(LARGEST + 1)] * 1000  # worth a token where allowed
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special) - len(TAGS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in TAGS])
    return wrap()


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """An untrained model of 4 layers with tied embeddings."""
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=2 * recipe.hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,  # the smallest that vLLM's attention takes
        max_position_embeddings=8192,  # trained on a few hundred; the room is for the scripts
        tie_word_embeddings=True,
        bos_token_id=None,
        **special,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**special)
    return model


def save(folder: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The class name that transformers 5 writes is unknown to transformers 4; both know this one.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


# ---- 3. Training ---------------------------------------------------------------------------------
Batch = list[tuple[list[int], list[int]]]  # ids of the prompt, ids of the reply with EOS


def encode(
    tokenizer: PreTrainedTokenizerFast, example: Example, *, thinking: bool
) -> tuple[list[int], list[int]]:
    """(ids of the prompt, ids of the reply with EOS)."""
    prompt_ids = tokenizer(render(tokenizer, example, thinking=thinking)).input_ids
    return prompt_ids, [*tokenizer(example[2]).input_ids, tokenizer.eos_token_id]


def batches(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, held_out: set[Chain], steps: int, seed: int
) -> Iterator[Batch]:
    """`steps` batches, rows of similar length together."""
    rng = np.random.default_rng(seed)
    size, group = 32, 8  # a group is drawn at once and sorted by length: little padding
    for first in range(0, steps, group):
        rows = []
        for _ in range(group * size):
            example = draw_example(rng, recipe, held_out, first_half=first < steps / 2)
            rows.append(encode(tokenizer, example, thinking=bool(rng.integers(2))))
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        for i in rng.permutation(group)[: steps - first]:
            yield rows[i * size : (i + 1) * size]


def train(model: Qwen3ForCausalLM, data: Iterator[Batch], steps: int, name: str) -> None:
    """Next-token cross-entropy on the replies.

    Muon on the matrices learns this task in a third of the steps that AdamW needs.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [model.lm_head.weight, *(p for p in model.parameters() if p.ndim == 1)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    schedules = [  # 40 steps up, the second half down to 0
        torch.optim.lr_scheduler.LambdaLR(o, lambda i: min(1, (i + 1) / 40, 2 - 2 * i / steps))
        for o in optimizers
    ]
    model.train()
    for step, rows in enumerate(data, 1):
        width = max(len(prompt_ids) + len(reply_ids) for prompt_ids, reply_ids in rows)
        input_ids = torch.full((len(rows), width), model.config.pad_token_id)  # (B, T)
        in_reply = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, (prompt_ids, reply_ids) in enumerate(rows):
            end = len(prompt_ids) + len(reply_ids)
            input_ids[i, :end] = torch.tensor(prompt_ids + reply_ids)
            in_reply[i, len(prompt_ids) : end] = True
        # No attention mask: pads are on the right, where no real token of a causal model looks.
        hidden = model.model(input_ids[:, :-1]).last_hidden_state  # (B, T - 1, D)
        logits = model.lm_head(hidden[in_reply[:, 1:]])  # (N, V): one row per token of the replies
        loss = F.cross_entropy(logits, input_ids[in_reply])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad()
        if step % 100 == 0:
            print(f"{name} {step}/{steps} loss {loss.item():.3f}", flush=True)


# ---- 4. Scoring ----------------------------------------------------------------------------------
@torch.no_grad()
def sample(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> list[str]:
    """One reply per prompt, temperature 0.7, full distribution, at most 160 tokens."""
    pad = tokenizer.pad_token_id
    width = max(map(len, prompts))
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts])  # left padded
    # All explicit: generate would fill gaps from the model's own generation_config.
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": pad}
    knobs = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "max_new_tokens": 160}
    config = GenerationConfig(**knobs, **special)
    mask = (input_ids != pad).long()
    output = model.generate(input_ids, attention_mask=mask, generation_config=config)
    return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)


def score(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    split: Split,
    skill: str,
    thinking: bool,
    repeats: int,
) -> float:
    """Percent of right replies: the last box for a solution, the very text for a tool turn."""
    model.eval()
    set_seed(0)
    rng = np.random.default_rng(0)
    rows, chains = split[0] * repeats, split[1] * repeats
    examples = [
        make_example(rng, chain, skill, 0.0, row) for row, chain in zip(rows, chains, strict=True)
    ]
    prompts = [encode(tokenizer, example, thinking=thinking)[0] for example in examples]
    hits = 0
    for text, row, (_, _, reply) in zip(
        sample(model, tokenizer, prompts), rows, examples, strict=True
    ):
        answers = re.findall(r"\\boxed\{(.*?)\}", text)
        hits += text == reply if skill == "tools" else answers[-1:] == [row["answer"]]
    return 100 * hits / len(rows)


# ---- 5. Building ---------------------------------------------------------------------------------
TESTS = {  # row of the printed table -> (data file, skill, thinking, samples per problem)
    "plain": ("test", "plain", False, 4),
    "plain, thinking": ("test", "plain", True, 4),
    "plain, longer": ("test_ood", "plain", False, 4),
    "reference": ("test", "reference", True, 1),
    "rewrite": ("test", "rewrite", True, 1),
    "guided rewrite": ("test", "guided_rewrite", True, 1),
    "tool turn": ("test", "tools", True, 1),
}


def make_splits(seed: int) -> dict[str, Split]:
    """The three data files; no chain is in two of them."""
    rng = np.random.default_rng(seed)
    splits, used = {}, set()
    sizes = {"test": (200, 3, 6), "test_ood": (100, 7, 8), "train": (2000, 3, 6)}
    for name, (count, shortest, longest) in sizes.items():
        rows, chains = splits[name] = [], []
        while len(rows) < count:
            chain = make_chain(rng, shortest, longest)
            if chain not in used:
                used.add(chain)
                chains.append(chain)
                rows.append(make_row(rng, chain, f"{name}-{len(rows):04d}"))
    return splits


def build_model(recipe: Recipe, splits: dict[str, Split], folder: Path, args: Args) -> list[str]:
    """Train, save and score one model; its column of the table."""
    torch.set_num_threads(1)  # more would change the last bits, and thrash on a busy machine
    start = time.perf_counter()
    tokenizer = make_tokenizer(recipe, args.seed)
    set_seed(args.seed)
    model = make_model(recipe, tokenizer)
    held_out = {*splits["test"][1], *splits["test_ood"][1]}
    steps = max(1, round(args.scale * recipe.steps))
    data = batches(recipe, tokenizer, held_out, steps, args.seed + 1)
    train(model, data, steps, recipe.name)
    seconds = time.perf_counter() - start
    save(folder / recipe.name, model, tokenizer)
    column = [f"{model.num_parameters():,}", f"{seconds:.0f}"]
    taught = dict(zip(PROMPTS, recipe.skills, strict=True))
    for name, *test in TESTS.values():
        rows, chains = splits[name]
        count = max(1, round(len(rows) * min(1.0, args.scale)))  # a smoke test scores few as well
        split = rows[:count], chains[:count]
        right = score(model, tokenizer, split, *test) if taught[test[0]] else None
        column.append("-" if right is None else f"{right:.1f}")
    return column


def main(args: Args) -> None:
    if args.out.exists() and any(args.out.iterdir()):
        problem = ""
        if not args.force:
            problem = f"{args.out} is not empty: give another --out, or --force to replace it."
        elif not (args.out / "student" / "config.json").exists():
            problem = f"{args.out} is not a build of this script: give another --out."
        if problem:
            print(problem, file=sys.stderr)
            sys.exit(2)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    splits = make_splits(args.seed)
    # Built beside its place and then moved, so that a killed build leaves the old one whole.
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=".tiny-") as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir()
        for name, (rows, _) in splits.items():
            lines = [json.dumps(row) + "\n" for row in rows]
            (fresh / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.workers, mp_context=spawn) as pool:
            jobs = [pool.submit(build_model, recipe, splits, fresh, args) for recipe in RECIPES]
            columns = [job.result() for job in jobs]
        if args.out.exists():
            args.out.rename(Path(scratch) / "old")
        fresh.rename(args.out)
    print("percent right at temperature 0.7; plain: mean of 4 samples")
    table = [("", *(recipe.name for recipe in RECIPES))]
    table += zip(["parameters", "seconds", *TESTS], *columns, strict=True)
    for head, *cells in table:
        print(f"{head:16}", *(f"{cell:>14}" for cell in cells))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
