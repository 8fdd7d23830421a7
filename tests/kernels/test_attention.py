"""Attention: the reference against sums over each picture's keys, and what is built upon it."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, rms_norm
from torch.utils.checkpoint import checkpoint

from etude import kernels
from etude.kernels import QKNorm, attention, backends

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def make(B: int, Nq: int, Nk: int, H: int, d: int, dtype: torch.dtype, *names: str) -> dict:
    """Arguments of a call with the named options, all leaves."""
    data = {n: normal(B, N, H, d, seed=N + ord(n)) for n, N in (("q", Nq), ("k", Nk), ("v", Nk))}
    lengths = torch.tensor([(Nk, 0, 1, Nk // 2)[b % 4] for b in range(B)], dtype=torch.int32)
    if "key_lengths" in names:
        data["key_lengths"] = lengths
    if "key_offsets" in names:
        data["key_offsets"] = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()
        data |= {n: normal(int(lengths.sum()), H, d, seed=i) for i, n in enumerate("kv")}
    if "bias" in names:
        data["bias"] = normal(1, H, Nq, Nk, seed=5)
    if "bias_of_each" in names:
        data["bias"] = normal(B, H, Nq, Nk, seed=5)
    if "rmsnorm" in names:
        data |= {"q_weight": 1 + normal(d) / 4, "k_weight": 1 + normal(d, seed=1) / 4}
    if "layernorm" in names:
        data |= {"q_weight": 1 + normal(d) / 4, "k_bias": normal(d, seed=1) / 4}
    made = {k: v.to(dtype) if v.is_floating_point() else v for k, v in data.items()}
    if "rope" in names:
        made["rope"] = kernels.rope_2d(Nq, 1, d)
    kind = next((n for n in names if n.endswith("norm")), None)
    return made | ({"kind": kind} if kind else {})


def call(function, data: dict) -> Tensor:
    data = dict(data)
    if "kind" in data:
        weights = {n: data.pop(n) for n in ("q_weight", "k_weight", "k_bias") if n in data}
        data["qk_norm"] = QKNorm(data.pop("kind"), **weights)
    return function(**data)


def run(function, data: dict) -> dict[str, Tensor]:
    """The output and all gradients, for a loss that weighs every element differently."""
    leaves = {
        k: v.detach().clone().requires_grad_()
        if isinstance(v, Tensor) and v.is_floating_point()
        else v
        for k, v in data.items()
    }
    out = call(function, leaves)
    weights = normal(*out.shape, seed=9).to(out.dtype)
    (out * weights).double().sum().backward()
    grads = {f"d{k}": v.grad for k, v in leaves.items() if getattr(v, "grad", None) is not None}
    return {"out": out.detach()} | grads


def one_by_one(q, k, v, key_lengths=None, key_offsets=None, bias=None, qk_norm=None, rope=None):
    """Every picture and head by itself, over the keys that it has; rotation by complex numbers."""
    pictures = []
    for b in range(q.shape[0]):
        if key_offsets is not None:
            keys, values = (t[key_offsets[b] : key_offsets[b + 1]] for t in (k, v))
        else:
            n = k.shape[1] if key_lengths is None else int(key_lengths[b])
            keys, values = k[b, :n], v[b, :n]
        queries = q[b]
        if qk_norm is not None:
            queries = norm(queries, qk_norm, qk_norm.q_weight, qk_norm.q_bias)
            keys = norm(keys, qk_norm, qk_norm.k_weight, qk_norm.k_bias)
        if rope is not None:
            queries, keys = turned(queries, rope), turned(keys, rope)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) / q.shape[-1] ** 0.5
        if bias is not None:
            scores = scores + bias[b % bias.shape[0], :, :, : scores.shape[2]]
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        pictures.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.stack(pictures)


def norm(x: Tensor, kind: QKNorm, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if kind.kind == "rmsnorm":
        return rms_norm(x, x.shape[-1:], weight, kind.eps)
    return layer_norm(x, x.shape[-1:], weight, bias, kind.eps)


def turned(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    turn = torch.complex(*(t.double() for t in rope))[: x.shape[0], None, :]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], ratio: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name].double() - want[name].double()).square().mean().sqrt()
        size = want[name].double().square().mean().sqrt()
        assert error <= ratio * size + 1e-12, f"{name}: error ratio {float(error / size):.2e}"


SHAPES_AND_OPTIONS = [
    ((4, 5, 5, 2, 8), ()),
    ((2, 3, 7, 1, 72), ()),
    ((4, 3, 6, 2, 8), ("key_lengths",)),
    ((4, 3, 6, 2, 8), ("key_offsets",)),
    ((2, 4, 6, 3, 8), ("bias",)),
    ((4, 4, 6, 3, 8), ("bias_of_each", "key_lengths")),
    ((2, 6, 6, 2, 8), ("rmsnorm", "rope")),
    ((2, 6, 6, 2, 12), ("layernorm",)),
    ((4, 6, 6, 2, 12), ("rmsnorm", "rope", "bias", "key_lengths")),
    ((1, 1, 1, 1, 2), ()),
]


@pytest.mark.parametrize(("shape", "names"), SHAPES_AND_OPTIONS, ids=str)
def test_reference_is_the_sum_over_each_pictures_keys(shape, names) -> None:
    data = make(*shape, torch.float64, *names)
    # Float64 on both sides; the tables of RoPE are float32 and the same for both.
    assert_close(run(kernels.attention_reference, data), run(one_by_one, data), 1e-12)


@pytest.mark.parametrize("names", [("bias", "key_lengths", "layernorm", "rope"), ("key_offsets",)])
def test_gradients_of_the_reference(names) -> None:
    data = make(2, 3, 3, 2, 4, torch.float64, *names)
    leaves = {k: v for k, v in data.items() if isinstance(v, Tensor) and v.is_floating_point()}

    def function(*values: Tensor) -> Tensor:
        return call(kernels.attention_reference, data | dict(zip(leaves, values, strict=True)))

    assert torch.autograd.gradcheck(function, [v.requires_grad_() for v in leaves.values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_reference_of_narrow_types_rounds_once(dtype: torch.dtype) -> None:
    data = make(4, 6, 6, 2, 12, dtype, "rmsnorm", "rope", "bias", "key_lengths")
    wide = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in data.items()
    } | {"rope": data["rope"]}
    # One rounding of the result: half a unit in the last place, an RMS of a quarter of eps or so.
    # float32 also rounds inside.
    bound = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    got, want = run(kernels.attention_reference, data), run(kernels.attention_reference, wide)
    assert got["out"].dtype == dtype
    assert_close(got, want, bound)


@pytest.mark.parametrize("choice", ["sdpa", "reference"])
@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 1, 1, 8)], ids=str)
def test_sizes_of_nothing_and_one(choice: str, shape: tuple[int, int, int, int]) -> None:
    B, N, H, d = shape
    x = normal(B, N, 3, H, d, dtype=torch.float32).requires_grad_()
    with kernels.use_backend(choice, op="attention"):
        out = kernels.attention_packed(x)
    assert out.shape == shape and out.is_contiguous()
    torch.testing.assert_close(out, x[:, :, 2].detach())  # one key or none: the value itself
    out.sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("choice", ["sdpa", "reference"])
def test_no_keys_give_zeros_and_no_gradients(choice: str) -> None:
    for names in (("key_lengths",), ("key_offsets",)):
        data = make(2, 3, 4, 2, 8, torch.float32, *names)  # the second picture has none
        with kernels.use_backend(choice, op="attention"):
            found = run(kernels.dot_product_attention, data)
        assert float(found["out"][1].abs().max()) == 0 < float(found["out"][0].abs().max())
        assert float(found["dq"][1].abs().max()) == 0 < float(found["dq"][0].abs().max())
    empty = torch.zeros(3, dtype=torch.int32)
    q = normal(2, 3, 2, 8, dtype=torch.float32).requires_grad_()
    k = torch.zeros(0, 2, 8, requires_grad=True)
    with kernels.use_backend(choice, op="attention"):
        out = kernels.dot_product_attention(q, k, k, key_offsets=empty)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out)) and torch.equal(q.grad, torch.zeros_like(q))
    assert k.grad.shape == k.shape


def test_packed_and_slices_and_strided_values_are_one() -> None:
    qkv = normal(2, 9, 3, 4, 8, dtype=torch.float32)
    q, k, v = qkv.unbind(2)
    want = kernels.dot_product_attention(*(t.contiguous() for t in (q, k, v)))
    assert torch.equal(kernels.attention_packed(qkv), want)
    assert torch.equal(kernels.dot_product_attention(q, k, v), want)
    spread = torch.stack((v, v), -1)[..., 0]
    assert spread.stride(-1) == 2
    assert torch.equal(kernels.dot_product_attention(q, k, spread), want)


def test_bits_repeat() -> None:
    data = make(4, 16, 16, 4, 36, torch.float32, "bias", "key_lengths", "rmsnorm")
    first, second = (run(kernels.dot_product_attention, data) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


def joint(dtype: torch.dtype, bias: bool = True) -> dict[str, Tensor | None]:
    H, d, D = 2, 8, 12
    data = {"image": normal(2, 9, D), "text": normal(2, 5, D, seed=1)}
    for i, stream in enumerate(("image", "text")):
        data[f"{stream}_weight"] = normal(3 * H * d, D, seed=i) / 4
        data[f"{stream}_bias"] = normal(3 * H * d, seed=i) if bias else None
    return {k: None if v is None else v.to(dtype) for k, v in data.items()}


def joint_plain(image, text, image_weight, image_bias, text_weight, text_bias, num_heads):
    made = linear(text, text_weight, text_bias), linear(image, image_weight, image_bias)
    return torch.cat(made, 1).unflatten(-1, (3, num_heads, -1))


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_joint_projection_is_two_maps_in_one_tensor(direct, bias, dtype, monkeypatch) -> None:
    monkeypatch.setattr(attention, "_direct", lambda x: direct)
    data = joint(dtype, bias) | {"num_heads": 2}
    got = run(kernels.joint_projection, data)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in data.items()}
    # Sums of at most 45 products, accumulated in float32 and rounded once.
    assert_close(got, run(joint_plain, wide), 1e-6 if dtype == torch.float32 else 4e-3)


def test_joint_projection_without_text_and_with_strided_streams() -> None:
    data = joint(torch.float32) | {"num_heads": 2}
    long = normal(2, 14, 12, dtype=torch.float32)
    data |= {"image": long[:, 5:], "text": long[:, :5]}
    torch.testing.assert_close(kernels.joint_projection(**data), joint_plain(**data))
    data["text"] = long[:, :0]
    torch.testing.assert_close(kernels.joint_projection(**data), joint_plain(**data))


def test_joint_projection_does_not_cast_one_stream_to_the_other() -> None:
    data = joint(torch.bfloat16) | {"num_heads": 2}
    data |= {k: v.float() for k, v in data.items() if k.startswith("text") and v is not None}
    with pytest.raises(ValueError, match="one dtype"):
        kernels.joint_projection(**data)


def test_joint_projection_computes_only_the_gradients_asked_for() -> None:
    data = joint(torch.float32)
    data["text_weight"].requires_grad_()
    out = kernels.joint_projection(**data, num_heads=2)
    (grad,) = torch.autograd.grad(out.square().sum(), data["text_weight"])
    dout = 2 * out.detach()[:, :5].flatten(2)
    torch.testing.assert_close(grad, torch.einsum("bne,bnd->ed", dout, data["text"]))


def test_joint_projection_keeps_the_rules_of_torch_library() -> None:
    for bias in (True, False):
        given = [
            None if v is None else v.requires_grad_() for v in joint(torch.float32, bias).values()
        ]
        image, text, image_weight, text_weight = (given[i] for i in (0, 1, 2, 4))
        arguments = (image, text, image_weight, given[3], text_weight, given[5])
        torch.library.opcheck(torch.ops.etude.joint_projection.default, arguments)


def test_joint_projection_can_be_differentiated_twice() -> None:
    shapes = ((2, 2, 3), (2, 1, 3), (6, 3), (6,), (6, 3), (6,))
    values = [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    op = torch.ops.etude.joint_projection
    assert torch.autograd.gradgradcheck(lambda *t: op(*t).square(), values)


def test_joint_attention_hands_back_both_streams_as_views() -> None:
    qkv = normal(2, 14, 3, 2, 8, dtype=torch.float32)
    rope = kernels.rope_2d(3, 3, 8, prefix=5)
    image, text = kernels.joint_attention(qkv, 5, rope=rope)
    whole = kernels.attention_reference(*qkv.unbind(2), rope=rope)
    torch.testing.assert_close(image, whole[:, 5:])
    torch.testing.assert_close(text, whole[:, :5])
    assert image.untyped_storage().data_ptr() == text.untyped_storage().data_ptr()


def test_each_stream_can_have_a_qk_norm_of_its_own() -> None:
    qkv = normal(2, 14, 3, 2, 8)
    own = QKNorm("rmsnorm", q_weight=normal(8), k_weight=normal(8, seed=1))
    texts = QKNorm("rmsnorm", q_weight=normal(8, seed=2), k_weight=normal(8, seed=3))
    image, text = kernels.joint_attention(qkv, 5, qk_norm=own, text_qk_norm=texts)
    q, k, v = qkv.unbind(2)
    q, k = (
        torch.cat((norm(x[:, :5], texts, tw, None), norm(x[:, 5:], own, w, None)), 1)
        for x, tw, w in ((q, texts.q_weight, own.q_weight), (k, texts.k_weight, own.k_weight))
    )
    whole = one_by_one(q, k, v)
    torch.testing.assert_close(torch.cat((text, image), 1), whole)
    same = kernels.joint_attention(qkv, 5, qk_norm=own, text_qk_norm=own)
    for a, b in zip(same, kernels.joint_attention(qkv, 5, qk_norm=own), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("normed", [False, True])
def test_the_second_stream_of_a_joint_sequence_can_end_early(normed: bool) -> None:
    qkv = normal(3, 14, 3, 2, 8)
    norms = [QKNorm(q_weight=normal(8, seed=i), k_weight=normal(8, seed=i + 1)) for i in (1, 3)]
    norms = norms if normed else [None, None]
    lengths = torch.tensor([9, 11, 14], dtype=torch.int32)
    more = {"qk_norm": norms[0], "text_qk_norm": norms[1]}
    second, first = kernels.joint_attention(qkv, 9, key_lengths=lengths, **more)
    for b, length in enumerate(lengths.tolist()):
        alone, image = kernels.joint_attention(qkv[b : b + 1, :length], 9, **more)
        torch.testing.assert_close(first[b : b + 1], image)
        torch.testing.assert_close(second[b : b + 1, : length - 9], alone)
    assert not torch.allclose(kernels.joint_attention(qkv, 9, **more)[1][:2], first[:2])


def test_rotation_of_a_grid_depends_on_relative_position_alone() -> None:
    height, width, d = 4, 5, 16
    cos, sin = kernels.rope_2d(height, width, d, theta=100.0, prefix=2)
    assert cos.dtype == torch.float32 and cos.shape == sin.shape == (22, 8)
    assert torch.equal(cos[:2], torch.ones(2, 8)) and torch.equal(sin[:2], torch.zeros(2, 8))
    q, k = normal(d), normal(d, seed=1)
    grid = [
        turned(x.expand(20, 1, d), (cos[2:], sin[2:]))[:, 0].view(height, width, d) for x in (q, k)
    ]
    scores = torch.einsum("yxd,vwd->yxvw", *grid)
    torch.testing.assert_close(
        scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1], rtol=1e-5, atol=1e-5
    )
    assert float((scores[0, 0, 0] - scores[0, 0, 0, 0]).abs()[1:].min()) > 1e-3
    with pytest.raises(ValueError, match="d=6 must be a multiple of 4"):
        kernels.rope_2d(2, 2, 6)


def numbered(height: int, width: int) -> Tensor:
    """The table's row for every pair of tokens, as BEiT numbers them."""
    y, x = (
        t.flatten()
        for t in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    )
    rows = (y[:, None] - y + height - 1) * (2 * width - 1)
    return rows + x[:, None] - x + width - 1


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5), (1, 6), (1, 1)])
def test_relative_position_bias_is_a_gather_and_its_gradient_a_sum(height: int, width: int) -> None:
    rows, heads = (2 * height - 1) * (2 * width - 1), 3
    table = normal(rows + 3, heads).requires_grad_()  # three more, as MDTv2 has for class tokens
    bias = kernels.relative_position_bias(table, height, width)
    index = numbered(height, width)
    want = table[index].permute(2, 0, 1)[None]
    assert torch.equal(bias, want)
    weights = normal(*bias.shape, seed=3)
    (got,), (wanted,) = (torch.autograd.grad((b * weights).sum(), table) for b in (bias, want))
    torch.testing.assert_close(got, wanted)
    assert float(got[rows:].abs().max()) == 0
    again = torch.autograd.grad(
        (kernels.relative_position_bias(table, height, width) * weights).sum(), table
    )
    assert torch.equal(got, again[0])


