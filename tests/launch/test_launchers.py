"""The same line, `-m etude train RECIPE`, under every launcher of one machine: the same losses.

Real launchers and real processes on the CPU (gloo). Two machines: test_two_hosts.py.
"""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import etude
from etude.core.distributed import local_facts

pytestmark = pytest.mark.timeout(240)
ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "recipes" / "launch"
ZERO = ("strategy.kind=zero", "strategy.stage=1")


def node(bench, rank: int, port: str, *words: str | Path) -> subprocess.Popen:
    """One of two 'machines' that are started by hand: `deepspeed --no_ssh --node_rank`."""
    (bench.folder / "hosts").write_text("node-a slots=1\nnode-b slots=1\n")
    return bench.start(
        "deepspeed", "--hostfile", "hosts", "--no_ssh", f"--node_rank={rank}",
        "--master_addr=127.0.0.1", f"--master_port={port}", "--module", "etude", "train", *words,
    )  # fmt: skip


def place(number: int, port: str) -> dict[str, str]:
    """The environment that every launcher gives to one of two ranks."""
    where = {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    return where | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def outputs(*processes) -> list[str]:
    said = [process.communicate(timeout=150) for process in processes]
    return ["".join(text or "" for text in pair) for pair in said]


def test_torchrun_as_shipped(bench, one_rank) -> None:
    """launch/torchrun.sh is `torchrun --nproc-per-node N -m etude train RECIPE`."""
    status, output = bench.finish(
        "bash", LAUNCH / "torchrun.sh", bench.recipe, "run=two", PROCESSES="2"
    )
    assert status == 0, output
    bench.check("two", output, one_rank)


def test_deepspeed_on_one_machine(bench, one_rank, free_port) -> None:
    status, output = bench.finish(
        "deepspeed", "--num_gpus=2", f"--master_port={free_port}", "--module", "etude", "train",
        bench.recipe, "run=two", *ZERO,
    )  # fmt: skip
    assert status == 0, output
    bench.check("two", output, one_rank)
    assert "ZeRO stage 1" in (bench.folder / "runs/two/log.txt").read_text()


def test_deepspeed_without_ssh_on_two_nodes(bench, one_rank, free_port) -> None:
    nodes = [node(bench, rank, free_port, bench.recipe, "run=two", *ZERO) for rank in (0, 1)]
    printed = outputs(*nodes)
    assert [process.returncode for process in nodes] == [0, 0], printed
    bench.check("two", "".join(printed), one_rank)
    assert "page runs" not in printed[1] and "pictures" not in printed[1]


def test_ranks_that_never_come_are_named(bench, free_port, forks) -> None:
    """Rank 1 missing, seen by rank 0; rank 0 missing, seen by rank 1 of another job."""
    with socket.socket() as silent:  # bound and not listening: nobody else takes the port
        silent.bind(("127.0.0.1", 0))
        other = str(silent.getsockname()[1])
        words = ("-m", "etude", "train", bench.recipe)
        alone, lost = (
            forks.start(
                *words, cwd=bench.folder, ETUDE_START_SECONDS=seconds, **place(number, port)
            )
            for number, port, seconds in ((0, free_port, "4"), (1, other, "2"))
        )
        bench.forked += [alone, lost]
        waited, searched = outputs(alone, lost)
    assert (alone.returncode, lost.returncode) == (2, 2)
    assert "etude: rank 1 of 2 did not reach 'start' within 4 s; present: 0 (" in waited
    assert f"cannot reach rank 0 at 127.0.0.1:{other} within 2 s" in searched
    assert f"rank 1 on {socket.gethostname()}" in searched
    assert "Traceback" not in waited + searched and not (bench.folder / "runs").exists()


def test_a_rank_with_other_code_and_another_recipe_is_named(
    bench, tmp_path, free_port, forks
) -> None:
    """A copy of the package with one comment more, as on a node that missed an update, and another
    micro_batch, which does not change the run's folder; unnoticed, the ranks would hang.
    """
    package = installed_copy(tmp_path / "other")
    with (package / "sampling.py").open("a") as file:
        file.write("# changed\n")
    first, second = (
        ("-m", "etude", "train", bench.recipe, f"loop.micro_batch={micro}") for micro in (8, 4)
    )
    other = {"PYTHONPATH": str(package.parent)} | place(1, free_port)
    ranks = [
        forks.start(*first, cwd=bench.folder, **place(0, free_port)),
        bench.start(sys.executable, *second, **other),
    ]
    bench.forked.append(ranks[0])
    printed = outputs(*ranks)
    assert [process.returncode for process in ranks] == [2, 2], printed
    for text in printed:
        assert "the ranks disagree" in text and "Traceback" not in text
        assert "rank 1 (" in text and "source is '" in text
        assert "loop.micro_batch is '4', others '8'" in text
        assert "torch is" not in text and "seed" not in text and "loop.images" not in text
    assert not (bench.folder / "runs").exists()


def installed_copy(folder: Path) -> Path:
    """The package as a wheel lays it out, below `folder`."""
    package = folder / "etude"
    shutil.copytree(ROOT / "engine", package)
    for name in ("kernels", "recipes"):
        shutil.copytree(ROOT / name, package / name)
    return package


def test_equal_code_in_a_wheels_layout_is_equal(bench, tmp_path) -> None:
    """The comparison reads contents, not places: a checkout and an installed copy agree."""
    package = installed_copy(tmp_path / "site")
    code = "import etude; from etude.core.distributed import local_facts as f\n"
    code += "print(f()['source'], etude.__file__)"
    there = bench.finish(sys.executable, "-c", code, PYTHONPATH=str(tmp_path / "site"))[1].split()
    here = local_facts()["source"]
    assert here == there[0] and len(here) == 12
    assert Path(there[1]).parent == package and Path(etude.__file__).parent == ROOT / "engine"


@pytest.mark.parametrize("script", sorted(p.name for p in LAUNCH.glob("*.sh")))
def test_shipped_scripts_are_valid_bash(script) -> None:
    made = subprocess.run(["bash", "-n", LAUNCH / script], capture_output=True, text=True)
    assert made.returncode == 0 and made.stderr == ""


def test_shipped_deepspeed_script_needs_a_hostfile(bench) -> None:
    """The whole of it runs in test_two_hosts.py, over ssh."""
    status, output = bench.finish("bash", LAUNCH / "deepspeed.sh", bench.recipe)
    assert status == 1 and "set HOSTFILE to the list of machines" in output


def test_shipped_slurm_script(bench, one_rank, free_port, tmp_path) -> None:
    """Stand-ins for srun and scontrol start two tasks, then one; the script is ours."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "scontrol").write_text(
        '#!/bin/bash\n[ "$1" = show ] && echo localhost\n'
        '[ "$1" = requeue ] && echo "requeued $2"\nexit 0\n'
    )
    (tools / "srun").write_text(
        "#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\n"
        "for ((rank = 0; rank < SLURM_NTASKS; rank++)); do\n"
        'SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & pids+=($!); done\n'
        "worst=0; for pid in ${pids[@]}; do wait $pid || worst=$?; done; exit $worst\n"
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "4711"}
    job |= {"PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ("bash", LAUNCH / "slurm.sh", bench.recipe)
    status, output = bench.finish(*command, "run=two", **job)
    assert status == 0, output
    bench.check("two", output, one_rank)
    short = ("run=short", "loop.max_minutes=0.0001")
    status, output = bench.finish(*command, *short, **job | {"SLURM_NTASKS": "1"})
    assert status == 85 and "requeued 4711" in output, output
    assert (bench.folder / "runs/short/REQUEUE").exists()
