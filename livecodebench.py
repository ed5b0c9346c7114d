"""LiveCodeBench code generation, as lcb_runner does it: prompt, extraction, tests, comparison.

Rows are those of livecodebench/code_generation_lite, release_v6: question_content, starter_code,
public_test_cases, private_test_cases, metadata (and platform, difficulty, contest_date, not read).
Read from lcb_runner's repository: prompt, PRELUDE, same_output. From memory: the zipped tests, and
that the last two fences count (the version read took the first two).
"""

import base64
import io
import json
import pickle
import zlib
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any

SYSTEM = (  # lcb_runner prompts/code_generation.py; so the next three
    "You are an expert Python programmer. You will be given a question (problem specification) and "
    "will generate a correct Python program that matches the specification and passes all tests."
)
ASK = (
    "### Question:\n{question}\n\n### Format: {format}\n```python\n{starter}\n```\n\n"
    "### Answer: (use the provided format with backticks)\n\n"
)
WITH_STARTER = (
    "You will use the following starter code to write the solution to the problem and enclose your "
    "code within delimiters."
)
WITH_STDIN = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly "
    "test on the sample inputs). Enclose your code within delimiters as follows."
)


def prompt(row: dict) -> str:
    """The user turn; it begins with what lcb_runner sends as the system turn."""
    starter = row["starter_code"]
    ask = ASK.format(
        question=row["question_content"],
        format=WITH_STARTER if starter else WITH_STDIN,
        starter=starter or "# YOUR CODE HERE",
    )
    return f"{SYSTEM}\n\n{ask}"


def last_fenced_block(text: str) -> str:
    """The lines between the last two that hold ```; "" with fewer than two. Source: lcb_runner."""
    lines = text.split("\n")
    fences = [i for i, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) > 1 else ""


STARRED = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools "
    "operator io sys json"
)
PRELUDE = (  # what lcb_runner's testing_util.py imports before each program
    "".join(f"from {name} import *\n" for name in [*STARRED.split(), "builtins", "typing"])
    + f"import {STARRED.replace(' ', ', ')}\nsys.setrecursionlimit(50000)\n"
)


def tests(row: dict) -> list[dict]:
    """Public, then private tests, each with input, output and testtype: stdin or functional."""
    return json.loads(row["public_test_cases"]) + _private(row["private_test_cases"])


@lru_cache(maxsize=16)  # up to many MB each
def _private(text: str) -> list[dict]:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        packed = zlib.decompress(base64.b64decode(text))
        return json.loads(_StrUnpickler(io.BytesIO(packed)).load())


class _StrUnpickler(pickle.Unpickler):
    """Loads a str and nothing else: a pickle that names a class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"test cases must not hold {module}.{name}")

    def load(self) -> str:
        if not isinstance(value := super().load(), str):
            raise pickle.UnpicklingError(f"test cases are {type(value).__name__}, not str")
        return value


def same_output(ours: str, theirs: str) -> bool:
    """Equal line by line, all stripped; or equal as decimals, exactly (lcb_runner)."""
    pairs = [[line.strip() for line in text.strip().split("\n")] for text in (ours, theirs)]
    if len(pairs[0]) != len(pairs[1]):
        return False
    try:
        return all(
            a == b or [*map(Decimal, a.split())] == [*map(Decimal, b.split())]
            for a, b in zip(*pairs, strict=True)
        )
    except InvalidOperation:
        return False
