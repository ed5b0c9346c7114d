"""bfcl.py: each rule by hand, each format there and back, the official checker where installed."""

import json
import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
from conftest import ROOT

from bfcl import MAX_CHARACTERS, parse_calls, score_item, tools_of

DATA = ROOT.parent / "shared" / "data" / "tool"
CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance")


def make_item(properties, answer, required=()):
    """An item with the functions f and pack.g, which take the same parameters."""
    parameters = {"type": "dict", "properties": properties, "required": list(required)}
    functions = [
        {"name": name, "description": "", "parameters": parameters} for name in ("f", "pack.g")
    ]
    return {"id": "hand", "function": functions, "answer": answer}


def call(name, **arguments):
    return {"name": name, "arguments": arguments}


def correct(item, calls):
    return score_item(item, calls)["full_correct"]


# ---- Values --------------------------------------------------------------------------------------
STRINGS = {"type": "array", "items": {"type": "string"}}
INTEGERS = {"type": "array", "items": {"type": "integer"}}
FLOATS = {"type": "array", "items": {"type": "float"}}
DICTS = {"type": "array", "items": {"type": "dict"}}
PAIR = {"type": "tuple", "items": {"type": "float"}}
PERSON = {"name": ["Ann"], "age": [30, 31], "nick": ["A", ""]}

VALUES = [
    # document of the parameter, accepted values, value given, verdict
    ("integer", [5], 5, True),
    ("integer", [5, 6], 6, True),
    ("integer", [5], 7, False),
    ("integer", [5], 5.0, False),  # no float for an int
    ("integer", [1], True, False),  # True == 1, but a bool is no int
    ("integer", [5], "5", False),
    ("integer", [5], None, False),
    ("integer", ["n"], "n", True),  # a variable
    ("integer", ["n"], "N", False),  # compared as it is
    ("integer", ["n"], 5, False),
    ("integer", [5, "n"], "n", False),  # only of the first accepted value's type
    ("integer", ["", "n"], "n", True),  # "" is no value
    ("integer", [""], "", False),
    ("float", [5.0], 5, True),  # int for float
    ("float", [5], 5.0, True),
    ("float", [5.0], 5.5, False),
    ("float", [1.0], True, False),
    ("float", [5.0], "5.0", False),
    ("float", [5.0], 10**400, False),  # float() of it overflows
    ("float", [None], None, True),
    ("boolean", [True], True, True),
    ("boolean", [True], False, False),
    ("boolean", [True], 1, False),
    ("boolean", [True], "true", False),
    ("string", ["New York, NY"], "new york ny", True),
    ("string", ["a b,c.d/e-f_g*h^i"], "ABCDEFGHI", True),  # all that is removed
    ("string", ["it's"], 'it"s', True),
    ("string", ["km/h", "kmh"], "KM-H", True),
    ("string", ["a;b"], "ab", False),  # no other sign is removed
    ("string", ["a!"], "a", False),
    ("string", ["a\tb"], "ab", False),
    ("string", ["a"], "b", False),
    ("string", ["5"], 5, False),
    ("string", [True], True, True),  # a variable
    ("string", [True], "True", False),
    ("string", ["x", ""], "", True),  # a given "" meets the mark of the optional
    ("any", ["x"], "X", True),
    ("any", ["5"], 5, False),
    (INTEGERS, [[1, 2]], [1, 2], True),
    (INTEGERS, [[1, 2], [3]], [3], True),
    (INTEGERS, [[1, 2]], [2, 1], False),  # lists are ordered
    (INTEGERS, [[1, 2]], [1], False),
    (INTEGERS, [[1, 2]], [1, 2.0], False),
    (INTEGERS, [[1, 2]], [True, 2], False),
    (INTEGERS, [[1, 2]], (1, 2), False),  # a tuple is no array
    (INTEGERS, [[1, 2]], "[1, 2]", False),
    (INTEGERS, [["n", 2]], ["n", 2], True),  # a variable in the list
    (INTEGERS, ["rows", [1]], [1], True),
    (INTEGERS, ["rows", [1]], "rows", True),
    (INTEGERS, ["rows"], "Rows", False),
    (INTEGERS, [[1], ""], [True], True),  # "" switches the item check off, officially too
    (INTEGERS, [[1], ""], [], True),  # and an empty list meets it
    (INTEGERS, [[1]], [], False),
    (FLOATS, [[1.0, 2.5]], [1.0, 2.5], True),
    (FLOATS, [[1.0, 2.5]], [1, 2.5], False),  # no int for a float inside a list
    (FLOATS, [[1, 2.5]], [1, 2.5], True),  # but where the accepted list begins with one
    (STRINGS, [["New York", "LA"]], ["new-york", "l.a."], True),
    (STRINGS, [["New York", "LA"]], ["new-york", "sf"], False),
    (STRINGS, [["a"]], "a", False),
    (STRINGS, [[["a"]]], [["a"]], True),  # deeper lists are variables
    (STRINGS, [[["a"]]], [["A"]], False),
    (PAIR, [[1.0, 2.0]], (1.0, 2.0), True),
    (PAIR, [[1.0, 2.0]], [1.0, 2.0], True),
    (PAIR, [[1.0, 2.0]], (1, 2), False),
    ("dict", [PERSON], {"name": "ANN", "age": 31}, True),
    ("dict", [PERSON], {"name": "Ann", "age": 30, "nick": "a"}, True),
    ("dict", [PERSON], {"name": "Ann", "age": 30, "nick": "b"}, False),
    ("dict", [PERSON], {"name": "Ann"}, False),
    ("dict", [PERSON], {"name": "Ann", "age": 30, "size": 1}, False),
    ("dict", [PERSON], {"name": "Ann", "age": 30.0}, True),  # types inside are not checked
    ("dict", [PERSON], {"name": ["Ann"], "age": 30}, False),
    ("dict", [{"names": [["Ann", "Bob"]]}], {"names": ["Ann", "Bob"]}, True),
    ("dict", [{"names": [["Ann", "Bob"]]}], {"names": ["ann", "bob"]}, False),  # only directly
    ("dict", [{"a": [1]}, {"a": [2]}], {"a": 2}, True),
    ("dict", [{"a": [1, ""]}, ""], {}, True),
    ("dict", [{"a": [1]}, ""], {}, False),
    ("dict", [PERSON], "Ann", False),
    (DICTS, [[{"a": ["x"]}, {"a": ["y"]}]], [{"a": "X"}, {"a": "y"}], True),
    (DICTS, [[{"a": ["x"]}, {"a": ["y"]}]], [{"a": "y"}, {"a": "x"}], False),  # ordered
    (DICTS, [[{"a": ["x"]}, {"a": ["y"]}]], [{"a": "x"}], False),
    (DICTS, [[{"a": ["x"]}]], [{"a": "x"}, {"a": "x"}], False),
    (DICTS, [[{"a": ["x"]}], [{"a": ["y"]}]], [{"a": "y"}], True),
    (DICTS, [[{"a": ["x"]}]], ["x"], False),
    (DICTS, [[{"a": ["x"]}, {"a": ["y"]}]], [{"a": "x"}, {"a": "z"}], False),
    (DICTS, [[{"a": ["x"]}], ""], ["x"], False),  # the official checker raises
    (DICTS, [[{"a": ["x"]}], ""], ["a"], False),  # here too
]


