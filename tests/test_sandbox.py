"""Hostile programs against sandbox.py: none may pass, hang, stay, or touch the host."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

import sandbox
from sandbox import Limits, isolation, run_many, run_python

LIMITS = Limits(wall_s=20, cpu_s=4, memory_mb=256, file_mb=8, processes=8, output_bytes=100_000)
SHORT = replace(LIMITS, wall_s=0.8)
CHECK = "assert f(1) == 2"
SYSTEM_PYTHON = "/usr/bin/python3"  # one that other uids can read

ESCAPE = """
import os, sys, time
def f(x): return x + 1
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 64)
        time.sleep(60)
        os._exit(0)
    os._exit(0)
time.sleep(0.1)
"""
FORGE = """
def f(x): return 0
"""

# name: (program, statuses that are right, other arguments of run_python)
HOSTILE = {
    # never ends
    "infinite loop": ("while True: pass", {"timeout"}, {"limits": SHORT}),
    "loop in the check": ("def f(x):\n    while True: pass", {"timeout"}, {"limits": SHORT}),
    "loop that catches all": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        {"timeout"}, {"limits": SHORT},
    ),
    "ignores SIGTERM SIGALRM SIGXCPU SIGINT SIGHUP": (
        "import signal\nfor s in set(signal.valid_signals()) - {9, 19, 32, 33}:\n"
        "    signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        {"timeout"}, {"limits": SHORT},
    ),
    "sleeps": ("import time\ntime.sleep(60)", {"timeout"}, {"limits": SHORT}),
    "stops itself": ("import os\nos.kill(os.getpid(), 19)", {"timeout"}, {"limits": SHORT}),
    "regex catastrophe": (
        "import re\nre.match(r'(a+)+$', 'a' * 40 + 'b')", {"timeout"}, {"limits": SHORT},
    ),
    "integer bomb": ("x = 9 ** 9 ** 9", {"timeout", "memory"}, {"limits": SHORT}),
    "int conversion bomb": (
        "import sys\nsys.set_int_max_str_digits(0)\nint('9' * 10**7)",
        {"timeout"}, {"limits": SHORT},
    ),
    "thread that stays, no check": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
        {"timeout"}, {"limits": SHORT, "check": ""},
    ),
    "atexit that hangs, no check": (
        "import atexit, time\natexit.register(time.sleep, 60)",
        {"timeout"}, {"limits": SHORT, "check": ""},
    ),
    # takes too much
    "fork bomb": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        {"timeout"}, {"limits": SHORT},
    ),
    "fork bomb that gives up": (
        "import os\nn = 0\ntry:\n    while True:\n        if os.fork() == 0: os.pause() if 0 else "
        "__import__('time').sleep(60)\n        n += 1\nexcept BlockingIOError: pass\n"
        "assert n > 20, n",
        {"failed"}, {},
    ),
    "thread bomb": (
        "import threading, time\nfor i in range(50):\n"
        "    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        {"failed"}, {"check": ""},
    ),
    "zombies": (
        "import os\nn = 0\nwhile n < 50:\n    if os.fork() == 0: os._exit(0)\n    n += 1",
        {"failed"}, {"check": ""},
    ),
    "memory bomb": ("x = bytearray(2**30)", {"memory"}, {}),
    "slow memory bomb": ("x = []\nwhile True: x.append(bytearray(2**20))", {"memory"}, {}),
    "mmap bomb": ("import mmap\nmmap.mmap(-1, 2**30)", {"failed"}, {"check": ""}),
    "disk filler": (
        "with open('x', 'wb') as file:\n    for i in range(20): file.write(bytes(2**20))",
        {"failed"}, {"check": ""},
    ),
    "disk filler, small files": (
        "for i in range(20):\n    with open(str(i), 'wb') as file: file.write(bytes(2**20))",
        {"failed"}, {"check": ""},
    ),
    "many files": ("for i in range(20_000): open(str(i), 'w').close()", {"failed"}, {"check": ""}),
    "many descriptors": ("x = [open('a', 'w') for i in range(1000)]", {"failed"}, {"check": ""}),
    "stdout flood": ("while True: print('x' * 1000)", {"output"}, {}),
    "stderr flood": (
        "import os\nwhile True:\n    try: os.write(2, b'x' * 70_000)\n"
        "    except OSError: pass",
        {"output"}, {},
    ),
    "flood of both, in turn": (
        "import os\nwhile True:\n    os.write(1, b'x' * 70_000)\n    os.write(2, b'y' * 70_000)",
        {"output"}, {},
    ),
    "huge exception message": ("raise ValueError('x' * 10**7)", {"output"}, {}),
    "deep recursion": ("def f(x): return f(x)", {"failed"}, {}),
    "deep recursion in C": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return max([x], key=f)",
        {"failed", "memory"}, {},
    ),
    "compile bomb": ("(1<<19**8,)*4**8, " * 100 + "\nx = " + "(" * 5000, {"failed", "memory"}, {}),
    "constant folding bomb": ("x = ((1,) * 4000,) * 10**6 * 10**6", {"failed", "memory"}, {}),
    "nested parentheses": ("-" * 100_000 + "1", {"failed", "memory"}, {}),
    # is no program
    "NUL byte": ("def f(x): return 2\n\0", {"failed"}, {}),
    "syntax error": ("def f(x) return 2", {"failed"}, {}),
    "lone surrogate": ("x = '\ud800'", {"failed"}, {}),
    "no such function": ("g = 1", {"failed"}, {"entry": "f"}),
    # ends early
    "sys.exit": (FORGE + "import sys\nsys.exit(0)", {"failed"}, {}),
    "os._exit": (FORGE + "import os\nos._exit(0)", {"failed"}, {}),
    "quit": (FORGE + "quit()", {"failed"}, {}),
    "sys.exit in the function": ("import sys\ndef f(x): sys.exit(0)", {"failed"}, {}),
    "os._exit in the function": ("import os\ndef f(x): os._exit(0)", {"failed"}, {}),
    "quit in __eq__": (
        "class T:\n    def __eq__(self, other): quit(0)\ndef f(x): return T()", {"failed"}, {},
    ),
    "os._exit in atexit": (
        FORGE + "import atexit, os\natexit.register(os._exit, 0)", {"failed"}, {},
    ),
    "os._exit in a thread": (
        "import os, threading, time\nthreading.Timer(0.2, os._exit, (0,)).start()\n"
        "def f(x): time.sleep(2)",
        {"failed"}, {},
    ),
    "exit in an excepthook": (
        FORGE + "import os, sys\nsys.excepthook = lambda *a: os._exit(0)", {"failed"}, {},
    ),
    "replaces the process": (FORGE + "import os\nos.execv('/bin/true', ['true'])", {"failed"}, {}),
    "kills itself": ("import os\nos.kill(os.getpid(), 9)", {"failed"}, {}),
    # forges
    "prints passed": (FORGE + "print('passed\\ncheck ended')", {"failed"}, {}),
    "writes to low descriptors": (
        FORGE + "import os\nfor fd in range(64):\n    try: os.write(fd, b'passed')\n"
        "    except OSError: pass\nos._exit(0)",
        {"failed"}, {},
    ),
    "writes the right words": (
        "import os\ndef f(x):\n    for fd in range(64):\n"
        "        try: os.write(fd, b'program endedcheck ended' + bytes(32))\n"
        "        except OSError: pass\n    os._exit(0)",
        {"failed"}, {},
    ),
    "echoes all it can read": (
        "import os\ndef f(x):\n    for fd in range(3, 64):\n        try:\n"
        "            os.set_blocking(fd, False)\n            os.write(fd, os.read(fd, 64))\n"
        "        except OSError: pass\n    os._exit(0)",
        {"failed"}, {},
    ),
    "closes all descriptors": (
        FORGE + "import os\nos.closerange(3, 64)", {"failed"}, {},
    ),
    "closes stdout": ("import sys, os\nos.close(1)\nsys.stdout.close()", {"failed"}, {}),
    "patches builtins": (
        FORGE + "import builtins\nbuiltins.exec = builtins.compile = builtins.abs = "
        "builtins.all = builtins.print = lambda *a, **k: True",
        {"failed"}, {"check": "assert all([f(1) == 2])\nassert abs(f(1) - 2) < 1"},
    ),
    "patches builtins while it is checked": (
        "import builtins\ndef f(x):\n    builtins.all = lambda *a: True\n    return 0",
        {"failed"}, {"check": "found = f(1)\nassert all([found == 2])"},
    ),
    "patches os": (
        FORGE + "import os, sys\nos.write = os._exit = os.read = lambda *a: None\n"
        "sys.exit = lambda *a: None",
        {"failed"}, {},
    ),
    "patches a module of the check": (
        FORGE + "import math\nmath.isclose = lambda *a, **k: True\n"
        "import sys\nsys.modules['math'] = math",
        {"failed"}, {"check": "import math\nassert math.isclose(f(1), 2)"},
    ),
    "replaces a module of the check": (
        FORGE + "import sys, types\nm = types.ModuleType('math')\nm.isclose = lambda *a: True\n"
        "sys.modules['math'] = m",
        {"failed"}, {"check": "from math import isclose\nassert isclose(f(1), 2)"},
    ),
    "a file that shadows the library": (
        FORGE + "open('fractions.py', 'w').write('Fraction = lambda *a: 0')\n"
        "import sys\nsys.path.insert(0, '.')",
        {"failed"}, {"check": "from fractions import Fraction as F\nassert F(f(1)) == F(2)"},
    ),
    "defines the checker": (
        FORGE + "def check(f): return True\n", {"failed"},
        {"check": "def check(g):\n    assert g(1) == 2\ncheck(f)"},
    ),
    "traces and jumps over the check": (
        FORGE + "import sys\ndef trace(frame, event, arg):\n"
        "    if frame.f_code.co_filename == '<check>' and event == 'line': frame.f_lineno = 2\n"
        "    return trace\nsys.settrace(trace)",
        {"failed"}, {"check": "assert f(1) == 2\npass"},
    ),
    "__eq__ is always true": (
        "class T:\n    __eq__ = lambda self, other: True\n    __hash__ = None\n"
        "def f(x): return T()",
        {"failed"}, {"entry": "f"},
    ),
    "__eq__ of a subclass, nested": (
        "class T(int):\n    __eq__ = lambda self, other: True\n    __hash__ = int.__hash__\n"
        "class L(list):\n    __iter__ = None\ndef f(x): return L([T(0)])",
        {"failed"}, {"entry": "f", "check": "assert f(1) == [2]"},
    ),
    "a mock that equals all": (
        "from unittest.mock import ANY\ndef f(x): return ANY", {"failed"}, {"entry": "f"},
    ),
    "looks for the token in frames": (
        "import gc, os, sys\ndef f(x):\n    found, frame = [], sys._getframe()\n"
        "    while frame:\n        found += list(frame.f_locals.values()); frame = frame.f_back\n"
        "    found += [b for o in gc.get_objects() for b in gc.get_referents(o)]\n"
        "    for value in found:\n        if type(value) is bytes and 16 <= len(value) <= 64:\n"
        "            for fd in range(3, 10):\n                try: os.write(fd, value)\n"
        "                except OSError: pass\n    os._exit(0)",
        {"failed"}, {},
    ),
    "looks for the check": (
        "import gc, sys\ntext = ''\nframe = sys._getframe()\nwhile frame:\n"
        "    text += repr(frame.f_locals); frame = frame.f_back\n"
        "text += repr([s for o in gc.get_objects() for s in gc.get_referents(o) "
        "if type(s) is str])\nassert 'SECRET' + 'ANSWER' not in text\ndef f(x): return 1",
        {"failed"}, {"check": "assert f(1) == 'SECRETANSWER'"},
    ),
    "lets a child report": (
        FORGE + "import os\nif os.fork(): os._exit(0)", {"failed"}, {},
    ),
    "parent and child both go on": (FORGE + "import os\nos.fork()", {"failed"}, {}),
    # harms others
    "kill -1": (FORGE + "import os\ntry: os.kill(-1, 9)\nexcept OSError: pass", {"failed"}, {}),
    "kills its parent": (
        FORGE + "import os\nfor pid in (os.getppid(), 1):\n    try: os.kill(pid, 9)\n"
        "    except OSError: pass",
        {"failed"}, {},
    ),
    "kills its group": (
        FORGE + "import os\nos.killpg(0, 9)", {"failed"}, {},
    ),
}  # fmt: skip

# name: a program that asserts that what it should not be able to do fails
REFUSED = {
    "environment": "import os\nassert set(os.environ) <= "
    "{'HOME', 'PATH', 'TMPDIR', 'OMP_NUM_THREADS', 'LC_CTYPE'}, os.environ",
    "arguments": "import sys\nassert sys.argv == ['main.py'] and not sys.stdin.read()",
    "descriptors": "import os\nopen_fds = []\nfor fd in range(256):\n"
    "    try: os.fstat(fd); open_fds.append(fd)\n    except OSError: pass\n"
    "assert len(open_fds) <= 4, open_fds",
    "user": "import os\nassert os.getuid() and os.geteuid() and not os.getgroups()[1:]",
    "become root": "import os\nos.setuid(0)",
    "mount": "import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/box', b'tmpfs', 0, b'') == 0",
    "user namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "chroot": "import os\nos.chroot('/box')",
    "home": "import os\nos.listdir('/root/.ssh') + os.listdir('/root')[50:]",
    "memory of the parent": "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
    "environment of others": "open('/proc/1/environ').read()",
    "ptrace": "import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "passwords": "open('/etc/shadow').read()",
    "write to the library": "import os\nopen(os.path.join(os.path.dirname(os.__file__), 'x'), 'w')",
    "symlink out": "import os\nos.symlink('/etc', 'etc')\nopen('etc/passwd').read()",
    "hard link": "import os\nos.link('/usr/bin/env', 'env')",
    "device": "import os\nos.mknod('vda', 0o60600, os.makedev(254, 0))",
    "tcp": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 2)",
    "udp": "import socket\ns = socket.socket(type=socket.SOCK_DGRAM)\n"
    "s.sendto(b'x', ('8.8.8.8', 53))",
    "dns": "import socket\nsocket.getaddrinfo('example.com', 80)",
    "unix socket": "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('SOCKET')",
    "abstract socket": "import socket\ns = socket.socket(socket.AF_UNIX)\n"
    "s.connect('\\0sandbox-test')",
    "the caller's cwd": "open('ROOT/README.md').read()",
    "a file anyone may write": "open('OPEN', 'a').write('x')",
    "deleting it": "import os\nos.remove('OPEN')",
    "changing its mode": "import os\nos.chmod('OPEN', 0)",
}
PROBES = ("environment", "arguments", "descriptors", "user")  # these assert; the others must raise


@pytest.fixture
def host():
    """A directory anyone may write; afterwards it is as it was and nothing of the run is left."""
    folder = Path(tempfile.mkdtemp(prefix="host-"))  # pytest's own are closed to other users
    folder.chmod(0o777)
    victim = folder / "open"
    victim.write_text("mine")
    victim.chmod(0o666)
    temporary = set(Path("/tmp").glob("sandbox-*"))
    yield folder
    assert victim.read_text() == "mine"
    assert victim.stat().st_mode & 0o777 == 0o666
    assert leftovers() == []
    assert set(Path("/tmp").glob("sandbox-*")) - temporary == set()
    shutil.rmtree(folder)


def leftovers():
    """Processes of any run: by the uid of runs, a command line of ours, or the environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command, environ = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
            uid = entry.stat().st_uid
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        ours = 61184 <= uid < 65520 or b"sandbox_box.py" in command or b"check ended" in command
        if ours or b"/box\0" in environ:
            found.append((entry.name, command[:80]))
    return found


