"""All the modulation vectors of a diffusion transformer, in one product or from a table.

Called by samplers and models that have a list of adaLN maps. Every block of a DiT (Peebles and Xie,
2023) computes its shift, scale and gate vectors by a linear map of the same s = SiLU(c), c: (B, D):

    modulation_gemm:    out[:, l] = s @ W_l^T + b_l    for all layers l: one (B, sum_l K_l) tensor
    modulation_table:   the same for every (timestep, label) of a sampler, on which alone s depends
    adaln_single:       vector + table: one vector for all layers and a table per layer (PixArt)

B rows are few, so such a product is bound by reading W (a third of the parameters of DiT-XL/2) and
by its launch. `modulation_gemm` makes one of L small products, and its output has the vectors of
all layers side by side: gate_2 of one block and shift_1, scale_1 of the next are then neighbours,
as `gate_residual_adaln(modulation=...)` takes them.

The layers keep their weights, under their own names. The product of all layers is one where the
weights lie one after the other in memory, which `flatten_modulation` arranges once, without a copy
per step; where they do not, one product per layer writes into its columns of the output. The
gradient of all weights is one product either way, and each layer's gradient a view of it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .catalogue import Operator

_library = torch.library.Library("etude", "FRAGMENT")
ops = torch.ops.etude


def modulation_gemm_reference(s: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
    """`modulation_gemm` in plain torch: every layer by itself."""
    return torch.cat([layer(s) for layer in layers], dim=1)


def flat_view(tensors: Sequence[Tensor]) -> Tensor | None:
    """The tensors as one, along their first dimension, if they follow each other in memory."""
    first, rows = tensors[0], 0
    storage, offset = first.untyped_storage().data_ptr(), first.storage_offset()
    for t in tensors:
        inside = t.untyped_storage().data_ptr() == storage and t.storage_offset() == offset
        if not (inside and t.is_contiguous() and t.shape[1:] == first.shape[1:]):
            return None
        rows, offset = rows + t.shape[0], offset + t.numel()
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _forward(
    s: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    weight, bias = flat_view(weights), flat_view(biases)
    s = s.to(dtype)
    if weight is not None and bias is not None:
        return torch.addmm(bias.to(dtype), s, weight.to(dtype).t())
    out = s.new_empty((s.shape[0], sum(w.shape[0] for w in weights)))
    parts = out.split([w.shape[0] for w in weights], dim=1)
    for w, b, part in zip(weights, biases, parts, strict=True):
        part.copy_(torch.addmm(b.to(dtype), s, w.to(dtype).t()))
    return out


def _backward(dout: Tensor, s: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(ds, dweight (sum K, D), dbias (sum K,)) in the dtypes of s and of the weights."""
    dtype, to = dout.dtype, weights[0].dtype
    weight = flat_view(weights)
    if weight is not None:
        ds = dout @ weight.to(dtype)
    else:
        ds = dout.new_zeros(s.shape)
        for w, part in zip(weights, dout.split([w.shape[0] for w in weights], 1), strict=True):
            ds.addmm_(part, w.to(dtype))
    dweight = (dout.t() @ s.to(dtype)).to(to)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return ds.to(s.dtype), dweight, dout.sum(0, dtype=wide).to(to)


