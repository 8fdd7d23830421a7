"""Stable Diffusion folders as generators asked by class, against diffusers' own pipelines.

Tiny networks with random weights, in folders that diffusers and transformers wrote; the tokenizer
is real CLIP's with a vocabulary of bytes, in the older files that the published folders hold.
"""

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from etude import cli
from etude.convert.diffusers_config import unet_config
from etude.convert.unet import diffusers_table
from etude.core import rng
from etude.core.distributed import World
from etude.core.errors import UserError
from etude.core.recipe import recipe_from_dict
from etude.data.decode_torch import decode_picture
from etude.data.pool_parts import encode_png, part_images
from etude.data.shards import ShardSet, write_shards
from etude.diffusion.guidance import GuidanceConfig
from etude.diffusion.samplers import SamplerConfig
from etude.jobs import run_recipe
from etude.models.unet import UNet
from etude.practice.learner import Learner, LearnerConfig
from etude.practice.supply import Facts, Request, Studio, Supply
from etude.sampling import BLOCK, Generator, open_generator
from etude.stable_diffusion import (
    PiecewiseAutoencoder,
    class_names,
    is_stable_diffusion,
)

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

CLASSES = ["tench", "red cat", "crane", "the moon"]
PROMPT = "a photo of {name}"
SAMPLER = SamplerConfig(
    method="ddim",
    steps=6,
    spacing="leading",
    guidance_scale=3.0,
    guidance_convention="one_plus_lambda",
)
DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
UP = ("UpBlock2D", "CrossAttnUpBlock2D")
# What tells 1.x, 2.x and XL apart: heads, projections, prediction, text encoders.
KINDS = {
    "1.x": {"attention_head_dim": 4},
    "2.x": {"attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True},
    "xl": {
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "down_block_types": DOWN[::-1],
        "up_block_types": UP[::-1],
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 24 + 6 * 256,
    },
}


def write_tokenizer(folder: Path) -> None:
    """CLIP's, with a vocabulary of bytes and a few words, in the published folders' files."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>"), ("t", "h"), ("th", "e</w>")]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(m) for m in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    marks |= {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(marks))
    stated = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated | marks))


def text_encoder(width: int, projection: int) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=520,
        hidden_size=width,
        projection_dim=projection,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=518,
        eos_token_id=519,
        initializer_range=0.3,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config).eval()


def write_folder(folder: Path, kind: str, prediction: str) -> Path:
    """A Stable Diffusion of a kind; random weights under which the text matters."""
    torch.manual_seed(0)
    shape = dict(sample_size=4, block_out_channels=(32, 64), layers_per_block=1)
    shape |= dict(down_block_types=DOWN, up_block_types=UP)
    double = kind == "xl"
    unet = diffusers.UNet2DConditionModel(
        **shape | KINDS[kind], cross_attention_dim=40 if double else 16
    )
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "attn2" in name:
                parameter.mul_(4.0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        skip_prk_steps=True,
        steps_offset=1,
    )
    write_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    beside = folder.with_name(f"{folder.name}-tokenizer")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(beside)
    parts = {"vae": vae, "unet": unet, "scheduler": scheduler, "tokenizer": tokenizer}
    if double:
        parts |= {"text_encoder": text_encoder(16, 0), "text_encoder_2": text_encoder(24, 24)}
        pipeline = diffusers.StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer)
    else:
        parts |= {"text_encoder": text_encoder(16, 0), "safety_checker": None}
        pipeline = diffusers.StableDiffusionPipeline(
            **parts, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.save_pretrained(folder)
    if not double:
        shutil.rmtree(folder / "tokenizer")
        shutil.copytree(beside, folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[..., Path]:
    """`folders("1.x", "epsilon")`: a folder, made once."""
    root, made = tmp_path_factory.mktemp("stable-diffusion"), {}

    def folder(kind: str = "1.x", prediction: str = "epsilon") -> Path:
        name = f"{kind}-{prediction}"
        if name not in made:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made[name] = write_folder(root / name, kind, prediction)
        return made[name]

    return folder


@pytest.fixture
def copied(folders, tmp_path) -> Path:
    """A folder of the test's own."""
    return Path(shutil.copytree(folders(), tmp_path / "stable-diffusion"))


def opened(folder: Path, **options) -> Generator:
    given = {"sampler": SAMPLER, "classes": CLASSES, "prompt": PROMPT}
    return open_generator(folder, **given | options)


@pytest.fixture(scope="module")
def generator(folders) -> Generator:
    return opened(folders())


@pytest.fixture(scope="module")
def learner() -> nn.Module:
    """Of practice, with random weights; it sees 16 x 16 pixels, normalised."""
    config = LearnerConfig(
        model={"in_channels": 3, "channels": [8, 16], "groups": 4, "num_classes": 4},
        input_size=16,
        mean=[0.5, 0.4, 0.3],
        std=[0.2, 0.3, 0.2],
    )
    return Learner(config, 5, World(0, 1, 0, torch.device("cpu"))).frozen("raw")


def drawn(generator: Generator, indices: list[int], labels: list[int], **options) -> np.ndarray:
    return generator.draw(np.array(indices), np.array(labels), seed=3, **options)[0]


def both(generator: Generator, indices: list[int], labels: list[int]) -> tuple[Tensor, np.ndarray]:
    """The latents that the generator decodes for indices of the first block, and the pictures."""
    kept, decode = [], Generator.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "decode", lambda self, z: kept.append(z) or decode(self, z))
        pictures = drawn(generator, indices, labels)
    return kept[0][indices], pictures