def value_item(document, accepted):
    document = {"type": document} if isinstance(document, str) else document
    return make_item({"p": document | {"description": ""}}, [{"f": {"p": accepted}}])


@pytest.mark.parametrize(("document", "accepted", "value", "verdict"), VALUES)
def test_value(document, accepted, value, verdict):
    score = score_item(value_item(document, accepted), [call("f", p=value)])
    assert score["full_correct"] == verdict
    assert (score["error"] == "") == verdict
    assert score["name_correct"]
    assert score["parsed"]


# ---- Parameters and calls ------------------------------------------------------------------------
ABC = {name: {"type": "integer", "description": ""} for name in ("a", "b", "c")}
ONE = make_item(ABC, [{"f": {"a": [1], "b": [2, ""]}}], required=["a"])
TWO = make_item(ABC, [{"f": {"a": [1]}}, {"pack.g": {"a": [2]}}])
SAME = make_item(ABC, [{"f": {"a": [1, 2]}}, {"f": {"a": [1]}}])
NONE = make_item(ABC, [])

CALLS = [
    # item, calls, names right, all right
    (ONE, [call("f", a=1, b=2)], True, True),
    (ONE, [call("f", a=1)], True, True),  # optional left out
    (ONE, [call("f", b=2)], True, False),  # required missing
    (ONE, [call("f", a=1, c=3)], True, False),  # documented, but not accepted
    (ONE, [call("f", a=1, d=3)], True, False),
    (make_item(ABC, [{"f": {"a": [1], "d": [2]}}]), [call("f", a=1, d=2)], True, False),  # no doc
    (make_item(ABC, [{"f": {"a": [1, ""]}}], ["a"]), [call("f")], True, False),  # required wins
    (make_item(ABC, [{"f": {"a": [1]}}]), [call("f")], True, False),  # not marked as optional
    (ONE, [call("pack.g", a=1)], False, False),
    (ONE, [call("F", a=1)], False, False),
    (ONE, [call("f", a=1), call("f", a=1)], False, False),
    (ONE, [], False, False),
    (ONE, None, False, False),
    (TWO, [call("f", a=1), call("pack.g", a=2)], True, True),
    (TWO, [call("pack_g", a=2), call("f", a=1)], True, True),  # any order, dots as underscores
    (TWO, [call("f", a=2), call("pack.g", a=1)], True, False),
    (TWO, [call("f", a=1), call("f", a=1)], False, False),
    (TWO, [call("f", a=1)], False, False),
    (TWO, [call("f", a=1), call("pack.g", a=2), call("pack.g", a=2)], False, False),
    (SAME, [call("f", a=2), call("f", a=1)], True, True),
    (SAME, [call("f", a=1), call("f", a=2)], True, False),  # greedy: a=1 is taken by the first
    (SAME, [call("f", a=1), call("f", a=True)], True, False),  # though they are == in Python
    (NONE, [], True, True),
    (NONE, None, True, True),
    (NONE, [call("f", a=1)], False, False),
]