_library.define(
    "modulation_gemm(Tensor s, Tensor[] weights, Tensor[] biases, ScalarType dtype) -> Tensor"
)
_library.define(
    "modulation_gemm_backward(Tensor dout, Tensor s, Tensor[] weights) -> (Tensor, Tensor, Tensor)"
)
_library.impl("modulation_gemm", _forward, "CompositeExplicitAutograd")
_library.impl("modulation_gemm_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("etude::modulation_gemm", lib=_library)
def _(s, weights, biases, dtype):
    return s.new_empty((s.shape[0], sum(w.shape[0] for w in weights)), dtype=dtype)


@torch.library.register_fake("etude::modulation_gemm_backward", lib=_library)
def _(dout, s, weights):
    rows, like = sum(w.shape[0] for w in weights), weights[0]
    return s.new_empty(s.shape), like.new_empty((rows, s.shape[1])), like.new_empty((rows,))


def _context(ctx, inputs, output) -> None:
    s, weights, _, _ = inputs
    ctx.save_for_backward(s, *weights)


def _gradient(ctx, dout: Tensor) -> tuple:
    s, *weights = ctx.saved_tensors
    ds, dweight, dbias = ops.modulation_gemm_backward(dout, s, weights)
    rows = [w.shape[0] for w in weights]
    return ds, list(dweight.split(rows)), list(dbias.split(rows)), None


def _no_second(ctx, *grads) -> None:
    raise RuntimeError("modulation_gemm has no second derivative: use modulation_gemm_reference")


torch.library.register_autograd("etude::modulation_gemm", _gradient, setup_context=_context)
torch.library.register_autograd("etude::modulation_gemm_backward", _no_second)


def _plain(layer: nn.Module) -> bool:
    """Whether a layer is nothing but its weight and bias.

    Not so with hooks (ZeRO stage 3 gathers weights in one), with another class or a forward of its
    own (adapters, offloading) or with a weight that is a subclass of Tensor (sharded) or not there
    at the moment.
    """
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    if layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if layer._backward_hooks or layer._backward_pre_hooks:
        return False
    if type(layer.weight) is not nn.Parameter or type(layer.bias) is not nn.Parameter:
        return False
    return layer.weight.shape == (layer.out_features, layer.in_features)


def modulation_gemm(s: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
    """The outputs of all layers for one input, side by side: (B, sum of out_features).

    s: (B, D), after SiLU; layers: nn.Linear with bias from D to any widths, of one dtype, which
    must be that of s except under autocast. Take a layer's vectors by `split`, whose gradient is
    one concatenation. Layers that are more than a weight and a bias (hooks, adapters, ZeRO stage
    3) are called one by one: same values. It is meant for devices where L small products leave most
    of the processors idle, the more so the smaller B and D are, and for weights that are flat
    (`flatten_modulation`); before that, only the weights' gradient is one product. One CPU core is
    busy with either: there it gains nothing to rely on.

    Errors: ValueError if shapes or dtypes do not fit together.
    """
    layers = list(layers)
    if s.dim() != 2 or not layers:
        raise ValueError(
            f"modulation_gemm: s must be (B, D) and layers at least one, got {tuple(s.shape)} "
            f"and {len(layers)}"
        )
    if not all(_plain(layer) for layer in layers):
        return modulation_gemm_reference(s, layers)
    kind, first = s.device.type, layers[0].weight
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else s.dtype
    for i, layer in enumerate(layers):
        w = layer.weight
        if w.shape[1] != s.shape[1] or w.dtype != first.dtype or w.device != s.device:
            raise ValueError(
                f"modulation_gemm: layers[{i}] is {tuple(w.shape)} {w.dtype} on {w.device}, "
                f"layers[0] {first.dtype}, s {tuple(s.shape)} on {s.device}"
            )
    if not autocast and first.dtype != s.dtype:
        raise ValueError(f"modulation_gemm: s is {s.dtype}, the weights are {first.dtype}")
    weights, biases = [x.weight for x in layers], [x.bias for x in layers]
    return ops.modulation_gemm(s, weights, biases, dtype)


@torch.no_grad()
def flatten_modulation(layers: Sequence[nn.Linear]) -> bool:
    """Move the layers' weights, and their biases, one after the other into one memory.

    Parameters stay the same objects with the same names, shapes and values: optimizers, state
    dicts and `load_state_dict` see no difference. It holds until something gives a parameter other
    memory (`.to()` of another device or dtype, `copy.deepcopy`, the flat buffers of ZeRO and FSDP);
    `modulation_gemm` looks at the addresses in every call, so that forgetting to call this again
    costs time and never a wrong value. Takes one copy of the weights while it runs.

    Returns whether the layers were plain enough; if not, nothing is touched.
    """
    layers = list(layers)
    if not layers or not all(_plain(layer) for layer in layers):
        return False
    first = layers[0].weight
    if any((x.weight.dtype, x.weight.device) != (first.dtype, first.device) for x in layers):
        return False
    rows = [layer.out_features for layer in layers]
    for name in ("weight", "bias"):
        params = [getattr(layer, name) for layer in layers]
        for p, part in zip(params, torch.cat([p.data for p in params]).split(rows), strict=True):
            p.data = part
    return True


@torch.no_grad()
def modulation_table(
    condition: Callable[[Tensor, Tensor], Tensor],
    layers: Sequence[nn.Linear],
    timesteps: Tensor,
    labels: Tensor,
) -> Tensor:
    """The modulation vectors of every timestep and label: (T, Y, sum of out_features).

    condition(t, labels) -> s: (n, D), the network's embedding after SiLU, for t: (n,) and labels:
    (n,); timesteps: (T,), those that a sampler visits; labels: (Y,) int64, those that it draws, the
    empty one included. A sampler step then takes table[i, y]: B rows instead of all W. It pays
    where T * Y is not far above the number of samples drawn over B: a table of 50 steps and one
    label of 1000 beside the empty one is 100 rows, all 1000 labels are 50,000.

    Memory: T * Y * (sum of out_features) numbers of the layers' dtype, twice that while the rows
    are put together. For DiT-XL/2 (28 blocks of 6 * 1152 and a final layer of 2 * 1152) a row is
    195,840 numbers, 383 KiB in bfloat16: 100 rows are 37 MiB, 50,000 are 18 GiB.
    """
    rows = []
    for t in timesteps:  # one step at a time: the table is the only large tensor
        s = condition(t.expand(len(labels)), labels)
        rows.append(modulation_gemm(s, layers))
    return torch.stack(rows)


def adaln_single(vector: Tensor, table: Tensor) -> Tensor:
    """One layer's modulation in adaLN-single: vector + table, as (B, K * D).

    (Chen et al., "PixArt-alpha", 2023.) vector: (B, K * D), of one map that all layers share;
    table: (K, D), the layer's own parameter; the sum has the dtype of vector, and the table's
    gradient is a sum over samples in a fixed order. A layer adds B * K * D numbers, while its two
    sites move some 40 * B * N * D bytes in bfloat16: at N = 256 and K = 6 the addition and its
    gradient are 0.4% of them, so it is not an option of the kernels.
    """
    if vector.dim() != 2 or table.dim() != 2 or vector.shape[1] != table.numel():
        raise ValueError(
            f"adaln_single: vector must be (B, K * D) and table (K, D), got {tuple(vector.shape)} "
            f"and {tuple(table.shape)}"
        )
    wide = torch.promote_types(vector.dtype, table.dtype)
    return (vector.to(wide) + table.to(wide).flatten()).to(vector.dtype)


OPERATORS = (
    Operator(
        "modulation_gemm",
        "all layers' modulation vectors in one product",
        (),
        dtypes="those of torch's linear layers",
    ),
)