@pytest.mark.parametrize(
    ("kind", "prediction"),
    [("1.x", "epsilon"), ("2.x", "v_prediction"), ("xl", "epsilon")],
)
def test_pictures_are_those_of_diffusers(folders, kind, prediction) -> None:
    folder, labels = folders(kind, prediction), [2, 0, 3, 1, 2]
    generator, indices = opened(folder), [0, 1, 2, 5, 63]
    latents, pictures = both(generator, indices, labels)
    double = kind == "xl"
    name = "StableDiffusionXLPipeline" if double else "StableDiffusionPipeline"
    options = {} if double else {"safety_checker": None}
    pipeline = getattr(diffusers, name).from_pretrained(folder, local_files_only=True, **options)
    # The same times and the same end as ours: no offset, and clean at last.
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(
        pipeline.scheduler.config,
        steps_offset=0,
        set_alpha_to_one=True,
        clip_sample=False,
        timestep_spacing="leading",
    )
    pipeline.set_progress_bar_config(disable=True)
    where = np.array(indices) * (1 << 24)
    noise = rng.normal(3, rng.Stream.SAMPLE_NOISE, where, (4, 4, 4), torch.device("cpu"))
    asked = {"prompt": [f"a photo of {CLASSES[label]}" for label in labels]}
    asked |= {"guidance_scale": 3.0, "num_inference_steps": 6}
    theirs = pipeline(**asked, latents=noise.clone(), output_type="latent").images
    torch.testing.assert_close(latents, theirs, rtol=1e-5, atol=1e-4)
    exact = pipeline(**asked, latents=noise.clone(), output_type="np").images
    levels = np.abs(pictures.astype(int) - np.rint(exact * 255).astype(int))
    assert levels.max() <= 1 and pictures.std() > 2
    asked["prompt"] = [f"a photo of {CLASSES[0]}"] * 5
    other = pipeline(**asked, latents=noise.clone(), output_type="latent").images
    assert (latents - other)[[0, 2, 3, 4]].abs().mean() > 0.02  # the text matters


def test_a_label_is_its_class_and_a_block_is_whole(generator, folders) -> None:
    indices, labels = [3, 0, 70, 63], [1, 2, 0, 3]
    together = drawn(generator, indices, labels)
    assert together.shape == (4, 32, 32, 3) and together.dtype == np.uint8
    # Neither the order nor what else is drawn changes a byte.
    assert np.array_equal(drawn(generator, [63, 0], [3, 2]), together[[3, 1]])
    assert not np.array_equal(drawn(generator, [0], [3])[0], together[1])
    turned = opened(folders(), classes=[CLASSES[label] for label in (2, 3, 0, 1)])
    assert np.array_equal(drawn(turned, [0], [0])[0], together[1])


