"""The command: its words, its help, its exit statuses, and what it leaves on the disk."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from etude import cli
from etude.core.recipe import load_recipe
from etude.core.run import folder_name
from etude.core.signals import EXIT_REQUEUE
from etude.jobs import run_recipe

VERBS = {"demo", "start", "train", "sample", "extract", "evaluate"}
NOUNS = {
    "practice": {"run", "rebuild", "export"},  # a verb too: its first word may be a recipe
    "data": {"fetch", "list"},
    "recipes": {"list", "show", "diff", "copy", "schema"},
    "runs": {"list", "replay", "diff", "export"},
    "kernels": {"status", "list", "bench", "tune"},
    "doctor": set(),
}


def leaves() -> list[tuple[str, ...]]:
    return (
        [(verb,) for verb in VERBS]
        + [
            (noun, *([word] if word else []))
            for noun, words in NOUNS.items()
            for word in sorted(words) or [""]
            if (noun, word) != ("practice", "run")
        ]
        + [("practice",)]
    )


@pytest.fixture
def etude(monkeypatch, capsys, tmp_path):
    """Call the command in this process and an empty folder: (status, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["etude", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    return call


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_the_words_are_pinned() -> None:
    command = typer.main.get_command(cli.app)
    assert set(command.commands) == VERBS | NOUNS.keys()
    for noun, words in NOUNS.items():
        assert set(getattr(command.commands[noun], "commands", {})) == words


@pytest.mark.parametrize("words", sorted(leaves()), ids=" ".join)
def test_every_help_shows_an_example(etude, words) -> None:
    status, out, _ = etude(*words, "--help")
    assert status == 0 and "Usage:" in out
    assert f"etude {' '.join(words)}" in out.split("Example:")[1] or "torchrun" in out


def test_help_of_every_group(etude) -> None:
    assert all(etude(*noun, "--help")[0] == 0 for noun in ([], ["data"], ["recipes"], ["runs"]))
    status, out, err = etude("trian")
    assert status == 2 and "trian" in out + err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "ldm/digit"], "there is no recipe `ldm/digit`; did you mean `ldm/digits`?"),
        (["train", "practice/digits", "generator=x"], "of kind 'practice': type `etude practice"),
        (["train", "ldm/digits", "optim.lrr=1"], "`lrr` is not a field in `optim`; did you mean"),
        (["sample", "nothing"], "there is no run `nothing`; `etude runs list` shows those in runs"),
        (["train", "ldm/digits", "--run", "a", "run=b"], "--run a and run=b name two runs"),
        (["train", "ldm/digits", "resume_with_changes=yes"], "type true or false"),
        (["runs", "replay", "nothing", "--at", "3"], "there is no run `nothing`"),
        (["data", "fetch", "mnist"], "'mnist' is not known; type one of: "),
    ],
)
def test_a_mistake_is_one_line_and_status_2(etude, words, message) -> None:
    status, out, err = etude(*words)
    assert status == 2 and message in err and not out
    assert err.startswith("etude: ") and err.count("\n") == 1


def test_an_unknown_field_names_the_nearest_one_and_its_line(etude, tiny, tmp_path) -> None:
    text = Path(tiny.ldm).read_text().replace("hidden_size", "hiden_size")
    (tmp_path / "mine.yaml").write_text(text)
    line = next(n for n, words in enumerate(text.splitlines(), 1) if "hiden_size" in words)
    status, _, err = etude("train", "mine.yaml")
    assert status == 2 and f"mine.yaml:{line}: `hiden_size` is not a field" in err
    assert "did you mean `hidden_size`?" in err


