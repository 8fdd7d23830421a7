"""`make bench`: what runs in which order, what a failure costs, and what its rows turn into."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import plot, readme, registry, results, run
from etude.kernels import catalogue

ROOT = Path(__file__).resolve().parents[2]
LATE = (
    "mlp linear_gelu modulation_gemm nearest_neighbours membership_counts adaln_modulate_fp8 "
    "linear_fp8"
).split()


def test_every_operator_has_a_case_with_a_shape_for_the_cpu() -> None:
    known = {o.name for listed in catalogue.operators().values() for o in listed}
    assert {case.op for case in registry.cases() if case.cpu_shapes} == known


def test_the_gate_sees_what_is_wrong() -> None:
    want = [torch.tensor([1.0, 2.0]), torch.zeros(2, 3)]
    right = (want[0] + 1e-5, want[1].bfloat16())
    assert 0 < registry.error(right, want) < 1
    for wrong in (
        (want[0] + 1e-3, want[1]),
        (want[0] * torch.nan, want[1]),
        (want[0][:1] * 2, want[1]),  # would broadcast
        (want[0], want[1][:1]),
        want[:1],
    ):
        assert registry.error(wrong, want) > 1


def test_the_gate_is_the_operators_tests_for_the_cpu() -> None:
    files = run.gate(["linear_fp8"])
    assert files == ["tests/kernels/test_fp8.py"]
    everything = run.gate([])
    assert len(everything) >= len(catalogue.FAMILIES) and set(files) < set(everything)
    assert not [f for f in everything if "triton" in f or "cuda" in f or "gpu" in f]
    assert all((ROOT / file).exists() for file in everything)


def report(*names: str) -> dict:
    info = {"op": "to_uint8", "variant": "forward", "shape": "64 pixels", "dtype": "float32"}
    rows = [{"extra_info": info | {"provider": n}, "stats": {"data": [1.0, 2.0]}} for n in names]
    return {"benchmarks": rows}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[tuple, dict]]:
    """What would be run; the measuring one leaves a report of one provider."""
    made: list[tuple[tuple, dict]] = []

    def pytest_run(*arguments: str, **environment: str) -> int:
        made.append((arguments, environment))
        for word in arguments:
            if word.startswith("--benchmark-json="):
                Path(word.split("=")[1]).write_text(json.dumps(report("eager")))
        return 0

    monkeypatch.setattr(run, "pytest_run", pytest_run)
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    return made


def test_the_operators_tests_come_first(calls, tmp_path: Path, capsys) -> None:
    assert run.main(["to_uint8", "--seconds-per-row", "0.01"]) == 0
    (tests, _), (_, environment) = calls
    assert "tests/kernels/test_solver.py" in tests
    assert environment == {"ETUDE_BENCH": "to_uint8", "ETUDE_BENCH_SECONDS": "0.01"}
    (row,) = [json.loads(x) for x in (tmp_path / "operators_cpu.jsonl").read_text().splitlines()]
    assert row["provider"] == "eager" and row["p50_s"] == 1.5 and row["processor"]
    assert "to_uint8 forward" in capsys.readouterr().out


def test_nothing_is_measured_where_tests_fail(calls, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(run, "pytest_run", lambda *a, **k: calls.append((a, k)) or 1)
    assert run.main([]) == 1 and len(calls) == 1
    assert "nothing is measured" in capsys.readouterr().err
    assert run.main(["no_such_op"]) == 2 and len(calls) == 1
    assert not list(tmp_path.iterdir())


PLUGIN = """
import dataclasses, pytest
from benchmarks import registry
from etude import kernels

def broken():
    def run(inputs):
        raise RuntimeError("no kernel image")
    return run

