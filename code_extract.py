"""The code in a completion, by the rules of EvalPlus 0.3.1. Python 3.11 or later."""

import ast
import codeop
import itertools
import warnings
from collections.abc import Iterable

WORK = 100_000  # lines parsed per text: 6 s of nested brackets, under 1 s of prose and code


def extract_code(text: str, entry_point: str = "") -> str:
    """The longest run of lines that parses, less what `entry_point` does not need.

    Rules of EvalPlus sanitize.py. Of the run's top level these stay: imports (not __future__), then
    in order classes, functions with a return and assignments, none of them decorated, the first of
    each name, and only names that entry_point leads to. If nothing stays, the run itself.
    Differs where WORK lines have been parsed (unclosed brackets or try blocks, hundreds of them):
    the text before is then not searched. And in line ends, which become a newline.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes that Python doubts are no error
        code = longest_valid_run(text.replace("\r\n", "\n").replace("\r", "\n"))
        module, _, _ = parse(code)
    kept: dict[str | None, ast.stmt] = {}
    for node in module.body if module else ():
        name = _bound_name(node)
        if name is not False:
            kept.setdefault(name, node)
    wanted, queue = {entry_point}, [entry_point]
    while queue:
        needs = _identifiers(kept[name]) if (name := queue.pop()) in kept else set()
        queue += needs - wanted
        wanted |= needs
    imports = [node for node in (module.body if module else ()) if _is_import(node)]
    nodes = imports + [n for name, n in kept.items() if not entry_point or name in wanted]
    return "\n".join(_segments(code, nodes)).strip() or code


def longest_valid_run(text: str) -> str:
    """The run of two lines or more that parses and has the most non-blank lines; the first such.

    The first line of the text if there is none. EvalPlus parses every run; here each line is parsed
    as the start of one statement, whose run goes on as the run of the next statement does.
    """
    lines = text.split("\n")
    ends = [-1] * (len(lines) + 1)  # last line of the longest run from each line; -1: none
    work = [WORK]
    for i in reversed(range(len(lines))):
        ends[i] = _end_of_run(lines, i, ends, work) if work[0] > 0 else -1
    filled = [0, *itertools.accumulate(bool(line.strip()) for line in lines)]
    most, first, last = 0, 0, 0
    for i, end in enumerate(ends[:-1]):
        while end > i + 1 and not lines[end].strip():
            end -= 1
        if end > i and filled[end + 1] - filled[i] > most:
            most, first, last = filled[end + 1] - filled[i], i, end
    return "\n".join(lines[first : last + 1])


def _end_of_run(lines: list[str], start: int, ends: list[int], work: list[int]) -> int:
    """ends[start], given ends of all later lines; work[0] loses the number of lines parsed."""
    syntax = lines[start].strip(" \t\f")
    if not syntax or syntax[0] == "#":
        return max(start, ends[start + 1])
    if lines[start][0] in " \t":
        return -1
    stop, module, incomplete = start, None, True
    while stop < len(lines) and (module or incomplete):  # until the first statement has ended
        stop = min(len(lines), start + 4 * max(4, stop - start))
        module, error_line, incomplete = parse("\n".join(lines[start:stop]))
        if module and (line := _second_statement(module)):
            return ends[start + line - 1]
        work[0] -= stop - start
    while not module and work[0] > 0:
        stop = min(stop - 1, start + error_line - 1)  # no run that parses reaches the error
        if stop <= start:
            return -1
        module, error_line, _ = parse("\n".join(lines[start:stop]), more=False)
        work[0] -= stop - start
    if not module:
        return -1
    line = _second_statement(module)
    return ends[start + line - 1] if line else stop - 1


def parse(source: str, more: bool = True) -> tuple[ast.Module | None, int, bool]:
    """(tree or None, line of the error, whether more lines could mend it); lines count from 1.

    Only with `more` is the last asked for; without, a bracket never closed is the error's line.
    """
    flags = ast.PyCF_ONLY_AST | (codeop.PyCF_ALLOW_INCOMPLETE_INPUT if more else 0)
    try:
        return compile(source, "<text>", "exec", flags, dont_inherit=True), 0, False
    except SyntaxError as error:
        last = source.count("\n") + 1  # of a NUL no line is told
        return None, error.lineno or last, "incomplete input" in str(error)
    except (ValueError, MemoryError, RecursionError):  # NUL, surrogates; nested too deeply
        return None, source.count("\n") + 1, False


def _second_statement(module: ast.Module) -> int:
    """The line on which the first statement begins that shares no line with the one before, or 0"""
    for before, node in itertools.pairwise(module.body):
        line = min(n.lineno for n in (node, *getattr(node, "decorator_list", ())))
        if line > before.end_lineno:
            return line
    return 0


def _is_import(node: ast.stmt) -> bool:
    future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
    return isinstance(node, ast.Import | ast.ImportFrom) and not future


def _bound_name(node: ast.stmt) -> str | bool | None:
    """The name under which a statement is kept, None for one without; False: it is not kept."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        returns = any(isinstance(n, ast.Return) for n in ast.walk(node))
        kept = not node.decorator_list and (returns or isinstance(node, ast.ClassDef))
        return node.name if kept else False
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return False
    targets = node.targets[:1] if isinstance(node, ast.Assign) else [node.target]
    if len(getattr(node, "targets", ())) < 2:
        targets.append(node.value)  # `a.b = c` goes by the name c, `a, b = 1, 2` by none
    return next((n.id for n in targets if isinstance(n, ast.Name)), None)


def _identifiers(node: ast.AST) -> set[str]:
    """All names in a statement: variables, attributes, arguments, keywords, parts of modules."""
    found: set[str] = set()
    for part in ast.walk(node):
        for _, value in () if isinstance(part, ast.Constant) else ast.iter_fields(part):
            for item in value if isinstance(value, list) else [value]:
                found |= set(item.split(".")) if isinstance(item, str) else set()
    return found


def _segments(code: str, nodes: Iterable[ast.stmt]) -> Iterable[str]:
    data = code.encode(errors="surrogatepass")  # columns count bytes
    starts = [0, *itertools.accumulate(len(line) + 1 for line in data.split(b"\n"))]
    for node in nodes:
        first = starts[node.lineno - 1] + node.col_offset
        last = starts[node.end_lineno - 1] + node.end_col_offset
        yield data[first:last].decode(errors="surrogatepass")
