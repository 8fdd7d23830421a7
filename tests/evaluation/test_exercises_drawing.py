"""The exercises' drawings as SVG: their colours, words and independence of anything outside."""

import re
import warnings
import xml.etree.ElementTree as tree

import numpy as np
import pytest

from etude.core.errors import UserError
from etude.evaluation.exercises import Choice, answer, drawing, trade_off_drawings
from etude.evaluation.exercises.fronts import cloud_of
from etude.evaluation.exercises.rows import choose
from etude.evaluation.results import Results, Row
from etude.page_style import STYLE

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    """Every kind of drawing, of models whose names are markup and mathematics."""
    rows = []
    for place, model in enumerate(("a <b>", "$c_1$ & d")):
        for guidance in (1.0, 2.0):
            for data_set in ("captions", "classes"):
                for metric, better in (("FID", "lower"), ("precision", "higher")):
                    value = 0.5 + 0.1 * place + 0.02 * guidance
                    about = {"low": value - 0.02, "high": value + 0.03, "guidance": guidance}
                    rows.append(Row(model, data_set, metric, value, better, **about))
                    rows += [
                        Row(
                            model,
                            data_set,
                            metric,
                            value + 0.05 * k,
                            better,
                            group=f"g{k}",
                            **about,
                        )
                        for k in range(3)
                    ]
    table, found = Results(tuple(rows)), {}
    for name in ("trade-offs", "groups", "ranking", "prompt-types"):
        for part, plot in answer(name, table).plots.items():
            found[f"{name}/{part}"] = plot.svg
            assert plot.alt and plot.note and plot.title
    return found


def test_a_drawing_is_one_document_that_asks_nobody(drawn: dict[str, str]) -> None:
    assert {name.split("/")[1].split("-")[0] for name in drawn} >= {
        *("front", "radar", "forest", "heat", "rank", "prompt")
    }
    for name, text in drawn.items():
        root = tree.fromstring(text)
        assert root.tag == f"{SVG}svg" and root.get("viewBox")
        assert text.count("http") == 1, name  # the namespace
        assert not re.search(r"@import|url\((?!#)", text)
        named = root.get("aria-labelledby").split()
        texts = {e.get("id"): e.text for e in root if e.tag in (f"{SVG}title", f"{SVG}desc")}
        assert all(texts[one] for one in named)


def test_names_are_shown_as_they_are(drawn: dict[str, str]) -> None:
    for name, text in drawn.items():
        if "radar" in name or "forest" in name or "front" in name:
            shown = "".join(tree.fromstring(text).itertext())
            assert "a <b>" in shown and "$c_1$ & d" in shown, name


