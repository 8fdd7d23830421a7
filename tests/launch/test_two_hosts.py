"""`deepspeed --hostfile` over pdsh and ssh between two network namespaces on one machine.

Each namespace has its own network interface and sshd on port 2222; keys, host keys, configuration
and namespaces are made here and removed afterwards. Needs root and the packages iproute2, pdsh and
openssh-server.
"""

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]
LAUNCH = Path(__file__).resolve().parents[2] / "recipes" / "launch"
INTERFACE = "etude0"  # the same name in both, as gloo is told one name
ADDRESSES = ("10.213.77.1", "10.213.77.2")


def sh(*words: str | Path) -> None:
    made = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert made.returncode == 0, f"{words}: {made.stderr}"


@dataclass
class Hosts:
    """Two namespaces, a folder with their keys and configuration, and their sshd processes."""

    names: tuple[str, str]
    folder: Path
    daemons: list[subprocess.Popen]

    def connect(self) -> None:
        for name in self.names:
            sh("ip", "netns", "add", name)
        first, second = self.names
        sh("ip", "-n", first, "link", "add", INTERFACE, "type", "veth",
           "peer", "name", INTERFACE, "netns", second)  # fmt: skip
        for name, address in zip(self.names, ADDRESSES, strict=True):
            sh("ip", "-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            sh("ip", "-n", name, "link", "set", INTERFACE, "up")
            sh("ip", "-n", name, "link", "set", "lo", "up")

    def listen(self) -> None:
        """An sshd in each namespace that takes one key, and an `ssh` that uses it."""
        key = self.folder / "key"
        sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
        shutil.copy(key.with_suffix(".pub"), self.folder / "authorized")
        for name, address in zip(self.names, ADDRESSES, strict=True):
            host_key = self.folder / f"host-{name}"
            sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", host_key)
            settings = {
                "Port": 2222, "ListenAddress": address, "HostKey": host_key, "StrictModes": "no",
                "AuthorizedKeysFile": self.folder / "authorized", "PidFile": "none",
                "UsePAM": "no", "PasswordAuthentication": "no",
            }  # fmt: skip
            config = self.folder / f"sshd-{name}"
            config.write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
            command = ["ip", "netns", "exec", name, shutil.which("sshd"), "-D", "-e", "-f", config]
            log = open(self.folder / f"sshd-{name}.log", "w")
            self.daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
        options = "Port 2222\nUser root\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n"
        options += f"IdentityFile {key}\nIdentitiesOnly yes\nLogLevel ERROR\nConnectTimeout 10\n"
        (self.folder / "config").write_text(f"Host *\n{options}")
        tools = self.folder / "bin"
        tools.mkdir()
        program = shutil.which("ssh")
        (tools / "ssh").write_text(f'#!/bin/sh\nexec {program} -F {self.folder}/config "$@"\n')
        (tools / "ssh").chmod(0o755)

    def close(self) -> None:
        for name in self.names:
            inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for process in inside.stdout.split():
                subprocess.run(["kill", "-9", process], capture_output=True)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        for daemon in self.daemons:
            daemon.wait()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    tag = uuid.uuid4().hex[:6]
    folder = tmp_path / "ssh"
    folder.mkdir(mode=0o700)
    separation = Path("/run/sshd")  # sshd insists on it; a service would have made it
    missing = not separation.exists()
    separation.mkdir(exist_ok=True)
    made = Hosts((f"etude-{tag}-a", f"etude-{tag}-b"), folder, [])
    try:
        made.connect()
        made.listen()
        yield made
    finally:
        made.close()
        if missing:
            separation.rmdir()


def test_deepspeed_script_over_ssh(bench, one_rank, hosts, wait_until) -> None:
    """launch/deepspeed.sh as shipped: HOSTFILE and .deepspeed_env, nothing else."""
    lines = [f"{address} slots=1\n" for address in ADDRESSES]
    (bench.folder / "hosts").write_text("".join(lines))
    path = f"{hosts.folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path}
    variables |= {"GLOO_SOCKET_IFNAME": INTERFACE}
    text = "".join(f"{name}={value}\n" for name, value in variables.items())
    (bench.folder / ".deepspeed_env").write_text(text)
    inside = ("ip", "netns", "exec", hosts.names[0])
    for address in ADDRESSES:
        login = (*inside, hosts.folder / "bin/ssh", address, "true")
        wait_until(lambda login=login: bench.finish(*login)[0] == 0, 20, f"sshd of {address}")

    status, output = bench.finish(
        *inside, "bash", LAUNCH / "deepspeed.sh", bench.recipe, "run=two",
        "strategy.kind=zero", "strategy.stage=1", HOSTFILE="hosts", PATH=path,
    )  # fmt: skip
    assert status == 0, output
    assert "cmd = pdsh" in output and all(f"{a}:" in output for a in ADDRESSES), output
    bench.check("two", output, one_rank)


def test_namespaces_are_removed(hosts) -> None:
    hosts.close()
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert not set(hosts.names) & set(listed.split())
    assert not (Path("/run/netns") / hosts.names[0]).exists()
