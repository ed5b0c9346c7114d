"""codebench.py: completion -> code -> verdict, on own rows, and on real ones where ../shared is."""

import ast
import base64
import gzip
import json
import os
import pickle
import random
import time
import warnings
import zlib
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import ROOT

import codebench
import livecodebench
from code_extract import extract_code, longest_valid_run
from codebench import close, entry_point, grade, judge, program, prompt, reference_outputs
from livecodebench import last_fenced_block, same_output
from sandbox import run_many, run_python

SHARED = Path(os.environ.get("SHARED", ROOT.parent / "shared")) / "data"

# ---- Completion -> code --------------------------------------------------------------------------
F = "def f(x):\n    return x + 1"
G = "def g(x):\n    return 2 * x"
CASES = {  # name: (completion, entry point, code); EvalPlus 0.3.1 gives the same for each, run once
    "bare": (F, "f", F),
    "fence": (f"```python\n{F}\n```", "f", F),
    "prose around": (f"Sure, here's it:\n\n```python\n{F}\n```\n\nIt's right.", "f", F),
    "no fence": (f"Here is the function.\n\n{F}\n\nDon't thank me.", "f", F),
    "unclosed fence": (f"Code:\n```python\n{F}", "f", F),
    "no language": (f"```\n{F}\n```", "f", F),
    "wrong language": (f"```javascript\n{F}\n```", "f", F),
    "tests after": (f"{F}\n\nassert f(1) == 2\nprint(f(2))", "f", F),
    "main block": (f"{F}\n\nif __name__ == '__main__':\n    f(1)", "f", F),
    "longest of several": (f"```\nx = 1\n```\nno:\n```\n{F}\n    # so\n```", "f", F),
    "first of equals": (f"```\n{F}\n```\nor it's\n```\n{F[:-1]}2\n```", "f", F),
    "helper kept": (f"{G}\n\ndef f(x):\n    return g(x)", "f", f"{G}\ndef f(x):\n    return g(x)"),
    "helper in an f-string": (
        G + "\ndef f(x):\n    return f'{g(x)}'", "f", G + "\ndef f(x):\n    return f'{g(x)}'",
    ),
    "idle helper dropped": (f"{G}\n{F}", "f", F),
    "no entry point: all kept": (f"{G}\n{F}", "", f"{G}\n{F}"),
    "imports first, all kept": (
        f"{F}\nimport os\nfrom re import sub", "f", f"import os\nfrom re import sub\n{F}",
    ),
    "future import dropped": (f"from __future__ import annotations\n{F}", "f", F),
    "constant kept": ("N = 3\nM = 4\ndef f(x): return N", "f", "N = 3\ndef f(x): return N"),
    "attribute counts as a use": (
        "y = 3\ndef f(x):\n    return x.y", "f", "y = 3\ndef f(x):\n    return x.y",
    ),
    "no return, no function": (f"def g(x):\n    x.sort()\n{F}", "f", F),
    "decorated dropped": (f"@cache\n{F}\n{G}", "", G),
    "first definition counts": (f"{F}\n{F[:-1]}2", "f", F),
    "class kept": ("class A:\n    n = 1\ndef f(x):\n    return A", "f",
                   "class A:\n    n = 1\ndef f(x):\n    return A"),
    "annotated": ("n: int = 2\ndef f(x): return n", "f", "n: int = 2\ndef f(x): return n"),
    "unpacking has no name": ("a, b = 1, 2\ndef f(x): return a", "f", "def f(x): return a"),
    "try import dropped": (f"try:\n    import os\nexcept ImportError:\n    pass\n{F}", "f", F),
    "semicolons": ("a = 1; b = 2\ndef f(x):\n    return b", "f", "b = 2\ndef f(x):\n    return b"),
    "think block is searched too": (
        f"<think>\nit's {G}\nx = 1\n# a\n# b\n</think>\n{F}", "", "x = 1",
    ),
    "indented block": ("1. So:\n\n    def f(x):\n        return x\n", "f", "1. So:"),
    "cut in the body": (f"{F}\n\ndef g(x):\n    y = (x +", "f", F),
    "cut in a try": (f"{F}\n\ndef g(x):\n    try:\n        return 1\n", "f", F),
    "unclosed string": (f'{F}\n\nt = """', "f", F),
    "one line": ("x = 1", "f", "x = 1"),
    "one line in prose": ("It's\nx = 1\nas you'd know", "f", "It's"),
    "nothing": ("", "f", ""),
    "no code": ("I can't do it.\nSorry, it's hard.", "f", "I can't do it."),
    "body alone": ("    return x + 1", "f", "    return x + 1"),
    "other alphabet": (
        "é = 'ß'; ü = 1\ndef f(x):\n    return ü", "f", "ü = 1\ndef f(x):\n    return ü",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_extraction(name):
    text, entry, code = CASES[name]
    assert extract_code(text, entry) == code


def test_windows_and_old_line_ends():
    for end in ("\r\n", "\r"):
        assert extract_code(f"Here's:\n```\n{F}\n```\nIt's it".replace("\n", end), "f") == F


def run_of_every_pair(text):
    """EvalPlus' rule as it is stated: parse every run of two lines or more."""
    lines = text.split("\n")
    most, best = 0, lines[:1]
    for i in range(len(lines)):
        for j in range(i + 2, len(lines) + 1):
            try:
                ast.parse("\n".join(lines[i:j]))
            except SyntaxError:
                continue
            if sum(bool(line.strip()) for line in lines[i:j]) > most:
                most, best = sum(bool(line.strip()) for line in lines[i:j]), lines[i:j]
    return "\n".join(best)


PIECES = [
    "", "  ", "```", "It's (so", '"""', "'''", "try:", "    x = 1", "except E:", "    pass",
    "else:", "@deco", "class A:", "def f(x):", "    return x", "x = (1,", "     2)", "]",
    "x = [", "# a",
    "    # b", "if x: y = 1; z = 2", "a = 1; b = '''", "\treturn 1", "x = 1 \\", "+ 2", "match x:",
    "    case 1:", "        pass", "1. so", "print(f'{x}')", "finally:", "with f:", "return 5",
]  # fmt: skip


def test_the_run_is_that_of_parsing_every_pair():
    rng = random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(600):
            text = "\n".join(rng.choices(PIECES, k=rng.randint(1, 12)))
            assert longest_valid_run(text) == run_of_every_pair(text), repr(text)


@pytest.mark.parametrize(
    "line",
    ["It's a long (explanation of it", "x = f(1)", "", "    y = 1", "def f(x): return x", "f(",
     '"""',      "[" * 50, "- - -", "try:", "# a", "{'a': [", "x" * 40 + "\\"],
)  # fmt: skip
def test_16k_tokens_take_seconds_at_most(line):
    start = time.process_time()
    long_function = "def g(x):\n" + "    x = x + 1\n" * 700 + "    it's\n    return x\n"
    extract_code((line + "\n") * 1600 + f"try:\n    {line}\n" + long_function + F, "f")
    assert time.process_time() - start < 15


def test_deep_nesting_and_nul_are_no_code():
    for bad in ("(" * 5000, "-" * 20000 + "1", "x = 1\0", "x = '\ud800'"):
        assert extract_code(f"{F}\n{bad}\nit's {bad}\n", "f") in (F, f"{F}\n{bad}")


def test_last_fenced_block():
    assert last_fenced_block("a\n```python\nx\n```\nb\n```\ny\nz\n```\nc") == "y\nz"
    assert last_fenced_block("```py\nx") == last_fenced_block("x") == ""
    assert last_fenced_block("```\nx\n```\n```\n") == ""  # an opened third one ends the pair


# ---- Rows of our own -----------------------------------------------------------------------------
HUMANEVAL = {
    "id": "HumanEval/x", "entry_point": "add_all", "answer": "    return [twice(x) for x in xs]\n",
    "problem": 'from typing import List\n\n\ndef twice(x):\n    return 2 * x\n\n\n'
    'def add_all(xs: List[int]) -> List[int]:\n    """Double each: it\'s {easy}."""\n',
    "test": "def check(candidate):\n    assert candidate([1, 2]) == [twice(1), 4]\n"
    "    assert add_all([]) == []\n    assert all(abs(x) == 2 for x in candidate([1, -1]))\n",
}  # fmt: skip
MBPP = {
    "id": "mbpp-x", "problem": "Sum the values.", 
    "answer": "def total(n):\n    return n.v + sum(n.w)\n",
    "test_setup_code": "n = Node(1, [2])", "challenge_test_list": ["assert False"],
    "test_list": ["assert total(n) == 3", "assert total(Node(0, [])) == 0"],
}  # fmt: skip
NODE = "class Node:\n    def __init__(self, v, w):\n        self.v = v\n        self.w = w\n"


def plus_row(name, answer, base, plus, atol=0, number="x", problem=""):
    return {
        "id": f"Mbpp/{number}", "entry_point": name, "problem": problem, "answer": answer,
        "base_input": base, "plus_input": plus, "atol": atol,
    }  # fmt: skip


DOUBLE = plus_row("f", "def f(x):\n    return x * 2\n", [[1], [2]], [[0.5], [[1]], ["a"]])


def status(row, code, kind, tests="plus"):
    return run_python(**program(row, code, kind, tests)).status


def test_humaneval():
    whole = "def add_all(xs):\n    return [2 * x for x in xs]"
    typed = "def add_all(xs: List[int]):\n    return [twice(x) for x in xs]"
    for code in (HUMANEVAL["answer"], whole, typed):
        assert status(HUMANEVAL, code, "humaneval") == "passed"
    wrong = ["", "    return xs", whole.replace("2", "3"), "def other(xs):\n    return xs"]
    wrong += [whole.replace("[2 * x for x in xs]", "None"), f"{whole}\nraise ValueError"]
    jobs = [program(HUMANEVAL, code, "humaneval") for code in wrong]
    assert {r.status for r in run_many(jobs, 2)} == {"failed"}


def test_mbpp():
    assert entry_point(MBPP) == "total"
    assert status(MBPP, NODE + MBPP["answer"], "mbpp") == "passed"
    assert status(MBPP, MBPP["answer"], "mbpp") == "failed"  # the setup needs Node
    assert status(MBPP, NODE + "def total(n):\n    return 3", "mbpp") == "failed"  # the second test
    (row,) = grade([MBPP], [f"Here's it:\n```python\n{NODE}{MBPP['answer']}```"], "mbpp", 1)
    assert row["passed"]


CHEATS = {
    "builtins of its own": "all = abs = sum = isinstance = set = zip = lambda *a, **k: []\n"
    "exec = print = range = len = lambda *a, **k: None\ntype = lambda x: 1\n",
    "close and judge of its own": "def close(*a): return True\ndef judge(*a): return True\n"
    "tested = right = load = check = judge\n",
    "patched modules": "import math, cmath, marshal, itertools, base64, json\n"
    "marshal.loads = json.loads = lambda t: []\ncmath.isfinite = lambda x: True\n",
    "equal to all": "class A(list):\n    def __eq__(self, o): return True\n"
    "    def __hash__(self): return 0\n",
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_fail(name):
    result = "A()" if "class A" in CHEATS[name] else "x"
    jobs = [program(DOUBLE, f"{CHEATS[name]}def f(x):\n    return {result}", "mbpp_plus")]
    answer = f"{CHEATS[name]}def add_all(x):\n    return {result}"
    jobs += [program(HUMANEVAL, answer, "humaneval")]
    answer = f"{CHEATS[name]}{NODE}def total(n):\n    return {result.replace('x', '5')}"
    jobs += [program(MBPP, answer, "mbpp")]
    assert [r.status for r in run_many(jobs, 2)] == ["failed"] * 3


def test_plus_verdicts():
    answers = {
        DOUBLE["answer"]: (True, True),
        "def f(x):\n    return x + x": (True, True),
        "def f(x):\n    return int(x) * 2": (True, False),  # right on the base tests only
        "def f(x):\n    return {0.5: 1.0, 'a': 'aa'}.get(x, [1, 1])": (False, False),
        "def f(x):\n    return None": (False, False),
    }
    rows = grade([DOUBLE] * len(answers), [f"So:\n```\n{a}\n```" for a in answers], "mbpp_plus", 2)
    assert [(r["base"], r["plus"]) for r in rows] == list(answers.values())
    assert [r["passed"] for r in rows] == [r["plus"] for r in rows]
    assert rows[0].keys() == {"passed", "base", "plus", "status", "code"}
    assert rows[1]["code"] == "def f(x):\n    return x + x"


def test_a_humaneval_completion_may_repeat_the_function_or_continue_it():
    row = HUMANEVAL | {"base_input": [[[1, 2]]], "plus_input": [[[3]]], "atol": 0}
    whole = row["problem"] + row["answer"]
    bodies = [
        "    return [2 * x for x in xs]\n\nprint(1)\n",
        f"Fine:\n```python\n{whole}```\nIt's so",
    ]
    bodies += [
        f"<think>\n{whole.replace('[twice(x)', '[x') * 2}\n</think>\n```\n{whole}```",
        "    return xs",
        "no idea",
    ]
    for kind in ("humaneval", "humaneval_plus"):
        rows = grade([row] * 5, bodies, kind, 2)
        assert [r["passed"] for r in rows] == [True, True, True, False, False], kind


def test_the_reference_runs_once_and_never_beside_the_program(monkeypatch):
    codes = []
    monkeypatch.setattr(
        codebench,
        "run_python",
        lambda code, **job: codes.append((code, job)) or run_python(code, **job),
    )
    row = plus_row("f", "def f(x):\n    return x + 12321\n", [[1]], [[2]])
    grade([row] * 3, ["def f(x):\n    return x + 12300 + 21"] * 3, "mbpp_plus", 1)
    assert sum("12321" in code for code, _ in codes) == 2  # base and plus
    assert not any("12321" in job["check"] for _, job in codes)
    assert len(codes) == 2 + 6
    with pytest.raises(RuntimeError, match="reference"):
        reference_outputs("def f(x):\n    return 1 / 0", "f", codebench._packed_inputs(row, "base"))


ACCEPTED = [  # function, reference returns, another output, verdict
    ("are_equivalent", "True", "False", True),
    ("sum_div", "7", "0", True),
    ("sum_div", "7", "8", False),
    ("other", "7", "0", False),
    ("surface_Area", "1", "35", True),  # 3 * 3 + 2 * 3 * hypot(1.5, 4) = 34.6
    ("surface_Area", "1", "36", False),
    ("digit_distance_nums", "0", "1", True),
    ("digit_distance_nums", "0", "2", False),
    ("Diff", "[1, 2, 2]", "(2, 1)", True),
    ("Diff", "[1, 2]", "[1, 3]", False),
    ("other", "[1, 2]", "[2, 1]", False),
    ("check_str", "__import__('re').match('a', 'a')", "True", True),
    ("check_str", "__import__('re').match('a', 'a')", "'x'", True),
    ("check_str", "__import__('re').match('a', 'a')", "False", False),
    ("check_str", "None", "__import__('re').match('a', 'b')", True),
    ("other", "1.0", "1.0 + 5e-7", True),  # floats are close to 1e-6
    ("other", "1.0", "1.0 + 5e-6", False),
    ("other", "1.0", "1", True),
    ("other", "[1.0, 2.0]", "(1.0, 2.0)", False),
    ("other", "[1.0, 2.0]", "[1.0, 2.0 + 1e-9]", True),
    ("other", "[1.0, 2]", "[1.0 + 1e-9, 2]", False),  # not all are floats
    ("other", "{1, 2}", "{2, 1}", True),
    ("other", "float('nan')", "float('nan')", False),
    ("other", "float('inf')", "float('inf')", True),
    ("other", "float('inf')", "1e300", False),
    ("other", "1 + 2j", "complex(1, 2)", True),
]


def test_oracles():
    jobs = []
    for name, reference, other, _ in ACCEPTED:
        row = plus_row(name, f"def {name}(a, b):\n    return {reference}\n", [[3, 4]], [[3, 4]])
        jobs.append(program(row, f"def {name}(a, b):\n    return {other}", "mbpp_plus"))
    verdicts = [r.status == "passed" for r in run_many(jobs, 2)]
    assert verdicts == [right for *_, right in ACCEPTED]


def test_find_zero_is_judged_by_its_polynomial_alone():
    row = plus_row(
        "find_zero", "def find_zero(xs):\n    return 1.0\n", [], [[[-1, 1]], [[-4, 0, 1]]], 1e-4
    )
    both = "def find_zero(xs):\n    return {} if len(xs) == 2 else {}"
    for values, right in (((1, 2), 1), ((1.00001, -2), 1), ((1.0, 1.0), 0), ((1.0, 1.9), 0)):
        assert (status(row, both.format(*values), "humaneval_plus") == "passed") == right


def test_closeness():
    assert close([1.0, [2]], (1.05, [2.0]), 0.1)
    assert not close([1.0], [1.0, 1.0], 1)  # no broadcasting
    assert not close([1.0], 1.0, 1)
    assert not close("a", "a", 1)
    assert not close(None, 0, 1)
    assert not close(1.0, float("inf"), 1)
    assert not close(float("nan"), 1.0, 1)
    assert close(1e9 + 50, 1e9, 0)  # relative 1e-7
    assert not close(1e9 + 150, 1e9, 0)
    assert close(1 + 1j, 1 + 1.05j, 0.1)
    assert close(True, 1, 0)


def test_a_float_makes_the_tests_after_it_tolerant():
    def right(out, exp, args, atol):
        return out == exp

    outputs = iter([1.0, 5, 1 + 1e-9, 1.0])
    with pytest.raises(AssertionError):
        judge(lambda x: 1 + 1e-9, right, [[1]], [Fraction(1)], 0, False)
    judge(lambda x: next(outputs), right, [[1]] * 3, [1.0, 5, 1.0], 0, False)
    with pytest.raises(AssertionError):
        judge(lambda x: [1.0 + 1e-9, 1], right, [[1]], [[1.0, 1]], 0, False)
    judge(lambda x: [1.0 + 1e-9, 1], right, [[1], [1]][:1], [[1.0, 1]], 1e-6, False)
    with pytest.raises(ValueError, match="shorter"):
        judge(lambda x: x, right, [[1], [2]], [1], 0, False)


@pytest.mark.parametrize(
    ("number", "arguments", "seen"),
    [
        ("2", [[1], [2]], "[(1,), (2,)]"),
        ("63", [[[1], [2]]], "[[(1,), (2,)]]"),
        ("75", [[[1]], 2], "[[(1,)], 2]"),
        ("307", [[1], 2, [3]], "[(1,), 2, [3]]"),
        ("106", [[1], [2]], "[[1], (2,)]"),
        ("259", [[[1]], [[2]]], "[((1,),), ((2,),)]"),
        ("580", [[1, [2, [3]]]], "[(1, (2, (3,)))]"),
        ("278", [[1, [2]]], "[(1, (2,))]"),
        ("722", [{"a": [1]}, 2], "[{'a': (1,)}, 2]"),
        ("115", [[[1], [], 2]], "[[{1}, {}, {}]]"),
        ("124", ["1", "2j"], "[1.0, 2j]"),
        ("252", ["1+2j"], "[(1+2j)]"),
        ("3", [[1], [[2]]], "[[1], [[2]]]"),
    ],
)
def test_inputs_reach_the_program_as_in_evalplus(number, arguments, seen):
    row = plus_row("f", "def f(*args):\n    return True", [], [arguments], number=number)
    code = f"def f(*args):\n    return repr([*args]) == {seen!r}"
    assert status(row, code, "mbpp_plus") == "passed"


def test_prompts():
    ask = prompt(DOUBLE | {"problem": '"""\nDouble {it}.\n"""\n'}, "mbpp_plus")
    assert ask.startswith("Please provide a self-contained Python script that solves the following")
    assert ask.endswith(' in a markdown code block:\n```\n"""\nDouble {it}.\n"""\n```\n')
    assert '"""\nSum the values.\nassert total(n) == 3\n"""' in prompt(MBPP, "mbpp")
    assert "it's {easy}" in prompt(HUMANEVAL, "humaneval")
    assert "class Solution:\n" in prompt(FUNCTIONAL, "livecodebench")
    assert "# YOUR CODE HERE" in prompt(STDIN, "livecodebench")


# ---- LiveCodeBench -------------------------------------------------------------------------------
def zipped(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def lcb_row(kind, public, private, starter="", name=None):
    tests = [
        [{"input": i, "output": o, "testtype": kind} for i, o in part] for part in (public, private)
    ]
    return {
        "question_content": "Add.", "starter_code": starter, "platform": "atcoder",
        "difficulty": "easy", "contest_date": "2025-01-01T00:00:00",
        "public_test_cases": json.dumps(tests[0]), 
        "private_test_cases": zipped(json.dumps(tests[1])),
        "metadata": json.dumps({"func_name": name} if name else {}),
    }  # fmt: skip


STDIN = lcb_row("stdin", [("1 2\n", "3\n")], [("2 2\n", "4"), ("0.5 0.25\n", "0.75\n")])
FUNCTIONAL = lcb_row(
    "functional", [("[1, 2]\n3", "[4, 5]")], [("[]\n1", "[]")],
    "class Solution:\n    def add(self, xs: List[int], y: int) -> List[int]:\n        ", "add",
)  # fmt: skip


def lcb(row, *codes):
    rows = grade(
        [row] * len(codes), [f"So\n```python\n{c}\n```" for c in codes], "livecodebench", 2
    )
    return [r["status"] for r in rows]


def test_livecodebench_stdin():
    add = "print(sum(map(float, input().split())))"
    main = "def main():\n    a, b = map(float, sys.stdin.read().split())\n    print(a + b)\n"
    assert lcb(
        STDIN, add, f"{main}if __name__ == '__main__':\n    main()", "print(3)", "print(4)",
        add.replace("float", "int"), f"{add}\nprint()\nprint('x')", "1 / 0",
    ) == ["passed"] * 2 + ["failed"] * 5  # fmt: skip


def test_livecodebench_functional():
    whole = "class Solution:\n    def add(self, xs: List[int], y):\n        return {}\n"
    assert lcb(
        FUNCTIONAL, whole.format("[x + y for x in xs]"), whole.format("tuple(x + y for x in xs)"),
        "def add(xs, y):\n    return [x + y for x in xs]", whole.format("[4, 5]"),
        whole.format("xs"), whole.replace("add", "sub").format("[]"), "",
    ) == ["passed"] * 3 + ["failed"] * 4  # fmt: skip


def test_zipped_tests_load_no_code(tmp_path):
    assert [t["output"] for t in livecodebench.tests(STDIN)] == ["3\n", "4", "0.75\n"]
    plain = STDIN | {"private_test_cases": "[]"}
    assert len(livecodebench.tests(plain)) == 1

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "boom"), "w"))

    for value in (Bomb(), ["a"], b"[]", Fraction(1)):
        with pytest.raises(pickle.UnpicklingError):
            livecodebench.tests(STDIN | {"private_test_cases": zipped(value)})
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ("1\n2", "1\n2\n", True), ("  1 \n 2", "1\n2", True), ("1\n\n2", "1\n2", False),
        ("1.0", "1", True), ("1e2 3", "100 3.00", True), ("1 2", "1  2", True),
        ("yes", "Yes", False), ("a b", "a  b", False), ("1 2", "1 2 3", False),
        ("50000000000000000", "50000000000000001", False), ("", "", True), 
        ("0.1", "0.10000001", False),
        ("nan", "nan", True), ("1 x", "1.0 x", False), ("1\n2", "1 2", False),
    ],
)  # fmt: skip
def test_outputs_are_compared_as_text_then_as_decimals(ours, theirs, same):
    assert same_output(ours, theirs) == same