@pytest.fixture
def plain(monkeypatch):
    """Make run_python use the "plain" box, with a Python that the uid of a run can read."""
    for name, value in (("executable", SYSTEM_PYTHON), ("prefix", "/usr"), ("base_prefix", "/usr")):
        monkeypatch.setattr(sys, name, value)
    monkeypatch.setattr(sandbox, "_choose_box", lambda: ("plain", []))


def survive(name):
    """Run one of HOSTILE in the box in use."""
    code, right, arguments = HOSTILE[name]
    arguments = {"limits": LIMITS, "check": CHECK} | arguments
    start = time.monotonic()
    result = run_python(code, **arguments)
    assert result.status in right, result
    limits = arguments["limits"]
    assert time.monotonic() - start < limits.wall_s + 20  # 2 when idle; a loaded machine is late
    assert result.status != "output" or result.seconds < limits.wall_s, "flooded on"
    assert len(result.stdout) <= limits.output_bytes
    assert len(result.stderr) <= limits.output_bytes


def reach(name, host):
    """Run one of REFUSED in the box in use."""
    code = REFUSED[name].replace("ROOT", str(ROOT)).replace("OPEN", str(host / "open"))
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix, \
            socket.socket(socket.AF_UNIX) as abstract:  # fmt: skip
        unix.bind(str(host / "socket"))
        unix.listen()
        (host / "socket").chmod(0o777)
        abstract.bind("\0sandbox-test")
        abstract.listen()
        code = code.replace("PORT", str(tcp.getsockname()[1])).replace("SOCKET", f"{host}/socket")
        result = run_python(code, limits=LIMITS)
    (host / "socket").unlink()
    if name in PROBES:
        assert result.status == "passed", result
    else:
        assert result.status == "failed", result
        assert "rror" in result.stderr


