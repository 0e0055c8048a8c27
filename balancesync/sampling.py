"""What `check` sees in a sample of a mapping's keys: their values, their time to live, their rows.

Values are judged by the very rules that a sync judges them by.
"""

from collections import Counter
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Final

from balancesync.config import MappingConfig
from balancesync.database import Database, load_sql
from balancesync.errors import BalanceSyncError
from balancesync.findings import Finding, failure
from balancesync.mapping import Mapping
from balancesync.model import Batch, Reject
from balancesync.part import reading_of
from balancesync.reading import Sample
from balancesync.source import Source
from balancesync.statements import key_lookup
from balancesync.table import Table
from balancesync.values import Unfit, show

SAMPLED_KEYS: Final = 1_000
# Far more than INCRBYFLOAT leaves behind, and far less than a step of most balances.
_TOLERANCE: Final = Decimal("0.000001")


async def look_at_sample(
    config: MappingConfig, table: Table | None, source: Source, database: Database
) -> AsyncIterator[Finding]:
    """Look at some keys of a mapping; `table` is None where there's none, or none that fits."""
    mapping = Mapping(config, table.nullable(config) if table else None)
    try:
        sample = await source.sample(reading_of(mapping), SAMPLED_KEYS)
    except BalanceSyncError as error:
        yield failure(config.name, error)
        return
    batch = mapping.parse(sample.batch)
    if not batch.count and not batch.rejects:
        where = f"no field of {config.key}" if config.member else f"no key like {config.key}"
        text = f"{where} was found: is it the right template, and the right database of Redis?"
        yield Finding("warning", config.name, text)
        return
    yield Finding("ok", config.name, f"{batch.count:,} of {_seen(batch):,} sampled values fit")
    for finding in (*_judge_rejects(config, batch), *_judge_ttls(config, sample)):
        yield finding
    if table is not None and config.mode == "update":
        splits = [mapping.split_key(key) for key in sample.batch.keys]
        keys = [split for split in splits if not isinstance(split, Unfit)]
        try:
            yield await _judge_rows(mapping, table, database, keys)
        except BalanceSyncError as error:
            yield failure(config.name, error)


def _seen(batch: Batch) -> int:
    return batch.count + len(batch.rejects)


def _judge_rejects(config: MappingConfig, batch: Batch) -> list[Finding]:
    first: dict[str, Reject] = {}
    for reject in batch.rejects:
        first.setdefault(reject.reason, reject)
    counts = Counter[str](reject.reason for reject in batch.rejects)
    found = []
    for reason, count in counts.most_common():
        text = f"{count:,} of {_seen(batch):,} sampled values would be rejects ({reason}), such as"
        text += f" {show(first[reason].key)}: {first[reason].detail}"
        if reason == "residue":
            text += (
                f'. Set tolerance = "{_tolerance(config):f}" in this mapping: such tails are left'
                " by INCRBYFLOAT and mean the amount next to them"
            )
        found.append(Finding("warning", config.name, text))
    return found


def _tolerance(config: MappingConfig) -> Decimal:
    """The tolerance to recommend: a millionth, or less where a column's steps are as small."""
    steps = [step for name in config.value_columns if (step := config.types[name].step)]
    return min([_TOLERANCE, *(step / 1_000 for step in steps if step <= 2 * _TOLERANCE)])


def _judge_ttls(config: MappingConfig, sample: Sample) -> list[Finding]:
    ttls = sorted(ttl for ttl in sample.ttls if ttl is not None)
    if not ttls:
        return [Finding("ok", config.name, "none of the sampled keys expires")]
    text = (
        f"{len(ttls):,} of {len(sample.ttls):,} sampled keys expire, the next in"
        f" {ttls[0] / 1000:,.0f} s: a balance with a TTL is a balance about to be lost; let the"
        " application PERSIST it, or write without EX, PX and EXPIRE"
    )
    return [Finding("warning", config.name, text)]


async def _judge_rows(
    mapping: Mapping, table: Table, database: Database, keys: list[tuple[str, ...]]
) -> Finding:
    """Whether the sampled keys have rows: mode `update` makes none."""
    config = mapping.config
    arrays = [list(texts) for texts in zip(*keys, strict=True)]
    with database.translated(last=True):
        async with database.acquire() as connection:
            rowless = load_sql("balances")["rowless"]
            sql = rowless.format(table=table.sql_name, **key_lookup(config))
            places = await connection.fetch(sql, *arrays)
    if not places:
        return Finding("ok", config.name, f"each of the {len(keys):,} sampled keys has its row")
    such = f"such as {show(mapping.print_key(keys[places[0]['n'] - 1]))}"
    if len(places) == len(keys):
        columns = ", ".join(config.key_columns)
        text = f"none of the {len(keys):,} sampled keys has a row in {config.table}, {such}: is"
        text += f" {columns} the column that they name, and this the right database?"
        return Finding("warning", config.name, text)
    text = f"{len(places):,} of {len(keys):,} sampled keys have no row in {config.table}, {such}:"
    return Finding("ok", config.name, f"{text} a sync counts them as not_found, and makes none")
