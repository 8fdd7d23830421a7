"""Scores of picture and prompt: CLIPScore, the arithmetic of question graphs, and options."""

import hashlib
import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from etude.core.errors import UserError
from etude.metrics.alignment import SCORERS, Answer, Question, as_pictures, open_scorer
from etude.metrics.alignment.dsg import answered, is_yes, scored
from etude.metrics.alignment.questions import counting, parents_first


@dataclass(frozen=True)
class Prompt:
    id: str
    text: str = ""
    questions: tuple[Question, ...] = ()


def graph(**parents: str) -> tuple[Question, ...]:
    """Questions named by single letters: `graph(a="", b="a", c="ab")`."""
    return tuple(Question(name, f"is {name}?", tuple(above)) for name, above in parents.items())


# "a motorcycle with red wheels beside a motorcycle with black wheels": questions, answers, and what
# counts by hand. c hangs on a and b, d on c, e on nothing.
TREE = graph(a="", b="", c="ab", d="c", e="")
TABLE = [
    # a b c d e      counts          dsg  yes_share
    ("yyyyy", "yyyyy", 1.0, 1.0),
    ("nyyyy", "nynny", 0.4, 0.8),  # a no takes c with it, and c takes d
    ("ynyyy", "ynnny", 0.4, 0.8),
    ("yynyy", "yynny", 0.6, 0.8),
    ("yyynn", "yyynn", 0.6, 0.6),
    ("nnyyn", "nnnnn", 0.0, 0.4),
    ("nnnnn", "nnnnn", 0.0, 0.0),
]


@pytest.mark.parametrize(("said", "counts", "dsg", "share"), TABLE)
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (3, 0, 4, 2, 1)])
def test_a_no_zeroes_all_below_it_in_any_order(said, counts, dsg, share, order) -> None:
    questions = tuple(TREE[at] for at in order)
    yes = [said[at] == "y" for at in order]
    answers = answered(Prompt("1", questions=questions), ["-"] * 5, yes)
    assert [a.counts for a in answers] == [counts[at] == "y" for at in order]
    assert [a.yes for a in answers] == yes and [a.question for a in answers] == list(questions)
    found = scored([answers])
    assert found["dsg"].item() == pytest.approx(dsg)
    assert found["yes_share"].item() == pytest.approx(share)


def test_counting_is_and_over_all_ancestors() -> None:
    """Every answer to a graph with two paths, against the ancestors listed by hand."""
    questions = graph(a="", b="a", c="a", d="bc", e="d")
    above = {"a": "", "b": "a", "c": "a", "d": "abc", "e": "abcd"}
    for yes in itertools.product([False, True], repeat=5):
        said = dict(zip("abcde", yes, strict=True))
        expected = [said[q] and all(said[p] for p in above[q]) for q in "abcde"]
        assert counting(questions, yes, "prompt") == expected


def test_pictures_weigh_the_same_however_many_questions() -> None:
    one = answered(Prompt("1", questions=graph(a="")), [""], [True])
    four = answered(Prompt("2", questions=graph(a="", b="", c="", d="")), [""] * 4, [False] * 4)
    found = scored([one, four])
    assert found["dsg"].tolist() == [1.0, 0.0] and found["dsg"].dtype == torch.float32
    assert isinstance(one[0], Answer) and found["dsg"].mean() == 0.5


def test_parents_stand_before_their_children() -> None:
    questions = graph(e="d", d="bc", c="a", b="a", a="")
    order = [questions[at].id for at in parents_first(questions, "prompt")]
    assert sorted(order) == list("abcde")
    for question in questions:
        assert all(order.index(p) < order.index(question.id) for p in question.parents)


@pytest.mark.parametrize(
    ("questions", "match"),
    [
        (graph(a="", b="z"), "question 'b' of prompt '9' has the parent 'z', which is not there"),
        (graph(a="b", b="a", c=""), "questions a, b of prompt '9' presuppose each other"),
        (graph(a="a"), "questions a of prompt '9' presuppose"),
        ((Question("a", "x"), Question("a", "y")), "has two questions with the id 'a'"),
    ],
)
def test_what_is_no_graph_is_one_sentence(questions, match) -> None:
    with pytest.raises(UserError, match=match) as caught:
        answered(Prompt("9", questions=questions), ["", ""], [True, True, True])
    assert "\n" not in str(caught.value)


def test_a_yes_starts_with_yes() -> None:
    assert [is_yes(t) for t in ("yes", " Yes, it is", "YES.", "no", "", "I say yes", "eyes")] == [
        True,
        True,
        True,
        False,
        False,
        False,
        False,
    ]


