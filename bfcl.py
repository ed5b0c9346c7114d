"""Scores function calls as the Berkeley Function Calling Leaderboard does: single turn, Python.

Categories simple, multiple, parallel, parallel_multiple and irrelevance. An item has `function`,
the documents of the functions on offer, and `answer`, the calls wanted: [{name: {parameter:
[accepted values]}}], where "" among the values means that the parameter may be left out.

Source of the rules, oddities included: package bfcl-eval 2026.3.23, ast_eval/ast_checker.py, and
eval_runner.py for irrelevance. Differences: a name may have dots or underscores, officially one of
them per model; one parser serves all models; calls on which the checker raises are wrong here.
"""

import ast
import json
import re
import warnings
from operator import add, mul, sub, truediv
from typing import Any, Literal

# ---- 1. Function documents as tools --------------------------------------------------------------
JSON_TYPES = {"integer": "integer", "float": "number", "boolean": "boolean"}  # others: "string"
JSON_TYPES |= {"array": "array", "tuple": "array", "dict": "object"}


def tools_of(item: dict) -> list[dict]:
    """The item's functions as OpenAI tools, for a chat template's tools=, dots as underscores.

    As the official convert_to_tool, without the two marks it adds to a float (format, a sentence).
    """
    tools = []
    for function in item["function"]:
        name, parameters = underscored(function["name"]), schema(function["parameters"])
        shown = function | {"name": name, "parameters": parameters}
        tools.append({"type": "function", "function": shown})
    return tools


def underscored(name: str) -> str:
    """A function's name as OpenAI's format allows it, and as names are compared here."""
    return name.replace(".", "_")


def schema(document: dict) -> dict:
    """JSON schema of a BFCL type, members and items included; an unknown type is a string."""
    out = document | {"type": JSON_TYPES.get(document.get("type"), "string")}
    if "properties" in document:
        out["properties"] = {name: schema(d) for name, d in document["properties"].items()}
    if "items" in document:
        out["items"] = schema(document["items"])
    return out


# ---- 2. Completion -> calls ----------------------------------------------------------------------
Format = Literal["auto", "qwen", "json", "python", "gemma"]
MAX_CHARACTERS = 50_000  # some 12k tokens; ast.parse of a longer, deep text may exhaust the stack


def parse_calls(text: str, format: Format = "auto") -> list[dict] | None:
    """[{"name": str, "arguments": dict}] in the order of the text; None where it is not calls.

    qwen: <tool_call>{...}</tool_call>, any number, prose around them ignored. json: an object or a
    list of them, "arguments" or "parameters". python: f(a=1), several, or lists of them. gemma:
    FunctionGemma's tokens, else python, as in a tool_code block. json and python read the code
    fences of a text that has any, else all of it. auto: the first of these that can read the text.
    Whatever stands before </think> is ignored. One malformed call makes the whole text unreadable.
    Never raises on a text, never executes any of it; reads none longer than MAX_CHARACTERS.
    """
    text = text.rpartition("</think>")[2].strip()
    formats = {"auto": list(FORMATS), "gemma": ["gemma", "python"]}.get(format, [format])
    for pattern, read in (FORMATS[f] for f in formats if len(text) <= MAX_CHARACTERS):
        blocks = re.findall(pattern, text, re.S) or ([text] if pattern == FENCE else [])
        try:
            calls = [call for block in blocks for call in read(block.strip())]
        except (ValueError, SyntaxError, ArithmeticError, RecursionError, MemoryError):
            continue
        if blocks:
            return calls
    return None


def json_calls(text: str) -> list[dict]:
    loaded = json.loads(text)
    calls = []
    for call in loaded if isinstance(loaded, list) else [loaded]:
        match call:
            case {"name": str(name), "arguments": dict(arguments)}:
                calls.append({"name": name, "arguments": arguments})
            case {"name": str(name), "parameters": dict(arguments)}:
                calls.append({"name": name, "arguments": arguments})
            case _:
                raise ValueError("a call is an object with a name and arguments")
    return calls


def python_calls(text: str) -> list[dict]:
    """Calls in the syntax tree; positional arguments are dropped, as the official decoder does."""
    with warnings.catch_warnings(action="ignore"):  # "1if": a SyntaxWarning on stderr each time
        statements = ast.parse(text).body
    if not statements or not all(isinstance(s, ast.Expr) for s in statements):
        raise ValueError("not expressions")
    calls = []
    for node in (s.value for s in statements):
        for call in node.elts if isinstance(node, ast.List | ast.Tuple) else [node]:
            name = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
            if not re.fullmatch(r"\w+(\.\w+)*", name) or any(k.arg is None for k in call.keywords):
                raise ValueError("not a call by name with parameters by name")
            arguments = {k.arg: python_value(k.value) for k in call.keywords}
            calls.append({"name": name, "arguments": arguments})
    return calls


ARITHMETIC = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv}  # no **: 9**9**9


