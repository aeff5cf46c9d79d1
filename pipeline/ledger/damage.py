"""Failed shards: which shards of a job cannot be read, wholly or in part, and why.

Why: damaged input costs the rows that are damaged and nothing else, so a job over it comes to its end. Then people must
be told by name what is missing. A file that cannot be opened as parquet is set apart when the input is listed
(input/shards.py). Where pages of a file are damaged, their rows carry an error of the kind `read` (input/source.py),
and the footers of the output count those.
"""

import pyarrow.compute as pc
import pyarrow.parquet as pq

from actors.schema import ERROR, READ
from pipeline.input.shards import FailedShard, Input, output_name
from pipeline.ledger.ledger import DATA, Ledger
from pipeline.ledger.state import Plan, ShardState
from pipeline.storage.files import in_parallel


def failed_shards(ledger: Ledger, found: Input, plan: Plan) -> tuple[FailedShard, ...]:
    """The input's shards that cannot be read, then those with rows that cannot, each with the reason."""
    damaged = [state for state in plan.shards if READ in state.stats.errors]
    messages = in_parallel(lambda state: _message(ledger, state), damaged)
    return (
        *found.unreadable,
        *(
            FailedShard.partly(state.shard, state.stats.errors[READ], message)
            for state, message in zip(damaged, messages, strict=True)
        ),
    )


def _message(ledger: Ledger, state: ShardState) -> str | None:
    """What the first such row says, once the shard is sealed."""
    if not state.sealed:
        return None
    with ledger.storage.open(f"{DATA}/{output_name(state.shard.name)}") as file:
        errors = pq.ParquetFile(file).read(columns=[ERROR])[ERROR]
    first = pc.index(pc.struct_field(errors, "kind"), READ).as_py()
    return None if first < 0 else str(errors[first]["message"])
