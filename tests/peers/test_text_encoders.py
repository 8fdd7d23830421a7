"""Text encoders against transformers' own outputs on tiny random models, without a network."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch

from etude.core.errors import UserError
from etude.external.transformers import TextEncoder
from etude.texts import JointEncoder, TextConfig

TEXTS = ["a red cat", "the moon", "a picture of the blue house one two sun star tree face", ""]
CLASSES = {
    "clip": "CLIPTextModel",
    "clip_l": "CLIPTextModelWithProjection",
    "clip_g": "CLIPTextModelWithProjection",
    "t5": "T5EncoderModel",
    "bert": "BertModel",
}


def network_of(folder: Path) -> torch.nn.Module:
    import transformers

    return getattr(transformers, CLASSES[folder.name]).from_pretrained(folder).eval()


def numbers(folder: Path, text: str, longest: int) -> list[int]:
    """The token numbers of one text by hand: start, words, end, cut in front of the end mark."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    marks = [[vocabulary["<s>"]] if "<s>" in vocabulary else [], [vocabulary["</s>"]]]
    words = [vocabulary[word] for word in text.split()]
    return marks[0] + words[: longest - sum(map(len, marks))] + marks[1]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("layer", ["last", "penultimate"])
@pytest.mark.parametrize("name", CLASSES)
def test_each_text_is_what_its_encoder_says_of_it_alone(text_models, name, layer) -> None:
    """Padding and truncation against every text passed alone, without padding or mask."""
    encoder = TextEncoder.from_folder(text_models / name)
    network, longest = network_of(text_models / name), 8
    found = encoder.encode(TEXTS, longest, layer=layer)
    assert found.tokens.shape == (4, longest, encoder.width)
    for row, text in enumerate(TEXTS):
        ids = torch.tensor([numbers(text_models / name, text, longest)])
        with torch.no_grad():
            out = network(input_ids=ids, output_hidden_states=True)
        count = ids.shape[1]
        assert found.lengths[row] == count
        own = out.last_hidden_state if layer == "last" else out.hidden_states[-2]
        assert own.std() > 0.1
        torch.testing.assert_close(found.tokens[row, :count], own[0], rtol=1e-5, atol=1e-5)
        assert not found.tokens[row, count:].any()
        if name == "clip":
            pooled = out.pooler_output[0]
        elif name.startswith("clip"):
            pooled = out.text_embeds[0]
        else:
            pooled = out.last_hidden_state[0].mean(0)
        torch.testing.assert_close(found.pooled[row], pooled, rtol=1e-5, atol=1e-5)
    assert found.pooled.shape[1] == encoder.pooled_width
    assert found.lengths[2] == longest and encoder.limit == {"t5": 0, "bert": 20}.get(name, 12)


@pytest.mark.parametrize("name", ["clip_l", "t5"])
def test_padding_is_text_where_it_is_not_masked(text_models, name) -> None:
    encoder = TextEncoder.from_folder(text_models / name)
    found = encoder.encode(TEXTS, 8, masked=False)
    ids = [numbers(text_models / name, text, 8) for text in TEXTS]
    pad = json.loads((text_models / name / "tokenizer.json").read_text())["model"]["vocab"]["<pad>"]
    padded = torch.tensor([row + [pad] * (8 - len(row)) for row in ids])
    with torch.no_grad():
        out = network_of(text_models / name)(input_ids=padded)
    torch.testing.assert_close(found.tokens, out.last_hidden_state, rtol=1e-5, atol=1e-5)
    assert found.lengths.tolist() == [8] * 4 and found.tokens[1, -1].any()


def test_a_joint_is_that_of_stable_diffusion_3(text_models) -> None:
    """CLIPs side by side in 48 channels of T5, tokens of T5 behind them, pooled side by side."""
    names = ["clip_l", "clip_g", "t5"]
    folders = [str(text_models / name) for name in names]
    joint = JointEncoder(TextConfig(encoders=folders, max_tokens=8, layer="penultimate"))
    assert (joint.tokens, joint.width, joint.pooled_width) == (16, 48, 24)
    found = joint.encode(TEXTS)
    parts = {}
    for name in names:
        ids = [numbers(text_models / name, text, 8) for text in TEXTS]
        tokenizer = json.loads((text_models / name / "tokenizer.json").read_text())
        pad = tokenizer["model"]["vocab"]["<pad>"]
        padded = torch.tensor([row + [pad] * (8 - len(row)) for row in ids])
        with torch.no_grad():
            parts[name] = network_of(text_models / name)(padded, output_hidden_states=True)
    expected = torch.zeros(4, 16, 48)
    expected[:, :8, :16] = parts["clip_l"].hidden_states[-2]
    expected[:, :8, 16:36] = parts["clip_g"].hidden_states[-2]
    expected[:, 8:] = parts["t5"].last_hidden_state
    pooled = torch.cat((parts["clip_l"].text_embeds, parts["clip_g"].text_embeds), 1)
    torch.testing.assert_close(found.tokens, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.pooled, pooled, rtol=1e-5, atol=1e-5)
    assert found.lengths.tolist() == [16] * 4


