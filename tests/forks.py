"""A process that imports once what many processes of a test need, and forks them.

`forks.py MODULE...` imports the modules, then reads lines of JSON from its input, each a command:

    {"words": ["-m", "etude", ...], "cwd": folder, "environment": {...}, "to": path}

`words` are what follows `python` on a command line: `-m MODULE`, `-c CODE` or a script, and what it
is told. The command runs in a forked process with its output in `to`.out and `to`.err; its number
is written to `to`.pid, and its status to `to`.status. It is a process like any other, with its own
number, signals and end, that has not spent seconds on importing torch; but for the seed that
strings are hashed by, which all processes of a server share. At the end of the input the server
kills what still runs, and leaves.
"""

import importlib
import json
import os
import runpy
import select
import signal
import sys
from pathlib import Path


def write(path: str, text: object) -> None:
    """Whoever sees the file sees all of it."""
    Path(f"{path}.part").write_text(str(text))
    os.rename(f"{path}.part", path)


def become(order: dict) -> None:
    """Turn a forked process into the ordered one."""
    for number, path in ((0, os.devnull), (1, f"{order['to']}.out"), (2, f"{order['to']}.err")):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.dup2(file, number)
        os.close(file)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environment"])
    words = order["words"]
    if "numpy" in sys.modules:  # as a process of its own would have drawn it
        sys.modules["numpy"].random.seed()
    if words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], order["cwd"]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


def main() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    running: dict[int, str] = {}
    orders = b""
    while True:
        for process in list(running):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                write(f"{running.pop(process)}.status", os.waitstatus_to_exitcode(status))
        if not select.select([0], [], [], 0.02 if running else None)[0]:
            continue
        read = os.read(0, 65536)
        if not read:
            for process in running:  # not waited for yet, so the numbers are still theirs
                os.kill(process, signal.SIGKILL)
            return
        *lines, orders = (orders + read).split(b"\n")
        for line in lines:
            order = json.loads(line)
            process = os.fork()
            if process == 0:
                return become(order)
            running[process] = order["to"]
            write(f"{order['to']}.pid", process)


if __name__ == "__main__":
    main()
