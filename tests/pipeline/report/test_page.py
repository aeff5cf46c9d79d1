"""The contact sheet: safe with hostile strings and bytes, complete, true to the output it is read from."""

import base64
import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.report.page import (
    Card,
    CardError,
    ErrorGroup,
    Section,
    SectionStats,
    duration,
    percent,
    picture,
    render,
)
from pipeline.report.reader import read_section
from pipeline.spec.job_spec import JobSpec, SpecError, parse_spec

HOSTILE = """<script>alert("x")</script> <img src=x onerror='y'> & {{ 7 * 7 }} </style>"""
DECODE = CardError("decode", "preprocess", "not an image")


def png(size: tuple[int, int] = (60, 48), color: str = "red", mode: str = "RGB", form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color if mode == "RGB" else 0).save(buffer, form)
    return buffer.getvalue()


def section(*cards: Card, **fields: Any) -> Section:
    return Section(title="job", stats=SectionStats(rows=len(cards)), cards=cards, **fields)


class Page(HTMLParser):
    """What a browser would make of the page: its elements with attributes, and the text outside of script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.script, self._inside = "", "", ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.script += data
        elif self._inside != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_every_untrusted_string_is_escaped():
    error = CardError(HOSTILE, HOSTILE, HOSTILE)
    hostile = replace(
        section(
            Card(HOSTILE, caption=HOSTILE, prompt=HOSTILE),
            Card(HOSTILE, caption=HOSTILE, prompt="another", truth="something else", finish_reason=HOSTILE),
            Card(HOSTILE, caption=HOSTILE, truth=HOSTILE),
            Card(HOSTILE, error=error),
            subtitle=HOSTILE,
            note=HOSTILE,
        ),
        title=HOSTILE,
        stats=SectionStats(rows=4, errors=(ErrorGroup(error, 1),)),
    )
    html = render([hostile, hostile], title=HOSTILE, subtitle=HOSTILE)
    page = Page(html)
    assert len(page.all("script")) == 1
    assert "alert" not in page.script
    assert not page.all("img")
    assert not [
        attribute for _, attributes in page.elements for attribute in attributes if attribute.startswith("on")
    ]
    assert page.text.count(HOSTILE) >= 20
    assert "49" not in page.text


@given(st.text(min_size=1), st.text())
def test_any_text_arrives_as_it_was(caption: str, prompt: str):
    html = render([section(Card("a:0", caption=caption), Card("a:1", caption="c", prompt=prompt))], title="t")
    page = Page(html)
    assert caption in page.text
    assert prompt in page.text
    assert len(page.all("article")) == 2
    assert len(page.all("script")) == 1


def test_the_page_needs_nothing_but_itself():
    html = render(
        [section(Card("a:0", (png(),), caption="c"), Card("a:1", (png((900, 600)),), caption="c"))], "t"
    )
    page = Page(html)
    sources = [str(attributes["src"]) for attributes in page.all("img")]
    assert [source.partition(";")[0] for source in sources] == ["data:image/png", "data:image/jpeg"]
    assert not page.all("link")
    assert not re.findall(r"""(?:https?:)?//[a-z]""", re.sub(r"//.*", "", page.script))
    assert "url(" not in html
    assert "@import" not in html


def test_the_policy_allows_this_script_only():
    page = Page(render([section()], title="t"))
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (None, "no image bytes"),
        (b"", "no image bytes"),
        (b"GIF89a", "not a picture"),
        (png()[:50], "not a picture"),
        (b"<svg onload='alert(1)'/>", "not a picture"),
    ],
)
def test_what_cannot_be_shown_is_a_card_all_the_same(data: bytes | None, problem: str):
    assert picture(data).problem == problem
    page = Page(render([section(Card("a:0", (data,), error=DECODE))], title="t"))
    assert problem in page.text
    assert "not an image" in page.text
    assert not page.all("img")


@given(st.binary(max_size=200))
def test_no_bytes_break_the_page(data: bytes):
    assert (picture(data).uri is None) == bool(picture(data).problem)


def test_thumbnails_are_small_and_small_pictures_crisp():
    large, small = picture(png((3000, 1000))), picture(png((60, 48)))
    assert large.size == (3000, 1000)
    assert not large.crisp
    assert Image.open(io.BytesIO(base64.b64decode(str(large.uri).partition(",")[2]))).size == (400, 133)
    assert small.crisp
    assert Image.open(io.BytesIO(base64.b64decode(str(small.uri).partition(",")[2]))).size == (60, 48)
    assert picture(png((3000, 1000)), max_pixels=1_000_000).problem == "3000 × 1000 is too large to show"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_any_mode_is_shown(mode: str):
    assert picture(png(mode=mode)).uri
    assert picture(png(mode="CMYK", form="JPEG")).uri


