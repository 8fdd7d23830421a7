"""VQAScore and DSG against transformers' own processors, losses and generate, pair by pair.

Tiny random models of all four architectures are saved as folders, as transformers writes them. What
is expected comes from their public interface on one picture and one question, without padding.
"""

import functools
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from etude.core.errors import UserError
from etude.external.transformers_vqa import CLASSES, VisualAnswerer
from etude.metrics.alignment import Question, Scorer, open_scorer
from etude.metrics.alignment.dsg import is_yes

WORDS = (
    "yes Yes no No Does this figure show a red cat the moon and blue house on tree Please answer"
)
WORDS += ' or Question Answer USER ASSISTANT Is there one star in picture : . ? "'
KINDS = ["blip", "blip2_t5", "blip2_opt", "instruct_t5", "instruct_llama", "llava"]
TEXTS = ["a red cat", "the moon", "a red cat and the blue house on the moon"]
ASK = 'Does this figure show "{}"? Please answer yes or no.'
# A picture has so many questions, of different lengths; batches then mix pictures and lengths.
QUESTIONS = [
    ["Is there a cat?", "Is there a red cat on the moon?", "Is there one star?"],
    ["Is the moon blue?"],
    ["Is there a tree?", "Is there a house and one star in this picture and the moon?"],
]


def tokenizer(kind: str):
    """Whole words, with the marks of the language model that `kind` has."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = ["<pad>", "</s>", "<s>", "<unk>", "<image>"]
    words = list(dict.fromkeys([*marks, *WORDS.split()]))
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    single = {"t5": "$A </s>", "bert": "<s> $A </s>", "decoder": "<s> $A"}[kind]
    inner.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 2), ("</s>", 1)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left" if kind == "decoder" else "right",
    )
    made.add_tokens(["<image>"], special_tokens=True)
    return made


def network(name: str, size: int):
    """A small model; every weight is drawn wide, so that answers depend on what is asked."""
    import transformers as tf

    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    small = {"hidden_size": 16, "intermediate_size": 32, **layers}
    vision = {"image_size": 16, "patch_size": 8, **small}
    marks = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "vocab_size": size}
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    text = {
        "t5": tf.T5Config(**t5, decoder_start_token_id=0, tie_word_embeddings=False, **marks),
        "opt": tf.OPTConfig(
            ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=96, **small, **marks
        ),
        "llama": tf.LlamaConfig(max_position_embeddings=96, **small, **marks),
    }
    former = {"max_position_embeddings": 24, "encoder_hidden_size": 16, **small}
    torch.manual_seed(7)
    kind, _, language = name.partition("_")
    if kind == "blip":
        encoder = {"max_position_embeddings": 32, "sep_token_id": 1, **small}
        config = tf.BlipConfig(
            text_config={**encoder, **marks, "encoder_hidden_size": 16}, vision_config=vision
        )
        made = tf.BlipForQuestionAnswering(config)
    elif kind == "llava":
        config = tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(projection_dim=16, **vision),
            text_config=text["llama"],
            image_token_index=4,
            vision_feature_layer=-2,
        )
        made = tf.LlavaForConditionalGeneration(config)
    else:
        blip2 = kind == "blip2"
        config = (tf.Blip2Config if blip2 else tf.InstructBlipConfig)(
            vision_config=vision,
            qformer_config={**former, "vocab_size": size, "cross_attention_frequency": 1},
            text_config=text[language].to_dict(),
            num_query_tokens=3,
            image_token_index=4,
        )
        made = getattr(tf, CLASSES["blip-2" if blip2 else "instructblip"])(config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            scale = parameter.dim() == 1 and name.endswith("weight")  # that of a norm, near one
            parameter.normal_(float(scale), 0.2 if parameter.dim() == 1 else 0.5)
    return made.eval()


def processor(name: str):
    import transformers as tf

    kind, _, language = name.partition("_")
    if kind == "llava":
        prepared = tf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
        return tf.LlavaProcessor(
            prepared,
            tokenizer("decoder"),
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    prepared = tf.BlipImageProcessorPil(size={"height": 16, "width": 16})
    if kind == "blip":
        return tf.BlipProcessor(prepared, tokenizer("bert"))
    words = tokenizer("t5" if language == "t5" else "decoder")
    if kind == "blip2":
        return tf.Blip2Processor(prepared, words, num_query_tokens=3)
    return tf.InstructBlipProcessor(prepared, words, tokenizer("bert"), num_query_tokens=3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each of KINDS."""
    root = tmp_path_factory.mktemp("vqa")
    for name in KINDS:
        made = processor(name)
        made.save_pretrained(root / name)
        network(name, len(made.tokenizer)).save_pretrained(root / name)
    # As older folders are: the image processor has a file of its own, the rest none.
    (root / "blip" / "processor_config.json").unlink()
    made = processor("blip").image_processor
    made.save_pretrained(root / "blip")
    return root


