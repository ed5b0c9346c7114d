r"""The benchmarks that eval.py knows: where they lie, what the model is asked, who judges it.

    kind   asked                                   judged by
    math   the problem, boxed answer wanted        last \boxed{...}, math-verify (common.py)
    code   the problem, a Python block wanted      its tests, run in the sandbox (codebench.py)
    calls  a request and the functions on offer    BFCL's rules (bfcl.py)

A local .jsonl or .parquet file is of the kind that its columns say (`SIGNS`), else math.
`Problem.row` keeps a data set's own columns where a grader needs them.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import codebench
import common
from bfcl import parse_calls, score_item, tools_of
from common import Problem, Stop

# ---- 1. Data sets --------------------------------------------------------------------------------
# common.load_problems knows the columns of all math sets but two: problem (MATH-500, AIME, HMMT,
# BeyondAIME) or question (AMC, Minerva, GSM8K), and answer. From public code that reads these sets;
# not run, because the hub is out of reach here.
KNOWN: dict[str, tuple[str, str]] = {
    "math500": ("HuggingFaceH4/MATH-500", "test"),  # 500
    "aime24": ("HuggingFaceH4/aime_2024", "train"),  # 30; the set has no other split
    "aime25": ("yentinglin/aime_2025", "train"),  # 30; no other split
    "hmmt25": ("MathArena/hmmt_feb_2025", "train"),  # 30; PW-OPSD has a local copy of it
    "amc23": ("math-ai/amc23", "test"),  # 40
    "minerva": ("math-ai/minervamath", "test"),  # 272
    "olympiad": ("math-ai/olympiadbench", "test"),  # 674
    "beyondaime": ("ByteDance-Seed/BeyondAIME", "test"),  # 100
    "amobench": ("meituan-longcat/AMO-Bench", "test"),  # 50, of which 39 graded by rule
    "gsm8k": ("openai/gsm8k", "test"),  # 1,319
}
CONFIGS = {"gsm8k": "main"}


def olympiad_problem(row: dict) -> Problem:
    """OlympiadBench: final_answer and solution are lists; a context, if any, comes first."""
    prompt = "\n".join(text for text in (row.get("context"), row["question"]) if text)
    answer = ", ".join(str(a).strip(" $") for a in row["final_answer"] or [])
    return Problem(str(row.get("id", "")), prompt, answer, "\n".join(row.get("solution") or []))


def amobench_problem(row: dict) -> Problem | None:
    """AMO-Bench: the answer may be boxed; the 11 descriptions need a judge and are left out."""
    if row["answer_type"] == "description":
        return None
    answer = common.extract_answer(str(row["answer"])) or str(row["answer"])
    return Problem(str(row["question_id"]), row["prompt"], answer, row.get("solution"))


READERS = {"olympiad": olympiad_problem, "amobench": amobench_problem}  # sets with own columns
LOCAL = (".jsonl", ".parquet")


def load_benchmark(name: str) -> list[Problem]:
    """Problems of a known short name, of its hub id, or of a local .jsonl or .parquet file.

    Stops on any other name, on unreadable data, on equal ids, and on problems that nothing grades.
    """
    short = short_name(name)
    if name.endswith(LOCAL):
        rows = common.load_rows(name)
        kind = kind_of(rows[0])
        rows = [row for row in rows if row.get("id") not in NO_VERDICT]
        problems = [row_problem(name, row, kind) for row in rows] if kind != "math" else None
        problems = problems or common.load_problems(name)
    elif short not in KNOWN:
        raise Stop(
            f"unknown benchmark {name!r}: give one of {', '.join(KNOWN)}, the hub id of one of "
            "them, or a local .jsonl or .parquet file."
        )
    elif short in READERS:
        rows = common.load_rows(*KNOWN[short])
        problems = [p for row in rows if (p := READERS[short](row))]
    else:
        problems = common.load_problems(*KNOWN[short], config=CONFIGS.get(short))
    unanswered = [p.id for p in problems if p.kind == "math" and p.answer in ("", "None")]
    if unanswered:  # "None": no answer column
        raise Stop(f"{name}: problem {unanswered[0]} has no answer, so it cannot be graded.")
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise Stop(f"{name}: the id {problem.id!r} is there twice; give each problem its own.")
        seen.add(problem.id)
    return problems


def short_name(name: str) -> str:
    """The key of KNOWN for a short name or hub id; the file name of a local file."""
    by_id = {hub: short for short, (hub, _) in KNOWN.items()}
    return Path(name).name if name.endswith(LOCAL) else by_id.get(name, name)


# Left out: the outputs of Mbpp/255's reference on its plus inputs need more than 4 GiB.
NO_VERDICT = ("Mbpp/255",)
CODE_KINDS = ("humaneval", "humaneval_plus", "mbpp", "mbpp_plus", "livecodebench")
# kind -> columns that its rows must have
SIGNS = {
    "livecodebench": {"question_content", "starter_code", "public_test_cases"},
    "humaneval_plus": {
        "id",
        "problem",
        "answer",
        "entry_point",
        "base_input",
        "plus_input",
        "atol",
    },
    "humaneval": {"id", "problem", "entry_point", "test"},
    "mbpp": {"id", "problem", "test_setup_code", "test_list"},
    "calls": {"id", "function", "answer"},
}


def kind_of(row: dict) -> str:
    """The kind that a row's columns say; one telling column is enough, see `row_problem`."""
    telling = {"public_test_cases": "livecodebench", "plus_input": "humaneval_plus"}
    telling |= {"test": "humaneval", "test_list": "mbpp", "function": "calls"}
    kind = next((kind for column, kind in telling.items() if column in row), "math")
    mbpp = kind == "humaneval_plus" and str(row.get("id", "")).startswith("Mbpp/")
    return "mbpp_plus" if mbpp else kind