MESSY = {  # right programs that leave a mess
    "daemon": ESCAPE,
    "locks its directory": "import os\nos.mkdir('a')\nopen('a/b', 'w')\nos.chmod('a', 0)\n"
    "os.chmod('.', 0)\ndef f(x): return x + 1",
    "deletes its directory": "import os\ntry: os.rmdir(os.getcwd())\nexcept OSError: pass\n"
    "def f(x): return x + 1",
    "links outwards": "import os\nos.mkdir('b')\nfor path in ('/', 'OPEN'):\n"
    "    try: os.symlink(path, 'b/' + path.strip('/').replace('/', '') + 'a')\n"
    "    except PermissionError: pass\n"
    "def f(x): return x + 1",
    "threads": "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n"
    "def f(x): return x + 1",
    "atexit": "import atexit, time\natexit.register(time.sleep, 60)\ndef f(x): return x + 1",
}
HARD = ("infinite loop", "fork bomb", "memory bomb", "stdout flood", "os._exit", "kills its parent")
HARD += ("writes the right words", "patches builtins", "kill -1", "many descriptors", "zombies")
OUTER = ("tcp", "udp", "dns", "unix socket", "the caller's cwd", "a file anyone may write")
OUTER += ("deleting it", "changing its mode", "home", "passwords", "environment", "descriptors")