def test_a_finished_run_prints_its_result_and_a_changed_recipe_is_a_new_run(
    etude, tiny, tmp_path
) -> None:
    short = ["train", tiny.ldm, "loop.images=32"]
    status, out, err = etude(*short)
    assert status == 0 and "training: 32/32 images" in err
    (first,) = (tmp_path / "runs").iterdir()
    assert first.name == folder_name(load_recipe(tiny.ldm, ["loop.images=32"]))
    before = {p: p.stat().st_mtime_ns for p in first.rglob("*") if p.is_file()}
    result = json.loads(out[: out.index("}") + 1])
    assert result == json.loads((first / "result.json").read_text())

    status, again, err = etude(*short, "loop.micro_batch=16", "loop.log_every=32")  # speed, logging
    assert status == 0 and again == out and "training" not in err
    after = {p: p.stat().st_mtime_ns for p in first.rglob("*") if p.is_file()}
    assert {p for p in before if after[p] != before[p]} <= {first / ".lock.guard"}

    assert etude(*short, "optim.lr=2e-3")[0] == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2
    status, _, err = etude(*short, "optim.lr=3e-3", f"run={first.name}")
    assert status == 2 and "optim.lr: 0.001 -> 0.003" in err and "run=NAME" in err
    status, out, _ = etude(*short, "root=elsewhere", "run=mine")
    assert status == 0 and (tmp_path / "elsewhere" / "mine" / "result.json").exists()

    status, out, _ = etude("runs", "list")
    assert status == 0 and first.name in out and out.count("finished") == 2
    status, out, _ = etude("runs", "diff", *(p.name for p in (tmp_path / "runs").iterdir()))
    assert status == 0 and "recipe: optim.lr is" in out and "training loss: first differs" in out
    status, out, _ = etude("runs", "replay", first.name, "--at", "16")
    assert status == 0 and "noise level" in out and f"runs/{first.name}/replay" in out


def test_a_run_stopped_early_takes_changes_only_when_told(etude, tiny, tmp_path) -> None:
    words = ["train", tiny.ldm, "run=mine"]
    status, out, _ = etude(*words, "loop.max_minutes=0.00001")
    assert status == EXIT_REQUEUE and "stopped (max_minutes=1e-05) and saved" in out
    folder = tmp_path / "runs" / "mine"
    assert json.loads((folder / "REQUEUE").read_text())["reason"] == "max_minutes=1e-05"
    assert not (folder / "result.json").exists() and not (folder / "lock.json").exists()
    changed = [*words, "loop.images=32"]
    status, _, err = etude(*changed)
    assert status == 2 and "loop.images: 640 -> 32" in err
    assert etude(*changed, "resume_with_changes=true")[0] == 0


def test_a_dry_run_tries_everything_and_leaves_nothing(etude, tiny, tmp_path) -> None:
    (tmp_path / "data").symlink_to(tiny.folder, target_is_directory=True)
    short = ["loop.images=16", "model.latent_channels=4"]
    run_recipe(load_recipe(tiny.autoencoder, short), root=tmp_path / "runs", name="ae", quiet=True)
    before = tree(tmp_path)
    local = "strategy.kind=local"
    status, out, err = etude("train", "autoencoder/digits", "--dry-run", local)
    assert status == 0, err
    assert "one step" in out and "the autoencoder was loaded again" in out
    status, out, err = etude("train", "ldm/digits", "autoencoder=runs/ae", "--dry-run", local)
    assert status == 0, err
    assert "4 pictures were drawn from it" in out and "nothing was kept" in out
    assert tree(tmp_path) == before
    assert not (tiny.folder / "latents").exists()  # behind the link `data`
    status, _, err = etude("train", tiny.ldm, "--dry-run", "data.shards=nowhere")
    assert status == 2 and "nowhere is not a folder" in err