def test_it_is_asked_by_class(generator, folders) -> None:
    assert not generator.asked_by_text and generator.classes == CLASSES
    assert generator.null_label == 4 and generator.latent_shape == (4, 4, 4)
    assert generator.conditions.image_size == 32
    assert generator.autoencoder.config.scaling_factor == 0.18215
    with pytest.raises(UserError, match="is asked by class, not by text"):
        drawn(generator, [0], [0], captions=["a cat"])
    default = open_generator(folders(), classes=CLASSES).sampler
    assert (default.method, default.steps, default.spacing) == ("ddim", 50, "leading")
    assert (default.guidance_scale, default.guidance_convention) == (7.5, "one_plus_lambda")


def test_guidance_raises_what_a_learner_of_these_pictures_finds_hard(generator) -> None:
    torch.manual_seed(0)
    learner = nn.Sequential(
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(768, 32), nn.Tanh(), nn.Linear(32, 4)
    )
    indices = np.arange(BLOCK)
    pictures = drawn(generator, [*indices], [*(indices % 4)])
    given = torch.as_tensor(pictures).permute(0, 3, 1, 2) / 127.5 - 1.0
    optimizer = torch.optim.AdamW(learner.parameters(), 3e-3)
    for _ in range(40):
        loss = nn.functional.cross_entropy(learner(given), torch.as_tensor(indices % 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5  # the classes are told apart by their pictures alone
    learner.eval()
    plain = entropies(learner, pictures)
    asked = dict(seed=3, learner=learner, guidance=GuidanceConfig(omega=0.1, every=1))
    guided, telemetry = generator.draw(indices, indices % 4, **asked)
    hard = entropies(learner, guided)
    assert np.median(hard) > 2 * np.median(plain) and np.mean(hard > plain) > 0.9
    # Labels reach the telemetry; what it looks at was not yet clamped to 256 levels.
    right = learner_answers(learner, guided) == indices % 4
    assert 0.1 < right.mean() < 0.9 and np.mean(telemetry["agreement"] == right) > 0.85
    assert not telemetry["nonfinite"].any()


def learner_answers(learner: nn.Module, pictures: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return (
            learner(torch.as_tensor(pictures).permute(0, 3, 1, 2) / 127.5 - 1.0).argmax(1).numpy()
        )


def entropies(learner: nn.Module, pictures: np.ndarray) -> np.ndarray:
    """In nats, in float64 from the learner's logits."""
    with torch.no_grad():
        logits = learner(torch.as_tensor(pictures).permute(0, 3, 1, 2) / 127.5 - 1.0).double()
    return torch.distributions.Categorical(logits=logits).entropy().numpy()


def test_practice_draws_parts_of_a_pool_with_it(generator, tmp_path) -> None:
    studio = Studio(lambda: generator, LearnerConfig(), tmp_path, torch.device("cpu"))
    supply = Supply(Facts.of(generator), studio, GuidanceConfig(), 3, chunk=4)
    request = Request(pool="practice", round=0, keys=supply.keys(0, 6))
    assert supply.complete(request, lambda: False, lambda count: None)
    assert [key.count for key in request.keys] == [4, 2] and not request.missing(tmp_path)
    part = tmp_path / "practice" / request.keys[1].folder
    assert np.array_equal(part_images(part), drawn(generator, [4, 5], [0, 1]))
    # A whole block, six steps, with and without the class.
    assert json.loads((part / "cost.json").read_text())["evaluations"] == BLOCK * 6 * 2


def test_the_command_draws_from_a_folder(folders, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    words = ["sample", folders(), "--count", "3", "--steps", "6", "--guidance", "3", "--seed", "3"]
    words += ["--classes", tmp_path / "classes.txt", "--to", tmp_path / "drawn"]
    monkeypatch.setattr(sys, "argv", ["etude", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code, capsys.readouterr().err
    shards = ShardSet(tmp_path / "drawn")
    assert shards.classes == CLASSES and shards.labels.tolist() == [0, 1, 2]
    alone = open_generator(folders(), classes=CLASSES)
    alone.sampler = alone.sampler.model_copy(update={"steps": 6, "guidance_scale": 3.0})
    got = [np.asarray(decode_picture(shards[i].data, 3)) for i in range(3)]
    assert np.array_equal(np.stack(got), drawn(alone, [0, 1, 2], [0, 1, 2]))


def test_practice_runs_with_a_folder_and_its_splits_names(folders, tmp_path) -> None:
    """Class names come from the monitor split; every round is guided through text and U-Net."""
    chance = np.random.default_rng(0)
    for name in ("monitor", "test"):
        pictures = chance.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
        rows = [
            {"key": f"{name}-{i}", "image": encode_png(p), "extension": "png", "label": i % 4}
            for i, p in enumerate(pictures)
        ]
        write_shards(tmp_path / name, rows, classes=CLASSES)
    recipe = recipe_from_dict(
        {
            "kind": "practice",
            "generator": str(folders()),
            "sampler": SAMPLER.model_dump(mode="json") | {"steps": 2},
            "pictures": {"image_size": 16, "channels": 3},
            "monitor": str(tmp_path / "monitor"),
            "test": str(tmp_path / "test"),
            "learner": {
                "model": {"in_channels": 3, "num_classes": 4, "channels": [8]},
                "batch": 4,
                "input_size": 16,
            },
            "schedule": {"steps": 4},
            "trigger": {"evaluate_every": 1, "patience": 1},
            "guidance": {"omega": 0.1, "every": 1},
            "start_samples": 4,
            "round_samples": 4,
            "max_rounds": 1,
            "arms": ["practice"],
        }
    )
    folder, result = run_recipe(recipe, root=tmp_path / "runs", name="one", quiet=True)
    arm = result["arms"]["practice"]
    assert arm["rounds"] == 1 and arm["samples"] == 8 and arm["generator_gradients"] > 0
    origin = json.loads((folder / "pools/practice/origin.json").read_text())
    assert origin["classes"] == origin["opened"]["classes"] == CLASSES


def test_half_precision_files_and_arithmetic(generator, copied) -> None:
    """A folder of fp16 variants alone draws what its rounded weights draw; bfloat16 comes near."""
    indices, labels = [0, 1, 2, 3], [0, 1, 2, 3]
    plain = drawn(generator, indices, labels)
    for name in ("unet", "vae"):
        rename(copied / name, "diffusion_pytorch_model")
    rename(copied / "text_encoder", "model")
    halved = opened(copied)
    assert {p.dtype for p in halved.model.parameters()} == {torch.float32}
    gap = np.abs(drawn(halved, indices, labels).astype(int) - plain)
    assert 0 < gap.mean() < 1
    near = opened(copied, weights="bfloat16")
    gap = np.abs(drawn(near, indices, labels).astype(int) - plain)
    assert near.model.text.dtype == torch.bfloat16 and gap.mean() < 8
    assert len({each.fingerprint for each in (generator, halved, near)}) == 3
    assert near.protocol["profile"] == "bfloat16"


def rename(folder: Path, stem: str) -> None:
    """Leave half-precision weights alone in a folder, under the name of that variant."""
    from safetensors.torch import load_file, save_file

    state = load_file(folder / f"{stem}.safetensors")
    (folder / f"{stem}.safetensors").unlink()
    save_file(
        {name: tensor.half() for name, tensor in state.items()},
        folder / f"{stem}.fp16.safetensors",
        {"format": "pt"},
    )


def test_what_the_identity_is_made_of(generator, folders, copied) -> None:
    again = opened(copied)
    assert again.fingerprint == generator.fingerprint
    others = [opened(copied, prompt="{name}"), opened(copied, classes=CLASSES[::-1])]
    config = json.loads((copied / "scheduler/scheduler_config.json").read_text())
    changed = config | {"prediction_type": "v_prediction", "beta_end": 0.013}
    (copied / "scheduler/scheduler_config.json").write_text(json.dumps(changed))
    others.append(opened(copied))
    assert others[-1].objective.config.prediction == "v"
    assert others[-1].objective.config.beta_end == 0.013
    assert len({each.fingerprint for each in (again, *others)}) == 4


def test_large_pictures_are_decoded_in_pieces(generator, monkeypatch) -> None:
    whole = generator.autoencoder
    given = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = whole.decode(given)
    (slope,) = torch.autograd.grad(expected.square().sum(), given)
    sizes: list[int] = []
    monkeypatch.setattr("etude.stable_diffusion.PIXELS", 3 * 32 * 32)
    monkeypatch.setattr("etude.stable_diffusion.PIXELS_KEPT", 2 * 32 * 32)
    decode = whole.network.decode
    monkeypatch.setattr(whole.network, "decode", lambda z: sizes.append(len(z)) or decode(z))
    torch.testing.assert_close(whole.decode(given.detach()), expected, rtol=1e-5, atol=1e-5)
    assert sizes == [3, 2] and isinstance(whole, PiecewiseAutoencoder)
    for count, parts in ((5, [2, 2, 1]), (3, [2, 1]), (2, [2])):
        sizes.clear()
        pieces = whole.decode(given[:count])
        torch.testing.assert_close(pieces, expected[:count], rtol=1e-5, atol=1e-5)
        (found,) = torch.autograd.grad(pieces.square().sum(), given)
        torch.testing.assert_close(found[:count], slope[:count], rtol=1e-3, atol=1e-4)
        # Several pieces are computed again in the backward pass.
        assert sizes[: len(parts)] == parts and len(sizes) == (2 * len(parts) if count > 2 else 1)


def test_a_push_decodes_few_pictures_at_a_time_and_none_twice(
    generator, folders, learner, monkeypatch
) -> None:
    indices, labels, two = [0, 1, 30, 63], [0, 1, 2, 3], SAMPLER.model_copy(update={"steps": 2})
    sizes: list[tuple[int, bool]] = []

    def guided(one: Generator, **fields) -> np.ndarray:
        guidance = GuidanceConfig(omega=0.2, every=1, **fields)
        return drawn(one, indices, labels, learner=learner, guidance=guidance).astype(int)

    def counted(latents: Tensor) -> Tensor:
        sizes.append((len(latents), torch.is_grad_enabled()))
        return decode(latents)

    assert generator.decode_rows == (1 << 20) // 32**2
    whole = guided(opened(folders(), sampler=two))
    monkeypatch.setattr("etude.stable_diffusion.PIXELS_KEPT", 24 * 32 * 32)
    few = opened(folders(), sampler=two)
    decode = few.autoencoder.network.decode
    monkeypatch.setattr(few.autoencoder.network, "decode", counted)
    for rows, parts in ((0, [24, 24, 16]), (22, [22, 22, 20]), (25, [24, 24, 16])):
        sizes.clear()
        apart = np.abs(guided(few, decode_rows=rows) - whole)
        assert apart.max() <= 2 and (apart > 0).mean() <= 0.01
        # Two pushes, and the finished block.
        assert sizes == [(size, True) for size in 2 * parts] + [(BLOCK, False)]
    assert np.abs(whole - drawn(few, indices, labels)).max() > 5


def test_guided_pictures_in_bfloat16_come_near(generator, folders, learner) -> None:
    """U-Net, decoder and learner: the mean distance, of 255 levels, beside what guidance moves."""
    indices = np.arange(8)

    def guided(one: Generator, precision: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        guidance = GuidanceConfig(omega=0.1, every=2, decode_precision=precision)
        return one.draw(indices, indices % 4, seed=3, learner=learner, guidance=guidance)

    images, _ = guided(generator, "fp32")
    halved, told = guided(opened(folders(), weights="bfloat16"), "bf16")
    assert set(told) == {"entropy", "agreement", "nonfinite", "held"}
    assert np.isfinite(told["entropy"]).all() and not told["nonfinite"].any()
    moved = np.abs(images.astype(int) - drawn(generator, [*indices], [*(indices % 4)]))
    assert moved.mean() > 10 and 0 < np.abs(images.astype(int) - halved).mean() < 2


def published(kind: str) -> dict:
    """config.json of a published U-Net, as far as the versions differ."""
    levels = {"down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]}
    levels |= {"up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
    first = {"sample_size": 64, "block_out_channels": [320, 640, 1280, 1280], **levels}
    linear = {"use_linear_projection": True, "upcast_attention": True}
    if kind == "1.5":
        return first | {"attention_head_dim": 8, "cross_attention_dim": 768, "norm_eps": 1e-5}
    if kind == "2.1":
        heads = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024}
        return first | linear | heads | {"sample_size": 96, "dual_cross_attention": False}
    return {
        **KINDS["xl"],
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
        "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,
        "projection_class_embeddings_input_dim": 2816,
    }


@pytest.mark.parametrize(
    ("kind", "parameters"), [("1.5", 859_520_964), ("2.1", 865_910_724), ("xl", 2_567_463_684)]
)
def test_the_published_shapes_are_ours(kind, parameters) -> None:
    config = unet_config(published(kind), "unet/config.json", text_tokens=77)
    with torch.device("meta"):
        ours = UNet(config)
        theirs = diffusers.UNet2DConditionModel.from_config(published(kind))
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    mine = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    pairs = [(e.ours, e.theirs[0]) for e in diffusers_table(config) if e.theirs]
    assert {other for _, other in pairs} == set(shapes)
    assert all(mine[name] == shapes[other] for name, other in pairs)
    assert sum(p.numel() for p in ours.parameters()) == parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 9}, "sets out_channels to 4"),  # inpainting
        ({"time_cond_proj_dim": 256}, "sets time_cond_proj_dim to 256"),  # latent consistency
        ({"class_embed_type": "timestep"}, "sets class_embed_type to timestep"),  # upscaling
        ({"norm_num_groups": 16}, "sets norm_num_groups to 16"),
        ({"attention_head_dim": [5, 10, 20, 10]}, r"attention_head_dim to \[5, 10, 20, 10\]"),
        ({"a_field_of_later": 3}, "sets a_field_of_later to 3"),
        ({"sample_size": None}, "describes no U-Net of Stable Diffusion"),
        ({"down_block_types": ["DownBlock2D"] * 3}, "sets down_block_types"),
    ],
)
def test_a_network_that_is_not_ours_is_refused(change, message) -> None:
    with pytest.raises(UserError, match=message):
        unet_config(published("1.5") | change, "unet/config.json", text_tokens=77)


def test_what_is_missing_is_one_sentence(copied, tmp_path) -> None:
    def refused(message: str, **options) -> None:
        with pytest.raises(UserError, match=message):
            opened(copied, **options)

    refused("has no classes: set classes to a file with one name on each line", classes=[])
    refused("does not say where the class goes: write {name} there", prompt="a photo")
    refused("holds one set of weights, not 'raw': leave weights out", weights="raw")
    edited(copied / "scheduler/scheduler_config.json", beta_schedule="sigmoid")
    refused("sets beta_schedule to sigmoid, which no sampler here takes")
    edited(copied / "scheduler/scheduler_config.json", beta_schedule="linear", beta_end=0.02)
    edited(copied / "unet/config.json", cross_attention_dim=24)
    refused("takes texts of 24 channels and vectors of 0, its text encoders give 16 and 0")
    edited(copied / "unet/config.json", cross_attention_dim=16)
    (copied / "vae").rename(tmp_path / "vae")
    refused("has no autoencoder: put one in diffusers' layout")
    (copied / "unet/diffusion_pytorch_model.safetensors").rename(tmp_path / "unet.safetensors")
    refused("unet holds no weights: put diffusion_pytorch_model.safetensors beside")
    shutil.rmtree(copied / "tokenizer")
    refused("text_encoder holds no tokenizer")
    edited(copied / "model_index.json", _class_name="StableDiffusionInpaintPipeline")
    refused("describes a StableDiffusionInpaintPipeline: name a folder with one of Stable")
    (copied / "recipe.yaml").touch()
    assert not is_stable_diffusion(copied)
    with pytest.raises(UserError, match="have no effect on .*, which is no Stable Diffusion"):
        opened(tmp_path)


def edited(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_class_names_are_those_of_a_file_or_of_the_split(folders, tmp_path) -> None:
    plain, numbered = (tmp_path / name for name in ("a.txt", "b.txt"))
    plain.write_text("\n".join(CLASSES) + "\n")
    numbered.write_text("n01440764 tench\nn02123045 red cat\n")
    assert class_names(folders(), "", ["x", "y"], "monitor") == ["x", "y"]
    assert class_names(tmp_path, "", ["x", "y"], "monitor") == []
    assert class_names(folders(), str(plain), [], "monitor") == CLASSES
    assert class_names(folders(), str(numbered), [], "monitor") == ["tench", "red cat"]
    with pytest.raises(UserError, match=r"b\.txt names 2 classes and monitor holds 4: give one"):
        class_names(folders(), str(numbered), CLASSES, "monitor")
