"""`fuse`: models of other libraries compute the same with Etude's operators in them."""

import copy
import io
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import etude
from etude.external import diffusers_fused
from etude.models.fuse import LinearGELU

diffusers = pytest.importorskip("diffusers")


def drawn(model: nn.Module) -> nn.Module:
    """Every weight at random: at adaLN-Zero's own start a block only returns its input.

    Weights are scaled by their fan-in, so that activations stay of order one.
    """
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            scale = 0.8 * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.3)
            p.copy_(torch.randn(p.shape, generator=g) * scale)
    return model.eval()  # diffusers' DiT drops labels at random while training


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dit() -> tuple[nn.Module, dict]:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_elementwise_affine=False,
    )  # fmt: skip
    inputs = {
        "hidden_states": normal(3, 4, 8, 8),
        "timestep": torch.tensor([3, 500, 999]),
        "class_labels": torch.tensor([1, 9, 4]),
    }
    return model, inputs


def pixart() -> tuple[nn.Module, dict]:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, patch_size=2, cross_attention_dim=48, caption_channels=20,
        norm_elementwise_affine=False, use_additional_conditions=False,
    )  # fmt: skip
    inputs = {
        "hidden_states": normal(3, 4, 8, 8),
        "encoder_hidden_states": normal(3, 7, 20, seed=1),
        "timestep": torch.tensor([3, 500, 999]),
    }
    return model, inputs


def masked_pixart() -> tuple[nn.Module, dict]:
    model, inputs = pixart()
    lengths = torch.tensor([[7], [2], [5]])
    return model, inputs | {"encoder_attention_mask": (torch.arange(7) < lengths).float()}


def sd3() -> tuple[nn.Module, dict]:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=24,
        num_attention_heads=2, joint_attention_dim=20, caption_projection_dim=48,
        pooled_projection_dim=16, out_channels=4, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    inputs = {
        "hidden_states": normal(3, 4, 8, 8),
        "encoder_hidden_states": normal(3, 5, 20, seed=1),
        "pooled_projections": normal(3, 16, seed=2),
        "timestep": torch.tensor([3, 500, 999]),
    }
    return model, inputs


def unet() -> tuple[nn.Module, dict]:
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32),
        layers_per_block=1, cross_attention_dim=20, attention_head_dim=4, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    inputs = {
        "sample": normal(2, 4, 8, 8),
        "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": normal(2, 5, 20, seed=1),
    }
    return model, inputs


class TimmAttention(nn.Module):
    """The parts of timm's attention, as the published DiT uses it."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        B, N, D = x.shape
        packed = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        weights = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, D))


class TimmMlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.act, self.drop1 = nn.GELU(approximate="tanh"), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop1(self.act(self.fc1(x))))


class DiTBlock(nn.Module):
    """The published block's parts and equations (Peebles and Xie 2023, figure 3)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = TimmAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = TimmMlp(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        a1, b1, g1, a2, b2, g2 = (v.unsqueeze(1) for v in self.adaLN_modulation(c).chunk(6, dim=1))
        x = x + g1 * self.attn(self.norm1(x) * (1 + b1) + a1)
        return x + g2 * self.mlp(self.norm2(x) * (1 + b2) + a2)


class Published(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DiTBlock(48, 2) for _ in range(2))

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor]:
        for block in self.blocks:
            x = block(x, c)
        return (x,)


def published() -> tuple[nn.Module, dict]:
    return Published(), {"x": normal(3, 16, 48), "c": normal(3, 48, seed=1)}


MODELS = (dit, pixart, masked_pixart, sd3, unet, published)


