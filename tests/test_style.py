"""The rules a machine can check, so that the scripts stay alike and the documents stay true."""

import ast
import importlib
import re
import shlex

import pytest
import tyro
from conftest import ROOT

METHODS = [
    n for n in ("esr", "pw_opsd", "trd", "reopd", "bic_release") if (ROOT / f"{n}.py").exists()
]
SCRIPTS = [*METHODS, "eval", "tiny"]
LIMITS = {"common": 600, "eval": 600} | dict.fromkeys(
    [
        *METHODS,
        "tiny",
        "kl",
        "run",
        "sampler",
        "align",
        "baselines",
        "tiny_task",
        "benchmarks",
        "bfcl",
        "compare",
        "sandbox",
        "sandbox_box",
        "sandbox_run",
        "codebench",
        "code_extract",
        "livecodebench",
    ],
    400,
)
SEAMS = {"main", "check", "make_rollouts", "teacher_prompt", "token_weights"}


def source(name):
    return (ROOT / f"{name}.py").read_text()


def args_class(name):
    return next(
        n for n in ast.parse(source(name)).body if isinstance(n, ast.ClassDef) and n.name == "Args"
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read_and_every_default_has_a_source(name):
    text, fields = source(name), args_class(name).body
    fields = [f for f in fields if isinstance(f, ast.AnnAssign)]
    nodes = [*ast.walk(ast.parse(text)), *ast.walk(ast.parse(source("run")))]
    read = {a.attr for a in nodes if isinstance(a, ast.Attribute)}
    read |= {c.value for c in ast.walk(ast.parse(text)) if isinstance(c, ast.Constant)}  # getattr
    lines = text.splitlines()
    for field in fields:
        assert field.target.id in read, f"{name}: --{field.target.id} is never read"
        comment = lines[field.end_lineno - 1].partition("  # ")[2]
        assert comment, f"{name}: --{field.target.id} has no help"
        if field.value is not None and name != "tiny":
            assert re.search(r"\[.+\]$", comment), f"{name}: --{field.target.id} has no source"
    assert len(fields) <= 40  # pw_opsd samples in three ways: student, teacher, evaluation


@pytest.mark.parametrize("name", METHODS)
def test_docstring_names_paper_and_differences(name):
    doc = ast.get_docstring(ast.parse(source(name)))
    assert re.search(r"arXiv:\d{4}\.\d{5}", doc)
    assert "Differences from the paper:" in doc
    assert "Run it:" in doc


@pytest.mark.parametrize("name", sorted(LIMITS))
def test_length_and_independence(name):
    text = source(name)
    assert len(text.splitlines()) <= LIMITS[name]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            limit = 170 if node.name == "main" else 60
            assert node.end_lineno - node.lineno < limit, f"{name}.{node.name} is too long"
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
        assert not set(names) & set(METHODS), f"{name} imports a method script"


def test_the_same_name_means_the_same_body_in_every_script():
    bodies = {}
    for name in METHODS:
        for node in ast.parse(source(name)).body:
            if isinstance(node, ast.FunctionDef) and node.name not in SEAMS:
                bodies.setdefault(node.name, set()).add(ast.dump(node))
    assert [n for n, kinds in bodies.items() if len(kinds) > 1] == []


def commands():
    documents = {"README.md": (ROOT / "README.md").read_text()}
    documents |= {f"{n}.py": ast.get_docstring(ast.parse(source(n))) or "" for n in SCRIPTS}
    for document, text in documents.items():
        text = re.sub(r"\\\n\s*", " ", text)
        for line in re.findall(r"python (?:-m \S+ )?((?:\w+)\.py [^\n`|]*)", text):
            line = line.split("  # ")[0].split(" #")[0].strip()
            if "..." not in line:
                yield pytest.param(line, id=f"{document}: {line[:60]}")


@pytest.mark.parametrize("command", list(commands()))
def test_every_documented_command_parses(command):
    script, *arguments = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py"))
    assert tyro.cli(module.Args, args=arguments)


def test_no_registry_host_is_named():
    hosts = re.compile("pypi" + r"\.org|pytorch" + r"\.org/whl|registry\.npm", re.IGNORECASE)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.txt"), *ROOT.glob("*.md"), ROOT / ".ci/run"]:
        assert not hosts.search(path.read_text()), path