def row_problem(name: str, row: dict, kind: str) -> Problem:
    """A problem that keeps its row; stops when a column is missing that its grader needs."""
    needed = SIGNS["humaneval_plus" if kind == "mbpp_plus" else kind]
    missing = ", ".join(sorted(needed - row.keys()))
    if missing or (kind == "calls" and not {"messages", "problem"} & row.keys()):
        lacks = missing or "messages or problem"
        raise Stop(f"{name}: item {row.get('id')!r} lacks {lacks}, which {kind} items have.")
    key = str(row.get("id") or row.get("question_id"))
    text = row.get("problem") or row.get("question_content")
    if kind == "calls" and not text:
        text = "\n".join(message["content"] for message in row["messages"])
    return Problem(key, text, json.dumps(row.get("answer")), kind=kind, row=row)


# ---- 2. Kinds: what the model is asked, and who judges it ----------------------------------------
PROMPT = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."
CALLS_SYSTEM = (  # for templates that show no tools [ours]
    "You can call these functions, given as JSON:\n{tools}\nAnswer a request with calls only, "
    'each as {"name": ..., "arguments": {...}} in one JSON list. If none of the functions fits, '
    "say so in words instead."
)
Chat = tuple[list[dict], list[dict] | None]  # messages, tools


@dataclass(frozen=True)
class Kind:
    """How problems of one kind are asked and judged; rows of `grade` have answer and correct."""

    chat: Callable[[Problem, str, Any], Chat]  # problem, math prompt, tokenizer -> messages, tools
    grade: Callable[[list[Problem], list[str]], list[dict]]  # problems, completions -> rows
    scores: tuple[str, ...] = ()  # further 0/1 columns of the rows, averaged like `correct`
    majority: bool = False  # whether answers of two samples can be the same one
    found: str = "boxed_frac"  # name of the share of completions that hold an answer at all


def chat_ids(tokenizer: Any, problem: Problem, *, prompt: str, thinking: bool) -> list[int]:
    """The problem as the model reads it; `prompt` has {problem} where a math problem goes."""
    messages, tools = KINDS[problem.kind].chat(problem, prompt, tokenizer)
    return common.chat_prompt_ids(tokenizer, messages, thinking=thinking, tools=tools)


