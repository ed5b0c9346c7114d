"""What runs in the box of sandbox.py: the program, then the check. Sent as text, never imported.

argv: the job as JSON. Frames on the channel, in turn: modules the check imports, the program; out
"program ended"; in the check; out "check ended"; in the token; out the token.
"""

import builtins
import json
import os
import sys

__builtins__ = dict(vars(builtins))  # of all functions below, so that patches do not reach them


def run(job):
    """Run the program, then the check. Its own builtins are a copy, and it binds what it calls
    later, so that a program that replaces functions does not replace them here."""

    write, leave, flush, untrace = os.write, os._exit, sys.stdout.flush, sys.settrace
    channel = open(job["channel"], "rb", closefd=False)  # noqa: SIM115

    def receive():
        return channel.read(int.from_bytes(channel.read(8), "big")).decode(errors="surrogatepass")

    for name in receive().split():
        try:
            __import__(name)
        except ImportError:  # the check itself will say so
            continue
    before, known = [(m, dict(vars(m))) for m in sys.modules.values()], dict(sys.modules)
    known["__main__"] = sys.modules["__main__"] = main = type(sys)("__main__")
    sys.argv = ["main.py"]
    code = receive()
    if job["box"] == "plain":
        refuse(job)
    exec(compile(code, "<program>", "exec", dont_inherit=True), vars(main))
    if not job["checked"]:
        return
    write(job["channel"], b"program ended")
    check = receive()
    untrace(None)
    sys.modules.update(known)
    for module, names in before:
        vars(module).update(names)
    scope = {**vars(main), "__builtins__": __builtins__}
    if job["entry"]:
        function = scope[job["entry"]]
        scope[job["entry"]] = lambda *args, **named: plain(function(*args, **named))
    exec(compile(check, "<check>", "exec", dont_inherit=True), scope)
    flush()
    write(job["channel"], b"check ended")
    write(job["channel"], channel.read(32))
    leave(0)


def plain(value):
    """A copy of exact built-in types; a subclass becomes its base. TypeError for other types."""
    kind = type(value)
    if value is None or kind in (bool, int, float, complex, str, bytes):
        return value
    for base in (list, tuple, set, frozenset):
        if issubclass(kind, base):
            return base([plain(item) for item in base.__iter__(value)])
    if issubclass(kind, dict):
        return {plain(key): plain(item) for key, item in dict.items(value)}
    for base, copy in ((int, int.__pos__), (float, float.__pos__), (str, str.__str__)):
        if issubclass(kind, base):
            return copy(value)
    raise TypeError(f"the program returned {kind.__name__}, not plain data")


def refuse(job):
    """The audit hook of the "plain" box: no network, other programs, signals, or outer files."""

    words = ("socket.", "subprocess.", "ctypes.dlsym", "os.exec", "os.posix_spawn", "os.system")
    words += ("os.kill", "gc.get_")
    trees = (job["home"], *job["trees"], "/dev/null", "/dev/urandom")
    real = os.path.realpath

    def hook(event, args):
        if event.startswith(words):
            raise PermissionError(f"refused: {event}")
        if event == "open" or event.startswith(("os.", "shutil.")):
            for path in (real(os.fsdecode(a)) for a in args if isinstance(a, (str, bytes))):
                if not any(path == tree or path.startswith(f"{tree}/") for tree in trees):
                    raise PermissionError(f"refused: {event} of {path}")

    sys.addaudithook(hook)


run(json.loads(sys.argv[1]))
