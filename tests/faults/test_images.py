"""Pictures from strangers, through a whole job: each costs its own row, and says why."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.blocks import picture, scan_bomb
from tests.commands import options, tessera

SPEC = "examples/llava_onevision.yaml"


def encoded(file_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (60, 50), "green").save(buffer, file_format)
    return buffer.getvalue()


def test_hostile_and_oversized_pictures_cost_their_rows(tmp_path: Path, ray_address: str) -> None:
    (tmp_path / "in").mkdir()
    large = picture() + bytes(25_000)
    (tmp_path / "in/large.png").write_bytes(large)
    pictures = [encoded("AVIF"), encoded("EPS"), encoded("PDF"), scan_bomb(40_000)[:4000], large, None]
    cells = [{"bytes": data, "path": None if data else "large.png"} for data in pictures]
    rows = {"id": [str(n) for n in range(6)], "truth": [""] * 6, "prompt": ["What is it?"] * 5 + [None]}
    image = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({**rows, "image": image}), tmp_path / "in/a.parquet")
    out = tmp_path / "out"
    arguments = options(tmp_path, limits__max_image_bytes=20000, limits__max_failed_fraction=1)
    assert tessera("run", SPEC, *arguments, RAY_ADDRESS=ray_address).code == 0

    def errors() -> list[tuple[str, str]]:
        found = pq.read_table(out / "data/a.parquet")["error"].to_pylist()
        return [(error["kind"], error["message"]) if error else ("", "") for error in found]

    told = errors()
    assert [kind for kind, _ in told] == ["", "decode", "decode", "decode", "too_large", "too_large"]
    assert "the image is eps, which is not among limits.formats" in told[1][1]
    assert "the image is pdf" in told[2][1] and "scans; more than 100 are not decoded" in told[3][1]
    assert "above limits.max_image_bytes=20000" in told[4][1] and "'large.png'" in told[5][1]

    raised = ["--set=limits.max_image_bytes=40000", "--only=too_large"]
    assert tessera("retry", out, *raised, RAY_ADDRESS=ray_address).code == 0
    told = errors()
    assert [kind for kind, _ in told] == ["", "decode", "decode", "decode", "", "prompt"]
    assert told[5][1] == "input.prompt: column 'prompt' holds no prompt in this row (it is null)"
    page = tmp_path / "page.html"
    assert tessera("report", out, "-o", page).code == 0
    assert "data:image/" in page.read_text()
