"""The switch between attention's implementations: every one that runs here, against float64."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from etude import kernels
from etude.kernels import QKNorm, attention_backends, backends
from etude.kernels.attention_backends import BACKENDS, Options

# RMS of the error over RMS of the value. float32: sums of up to 300 terms in another order. 16 bit:
# the result is rounded (a quarter of eps) and so are the weights before they meet v; where torch
# normalises or rotates first, q and k are rounded once more and the scores feel it.
RATIO = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# Kernels of a GPU also round the gradients of the scores to 16 bit, and split float32 into parts.
RATIO_ON_CUDA = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
CASES = {  # B, Nq, Nk, H, d, and options
    "plain": ((2, 70, 70, 3, 64), ()),
    "packed": ((2, 70, 70, 3, 72), ("packed",)),
    "short": ((8, 16, 16, 4, 40), ("packed",)),
    "cross": ((2, 33, 130, 2, 72), ()),
    "long": ((1, 40, 300, 2, 128), ()),
    "lengths": ((4, 17, 60, 2, 64), ("key_lengths",)),
    "offsets": ((4, 64, 60, 2, 72), ("key_offsets",)),
    "most": ((4, 64, 60, 2, 72), ("key_offsets", "max_keys")),
    "bias": ((2, 49, 49, 3, 64), ("bias",)),
    "bias of each": ((3, 20, 33, 2, 72), ("bias_of_each", "key_lengths")),
    "rmsnorm, rope": ((2, 48, 48, 2, 64), ("packed", "rmsnorm", "rope")),
    "layernorm": ((2, 20, 33, 2, 72), ("layernorm",)),
    "all": ((4, 48, 48, 2, 72), ("packed", "rmsnorm", "rope", "bias", "key_lengths")),
}
SCALE = 0.2


def inputs(case: str, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The tensors of a case, by name, seeded by it; values are already rounded to dtype."""
    (B, Nq, Nk, H, d), names = CASES[case]
    g = torch.Generator().manual_seed(len(case))

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    lengths = torch.tensor([(Nk, 0, 1, Nk // 2)[b % 4] for b in range(B)], dtype=torch.int32)
    data = {}
    if "packed" in names:
        data["qkv"] = normal(B, Nq, 3, H, d)
    elif "key_offsets" in names:
        total = int(lengths.sum())
        data |= {"q": normal(B, Nq, H, d), "k": normal(total, H, d), "v": normal(total, H, d)}
        data["key_offsets"] = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()
    else:
        data |= {"q": normal(B, Nq, H, d)} | {n: normal(B, Nk, H, d) for n in "kv"}
    if "key_lengths" in names:
        data["key_lengths"] = lengths
    if "bias" in names or "bias_of_each" in names:
        data["bias"] = normal(1 if "bias" in names else B, H, Nq, Nk)
    if "rmsnorm" in names or "layernorm" in names:
        data |= {"q_weight": 1 + normal(d, scale=0.2), "k_weight": 1 + normal(d, scale=0.2)}
    if "rope" in names:
        data |= dict(zip(("cos", "sin"), kernels.rope_2d(8, Nq // 8, d), strict=True))
    return {k: v.to(device) for k, v in data.items()}


def call(case: str, data: dict[str, Tensor]) -> Tensor:
    (_, _, Nk, _, _), names = CASES[case]
    options: dict = {"scale": SCALE} | {k: data[k] for k in ("key_lengths", "bias") if k in data}
    kind = "rmsnorm" if "rmsnorm" in names else "layernorm"
    if "q_weight" in data:
        options["qk_norm"] = QKNorm(kind, data["q_weight"], data["k_weight"])
    if "cos" in data:
        options["rope"] = data["cos"], data["sin"]
    if "qkv" in data:
        return kernels.attention_packed(data["qkv"], **options)
    if "key_offsets" in data:
        options["key_offsets"] = data["key_offsets"]
    if "max_keys" in names:
        options["max_keys"] = Nk
    return kernels.dot_product_attention(data["q"], data["k"], data["v"], **options)


def run(case: str, data: dict[str, Tensor]) -> dict[str, Tensor]:
    fixed = ("cos", "sin")
    leaves = {
        k: v.detach().clone().requires_grad_(v.is_floating_point() and k not in fixed)
        for k, v in data.items()
    }
    out = call(case, leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    (out * weights).sum().backward()
    return {"out": out.detach()} | {
        f"d{k}": v.grad for k, v in leaves.items() if v.grad is not None
    }


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], ratio: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name].double() - want[name].double()).square().mean().sqrt()
        size = want[name].double().square().mean().sqrt()
        assert error <= ratio * size + 1e-12, f"{name}: error ratio {float(error / size):.2e}"


def options_of(case: str) -> tuple[str, ...]:
    names = CASES[case][1]
    also = {"bias": "bias_of_each"}
    asked = [o for o in ("key_lengths", "key_offsets", "bias") if {o, also.get(o)} & set(names)]
    asked += ["qk_norm"] * bool({"rmsnorm", "layernorm"} & set(names)) + ["rope"] * (
        "rope" in names
    )
    return tuple(asked)


def compare(name: str, case: str, dtype: torch.dtype, device: str) -> None:
    """One backend on one case; skips with the backend's own reason where it does not serve it."""
    head = CASES[case][0][-1]
    try:
        attention_backends.choose(name, device, dtype, head, options_of(case))
    except RuntimeError as error:
        pytest.skip(str(error))
    data = inputs(case, dtype, device)
    with kernels.use_backend(name, op="attention"):
        got, again = run(case, data), run(case, data)
    with kernels.use_backend("reference", op="attention"):
        wide = {k: v.double() if v.is_floating_point() else v for k, v in data.items()}
        want = run(case, wide)
    assert got["out"].dtype == dtype and got["out"].is_contiguous()
    assert_close(got, want, (RATIO if device == "cpu" else RATIO_ON_CUDA)[dtype])
    ours = device == "cpu" or name == "etude"  # other libraries' gradients are added in any order
    assert all(torch.equal(got[n], again[n]) for n in (got if ours else ["out"]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", RATIO, ids=str)
@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_on_the_cpu(name: str, case: str, dtype: torch.dtype) -> None:
    compare(name, case, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", RATIO, ids=str)
@pytest.mark.parametrize("name", [n for n in BACKENDS if n != "reference"])
def test_on_the_device(name: str, case: str, dtype: torch.dtype) -> None:
    compare(name, case, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["auto", "sdpa"])
@pytest.mark.parametrize("case", ["packed", "bias", "rmsnorm, rope", "lengths"])
def test_compiled_on_the_device(name: str, case: str) -> None:
    data = inputs(case, torch.bfloat16, "cuda")
    torch._dynamo.reset()
    with kernels.use_backend(name, op="attention"):
        compiled = torch.compile(lambda d: call(case, d), fullgraph=True)
        got = compiled(data)
    with kernels.use_backend("reference", op="attention"):
        want = call(case, {k: v.double() if v.is_floating_point() else v for k, v in data.items()})
    assert_close({"out": got}, {"out": want}, RATIO_ON_CUDA[torch.bfloat16])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["etude", "sdpa"])
def test_addresses_beyond_32_bits(name: str) -> None:
    shape = (2600, 256, 3, 16, 72)  # 2.3 G numbers, 4.6 GB; three times that with gradients
    if torch.cuda.get_device_properties(0).total_memory < 30e9:
        pytest.skip("needs 30 GB")
    try:
        attention_backends.choose(name, "cuda", torch.bfloat16, 72)
    except RuntimeError as error:
        pytest.skip(str(error))
    g = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(shape, generator=g, device="cuda", dtype=torch.bfloat16).requires_grad_()
    last = qkv.detach()[-2:].double().requires_grad_()
    with kernels.use_backend(name, op="attention"):
        out = kernels.attention_packed(qkv)
    out.backward(qkv.detach()[:, :, 0])
    want = kernels.attention_reference(*last.unbind(2))
    want.backward(last.detach()[:, :, 0])
    got = {"out": out.detach()[-2:], "dqkv": qkv.grad[-2:]}
    expected = {"out": want.detach(), "dqkv": last.grad}
    assert_close(got, expected, RATIO_ON_CUDA[torch.bfloat16])


@pytest.mark.gpu
def test_choosing_and_calling_do_not_synchronise() -> None:
    data = {case: inputs(case, torch.bfloat16, "cuda") for case in CASES}
    for case in CASES:
        call(case, data[case])  # the first call may probe a library
    torch.cuda.set_sync_debug_mode("error")
    try:
        for case in CASES:
            call(case, data[case])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_status_says_what_each_library_says() -> None:
    rows = {row["backend"]: row for row in kernels.attention_status("cpu")}
    assert list(rows) == list(BACKENDS)
    assert rows["sdpa"]["available"] == rows["reference"]["available"] == "yes"
    assert rows["sdpa"]["detail"] == "qk_norm, rope by torch"
    assert rows["sdpa"]["version"] == torch.__version__
    for name, row in rows.items():
        assert row["detail"] and "\n" not in row["detail"], name
        if row["importable"] == "no":
            assert row["available"] == "no" and "No module named" in row["detail"], row


def test_xformers_on_the_cpu_is_refused_in_its_own_words() -> None:
    pytest.importorskip("xformers")
    row = {row["backend"]: row for row in kernels.attention_status("cpu")}["xformers"]
    assert row["importable"] == "yes" and row["available"] == "no" and row["version"]
    assert "NotImplementedError" in row["detail"] and "device=cpu (supported:" in row["detail"]
    q = torch.zeros(1, 4, 1, 8, dtype=torch.bfloat16)
    with (
        kernels.use_backend("xformers", op="attention"),
        pytest.raises(RuntimeError, match="attention=xformers: xformers NotImplementedError"),
    ):
        kernels.dot_product_attention(q, q, q)


def test_the_environment_names_one_and_the_log_says_so(python) -> None:
    code = (
        "import sys\n"
        "from etude.kernels import announce, attention_backends as a; print(announce('cpu'))\n"
        "assert not {'xformers', 'flash_attn'} & set(sys.modules)\n"
    )
    run = python(code, ETUDE_KERNELS="auto,attention=reference")
    assert "auto, attention=reference)" in run.stdout and "; attention: reference" in run.stdout, (
        run
    )
    run = python(code, ETUDE_KERNELS="auto")
    assert "; attention: sdpa" in run.stdout, run
    run = python(code, ETUDE_KERNELS="auto,attention=fast")
    assert "backend fast is unknown" in run.stderr and "xformers, sdpa" in run.stderr
    run = python(code, ETUDE_KERNELS="sdpa")  # the other operators have no such twin
    assert "backend sdpa is unknown" in run.stderr


def test_names_for_all_operators_mean_what_attention_has_of_them() -> None:
    for name, means in {
        "reference": "reference",
        "cpp": "auto",
        "cuda": "auto",
        "triton": "etude",
    }.items():
        with kernels.use_backend(name):
            assert attention_backends.wanted() == means
    with kernels.use_backend("cpp"), kernels.use_backend("sdpa", op="attention"):
        assert attention_backends.wanted() == "sdpa" and backends.choice("adaln_modulate") == "cpp"
    with (
        pytest.raises(ValueError, match="unknown kernel backend 'sdpa'"),
        kernels.use_backend("sdpa"),
    ):
        pass


def test_what_cannot_run_is_an_error_not_a_fallback() -> None:
    choose = attention_backends.choose
    half, single = torch.bfloat16, torch.float32
    for asked, dtype, head, options, words in (
        ("xformers", half, 64, ("bias",), "xformers has no bias"),
        ("flash-attn-2", half, 64, ("key_lengths", "qk_norm"), "flash-attn-2 has no key_lengths"),
        ("xformers", single, 64, (), "does not take torch.float32"),
        ("flash-attn-4", half, 192, (), "does not take head dimension 192"),
        ("flash-attn", half, 36, (), "flash-attn-4 does not take head dimension 36; flash-attn-3"),
    ):
        with pytest.raises(RuntimeError, match=words):
            choose(asked, "cuda", dtype, head, options)
    assert choose("auto", "cpu", half, 36, attention_backends.OPTIONS) == "sdpa"
    assert choose("auto", "meta", half, 36) == "reference"
    assert choose("flash-attn", "cpu", torch.float64, 36) == "reference"
    assert choose("sdpa", "cpu", torch.float64, 36) == "sdpa"


@pytest.mark.parametrize("queries", [0, 1, 7])
def test_queries_of_a_picture_begin_where_the_last_ones_end(queries: int) -> None:
    begin = attention_backends._query_offsets(torch.zeros(3, queries, 2, 8))
    assert begin.dtype == torch.int32 and begin.tolist() == [n * queries for n in range(4)]


class Library:
    """A stand-in for flash-attn or xformers: the reference behind the library's signatures."""

    def __init__(self, returns_lse: bool = False) -> None:
        self.calls: list[tuple[str, dict]] = []
        self.returns_lse = returns_lse

    def _out(self, name: str, out: Tensor, **told) -> Tensor | tuple[Tensor, None]:
        self.calls.append((name, told))
        return (out, None) if self.returns_lse else out

    def flash_attn_func(self, q, k, v, softmax_scale, deterministic):
        out = kernels.attention_reference(q, k, v, scale=softmax_scale)
        return self._out("plain", out, deterministic=deterministic)

    def flash_attn_qkvpacked_func(self, qkv, softmax_scale, deterministic):
        out = kernels.attention_reference(*qkv.unbind(2), scale=softmax_scale)
        return self._out("packed", out)

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        deterministic,
    ):
        spans = zip(
            *(t.tolist() for t in (cu_seqlens_q[:-1], cu_seqlens_q[1:])),
            *(t.tolist() for t in (cu_seqlens_k[:-1], cu_seqlens_k[1:])),
            strict=True,
        )
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        outs = []
        for a, b, c, d in spans:
            assert b - a <= max_seqlen_q and d - c <= max_seqlen_k
            one = (q[a:b, :][None], k[c:d][None], v[c:d][None])
            outs.append(kernels.attention_reference(*one, scale=softmax_scale)[0])
        return self._out("varlen", torch.cat(outs), max_seqlen_k=max_seqlen_k)

    def memory_efficient_attention(self, q, k, v, scale):
        return self._out("xformers", kernels.attention_reference(q, k, v, scale=scale))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """Put stand-ins where the switch looks for its libraries; forget what it found before."""
    caches = (attention_backends._import, attention_backends.unusable, attention_backends._chosen)

    def install(**libraries: Library) -> None:
        for name, library in libraries.items():
            parts = name.replace("__", ".")
            module = ModuleType(parts)
            for function in dir(Library):
                if not function.startswith("_"):
                    setattr(module, function, getattr(library, function))
            monkeypatch.setitem(sys.modules, parts, module)
        for cache in caches:
            cache.cache_clear()

    yield install
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("case", ["plain", "packed", "cross", "offsets", "most", "rmsnorm, rope"])
@pytest.mark.parametrize("generation", ["2", "3", "4"])
def test_how_flash_attn_is_called(generation: str, case: str, installed) -> None:
    places = {"2": "flash_attn", "3": "flash_attn_interface", "4": "flash_attn__cute"}
    library = Library(returns_lse=generation == "4")
    installed(**{"flash_attn": Library(), places[generation]: library})
    library.calls.clear()
    compare(f"flash-attn-{generation}", case, torch.bfloat16, "cpu")
    name, told = library.calls[-1]
    by_case = {"packed": "packed" if generation == "2" else "plain"}
    by_case |= {"offsets": "varlen", "most": "varlen"}
    assert name == by_case.get(case, "plain")
    if name == "plain":
        assert told == {"deterministic": False}
    if name == "varlen":
        assert told["max_seqlen_k"] == (60 if case == "most" else 60 + 1 + 30)


def test_how_xformers_is_called(installed) -> None:
    library = Library()
    installed(xformers=Library(), xformers__ops=library)
    compare("xformers", "packed", torch.bfloat16, "cpu")
    assert library.calls[-1][0] == "xformers"


def test_the_newest_flash_attn_that_works_is_taken(installed) -> None:
    def broken(*args, **kwargs):
        raise AssertionError("Only support arch 9.x\nand so on")

    four = Library()
    four.flash_attn_func = broken
    installed(flash_attn=Library(), flash_attn__cute=four, flash_attn_interface=Library())
    choose = attention_backends.choose
    assert choose("flash-attn", "cpu", torch.bfloat16, 64) == "flash-attn-3"
    with pytest.raises(RuntimeError, match="AssertionError: Only support arch 9.x and so on"):
        choose("flash-attn-4", "cpu", torch.bfloat16, 64)
    with pytest.raises(RuntimeError, match="no bias"):
        choose("flash-attn", "cpu", torch.bfloat16, 64, ("bias",))


def test_auto_takes_the_first_that_serves_the_call(installed, monkeypatch) -> None:
    """The order on CUDA, with every library usable: options and compilation narrow it down."""
    monkeypatch.setattr(attention_backends, "unusable", lambda name, device: "")
    for cache in (attention_backends._chosen,):
        cache.cache_clear()

    def choose(*options: str, dtype=torch.bfloat16, head: int = 72, compiling: bool = False) -> str:
        return attention_backends._chosen.__wrapped__(
            "auto", "cuda", dtype, head, options, compiling
        )

    assert choose() == choose("bias") == choose(compiling=True) == "etude"
    monkeypatch.setattr(
        attention_backends, "unusable", lambda name, device: "absent" if name == "etude" else ""
    )
    assert choose() == choose("qk_norm", "rope") == choose("key_offsets") == "flash-attn-4"
    assert choose(head=192) == "flash-attn-3"
    assert choose("bias") == choose("key_lengths") == choose(dtype=torch.float32) == "sdpa"
    assert choose(compiling=True) == choose(head=36) == "sdpa"
    assert choose(dtype=torch.float64) == "sdpa"


def test_every_option_is_served_by_some_backend_everywhere() -> None:
    assert set(Options._fields) - {"max_keys"} == set(attention_backends.OPTIONS)
    for name in ("etude", "sdpa", "reference"):
        assert BACKENDS[name].native | BACKENDS[name].outside == set(attention_backends.OPTIONS)


def test_masks_of_torch_keep_the_dtype_of_the_queries_on_the_cpu() -> None:
    """16-bit gradients over few keys are taken in float32 there; the result stays 16-bit."""
    data = inputs("bias of each", torch.bfloat16, "cpu")
    with kernels.use_backend("sdpa", op="attention"):
        with torch.no_grad():
            narrow = call("bias of each", data)
        data["q"].requires_grad_()
        wide = call("bias of each", data)
    assert narrow.dtype == wide.dtype == torch.bfloat16
    assert_close({"out": wide.detach()}, {"out": narrow}, RATIO[torch.bfloat16])
