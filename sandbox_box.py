"""Builds the box of sandbox.py and kills all that is in it. Run as a script, never imported.

argv: the job as JSON. The descriptors `report` (one JSON record goes out) and `leash` (anything
coming in, its end included, ends the run) stay here; the program gets `channel` and the streams.
Numbers are constants of the Linux headers: Python 3.11 has no names for them.
"""

import ctypes
import json
import os
import resource
import select
import signal
import sys
from contextlib import suppress


def launch(job):
    """Fork the box; return when it has ended or the caller has let go of the leash."""
    call("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: all orphans below become ours
    uid, gid = os.geteuid(), os.getegid()
    if job["box"] == "root" and uid != 0:
        raise PermissionError("the caller is not root")
    if job["box"] == "user":
        if uid == 0:  # RLIMIT_NPROC never binds uid 0 of the host, in a namespace neither
            raise PermissionError("the caller is root")
        call("unshare", 0x10000000)  # CLONE_NEWUSER
        maps = {"setgroups": "deny", "uid_map": f"65534 {uid} 1", "gid_map": f"65534 {gid} 1"}
        for name, line in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    if job["box"] != "plain":
        call("unshare", 0x20000000)  # CLONE_NEWPID: the next child is its init
    box = os.fork()
    if box == 0:
        # 61184-65519 is what systemd keeps for services without a user of their own.
        contain(job, 61184 + os.getppid() % 4336 if uid == 0 else None)
    poll = select.poll()
    poll.register(job["leash"], select.POLLIN)
    poll.register(os.pidfd_open(box), select.POLLIN)
    poll.poll()


def kill_descendants():
    """Kill until there is no child: a subreaper without children has no descendants either."""
    while True:
        parents, family = {}, {os.getpid()}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/stat") as file:
                parents[int(pid)] = int(file.read().rpartition(")")[2].split()[1])
        while more := {p for p, parent in parents.items() if parent in family} - family:
            family |= more
        for pid in family - {os.getpid()}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def remove(folder):
    # Only the "plain" box leaves anything in it; the program may have locked directories.
    for parent, names, _ in os.walk(folder):
        for path in (f"{parent}/{name}" for name in names):
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    for parent, names, files in os.walk(folder, topdown=False):
        for path in (f"{parent}/{name}" for name in names + files):
            os.rmdir(path) if os.path.isdir(path) and not os.path.islink(path) else os.remove(path)
    os.rmdir(folder)


def contain(job, uid):
    """Build the box, start the program in it, reap, and report its end. Never returns."""
    call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    os.umask(0o022)
    home = f"{job['folder']}/box"
    if job["box"] != "plain":
        mount_root(job)
        home = "/box"
    os.mkdir(home, 0o700)
    os.chdir(home)
    program = os.fork()
    if program == 0:
        start(job, home, uid)
    pid = None
    while pid != program:
        pid, status, used = os.wait4(-1, 0)
    record = {"exit_code": os.waitstatus_to_exitcode(status)}
    record |= {"cpu_s": used.ru_utime + used.ru_stime}
    os.write(job["report"], f"{json.dumps(record)}\n".encode())
    os._exit(0)


def start(job, home, uid):
    """Become the program: limits, the uid of this run unless None, nothing inherited."""
    os.setsid()
    limits = {"CORE": 0, "CPU": job["cpu_s"], "NOFILE": 256, "NPROC": job["processes"]}
    limits |= {"AS": job["memory_mb"] * 2**20, "FSIZE": job["file_mb"] * 2**20}
    if uid is None and job["box"] == "plain":
        limits["NPROC"] += count_threads(os.getuid())
    for name, value in limits.items():
        hard = value + (name == "CPU")  # SIGXCPU can be caught; SIGKILL comes a second later
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, hard))
    if uid is not None:
        os.chown(home, uid, uid)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)  # RLIMIT_NPROC counts by uid, and never binds root
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    os.set_inheritable(job["channel"], True)
    env = {"HOME": home, "TMPDIR": home, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    keys = ("channel", "entry", "checked", "box", "trees")
    settings = json.dumps({key: job[key] for key in keys} | {"home": home})
    flags = ["-I", "-B", "-X", "utf8", "-c"]
    os.execve(job["python"], [job["python"], *flags, job["harness"], settings], env)


def count_threads(uid):
    """Of all processes of a user: outside a user namespace RLIMIT_NPROC counts them too."""
    count = 0
    for entry in os.scandir("/proc"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if entry.name.isdigit() and entry.stat().st_uid == uid:
                count += len(os.listdir(f"{entry.path}/task"))
    return count


def mount_root(job):
    """Namespaces without network, and a root with nothing but the interpreter and a tmpfs."""

    def mount(source, target, kind, flags, options=""):
        call("mount", *(s.encode() for s in (source, target, kind)), flags, options.encode())

    root = job["folder"]
    call("unshare", 0x4C020000)  # CLONE_NEWNS, NEWUTS, NEWIPC, NEWNET
    mount("none", "/", "", 0x44000)  # MS_REC | MS_PRIVATE: nothing below reaches the host
    mount("sandbox", root, "tmpfs", 6, f"mode=755,size={job['file_mb']}m,nr_inodes=10000")
    bound = []
    for path in sorted(set(job["trees"])):
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
        elif os.path.isdir(path) and not path.startswith(tuple(f"{done}/" for done in bound)):
            os.makedirs(root + path)
            mount(path, root + path, "", 0x1000)  # MS_BIND
            mount(path, root + path, "", 0x1027)  # MS_REMOUNT | RDONLY | NOSUID | NODEV
            bound.append(path)
    os.mkdir(f"{root}/dev")
    for device in ("null", "zero", "random", "urandom"):
        open(f"{root}/dev/{device}", "w").close()
        mount(f"/dev/{device}", f"{root}/dev/{device}", "", 0x1000)
    os.chroot(root)


def call(name, *args):
    """A libc function that returns 0, or OSError."""
    if getattr(libc, name)(*args) != 0:
        raise OSError(ctypes.get_errno(), f"{name}{args}: {os.strerror(ctypes.get_errno())}")


libc = ctypes.CDLL(None, use_errno=True)
if __name__ == "__main__":
    job, launcher = json.loads(sys.argv[1]), os.getpid()
    for key in ("channel", "report", "leash"):
        os.set_inheritable(job[key], False)
    os.mkdir(job["folder"], 0o711)
    try:
        launch(job)
    except BaseException as error:  # of the launcher or of a child on its way to the program
        reason = {"error": f"{type(error).__name__}: {error}"}
        os.write(job["report"], f"{json.dumps(reason)}\n".encode())
        if os.getpid() != launcher:
            os._exit(1)
    kill_descendants()
    remove(job["folder"])
    os._exit(0)