def test_autocast_takes_its_dtype_and_keeps_the_rest() -> None:
    data = make(2, 9, 9, 2, 8, torch.float32, "rmsnorm", "rope", "bias")
    for choice in ("sdpa", "reference"):
        with kernels.use_backend(choice, op="attention"), torch.autocast("cpu", torch.bfloat16):
            got = run(kernels.dot_product_attention, data)
        assert got["out"].dtype == torch.bfloat16 and got["dq"].dtype == torch.float32
        # Inputs and result rounded to bfloat16; the norm's output too where torch computes it.
        assert_close(
            got | {"out": got["out"].float()}, run(kernels.attention_reference, data), 1.5e-2
        )
        assert torch.is_autocast_enabled("cpu") is False
    with torch.autocast("cpu", torch.bfloat16):
        made = kernels.joint_projection(**joint(torch.float32), num_heads=2)
    assert made.dtype == torch.bfloat16


def test_recomputation_gives_the_same_bits() -> None:
    data = make(2, 9, 9, 2, 8, torch.float32, "rmsnorm", "bias")

    def recomputed(**arguments) -> Tensor:
        function = kernels.dot_product_attention
        return checkpoint(lambda: function(**arguments), use_reentrant=False)

    got, want = run(recomputed, data), run(kernels.dot_product_attention, data)
    assert all(torch.equal(got[n], want[n]) for n in want)