def run(model: nn.Module, inputs: dict) -> dict[str, Tensor]:
    """Output and every parameter's gradient."""
    more = {} if "x" in inputs else {"return_dict": False}
    out = model(**inputs, **more)[0]
    model.zero_grad()
    (out * normal(*out.shape, seed=7).to(out)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach()} | grads


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], bound: float) -> None:
    assert set(got) == set(want)
    for name, value in want.items():
        error = (got[name] - value).square().mean().sqrt()
        # The floor is for a key's bias: softmax does not see it, its gradient is rounding noise.
        assert float(error) <= bound * float(value.square().mean().sqrt()) + 1e-6, (name, error)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_fused_model_computes_the_same_forward_and_backward(make) -> None:
    model, inputs = make()
    drawn(model)
    before, names = run(model, inputs), list(model.state_dict())
    assert float(before["output"].std()) > 0.1  # an output of zeros would prove nothing
    report = etude.fuse(model)
    assert report.swapped and list(model.state_dict()) == names
    # float32 sums in another order, through a few layers.
    assert_same(run(model, inputs), before, 2e-5)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_copies_and_pickles_of_a_fused_model_are_fused(make) -> None:
    model, inputs = make()
    etude.fuse(drawn(model))
    want = run(model, inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        kinds = [type(a) is type(b) for a, b in zip(model.modules(), other.modules(), strict=True)]
        assert all(kinds)
        assert_same(run(other, inputs), want, 0.0)


def test_the_report_says_what_was_swapped() -> None:
    model, _ = dit()
    text = str(etude.fuse(model))
    assert "2 x BasicTransformerBlock: adaln_modulate, gate_residual, gate_residual_adaln" in text
    assert "2 x GELU: bias_gelu" in text and "2 x Attention: attention" in text
    assert not etude.fuse(model).swapped  # a second time there is nothing left to do
    model, _ = published()
    operators = "adaln_modulate, gate_residual_adaln, gate_residual, bias_gelu, attention"
    assert str(etude.fuse(model)) == f"2 x DiTBlock: {operators}"


def test_what_is_not_covered_is_left_and_named() -> None:
    model, _ = unet()
    left = dict(etude.fuse(model).left)
    assert ("BasicTransformerBlock", "norm_type=layer_norm has no modulation") in left
    with pytest.raises(ValueError, match="fuse: Linear has no block that is known"):
        etude.fuse(nn.Linear(2, 2))


def test_class_names_stay_for_those_who_wrap_by_them() -> None:
    model, _ = sd3()
    names = [type(m).__name__ for m in model.modules() if "Block" in type(m).__name__]
    etude.fuse(model)
    assert names == [type(m).__name__ for m in model.modules() if "Block" in type(m).__name__]
    assert isinstance(model.transformer_blocks[0], diffusers_fused.JointTransformerBlock)
    assert any(isinstance(m, LinearGELU) for m in model.modules())


def test_activation_checkpointing_goes_through_the_fused_blocks() -> None:
    model, inputs = dit()
    drawn(model)
    etude.fuse(model)
    want = run(model, inputs)
    model.enable_gradient_checkpointing()
    assert_same(run(model, inputs), want, 1e-6)


def test_a_fused_model_compiles() -> None:
    model, inputs = published()
    model.blocks = model.blocks[:1]  # every further one would be compiled anew
    etude.fuse(drawn(model))
    want = run(model, inputs)
    torch._dynamo.reset()
    model.compile(fullgraph=True)
    assert_same(run(model, inputs), want, 2e-5)


LOOPS = ["ddp", "fsdp2", "accelerate", "zero3"]


@pytest.fixture(scope="module")
def trained(run_ranks) -> tuple[dict[str, dict], str]:
    """Rows of fused.py by loop, and what was said: two processes start once for all loops."""
    ended = run_ranks(2, Path(__file__).parent / "workers" / "fused.py", *LOOPS)
    said = ended[0].stdout.splitlines()
    rows = [json.loads(line) for line in said if line.startswith('{"loop"')]
    return {row["loop"]: row for row in rows}, "".join(one.stderr[-3000:] for one in ended)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_fused_model_trains_in_other_peoples_loops(loop: str, trained) -> None:
    """Losses before, after one and after two updates."""
    rows, said = trained
    assert loop in rows, said
    losses = rows[loop]
    assert losses["plain"][2] < losses["plain"][0]
    assert losses["fused"] == pytest.approx(losses["plain"], rel=1e-5)


def test_a_fused_model_trains_under_lightning(tmp_path) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    model, inputs = sd3()
    plain, target = drawn(model), normal(3, 4, 8, 8, seed=9)
    fused = copy.deepcopy(plain)
    etude.fuse(fused)

    class Task(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            loss = (self.model(**inputs, return_dict=False)[0] - target).square().mean()
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.model.parameters(), lr=0.05)

    found = []
    for one in (plain, fused):
        task = Task(one)
        lightning.Trainer(
            max_steps=3, accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ).fit(task, torch.utils.data.DataLoader(torch.zeros(3, 1)))  # fmt: skip
        found.append(task.losses)
    assert len(found[0]) == 3 and found[0][2] < found[0][0]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