@pytest.mark.parametrize(("item", "calls", "names", "full"), CALLS)
def test_calls(item, calls, names, full):
    before = json.dumps([item, calls])
    score = score_item(item, calls)
    assert (score["name_correct"], score["full_correct"]) == (names, full)
    assert score["parsed"] == (calls is not None)
    assert (score["error"] == "") == full
    assert json.dumps([item, calls]) == before


def test_tools():
    properties = {
        "x": {"type": "float", "description": "d", "default": 1.5},
        "any": {"type": "any"},
        "none": {"description": "no type"},
        "pair": PAIR,
        "type": {"type": "dict", "properties": {"items": {"type": "boolean"}}},
        "rows": {"type": "array", "items": INTEGERS},
    }
    item = make_item(properties, [], required=["x"])
    before = json.dumps(item)
    tool = tools_of(item)[1]
    assert json.dumps(item) == before
    assert tool["type"] == "function"
    assert tool["function"]["name"] == "pack_g"
    assert tool["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "x": {"type": "number", "description": "d", "default": 1.5},
            "any": {"type": "string"},
            "none": {"description": "no type", "type": "string"},
            "pair": {"type": "array", "items": {"type": "number"}},
            "type": {"type": "object", "properties": {"items": {"type": "boolean"}}},
            "rows": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
        },
        "required": ["x"],
    }


