"""Other libraries as rivals: they are called by their own signatures and pass the same gate."""

import inspect
import sys
from importlib import import_module
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import libraries, registry
from benchmarks.case import Case

# A stand-in for each function that an adapter calls: the same parameters, computed by torch.


def liger_layer_norm(X, W, B, eps):
    assert W.shape == B.shape == X.shape[-1:] and W.dtype == B.dtype == X.dtype
    return F.layer_norm(X, W.shape, W, B, eps)


def liger_group_norm(X, affine_scaling_weight, affine_shifting_bias, num_channels, num_groups, eps):
    assert num_channels == X.shape[1]
    return F.group_norm(X, num_groups, affine_scaling_weight, affine_shifting_bias, eps)


def liger_swiglu(a, b):
    return F.silu(a) * b


class LigerFusedGateUpSiLUMulFunction:
    @staticmethod
    def apply(y, in_place):
        assert not in_place and y.dim() == 2  # its gradient has two dimensions
        return liger_swiglu(*y.chunk(2, -1))


def layernorm_fwd(x, weight, bias=None, eps=1e-6, return_rstd=False, return_mean=False):
    assert x.dim() == 2 and weight.shape == x.shape[-1:] and weight.dtype == torch.float32
    assert return_rstd and return_mean
    wide = x.float()
    mean, variance = wide.mean(-1), wide.var(-1, correction=0)
    y = F.layer_norm(wide, weight.shape, weight, bias, eps).to(x.dtype)
    return y, (variance + eps).rsqrt(), mean


def layernorm_bwd(x, weight, dout, rstd, mean, has_bias=True):
    assert (
        x.shape == dout.shape and dout.is_contiguous() and rstd.shape == mean.shape == x.shape[:1]
    )
    normed = (x.float() - mean[:, None]) * rstd[:, None]
    d = dout.float() * weight
    along = (d * normed).mean(-1, keepdim=True)
    dx = rstd[:, None] * (d - d.mean(-1, keepdim=True) - normed * along)
    return dx.to(x.dtype), (dout * normed).sum(0), dout.sum(0) if has_bias else None


def linear_act_func(
    x, weight, activation, bias=None, store_preact=True, fuse_grad_accum=False, tuned=True
):
    assert activation == "gelu_tanh_approx" and not tuned
    before = F.linear(x, weight, bias)
    return before, F.gelu(before, approximate="tanh")


def mlp_func(
    x,
    weight1,
    weight2,
    activation: str,
    bias1=None,
    bias2=None,
    fuse_grad_accum=False,
    tuned=True,
    recompute=False,
    concat_layout=False,
):
    inner = linear_act_func(x, weight1, activation, bias1, tuned=tuned)[1]
    return F.linear(inner, weight2, bias2)


FUNCTIONS = {
    "liger_kernel.transformers.functional": [liger_layer_norm, liger_group_norm, liger_swiglu],
    "liger_kernel.ops": [LigerFusedGateUpSiLUMulFunction],
    "quack.rmsnorm": [layernorm_fwd, layernorm_bwd],
    "quack.linear": [linear_act_func],
    "quack.mlp": [mlp_func],
}
RIVALS = {
    "adaln_modulate": ["DiT's lines, Liger LayerNorm", "DiT's lines, quack LayerNorm"],
    "gate_residual_adaln": ["DiT's lines, Liger LayerNorm", "DiT's lines, quack LayerNorm"],
    "swiglu": ["Liger"],
    "groupnorm_silu": ["Liger GroupNorm, torch SiLU"],
    "linear_gelu": ["quack"],
    "mlp": ["quack"],
}
SMALL = {"groupnorm_silu": (2, 64, 3, 5), "swiglu": (5, 24), "linear_gelu": (5, 24), "mlp": (5, 24)}
POINTS = [
    pytest.param(case, rival, id=f"{case.name}-{rival}")
    for case in registry.cases(*RIVALS)
    for rival in RIVALS[case.op]
    if rival in case.rivals
]


