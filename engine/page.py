"""The run's page: one HTML file that grows while a job runs and can be sent to anybody.

Called by rank 0 of training, practice, evaluation, studies and the demo. Every section is kept in
`<folder>/page/` as JSON and PNG files, one JSON per section, so a resumed job continues the page
and several jobs can write to one; `write` assembles them into `<folder>/page.html`, which holds
its pictures, charts and style and asks no server for anything.
"""

import base64
import html
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from etude.core.log import number

from . import page_vote
from .page_style import SCRIPT, STYLE
from .pictures import picture_grid, png, side_by_side, terminal_picture
from .plots import bar_chart, line_chart, map_chart

__all__ = ["Page", "picture_grid", "terminal_picture"]

REFRESH_SECONDS = 15
SHOWN_GRIDS = 12  # grids over time that are embedded; all of them stay in the folder
STATES = ("running", "finished", "stopped", "failed")


class Page:
    """A page of ordered sections; each call replaces one section, `write` publishes the file.

    Every section method takes `order`: sections are sorted by it, equal ones by first appearance.
    A section keeps its order when a later call leaves it out. Identifiers are lower-case words
    joined by hyphens and become the section's anchor in the page.
    """

    def __init__(self, folder: Path | str, title: str = "", subtitle: str = "") -> None:
        """Opens or continues the page of `folder`; an empty title or subtitle keeps the old one."""
        self.folder = Path(folder)
        self.parts = self.folder / "page"
        self.parts.mkdir(parents=True, exist_ok=True)
        head = self._read("head") or {"title": "", "subtitle": "", "state": {}}
        head |= {k: v for k, v in (("title", title), ("subtitle", subtitle)) if v}
        self._store("head", head)

    def state(
        self,
        status: str,
        images_seen: int | None = None,
        total: int | None = None,
        seconds: float | None = None,
        detail: str = "",
    ) -> None:
        """The line below the title.

        Args:
            status: "running" (the page then reloads itself), "finished", "stopped" or "failed".
            images_seen: progress in images; with `total`, drawn as a bar.
            seconds: time spent on the job, all its starts together.
            detail: a few words, for example the job of a study that runs now.
        """
        if status not in STATES:
            raise ValueError(f"status must be one of {', '.join(STATES)}, not {status!r}")
        state = {"status": status, "images_seen": images_seen, "total": total}
        state |= {"seconds": seconds, "detail": detail}
        self._store("head", self._read("head") | {"state": state})

    def chapter(self, id: str, title: str, text: str = "", order: float | None = None) -> None:
        """A heading that groups the sections after it, linked from the top of the page."""
        self._section(id, "chapter", title, {"text": text}, order)

    def grid(
        self,
        id: str,
        title: str,
        image: np.ndarray,
        caption: str = "",
        step_label: str = "",
        order: float | None = None,
    ) -> None:
        """One picture, usually a grid of samples; the newest large, the earlier ones as a strip.

        Args:
            image: (H, W, 3) uint8, for example from `picture_grid`.
            step_label: when it was drawn, for example "12,800 images"; drawing the same label again
                (after a resume) replaces that picture.
        """
        history = (self._read(id) or {}).get("history", [])
        labels = [entry["label"] for entry in history]
        place = labels.index(step_label) if step_label in labels else len(history)
        name = f"{id}.{place:04d}.png"
        self._publish(self.parts / name, png(image))
        history[place:] = [{"label": step_label, "caption": caption, "file": name}] + history[
            place + 1 :
        ]
        self._section(id, "grid", title, {"history": history}, order)

    def pairs(
        self,
        id: str,
        title: str,
        samples: np.ndarray,
        nearest: np.ndarray,
        distances: Sequence[float],
        note: str = "Left: drawn by the model. Right: the nearest training picture. "
        "Below: their distance.",
        order: float | None = None,
    ) -> None:
        """Each sample with the nearest training picture beside it.

        Args:
            samples, nearest: (N, H, W, C) uint8.
            distances: N numbers, shown below the pairs in the unit that `note` names.
        """
        if not len(samples) == len(nearest) == len(distances):
            raise ValueError("pairs: samples, nearest and distances differ in length")
        files = []
        for place, (left, right) in enumerate(zip(samples, nearest, strict=True)):
            files.append(f"{id}.{place:04d}.png")
            self._publish(self.parts / files[-1], png(side_by_side(left, right)))
        body = {"files": files, "distances": [float(d) for d in distances], "note": note}
        self._section(id, "pairs", title, body, order)

    def curve(
        self,
        id: str,
        title: str,
        series: dict[str, tuple[Sequence[float], Sequence[float]]],
        xlabel: str,
        ylabel: str,
        log: bool = False,
        note: str = "",
        order: float | None = None,
        *,
        log_x: bool = False,
    ) -> None:
        """Lines, name -> (x, y); the whole series each time. More than 40 points are smoothed."""
        kept = {name: [_numbers(x), _numbers(y)] for name, (x, y) in series.items()}
        chart = {"series": kept, "xlabel": xlabel, "ylabel": ylabel, "log": log, "note": note}
        self._section(id, "curve", title, chart | {"log_x": log_x}, order)

    def map(
        self,
        id: str,
        title: str,
        x: Sequence[float],
        y: Sequence[float],
        values: Sequence[Sequence[float]],
        xlabel: str,
        ylabel: str,
        note: str = "",
        order: float | None = None,
    ) -> None:
        """Values (len(y), len(x)) over a logarithmic x and a y, coloured by their sign."""
        chart = {"x": _numbers(x), "y": _numbers(y), "values": [_numbers(row) for row in values]}
        chart |= {"xlabel": xlabel, "ylabel": ylabel, "note": note}
        self._section(id, "map", title, chart, order)

    def bars(
        self,
        id: str,
        title: str,
        labels: Sequence[str],
        series: dict[str, Sequence[float]],
        xlabel: str,
        ylabel: str,
        intervals: dict[str, Sequence[tuple[float, float]]] | None = None,
        note: str = "",
        order: float | None = None,
    ) -> None:
        """Groups of bars, one value of every series per label, with optional (low, high) whiskers.

        For example the held-out loss per noise-level bin, raw beside EMA weights.
        """
        spans = {
            name: [_numbers(pair) for pair in pairs] for name, pairs in (intervals or {}).items()
        }
        chart = {
            "labels": [str(label) for label in labels],
            "series": {name: _numbers(values) for name, values in series.items()},
            "intervals": spans,
            "xlabel": xlabel,
            "ylabel": ylabel,
            "note": note,
        }
        self._section(id, "bars", title, chart, order)

    def table(
        self,
        id: str,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[object]],
        note: str = "",
        order: float | None = None,
    ) -> None:
        """A table; floats are shortened to four digits, everything else is shown as `str`."""
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(
                    f"table '{id}': a row has {len(row)} cells for {len(columns)} columns"
                )
        cells = [[_cell(value) for value in row] for row in rows]
        body = {"columns": list(columns), "rows": cells, "note": note}
        self._section(id, "table", title, body, order)

    def vote(
        self,
        id: str,
        title: str,
        prompts: Sequence[str],
        pictures: dict[str, np.ndarray],
        order: float | None = None,
    ) -> None:
        """A blind vote between makers of pictures; pictures (prompts, H, W, 3) uint8 by maker."""
        files = []
        for place, images in enumerate(pictures.values()):
            files.append([f"{id}.{place:02d}-{number:02d}.png" for number in range(len(images))])
            for name, image in zip(files[-1], images, strict=True):
                self._publish(self.parts / name, png(image))
        body = {"prompts": list(prompts), "makers": list(pictures), "files": files}
        self._section(id, "vote", title, body, order)

    def drawing(
        self, id: str, title: str, svg: str, note: str = "", order: float | None = None
    ) -> None:
        """A finished drawing: SVG text of one of our own plots, which is embedded as it is."""
        self._section(id, "drawing", title, {"svg": svg, "note": note}, order)

    def note(self, id: str, text: str, title: str = "", order: float | None = None) -> None:
        """A paragraph of plain text; a blank line starts another. Markup is shown, not obeyed."""
        self._section(id, "note", title, {"text": text}, order)

    def write(self) -> Path:
        """Assembles `<folder>/page.html` from the stored sections and publishes it by rename."""
        path = self.folder / "page.html"
        self._publish(path, self.render().encode())
        return path

    def render(self) -> str:
        """The whole page as HTML."""
        head, sections = self._read("head"), self._sections()
        chapters = [s for s in sections if s["kind"] == "chapter"]
        running = head["state"].get("status") == "running"
        refresh = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">' if running else ""
        links = "".join(f'<a href="#{s["id"]}">{_escape(s["title"])}</a>' for s in chapters)
        body = "\n".join(self._render_section(section) for section in sections)
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"{refresh}<title>{_escape(head['title'])}</title>"
            f"<style>{STYLE}{page_vote.STYLE}</style></head>\n<body>"
            f"<header><h1>{_escape(head['title'])}</h1>"
            f'<p class="subtitle">{_escape(head["subtitle"])}</p>{_state_line(head["state"])}'
            f"{f'<nav>{links}</nav>' if links else ''}</header>\n<main>\n{body}\n</main>\n"
            f"<footer>Etude</footer><script>{SCRIPT}{page_vote.SCRIPT}</script></body></html>\n"
        )

    def _section(self, id: str, kind: str, title: str, body: dict, order: float | None) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", id) or id == "head":
            raise ValueError(
                f"section id {id!r}: use lower-case words joined by hyphens, not 'head'"
            )
        old = self._read(id)
        if old and old["kind"] != kind:
            raise ValueError(f"section '{id}' of {self.folder} is a {old['kind']}, not a {kind}")
        if old:
            order, number = old["order"] if order is None else order, old["number"]
        else:
            number = 1 + max((s["number"] for s in self._sections()), default=0)
        head = {"id": id, "kind": kind, "title": title, "order": order or 0, "number": number}
        self._store(id, head | body)

    def _sections(self) -> list[dict]:
        names = sorted(p.stem for p in self.parts.glob("*.json") if p.stem != "head")
        found = [section for section in map(self._read, names) if section]
        return sorted(found, key=lambda s: (s["order"], s["number"]))

    def _render_section(self, section: dict) -> str:
        inner = getattr(self, f"_render_{section['kind']}")(section)
        if section["kind"] == "chapter":
            return inner
        title = f"<h3>{_escape(section['title'])}</h3>" if section["title"] else ""
        return f'<section id="{section["id"]}" class="{section["kind"]}">{title}{inner}</section>'

    def _render_chapter(self, section: dict) -> str:
        text = _paragraphs(section["text"])
        title = f"<h2>{_escape(section['title'])}</h2>"
        return f'<div class="chapter" id="{section["id"]}">{title}{text}</div>'

    def _render_grid(self, section: dict) -> str:
        history = section["history"]
        picks = np.unique(np.linspace(0, len(history) - 1, SHOWN_GRIDS).round().astype(int))
        shown = [history[k] for k in picks]
        newest = shown[-1]
        caption = f"<b>{_escape(newest['label'])}</b> <span>{_escape(newest['caption'])}</span>"
        # The script only swaps sources that are already in the page, so nothing is stored twice.
        source, alt = self._uri(newest["file"]), _escape(section["title"])
        large = f'<img class="large" alt="{alt}" src="{source}">'
        figure = f"<figure>{large}<figcaption>{caption}</figcaption></figure>"
        if len(shown) == 1:
            return figure
        strip = "".join(self._thumb(entry) for entry in shown[:-1])
        button = '<button type="button" class="play">Play</button>'
        strip = f'<div class="strip">{strip}</div>{button}'
        return f'{figure}<div class="history">{strip}</div>'

    def _thumb(self, entry: dict) -> str:
        label, caption = _escape(entry["label"]), _escape(entry["caption"])
        return (
            f'<figure tabindex="0" data-caption="{caption}"><img alt="{label}" '
            f'src="{self._uri(entry["file"])}"><figcaption>{label}</figcaption></figure>'
        )

    def _render_pairs(self, section: dict) -> str:
        items = "".join(
            f'<figure><img alt="sample and nearest training picture" src="{self._uri(name)}">'
            f"<figcaption>{number(float(f'{distance:.3g}'))}</figcaption></figure>"
            for name, distance in zip(section["files"], section["distances"], strict=True)
        )
        return f'<div class="row">{items}</div>{_paragraphs(section["note"])}'

    def _render_curve(self, section: dict) -> str:
        series = {n: (_floats(x), _floats(y)) for n, (x, y) in section["series"].items()}
        chart = line_chart(
            series,
            section["xlabel"],
            section["ylabel"],
            section["log"],
            section["id"],
            log_x=section.get("log_x", False),
        )
        return chart + _paragraphs(section["note"])

    def _render_map(self, section: dict) -> str:
        values = [_floats(row) for row in section["values"]]
        axes = (section["xlabel"], section["ylabel"], section["id"])
        chart = map_chart(section["x"], section["y"], values, *axes)
        return chart + _paragraphs(section["note"])

    def _render_bars(self, section: dict) -> str:
        series = {name: _floats(values) for name, values in section["series"].items()}
        spans = {n: [tuple(_floats(p)) for p in pairs] for n, pairs in section["intervals"].items()}
        chart = bar_chart(
            section["labels"], series, section["xlabel"], section["ylabel"], spans, section["id"]
        )
        return chart + _paragraphs(section["note"])

    def _render_table(self, section: dict) -> str:
        columns, rows = section["columns"], section["rows"]
        right = [
            bool(rows) and all(_is_number(row[k]) for row in rows) for k in range(len(columns))
        ]
        kinds = [' class="n"' if r else "" for r in right]
        head = "".join(f"<th{k}>{_escape(c)}</th>" for k, c in zip(kinds, columns, strict=True))
        body = "".join(
            "<tr>"
            + "".join(f"<td{k}>{_escape(c)}</td>" for k, c in zip(kinds, row, strict=True))
            + "</tr>"
            for row in rows
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f'<div class="scroll">{table}</div>{_paragraphs(section["note"])}'

    def _render_vote(self, section: dict) -> str:
        return page_vote.vote_html(
            section["id"], section["prompts"], section["makers"], section["files"], self._uri
        )

    def _render_drawing(self, section: dict) -> str:
        # HTML needs no namespaces, and the page asks nobody for anything.
        svg = re.sub(r' xmlns="[^"]+"', "", section["svg"], count=1)
        return svg + _paragraphs(section["note"])

    def _render_note(self, section: dict) -> str:
        return _paragraphs(section["text"])

    def _uri(self, name: str) -> str:
        data = base64.b64encode((self.parts / name).read_bytes()).decode()
        return f"data:image/png;base64,{data}"

    def _read(self, name: str) -> dict | None:
        path = self.parts / f"{name}.json"
        try:
            return json.loads(path.read_text("utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None  # absent, or emptied by a power cut: the section is drawn again

    def _store(self, name: str, content: dict) -> None:
        self._publish(self.parts / f"{name}.json", json.dumps(content, allow_nan=False).encode())

    @staticmethod
    def _publish(path: Path, data: bytes) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(data)
        os.replace(temporary, path)  # a reader sees the old file or the new one, never a part


def _state_line(state: dict) -> str:
    if not state:
        return ""
    parts = [f'<span class="pill {state["status"]}">{state["status"]}</span>']
    seen, total = state["images_seen"], state["total"]
    if seen is not None:
        of = f" of {total:,}" if total else ""
        parts.append(f"<span>{seen:,}{of} images seen</span>")
    if state["seconds"] is not None:
        parts.append(f"<span>{_duration(state['seconds'])}</span>")
    if state["detail"]:
        parts.append(f"<span>{_escape(state['detail'])}</span>")
    share = 100.0 * min(seen / total, 1.0) if seen is not None and total else None
    bar = (
        f'<div class="progress"><i style="width:{share:.1f}%"></i></div>'
        if share is not None
        else ""
    )
    return f'<p class="state">{"".join(parts)}</p>{bar}'


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _numbers(values: Sequence[float]) -> list[float | None]:
    """JSON has no NaN: a value that is not finite is stored as null."""
    return [v if np.isfinite(v) else None for v in map(float, values)]


def _floats(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if v is None else v for v in values]


def _cell(value: object) -> str:
    return number(float(value)) if isinstance(value, float | np.floating) else str(value)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+0-9.,eM%±\[\] ]*\d[-+0-9.,eM%±\[\] ]*|-|", text) is not None


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{_escape(p)}</p>" for p in re.split(r"\n\s*\n", text) if p.strip())


def _escape(text: str) -> str:
    return html.escape(str(text), quote=True)