@pytest.mark.parametrize("name", MESSY)
def test_a_right_program_passes_and_leaves_nothing(name, host):
    code = MESSY[name].replace("OPEN", str(host))
    assert run_python(code, check=CHECK, entry="f", limits=LIMITS).status == "passed"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_does_not_pass_hang_or_stay(name, host):
    survive(name)


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_program_cannot_reach(name, host):
    reach(name, host)


@pytest.mark.parametrize("name", HARD)
def test_hostile_program_in_the_plain_box(name, host, plain):
    survive(name)


@pytest.mark.parametrize("name", OUTER)
def test_what_a_program_cannot_reach_in_the_plain_box(name, host, plain):
    reach(name, host)


@pytest.mark.parametrize("name", MESSY)
def test_the_plain_box_is_left_clean(name, host, plain):
    test_a_right_program_passes_and_leaves_nothing(name, host)


NOT_ROOT = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import sandbox
sandbox._choose_box = lambda: (sys.argv[2], [])
limits = sandbox.Limits(wall_s=2, memory_mb=256, file_mb=8, processes=8, output_bytes=100_000)
for job in json.load(sys.stdin):
    print(sandbox.run_python(job["code"], limits=limits, check=job["check"]).status)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("box", ["user", "plain"])
def test_boxes_of_a_caller_who_is_not_root(box, host):
    for name in ("sandbox.py", "sandbox_box.py", "sandbox_run.py"):
        (host / name).write_text((ROOT / name).read_text())
    jobs = [(HOSTILE[n][0], HOSTILE[n][2].get("check", CHECK), HOSTILE[n][1]) for n in HARD]
    jobs += [(MESSY[n].replace("OPEN", str(host)), CHECK, {"passed"}) for n in MESSY]
    outer = [REFUSED[n] for n in OUTER if n not in PROBES and "PORT" not in REFUSED[n]]
    jobs += [(code.replace("OPEN", str(host / "open")), "", {"failed"}) for code in outer]
    jobs += [(RIGHT["function"], CHECK, {"passed"}), (FORGE, CHECK, {"failed"})]
    done = subprocess.run([SYSTEM_PYTHON, "-c", NOT_ROOT, str(host), box], cwd="/", env={},
                          user=54321, group=54321, extra_groups=[], capture_output=True, text=True,
                          input=json.dumps([{"code": c, "check": k} for c, k, _ in jobs]),
                          timeout=120)  # fmt: skip
    statuses = done.stdout.split()
    assert len(statuses) == len(jobs), done.stderr
    for status, (code, _, right) in zip(statuses, jobs, strict=True):
        assert status in right, code


