"""The parts in somebody else's loop, ten lines each, by value; importing changes nothing."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import etude


def test_the_optimizer_with_averages_in_a_plain_loop() -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(3, 2), torch.randn(20, 8, 3)
    mine = [p.detach().double().clone().requires_grad_() for p in net.parameters()]
    theirs = torch.optim.AdamW(mine, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    average = [p.detach().clone() for p in mine]

    optimizer = etude.AdamWEMA(
        net.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, ema_decays=[0.99]
    )
    for batch in x:
        net(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for step, batch in enumerate(x.double()):
        (batch @ mine[0].T + mine[1]).square().mean().backward()
        theirs.step()
        theirs.zero_grad()
        decay = min(0.99, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, mine, strict=True)]
    for parameter, expected, mean in zip(net.parameters(), mine, average, strict=True):
        assert torch.allclose(parameter.double(), expected, rtol=1e-5, atol=1e-6)
        found = optimizer.ema_state(0)[parameter].double()
        assert torch.allclose(found, mean, rtol=1e-5, atol=1e-6)


def test_the_loader_alone(tmp_path: Path) -> None:
    """Every picture once a pass, with its own pixels and label, whatever the micro batch."""
    pictures = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    samples = []
    for number, picture in enumerate(pictures):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        sample = {"key": f"p{number}", "image": buffer.getvalue(), "extension": "png"}
        samples.append(sample | {"label": number % 3})
    etude.write_shards(tmp_path / "shards", samples, per_shard=5, classes=["a", "b", "c"])

    shards = etude.ShardSet(tmp_path / "shards")
    augment = etude.AugmentConfig(image_size=8, crop="none", channels=1)
    config = etude.DataConfig(shards=str(shards.folder), augment=augment, decoder="torch")
    loader = etude.Loader(shards, config, seed=3)
    stream = loader.batches(start=0, global_batch=4, micro_batch=4)
    seen = [next(stream) for _ in range(6)]
    stream.close()

    keys = [key for batch in seen for key in batch.keys]
    assert sorted(keys[:12]) == sorted(keys[12:]) == sorted(s["key"] for s in samples)
    assert keys[:12] != keys[12:]
    for batch in seen:
        for key, image, label in zip(batch.keys, batch.images, batch.labels, strict=True):
            number = int(key[1:])
            expected = torch.from_numpy(pictures[number]).double() / 127.5 - 1
            assert label == number % 3
            assert torch.allclose(image[0].double(), expected, atol=1e-6)
    loader.close()


def test_the_sampler_alone_with_a_network_of_ones_own() -> None:
    """For one picture c the best flow prediction is (x - c) / t: sampling must end at c."""
    c = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4)
    objective = etude.Objective(etude.ObjectiveConfig(prediction="flow", schedule="flow"))
    config = etude.SamplerConfig(method="heun", steps=10, guidance_convention="lambda")
    noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))

    def network(x: torch.Tensor, t: torch.Tensor, condition: dict) -> torch.Tensor:
        return (x - c) / t.reshape(-1, 1, 1, 1).clamp(min=1e-6)

    found = etude.sample(network, objective, config, noise, {})
    assert torch.allclose(found, c.expand_as(found), atol=1e-3)


def test_the_extractor_alone(tmp_path: Path) -> None:
    from etude.metrics.extractors.classifier import save_classifier

    model = etude.Classifier(
        etude.ClassifierConfig(in_channels=1, num_classes=3, channels=(8, 16)), seed=2
    ).eval()
    save_classifier(tmp_path / "classifier", model, 16, ["a", "b", "c"])
    pictures = np.random.default_rng(1).integers(0, 256, (5, 16, 16, 1), dtype=np.uint8)

    extractor = etude.load_extractor("classifier", tmp_path / "classifier")
    features = extractor(torch.from_numpy(pictures))

    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).double() / 127.5 - 1
    with torch.no_grad():
        expected = model.double().features(images)
    assert torch.allclose(features.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_run_from_python_returns_what_it_wrote(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = etude.run(tiny.ldm, "loop.images=32", name="mine", seed=5)
    recipe, folder = etude.load_run("mine")
    assert recipe.seed == 5 and recipe.loop.images == 32
    generator = etude.open_generator(folder)
    images, _ = generator.draw(np.arange(2), np.arange(2), seed=0)
    assert result["images_seen"] == 32 and images.shape == (2, 16, 16, 1)
    weights = etude.read_weights(max((folder / "checkpoints").iterdir()), "ema:0.9")
    held = generator.model.state_dict()
    assert all(torch.equal(weights[name], held[name]) for name in weights)


UNTOUCHED = """
import signal, sys, torch
numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]
before = [signal.getsignal(n) for n in numbers], torch.get_rng_state(), torch.get_num_threads()
import etude, etude.kernels
net = torch.nn.Linear(2, 2)
state = torch.get_rng_state()
optimizer = etude.AdamWEMA(net.parameters(), ema_decays=[0.9])
net(torch.ones(1, 2)).sum().backward()
optimizer.step()
etude.Objective(etude.ObjectiveConfig())
etude.DiT(etude.DiTConfig(input_size=4, in_channels=1, patch_size=2, hidden_size=16, depth=1,
    num_heads=2, num_classes=2, learn_sigma=False))
print(before[0] == [signal.getsignal(n) for n in numbers])
print(torch.equal(state, torch.get_rng_state()), before[2] == torch.get_num_threads())
print(torch.distributed.is_initialized(), torch.are_deterministic_algorithms_enabled())
print([m for m in ("deepspeed", "diffusers", "transformers", "nvidia.dali") if m in sys.modules])
"""


def test_using_the_parts_leaves_the_process_alone() -> None:
    done = subprocess.run([sys.executable, "-c", UNTOUCHED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True", "True True", "False False", "[]"]
