"""Shared by all tests: markers that skip with a reason, NaN-filled memory, recipes of seconds."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; torch reads this when imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

LONGEST = (
    "test_launchers.py",
    "test_training.py",
    "test_transfer.py",
    "test_placement.py",
    "test_recipes.py",
    "test_rounds.py",
    "test_intervals.py",
    "test_dead_launcher.py",
    "test_two_hosts.py",
    "test_strategies.py",
    "test_stable_diffusion.py",
    "test_arms.py",
    "test_sampling.py",
    "test_attention_triton.py",
    "test_budgets.py",
    "test_families.py",
    "test_fuse.py",
    "test_unet.py",
    "test_mdt.py",
    "test_plan.py",
    "test_adversarial.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say why; begin with what takes longest.

    A worker is given whole files: a long one at the end would leave the other workers idle.
    """
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))
    reasons = {"gpu": _no_gpu(), "root": _no_root()}
    for item in items:
        for name, reason in reasons.items():
            if item.get_closest_marker(name) and reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def _no_gpu() -> str:
    return "" if torch.cuda.is_available() else "needs a CUDA device: `make gpu` runs it"


def _no_root() -> str:
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    missing = [tool for tool in ("ip", "sshd", "pdsh") if shutil.which(tool) is None]
    return f"needs {', '.join(missing)}" if missing else ""


