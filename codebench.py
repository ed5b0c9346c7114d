"""Code benchmarks: the code in a completion, the prompt that asks for it, and the verdict of tests.

Kinds: humaneval, humaneval_plus (also its mini version), mbpp, mbpp_plus, livecodebench. Programs
run in sandbox.py, never here. Sources: EvalPlus 0.3.1 for the first four, LiveCodeBench's
lcb_runner for the last (its repository; `last_fenced_block` and the zipped tests from memory).

Differences from EvalPlus: one wall limit per program, not max(1 s, 4 x reference time) per test;
what a function returns must be, or derive from, a built-in type (numpy arrays, deques, views and
generators fail; they may pass there); floats are close without numpy's broadcasting; the chat turn
does not open the assistant's answer. From human-eval: the tests see nothing of the program but the
function they test. From lcb_runner: a program that reads stdin is a process per test with a real
stdin, so it fails with exit(1). A <think> block is cut before extraction (`grade`) [ours].
"""

import ast
import base64
import builtins
import cmath
import inspect
import json
import marshal
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import livecodebench
from code_extract import extract_code, parse
from livecodebench import last_fenced_block
from sandbox import Limits, run_python

LIMITS = Limits(wall_s=60, cpu_s=60, memory_mb=4096, output_bytes=2**24)  # EvalPlus: 60 s, 4 GiB
STDIN_LIMITS = Limits(wall_s=6, cpu_s=6, memory_mb=4096, output_bytes=2**24)  # lcb_runner: 6 s
PLUS = ("humaneval_plus", "mbpp_plus")


# ---- 1. Prompts ----------------------------------------------------------------------------------
ASK = (  # EvalPlus codegen.py
    "Please provide a self-contained Python script that solves the following problem in a "
    "markdown code block:\n```\n{problem}\n```\n"
)


def prompt(row: dict, kind: str) -> str:
    """The user turn."""
    if kind == "livecodebench":
        return livecodebench.prompt(row)
    problem = row["problem"].strip()
    if kind == "mbpp":  # in the form of MBPP+, whose problems are a docstring with one test
        problem = f'"""\n{problem}\n{row["test_list"][0]}\n"""'
    return ASK.format(problem=problem)


# ---- 2. What runs beside the program: no name from outside but the imports of `_check` -----------
MODULES = "base64, cmath, copy, itertools, json, marshal, math, random, string"
ORACLES = {  # function -> when its output is right, else out == exp. EvalPlus eval/__init__.py
    "are_equivalent": "True",  # Mbpp/164
    "sum_div": "out == exp or out == 0",  # Mbpp/295
    "surface_Area": "out == exp or abs(out - round(args[0] ** 2 + 2 * args[0] * "
    "math.hypot(args[0] / 2, args[1]))) <= atol",  # Mbpp/581, height: of the apex over the base
    "digit_distance_nums": "out == exp or out == sum(abs(int(a) - int(b)) for a, b in "
    "itertools.zip_longest(str(args[0])[::-1], str(args[1])[::-1], fillvalue='0'))",  # Mbpp/558
    "find_zero": "abs(sum(c * out**i for i, c in enumerate(args[0]))) <= atol",  # HumanEval/32
}
ORDERLESS = "similar_elements find_char_long common_in_nested_lists extract_singly larg_nnum"
ORDERLESS += " intersection_array find_dissimilar Diff"  # Mbpp/2 7 111 140 232 249 579 769
ORACLES |= dict.fromkeys(ORDERLESS.split(), "set(out) == set(exp)")
MATCHERS = ("check_str", "text_match_three", "text_starta_endb")  # None or not; may be a re.Match
ORACLES |= dict.fromkeys(MATCHERS, "exp == (out if isinstance(out, bool) else out is not None)")


def close(out, exp, atol: float) -> bool:
    """numpy.allclose with rtol 1e-7 for numbers and nested sequences of one shape."""
    if isinstance(exp, list | tuple):
        same = isinstance(out, list | tuple) and len(out) == len(exp)
        return same and all(close(o, e, atol) for o, e in zip(out, exp, strict=True))
    if not isinstance(out, int | float | complex) or not isinstance(exp, int | float | complex):
        return False
    return out == exp or (cmath.isfinite(exp) and abs(out - exp) <= atol + 1e-7 * abs(exp))


def judge(function, right, inputs: list, expected: list, atol: float, strict: bool) -> None:
    """Raise AssertionError at the first wrong output. `strict`: what is not right is not close."""
    for args, exp in zip(inputs, expected, strict=True):
        out = function(*args)
        good = right(out, exp, args, atol)
        items = exp if isinstance(exp, list | tuple) else [exp]
        if not atol and items and all(isinstance(item, float) for item in items):
            atol = 1e-6  # for the tests that follow, too: as EvalPlus
        assert good or (not strict and atol and type(out) is type(exp) and close(out, exp, atol))