def test_verdicts():
    assert Card("", caption="a  b ", truth="a b").verdict == "right"
    assert Card("", caption="a b", truth="a c").verdict == "wrong"
    assert Card("", caption="a b").verdict == "unjudged"
    assert Card("", truth="a c", error=DECODE).verdict == "error"
    marked = Card(
        "", caption="a red circle on a black background", truth="a blue circle on a gray background"
    )
    assert list(marked.marked_caption()) == [
        ("a", False),
        ("red", True),
        ("circle on a", False),
        ("black", True),
        ("background", False),
    ]


def test_several_jobs_on_one_page():
    stats = SectionStats(
        rows=100, errors=(ErrorGroup(DECODE, 3),), judged=97, right=97, generated_tokens=500, seconds=50.0
    )
    card = Card("a:0", caption="a", truth="a", prompt="Describe it.")
    sections = [Section(name, stats, (card, replace(card, label="a:1"))) for name in ("Aria", "Fuyu")]
    page = Page(render(sections, title="t"))
    assert [a["href"] for a in page.all("a")] == ["#section-1", "#section-2"]
    assert [a["data-show"] for a in page.all("button")] == ["all", "right"]
    assert page.text.count("Describe it.") == 2  # once a section, not on every card
    total = dict((sections[0].stats + sections[1].stats).tiles())
    assert total == {
        "rows": "200",
        "true": "100 %",
        "errors": "6",
        "rows/s": "2",
        "tokens in": "0",
        "tokens out": "1,000",
        "duration": "1 min 40 s",
    }


def test_numbers_for_people():
    assert [duration(s) for s in (0.04, 59.9, 61, 3725)] == ["0.0 s", "59.9 s", "1 min 01 s", "1 h 02 min"]
    assert [percent(p, 1000) for p in (1000, 999, 950, 5)] == ["100 %", "99.9 %", "95 %", "0.5 %"]
    assert percent(199_999, 200_000) == "99.9 %"


# From an output


def write_job(
    folder: Path,
    shards: int,
    rows: int,
    cell: Callable[[bytes], object] = lambda data: {"bytes": data, "path": None},
) -> JobSpec:
    """An input, and the output of a finished job: row 7 of each shard wrong, the last row an error."""
    for shard in range(shards):
        name = f"deep/part-{shard}.parquet"
        colors = [(shard * 40 % 256, row * 20 % 256, 0) for row in range(rows)]
        images = []
        for color in colors:
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8), color).save(buffer, "PNG")
            images.append(cell(buffer.getvalue()))
        truths = [f"{shard} {row}" for row in range(rows)]
        captions = [None if r == rows - 1 else "no" if r == 7 else truth for r, truth in enumerate(truths)]
        error = {"kind": "decode", "stage": "preprocess", "message": f"shard {shard}"}
        result = {
            "truth": truths,
            "caption": captions,
            "finish_reason": ["error" if caption is None else "stop" for caption in captions],
            "prompt_tokens": [0 if caption is None else 10 for caption in captions],
            "image_tokens": [0 if caption is None else 8 for caption in captions],
            "generated_tokens": [0 if caption is None else 2 for caption in captions],
            "error": [error if caption is None else None for caption in captions],
        }
        for path, table, row_group in (
            (folder / "in" / name, {"image": images, "title": truths}, 4),
            (folder / "out" / "data" / name, result, 64),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(table), path, row_group_size=row_group)
    return parse_spec(
        {
            "name": "toys",
            "input": {"path": str(folder / "in")},
            "prompt": {"template": "What is {title}?"},
            "model": {"path": "some/model"},
            "output": {"path": str(folder / "out")},
        }
    )


def color_of(card: Card) -> tuple[int, ...]:
    assert card.images[0] is not None
    pixel = Image.open(io.BytesIO(card.images[0])).getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return pixel


def test_a_section_shows_each_row_with_its_own_picture(tmp_path: Path):
    found = read_section(write_job(tmp_path, shards=3, rows=20), truth="truth", limit=12, seconds=2.0)
    assert (found.title, found.subtitle, found.note) == ("toys", "some/model", "")
    assert found.stats == SectionStats(
        rows=60,
        errors=(ErrorGroup(CardError("decode", "preprocess", "shard 0"), 3),),
        judged=57,
        right=54,
        prompt_tokens=570,
        generated_tokens=114,
        seconds=2.0,
    )
    labels = [card.label.rpartition("/")[2] for card in found.cards]
    assert labels == [f"part-{shard}:{row}" for shard in range(3) for row in (0, 1, 7, 19)]
    for card in found.cards:
        shard, row = (int(part) for part in str(card.truth).split())
        assert color_of(card) == (shard * 40, row * 20 % 256, 0)
        assert card.prompt == f"What is {shard} {row}?"
    assert [card.verdict for card in found.cards] == ["right", "right", "wrong", "error"] * 3
    assert render([found], title="t").count("<article") == 12


