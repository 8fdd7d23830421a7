"""Attention as four models use it, and the joint projection, beside torch and other libraries."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from benchmarks.case import Case, Inputs, Run, Shape, with_gradients
from etude import kernels
from etude.kernels import QKNorm, attention_backends

SOURCES = (
    "kernels/attention.py",
    "kernels/attention_backends.py",
    "kernels/attention_triton.py",
    "kernels/attention_short.py",
    "kernels/attention_long.py",
    "kernels/attention_tiles.py",
)
BACKWARD = "forward+backward"
TEXT = 120  # tokens that PixArt-alpha's text encoder gives at most

# (B, N, H, d): tokens, heads and their dimension.
CPU = {"demo": (256, 16, 4, 36), "DiT-XL": (8, 256, 16, 72)}
GPU = {"DiT-XL": (64, 256, 16, 72), "DiT-XL B=256": (256, 256, 16, 72)}
GPU |= {"DiT-XL 512": (32, 1024, 16, 72), "DiT-B": (64, 256, 12, 64)}
MMDIT = {"CPU": {"mmDiT": (4, 330, 18, 64)}, "GPU": {"mmDiT": (32, 410, 18, 64)}}


def normal(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).to(device, dtype)


def make_packed(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    B, N, H, d = shape
    qkv = normal((B, N, 3, H, d), dtype, device).requires_grad_()
    return {"qkv": qkv, "dout": normal((B, N, H, d), dtype, device, 1)}


def make_normed(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """With the weights of QK-norm and the tables of a rotary embedding."""
    d = shape[3]
    made = make_packed(shape, dtype, device)
    for i, name in enumerate(("q_weight", "k_weight")):
        made[name] = (1 + normal((d,), dtype, device, i) / 8).requires_grad_()
    return made | {"rope": kernels.rope_2d(1, shape[1], d, device=device)}


def make_biased(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """With a bias per head and pair of tokens, as MDTv2 has."""
    _, N, H, _ = shape
    bias = normal((1, H, N, N), dtype, device, 2).requires_grad_()
    return make_packed(shape, dtype, device) | {"bias": bias}


def make_text(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """Queries of a picture, keys and values of texts of 1 to 120 tokens, packed."""
    B, N, H, d = shape
    g = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, TEXT + 1, (B,), generator=g)
    offsets = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int().to(device)
    total = int(lengths.sum())
    made = {"q": normal((B, N, H, d), dtype, device).requires_grad_(), "key_offsets": offsets}
    made |= {n: normal((total, H, d), dtype, device, 1).requires_grad_() for n in "kv"}
    return made | {"dout": normal((B, N, H, d), dtype, device, 2)}


def plain(inputs: Inputs) -> Tensor:
    return kernels.attention_packed(inputs["qkv"])


def normed(inputs: Inputs) -> Tensor:
    norm = QKNorm("rmsnorm", inputs["q_weight"], inputs["k_weight"])
    return kernels.attention_packed(inputs["qkv"], qk_norm=norm, rope=inputs["rope"])


def biased(inputs: Inputs) -> Tensor:
    return kernels.attention_packed(inputs["qkv"], bias=inputs["bias"])


def text(inputs: Inputs) -> Tensor:
    q, k, v, offsets = (inputs[n] for n in ("q", "k", "v", "key_offsets"))
    return kernels.dot_product_attention(q, k, v, key_offsets=offsets, max_keys=TEXT)


def by_torch(inputs: Inputs) -> Tensor:
    """As the published DiT calls torch."""
    q, k, v = inputs["qkv"].permute(2, 0, 3, 1, 4).unbind(0)
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def named(backend: str, run: Run) -> Callable[[], Run]:
    """The same call by one backend of the switch; ImportError with its reason where it is none."""

    def factory() -> Run:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        reason = attention_backends.unusable(backend, device)
        if reason:
            raise ImportError(reason)

        def by_name(inputs: Inputs) -> object:
            with kernels.use_backend(backend, op="attention"):
                return run(inputs)

        return by_name

    return factory


def case(
    variant: str,
    make: Callable[[Shape, torch.dtype, str], Inputs],
    run: Run,
    leaves: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
    shapes: tuple[dict[str, Shape], dict[str, Shape]] = (CPU, GPU),
) -> Case:
    """leaves: inputs whose gradients are taken, if any; options: what rivals must take."""
    rivals = {"torch": lambda: by_torch} if run is plain else {}
    if leaves:
        run = with_gradients(run, leaves, ("dout",))
        rivals = {n: lambda: with_gradients(by_torch, leaves, ("dout",)) for n in rivals}
    for name, backend in attention_backends.BACKENDS.items():
        if name not in ("etude", "reference"):  # the runner has these as triton and eager
            if set(options) <= backend.native | backend.outside:
                rivals[name] = named(name, run)

    def passes(inputs: Inputs) -> list[Tensor]:
        """Every tensor as often as it must pass: in, and back in with its gradient out."""
        floats = [t for t in inputs.values() if isinstance(t, Tensor) and t.is_floating_point()]
        used = [t for t in floats if t is not inputs["dout"]]
        if not leaves:
            return [*used, inputs["dout"]]  # the output is as large as its gradient
        return [*used * 2, *(inputs[n] for n in leaves), *[inputs["dout"]] * 3]

    def moved(inputs: Inputs) -> int:
        return sum(t.numel() * t.element_size() for t in passes(inputs))

    def flops(inputs: Inputs) -> int:
        B, N, H, d = inputs["dout"].shape
        keys = inputs["k"].shape[0] if "k" in inputs else B * N
        forward = 4 * N * H * d * keys
        return forward * 7 // 2 if leaves else forward

    return Case(
        "attention", variant, make, run, *shapes, moved, flops, sources=SOURCES, rivals=rivals
    )


# (B, Nt, Ni, D): text and image tokens of a stream of width D.
JOINT_CPU, JOINT_GPU = {"mmDiT": (2, 154, 256, 1152)}, {"mmDiT": (32, 154, 256, 1152)}
STREAMS = ("image", "text", "image_weight", "image_bias", "text_weight", "text_bias")


def make_joint(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    B, Nt, Ni, D = shape
    sizes = ((B, Ni, D), (B, Nt, D), (3 * D, D), (3 * D,), (3 * D, D), (3 * D,))
    made = {}
    for i, (name, size) in enumerate(zip(STREAMS, sizes, strict=True)):
        scale = D**-0.5 if "weight" in name else 1.0
        made[name] = (normal(size, dtype, device, i) * scale).requires_grad_()
    made["heads"] = D // 64
    return made | {"dout": normal((B, Nt + Ni, 3, D // 64, 64), dtype, device, 9)}


def joint(inputs: Inputs) -> Tensor:
    return kernels.joint_projection(*(inputs[n] for n in STREAMS), inputs["heads"])


def joint_by_torch(inputs: Inputs) -> Tensor:
    """Two linear maps and a concatenation."""
    maps = (("text", "text_weight", "text_bias"), ("image", "image_weight", "image_bias"))
    made = [linear(*(inputs[n] for n in names)) for names in maps]
    return torch.cat(made, 1).unflatten(-1, (3, inputs["heads"], -1))


def joint_case(variant: str) -> Case:
    backward = variant == BACKWARD
    run, rival = joint, joint_by_torch
    if backward:
        run, rival = (with_gradients(r, STREAMS, ("dout",)) for r in (run, rival))

    def moved(inputs: Inputs) -> int:
        taken = sum(inputs[n].numel() for n in STREAMS)
        made = inputs["dout"].numel()
        return (3 * taken + 2 * made if backward else taken + made) * inputs["dout"].element_size()

    def flops(inputs: Inputs) -> int:
        rows = inputs["image"][..., 0].numel() + inputs["text"][..., 0].numel()
        return 2 * rows * inputs["image_weight"].numel() * (3 if backward else 1)

    return Case(
        "joint_projection", variant, make_joint, run, JOINT_CPU, JOINT_GPU, moved, flops,
        sources=("kernels/attention.py",), rivals={"torch": lambda: rival},
    )  # fmt: skip


XL = ({"DiT-XL": CPU["DiT-XL"]}, {"DiT-XL": GPU["DiT-XL"]})
CASES = (
    case("forward", make_packed, plain),
    case(BACKWARD, make_packed, plain, ("qkv",)),
    case(
        f"{BACKWARD}, RMSNorm, RoPE",
        make_normed,
        normed,
        ("qkv", "q_weight", "k_weight"),
        ("qk_norm", "rope"),
        (MMDIT["CPU"], MMDIT["GPU"]),
    ),
    case(f"{BACKWARD}, bias", make_biased, biased, ("qkv", "bias"), ("bias",), XL),
    case(f"{BACKWARD}, packed text", make_text, text, ("q", "k", "v"), ("key_offsets",), XL),
    joint_case("forward"),
    joint_case(BACKWARD),
)