@pytest.fixture(scope="module")
def clip(text_models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with both towers in one folder, and the tokenizer of a text encoder."""
    import transformers as tf

    folder = tmp_path_factory.mktemp("clip")
    text = tf.CLIPTextConfig.from_pretrained(text_models / "clip_l")
    vision = tf.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=32,
        patch_size=16,
    )
    torch.manual_seed(1)
    config = tf.CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=10
    )
    model = tf.CLIPModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.dim() == 1 and name.endswith("weight")  # that of a norm, near one
            parameter.normal_(float(scale), 0.2)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(text_models / "clip_l" / name, folder)
    return folder


TEXTS = ["a red cat", "the moon", "the blue house", "a picture of the sun", "one star", "the moon"]


def test_clipscore_is_the_clipped_cosine_of_the_librarys_clip(clip) -> None:
    """transformers' CLIPModel, text by text and in float64; prompts repeat, cosines change sign."""
    import transformers as tf

    from etude.metrics.extractors import load_extractor

    extractor = load_extractor("clip", clip)
    images = torch.randint(0, 256, (6, 40, 32, 3), generator=torch.Generator().manual_seed(2))
    images = images.to(torch.uint8)
    model = tf.CLIPModel.from_pretrained(clip).double().eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(clip)
    pixels = extractor.backbone.prepare(images, torch.float32).double()
    prompts = [Prompt(str(at), text) for at, text in enumerate(TEXTS)]
    for prefix in ("", "one picture of "):
        cosines = []
        for at, text in enumerate(TEXTS):
            ids = tokenizer(prefix + text, return_tensors="pt")
            with torch.no_grad():
                out = model(pixel_values=pixels[at : at + 1], **ids)
            cosines.append((out.logits_per_image / model.logit_scale.exp()).item())
        cosines = torch.tensor(cosines, dtype=torch.float64)
        options = {"prefix": prefix} if prefix else {}
        scorer = open_scorer("clipscore", extractor=extractor, options=options)
        found = scorer.score(extractor(images), prompts)["clipscore"]
        assert found.dtype == torch.float32
        assert (cosines < -0.02).any() and (cosines > 0.02).any()
        torch.testing.assert_close(found.double(), 100 * cosines.clamp(min=0), rtol=0, atol=1e-3)
        # The other convention clips the mean: lower as soon as one cosine is negative.
        assert found.mean() > 100 * cosines.mean().clamp(min=0) + 1
    # Both towers and the tokenizer fix the score.
    parts = f"{extractor.weights_sha256} {extractor.backbone.text_identity}"
    assert scorer.weights_sha256 == hashlib.sha256(parts.encode()).hexdigest()


def test_clipscore_needs_no_normalised_features_and_reads_a_text_once(clip, monkeypatch) -> None:
    from etude.metrics.extractors import load_extractor

    extractor = load_extractor("clip", clip)
    read = []
    text = extractor.backbone.text
    monkeypatch.setattr(extractor.backbone, "text", lambda texts: read.extend(texts) or text(texts))
    scorer = open_scorer("clipscore", extractor=extractor)
    prompts = [Prompt(str(at), text) for at, text in enumerate(TEXTS)]
    features = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    whole = scorer.score(features, prompts)["clipscore"]
    scaled = scorer.score(features * torch.linspace(0.01, 9, 6)[:, None], prompts)["clipscore"]
    torch.testing.assert_close(whole, scaled, rtol=1e-5, atol=1e-4)
    parts = [scorer.score(features[i : i + 1], prompts[i : i + 1]) for i in range(6)]
    assert torch.equal(torch.cat([part["clipscore"] for part in parts]), whole)
    assert sorted(read) == sorted(set(TEXTS))
    with pytest.raises(ValueError, match="6 rows of features for 5 prompts"):
        scorer.score(features, prompts[:5])
    with pytest.raises(UserError, match="prompt '0' has no text: leave clipscore out"):
        scorer.score(features[:1], [Prompt("0")])


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        (
            "dsg",
            {"answer": "probability", "max_tokens": 3},
            "max_tokens has no effect with answer=",
        ),
        ("dsg", {"yes": "Yes"}, "dsg: yes has no effect with answer=generate: leave it out"),
        ("dsg", {"question": "Is it?"}, r"dsg.question: there is no place .* put \{question\}"),
        ("vqascore", {"question": "Is it?"}, r"vqascore.question: .* put \{text\} into it"),
        ("vqascore", {"batch": 0}, "vqascore.batch: Input should be greater than 0, got 0$"),
        (
            "vqascore",
            {"beams": 5},
            "vqascore.beams: there is no such option; vqascore has",
        ),
        ("vqascore", {}, "config.json does not exist"),
        ("clipscore", {}, "clipscore takes clip features: name that extractor and its weights"),
        ("bleu", {}, "there is no scorer 'bleu'; choose one of clipscore, dsg, vqascore"),
    ],
)
def test_a_wrong_option_is_one_sentence(name, options, match, tmp_path) -> None:
    given = options if name in ("clipscore", "bleu") else {"weights": str(tmp_path)} | options
    with pytest.raises(UserError, match=match) as caught:
        open_scorer(name, options=given)
    assert "\n" not in str(caught.value)


def test_scorers_say_what_they_need_and_give() -> None:
    about = {name: SCORERS.get(name) for name in SCORERS.names()}
    assert {name: one.needs for name, one in about.items()} == {
        "clipscore": "clip",
        "dsg": "picture",
        "vqascore": "picture",
    }
    assert all(one.better == "higher" and one.name == name for name, one in about.items())


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((4, 4, 3), np.float32), r"\(H, W, 1 or 3\), got float32 \(4, 4, 3\)"),
        (np.zeros((3, 4, 4), np.uint8), r"\(H, W, 1 or 3\), got uint8 \(3, 4, 4\)"),
    ],
)
def test_a_picture_of_another_dtype_or_shape_is_named_with_both(image, said) -> None:
    with pytest.raises(ValueError, match=said):
        as_pictures([image], [Prompt("0", "a cat")])