@pytest.mark.parametrize(
    ("cell", "images"),
    [
        (lambda data: data, 1),
        (lambda data: [data, data], 2),
        (lambda data: [{"bytes": data, "path": "x"}], 1),
    ],
    ids=["bytes", "list of bytes", "list of structs"],
)
def test_every_form_of_the_image_column(tmp_path: Path, cell: Callable[[bytes], object], images: int):
    found = read_section(write_job(tmp_path, shards=1, rows=5, cell=cell))
    assert [color_of(card)[1] for card in found.cards] == [0, 20, 40, 60, 80]
    assert {len(card.images) for card in found.cards} == {images}


def test_a_video_is_shown_by_its_frames(tmp_path: Path):
    spec = write_job(tmp_path, shards=1, rows=5, cell=lambda data: [data] * 5)
    fields = spec.input.model_copy(update={"image": None, "video": "image", "max_frames": 3})
    found = read_section(spec.model_copy(update={"input": fields}))
    assert [color_of(card)[1] for card in found.cards] == [0, 20, 40, 60, 80]
    assert {len(card.images) for card in found.cards} == {3}


def test_images_by_path_come_from_beside_the_shard_and_nowhere_else(tmp_path: Path):
    spec = write_job(tmp_path, shards=1, rows=4)
    (tmp_path / "in" / "deep" / "a.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png())
    paths = ["a.png", "../../secret.png", str(tmp_path / "secret.png"), "missing.png"]
    cells = [{"bytes": None, "path": path} for path in paths]
    table = pa.table({"image": cells, "title": paths})
    pq.write_table(table, tmp_path / "in" / "deep" / "part-0.parquet")
    found = read_section(spec, limit=4)
    assert [card.images[0] is not None for card in found.cards] == [True, False, False, False]


def test_a_truth_that_is_no_column_is_told_with_those_that_are(tmp_path: Path):
    with pytest.raises(
        SpecError, match="--truth: the output has no column 'truht'; it has truth, .*did you mean 'truth'"
    ):
        read_section(write_job(tmp_path, shards=1, rows=4), truth="truht")


def test_a_running_job_shows_what_is_sealed(tmp_path: Path):
    spec = write_job(tmp_path, shards=3, rows=8)
    (tmp_path / "out" / "data" / "deep" / "part-1.parquet").unlink()
    found = read_section(spec, limit=100)
    assert found.stats.rows == 16
    assert len(found.cards) == 16


def test_of_many_shards_some_are_read_and_the_page_says_so(tmp_path: Path):
    found = read_section(write_job(tmp_path, shards=6, rows=3), limit=4, max_shards=2)
    assert found.note == "from 2 of 6 sealed shards"
    assert {card.label.partition(":")[0] for card in found.cards} == {"deep/part-0", "deep/part-3"}


def test_shards_that_cannot_be_read_are_named(tmp_path: Path):
    spec = write_job(tmp_path, shards=2, rows=8)
    (tmp_path / "in" / "deep" / "empty.parquet").write_bytes(b"")
    sealed = tmp_path / "out" / "data" / "deep" / "part-1.parquet"
    table = pq.read_table(sealed)
    unread = {"kind": "read", "stage": "read", "message": "row group 1: no pages"}
    errors = pa.array([unread if row > 3 else None for row in range(8)], table.schema.field("error").type)
    pq.write_table(table.set_column(table.schema.get_field_index("error"), "error", errors), sealed)
    path = tmp_path / "in" / "deep" / "part-1.parquet"
    data = bytearray(path.read_bytes())
    group = pq.read_metadata(path).row_group(1)
    start = min(group.column(index).data_page_offset for index in range(group.num_columns))
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)

    found = read_section(spec, limit=100)
    folder = tmp_path / "in" / "deep"
    assert found.note == (
        f"2 shards failed: {folder}/empty.parquet is empty (0 bytes), "
        f"{folder}/part-1.parquet has 4 of 8 rows that cannot be read (row group 1: no pages)"
    )
    assert [bool(card.images) for card in found.cards] == [True] * 12 + [False] * 4
    assert all(card.error == CardError(**unread) and card.prompt is None for card in found.cards[12:])
    assert found.note.partition(" ")[2] in render([found], title="t")


def test_a_truth_column_the_output_lacks_is_named(tmp_path: Path):
    with pytest.raises(SpecError, match="no column 'answer'"):
        read_section(write_job(tmp_path, shards=1, rows=3), truth="answer")