@pytest.mark.parametrize(
    "names", [(), ("rmsnorm", "rope", "bias", "key_lengths"), ("key_offsets",)]
)
def test_compiles_without_a_break(names: tuple[str, ...]) -> None:
    data = make(4, 9, 9, 2, 8, torch.float32, *names)
    torch._dynamo.reset()
    # The code generator here and in test_fuse.py; the graph in every family's tests.
    backend = "inductor" if not names else "aot_eager"
    function = torch.compile(kernels.dot_product_attention, fullgraph=True, backend=backend)
    assert_close(run(function, data), run(kernels.attention_reference, data), 2e-6)


def test_a_joint_block_compiles_and_follows_the_switch() -> None:
    def block(image, text, image_weight, image_bias, text_weight, text_bias, num_heads):
        qkv = kernels.joint_projection(
            image, text, image_weight, image_bias, text_weight, text_bias, num_heads
        )
        return torch.cat(kernels.joint_attention(qkv, text.shape[1], qk_norm=QKNorm()), 1)

    data = joint(torch.float32) | {"num_heads": 2}
    torch._dynamo.reset()
    function = torch.compile(block, fullgraph=True, backend="aot_eager")
    want = run(block, data)
    assert_close(run(function, data), want, 2e-6)
    with (
        kernels.use_backend("flash-attn", op="attention"),
        pytest.raises(RuntimeError, match="flash"),
    ):
        function(**data)  # the choice is a guard: a graph compiled for another is not used


