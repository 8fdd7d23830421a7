"""`ranks.py FOLDER` is one rank of three (see the environment); writes FOLDER/<rank>.json.

`ranks.py launch FOLDER PORT RANK...` is a small launcher that starts ranks and waits for them.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def attempt(act) -> str:
    from etude.core.errors import UserError

    try:
        act()
    except UserError as error:
        return str(error)
    return "fine"


def main(folder: Path) -> None:
    from etude.core import distributed  # not above: the launcher needs no torch
    from etude.core.errors import UserError

    report: dict = {}
    rank = int(os.environ["RANK"])
    try:
        world = distributed.start(timeout_s=float(os.environ["WAIT"]))
    except UserError as error:
        (folder / f"{rank}.json").write_text(json.dumps({"start": str(error)}))
        return
    facts = {"code": "abc", "recipe": "r1"}
    odd = facts | ({"code": "other"} if rank == 1 else {})
    seen = folder / ("elsewhere" if rank == 2 else "run")
    report["any none"] = distributed.any_rank(world, False)
    report["any one"] = distributed.any_rank(world, rank == 2)
    report["exchange"] = distributed.exchange(world, "squares", rank * rank)
    report["agree"] = attempt(lambda: distributed.all_agree(world, facts, folder / "run"))
    report["odd"] = attempt(lambda: distributed.all_agree(world, odd))
    report["blind"] = attempt(lambda: distributed.all_agree(world, facts, seen))
    report["launcher gone before"] = world.launcher_gone
    if rank != 2:
        report["barrier"] = attempt(lambda: distributed.barrier(world, "saved", 1.0))
    (folder / f"{rank}.ready").touch()
    deadline = time.monotonic() + 30
    while not world.launcher_gone and time.monotonic() < deadline:
        time.sleep(0.05)
    report["launcher gone after"] = world.launcher_gone
    (folder / f"{rank}.tmp").write_text(json.dumps(report))
    (folder / f"{rank}.tmp").rename(folder / f"{rank}.json")
    os._exit(0)


def launch(folder: str, port: str, ranks: list[str]) -> None:
    base = os.environ | {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, __file__, folder]
    children = [
        subprocess.Popen(command, env=base | {"RANK": rank, "LOCAL_RANK": "0"}) for rank in ranks
    ]
    for child in children:
        child.wait()


if __name__ == "__main__":
    if sys.argv[1] == "launch":
        launch(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        main(Path(sys.argv[1]))