@pytest.fixture(autouse=True)
def fetched_inputs(request: pytest.FixtureRequest) -> None:
    """`@pytest.mark.fetched("name", ...)`: skip unless `etude data fetch name` has been run."""
    marker = request.node.get_closest_marker("fetched")
    if marker is None:
        return
    root = Path(os.environ.get("ETUDE_DATA", "data"))
    missing = [name for name in marker.args if not (root / name).exists()]
    if missing:
        names = " ".join(missing)
        pytest.skip(f"needs inputs under {root}/: type `etude data fetch {names}`")


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that an operator allocates and forgets to write shows as NaN."""
    new_empty, empty, empty_like = torch.Tensor.new_empty, torch.empty, torch.empty_like

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", poison(new_empty))
    monkeypatch.setattr(torch, "empty", poison(empty))
    monkeypatch.setattr(torch, "empty_like", poison(empty_like))
    yield


class Process:
    """A process of `tests/forks.py`, used like a `subprocess.Popen` with text from pipes."""

    def __init__(self, words: list[str], to: str, server: subprocess.Popen) -> None:
        self.args, self.returncode, self._to, self._server = words, None, to, server
        self.pid = int(self._wait("pid", 300))  # the server imports first

    def _wait(self, kind: str, seconds: float) -> str:
        path, deadline = Path(f"{self._to}.{kind}"), time.monotonic() + seconds
        while not path.exists():
            if self._server.poll() is not None and not path.exists():
                raise RuntimeError(f"tests/forks.py ended with {self._server.returncode}")
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, seconds)
            time.sleep(0.01)
        return path.read_text()

    def poll(self) -> int | None:
        ended = Path(f"{self._to}.status").exists() or self._server.poll() is not None
        if self.returncode is None and ended:
            self.returncode = int(self._wait("status", 0))
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        self.returncode = int(self._wait("status", timeout))
        out, err = (Path(f"{self._to}.{kind}").read_text() for kind in ("out", "err"))
        return out, err

    def send_signal(self, number: int) -> None:
        if not Path(f"{self._to}.status").exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forks:
    """Starts processes without the seconds that importing torch takes: see `tests/forks.py`."""

    def __init__(self, folder: Path, modules: tuple[str, ...], **environment: str) -> None:
        common = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | environment
        self.environment, self.folder = os.environ | common, folder
        self._held: list[socket.socket] = []
        self._processes: list[Process] = []
        self._numbers = itertools.count()
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forks.py")), *modules],
            env=self.environment,
            stdin=subprocess.PIPE,
        )

    def start(self, *words: str | Path, cwd: Path | None = None, **environment: str) -> Process:
        """What `python WORDS` would start, in `cwd` and with more in its environment."""
        to = str(self.folder / f"{next(self._numbers)}")
        spelled = [str(word) for word in words]
        order = {"words": spelled, "cwd": str(cwd or Path.cwd()), "to": to}
        order["environment"] = self.environment | environment
        self._server.stdin.write(json.dumps(order).encode() + b"\n")
        self._server.stdin.flush()
        self._processes.append(Process(spelled, to, self._server))
        return self._processes[-1]

    def start_ranks(self, count: int, *words: str | Path, cwd: Path | None = None) -> list[Process]:
        """The processes of one job, with the environment that a launcher gives, and no launcher."""
        # The port stays bound and does not listen: rank 0 may, and nobody else is given it.
        held = socket.socket()
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        self._held.append(held)
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(held.getsockname()[1])}
        place |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        return [
            self.start(*words, cwd=cwd, RANK=str(rank), LOCAL_RANK=str(rank), **place)
            for rank in range(count)
        ]

    def close(self) -> None:
        for process in self._processes:  # those of a test that failed
            process.kill()
        with contextlib.suppress(OSError):
            self._server.stdin.close()
        self._server.wait(60)
        for held in self._held:
            held.close()


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Forks]]:
    """`serve("torch", VARIABLE="1")`: starts processes that have the module and the variable."""
    made = []

    def new(*modules: str, **environment: str) -> Forks:
        made.append(Forks(tmp_path_factory.mktemp("forks"), modules, **environment))
        return made[-1]

    yield new
    for one in made:
        one.close()


@pytest.fixture(scope="session")
def forks(serve: Callable[..., Forks]) -> Forks:
    """Processes that train: `forks.start("-m", "etude", "train", recipe, cwd=folder)`."""
    modules = ("etude.cli", "etude.jobs", "etude.training", "etude.core.strategy_zero")
    modules += ("torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_svg")
    if find_spec("deepspeed") is not None:
        modules += ("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer")
    return serve(*modules)


@pytest.fixture(scope="session")
def run_ranks(forks: Forks) -> Callable[..., list[subprocess.CompletedProcess[str]]]:
    """`run_ranks(2, script, word, cwd=folder)`: the processes of one job, ended, by rank."""

    def run(
        count: int, *words: str | Path, cwd: Path | None = None, timeout: float = 240
    ) -> list[subprocess.CompletedProcess[str]]:
        ranks, deadline = forks.start_ranks(count, *words, cwd=cwd), time.monotonic() + timeout
        while None in (states := [rank.poll() for rank in ranks]):
            if any(states):  # the others would wait for it, or are about to say the same
                deadline = min(deadline, time.monotonic() + 20)
            if time.monotonic() > deadline:
                for rank in ranks:
                    rank.kill()
            time.sleep(0.02)
        said = [rank.communicate(10) for rank in ranks]
        return [
            subprocess.CompletedProcess(rank.args, rank.returncode, *words)
            for rank, words in zip(ranks, said, strict=True)
        ]

    return run


_LATENT_DIFFUSION = """
kind: ldm
data:
  shards: {folder}/train
  augment: {{image_size: 16, crop: random, scale: [0.8, 1.0], channels: 1}}
  workers: 1
  decoder: torch
held_out: {folder}/monitor
model:
  input_size: 16
  in_channels: 1
  patch_size: 4
  hidden_size: 48
  depth: 2
  num_heads: 4
  num_classes: 10
  learn_sigma: false
optim: {{lr: 1.0e-3, clip: 1.0, warmup_images: 100, ema: [0.9]}}
strategy: {{kind: local}}
loop:
  images: 640
  global_batch: 16
  micro_batch: 8
  log_every: 16
  evaluate_every: 320
  checkpoint: {{every_images: 160}}
