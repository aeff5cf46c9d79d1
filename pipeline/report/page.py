"""The contact sheet: pictures with their captions and errors, on one HTML page that needs nothing else.

Why: token parity and error counts do not show whether captions are any good; a page of pictures does, in
seconds. It is read on laptops, mailed and archived, so it holds its pictures (as small thumbnails), styles
and script in itself and asks the network for nothing.

`render` is a pure function of plain values; `pipeline.report.reader` fills them from an
output. Captions, prompts, messages and image bytes are whatever a data set or a model produced: every string
is escaped by the template, image bytes are decoded under a pixel limit and re-encoded, and a content security
policy names the page's own script by its hash, so that nothing else runs.

>>> card = Card(label="a.parquet:0", caption="a red circle", truth="a red circle")
>>> page = render([Section(title="demo", stats=SectionStats(rows=1), cards=(card,))], title="Tessera")
"""

from __future__ import annotations

import base64
import difflib
import functools
import hashlib
import importlib.resources
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import jinja2
from PIL import Image

from actors.images.formats import PILLOW
from actors.images.opening import open_image

Verdict = Literal["right", "wrong", "error", "unjudged"]

_THUMBNAIL_SIDE = 400  # pixels: twice the 190 or so a picture takes on the page, for dense displays
_CRISP_SIDE = 160  # pixels: smaller pictures are enlarged on the page without smoothing
_MAX_PIXELS = 178_956_970  # as in a job spec's limits
_PICTURES_A_CARD = 4


@dataclass(frozen=True, slots=True)
class CardError:
    """A row's error, as in the output's `error` column."""

    kind: str
    stage: str
    message: str


@dataclass(frozen=True, slots=True)
class Card:
    """One row, which has a caption or an error; `label` says which row it is (`shard:row`).

    `images` are encoded files, None where the bytes could not be had; `truth` is the caption hoped for.
    """

    label: str
    images: tuple[bytes | None, ...] = ()
    caption: str | None = None
    prompt: str | None = None
    truth: str | None = None
    error: CardError | None = None
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    image_tokens: int = 0
    generated_tokens: int = 0

    @property
    def verdict(self) -> Verdict:
        """Captions are compared with the truth word for word, whatever the spacing."""
        if self.error is not None:
            return "error"
        if self.truth is None:
            return "unjudged"
        return "right" if (self.caption or "").split() == self.truth.split() else "wrong"

    def marked_caption(self) -> Iterator[tuple[str, bool]]:
        """The caption in pieces, each with whether it departs from the truth."""
        words, expected = (self.caption or "").split(), (self.truth or "").split()
        for operation, start, stop, _, _ in difflib.SequenceMatcher(None, words, expected).get_opcodes():
            if start < stop:
                yield " ".join(words[start:stop]), operation != "equal"


@dataclass(frozen=True, slots=True)
class ErrorGroup:
    """How many rows failed alike; `message` is one of theirs."""

    error: CardError
    rows: int


@dataclass(frozen=True, slots=True)
class SectionStats:
    """What a job did. `judged` rows have a truth and no error, `right` of them say it."""

    rows: int
    errors: tuple[ErrorGroup, ...] = ()
    judged: int = 0
    right: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float | None = None

    @property
    def failed(self) -> int:
        return sum(group.rows for group in self.errors)

    def __add__(self, other: SectionStats) -> SectionStats:
        known = self.seconds is not None and other.seconds is not None
        return SectionStats(
            rows=self.rows + other.rows,
            errors=self.errors + other.errors,
            judged=self.judged + other.judged,
            right=self.right + other.right,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            generated_tokens=self.generated_tokens + other.generated_tokens,
            seconds=(self.seconds or 0) + (other.seconds or 0) if known else None,
        )

    def tiles(self) -> Iterator[tuple[str, str]]:
        """(label, value) pairs, for people."""
        yield "rows", f"{self.rows:,}"
        if self.judged:
            yield "true", percent(self.right, self.judged)
        yield "errors", f"{self.failed:,}"
        if self.seconds:
            yield "rows/s", rate(self.rows / self.seconds)
        yield "tokens in", f"{self.prompt_tokens:,}"
        yield "tokens out", f"{self.generated_tokens:,}"
        if self.seconds is not None:
            yield "duration", duration(self.seconds)


@dataclass(frozen=True, slots=True)
class Section:
    """One job on the page; `subtitle` is usually its model, `note` a line under the figures."""

    title: str
    stats: SectionStats
    cards: tuple[Card, ...]
    subtitle: str = ""
    note: str = ""

    @property
    def prompt(self) -> str | None:
        """The prompt, where every card has the same one."""
        prompts = {card.prompt for card in self.cards}
        return prompts.pop() if len(prompts) == 1 else None


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as the page shows it: a `data:` URI, or None with the reason in `problem`."""

    uri: str | None
    size: tuple[int, int] | None = None  # (width, height) of the original
    crisp: bool = False
    problem: str = ""


def render(sections: Sequence[Section], title: str, subtitle: str = "") -> str:
    """The page, as one self-contained HTML document."""
    total = functools.reduce(
        SectionStats.__add__, (section.stats for section in sections), SectionStats(rows=0, seconds=0)
    )
    verdicts = [card.verdict for section in sections for card in section.cards]
    script = _resource("report.js")
    return _template().render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        total=total,
        counts={
            verdict: verdicts.count(verdict) for verdict in ("right", "wrong", "error") if verdict in verdicts
        },
        cards=len(verdicts),
        pictures_a_card=_PICTURES_A_CARD,
        style=_resource("report.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def picture(data: bytes | None, max_pixels: int = _MAX_PIXELS) -> Picture:
    """A thumbnail of an encoded image: PNG where so small that it is enlarged, else JPEG; never raises."""
    if not data:
        return Picture(None, problem="no image bytes")
    try:
        with open_image(data, tuple(PILLOW)) as image:
            width, height = image.size
            if width * height > max_pixels:
                return Picture(None, problem=f"{width} × {height} is too large to show")
            image.draft("RGB", (_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
            # Transparency is dropped and EXIF orientation left alone: the page shows what the model saw.
            shown = image.convert("RGB")
        shown.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
        crisp = max(width, height) <= _CRISP_SIDE
        buffer = io.BytesIO()
        if crisp:
            shown.save(buffer, "PNG", optimize=True)
        else:
            shown.save(buffer, "JPEG", quality=82, optimize=True)
    except Exception:  # these are arbitrary bytes, and Pillow's decoders raise far more than OSError on them
        return Picture(None, problem="not a picture")
    kind = "png" if crisp else "jpeg"
    return Picture(
        f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", (width, height), crisp
    )


def percent(part: int, whole: int) -> str:
    """`99.6 %`; 100 only when it is all of them."""
    value = 100 * part / whole
    return f"{min(value, 99.9) if part < whole else value:.3g} %"


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """`8.2 s`, `3 min 04 s` or `5 h 12 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def _resource(name: str) -> str:
    return (
        importlib.resources.files("pipeline.report").joinpath("templates", name).read_text(encoding="utf-8")
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.globals["picture"] = picture
    environment.filters["thousands"] = lambda value: f"{value:,}"
    return environment.from_string(_resource("report.html"))