def stand_in(name: str, *objects: object) -> ModuleType:
    module = ModuleType(name)
    for one in objects:
        setattr(module, one.__name__, one)
    return module


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    modules = {name: stand_in(name, *objects) for name, objects in FUNCTIONS.items()}
    monkeypatch.setattr(libraries, "library", lambda name, capability=(0, 0): modules[name])
    return modules


def gate(case: Case, rival: str, dtype: torch.dtype) -> float:
    shape = SMALL.get(case.op, (2, 3, 24))
    inputs = case.make(shape, dtype, "cpu")
    kept = {n: t.detach().clone() for n, t in inputs.items() if isinstance(t, Tensor)}
    with registry.provided(case, rival) as run:
        error = registry.error(run(inputs), registry.exact(case, inputs))
    assert all(torch.equal(inputs[name], before) for name, before in kept.items())
    return error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("case", "rival"), POINTS)
def test_rivals_compute_what_the_operator_does(
    case: Case, rival: str, dtype: torch.dtype, installed: dict[str, ModuleType]
) -> None:
    """Forward and the same gradients, from the same inputs, within the gate's bound."""
    assert gate(case, rival, dtype) < 1


def test_liger_before_its_swiglu_of_one_tensor(installed: dict[str, ModuleType]) -> None:
    del installed["liger_kernel.ops"].LigerFusedGateUpSiLUMulFunction
    for case in registry.cases("swiglu"):
        assert gate(case, "Liger", torch.float32) < 1


@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [
        ("liger_kernel.transformers.functional", "liger_layer_norm", lambda X, W, B, eps: X),
        ("quack.rmsnorm", "layernorm_bwd", lambda *a, **k: (layernorm_bwd(*a, **k)[0] * 1.1,)),
        ("quack.mlp", "mlp_func", lambda *a, **k: mlp_func(*a[:4], **k)),
    ],
)
def test_a_rival_that_is_wrong_is_refused(module: str, name: str, wrong, installed) -> None:
    setattr(installed[module], name, wrong)
    op = "mlp" if name == "mlp_func" else "adaln_modulate"
    library = "quack" if "quack" in module else "Liger"
    refused = [
        gate(case, rival, torch.float32) >= 1
        for case in registry.cases(op)
        for rival in case.rivals
        if library in rival and ("bwd" not in name or case.variant != "forward")
    ]
    assert refused and all(refused)


def test_the_reason_why_a_library_cannot_run(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ImportError, match="liger_kernel.ops needs a CUDA device"):
        libraries.library("liger_kernel.ops")
    absent = {name for case in registry.cases(*RIVALS) for name in registry.providers(case, "cpu")}
    assert not [name for name in absent if "Liger" in name or "quack" in name]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ImportError, match="quack.rmsnorm needs compute capability 9.0"):
        libraries.quack_layernorm()
    with pytest.raises(ImportError, match="No module named 'no_such_library'"):
        libraries.library("no_such_library")
    (tmp_path / "broken_library.py").write_text("raise RuntimeError('built for another torch')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match="broken_library: built for another torch"):
        libraries.library("broken_library")
    monkeypatch.setitem(sys.modules, "quack.rmsnorm", stand_in("quack.rmsnorm"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(ImportError, match="has no attribute 'layernorm_fwd'"):
        libraries.quack_layernorm()


@pytest.mark.parametrize("module", FUNCTIONS)
def test_stand_ins_have_the_signatures_of_the_library(module: str) -> None:
    """Where it is installed, which need not be on a machine with a GPU."""
    try:
        real = import_module(module)
    except ImportError as error:
        pytest.skip(f"needs {module}: {error}")
    for one in FUNCTIONS[module]:
        if inspect.isclass(one):
            theirs = list(inspect.signature(getattr(real, one.__name__).forward).parameters)[1:]
            assert theirs == list(inspect.signature(one.apply).parameters)
        else:
            theirs = inspect.signature(getattr(real, one.__name__)).parameters
            assert list(theirs) == list(inspect.signature(one).parameters)