# ---- Completion -> calls -------------------------------------------------------------------------
F = call("f", a=1)
G = call("pack.g", b="x")
F_JSON, G_JSON = json.dumps(F), json.dumps(G)
F_TAG, G_TAG = f"<tool_call>{F_JSON}</tool_call>", f"<tool_call>{G_JSON}</tool_call>"
TEXTS = [
    # format, completion, calls
    ("qwen", f"<tool_call>\n{F_JSON}\n</tool_call>", [F]),
    ("qwen", f"I see.\n{F_TAG} and\n{G_TAG}", [F, G]),
    ("qwen", f"<tool_call>\n{F_JSON}", [F]),  # the closing tag stopped the decoding
    ("qwen", f"<think>\n{G_TAG}</think>\n{F_TAG}", [F]),
    ("qwen", F_TAG + "<tool_call>{</tool_call>", None),
    ("qwen", '<tool_call>{"name": "f"}</tool_call>', None),
    ("qwen", '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', None),
    ("qwen", '<tool_call>{"name": 3, "arguments": {}}</tool_call>', None),
    ("qwen", "<tool_call></tool_call>", None),
    ("qwen", F_JSON, None),
    ("json", F_JSON, [F]),
    ("json", f"[{F_JSON}, {G_JSON}]", [F, G]),
    ("json", '{"name": "f", "parameters": {"a": 1}}', [F]),
    ("json", f"Sure:\n```json\n[{F_JSON}]\n```\nDone.", [F]),
    ("json", f"```\n{F_JSON}\n```\n```json\n{G_JSON}\n```", [F, G]),
    ("json", f"```json\n{F_JSON}", [F]),
    ("json", "[]", []),
    ("json", "[[]]", None),
    ("json", f"Sure: {F_JSON}", None),
    ("json", "", None),
    ("python", "f(a=1)", [F]),
    ("python", "[f(a=1), pack.g(b='x')]", [F, G]),
    ("python", "f(a=1), pack.g(b='x')", [F, G]),
    ("python", "f(a=1)\npack.g(b='x')", [F, G]),
    ("python", "```python\n[f(a=1)]\n```", [F]),
    ("python", "[]", []),
    ("python", "f()", [call("f")]),
    ("python", "f(1, a=1)", [F]),  # positional arguments are dropped
    ("python", "f(a=-1, b=[1, (2.5, None)], c={'k': True})",
     [call("f", a=-1, b=[1, (2.5, None)], c={"k": True})]),
    ("python", "f(a=7 * 24 - 1, b=1 / 4 + 2)", [call("f", a=167, b=2.25)]),
    ("python", "f(a=x, b=true, c=g(1)[0])", [call("f", a="x", b="true", c="g(1)[0]")]),
    ("python", "f(a='x' * 999999999)", None),
    ("python", "f(a=1 / 0)", None),
    ("python", "f(a=9 ** 9 ** 9)", [call("f", a="9 ** 9 ** 9")]),  # not computed
    ("python", "f(**{'a': 1})", None),
    ("python", "f(a={**b})", [call("f", a="{**b}")]),
    ("python", "f(a=1", None),
    ("python", "f", None),
    ("python", "x = f(a=1)", None),
    ("python", "I cannot do this.", None),
    ("python", "# nothing", None),
    ("python", "", None),
    ("gemma", "```tool_code\n[f(a=1), pack.g(b='x')]\n```", [F, G]),
    ("gemma", "```tool_code\nf(a=1)\npack.g(b='x')\n```", [F, G]),
    ("gemma", "[f(a=1)]", [F]),
    ("gemma", "<start_function_call>call:f{a:1}<end_function_call>"
     "<start_function_call>call:pack.g{b:<escape>x<escape>}", [F, G]),
    ("gemma", "<start_function_call>call:f{a:<escape>{b:1}, c:<escape>}<end_function_call>",
     [call("f", a="{b:1}, c:")]),
    ("gemma", "<start_function_call>call:f{a:x}<end_function_call>", None),
    ("gemma", "<start_function_call>f(a=1)<end_function_call>", None),
    ("auto", "No function fits; which city?", None),
]  # fmt: skip


@pytest.mark.parametrize(("format", "text", "calls"), TEXTS)
def test_text(format, text, calls):
    assert repr(parse_calls(text, format)) == repr(calls)  # repr: 1, True and 1.0 differ
    if calls is not None:
        assert repr(parse_calls(text)) == repr(calls)


