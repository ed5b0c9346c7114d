"""Runs Python that a model wrote and tells whether its check ran to the end. Linux, stdlib only.

Three kinds of process a run, a file each:

    sandbox.py            in the caller: holds the pipes and the clock, never runs the program
      sandbox_box.py      makes the box; kills and reaps all of it when the caller lets go or dies
        sandbox_run.py    in the box, limited and unprivileged: runs the program, then the check

The first box that works here is used, and `isolation()` says which: "root" (namespaces, own uid),
"user" (namespaces in a user namespace), "plain" (limits, own uid where root, an audit hook). None:
RuntimeError with the reason of each.

"passed" needs exit code 0 and, where there is a check, the echo of a random token. The caller sends
the check only when the program's top level has ended, and the token only when the check has: until
then they are not in the process, and never in argv, environment or a file. The check sees modules
and builtins as they were before the program.

What this does not stop. Program and check share an interpreter: a program written against this very
file can speak its protocol; what its functions return can lie (`entry` copies it into plain data);
while they run they can patch again; classes of library modules that it patches stay patched. Limits
on memory and CPU are per process, so a run may take `processes` times as much. Kernel exploits.
The "plain" box is against accidents: ctypes, once there, gets round any hook of the interpreter.
"""

import ast
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

BOX = Path(__file__).resolve().with_name("sandbox_box.py")
HARNESS = Path(__file__).resolve().with_name("sandbox_run.py").read_text()
SYSTEM = ["/usr", "/bin", "/lib", "/lib64"]  # the C library; links into /usr on most machines


@dataclass(frozen=True)
class Limits:
    wall_s: float = 10.0  # seconds until it is killed, start-up (under 0.1) included
    cpu_s: int = 10  # seconds of CPU, each process
    memory_mb: int = 1024  # MiB of address space, each process
    file_mb: int = 64  # MiB of files, all together; in the "plain" box each
    processes: int = 8  # processes and threads alive at a time
    output_bytes: int = 2**20  # of stdout, and again of stderr; one more kills


@dataclass(frozen=True)
class Result:
    status: str  # passed | failed | timeout (wall or CPU) | memory | output (too much of it)
    exit_code: int | None  # negative: the signal; None: killed by the caller
    stdout: str  # at most output_bytes before decoding; what is not UTF-8 becomes U+FFFD
    stderr: str
    seconds: float  # wall time, start-up and clean-up included


def run_python(
    code: str, *, stdin: str = "", check: str = "", entry: str = "", limits: Limits = Limits()
) -> Result:
    """Run `code`, then `check` in a copy of its globals; "passed" when the check raised nothing.

    Without a check "passed" only means exit code 0, for programs judged by their stdout. `entry`
    names the program's function whose results reach the check as copies made of built-in types, so
    that no class of the program answers the check's `==`; other types fail the run. Raises
    SyntaxError when the check does not parse, RuntimeError when there is no box.
    """
    return _run(_choose_box()[0], code, stdin, check, entry, limits)