@pytest.fixture(scope="module")
def pictures() -> list[torch.Tensor]:
    """Three pictures of different sizes, the last one grey."""
    draw = np.random.default_rng(3)
    shapes = [(16, 16, 3), (40, 24, 3), (20, 20, 1)]
    return [torch.from_numpy(draw.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def ready(models: Path):
    """Scorers whose model is read once for each of KINDS."""
    known: dict[str, VisualAnswerer] = {}

    def make(scorer: str, name: str, **options) -> Scorer:
        made = open_scorer(scorer, options={"weights": str(models / name), **options})
        made.answerer = known.setdefault(name, made.answerer)
        return made

    return make


@pytest.fixture(scope="module")
def peer(models: Path):
    """transformers' own model and processor of a folder."""
    import transformers as tf

    @functools.cache
    def read(name: str):
        kind = {"blip2": "blip-2", "instruct": "instructblip"}.get(name.split("_")[0], name)
        model = getattr(tf, CLASSES[kind]).from_pretrained(models / name)
        return model.eval(), processor(name)

    return read


def asked(name: str, question: str) -> str:
    if name == "llava":
        return f"USER: <image>\n{question} ASSISTANT:"
    return f"Question: {question} Answer:" if name.startswith("blip2") else question


def inputs_of(made, name: str, picture: torch.Tensor, question: str) -> dict:
    from PIL import Image

    image = Image.fromarray(np.asarray(picture.expand(-1, -1, 3)))
    return dict(made(images=image, text=asked(name, question), return_tensors="pt"))


@torch.no_grad()
def expected_logs(model, made, name: str, picture, question: str, answer: str) -> torch.Tensor:
    """Log-probability of the answer's token and of its end mark (2,), from loss or logits."""
    inputs = inputs_of(made, name, picture, question)
    number = made.tokenizer.convert_tokens_to_ids
    tokens = torch.tensor([[number(answer), number("</s>")]])
    if name == "blip":
        seen = model.vision_model(inputs["pixel_values"])[0]
        read = model.text_encoder(inputs["input_ids"], encoder_hidden_states=seen)[0]
        started = torch.cat((torch.tensor([[2]]), tokens), 1)
        logits = model.text_decoder(started, encoder_hidden_states=read).logits[0, :-1]
    elif name.endswith("t5"):
        logits = model(**inputs, labels=tokens).logits[0]
    else:
        text = inputs["input_ids"]
        inputs["input_ids"] = torch.cat((text, tokens), 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        logits = model(**inputs).logits[0, text.shape[1] - 1 : -1]
    return logits.double().log_softmax(-1).gather(1, tokens[0][:, None])[:, 0]


class Prompt:
    def __init__(self, id: str, text: str = "", questions: tuple[Question, ...] = ()) -> None:
        self.id, self.text, self.questions = id, text, questions


def prompts() -> list[Prompt]:
    return [
        Prompt(str(at), text, tuple(Question(str(i), q) for i, q in enumerate(QUESTIONS[at])))
        for at, text in enumerate(TEXTS)
    ]


@pytest.mark.parametrize("name", KINDS)
def test_vqascore_is_the_librarys_probability_of_each_pair(ready, peer, pictures, name) -> None:
    """Mixed lengths in one batch against single pairs, both likelihoods, with and without end."""
    model, made = peer(name)
    pairs = list(zip(pictures, TEXTS, strict=True))
    logs = torch.stack(
        [expected_logs(model, made, name, seen, ASK.format(text), "Yes") for seen, text in pairs]
    )
    assert (logs.sum(1).std() > 0.05) and (logs > -40).all()
    for given, expected in (
        ({}, logs.sum(1)),
        ({"likelihood": "mean"}, logs.mean(1)),
        ({"end": False}, logs[:, 0]),
    ):
        scorer = ready("vqascore", name, batch=3, **given)
        found = scorer.score(pictures, prompts())["vqascore"]
        assert found.dtype == torch.float32 and found.shape == (3,)
        torch.testing.assert_close(found.double().log(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_dsg_writes_what_the_librarys_generate_writes(ready, peer, pictures, name) -> None:
    """Six questions of three pictures, two batches of four, against one generate for each."""
    model, made = peer(name)
    scorer = ready("dsg", name, batch=4, max_tokens=6, question="{question}")
    found = scorer.assess(pictures, prompts())
    said = []
    for picture, own, answers in zip(pictures, QUESTIONS, found.answers, strict=True):
        for question, answer in zip(own, answers, strict=True):
            inputs = inputs_of(made, name, picture, question)
            written = model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=1)
            if name not in ("blip", "blip2_t5", "instruct_t5"):  # a decoder repeats what it read
                written = written[:, inputs["input_ids"].shape[1] :]
            expected = made.tokenizer.decode(written[0], skip_special_tokens=True).strip()
            assert answer.said == expected and answer.yes == is_yes(expected)
            said.append(expected)
    assert len(set(said)) > 1, said


@pytest.mark.parametrize("name", KINDS)
def test_dsg_by_probability_compares_yes_with_no(ready, peer, pictures, name) -> None:
    model, made = peer(name)
    found = ready("dsg", name, batch=5, answer="probability").assess(pictures, prompts())
    for at, (picture, own) in enumerate(zip(pictures, QUESTIONS, strict=True)):
        yes = []
        for question, answer in zip(own, found.answers[at], strict=True):
            asking = f"{question} Answer yes or no."
            one, other = (
                expected_logs(model, made, name, picture, asking, word).sum()
                for word in ("yes", "no")
            )
            yes.append(bool(one > other))
            assert answer.yes == yes[-1]
            assert abs(float(answer.said) - float((one - other).sigmoid())) < 1e-3
        assert found.scores["dsg"][at] == pytest.approx(sum(yes) / len(yes))


@pytest.mark.parametrize("name", KINDS)
def test_a_score_does_not_depend_on_its_batch(ready, pictures, name) -> None:
    """Each pair alone, in ones, and beside others in another order: within 1e-5."""
    pairs = [(p, q) for p in pictures for q in [ASK.format(text) for text in TEXTS]]
    answerer = ready("vqascore", name).answerer
    seen = answerer.see([np.asarray(picture) for picture, _ in pairs])
    questions = [question for _, question in pairs]
    whole = answerer.read(seen, questions).log_probabilities("Yes")
    back = answerer.read(seen.flip(0), questions[::-1]).log_probabilities("Yes").flip(0)
    for at, (picture, question) in enumerate(pairs):
        alone = answerer.read(answerer.see([np.asarray(picture)]), [question])
        for other in (alone.log_probabilities("Yes")[0], back[at]):
            assert (other.exp() - whole[at].exp()).abs().max() < 1e-5
            assert (other - whole[at]).abs().max() < 1e-4
    assert whole.std(0).min() > 0.05


def test_a_batch_of_pictures_is_one_tensor_or_a_list(ready, pictures) -> None:
    """(B, H, W, C) and a list of its rows; and a grey picture is its levels three times."""
    scorer = ready("vqascore", "blip2_t5", batch=2)
    grey = pictures[2]
    stacked = torch.stack([grey.expand(-1, -1, 3), grey.flip(0).expand(-1, -1, 3)])
    one, two = (
        scorer.score(images, prompts()[:2])["vqascore"]
        for images in (stacked, [grey, grey.flip(0)])
    )
    assert torch.equal(one, two) and one[0] != one[1]


def test_dsg_zeroes_the_children_of_a_no(ready, peer, pictures) -> None:
    """The answers of a real model, and the graph's arithmetic by hand on top of them."""
    model, made = peer("blip2_t5")
    texts, wins = [question for own in QUESTIONS for question in own], []
    for text in texts:
        question = f"{text} Answer yes or no."
        logs = [
            expected_logs(model, made, "blip2_t5", pictures[0], question, word).sum()
            for word in ("yes", "no")
        ]
        wins.append(bool(logs[0] > logs[1]))
    assert any(wins) and not all(wins)
    yes, no = wins.index(True), wins.index(False)
    # b is answered yes and hangs on a; a is answered no in one picture, yes in the other.
    graphs = [
        (Question("b", texts[yes], ("a",)), Question("a", texts[first])) for first in (no, yes)
    ]
    asked_of = [Prompt("1", questions=graphs[0]), Prompt("2", questions=graphs[1])]
    scorer = ready("dsg", "blip2_t5", answer="probability")
    found = scorer.assess([pictures[0]] * 2, asked_of)
    assert found.scores["dsg"].tolist() == [0.0, 1.0]
    assert found.scores["yes_share"].tolist() == [0.5, 1.0]
    assert [(a.yes, a.counts) for a in found.answers[0]] == [(True, False), (False, False)]


@pytest.mark.parametrize("name", ["blip", "blip2_t5", "llava"])
def test_bfloat16_is_near_float32(models, ready, pictures, name) -> None:
    whole = ready("vqascore", name).score(pictures, prompts())["vqascore"]
    options = {"weights": str(models / name), "dtype": "bfloat16"}
    half = open_scorer("vqascore", options=options)
    found = half.score(pictures, prompts())["vqascore"]
    assert half.answerer.network.dtype == torch.bfloat16
    assert (found.log() - whole.log()).abs().median() < 0.5
    assert not torch.equal(found, whole)


def test_identity_follows_every_file_that_fixes_the_numbers(models, tmp_path) -> None:
    known = {VisualAnswerer.from_folder(models / "instruct_t5").identity}
    names = ["model.safetensors", "config.json", "tokenizer.json", "processor_config.json"]
    for name in [*names, "qformer_tokenizer/tokenizer.json"]:
        folder = shutil.copytree(models / "instruct_t5", tmp_path / name.replace("/", " "))
        data = (folder / name).read_bytes()
        last = bytes([data[-1] ^ 1]) if name == "model.safetensors" else data[-1:] + b"\n"
        (folder / name).write_bytes(data[:-1] + last)
        known.add(VisualAnswerer.from_folder(folder).identity)
    assert len(known) == 6


def test_what_cannot_be_asked_is_one_sentence(models, ready, pictures, tmp_path) -> None:
    def refused(match: str, make, *given, **options) -> None:
        with pytest.raises(UserError, match=match) as caught:
            make(*given, **options)
        assert "\n" not in str(caught.value)

    refused("config.json does not exist", VisualAnswerer.from_folder, tmp_path / "absent")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    refused("'bert', which answers no questions", VisualAnswerer.from_folder, tmp_path)
    blip = tmp_path / "blip"
    shutil.copytree(models / "blip", blip)
    (blip / "preprocessor_config.json").unlink()
    refused("says not how pictures are prepared", VisualAnswerer.from_folder, blip)
    (blip / "model.safetensors").unlink()
    refused("holds no weights", VisualAnswerer.from_folder, blip)
    lacking = shutil.copytree(models / "blip", tmp_path / "lacking")
    shutil.copy(models / "llava" / "model.safetensors", lacking)
    of_another = open_scorer("vqascore", options={"weights": str(lacking)})
    refused("lack .* and .* more: copy", of_another.score, pictures, prompts())
    folder = models / "llava"
    for frame in ("{question}", "<image> says"):
        refused("does not suit .* write one like", VisualAnswerer.from_folder, folder, frame=frame)
    spaced = VisualAnswerer.from_folder(folder, frame="<image> {question} ASSISTANT: a ")
    assert spaced.answer_tokens("yes", False) == ready("dsg", "llava").answerer.answer_tokens(
        "yes", False
    )
    score = ready("vqascore", "llava").score
    refused("not one place for a picture", score, pictures[:1], [Prompt("7", "an <image> of")])
    for name in ("blip", "instruct_t5", "blip2_opt"):
        long = [Prompt("7", "a red cat " * 25)]
        refused(
            "tokens, and .* reads .*: shorten", ready("vqascore", name).score, pictures[:1], long
        )
    refused("prompt '7' has no text", score, pictures[:1], [Prompt("7", " ")])
    refused("'7' has no questions", ready("dsg", "llava").score, pictures[:1], [Prompt("7", "a")])
    with pytest.raises(ValueError, match="3 pictures for 1 prompts"):
        score(pictures, prompts()[:1])
    with pytest.raises(ValueError, match="must be uint8"):
        score([picture.float() for picture in pictures], prompts())