sampler: {{method: heun, steps: 2, guidance_scale: 2.0, guidance_convention: one_plus_lambda}}
grid: {{per_class: 1}}
"""

_AUTOENCODER = """
kind: autoencoder
data:
  shards: {folder}/train
  augment: {{image_size: 16, crop: random, scale: [0.8, 1.0], channels: 1}}
  workers: 1
  decoder: torch
held_out: {folder}/monitor
model:
  in_channels: 1
  latent_channels: 2
  block_out_channels: [8, 16]
  layers_per_block: 1
  norm_num_groups: 4
  kl_weight: 1.0e-4
optim: {{lr: 1.0e-3, clip: 1.0, ema: [0.9]}}
strategy: {{kind: local}}
loop:
  images: 320
  global_batch: 16
  micro_batch: 16
  log_every: 16
  evaluate_every: 320
  checkpoint: {{every_images: 160}}
"""


@dataclass(frozen=True)
class Tiny:
    """Recipes of a few seconds on 320 real digits: a DiT in pixels and an autoencoder."""

    folder: Path
    ldm: str
    autoencoder: str


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """320 digits to train on and 64 held out, in small shards, and two recipe files."""
    from etude.data.digits import write_digits
    from etude.data.shards import ShardSet, write_shards

    folder = tmp_path_factory.mktemp("tiny")
    whole = write_digits(folder / "digits")
    for part, count in (("train", 320), ("monitor", 64)):
        data = ShardSet(whole / part)
        samples = [data[index] for index in range(count)]
        members = [
            {"key": s.key, "image": bytes(s.data), "extension": "png", "label": s.label}
            for s in samples
        ]
        write_shards(folder / part, members, per_shard=100, classes=data.classes)
    for name, text in (("ldm", _LATENT_DIFFUSION), ("autoencoder", _AUTOENCODER)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    return Tiny(folder, str(folder / "ldm.yaml"), str(folder / "autoencoder.yaml"))


_WORDS = "a picture of the cat dog red blue hand sun moon house tree face star one two".split()


def _tokenizer(folder: Path, start: str, end: str, pad: str) -> None:
    """A tokenizer of whole words with start and end marks, as transformers reads it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = list(dict.fromkeys(mark for mark in (pad, start, end, "<unk>") if mark))
    vocabulary = {word: number for number, word in enumerate([*_WORDS, *marks])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}".strip(),
        special_tokens=[(mark, vocabulary[mark]) for mark in (start, end) if mark],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=end, unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def text_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of tiny random text encoders: clip_l, clip_g (both projected), clip, t5 and bert."""
    import transformers as tf

    root = tmp_path_factory.mktemp("text_models")
    end = len(_WORDS) + 2  # the end mark's number in a vocabulary of pad, start, end, unknown
    clip = {"vocab_size": 24, "intermediate_size": 32, "max_position_embeddings": 12}
    clip |= {"num_hidden_layers": 3, "num_attention_heads": 2, "eos_token_id": end}
    shapes = {"clip_l": (16, 10), "clip_g": (20, 14), "clip": (16, 16)}
    torch.manual_seed(0)
    for name, (width, projection) in shapes.items():
        config = tf.CLIPTextConfig(hidden_size=width, projection_dim=projection, **clip)
        kind = tf.CLIPTextModel if name == "clip" else tf.CLIPTextModelWithProjection
        kind(config).save_pretrained(root / name)
        _tokenizer(root / name, "<s>", "</s>", "<pad>")
    t5 = {"vocab_size": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    tf.T5EncoderModel(tf.T5Config(d_model=48, **t5)).save_pretrained(root / "t5")
    _tokenizer(root / "t5", "", "</s>", "<pad>")
    config = tf.BertConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=20,
    )
    tf.BertModel(config).save_pretrained(root / "bert")
    _tokenizer(root / "bert", "<s>", "</s>", "<pad>")
    return root