JUDGE = f"import {MODULES}\n{inspect.getsource(close)}\n{inspect.getsource(judge)}"  # read once:
# a file edited during a run would give other lines


# ---- 3. Programs ---------------------------------------------------------------------------------
def program(row: dict, code: str, kind: str, tests: str = "plus") -> dict:
    """Arguments of run_python under which "passed" is the verdict; not for tests with stdin.

    `tests`, base or plus, counts only for a plus kind.
    """
    if kind == "livecodebench":
        return _functional(row, code)
    entry = entry_point(row)
    if kind == "mbpp":  # EvalPlus has no such kind. Challenge tests are not run
        source = "\n".join([row["test_setup_code"], *row["test_list"]])
        names = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name)]
        own = {n.id for n in names if isinstance(n.ctx, ast.Store)} | set(vars(builtins))
        check = _check(source, {name: name for name in {n.id for n in names} - own | {entry}})
        return {"code": code, "check": check, "entry": entry, "limits": LIMITS}
    whole = f"{row['problem'].rstrip()}\n{code}"
    if kind == "humaneval":  # code is a whole function, or a body that continues the prompt
        source = f"{row['problem']}\n{entry} = tested\n{row['test']}\ncheck(tested)"
        check = _check(source, {"tested": entry})
        return {"code": whole, "check": check, "entry": entry, "limits": LIMITS}
    if kind not in PLUS:
        raise ValueError(f"unknown kind {kind!r}")
    inputs = _packed_inputs(row, tests)
    expected = reference_outputs(row["problem"] + row["answer"], entry, inputs)
    source = (
        f"{JUDGE}\ndef load(text): return marshal.loads(base64.b64decode(text))\n"
        f"def right(out, exp, args, atol): return {ORACLES.get(entry, 'out == exp')}\n"
        f"judge(tested, right, load({inputs!r}), load({expected!r}), {row['atol']!r}, "
        f"{entry == 'find_zero'})"
    )
    code = code if _defines(code, entry) else whole
    check = _check(source, {"tested": entry})
    return {"code": code, "check": check, "entry": _copied(entry), "limits": LIMITS}


def entry_point(row: dict) -> str:
    """The function under test; of an MBPP row the one its tests call and its answer defines."""
    if "entry_point" in row:
        return row["entry_point"]
    calls = ast.walk(ast.parse("\n".join(row["test_list"])))
    called = {getattr(n.func, "id", "") for n in calls if isinstance(n, ast.Call)}
    defined = [n for n in ast.parse(row["answer"]).body if isinstance(n, ast.FunctionDef)]
    (name,) = {n.name for n in defined if n.name in called}
    return name


def _check(source: str, names: dict[str, str]) -> str:
    """A check that runs `source` where of the program only `names` are seen: alias -> its name.

    A trap otherwise: a program that defines `all` or `abs` would answer the tests' own calls.
    """
    seen = ", ".join(f"{alias!r}: {name}" for alias, name in names.items())
    scope = f'{{"__builtins__": __builtins__, {seen}}}'
    return f'import {MODULES}\n__builtins__["exec"]({source!r}, {scope})'


def _copied(entry: str) -> str:
    return "" if entry in MATCHERS else entry  # their oracle asks only for identity and bool


def _defines(code: str, name: str) -> bool:
    module, _, _ = parse(code)
    return any(getattr(node, "name", "") == name for node in (module.body if module else ()))


@lru_cache(maxsize=2048)
def reference_outputs(reference: str, entry: str, inputs: str) -> str:
    """The packed list of what a reference returns for packed inputs, computed in the sandbox.

    Once per process and problem. The text is unpacked only in the box of a candidate.
    """
    output = "out is not None" if entry in MATCHERS else "out"
    check = (
        f"import base64, marshal\ntested = {entry}\n"
        f"outputs = [tested(*args) for args in marshal.loads(base64.b64decode({inputs!r}))]\n"
        f"outputs = [{output} for out in outputs]\n"
        'print("\\n" + base64.b64encode(marshal.dumps(outputs)).decode())'
    )
    limits = Limits(wall_s=120, cpu_s=120, memory_mb=4096, output_bytes=2**27)
    result = run_python(reference, check=check, entry=_copied(entry), limits=limits)
    if result.status != "passed":
        raise RuntimeError(f"reference of {entry}: {result}"[:500])
    return result.stdout.split()[-1]


# ---- 4. Inputs of the plus kinds -----------------------------------------------------------------
def _tuples(items: list) -> list:
    return [tuple(item) for item in items]