def test_a_joint_reads_no_more_of_clip_than_it_has_and_two_clips_are_a_joint(text_models) -> None:
    folders = {name: str(text_models / name) for name in CLASSES}
    joint = JointEncoder(TextConfig(encoders=[folders["clip_l"], folders["t5"]], max_tokens=20))
    assert (joint.tokens, joint.width, joint.pooled_width) == (32, 48, 10)
    assert joint.encode(TEXTS).tokens.shape == (4, 32, 48)
    two = JointEncoder(TextConfig(encoders=[folders["clip_l"], folders["clip_g"]], max_tokens=12))
    assert (two.tokens, two.width, two.pooled_width) == (12, 36, 24)
    assert two.encode(TEXTS).tokens.shape == (4, 12, 36)
    keys = {j.plan["key"] for j in (joint, two)}
    for change in ({"max_tokens": 10}, {"layer": "penultimate"}, {"dtype": "bfloat16"}):
        given = {"encoders": [folders["clip_l"], folders["clip_g"]], "max_tokens": 12} | change
        keys.add(JointEncoder(TextConfig(**given)).plan["key"])
    assert len(keys) == 5


def test_bfloat16_and_a_tokenizer_beside_its_encoder(text_models, tmp_path) -> None:
    shutil.copytree(text_models / "t5", tmp_path / "text_encoder_3")
    (tmp_path / "tokenizer_3").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.move(tmp_path / "text_encoder_3" / name, tmp_path / "tokenizer_3" / name)
    whole = TextEncoder.from_folder(text_models / "t5", kind="t5")
    half = TextEncoder.from_folder(tmp_path / "text_encoder_3", dtype=torch.bfloat16)
    assert half.identity == whole.identity
    found, expected = half.encode(TEXTS, 8), whole.encode(TEXTS, 8)
    assert found.tokens.dtype == found.pooled.dtype == torch.bfloat16
    assert (found.tokens.float() - expected.tokens).norm() < 0.02 * expected.tokens.norm()


def test_identity_follows_weights_and_tokenizer(text_models, tmp_path) -> None:
    known = {TextEncoder.from_folder(text_models / "bert").identity}
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        folder = tmp_path / name
        shutil.copytree(text_models / "bert", folder)
        data = (folder / name).read_bytes()
        # One bit of the last weight, or a line's end behind the JSON.
        last = bytes([data[-1] ^ 1]) if name == "model.safetensors" else data[-1:] + b"\n"
        (folder / name).write_bytes(data[:-1] + last)
        known.add(TextEncoder.from_folder(folder).identity)
    (folder / "sentencepiece.bpe.model").write_bytes(b"XLM-RoBERTa's vocabulary")
    known.add(TextEncoder.from_folder(folder).identity)
    assert len(known) == 5


def test_what_is_no_text_encoder_is_one_sentence(text_models, tmp_path) -> None:
    def refused(match: str, folder: Path, **options) -> None:
        with pytest.raises(UserError, match=match) as caught:
            TextEncoder.from_folder(folder, **options).encode(["a cat"], 8)
        assert "\n" not in str(caught.value)

    refused("config.json does not exist", tmp_path / "absent")
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    refused(r"describes 'nothing', which is not a text encoder \(CLIP, T5 or BERT\)", tmp_path)
    (tmp_path / "config.json").write_text("{")
    refused("is not JSON", tmp_path)
    refused("describes 't5', which is not of kind clip", text_models / "t5", kind="clip")
    (tmp_path / "config.json").write_text((text_models / "t5" / "config.json").read_text())
    refused("holds no weights", tmp_path)
    for name in ("bert", "t5"):  # of which transformers would make a tokenizer without words
        lacking = shutil.copytree(text_models / name, tmp_path / f"{name} alone")
        (lacking / "tokenizer.json").unlink()
        refused("holds no tokenizer: put tokenizer.json beside its config.json", lacking)
    shutil.copytree(text_models / "bert", tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"damaged")
    refused("could not be read as AutoModel of transformers", tmp_path / "bert")
    shutil.copy(text_models / "t5" / "model.safetensors", tmp_path / "bert")
    refused("lack embeddings.*more: copy the folder again", tmp_path / "bert")
    with pytest.raises(UserError, match="reads at most 12 tokens, not 13: set text.max_tokens=12"):
        TextEncoder.from_folder(text_models / "clip").encode(["a cat"], 13)
    with pytest.raises(UserError, match="reads at most 20 tokens: set text.max_tokens=20"):
        JointEncoder(TextConfig(encoders=[str(text_models / "bert")]))
    with pytest.raises(UserError, match="penultimate is for CLIP encoders"):
        JointEncoder(
            TextConfig(encoders=[str(text_models / "t5")], layer="penultimate", max_tokens=8)
        )