def test_verification_runs_the_reference_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from etude.kernels.attention_backends import BACKENDS, Backend

    data = make(4, 5, 5, 2, 8, torch.float32, "rmsnorm", "bias", "key_lengths")
    want = run(kernels.dot_product_attention, data)
    right = BACKENDS["sdpa"]
    with kernels.use_backend("sdpa", verify=True, op="attention"):
        got = run(kernels.dot_product_attention, data)
        assert all(torch.equal(got[n], want[n]) for n in want)
        packed = normal(2, 5, 3, 2, 8, dtype=torch.float32).requires_grad_()
        kernels.attention_packed(packed).sum().backward()

        class Wrong(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, dx):
                return dx * 1.01

        def replace(call) -> None:
            changed = {f: getattr(right, f) for f in Backend.__dataclass_fields__} | {"call": call}
            monkeypatch.setitem(BACKENDS, "sdpa", Backend(**changed))

        replace(lambda q, k, v, s, o: right.call(q, k, v, s * 1.01, o))
        with pytest.raises(AssertionError, match="attention by sdpa: output out differs first"):
            run(kernels.dot_product_attention, data)
        replace(lambda q, k, v, s, o: right.call(q, k, Wrong.apply(v), s, o))
        with pytest.raises(AssertionError, match="output gradient of tensor 2 differs first"):
            run(kernels.dot_product_attention, data)
    assert not backends.verifying()