def python_value(node: ast.expr) -> Any:
    """A literal, or arithmetic on numbers; of anything else the source, as a variable's name."""
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.List(elts=elements):
            return [python_value(e) for e in elements]
        case ast.Tuple(elts=elements):
            return tuple(python_value(e) for e in elements)
        case ast.Dict(keys=keys, values=values) if all(isinstance(k, ast.Constant) for k in keys):
            return {k.value: python_value(v) for k, v in zip(keys, values, strict=True)}
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return python_value(ast.BinOp(ast.Constant(0), ast.Sub(), operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            operands = python_value(left), python_value(right)
            if any(type(value) not in (int, float) for value in operands):
                raise ValueError("arithmetic is on numbers: 'a' * 10**9 would fill the memory")
            return ARITHMETIC[type(op)](*operands)
    return ast.unparse(node)


def gemma_calls(text: str) -> list[dict]:
    """One call:name{key:<escape>text<escape>,key:1}. Trap: skip_special_tokens=True unmakes it."""
    [(name, arguments)] = re.findall(r"\Acall:([\w.-]+)(\{.*\})\Z", text, re.S)  # or ValueError
    pieces = arguments.split("<escape>")  # every second piece is a string
    pieces[1::2] = [json.dumps(piece) for piece in pieces[1::2]]
    pieces[::2] = [re.sub(r'([{,])\s*([^\s{}[\],:"]+)\s*:', r'\1"\2":', p) for p in pieces[::2]]
    return [{"name": name, "arguments": json.loads("".join(pieces))}]


# How a block with calls is found and read; its end may be missing where it stops the decoding.
FENCE = r"```(?:\w*\s)?(.*?)(?:```|\Z)"
FORMATS = {
    "qwen": (r"<tool_call>(.*?)(?:</tool_call>|\Z)", json_calls),
    "json": (FENCE, json_calls),
    "python": (FENCE, python_calls),
    "gemma": (r"<start_function_call>(.*?)(?:<end_function_call>|\Z)", gemma_calls),
}


# ---- 3. Score ------------------------------------------------------------------------------------
TYPES = {"string": str, "integer": int, "float": float, "boolean": bool, "array": list}
TYPES |= {"tuple": list, "dict": dict, "any": str}


def score_item(item: dict, calls: list[dict] | None) -> dict[str, bool | str]:
    """Verdict on what `parse_calls` returned: name_correct, full_correct, parsed, error.

    full_correct: as many calls as wanted, each wanted one met by another, order free. An item that
    wants none (irrelevance) is right without a call, unreadable text included. name_correct: the
    names made and wanted are the same multiset. error: "", or why full_correct is False.
    Greedy, as the official search: a call that meets two wanted ones is taken by the first of them.
    """
    wanted = [(underscored(name), p) for answer in item["answer"] for name, p in answer.items()]
    documents = {underscored(f["name"]): f["parameters"] for f in item["function"]}
    left = list(calls or [])
    names = sorted(underscored(call["name"]) for call in left)
    error = "" if len(left) == len(wanted) else f"{len(left)} calls made, {len(wanted)} wanted"
    for name, accepted in wanted:
        errors = [call_error(call, name, documents[name], accepted) for call in left]
        if "" in errors:
            del left[errors.index("")]
        elif not error:
            error = f"{name}: {'; '.join(errors)}"
    return {
        "name_correct": names == sorted(name for name, _ in wanted),
        "full_correct": not error,
        "parsed": calls is not None,
        "error": error,
    }


def call_error(call: dict, name: str, document: dict, accepted: dict[str, list]) -> str:
    """Why this call is not the wanted one; empty where it is."""
    arguments, properties = call["arguments"], document["properties"]
    if underscored(call["name"]) != name:
        return f"other function {call['name']}"
    for parameter in [*document["required"], *(p for p in accepted if "" not in accepted[p])]:
        if parameter not in arguments:
            return f"missing {parameter}"
    for parameter, value in arguments.items():
        if parameter not in properties or parameter not in accepted:
            return f"unexpected {parameter}"
        if not value_matches(properties[parameter], value, accepted[parameter]):
            return f"{parameter} ({type(value).__name__}) is none of {accepted[parameter]}"
    return ""


def value_matches(document: dict, value: Any, accepted: list) -> bool:
    """Whether an argument has its documented type and one of the accepted values.

    Types are exact (True is no integer), but an int may stand for a float, not inside lists, and a
    tuple for a list where the document says tuple. A value of the first accepted value's type also
    passes, whatever the document says: it is a variable, compared as it is.
    """
    kind, expected, variable = type(value), TYPES[document["type"]], first_type(accepted)
    inner = TYPES[document["items"]["type"]] if expected is list else None
    if document["type"] == "tuple" and kind is tuple:
        kind, value = list, list(value)
    if document["type"] == "float" and kind is int:
        kind = float
    if kind is expected and inner and not any(items_typed(value, a, inner) for a in accepted):
        return False
    if kind is not expected or variable not in (expected, None):
        return kind in (expected, variable) and value in accepted
    if expected is dict:
        return any(dict_matches(value, a) for a in accepted)
    if inner is dict:  # an empty list meets "" here and in the next rule, as it does officially
        return any(len(value) == len(a) and all(map(dict_matches, value, a)) for a in accepted)
    if expected is list:
        return [plain(v) for v in value] in [[plain(v) for v in a] for a in accepted]
    return plain(value) in [plain(a) for a in accepted]


def first_type(accepted: list) -> type | None:
    return next((type(a) for a in accepted if a != ""), None)  # "": may be left out


def items_typed(value: list, accepted: Any, inner: type) -> bool:
    """Whether each item has the documented type or that of the accepted list's first item."""
    listed = isinstance(accepted, list)  # else: "" or a variable, so that only values decide
    return not listed or all(type(v) in (inner, first_type(accepted)) for v in value)


def dict_matches(value: Any, accepted: Any) -> bool:
    """{key: [accepted values]}: no other key, none missing but where ""; types are not checked."""
    both = isinstance(value, dict) and isinstance(accepted, dict)
    complete = both and all(key in value or "" in accepted[key] for key in accepted)
    known = complete and all(key in accepted for key in value)
    return known and all(plain(v) in [plain(a) for a in accepted[k]] for k, v in value.items())


def plain(value: Any) -> Any:
    """A string in lower case without spaces and ,./-_*^ and with one kind of quotes."""
    if not isinstance(value, str):
        return value
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"')
