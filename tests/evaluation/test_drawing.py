"""Drawn pictures of a plan: what a picture depends on, going on after a kill, what is asked."""

from pathlib import Path

import numpy as np
import pytest

from etude.core.errors import UserError
from etude.core.log import Log
from etude.core.rng import Stream, uniform
from etude.core.signals import StopRequested
from etude.evaluation.datasets import Prompt, Prompts
from etude.evaluation.decoding import Form
from etude.evaluation.picture_set import Stages
from etude.evaluation.planned.drawing import BLOCK, DrawnPictures, class_prompts, noise_position

QUIET = Log(None, quiet=True)
LETTERS = "abcdefghij"


class Noise:
    """Draws Philox noise of (seed, position), with the length of the prompt in one corner."""

    name, fingerprint, classes, asked_by_text = "noise", "noise-1", (), True
    protocol = {"sampler": {"method": "none"}, "rounding": "down"}

    def __init__(self) -> None:
        self.drawn = 0

    def draw(self, indices, labels, *, seed, captions, positions):
        self.drawn += len(indices)
        noise = (uniform(seed, Stream.SAMPLE_NOISE, positions, 12) * 256).astype(np.uint8)
        noise[:, 0] = [len(caption) for caption in captions]
        return noise.reshape(-1, 2, 2, 3)


def prompts(ids: str, name: str = "letters") -> Prompts:
    return Prompts(name, tuple(Prompt(f"id {c}", c * (3 + ord(c) % 5), group=c) for c in ids))


def drawn(folder: Path, ids: str, count: int, **more) -> DrawnPictures:
    return DrawnPictures(Noise(), prompts(ids), count, **({"seed": 3, "folder": folder} | more))


def by_prompt(pictures: DrawnPictures) -> dict[str, np.ndarray]:
    pictures.draw(QUIET)
    found = pictures.read(0, len(pictures), Stages())
    return dict(zip(found.keys, found.images, strict=True))


def test_a_picture_is_that_of_its_prompt_whatever_stands_beside_it(tmp_path) -> None:
    whole = by_prompt(drawn(tmp_path, LETTERS, 30))
    assert len(whole) == 30 and len({image.tobytes() for image in whole.values()}) == 30
    turned = by_prompt(drawn(tmp_path, LETTERS[::-1][:7], 20))
    for key in turned.keys() & whole.keys():
        np.testing.assert_array_equal(turned[key], whole[key])
    assert len(turned.keys() & whole.keys()) >= 19
    other = by_prompt(drawn(tmp_path, LETTERS, 30, seed=4)).values()
    assert not any(np.array_equal(a, b) for a, b in zip(other, whole.values(), strict=True))


def test_pictures_are_spread_over_the_prompts(tmp_path) -> None:
    pictures = drawn(tmp_path, LETTERS, 25)
    pictures.draw(QUIET)
    found = pictures.read(0, 25, Stages())
    assert found.groups == list(LETTERS + LETTERS + LETTERS[:5])
    assert found.keys[0] == "3/id a/0" and found.keys[24] == "3/id e/2"
    assert [prompt.text for prompt in pictures.asked(9, 11)] == ["jjjj", "aaaaa"]
    assert found.images[:, 0, 0, 0].tolist() == [len(p.text) for p in pictures.asked(0, 25)]


def test_more_pictures_go_on_where_fewer_ended(tmp_path) -> None:
    few = drawn(tmp_path, LETTERS, 10)
    assert few.draw(QUIET) == 10 and few.generator.drawn == BLOCK
    more = drawn(tmp_path, LETTERS, BLOCK + 3)
    assert more.missing() == [BLOCK]
    more.draw(QUIET)
    assert more.generator.drawn == BLOCK
    assert few.fingerprint != more.fingerprint
    np.testing.assert_array_equal(
        few.read(0, 10, Stages()).images, more.read(0, 10, Stages()).images
    )


