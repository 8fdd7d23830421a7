"""The classifier: it can learn, keeps pictures apart, and its features feed its logits."""

import torch
import torch.nn.functional as F

from etude.models.classifier import Classifier, ClassifierConfig

CONFIG = ClassifierConfig(in_channels=2, num_classes=3, channels=(8, 16), blocks=2, groups=4)


def pictures(count: int, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 2, size, size, generator=generator) * 2 - 1


def test_logits_are_the_head_of_the_features() -> None:
    model, x = Classifier(CONFIG), pictures(4)
    features = model.features(x)
    assert features.shape == (4, 16)
    expected = features @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), expected)


def test_features_are_the_mean_over_pixels_of_the_normalised_stages() -> None:
    model, kept = Classifier(CONFIG), []
    model.stages.register_forward_hook(lambda module, inputs, output: kept.append(output))
    features = model.features(pictures(3))
    h = kept[0].double().view(3, 4, -1)  # the norm's gain is one and its bias zero at first
    h = (h - h.mean(2, keepdim=True)) / (h.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    h = h.view(3, 16, -1)
    torch.testing.assert_close(features.double(), (h / (1 + (-h).exp())).mean(2), atol=1e-6, rtol=0)


def test_pictures_of_a_batch_are_independent_in_both_modes() -> None:
    model, x = Classifier(CONFIG).double(), pictures(5).double()
    other = torch.cat((x[:1], -3.0 * x[1:]))
    for training in (True, False):
        model.train(training)
        torch.testing.assert_close(model(x)[0], model(other)[0], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(model(x)[1:], model(other)[1:])


def test_learns_a_spatial_rule() -> None:
    """Which third of the picture is bright: not decidable from the mean alone."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (120,), generator=generator)
    x = torch.randn(120, 2, 9, 9, generator=generator) * 0.3
    bright = F.one_hot(labels, 3).repeat_interleave(3, 1).float()
    x = x + bright[:, None, :, None] * torch.linspace(-1, 1, 9)[None, None, None, :]
    model = Classifier(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = None
    for _ in range(25):
        loss = F.cross_entropy(model(x[:90]), labels[:90])
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held_out = (model(x[90:]).argmax(1) == labels[90:]).float().mean()
    assert loss < 0.5 * first
    assert held_out > 0.6


def test_weights_are_a_function_of_the_seed_alone() -> None:
    first, second, other = Classifier(CONFIG), Classifier(CONFIG), Classifier(CONFIG, seed=1)
    x = pictures(2)
    assert torch.equal(first(x), second(x))
    assert not torch.equal(first(x), other(x))