GOOD = {"q": torch.zeros(2, 4, 3, 8), "k": torch.zeros(2, 5, 3, 8), "v": torch.zeros(2, 5, 3, 8)}
INT = torch.int32
ELSEWHERE = [torch.zeros(n, dtype=INT, device="meta") for n in (2, 3)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(2, 4, 8)}, "q must be (B, Nq, H, d), got (2, 4, 8)"),
        ({"k": torch.zeros(2, 5, 2, 8)}, "k must be (B, Nk, H, d) = (2, 5, 3, 8) beside q"),
        ({"v": torch.zeros(2, 4, 3, 8)}, "v must be (B, Nk, H, d)"),
        ({"v": torch.zeros(2, 5, 3, 8).double()}, "v is torch.float64 on cpu; q is torch.float32"),
        ({n: t.long() for n, t in GOOD.items()}, "must be floating"),
        ({"key_lengths": torch.zeros(2)}, "key_lengths must be (2,) of int32"),
        ({"key_lengths": torch.tensor([5, 6], dtype=INT)}, "key_lengths holds 6; there are 5 keys"),
        ({"key_lengths": torch.tensor([-1, 5], dtype=INT)}, "key_lengths holds -1; there are 5"),
        ({"key_lengths": ELSEWHERE[0]}, "key_lengths is on meta; q is on cpu"),
        (
            {"key_offsets": ELSEWHERE[1], "k": torch.zeros(5, 3, 8), "v": torch.zeros(5, 3, 8)},
            "key_offsets is on meta; q is on cpu",
        ),
        ({"bias": torch.zeros(1, 3, 4, 5, device="meta")}, "bias is on meta; q is on cpu"),
        ({"key_offsets": torch.zeros(3, dtype=INT)}, "k must be (T, H, d)"),
        ({"bias": torch.zeros(2, 3, 4, 4)}, "bias must be 1 or B of (2, 3, 4, 5)"),
        ({"bias": torch.zeros(1, 3, 4, 5, dtype=torch.bool)}, "got torch.bool"),
        ({"qk_norm": QKNorm("groupnorm")}, "'groupnorm' is unknown"),
        ({"qk_norm": QKNorm(q_weight=torch.ones(7))}, "q_weight must be (8,), got (7,)"),
        ({"qk_norm": QKNorm(q_bias=torch.ones(8))}, "q_bias needs kind layernorm"),
        ({"rope": (torch.ones(4, 4), torch.ones(4, 4))}, "rope needs Nq = Nk"),
    ],
)
def test_bad_input_gets_one_sentence(change: dict, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        kernels.dot_product_attention(**(GOOD | change))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("offsets", "most", "words"),
    [
        ([0, 3, 5], 2, "max_keys=2, but a picture has 3 keys"),
        ([0, 3, 6], None, "must rise from 0 to 5"),
        ([0, 6, 5], None, "must rise from 0 to 5"),
        ([1, 3, 5], None, "must rise from 0 to 5"),
    ],
)
def test_keys_that_would_be_lost_are_an_error(offsets, most, words) -> None:
    q, k = torch.zeros(2, 4, 3, 8), torch.zeros(5, 3, 8)
    offsets = torch.tensor(offsets, dtype=INT)
    with pytest.raises(ValueError, match=words):
        kernels.dot_product_attention(q, k, k, key_offsets=offsets, max_keys=most)


def test_packed_and_joint_input_gets_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"qkv must be \(B, N, 3, H, d\), got \(2, 4, 2, 3, 8\)"):
        kernels.attention_packed(torch.zeros(2, 4, 2, 3, 8))
    good = joint(torch.float32)
    for change, words in (
        ({"text": torch.zeros(3, 5, 12)}, "image and text must be"),
        ({"text_bias": torch.zeros(5)}, r"text_bias must be \(48,\), got \(5,\)"),
        ({"text_weight": torch.zeros(48, 11)}, r"text_weight must be \(48, 12\)"),
    ):
        with pytest.raises(ValueError, match=words):
            kernels.joint_projection(**(good | change), num_heads=2)
    with pytest.raises(ValueError, match="48 outputs are not 3 x 5 heads"):
        kernels.joint_projection(**good, num_heads=5)
    with pytest.raises(ValueError, match="table must be"):
        attention.relative_position_bias(torch.zeros(8, 2), 2, 2)
