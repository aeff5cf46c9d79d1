"""The columns that travel between source, actors and ledger, named once.

A leading underscore marks Tessera's own columns: they identify a row or carry it between stages and never reach
the sealed output. Everything else in a block is the user's, or a result.
"""

from __future__ import annotations

import pyarrow as pa

SHARD, ROW, FINGERPRINT = "_shard", "_row", "_fingerprint"
IDENTITY = (SHARD, ROW, FINGERPRINT)

IMAGES = "_images"  # list<large_binary>: the encoded files, as read
VIDEO = "_video"  # list<large_binary>: the encoded frames of the row's video, as read; empty: it has none
TOKEN_IDS = "_token_ids"  # list<int32>
PIXELS = "_pixels"  # large_binary: uint8 [sum of tiles, *tile_shape] in C order
SIZES = "_sizes"  # list<list<int32>>: (height, width) of each image, (frames, height, width) of a video
ERROR = "error"
READ = "read"  # the kind of error of a row that its shard does not yield (errors.py has all kinds)

ERROR_TYPE = pa.struct([("kind", pa.string()), ("stage", pa.string()), ("message", pa.string())])

RESULT_SCHEMA = pa.schema(
    [
        ("caption", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("image_tokens", pa.int32()),
        ("generated_tokens", pa.int32()),
        (ERROR, ERROR_TYPE),
    ]
)


def error_value(kind: str, stage: str, message: str) -> dict[str, str]:
    """A value of the `error` column; the message is kept to what a person reads in a table cell."""
    return {"kind": kind, "stage": stage, "message": message[:1000]}