def test_recipes_are_listed_shown_compared_copied_and_described(etude, tmp_path) -> None:
    status, out, _ = etude("recipes", "list")
    shipped = ["autoencoder/digits", "ldm/digits", "ldm/cifar10", "ldm/dit_xl2_imagenet256"]
    shipped += ["practice/digits", "evaluate/default", "studies/demo"]
    assert status == 0 and all(name in out for name in shipped) and "not measured" in out
    status, out, _ = etude("recipes", "show", "ldm/digits", "optim.lr=0.5")
    row = next(line for line in out.splitlines() if line.startswith("optim.lr "))
    assert status == 0 and row.split()[1] == "0.5" and "optim.lr=0.5" in row
    status, out, _ = etude("recipes", "diff", "ldm/digits", "autoencoder/digits")
    assert status == 0 and "model.hidden_size" in out
    status, out, _ = etude("recipes", "copy", "ldm/digits", "mine.yaml")
    assert status == 0 and load_recipe("mine.yaml").model == load_recipe("ldm/digits").model
    status, out, _ = etude("recipes", "schema", "ldm")
    assert status == 0 and "hidden_size" in json.dumps(json.loads(out)["$defs"]["DiTConfig"])


def test_kernels_and_doctor_say_what_is_here(etude, tiny) -> None:
    status, out, _ = etude("kernels", "status")
    assert status == 0 and "reference" in out and "triton" in out
    assert "xformers" in out and "sdpa" in out
    status, out, _ = etude("kernels", "list")
    assert status == 0 and "gate_residual_adaln" in out and "0 B spilled" in out
    status, out, err = etude("doctor", tiny.ldm)
    assert "torch" in out + err and status in (0, 1)


def test_kernels_are_tuned_into_a_file_that_the_environment_can_name(tmp_path, forks) -> None:
    command = ["-m", "etude", "kernels"]
    made = tmp_path / "kernels.txt"
    run = forks.start(*command, "tune", made, "gate_residual")
    out, err = run.communicate(timeout=240)
    assert run.returncode == 0 and "gate_residual forward+backward DiT-XL" in out, err
    lines = made.read_text().splitlines()
    assert lines[0].startswith("# ") and lines[1] == "auto"
    environment = os.environ | {"ETUDE_KERNELS": f"@{made}"}
    status = [sys.executable, *command, "status"]  # read when Etude is imported
    assert subprocess.run(status, env=environment, timeout=120).returncode == 0
    run = forks.start(*command, "bench", "flash")
    _, err = run.communicate(timeout=120)
    assert run.returncode == 2 and "no benchmark of flash: there are" in err


def test_a_judge_and_an_evaluation_stop_with_85_and_go_on(tiny, tmp_path, forks) -> None:
    """Their work may end at any point: what is in the store stays there."""
    made = {
        "kind": "judge",
        "shards": f"{tiny.folder}/train",
        "judge": {
            "images": 640,
            "model": {"in_channels": 1, "num_classes": 10, "channels": [8, 16]},
        },
    }
    (tmp_path / "judge.yaml").write_text(json.dumps(made))
    runs = tmp_path / "runs"
    run_recipe(load_recipe(tmp_path / "judge.yaml"), root=runs, name="judge", quiet=True)
    run_recipe(load_recipe(tiny.ldm, ["loop.images=32"]), root=runs, name="ldm", quiet=True)
    measured = {
        "kind": "evaluate",
        "real": f"{tiny.folder}/train",
        "generator": "runs/ldm",
        "image_size": 16,
        "samples": 20480,
        "metrics": ["frechet"],
        "extractor": {"kind": "classifier", "weights": "runs/judge/judge"},
    }
    (tmp_path / "evaluate.yaml").write_text(json.dumps(measured))
    jobs = [["train", "judge.yaml", "judge.images=64000000"], ["evaluate", "evaluate.yaml"]]
    processes = [
        forks.start("-m", "etude", *words, f"run=stopped{number}", cwd=tmp_path)
        for number, words in enumerate(jobs)
    ]
    for number, process in enumerate(processes):
        folder, deadline = runs / f"stopped{number}", time.monotonic() + 60
        # the evaluation has drawn its first pictures once the real ones are in the store
        ready = runs / "features" if number else folder / "page"
        while not (ready.exists() and any(ready.rglob("*"))):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate(1)
            time.sleep(0.02)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert process.returncode == EXIT_REQUEUE, f"{process.returncode} {out} {err}"
        assert json.loads((folder / "REQUEUE").read_text())["reason"] == "SIGTERM"
        assert not (folder / "result.json").exists()
