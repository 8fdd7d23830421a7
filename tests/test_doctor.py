"""The doctor on machines that lack parts (made by blocking imports), and its arithmetic."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from etude import estimate, measured
from etude.core.checkpoint import CheckpointConfig, disk_need
from etude.core.errors import UserError
from etude.core.recipe import load_recipe, recipe_from_dict
from etude.doctor import environment_parts, examine, warnings
from etude.models.discriminator import PatchDiscriminator
from etude.models.dit import DiT

BLOCK = """
import sys
class Blocker:
    blocked = set(sys.argv[1].split(","))
    def find_spec(self, name, path=None, target=None):
        if name in self.blocked or name.split(".")[0] in self.blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from etude import doctor
doctor._USUAL_NVCC = ""
sys.exit(doctor.examine(*sys.argv[2:]))
"""


def doctor_without(blocked: str, *arguments: str, path: str = "") -> tuple[int, dict, str]:
    """Exit status, rows by part, and the whole report where `blocked` cannot be imported."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH", "CXX")
    }
    done = subprocess.run(
        [sys.executable, "-c", BLOCK, blocked, *arguments],
        capture_output=True, text=True, env={**environment, "PATH": path},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    rows = {}
    for line in done.stderr.splitlines():
        cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
        if len(cells) > 1:
            rows.setdefault(cells[0], cells[1:])
    return done.returncode, rows, done.stderr


def test_without_nvcc_compiler_dali_and_deepspeed() -> None:
    status, rows, _ = doctor_without("nvidia,deepspeed,triton,xformers,diffusers,rich")
    assert status == 0
    for part, lost, command in (
        ("nvcc", "CUDA operators", "CUDA toolkit"),
        ("C++ compiler", "C++ operators", "apt-get install g++"),
        ("deepspeed", "ZeRO", "pip install deepspeed"),
        ("nvidia.dali", "JPEGs", "pip install nvidia-dali"),
        ("triton", "GPU kernels", "pip install triton"),
        ("diffusers", "autoencoders", "pip install diffusers"),
        ("rich", "progress bars", "pip install rich"),
    ):
        missing, found_lost, found_command = rows[part]
        assert missing == "missing" and lost in found_lost and command in found_command, part
    assert rows["torch"] == [torch.__version__]


def test_a_part_that_is_needed_fails_the_examination() -> None:
    status, rows, report = doctor_without("safetensors")
    assert status == 1
    assert rows["safetensors"][0] == "missing"
    assert "needed and missing: safetensors" in report


def test_this_machine_has_what_the_tests_run_on() -> None:
    parts = {part.name: part for part in environment_parts()}
    assert parts["torch"].found == torch.__version__
    assert all(part.found for part in parts.values() if part.required)
    assert all(part.command for part in parts.values() if not part.found)
    assert bool(parts["CUDA"].found) == torch.cuda.is_available()
    assert parts["operators: reference"].found


def test_files_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("ldm/cifar10", ["autoencoder=weights/vae"])
    files = {item.field: item for item in estimate.needed_files(recipe)}
    assert files["data.shards"].command == "etude data fetch cifar10"
    assert "weights/vae" in files["autoencoder"].command
    assert not any(item.present or item.made for item in files.values())
    (tmp_path / "data/cifar10/train").mkdir(parents=True)
    (tmp_path / "data/cifar10/train/index.json").write_bytes(b"abc")
    files = {item.field: item for item in estimate.needed_files(recipe)}
    assert files["data.shards"].present
    assert files["data.shards"].digest == "ba7816bf8f01cfea"  # of "abc", FIPS 180-2
    assert examine("ldm/cifar10") == 1
    files = {item.field: item for item in estimate.needed_files(load_recipe("ldm/emoji"))}
    assert files["text.encoders"].command == "etude data fetch minilm"


def test_files_of_a_study_leave_out_what_its_jobs_make(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = estimate.needed_files(load_recipe("studies/demo"))
    assert {item.path for item in files} == {
        "data/digits/train", "data/digits/monitor", "data/digits/test"
    }  # fmt: skip
    assert all(item.made for item in files)
    assert examine("studies/demo") == 0


def test_the_doctor_refuses_what_is_no_recipe() -> None:
    with pytest.raises(UserError, match="did you mean `ldm/digits`"):
        examine("ldm/digit")


def test_parameters_are_counted_without_memory() -> None:
    recipe = load_recipe("ldm/digits")
    real = sum(p.numel() for p in DiT(recipe.model).parameters())
    assert estimate.parameter_count(recipe) == real
    published = load_recipe("ldm/dit_xl2_imagenet256")  # 675M in Peebles and Xie, Table 4
    assert round(estimate.parameter_count(published) / 1e6) == 675
    assert estimate.parameter_count(load_recipe("evaluate/default")) is None


@pytest.mark.parametrize(
    ("overrides", "world", "bytes_per_parameter"),
    [
        # weights, gradients, moments, one average; then master weights as ZeRO keeps them
        (["strategy={kind: local, precision: fp32}"], 4, 4 + 4 + 8 + 4),
        (["strategy={kind: zero, precision: fp32, stage: 0}"], 4, 4 + 4 + 8 + 4),
        (["strategy={kind: zero, precision: bf16, stage: 1}"], 4, 2 + 2 + (4 + 8 + 4) / 4),
        (["strategy={kind: zero, precision: bf16, stage: 2}"], 4, 2 + (2 + 4 + 8 + 4) / 4),
        (["strategy={kind: zero, precision: bf16, stage: 3}"], 8, (2 + 2 + 4 + 8 + 4) / 8),
        (["strategy={kind: zero, precision: bf16, stage: 3}", "optim.ema=[]"], 2, (16) / 2),
    ],
)
def test_memory_of_a_strategy(overrides: list[str], world: int, bytes_per_parameter: float) -> None:
    recipe = load_recipe("ldm/digits", overrides)
    assert sum(estimate.state_bytes(1000, recipe, world).values()) == 1000 * bytes_per_parameter


def test_offloaded_state_is_not_counted_on_the_device() -> None:
    recipe = load_recipe("ldm/digits", ["strategy={kind: zero, stage: 2, offload: true}"])
    sizes = estimate.state_bytes(100, recipe, 2)
    assert {n for n in sizes if n.endswith("(host)")} == set(sizes) - {"weights", "gradients"}
    rows = dict(estimate.memory_rows(recipe, 1))
    count = estimate.parameter_count(recipe)
    assert rows["together, without activations"] == estimate.gigabytes(8 * count)


def test_disk_and_time_are_those_of_the_recipe() -> None:
    recipe = load_recipe("ldm/digits", ["loop.checkpoint={keep_last: 3}"])
    config, count = recipe.loop.checkpoint, estimate.parameter_count(recipe)
    assert isinstance(config, CheckpointConfig) and config.keep_last == 3
    sentence = disk_need(4 * count, config, recipe.loop.images).sentence
    assert estimate.disk_sentence(recipe).startswith(sentence)
    assert ["time", "3 min on 2 CPU cores, as the recipe says"] in measured.time_rows(recipe)
    longer = load_recipe("ldm/digits", ["expects={hours: 30, hardware: 8 H200}"])
    assert ["time", "30 hours on 8 H200, as the recipe says"] in measured.time_rows(longer)


def test_a_discriminator_takes_memory_and_disk() -> None:
    kl_f8 = load_recipe("autoencoder/kl_f8")
    second = sum(
        p.numel() for p in PatchDiscriminator(kl_f8.adversarial.discriminator, 3).parameters()
    )
    alone = load_recipe("autoencoder/kl_f8", ["adversarial=null"])
    assert estimate.discriminator_count(kl_f8) == second
    assert estimate.discriminator_count(alone) == 0
    rows = dict(estimate.memory_rows(kl_f8))
    assert rows["parameters of the discriminator"] == f"{second:,}"
    assert rows["discriminator, its gradients and moments"] == estimate.gigabytes(16 * second)
    assert "discriminator" not in str(estimate.memory_rows(alone))
    config, count = kl_f8.loop.checkpoint, estimate.parameter_count(kl_f8)
    need = disk_need(4 * count + 3 * second, config, kl_f8.loop.images)
    assert estimate.disk_sentence(kl_f8).startswith(need.sentence)
    half = load_recipe("autoencoder/kl_f8", ["strategy.precision=bf16"])
    # weights of 2 bytes; gradients are added up in float32, as are masters and moments
    assert estimate.discriminator_bytes(1000, half) == 1000 * (2 + 4 + 4 + 8)


def results(folder: Path, *rows: dict) -> None:
    common = {"processor": "NVIDIA H200", "device": "cuda", "time": "2026-01-02T03:04:05"}
    lines = [json.dumps(common | row) for row in rows]
    (folder / "end_to_end_cuda.jsonl").write_text("\n".join(lines) + "\n")


def test_hours_and_cost_are_pictures_over_what_was_measured(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ETUDE_RESULTS", str(tmp_path))
    recipe = load_recipe("ldm/dit_xl2_imagenet256")  # 1,792,000,000 pictures
    here = measured.device_name()
    nothing = [["images", "1,792,000,000"], ["images/s", f"not measured on {here}"]]
    nothing += [["time", "not measured on 8 or more GPUs"]]
    assert measured.time_rows(recipe) == nothing
    assert measured.time_rows(recipe, 2.5) == [*nothing, ["cost", "not measured"]]
    step = {"model": "DiT-XL/2", "dtype": "bfloat16"}
    results(
        tmp_path,
        step | {"provider": "etude", "images_s": 10.0, "time": "2026-01-01"},  # an older row
        step | {"provider": "etude", "images_s": 500.0},
        step | {"provider": "torch_compile", "images_s": 700.0},
        step | {"provider": "etude", "images_s": 900.0, "dtype": "float32"},
        step | {"provider": "etude", "images_s": 900.0, "model": "DiT-B/2"},
        step | {"provider": "etude", "images_s": 100.0, "input_size": 64},
    )
    where = "end_to_end_cuda.jsonl, 2026-01-02; the step alone, on data that is there"
    hours = 1_792_000_000 / 500 / 3600
    assert measured.time_rows(recipe, 2.5) == [
        ["images", "1,792,000,000"],
        ["images/s", f"500 on NVIDIA H200 ({where})"],
        ["images/s", f"not measured on {here}"],
        ["time", f"{hours:,.4g} hours on one NVIDIA H200 ({where})"],
        ["cost", f"{2.5 * hours:,.4g} = {hours:,.4g} hours x 2.5 on one NVIDIA H200"],
    ]
    rows = measured.time_rows(load_recipe("ldm/dit_xl2_imagenet512"))
    assert ["images/s", rows[1][1]] == rows[1] and rows[1][1].startswith("100 on NVIDIA H200")


def test_a_study_takes_as_long_as_its_runs_together(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ETUDE_RESULTS", str(tmp_path))
    study = load_recipe("studies/gates_cifar10")
    rows = dict(estimate.describe(study, 1.0)[-1][2])
    # 15 values of the grids, 3 of which are those of the recipe itself and one run
    assert rows["runs"] == "13" and rows["images"] == f"{13 * 30720:,}, in training"
    assert rows["not measured"] == "crop, flip, size" and rows["cost"] == "not measured"
    cores = {"processor": "Chip", "device": "cpu", "cores": 2}
    results(tmp_path, cores | {"recipe": "ldm/cifar10_small_mmdit", "images_s": 30720 / 3600})
    rows = dict(estimate.describe(study, 2.0)[-1][2])
    assert rows["time"] == "13 hours on one Chip, 2 cores (sum of the runs)"
    assert rows["cost"] == "26 = 13 hours x 2 on one Chip, 2 cores"
    # a job at another size is not the recipe that was measured
    results(tmp_path, cores | {"recipe": "ldm/digits", "images_s": 100.0})
    sizes = {"model.input_size": 16, "data.augment.image_size": 32}
    jobs = {"same": {"recipe": "ldm/digits"}, "larger": {"recipe": "ldm/digits", "set": sizes}}
    study = recipe_from_dict({"kind": "study", "jobs": jobs}, "mine")
    _, same, larger, _ = (str(rows) for _, _, rows in estimate.describe(study))
    assert "100 on Chip, 2 cores" in same and "Chip" not in larger
    whole = {"study": "studies/demo", "seconds": 7200}
    results(tmp_path, cores | whole)
    found = measured.time_rows(load_recipe("studies/demo"))
    assert ["time", "2 hours on one Chip, 2 cores (end_to_end_cuda.jsonl, 2026-01-02)"] in found


def test_the_doctor_says_what_a_recipe_costs(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ETUDE_RESULTS", str(tmp_path))
    assert examine("ldm/mmdit_xl2_cc12m512", price_per_hour=3) == 1  # the data are not there
    shown = "".join(capfd.readouterr())
    assert "weights/t5-v1_1-xxl" in shown and "together, without activations" in shown
    assert "cost" in shown and shown.count("not measured") >= 3
    with pytest.raises(UserError, match="has no effect without a recipe"):
        examine(price_per_hour=3)


@pytest.mark.parametrize(
    ("version", "expected"), [("0.18.5", "transformers fails"), ("0.13.0", "get_kernel")]
)
def test_a_hidden_package_of_the_same_name_is_told(tmp_path, version, expected) -> None:
    assert warnings() == []
    metadata = tmp_path / f"kernels-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"
    )
    root = Path(estimate.__file__).resolve().parents[1]
    code = "from etude.doctor import warnings; print(*warnings())"
    for first, hidden in ((root, True), (tmp_path, False)):
        path = os.pathsep.join([str(first), str(tmp_path)])
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert (expected in done.stdout) == hidden


RANK = """
import sys
from etude.core.errors import UserError
from etude.doctor import check_ranks
try: print(check_ranks(float(sys.argv[1])))
except UserError as error: print('refused:', error)
"""


def test_ranks_add_up(run_ranks) -> None:
    for rank in run_ranks(2, "-c", RANK, "60"):
        assert "refused" not in rank.stdout and f"{socket.gethostname()}:cpu" in rank.stdout
        assert rank.stdout.count(" s']") == 2


def test_missing_ranks_are_named(forks) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
    out, _ = forks.start("-c", RANK, "2", MASTER_PORT=port, **place).communicate(timeout=120)
    assert "refused: ranks 1, 2 of 3 did not reach" in out
    assert f"0 ({socket.gethostname()}:cpu)" in out