every = registry.cases
rivals = {"wrong": lambda: lambda inputs: kernels.to_uint8(-inputs["images"]), "broken": broken}
changed = [dataclasses.replace(c, rivals=rivals, compiled=False) for c in every("to_uint8")]
registry.cases = lambda *operators: changed
"""


def test_a_row_that_fails_costs_no_other(tmp_path: Path) -> None:
    """A rival with wrong values and one that raises are named; the other rows are in the report."""
    (tmp_path / "two_more_rivals.py").write_text(PLUGIN)
    file = tmp_path / "report.json"
    environment = {"ETUDE_BENCH_SECONDS": "0.001", "PYTHONPATH": f"{tmp_path}{os.pathsep}"}
    environment["PYTHONPATH"] += os.environ.get("PYTHONPATH", "")
    code = (
        "import sys; from benchmarks import run; "
        "sys.exit(run.pytest_run('-p', 'two_more_rivals', 'benchmarks/bench_operators.py', "
        f"'--benchmark-enable', '--benchmark-only', '--benchmark-save-data', '--benchmark-quiet', "
        f"'--benchmark-json={file}'))"
    )
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 1, made.stdout + made.stderr
    assert "wrong values are not timed" in made.stdout and "no kernel image" in made.stdout
    rows = run.rows(json.loads(file.read_text()))
    assert {row["provider"] for row in rows} >= {"eager"}
    assert not {row["provider"] for row in rows} & {"wrong", "broken"}
    assert all(row["p20_s"] <= row["p50_s"] <= row["p80_s"] and row["rounds"] >= 7 for row in rows)
    assert results.table(rows).count("\n") == 1  # two dtypes


def test_a_bar_on_a_terminal_and_silence_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "test_some_operator.py").write_text("def test_one(): pass\ndef test_two(): pass\n")
    code = f"from benchmarks import run; run.pytest_run({str(tmp_path)!r})"
    words = [sys.executable, "-c", code]
    own = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    quiet = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=own)
    assert (quiet.returncode, quiet.stdout.strip(), quiet.stderr) == (0, "", "")
    master, slave = os.openpty()
    terminal = own | {"TERM": "xterm", "COLUMNS": "120"}
    shown = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=slave, env=terminal)
    os.close(slave)
    drawn = os.read(master, 1 << 16).decode()
    os.close(master)
    assert shown.stdout.strip() == b"" and "test_some_operator" in drawn and "2/2" in drawn


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows as they will be: every point of every case, C++ four times as fast as eager."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    speed = {"eager": 4.0, "compiled": 2.0, "cpp v3": 1.25, "cpp v4": 1.0}
    rows = []
    for case in registry.cases():
        has_cpp = "cpp" in registry.twins(case.op)
        for name in [*(n for n in speed if has_cpp or "cpp" not in n), *case.rivals]:
            for shape in case.cpu_shapes:
                rows += [
                    {
                        "op": case.op, "variant": case.variant, "shape": shape, "dtype": dtype,
                        "provider": name, "source_hash": case.source_hash(),
                        "p50_s": speed.get(name, 8.0),
                    }
                    for dtype in case.dtypes
                ]  # fmt: skip
    results.append("operators_cpu", rows)
    on_gpu = [r | {"provider": "triton", "of_copy": 0.5, "of_matmul": 0.25} for r in rows[:1]]
    failed = {"op": "swiglu", "variant": "forward", "shape": "DiT-B", "dtype": "bfloat16"}
    on_gpu.append(failed | {"provider": "quack", "failed": "RuntimeError: no kernel image"})
    results.append("operators_gpu", on_gpu)


def test_rows_become_the_readmes_table(measured: None) -> None:
    lines = {line.split("`")[1]: line for line in readme.table() if line.startswith("| `")}
    assert set(LATE) < set(lines)
    for op, line in lines.items():
        cpu, against_compile = (cell.strip() for cell in line.split("|")[5:7])
        has_cpp = "cpp" in registry.twins(op)
        assert (cpu, against_compile) == (("3.2, 4", "2") if has_cpp else ("", "")), line
    assert sum("50%" in line for line in lines.values()) == 1


def test_rows_become_the_figure(measured: None, monkeypatch, tmp_path: Path) -> None:
    found = plot.ratios(readme.newest("operators_cpu"))
    assert found and all(set(f) == set(plot.SHOWN) for f in found.values())
    assert all(f["cpp v4"] == 4.0 and f["compiled"] == 2.0 for f in found.values())
    assert any(case.startswith("nearest_neighbours") for case in found)
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(plot, "ROOT", tmp_path)
    assert plot.main() == 0
    drawn = (tmp_path / "docs" / "operators-cpu.svg").read_text()
    assert "membership_counts" in drawn and "C++, AVX-512" in drawn


def test_cpp_without_a_level_is_not_what_a_person_would_write() -> None:
    common = {"op": "moments", "variant": "features", "shape": "s", "dtype": "float32"}
    rows = [common | {"provider": n, "p50_s": t} for n, t in (("eager", 4.0), ("cpp", 1.0))]
    rows.append(common | {"provider": "compiled", "p50_s": 2.0})
    assert list(plot.ratios(rows).values()) == [{"compiled": 2.0}]