def render_gemma(value):
    if isinstance(value, str):
        return f"<escape>{value}<escape>"
    if isinstance(value, list):
        return "[" + ",".join(map(render_gemma, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{render_gemma(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


def render_python(calls):
    return [
        f"{c['name']}({', '.join(f'{k}={v!r}' for k, v in c['arguments'].items())})" for c in calls
    ]


def render_qwen(calls):
    return "\n".join(f"<tool_call>\n{json.dumps(c)}\n</tool_call>" for c in calls)


def render_control(calls):
    return "".join(
        f"<start_function_call>call:{c['name']}{render_gemma(c['arguments'])}<end_function_call>"
        for c in calls
    )


RENDERERS = {
    "qwen": [render_qwen],
    "json": [
        json.dumps,
        lambda calls: f"```json\n{json.dumps(calls, indent=1)}\n```",
        lambda calls: json.dumps(
            [{"name": c["name"], "parameters": c["arguments"]} for c in calls], ensure_ascii=False
        ),
    ],
    "python": [lambda calls: f"[{', '.join(render_python(calls))}]"],
    "gemma": [
        lambda calls: "```tool_code\n" + "\n".join(render_python(calls)) + "\n```",
        render_control,
    ],
}


def load_items():
    if not DATA.exists():
        pytest.skip("no ../shared/data/tool")
    return [
        json.loads(line)
        for category in CATEGORIES
        for line in (DATA / f"bfcl_v4_{category}.jsonl").open(encoding="utf-8")
    ]


def concrete(accepted, full):
    """One accepted value: the first that is not "", the dicts in it made concrete."""
    value = next(a for a in accepted if a != "")
    if isinstance(value, dict):
        return arguments_of(value, full)
    if isinstance(value, list):
        return [arguments_of(v, full) if isinstance(v, dict) else v for v in value]
    return value


def arguments_of(accepted, full, required=()):
    return {
        name: concrete(values, full)
        for name, values in accepted.items()
        if any(v != "" for v in values) and (full or name in required or "" not in values)
    }


def ground_truth(item, full=False):
    """The wanted calls, with (full) or without the documented optional parameters."""
    documents = {f["name"]: f["parameters"] for f in item["function"]}
    calls = []
    for answer in item["answer"]:
        for name, accepted in answer.items():
            known = {p: v for p, v in accepted.items() if p in documents[name]["properties"]}
            arguments = arguments_of(known, full, documents[name]["required"])
            calls.append({"name": name, "arguments": arguments})
    return calls


@pytest.mark.parametrize("full", [False, True])
def test_ground_truths_score_and_survive_every_format(full):
    items = load_items()
    assert len(items) == 1240
    for item in items:
        calls = ground_truth(item, full)
        score = score_item(item, calls)
        assert score == {"name_correct": True, "full_correct": True, "parsed": True, "error": ""}
        for format, renderers in RENDERERS.items():
            for render in renderers if calls else []:
                text = render(calls)
                assert repr(parse_calls(text, format)) == repr(calls), text
                assert repr(parse_calls(text)) == repr(calls), text


# ---- Hostile texts -------------------------------------------------------------------------------
UNITS = ["[", "{", "(", "f(", "f(a=", "-", "not ", "a.", "1+", "lambda:", '[{"a":', "[[],", "```"]
UNITS += [
    "<tool_call>",
    "<start_function_call>",
    "<escape>",
    ",a",
    "{:",
    "\0",
    "\ud800",
    "f'{",
    "'",
]
UNITS += ["f()\n", "f();", "1if 1else ", "</think>", "\\\n", "word "]
WRAPS = ["{}", "f(a={})", "<tool_call>{}</tool_call>", "<start_function_call>call:f{{a:{}}}"]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("size", [150, 6000, MAX_CHARACTERS - 60, 10**6])
def test_hostile_texts_neither_raise_nor_hang(unit, size, recwarn):
    for wrap in WRAPS:
        for format in ("auto", *RENDERERS):
            start = time.process_time()
            calls = parse_calls(wrap.format(unit * (size // len(unit))), format)
            assert time.process_time() - start < 1
            assert calls is None or isinstance(calls, list)
    assert not recwarn.list


def test_nothing_is_executed(tmp_path):
    made = tmp_path / "made"
    for text in (
        f"__import__('pathlib').Path({str(made)!r}).touch()",
        f"f(a=__import__('pathlib').Path({str(made)!r}).touch())",
        f"f(a=[open({str(made)!r}, 'w') for _ in 'a'])",
        f"f(a=(lambda: open({str(made)!r}, 'w'))())",
        f"__import__(name='os').system(command='touch {made}')",
    ):
        for wrap in ("{}", "[{}]", "```tool_code\n{}\n```", "<tool_call>{}</tool_call>"):
            for format in ("auto", *RENDERERS):
                parse_calls(wrap.format(text), format)
    assert not made.exists()
    assert parse_calls("__import__(x='os')") == [call("__import__", x="os")]  # only a name


def test_hostile_values_are_scored():
    item = value_item("integer", [5])
    for text in ("f(p=" + "9" * 4000 + "*9" * 900 + ")", "f(p=" + "[" * 90 + "]" * 90 + ")"):
        assert score_item(item, parse_calls(text))["error"].startswith("f: p ")
    for depth in (500, 900):
        text = '{"name": "f", "arguments": {"p": ' + "[" * depth + "]" * depth + "}}"
        assert not correct(item, parse_calls(text))


def test_standard_library_only():
    code = "import sys; before = set(sys.modules); import bfcl; print(*set(sys.modules) - before)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    modules = {m.partition(".")[0] for m in run.stdout.split()} - {"bfcl"}
    assert run.returncode == 0
    assert modules <= sys.stdlib_module_names


# ---- Against the official checker ----------------------------------------------------------------
def changed_values(value):
    """(kind, value) of many ways to change one argument."""
    yield from [("none", None), ("empty string", ""), ("empty list", []), ("empty dict", {})]
    yield "wrapped", [value]
    yield "other type", 7 if isinstance(value, str) else str(value)
    if isinstance(value, bool):
        yield from [("int for bool", int(value)), ("bool changed", not value)]
    elif isinstance(value, int):
        yield from [("float for int", float(value)), ("bool for int", True)]
        yield from [("value", value + 1), ("value", -value)]
    elif isinstance(value, float):
        yield from [("int for float", int(value)), ("bool for float", True), ("value", value + 0.5)]
    elif isinstance(value, str):
        yield from [("case", value.upper()), ("case", value.swapcase())]
        yield from [
            ("punctuation", f" {value[:1]}-_.,/*^ {value[1:]} "),
            ("other sign", value + "!"),
        ]
        yield from [("quotes", value.replace("'", '"') + "'"), ("value", value + "x")]
        yield from [("letters", value.replace(" ", "")), ("newline", value.replace(" ", "\n"))]
    elif isinstance(value, list):
        yield from [("list as tuple", tuple(value)), ("list reversed", value[::-1])]
        yield from [("item dropped", value[:-1]), ("item doubled", value + value[-1:])]
        for kind, item in changed_values(value[0]) if value else []:
            yield "in list: " + kind, [item, *value[1:]]
    elif isinstance(value, dict):
        yield "key added", value | {"extra": 1}
        for key in value:
            yield "key dropped", {k: v for k, v in value.items() if k != key}
            for kind, inner in changed_values(value[key]):
                yield "in dict: " + kind, value | {key: inner}


def perturbed(item):
    """(kind, calls) around the item's ground truth, the ground truth itself included."""
    for full in (False, True):
        calls = ground_truth(item, full)
        yield "ground truth", calls
        yield "call added", [*calls, call(item["function"][0]["name"])]
        if not calls:
            continue
        yield from [("reversed", calls[::-1]), ("rotated", calls[1:] + calls[:1])]
        yield from [("call dropped", calls[1:]), ("call doubled", [*calls, calls[0]])]
        yield "call replaced", [*calls[1:], calls[-1]]
        for i, c in enumerate(calls):
            for kind, new in changed_calls(c):
                yield kind, [*calls[:i], new, *calls[i + 1 :]]


def changed_calls(c):
    arguments = c["arguments"]
    yield "renamed", c | {"name": c["name"] + "_2"}
    yield "renamed", c | {"name": c["name"].upper()}
    yield "extra parameter", c | {"arguments": arguments | {"extra": 1}}
    for name, value in arguments.items():
        rest = {k: v for k, v in arguments.items() if k != name}
        yield "missing parameter", c | {"arguments": rest}
        yield "parameter renamed", c | {"arguments": rest | {name + "_": value}}
        for kind, new in changed_values(value):
            yield kind, c | {"arguments": arguments | {name: new}}


@pytest.fixture
def official(monkeypatch):
    """official(item, calls, model) -> verdict, None where it raises.

    The package's model_config imports dozens of vendors' clients; the checker only asks it whether
    a model spells names with dots or underscores.
    """
    pytest.importorskip("bfcl_eval", reason="pip install --no-deps bfcl-eval==2026.3.23")
    config = ModuleType("bfcl_eval.constants.model_config")
    config.MODEL_CONFIG_MAPPING = {
        "dots": SimpleNamespace(underscore_to_dot=False),
        "underscores": SimpleNamespace(underscore_to_dot=True),
    }
    monkeypatch.setitem(sys.modules, config.__name__, config)
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    def verdict(item, calls, model):
        category = item["id"].rpartition("_")[0]
        output = [{c["name"]: c["arguments"]} for c in calls]
        arguments = item["function"], output, item["answer"], Language.PYTHON, category, model
        try:
            return ast_checker(*arguments)["valid"]
        except (AttributeError, TypeError, KeyError, IndexError):
            return None

    return verdict


def test_verdicts_are_the_official_ones(official):
    counts = {}
    items = [item for item in load_items() if item["answer"]]
    hand = [(value_item(d, a), [("by hand", [call("f", p=v)])]) for d, a, v, _ in VALUES]
    for item, cases in [*((item, perturbed(item)) for item in items), *hand]:
        for kind, calls in cases:
            for model in ("dots", "underscores"):
                if model == "underscores":
                    calls = [c | {"name": c["name"].replace(".", "_")} for c in calls]
                try:
                    wanted = official(item, calls, model)
                except OverflowError:  # of an int beyond all floats, for a float
                    wanted = None
                verdict = correct(item, calls)
                key = kind, wanted, verdict
                counts[key] = counts.get(key, 0) + 1
                assert verdict == bool(wanted), (item["id"], kind, calls)
    print(*sorted((*map(str, key), n) for key, n in counts.items()), sum(counts.values()), sep="\n")