def _deep(item: Any) -> Any:
    return tuple(map(_deep, item)) if isinstance(item, list) else item


CONVERSIONS = [  # MBPP numbers, argument (None: each), JSON to Python. EvalPlus data/mbpp.py
    ("2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740 744 809",
     None, tuple),
    ("63 64 70 94 120 237 272 299 400 409 417 438 473 614 780", None, _tuples),
    ("75 413 444 753", 0, _tuples),
    ("250 307 405 446 617 720 763 808", 0, tuple),
    ("106 750", 1, tuple),
    ("259 401 445", None, lambda items: tuple(_tuples(items))),
    ("580 615 791", None, _deep),
    ("278", 0, lambda items: tuple(tuple(i) if isinstance(i, list) else i for i in items)),
    ("722", 0, lambda items: {key: tuple(value) for key, value in items.items()}),
    ("115", 0, lambda items: [set(i) if isinstance(i, list) and i else {} for i in items]),
    ("124", 0, float), ("124", 1, complex), ("252", 0, complex),
]  # fmt: skip


def _packed_inputs(row: dict, tests: str) -> str:
    """base_input or plus_input in base64 of marshal, which keeps tuples, sets, complex and NaN."""
    family, _, number = row["id"].partition("/")
    inputs = [list(args) for args in row[f"{tests}_input"]]
    for numbers, argument, convert in CONVERSIONS:
        if family == "Mbpp" and number in numbers.split():
            for args in inputs:
                for i in range(len(args)) if argument is None else [argument]:
                    args[i] = convert(args[i])
    return base64.b64encode(marshal.dumps(inputs)).decode()


# ---- 5. LiveCodeBench ----------------------------------------------------------------------------
def _functional(row: dict, code: str) -> dict:
    """One object answers all tests; a tuple counts as a list (lcb_runner testing_util.py)."""
    tests = livecodebench.tests(row)
    name = json.loads(row["metadata"])["func_name"]
    owner = "Solution()." if "class Solution" in code else ""
    cases = [([json.loads(a) for a in t["input"].split("\n")], t["output"]) for t in tests]
    source = (
        f"import json\nfor args, output in json.loads({json.dumps(cases)!r}):\n"
        "    out = tested(*args)\n"
        "    out = list(out) if isinstance(out, tuple) else out\n"
        "    assert out == json.loads(output)"
    )
    program = f"{livecodebench.PRELUDE}\n{code}\n_tested = {owner}{name}\n"
    check = _check(source, {"tested": "_tested"})
    return {"code": program, "check": check, "entry": "_tested", "limits": LIMITS}


def _stdin_status(row: dict, code: str) -> str:
    """A process per test, up to the first that fails: its status, else "passed"."""
    for test in livecodebench.tests(row):
        result = run_python(
            f"{livecodebench.PRELUDE}\n{code}", stdin=test["input"], limits=STDIN_LIMITS
        )
        if result.status != "passed":
            return result.status
        if not livecodebench.same_output(result.stdout, test["output"]):
            return "failed"
    return "passed"


# ---- 6. Grading ----------------------------------------------------------------------------------
def completion_code(row: dict, completion: str, kind: str) -> str:
    """The code to run. A completion that lacks the function is taken to continue the prompt."""
    answer = completion.rpartition("</think>")[2]
    if kind == "livecodebench":
        return last_fenced_block(answer)
    if kind == "mbpp":  # tests may use classes that the function does not name
        return extract_code(answer)
    entry = entry_point(row)
    code = extract_code(answer, entry)
    if kind == "mbpp_plus" or _defines(code, entry):
        return code
    return extract_code(f"{row['problem'].rstrip()}\n{answer}", entry)


def grade(rows: list[dict], completions: list[str], kind: str, workers: int) -> list[dict]:
    """One dict per completion, rows[i] its problem: passed, status, code; base and plus where two.

    `status` is that of the last run, see sandbox.Result. plus means base and plus tests.
    """

    def one(row: dict, code: str) -> dict:
        if kind == "livecodebench" and livecodebench.tests(row)[0]["testtype"] == "stdin":
            status = _stdin_status(row, code)
            return {"passed": status == "passed", "status": status, "code": code}
        base = False
        for tests in ("base", "plus") if kind in PLUS else ("",):
            status = run_python(**program(row, code, kind, tests)).status
            if status != "passed":
                break
            base = True
        passed = status == "passed"
        verdicts = {"base": base, "plus": passed} if kind in PLUS else {}
        return {"passed": passed, **verdicts, "status": status, "code": code}

    codes = [completion_code(r, c, kind) for r, c in zip(rows, completions, strict=True)]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, rows, codes))
