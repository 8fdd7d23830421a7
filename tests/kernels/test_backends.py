"""Choosing an implementation: the environment, refusals, verification, the package's manners."""

import os
import subprocess
import sys

import pytest
import torch

from etude import kernels
from etude.kernels import backends

needs_cpp = pytest.mark.skipif(not backends.HAS_CPP, reason="the C++ kernels are not built")
INPUTS = (torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(2, 8))


def test_unknown_names_are_refused(python) -> None:
    with (
        pytest.raises(ValueError, match="auto, reference, cpp, triton, cuda"),
        kernels.use_backend("c"),
    ):
        pass
    run = python("import etude.kernels.backends", ETUDE_KERNELS="fast")
    assert (
        "ETUDE_KERNELS=fast: backend fast is unknown: set it to one of auto, reference"
        in run.stderr
    )


def test_a_backend_that_cannot_run_is_an_error_not_a_fallback() -> None:
    if torch.cuda.is_available() or backends.interpreting():
        pytest.skip("Triton runs here")
    with kernels.use_backend("triton"), pytest.raises(RuntimeError, match="set auto"):
        kernels.adaln_modulate(*INPUTS)
    meta = [t.to("meta") for t in INPUTS]
    with kernels.use_backend("cpp"), pytest.raises(RuntimeError, match=r"C\+\+|on meta"):
        kernels.adaln_modulate(*meta)


@needs_cpp
def test_auto_takes_cpp_on_the_cpu_and_says_so() -> None:
    with kernels.use_backend("auto"):
        assert backends.pick("op", "cpu", torch.float32) == "cpp"
        assert backends.pick("op", "cpu", torch.float64) == "reference"
        assert backends.pick("op", "cpu", torch.float32, torch.float16) == "reference"
        assert backends.pick("op", "meta", torch.float32) == "reference"
        assert kernels.announce("cpu").startswith("kernels on cpu: cpp (level ")
    rows = {row["backend"]: row for row in kernels.status()}
    assert rows["reference"]["available"] == rows["cpp"]["available"] == "yes"
    assert set(rows) == {"reference", "cpp", "triton", "cuda"}


def test_environment_chooses_and_bisects(python) -> None:
    code = "from etude.kernels import backends, announce; print(backends.choice(), announce('cpu'))"
    run = python(code, ETUDE_KERNELS="reference")
    assert run.stdout.startswith("reference kernels on cpu: reference (torch ")


@needs_cpp
def test_one_operator_can_have_a_choice_of_its_own(python) -> None:
    code = (
        "import torch; from etude.kernels import backends, announce; print(announce('cpu'));"
        "print(backends.pick('a', 'cpu', torch.float32), backends.pick('b', 'cpu', torch.float32))"
    )
    run = python(code, ETUDE_KERNELS="auto,a=reference")
    assert "; auto, a=reference)" in run.stdout and run.stdout.endswith("reference cpp\n"), run
    with kernels.use_backend("auto"), kernels.use_backend("cpp", op="a"):
        assert backends.pick("b", "cpu", torch.float32, twins=()) == "reference"
        with pytest.raises(RuntimeError, match="a=cpp: a has only triton"):
            backends.pick("a", "cpu", torch.float32, twins=("triton",))
        with kernels.use_backend("cpp"):  # for all: an operator without this twin is no error
            assert backends.pick("a", "cpu", torch.float32, twins=("triton",)) == "reference"


def test_names_of_one_operator_s_own_stand_on_a_twin(python) -> None:
    code = (
        "import torch; from etude.kernels import backends as b; print(b.choice('mlp'));"
        "print(b.pick('mlp', 'cpu', torch.float32, twins=('cpp',)))"
    )
    run = python(code, ETUDE_KERNELS="auto,mlp=library")
    assert run.stdout == "library\n" and "mlp=library: mlp has only cpp" in run.stderr
    split = "cpp" if backends.HAS_CPP else "reference"
    assert python(code, ETUDE_KERNELS="auto,mlp=split").stdout == f"split\n{split}\n"
    wrong = python(code, ETUDE_KERNELS="auto,mlp=sdpa").stderr
    assert "backend sdpa is unknown" in wrong and "split, epilogue, library" in wrong
    assert "epilogue is unknown" in python(code, ETUDE_KERNELS="epilogue").stderr
    assert "epilogue is unknown" in python(code, ETUDE_KERNELS="auto,adamw_ema=epilogue").stderr
    for op, names in backends.OWN_CHOICES.items():
        for name, twin in names.items():
            assert twin in backends.CHOICES and name not in backends.CHOICES
            with kernels.use_backend(name, op=op):
                assert backends.choice(op) == name
    with pytest.raises(ValueError, match="unknown kernel backend 'epilogue'"):
        kernels.use_backend("epilogue", op="swiglu").__enter__()


