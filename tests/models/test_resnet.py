"""ResNet and its batch normalisation: published sizes, names, first weights, statistics."""

import re

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from etude.models.batchnorm import BatchNorm
from etude.models.resnet import ResNet, ResNetConfig

SMALL = dict(depth=18, width=8, num_classes=4, stem="small")


@pytest.mark.parametrize(
    ("depth", "count", "tensors"),
    [(18, 11_689_512, 122), (34, 21_797_672, 218), (50, 25_557_032, 320)],
)
def test_parameter_counts_and_names_are_torchvisions(depth: int, count: int, tensors: int) -> None:
    with torch.device("meta"):
        model = ResNet(ResNetConfig(depth=depth))
    assert sum(p.numel() for p in model.parameters()) == count
    names = list(model.state_dict())
    assert len(names) == tensors
    part = r"(conv1|bn1|layer[1-4]\.\d+\.(conv[123]|bn[123]|downsample\.[01])|fc)"
    kind = r"\.(weight|bias|running_mean|running_var|num_batches_tracked)"
    assert all(re.fullmatch(part + kind, name) for name in names)


def test_the_stem_sets_how_far_a_picture_is_reduced() -> None:
    kept = []
    for stem, last in (("small", 4), ("imagenet", 1)):
        model = ResNet(ResNetConfig(**SMALL | {"stem": stem})).eval()
        model.layer4.register_forward_hook(lambda m, i, output: kept.append(output))
        logits = model(x := torch.randn(2, 3, 32, 32))
        assert kept[-1].shape == (2, 64, last, last)
        features = kept[-1].mean((2, 3))
        torch.testing.assert_close(model.features(x), features)
        torch.testing.assert_close(logits, features @ model.fc.weight.T + model.fc.bias)


def test_first_weights_are_he_et_als_and_follow_the_seed() -> None:
    model = ResNet(ResNetConfig(depth=18, num_classes=4))
    for name, fan_out in (
        ("conv1", 64 * 49),
        ("layer2.0.conv1", 128 * 9),
        ("layer4.1.conv2", 4608),
    ):
        weight = model.get_submodule(name).weight
        assert float(weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.03), name
    one, two, other = (ResNet(ResNetConfig(**SMALL), seed=seed).fc.weight for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_group_normalisation_keeps_pictures_apart_and_batch_normalisation_does_not() -> None:
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    other = torch.cat((x[:1], 3 * x[1:]))
    for norm, apart in (("group", True), ("batch", False)):
        groups = 4 if norm == "group" else None
        model = ResNet(ResNetConfig(**SMALL, norm=norm, groups=groups)).double().train()
        same = torch.allclose(model(x)[0], model(other)[0], rtol=1e-9, atol=1e-9)
        assert same is apart, norm


def test_batchnorm_is_torchs_and_its_statistics_survive_bf16() -> None:
    ours, torchs = BatchNorm(5), nn.BatchNorm2d(5)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    x = 3 + 2 * torch.randn(8, 5, 6, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ours(x), torchs(x))
    assert torch.equal(ours.running_var, torchs.running_var)
    wide, narrow = BatchNorm(5), BatchNorm(5).to(torch.bfloat16)
    assert narrow.weight.dtype == torch.bfloat16 and narrow.running_mean.dtype == torch.float32
    # 0.004 above 1 the next bf16 number is 1.0078: a step of a tenth would be lost
    for module in (wide, narrow):
        module.running_mean.fill_(1.0)
        for _ in range(3):
            module((x - x.mean((0, 2, 3), keepdim=True) + 1.03).to(module.weight.dtype))
    torch.testing.assert_close(narrow.running_mean, wide.running_mean, rtol=0, atol=2e-3)
    assert (narrow.running_mean - 1.0).abs().min() > 5e-3
    assert narrow(x.bfloat16()).dtype == torch.bfloat16
    assert BatchNorm(5).double().running_mean.dtype == torch.float64


def test_statistics_over_ranks_are_those_of_the_whole_batch() -> None:
    """Two shares in one process: the "sum over ranks" adds the other share's own sums."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 3, 4, 4, generator=generator, dtype=torch.float64) * 2 + 1
    whole, shared = (BatchNorm(3).double() for _ in range(2))
    for module in (whole, shared):
        module.weight.data += 0.3
        module.bias.data -= 0.2
    mean, other = x.mean((0, 2, 3)), x[3:]
    rest = iter([other.sum((0, 2, 3)), (other - mean[:, None, None]).square().sum((0, 2, 3))])
    shared.sum_over_ranks, shared.ranks = (lambda part: part + next(rest)), 2
    torch.testing.assert_close(shared(x[:3]), whole(x)[:3], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shared.running_mean, 0.1 * mean, rtol=1e-12, atol=1e-12)
    unbiased = x.var((0, 2, 3), unbiased=True)
    torch.testing.assert_close(shared.running_var, 0.9 + 0.1 * unbiased, rtol=1e-12, atol=1e-12)


def test_options_without_effect_or_sense_are_refused() -> None:
    for fields, message in (
        ({"groups": 8}, "no effect with norm: batch"),
        ({"norm": "group", "groups": 12}, "groups=12 does not divide width=64"),
        ({"depth": 101}, "18, 34 or 50"),
    ):
        with pytest.raises(ValidationError, match=message):
            ResNetConfig(**fields)
