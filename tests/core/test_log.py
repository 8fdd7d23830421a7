"""Messages, metrics that survive a kill, rewinding, progress on terminals and in files."""

import json
import math
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from etude.core import log as logs
from etude.core.files import read_json, to_json, write_json_atomic
from etude.core.log import Log, format_table, read_metrics, repair_metrics


def test_metrics_are_lines_that_append_over_starts(tmp_path: Path) -> None:
    for start in (0, 2):
        log = Log(tmp_path, quiet=True)
        for step in (start, start + 1):
            log.metrics("train", step * 128, loss=1.0 / (step + 1), skipped=0)
        log.metrics("held_out", start * 128, raw=float("nan"), ema=math.inf)
        log.close()
    records = read_metrics(tmp_path / "metrics.jsonl", "train")
    assert [r["images_seen"] for r in records] == [0, 128, 256, 384]
    assert [r["loss"] for r in records] == [1.0, 1 / 2, 1 / 3, 1 / 4]
    assert all(abs(r["time"] - time.time()) < 60 for r in records)
    held = read_metrics(tmp_path / "metrics.jsonl", "held_out")
    assert [(r["raw"], r["ema"]) for r in held] == [(None, None)] * 2


@pytest.mark.parametrize("broken", ['{"time": 1, "name": "train", "images_s', "x" * 200_000, "\0"])
def test_a_half_written_line_is_removed_when_opened_again(tmp_path: Path, broken: str) -> None:
    log = Log(tmp_path, quiet=True)
    log.metrics("train", 1, loss=1.0)
    log.close()
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + broken.encode())
    assert [r["loss"] for r in read_metrics(path)] == [1.0]
    log = Log(tmp_path, quiet=True)
    assert path.read_bytes() == whole
    log.metrics("train", 2, loss=2.0)
    assert [r["loss"] for r in read_metrics(path)] == [1.0, 2.0]


def test_repair_of_nothing(tmp_path: Path) -> None:
    repair_metrics(tmp_path / "none")
    (tmp_path / "one").write_bytes(b"no line end")
    repair_metrics(tmp_path / "one")
    assert (tmp_path / "one").read_bytes() == b""


def test_a_killed_writer_leaves_whole_lines(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from etude.core.log import Log\n"
        "log = Log(pathlib.Path(sys.argv[1]), quiet=True); step = 0\n"
        "while True: log.metrics('train', step, loss=0.5 * step); step += 1\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    path = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 30
    while (not path.exists() or path.stat().st_size < 10_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.kill()
    child.wait()
    Log(tmp_path, quiet=True)
    lines = path.read_text().splitlines()
    assert len(lines) > 50
    for step, line in enumerate(lines):
        record = json.loads(line)
        assert (record["images_seen"], record["loss"]) == (step, 0.5 * step)


def test_rewind_keeps_what_lies_before(tmp_path: Path) -> None:
    log = Log(tmp_path, quiet=True)
    for seen in (0, 100, 200, 300):
        log.metrics("train", seen, loss=float(seen))
        log.metrics("grid", seen, share=0.5)
    log.rewind(200)
    log.metrics("train", 200, loss=-1.0)
    found = [(r["name"], r["images_seen"]) for r in read_metrics(tmp_path / "metrics.jsonl")]
    before = [(name, seen) for seen in (0, 100) for name in ("train", "grid")]
    assert found == [*before, ("train", 200)]
    Log(tmp_path / "empty", quiet=True).rewind(5)


def test_who_says_what_where(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for rank, quiet in ((0, None), (1, None), (0, True)):
        folder = tmp_path / f"{rank}{quiet}"
        folder.mkdir()
        log = Log(folder, rank=rank, quiet=quiet)
        log.info("hello [red]x[/red]")
        log.warn("careful")
        log.table("title", ["a"], [["1"]])
        log.metrics("train", 1, loss=1.0)
        shown = capsys.readouterr()
        assert shown.out == ""
        files = {path.name: path.read_text() for path in folder.iterdir()}
        if rank == 1:
            assert shown.err == "" and list(files) == ["log-rank1.txt"]
            assert files["log-rank1.txt"].endswith("  warning: careful\n")
            continue
        assert ("hello [red]x[/red]\n" in shown.err) == (quiet is None)
        assert "warning: careful\n" in shown.err
        assert set(files) == {"log.txt", "metrics.jsonl"}
        assert [line[21:] for line in files["log.txt"].splitlines()[:2]] == [
            "hello [red]x[/red]",
            "warning: careful",
        ]
    Log(None).info("no folder, no file")


def test_progress_without_a_terminal_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    with Log(None).progress("training", 1000, done=200) as progress:
        for _ in range(4):
            now[0] += 10.0
            progress.advance(100, loss=0.25)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "training: 400/1,000 images, 10.0 images/s, 1:00 left  loss 0.25",
        "training: 600/1,000 images, 10.0 images/s, 0:40 left  loss 0.25",
        "training: 600/1,000 images, 10.0 images/s, 0:40 left  loss 0.25",
    ]
    assert progress.rate == 10.0


def test_a_terminal_gets_a_bar() -> None:
    code = (
        "from etude.core.log import Log\n"
        "log = Log(None); log.table('T', ['left', 'right'], [['[b]', '2']])\n"
        "with log.progress('drawing', 10, unit='pictures') as p:\n"
        "    for _ in range(10): p.advance(1, loss=0.5)\n"
        "    log.info('between')\n"
    )
    reader, writer = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    child = subprocess.Popen([sys.executable, "-c", code], stderr=writer, env=environment)
    os.close(writer)
    shown = b""
    while True:
        try:
            chunk = os.read(reader, 4096)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
    os.close(reader)
    assert child.wait() == 0
    text = shown.decode()
    for part in ("drawing", "100%", "pictures/s", "between", "left", "[b]", "loss 0.5"):
        assert part in text, part
    assert "\x1b[" in text


def test_tables_are_aligned() -> None:
    rows = [["one", "22"], ["three", "4"]]
    assert format_table("T", ["a", "b"], rows) == ("T\na      b\n-----  --\none    22\nthree  4")
    assert format_table("T", ["a"], []) == "T\na\n-"


def test_json_files_are_whole_and_plain(tmp_path: Path) -> None:
    import numpy as np
    import torch

    data = {"a": np.float32(0.5), "b": torch.tensor(3), "c": [Path("x"), np.arange(2)], 1: math.nan}
    path = tmp_path / "deep" / "x.json"
    write_json_atomic(path, data)
    assert read_json(path) == {"a": 0.5, "b": 3, "c": ["x", [0, 1]], "1": None}
    with pytest.raises(TypeError):
        write_json_atomic(path, {"a": object()})
    assert read_json(path)["a"] == 0.5
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]
    assert to_json({"é": True}) == '{"é": true}'