# ---- What must work ------------------------------------------------------------------------------
RIGHT = {
    "function": "def f(x): return x + 1",
    "imports": "import collections, heapq, itertools, math, re, typing, dataclasses, functools\n"
    "def f(x): return math.comb(x + 1, 1)",
    "dataclass": "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n"
    "def f(x): return P(x).x + 1",
    "pickle": "import pickle\nclass P: y = 2\ndef f(x): return pickle.loads(pickle.dumps(P())).y",
    "future import": "from __future__ import annotations\ndef f(x: Undefined): return x + 1",
    "writes a file": "open('a', 'w').write('2')\ndef f(x): return int(open('a').read())",
    "temporary file": "import tempfile\ndef f(x):\n    tempfile.mkdtemp()\n    return 2",
    "main guard": "def f(x): return 0\nif __name__ == '__main__':\n    def f(x): return 2",
    "prints": "def f(x):\n    print('debug', x)\n    return 2",
    "prints elsewhere": "import sys, io\nsys.stdout = io.StringIO()\ndef f(x): return 2",
    "subclass of a built-in": "from enum import IntEnum\nclass E(IntEnum): A = 2\n"
    "def f(x): return E.A",
    "recursion": "def g(n): return 0 if n == 0 else 1 + g(n - 1)\ndef f(x): return g(900) - 898",
    "child process": "import subprocess\ndef f(x): return subprocess.run(['true']).returncode + 2",
    "threads": "from concurrent.futures import ThreadPoolExecutor as P\ndef f(x):\n"
    "    with P(2) as p: return list(p.map(int, ['2']))[0]",
    "catches its own exit": "def f(x):\n    try: exit()\n    except SystemExit: return 2",
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_program_passes(name, host):
    result = run_python(RIGHT[name], check=CHECK, entry="f", limits=LIMITS)
    assert (result.status, result.exit_code, result.stderr) == ("passed", 0, "")


def test_human_eval_form(host):
    check = "def check(candidate):\n    assert candidate([1, 2]) == {'a': (1, 2)}\n\ncheck(f)"
    right = "from collections import Counter\ndef f(x): return Counter(a=tuple(x))"
    wrong = "def f(x): return {'a': x}"
    for entry in ("", "f"):
        assert run_python(right, check=check, entry=entry).status == "passed"
        assert run_python(wrong, check=check, entry=entry).status == "failed"


def test_stdin_stdout_exit_code_and_stderr(host):
    result = run_python("print(int(input()) + 1)\nexit()", stdin="41\n")
    assert (result.status, result.stdout, result.exit_code) == ("passed", "42\n", 0)
    result = run_python("import sys\nprint('é')\nprint('bad', file=sys.stderr)\nsys.exit(3)")
    assert (result.status, result.stdout, result.stderr) == ("failed", "é\n", "bad\n")
    assert result.exit_code == 3
    assert run_python("import os\nos.kill(os.getpid(), 15)").exit_code == -15
    assert run_python("import time\ntime.sleep(9)", limits=SHORT).exit_code is None


def test_streams_at_their_edges(host):
    result = run_python("import os\nos.write(1, b'a\\xff\\0')", limits=LIMITS)
    assert (result.status, result.stdout) == ("passed", "a\ufffd\0")
    edge = replace(LIMITS, output_bytes=1000)
    for count, status in ((1000, "passed"), (1001, "output")):
        result = run_python(f"import os\nos.write(2, b'x' * {count})", limits=edge)
        assert (result.status, result.stderr) == (status, "x" * 1000)
    text = "7\n" * 2_000_000
    assert run_python("pass", stdin=text, limits=LIMITS).status == "passed"
    read = run_python("import sys\nprint(len(sys.stdin.read()))", stdin=text, limits=LIMITS)
    assert read.stdout == "4000000\n"


def test_cpu_limit_ends_it_before_the_wall(host):
    catch = "import signal\nsignal.signal(signal.SIGXCPU, lambda *a: None)\n"
    for code, signals in (("", {-24, -9}), (catch, {-9})):
        result = run_python(f"{code}while True: pass", limits=replace(LIMITS, cpu_s=1, wall_s=30))
        assert result.status == "timeout"
        assert result.exit_code in signals


def test_large_program_and_check(host):
    filler = "# " + "x" * 600_000 + "\n"
    result = run_python(filler + RIGHT["function"], check=filler + CHECK)
    assert result.status == "passed", result


def test_a_broken_check_is_the_error_of_the_caller():
    with pytest.raises(SyntaxError):
        run_python("pass", check="assert (")


def test_no_box_is_an_error_with_reasons(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises((RuntimeError, FileNotFoundError), match="nowhere"):
        sandbox._choose_box.__wrapped__()


def test_isolation_says_what_is_in_force():
    assert isolation().keys() == {"box", "user", "processes", "network", "files", "refused"}
    assert isolation()["box"] in ("root", "user", "plain")


def test_run_many_keeps_the_order_and_is_parallel(host):
    jobs = [{"code": f"import time\ntime.sleep({3 - i / 4})\nprint({i})"} for i in range(4)]
    start = time.monotonic()
    results = run_many(jobs, workers=4)
    assert [r.stdout for r in results] == ["0\n", "1\n", "2\n", "3\n"]
    assert time.monotonic() - start < 8  # one after the other: 10.5 without start-up


def test_overhead(host):
    run_python("pass")
    best = min(run_python("pass", check="pass").seconds for _ in range(10))
    assert best < 0.5, best  # 0.09 when idle


def test_box_dies_with_its_caller(host):
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport sandbox\n"
    code += "sandbox.isolation()\nprint('ready', flush=True)\n"  # its trial runs are over
    code += "sandbox.run_python('import time; time.sleep(60)')"
    environment = os.environ | {"TMPDIR": str(host)}
    caller = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=-1)
    assert caller.stdout.readline() == b"ready\n"
    deadline = time.monotonic() + 20
    while len(leftovers()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(leftovers()) >= 3
    caller.kill()
    caller.communicate()
    while leftovers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert leftovers() == []
    assert list(host.glob("sandbox-*")) == []