def run_many(jobs: Sequence[dict], workers: int) -> list[Result]:
    """run_python(**job) for each job, `workers` at a time; results in the order of the jobs."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda job: run_python(**job), jobs))


def isolation() -> dict[str, str]:
    """What is in force on this machine, by topic; "refused" says why no better box is."""
    box, refused = _choose_box()
    plain, root = box == "plain", os.geteuid() == 0
    return {
        "box": box,
        "user": "a uid of its own per run" if root else "the caller's, without capabilities",
        "processes": "subreaper kills all descendants" if plain else "PID namespace, killed whole",
        "network": "open; an audit hook refuses sockets" if plain else "empty network namespace",
        "files": "an audit hook refuses all but the interpreter and the cwd, and starting programs"
        if plain
        else "chroot: read-only interpreter and a tmpfs; no /proc, nothing of the caller",
        "refused": "; ".join(refused) or "none",
    }


# ---- In the caller -------------------------------------------------------------------------------
@lru_cache
def _choose_box() -> tuple[str, list[str]]:
    refused = []
    for box in ("root", "user", "plain"):
        try:
            result = _run(box, "pass", "", "pass", "", Limits(wall_s=30))
        except RuntimeError as error:
            refused.append(f"{box}: {error}")
            continue
        if result.status == "passed":
            return box, refused
        refused.append(f"{box}: {result.status} {result.stderr[-200:]}")
    raise RuntimeError(f"no box for untrusted programs here: {'; '.join(refused)}")


def _run(box: str, code: str, stdin: str, check: str, entry: str, limits: Limits) -> Result:
    start, checked = time.monotonic(), list(ast.walk(ast.parse(check)))
    modules = [a.name for node in checked if isinstance(node, ast.Import) for a in node.names]
    modules += [node.module for node in checked if isinstance(node, ast.ImportFrom)]
    with ExitStack() as stack:
        text = stack.enter_context(tempfile.TemporaryFile())
        text.write(stdin.encode(errors="surrogatepass"))
        text.flush()
        readable = stack.enter_context(open(f"/proc/self/fd/{text.fileno()}", "rb"))
        ours, theirs, leash, leash_end, report, report_end = [
            stack.enter_context(end) for _ in range(3) for end in socket.socketpair()
        ]
        job = {"box": box, "entry": entry, "checked": bool(check), "harness": HARNESS}
        job |= {"folder": f"{tempfile.gettempdir()}/sandbox-{secrets.token_hex(8)}"}
        job |= {"channel": theirs.fileno(), "leash": leash_end.fileno()}
        job |= {"report": report_end.fileno(), **asdict(limits)}
        job |= {"python": sys.executable, "trees": [sys.base_prefix, sys.prefix, *SYSTEM]}
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-S", str(BOX), json.dumps(job)],
            stdin=readable, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={}, cwd="/",
            pass_fds=[job["channel"], job["leash"], job["report"]],
            start_new_session=True,  # else Ctrl-C kills the launcher before it has cleaned up
        )  # fmt: skip
        for end in (theirs, leash_end, report_end):
            end.close()
        stack.callback(process.wait)
        pool = stack.enter_context(ThreadPoolExecutor(3))
        stack.callback(leash.shutdown, socket.SHUT_RDWR)  # first of all, also on an exception
        proof = pool.submit(_converse, ours, modules, code, check)
        streams = [
            pool.submit(_read, stream, limits.output_bytes, leash)
            for stream in (process.stdout, process.stderr)
        ]
        late = False
        report.settimeout(max(0.01, start + limits.wall_s - time.monotonic()))
        try:
            report.recv(1, socket.MSG_PEEK)  # the end of the program, or of all that held it
        except TimeoutError:
            late = True
        report.settimeout(None)
        leash.shutdown(socket.SHUT_RDWR)
        stdout, stderr = (stream.result() for stream in streams)
        record = {}
        for line in report.makefile():
            record |= json.loads(line)
    flood = max(len(stdout), len(stderr)) > limits.output_bytes
    if "error" in record or not (record or late or flood):
        raise RuntimeError(record.get("error") or f"launcher died: {stderr[-500:]!r}")
    stdout, stderr = (s[: limits.output_bytes].decode(errors="replace") for s in (stdout, stderr))
    exit_code = record.get("exit_code")
    if late or flood:
        status = "output" if flood else "timeout"
    elif exit_code == 0 and (proof.result() or not check):
        status = "passed"
    elif exit_code < 0 and record["cpu_s"] > 0.9 * limits.cpu_s:  # the two clocks differ a little
        status = "timeout"
    else:
        status = "memory" if exit_code and "MemoryError" in stderr[-500:] else "failed"
    return Result(status, exit_code, stdout, stderr, time.monotonic() - start)


def _read(stream: IO[bytes], limit: int, leash: socket.socket) -> bytes:
    with stream:
        data = stream.read(limit + 1)  # returns at the limit or when the last writer is gone
    if len(data) > limit:
        leash.shutdown(socket.SHUT_RDWR)
    return data


def _converse(channel: socket.socket, modules: list[str], code: str, check: str) -> bool:
    """Whether the harness said the right things in the right order, and nothing else."""
    token = secrets.token_bytes(32)
    turns = [(b"program ended", _frame(check)), (b"check ended", token), (token, b"")]
    try:
        channel.sendall(_frame(" ".join(modules)) + _frame(code))
        for expected, reply in turns:
            if channel.recv(len(expected), socket.MSG_WAITALL) != expected:
                return False
            if reply:  # else EPIPE, and a false "failed", where the program is gone already
                channel.sendall(reply)
    except OSError:  # it went away
        return False
    return True


def _frame(text: str) -> bytes:
    data = text.encode(errors="surrogatepass")
    return len(data).to_bytes(8, "big") + data