def test_every_name_is_in_the_legend_and_none_warns() -> None:
    """Also one that begins as matplotlib's hidden labels do, and glyphs that its font lacks."""
    names = ["_baseline", "\N{CJK UNIFIED IDEOGRAPH-4EBA}_1", "plain"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with drawing.panels(1) as (figure, axes):
            drawing.strip(axes[0, 0], ["line"], [(name, [1.0], [None]) for name in names])
            figure.legend(loc="outside lower center")
            svg = drawing.finish(figure, "legend", "Legend", "three series")
            with pytest.raises(UserWarning, match="another"):  # only that one is silent
                warnings.warn("another", stacklevel=1)
    texts = [(e.text or "").strip() for e in tree.fromstring(svg).iter(f"{SVG}text")]
    assert all(texts.count(name) == 1 for name in names)


def test_every_drawn_colour_is_of_the_palette_and_has_a_light_and_a_dark_form(
    drawn: dict[str, str],
) -> None:
    for name, text in drawn.items():
        style, body = re.search(r"<style>(.*?)</style>(.*)", text, re.S).groups()
        assert not re.search(r"#[0-9a-f]{6}", body), name
        used = set(re.findall(r"var\((--\w+)\)", body))
        light, dark = style.split("@media(prefers-color-scheme:dark)")
        assert len(used) > 3
        for variable in used:
            assert f"{variable}:#" in light and f"{variable}:#" in dark


def test_the_colours_are_those_of_the_page() -> None:
    light, dark = STYLE.split("@media(prefers-color-scheme:dark)")
    for name, (bright, dim) in drawing.PALETTE.items():
        if name[0] in "rh" and name[1:].isdigit():
            continue  # ramps, which the page does not have
        assert f"--{name}:{bright};" in light.replace("\n", "") + ";"
        assert f"--{name}:{dim};" in dark.replace("\n", "").replace("}", ";") + ";"


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2.1."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    parts = np.array([int(digits[k : k + 2], 16) for k in (0, 2, 4)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("side", [0, 1], ids=["light", "dark"])
def test_lines_and_text_stand_out(side: int) -> None:
    def contrast(one: str, other: str) -> float:
        high, low = sorted((luminance(one), luminance(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    colours = {name: pair[side] for name, pair in drawing.PALETTE.items()}
    for name in [f"s{k}" for k in range(1, 9)] + [f"r{k}" for k in range(1, 8)] + ["soft"]:
        assert contrast(colours[name], colours["card"]) >= 3.0, name
    for k in range(1, 8):
        assert contrast(colours[f"h{k}"], colours["ink"]) >= 4.5, k
    ramp = [luminance(colours[f"r{k}"]) for k in range(1, 8)]
    steps = np.diff(ramp)
    assert (steps < 0).all() or (steps > 0).all()  # ordered without hue


def test_series_differ_without_colour() -> None:
    looks = [drawing.series_look(k) for k in range(64)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 64
    assert len({look["marker"] for look in looks[:8]}) == 8


@pytest.mark.parametrize(
    "names",
    [
        [f"kernel distance ({f} features) on people" for f in ("mobilenet", "pixels", "clip")],
        [f"{tone} skin tone" for tone in ("medium-light", "medium-dark", "dark", "light")],
        [f"a-model-of-a-long-name-{k} (checkpoint {c}, guidance 1)" for k in "ab" for c in (1, 10)],
        [f"{'x' * 30}{k}{'y' * 60}" for k in range(3)],
        [f"{'x' * 60}{k}{'y' * 60}" for k in range(3)],  # what differs is in no end that fits
        ["short", "_short", "x" * 90],
    ],
)
@pytest.mark.parametrize("most", [18, 34, 56])
def test_different_names_stay_different(names: list[str], most: int) -> None:
    found = drawing.shortened([*names, names[0]], most)
    assert len(set(found)) == len(names) and found[-1] == found[0]
    assert all(len(text) <= most + len(" (3)") for text in found)
    short = [name for name in names if len(name) <= most and name[0] != "_"]
    assert set(short) <= set(found)


def shown(svg: str) -> list[str]:
    return [(e.text or "").strip() for e in tree.fromstring(svg).iter(f"{SVG}text")]


def figures(model: str, place: int, **more) -> list[Row]:
    return [
        Row(model, "d", metric, value + 0.1 * place, better, **more)
        for metric, better, value in (("FID", "lower", 20.0), ("recall", "higher", 0.5))
    ]


def test_points_that_look_alike_are_numbered_and_listed() -> None:
    places = [(f"m{k:02d}", g) for k in range(9) for g in (1.0, 2.0)]
    rows = [r for k, (m, g) in enumerate(places) for r in figures(m, k, guidance=g)]
    (plot,) = answer("trade-offs", Results(tuple(rows))).plots.values()
    # Colour tells the guidance, so the ninth model has the marker of the first.
    assert {str(k) for k in range(1, 19)} <= set(shown(plot.svg))
    assert "1 m00 (guidance 1); 2 m00 (guidance 2); " in plot.note
    assert "18 m08 (guidance 2)." in plot.note
    few = [row for row in rows if row.model in ("m00", "m01")]
    (plot,) = answer("trade-offs", Results(tuple(few))).plots.values()
    assert "Numbers: guidance." in plot.note and "m00 (" not in plot.note
    runs = [r for seed in range(3) for r in figures("m", seed, training_seed=seed)]
    (plot,) = answer("trade-offs", Results(tuple(runs))).plots.values()
    assert "Points: 1 m (training seed 0); 2 m (training seed 1); 3 m (training" in plot.note


def test_a_line_joins_what_differs_in_guidance_alone_in_its_order() -> None:
    rows = []
    for seed in (0, 1):
        for at in (1000, 2000):
            for guidance in (4.0, 1.0, 2.0):
                more = {"guidance": guidance, "training_seed": seed, "images_seen": at}
                rows += figures("m", guidance + at + seed / 2, checkpoint=str(at), **more)
    chosen = choose(Results(tuple(rows)), Choice())
    cloud = cloud_of(chosen, "d", [])
    for along, count, size in (("guidance", 4, 3), ("images_seen", 6, 2), ("model", 0, 0)):
        swept = trade_off_drawings._values(cloud, along)
        lines = trade_off_drawings._lines(cloud, along, swept)
        assert len(lines) == count
        for line in lines:
            values = [swept[k] for k in line]
            assert len(line) == size and values == sorted(set(values))
            fixed = "checkpoint" if along == "guidance" else "guidance"
            some = [cloud.subjects[k] for k in line]
            assert len({(getattr(one, fixed), one.training_seed) for one in some}) == 1


def test_a_setting_that_varies_between_models_alone_is_not_swept() -> None:
    rows = [r for k, m in enumerate("abc") for r in figures(m, k, guidance=1.0 + k)]
    (plot,) = answer("trade-offs", Results(tuple(rows))).plots.values()
    assert "Numbers" not in plot.note and "Points" not in plot.note
    with pytest.raises(UserError, match="guidance does not vary within a model on d"):
        answer("trade-offs", Results(tuple(rows)), {"along": "guidance"})


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([31.2511, 31.2513, 31.2515], ["31.2511", "31.2513", "31.2515"]),
        ([1234.0, 1234.5, 1235.0], ["1,234.0", "1,234.5", "1,235.0"]),
        ([-0.05, 0.0, 0.05], ["-0.05", "0.00", "0.05"]),
        ([0.1, 0.2, 0.30000000000000004], ["0.1", "0.2", "0.3"]),
        ([1e6, 1.25e6, 1.5e6], ["1.00M", "1.25M", "1.50M"]),
        ([10.0, 20.0], ["10", "20"]),
        ([2e-5, 4e-5], ["2.0e-05", "4.0e-05"]),
    ],
)
def test_ticks_have_the_digits_of_their_step(values: list[float], texts: list[str]) -> None:
    assert drawing.tick_texts(values) == texts


def test_an_axis_of_close_values_has_ticks_that_differ() -> None:
    with drawing.panels(1) as (figure, axes):
        axes[0, 0].plot([31.2511, 31.2519], [0.0, 1.0])
        drawing.label_axes(axes[0, 0], "x", "y")
        figure.canvas.draw()
        low, high = axes[0, 0].get_xlim()
        ticks = zip(axes[0, 0].get_xticks(), axes[0, 0].get_xticklabels(), strict=True)
        found = {float(t.get_text()): at for at, t in ticks if low <= at <= high}
    assert len(found) >= 3
    assert all(text == pytest.approx(at, abs=1e-7) for text, at in found.items())


def test_data_sets_are_named_once_in_a_row_of_panels_and_whole() -> None:
    sets = ["captions of everyday scenes, validation split", "class names, validation split"]
    rows = [
        Row(m, d, metric, 1.0 + k, "higher", n_generated=9)
        for k, m in enumerate("ab")
        for d in sets
        for metric in ("recall", "density", "DSG")
    ]
    (plot,) = answer("prompt-types", Results(tuple(rows))).plots.values()
    text = " ".join(shown(plot.svg))
    assert text.count("captions of everyday scenes, validation split") == 1
    assert text.count("class names, validation split") == 1


def test_a_radar_has_few_models_and_whole_names_of_groups() -> None:
    groups = [f"{tone} skin tone" for tone in ("medium-light", "medium-dark", "dark")]
    for count, drawn in ((6, True), (7, False)):
        rows = [
            Row(f"m{k}", "d", "FID", 10.0 + k + g, "lower", group=group)
            for k in range(count)
            for g, group in enumerate(groups)
        ]
        plots = answer("groups", Results(tuple(rows))).plots
        assert ("radar-0" in plots) == drawn and "forest-0" in plots
        if drawn:
            text = " ".join(shown(plots["radar-0"].svg))
            assert all(group in text for group in groups)


def test_the_ramp_is_ordered_as_its_values() -> None:
    shades = drawing.ramp([4.0, 1.0, 2.0, 1.0])
    order = [drawing.RAMP.index(shades[value]) for value in (1.0, 2.0, 4.0)]
    assert order == [0, 3, 6]


@pytest.mark.parametrize("signs", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
def test_the_front_line_parts_what_is_dominated(signs: tuple[int, int]) -> None:
    """Every corner of the line that turns inwards is a point of the front; none lies beyond it."""
    rng = np.random.default_rng(0)
    along = rng.random(30)
    best = np.stack([along, 1 - along], axis=1) + 0.1 * rng.random((30, 2))
    points = best * signs
    on = np.array([not ((best >= b).all(1) & (best > b).any(1)).any() for b in best])
    assert 3 < on.sum() < 30
    with drawing.panels(1) as (_, axes):
        panel = axes[0, 0]
        panel.plot(*points.T, "o")
        ends = panel.get_xlim(), panel.get_ylim()
        drawing.front_line(panel, *points[on].T, signs)
        line = np.array(panel.lines[-1].get_xydata())
        assert (panel.get_xlim(), panel.get_ylim()) == ends
    inner, corners = line * signs, {tuple(corner) for corner in line}
    assert {tuple(point) for point in points[on]} <= corners
    for point in best:  # a dominated or a front point is beaten or met by a corner of the line
        assert (inner >= point - 1e-12).all(1).any()
    for point in best[on]:  # and no corner dominates one
        assert not ((inner >= point).all(1) & (inner > point).any(1)).any()


def test_the_ellipse_holds_its_share_of_gaussian_points() -> None:
    rng = np.random.default_rng(1)
    covariance = np.array([[2.0, 0.9], [0.9, 0.8]])
    points = rng.multivariate_normal([3.0, 1.0], covariance, 20_000)
    with drawing.panels(1) as (_, axes):
        drawing.ellipse(axes[0, 0], np.array([3.0, 1.0]), covariance, 0.9, drawing.INK)
        drawn = axes[0, 0].patches[0]
        inside = drawn.get_path().contains_points(
            drawn.get_patch_transform().inverted().transform(points)
        )
    assert inside.mean() == pytest.approx(0.9, abs=0.01)