def test_tuning_offers_every_usable_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import tune

    for has in (False, True):
        for twin in ("CPP", "TRITON", "CUDA"):
            monkeypatch.setattr(backends, f"HAS_{twin}", has)
        twins = ["cpp"] * has + ["reference"]
        for op in ("mlp", "linear_gelu"):
            assert tune.choices(op, "cpu") == twins
            plans = ["triton", "reference", "epilogue", "library"] if has else ["reference"]
            assert tune.choices(op, "cuda") == plans
        assert tune.choices("swiglu", "cpu") == twins
        assert tune.choices("attention", "cpu")[0] == "auto"
    rows = [{"backend": n, "available": a} for n, a in (("sdpa", "yes"), ("xformers", "no"))]
    monkeypatch.setattr(kernels, "attention_status", lambda device: rows)
    assert tune.choices("attention", "cuda") == ["auto", "sdpa"]


def test_tuning_leaves_out_what_cannot_serve_every_case(monkeypatch, capsys) -> None:
    from benchmarks import registry, tune

    speed = {"auto": 3.0, "sdpa": 2.0, "reference": 4.0, "xformers": 1.0}
    monkeypatch.setattr(tune, "choices", lambda op, device: list(speed))
    monkeypatch.setattr(tune, "refusal", lambda c, i, b: "no bias" if b == "xformers" else "")
    monkeypatch.setattr(tune, "medians", lambda c, i, d, among: {b: speed[b] for b in among})
    case = registry.cases("attention")[0]
    monkeypatch.setattr(registry, "cases", lambda *ops: [case])
    assert tune.best("attention", "cpu") == "sdpa"
    assert "attention: xformers is left out: no bias" in capsys.readouterr().out
    speed["sdpa"] = 2.95  # not by the margin
    assert tune.best("attention", "cpu") == "auto"


def test_choices_can_come_from_a_file(python, tmp_path) -> None:
    file = tmp_path / "kernels.txt"
    file.write_text("# measured somewhere\nauto\ngate_residual=reference\n")
    code = "from etude.kernels import backends as b; print(b.choice(), b.choice('gate_residual'))"
    assert python(code, ETUDE_KERNELS=f"@{file}").stdout == "auto reference\n"
    missing = python(code, ETUDE_KERNELS=f"@{tmp_path}/none.txt").stderr
    assert "cannot be read (No such file or directory): `etude kernels tune`" in missing


@needs_cpp
def test_verification_names_the_first_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, shift, scale = INPUTS
    with kernels.use_backend("cpp", verify=True):
        kernels.adaln_modulate(x, shift, scale)
        from etude.kernels import adaln

        right = adaln.adaln_modulate_reference

        def wrong(*args, **kwargs):
            y = right(*args, **kwargs)
            y[1, 2, 5] += 0.5
            return y

        monkeypatch.setattr(adaln, "adaln_modulate_reference", wrong)
        with pytest.raises(AssertionError, match=r"output y differs first at \[1, 2, 5\]"):
            kernels.adaln_modulate(x, shift, scale)


@needs_cpp
def test_verification_covers_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from etude.kernels import adaln

    right = adaln.backward_reference

    def wrong(*args):
        grads = list(right(*args))
        grads[4] = grads[4] * 1.01
        return grads

    x, shift, scale = (t.clone().requires_grad_() for t in INPUTS)
    with kernels.use_backend("cpp", verify=True):
        kernels.adaln_modulate(x, shift, scale).square().sum().backward()
        monkeypatch.setattr(adaln, "backward_reference", wrong)
        with pytest.raises(AssertionError, match="adaln_modulate_backward: output dscale"):
            kernels.adaln_modulate(x, shift, scale).square().sum().backward()


def test_importing_the_package_loads_and_registers_nothing() -> None:
    code = (
        "import sys, etude.kernels as k; from packaging.version import Version\n"
        "assert not any(m.startswith('etude.kernels.') for m in sys.modules), sys.modules\n"
        "assert 'torch' not in sys.modules and 'triton' not in sys.modules\n"
        "v = Version(k.__version__); assert not Version('0.18.2') <= v < Version('0.19')\n"
    )
    # `etude` itself may import torch, so the folder is loaded alone, as another library would.
    folder = os.path.dirname(kernels.__file__)
    alone = code.replace("etude.kernels as k", "kernels as k").replace("etude.kernels.", "kernels.")
    run = subprocess.run(
        [sys.executable, "-c", alone],
        env=os.environ | {"PYTHONPATH": os.path.dirname(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr


def test_every_public_name_resolves_twice() -> None:
    for name in kernels.__all__:
        assert callable(getattr(kernels, name)) and getattr(kernels, name) is getattr(kernels, name)
    with pytest.raises(AttributeError, match="no attribute 'flash'"):
        _ = kernels.flash


def test_a_launch_makes_the_device_of_its_tensors_the_current_one(monkeypatch) -> None:
    """Triton launches on the current device; nothing is changed for tensors on the CPU."""
    current = [0]

    class Device:
        def __init__(self, device: torch.device | int) -> None:
            self.index = device if isinstance(device, int) else device.index

        def __enter__(self) -> None:
            current.append(self.index if self.index >= 0 else current[-1])

        def __exit__(self, *error: object) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Device)

    @backends.on_its_device
    def launch(scale: float | None, x: torch.Tensor) -> int:
        """Where."""
        return current[-1]

    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        there = torch.empty(2, device="cuda:3")
    assert launch(None, there) == 3 and launch(None, torch.empty(2)) == 0 and current == [0]
    assert launch.__name__ == "launch" and launch.__doc__ == "Where."
