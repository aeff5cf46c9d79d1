"""Fills the contact sheet from a job's output: figures from the sealed shards, pictures from the input.

Row i of a sealed shard is row i of the input shard of the same name, so nothing has to be
recorded for the page. The captions' few narrow columns are read of every shard looked at; pictures only of
the rows shown, and only the row groups that hold them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.schema import ERROR, IMAGES, READ, ROW, VIDEO
from pipeline.input.columns import available
from pipeline.input.rows import RowSet
from pipeline.input.shards import FailedShard, Shard, output_name
from pipeline.ledger.job_input import listed_input
from pipeline.ledger.ledger import Ledger
from pipeline.report.page import Card, CardError, ErrorGroup, Section, SectionStats
from pipeline.run.outcome import shards_told
from pipeline.spec.job_spec import JobSpec, SpecError
from pipeline.storage.footer import one_line
from pipeline.storage.retrying import StorageError
from pipeline.storage.storage import Storage

_RESULTS = ("caption", "finish_reason", "prompt_tokens", "image_tokens", "generated_tokens", "error")
_READ_ROWS = 1024  # rows of results at once; they are short
_ALWAYS = 3  # rows of each kind of error, and wrong rows, that are shown wherever they stand


@dataclass(frozen=True, slots=True)
class _Seen:
    """A row of the output that may be shown."""

    shard: Shard
    row: int
    card: Card


@dataclass(slots=True)
class _Tally:
    """What one pass over the results gathers; its size depends on the page, not on the output."""

    first_rows: int  # of each shard, to be shown
    rows: int = 0
    judged: int = 0
    right: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    first: list[_Seen] = field(default_factory=list)
    notable: list[_Seen] = field(default_factory=list)
    notable_counts: Counter[str] = field(default_factory=Counter)
    errors: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], CardError] = field(default_factory=dict)
    unread: dict[Shard, tuple[int, str]] = field(default_factory=dict)  # rows that cannot be read, and why

    def add(self, seen: _Seen) -> None:
        card = seen.card
        self.rows += 1
        self.judged += card.verdict in ("right", "wrong")
        self.right += card.verdict == "right"
        self.prompt_tokens += card.prompt_tokens
        self.generated_tokens += card.generated_tokens
        if card.error is not None:
            group = (card.error.kind, card.error.stage)
            self.errors[group] += 1
            self.examples.setdefault(group, card.error)
            if card.error.kind == READ:
                rows, message = self.unread.get(seen.shard, (0, card.error.message))
                self.unread[seen.shard] = (rows + 1, message)
        if seen.row < self.first_rows:
            self.first.append(seen)
        elif card.verdict in ("error", "wrong"):
            notable = "wrong" if card.error is None else f"error {card.error.kind}"
            self.notable_counts[notable] += 1
            if self.notable_counts[notable] <= _ALWAYS:
                self.notable.append(seen)

    def stats(self, seconds: float | None) -> SectionStats:
        groups = tuple(ErrorGroup(self.examples[group], rows) for group, rows in self.errors.most_common())
        return SectionStats(
            rows=self.rows,
            errors=groups,
            judged=self.judged,
            right=self.right,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            seconds=seconds,
        )


def read_section(
    spec: JobSpec,
    *,
    truth: str | None = None,
    limit: int = 36,
    seconds: float | None = None,
    title: str | None = None,
    max_shards: int = 256,
) -> Section:
    """A job's section of the contact sheet, from its sealed shards.

    Shows at most `limit` rows: the first of each shard, with a few of each kind of error and a few wrong ones
    among them. `truth` names a kept column that holds the right caption; `seconds` is the job's duration.
    Of more than `max_shards` sealed shards as many are read, evenly spread, and the section says so.
    """
    output = Storage(spec.output.path)
    found = listed_input(spec, Ledger(spec.output.path))
    sealed = [shard for shard in found.shards if output.exists(_sealed_path(shard))]
    shards = _spread(sealed, max_shards)
    tally = _Tally(first_rows=-(-limit // max(1, len(shards))))
    for shard in shards:
        try:
            for seen in _read_results(output, shard, truth):
                tally.add(seen)
        except pa.ArrowException as error:
            path = f"{output.url}/{_sealed_path(shard)}"
            raise StorageError(
                f"{path} cannot be read ({one_line(error)}); delete it and run the job again"
            ) from None
    chosen = _choose(tally, limit)
    notes = [] if len(shards) == len(sealed) else [f"from {len(shards):,} of {len(sealed):,} sealed shards"]
    failed = (*found.unreadable, *(FailedShard.partly(shard, *why) for shard, why in tally.unread.items()))
    notes += [shards_told(failed)] if failed else []
    return Section(
        title=title or spec.name,
        subtitle=spec.model.path,
        stats=tally.stats(seconds),
        cards=tuple(_with_input(spec, chosen)),
        note="; ".join(notes),
    )


def _sealed_path(shard: Shard) -> str:
    return f"data/{output_name(shard.name)}"


def _spread(items: Sequence[Shard], count: int) -> list[Shard]:
    """`count` of the items, evenly spread; all of them if there are no more."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def _choose(tally: _Tally, limit: int) -> list[_Seen]:
    """Notable rows displace first rows of their shard's share, then the page is in input order again."""
    notable = tally.notable[:limit]
    by_depth = sorted(tally.first, key=lambda seen: (seen.row, seen.shard.name))
    chosen = [*notable, *by_depth[: limit - len(notable)]]
    return sorted(chosen, key=lambda seen: (seen.shard.name, seen.row))