def grade(problems: list[Problem], completions: list[str]) -> list[dict]:
    """One row per completion, in order: answer, correct and the kind's own scores."""
    rows: list[dict] = [{}] * len(problems)
    for name, kind in KINDS.items():
        mine = [n for n, problem in enumerate(problems) if problem.kind == name]
        graded = kind.grade([problems[n] for n in mine], [completions[n] for n in mine])
        for n, row in zip(mine, graded, strict=True):
            rows[n] = row
    return rows


def math_chat(problem: Problem, prompt: str, _tokenizer: Any) -> Chat:
    return [{"role": "user", "content": common.fill(prompt, problem=problem.prompt)}], None


def grade_math(problems: list[Problem], completions: list[str]) -> list[dict]:
    rows = []
    for problem, completion in zip(problems, completions, strict=True):
        answer = common.extract_answer(completion)
        correct = answer is not None and same_answer(problem.answer, answer)
        rows.append({"answer": answer, "correct": correct})
    return rows


@lru_cache(maxsize=2**16)
def same_answer(a: str, b: str) -> bool:
    """common.same_answer, which is symmetric; samples repeat the same few strings, so cached."""
    return common.same_answer(a, b)


def calls_chat(problem: Problem, _prompt: str, tokenizer: Any) -> Chat:
    """The request, with the functions in the chat template, or in words where it has no tools."""
    messages = problem.row.get("messages") or [{"role": "user", "content": problem.prompt}]
    tools = tools_of(problem.row)
    if shows_tools(tokenizer):
        return messages, tools
    system = common.fill(CALLS_SYSTEM, tools=json.dumps([t["function"] for t in tools]))
    rest = messages
    if messages[0]["role"] == "system":
        system, rest = f"{messages[0]['content']}\n\n{system}", messages[1:]
    # Some templates (Gemma) know no system turn, so it opens the first user turn.
    first = {"role": "user", "content": f"{system}\n\n{rest[0]['content']}"}
    return [first, *rest[1:]], None


def shows_tools(tokenizer: Any) -> bool:
    """Whether the chat template does anything with tools."""
    tool = {"name": "a_tool", "description": "", "parameters": {"type": "object", "properties": {}}}
    turn = [{"role": "user", "content": "x"}]
    shown = tokenizer.apply_chat_template(
        turn, tools=[{"type": "function", "function": tool}], tokenize=False
    )
    return "a_tool" in shown


def grade_calls(problems: list[Problem], completions: list[str]) -> list[dict]:
    rows = []
    for problem, completion in zip(problems, completions, strict=True):
        calls = parse_calls(completion)
        verdict = score_item(problem.row, calls)
        rows.append({
            "answer": None if calls is None else json.dumps(calls, default=str),
            "correct": verdict["full_correct"], "name_correct": verdict["name_correct"],
        })  # fmt: skip
    return rows


def code_chat(problem: Problem, _prompt: str, _tokenizer: Any) -> Chat:
    return [{"role": "user", "content": codebench.prompt(problem.row, problem.kind)}], None


def grade_code(problems: list[Problem], completions: list[str]) -> list[dict]:
    if not problems:
        return []
    workers, kind = os.cpu_count() or 1, problems[0].kind
    verdicts = codebench.grade([p.row for p in problems], completions, kind, workers)
    return [{"answer": v["code"] or None, "correct": v["passed"], "status": v["status"],
             **({"base": v["base"]} if "base" in v else {})} for v in verdicts]  # fmt: skip


CODE = Kind(code_chat, grade_code, found="code_frac")
PLUS = Kind(code_chat, grade_code, ("base",), found="code_frac")
KINDS = {
    **{name: PLUS if name in codebench.PLUS else CODE for name in CODE_KINDS},
    "math": Kind(math_chat, grade_math, majority=True),
    "calls": Kind(calls_chat, grade_calls, ("name_correct",), found="parsed"),
}