def test_a_stop_keeps_whole_blocks(tmp_path) -> None:
    log = Log(None, quiet=True)

    def stop() -> None:
        raise StopRequested("told to")

    log.on_advance = stop
    pictures = drawn(tmp_path, LETTERS, 3 * BLOCK)
    with pytest.raises(StopRequested):
        pictures.draw(log)
    assert pictures.missing() == [BLOCK, 2 * BLOCK]
    again = drawn(tmp_path, LETTERS, 3 * BLOCK)
    again.draw(QUIET)
    assert again.generator.drawn == 2 * BLOCK and again.missing() == []


def test_read_crosses_blocks_and_brings_pictures_to_a_form(tmp_path) -> None:
    pictures = drawn(tmp_path, LETTERS, 2 * BLOCK)
    pictures.draw(QUIET)
    whole = pictures.read(0, 2 * BLOCK, Stages()).images
    np.testing.assert_array_equal(pictures.read(60, 70, Stages()).images, whole[60:70])
    grey = drawn(tmp_path, LETTERS, 2 * BLOCK, form=Form(4, "crop", 1))
    assert grey.missing() == [] and grey.fingerprint != pictures.fingerprint
    assert grey.read(60, 70, Stages()).images.shape == (10, 4, 4, 1)
    # Of one colour everywhere, a picture keeps its luma whatever its size.
    flat = np.full((2, 2, 3), (10, 200, 30), np.uint8)
    assert set(grey._form.array(flat).ravel()) == {round(0.299 * 10 + 0.587 * 200 + 0.114 * 30)}


def test_noise_positions_fit_the_sampler_and_differ() -> None:
    found = [noise_position(f"prompt {n}", r) for n in range(2000) for r in (0, 1)]
    assert len(set(found)) == 4000 and 0 <= min(found) and max(found) < 1 << 39
    assert noise_position("a", 5) == (noise_position("a", 0) + 5) % (1 << 39)


def test_a_generator_asked_by_class_needs_classes(tmp_path) -> None:
    asked = Noise()
    asked.asked_by_text, asked.classes = False, ("x", "y")
    with pytest.raises(UserError, match="asked by class and the prompts of letters have none"):
        DrawnPictures(asked, prompts("ab"), 4, seed=0, folder=tmp_path)
    with pytest.raises(UserError, match="knows 2 classes and three has 3"):
        DrawnPictures(asked, class_prompts("three", ["x", "y", "z"]), 4, seed=0, folder=tmp_path)
    two = class_prompts("two", ["x", "y"])
    assert [(p.label, p.text) for p in two.prompts] == [(0, "x"), (1, "y")]


def test_a_class_is_asked_by_its_name_whatever_its_number(tmp_path) -> None:
    class Painter:
        """Fills a picture with the letter of the class that it is asked for."""

        name = fingerprint = "painter"
        classes, asked_by_text, protocol = ["a", "b", "c"], False, {}

        def draw(self, indices, labels, *, seed, captions, positions):
            fill = [ord(self.classes[label]) for label in labels]
            return np.array(fill, np.uint8).reshape(-1, 1, 1, 1)

    def painted(names: str) -> str:
        asked = class_prompts("letters", list(names))
        made = DrawnPictures(Painter(), asked, 3, seed=0, folder=tmp_path)
        made.draw(QUIET)
        found = made.read(0, 3, Stages())
        assert found.labels.tolist() == [0, 1, 2]
        return "".join(map(chr, found.images.ravel()))

    assert painted("abc") == "abc"
    assert painted("cab") == "cab"
    assert painted("xyz") == "abc"  # no name in common: by number
    assert painted("abx") == "abc"  # nor one out of order
    other, made = Painter(), {"count": 3, "seed": 0, "folder": tmp_path}
    other.classes = ["b", "a", "c"]  # of equal fingerprint: what is asked for is told apart
    both = [
        DrawnPictures(g, class_prompts("l", ["a", "b", "c"]), **made) for g in (Painter(), other)
    ]
    assert both[0].drawing != both[1].drawing
    with pytest.raises(UserError, match="both have 'c', and only letters has 'x'; name its"):
        painted("cxy")