def _read_results(output: Storage, shard: Shard, truth: str | None) -> Iterator[_Seen]:
    with output.open(_sealed_path(shard)) as file:
        parquet = pq.ParquetFile(file)
        known = parquet.schema_arrow.names
        if truth is not None and truth not in known:
            raise SpecError(f"--truth: the output has no column {truth!r}; {available(truth, known)}")
        columns = [*_RESULTS, *([truth] if truth else [])]
        row = 0
        for batch in parquet.iter_batches(_READ_ROWS, columns=columns):
            for result in batch.to_pylist():
                yield _Seen(shard, row, _card(f"{shard.name.removesuffix('.parquet')}:{row}", result, truth))
                row += 1


def _card(label: str, result: Mapping[str, Any], truth: str | None) -> Card:
    error = result["error"]
    return Card(
        label=label,
        caption=result["caption"],
        truth=result[truth] if truth else None,
        error=CardError(error["kind"], error["stage"], error["message"]) if error else None,
        finish_reason=result["finish_reason"],
        prompt_tokens=result["prompt_tokens"] or 0,
        image_tokens=result["image_tokens"] or 0,
        generated_tokens=result["generated_tokens"] or 0,
    )


def _with_input(spec: JobSpec, chosen: Iterable[_Seen]) -> Iterator[Card]:
    """The cards with their pictures and prompts, in the order given (rows of a shard stand together)."""
    from pipeline.input.source import ShardWork, read_shard  # here, because it loads Ray

    columns = [spec.input.prompt] if spec.input.prompt else list(spec.prompt.fields)
    by_shard: dict[str, list[_Seen]] = {}
    for seen in chosen:
        by_shard.setdefault(seen.shard.name, []).append(seen)
    for group in by_shard.values():
        shard = group[0].shard
        work = ShardWork(shard, RowSet.of(seen.row for seen in group) & RowSet.span(shard.rows))
        tables = read_shard(work, spec, columns)
        rows = {row[ROW]: row for table in tables for row in table.to_pylist()}
        for seen in group:
            source = rows.get(seen.row)
            # The input may have shrunk since, or be damaged.
            if source is None or (source[ERROR] or {}).get("kind") == READ:
                yield seen.card
            else:
                yield _shown(spec, seen.card, source)


def _shown(spec: JobSpec, card: Card, source: Mapping[str, Any]) -> Card:
    prompt = source[spec.input.prompt] if spec.input.prompt else spec.prompt.template.format_map(source)
    images, frames = source[IMAGES], source[VIDEO]
    pictures = (None,) if images is None or frames is None else (*images, *frames)
    return replace(card, images=pictures, prompt=_text(prompt))


def _text(prompt: Any) -> str | None:
    """A prompt for people: text as it is, of a chat the user's turns."""
    if isinstance(prompt, list):
        return " / ".join(str(turn["content"]) for turn in prompt if turn.get("role") == "user")
    return None if prompt is None else str(prompt)