def test_unknown_kind_and_unequal_lengths_raise():
    with pytest.raises(ValueError, match="unknown kind"):
        program(DOUBLE, "", "codeforces")
    with pytest.raises(ValueError, match="zip"):
        grade([MBPP, MBPP], [""], "mbpp", 1)


# ---- Real rows, where they are -------------------------------------------------------------------
FILES = {
    "humaneval": "humaneval.jsonl", "mbpp": "mbpp_test.jsonl",
    "humaneval_plus": "humaneval_plus_mini.jsonl", "mbpp_plus": "mbpp_plus.jsonl",
}  # fmt: skip


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize("kind", FILES)
def test_every_37th_reference_passes_and_returning_none_fails(kind):
    lines = (SHARED / "code" / FILES[kind]).read_text().splitlines()
    rows = [json.loads(line) for line in lines[1::37]]
    answers = [f"Here's it:\n```python\n{r['problem'] + r['answer']}\n```\nIt's so" for r in rows]
    if kind.startswith("mbpp"):
        answers = [f"```python\n{r['answer']}\n```" for r in rows]
    verdicts = grade(rows, answers, kind, 2)
    assert [r["id"] for r, v in zip(rows, verdicts, strict=True) if not v["passed"]] == []
    none = [f"def {entry_point(r)}(*args):\n    return None" for r in rows[:4]]
    assert not any(v["passed"] for v in grade(rows[:4], none, kind, 2))


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_oracles_name_functions_of_one_benchmark_each():
    def names(path, read):
        with read(SHARED / "code" / path, "rt") as file:
            return {json.loads(line)["entry_point"] for line in file}

    mbpp, humaneval = names("mbpp_plus.jsonl", open), names("humaneval_plus.jsonl.gz", gzip.open)
    assert set(codebench.ORACLES) & humaneval == {"find_zero"}
    gone = {"sum_div", "are_equivalent", "intersection_array"}  # with MBPP+ 0.2.0
    assert set(codebench.ORACLES) - mbpp == {"find_zero"} | gone
