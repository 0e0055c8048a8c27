"""The configuration, as frozen models with the names that `config.toml` has.

Each model holds the rules about its own keys; what a single text may say is in `columns`, `cron`
and `urls`. Times are seconds. `load()` raises ConfigError; a model made in code raises pydantic's
ValidationError.
"""

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import field
from decimal import Decimal
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Annotated, Final, Literal

from annotated_types import Interval
from pydantic import BeforeValidator, ConfigDict, SecretStr, Strict
from pydantic.dataclasses import dataclass

from balancesync import settings, urls
from balancesync.columns import (
    ColumnType,
    Template,
    check_filled,
    check_identifier,
    check_name,
    parse_table,
)
from balancesync.cron import CronFields, check_timezone, parse_cron
from balancesync.dsn import read_postgres_dsn
from balancesync.settings import Misfit, passes, passes_secretly

DEFAULT_FILE: Final = Path("config.toml")
FILE_VARIABLE: Final = f"{settings.PREFIX}CONFIG"

# Pydantic dataclasses and not BaseModels, which have a method called `schema` themselves.
_RULES: Final = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)
_EXACT: Final = re.compile(r"[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?")


def _check_synced_at(text: str) -> None:
    if text:
        check_identifier(text)


def _check_token(text: str) -> None:
    if not re.fullmatch(r"[\x21-\x7e]*", text):
        raise ValueError("must be ASCII without blanks: it travels in a header")


def _tolerance(value: object) -> Decimal:
    # A TOML float has lost the exact number before it comes here.
    text = str(value) if isinstance(value, Decimal) else value
    if not isinstance(text, str) or not _EXACT.fullmatch(text):
        raise ValueError('must be an exact number in quotes, 0 or more, such as "0.000001"')
    return Decimal(text)


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


Switch = Annotated[bool, Strict()]
Share = Annotated[float, Strict(), Interval(ge=0, le=1)]
Timeout = Annotated[float, Strict(), Interval(ge=0.1, le=86_400)]
Days = Annotated[int, Strict(), Interval(ge=1, le=36_500)]
Rows = Annotated[int, Strict(), Interval(ge=1, le=1_000_000)]
Name = Annotated[str, passes(check_name)]
Identifier = Annotated[str, passes(check_identifier)]
Filled = Annotated[str, passes(check_filled)]


@dataclass(config=_RULES, frozen=True, kw_only=True)
class RedisConfig:
    """`[redis]`: where the balances live."""

    url: Annotated[SecretStr, passes_secretly(urls.check_redis_url)] = SecretStr(
        "redis://127.0.0.1:6379/0"
    )
    cluster: Switch = False
    sentinel: tuple[Annotated[str, passes(urls.check_server)], ...] = ()
    sentinel_service: str = ""
    scan_count: Rows = 1000
    max_keys_per_second: Annotated[int, Strict(), Interval(ge=0, le=1_000_000_000)] = 0
    timeout: Timeout = 5.0

    def __post_init__(self) -> None:
        if self.cluster and self.sentinel:
            raise Misfit("can't go together with cluster = true", "sentinel")
        if self.sentinel and not self.sentinel_service:
            raise Misfit("is needed with sentinel", "sentinel_service")
        if self.sentinel_service and not self.sentinel:
            raise Misfit("is needed with sentinel_service", "sentinel")
        if (self.cluster or self.sentinel) and self.url.get_secret_value().startswith("unix:"):
            raise Misfit("can't be unix:// with cluster or sentinel", "url")
        if self.cluster and self.database:
            raise Misfit("must name database 0: a cluster has no other", "url")

    @property
    def database(self) -> int:
        """The number of the Redis database that the URL names."""
        return urls.redis_database(self.url.get_secret_value())

    @property
    def sentinel_addresses(self) -> tuple[tuple[str, int], ...]:
        """The Sentinels as (host, port)."""
        split = (urls.split_address(text) for text in self.sentinel)
        return tuple((host, port) for host, port in split if port is not None)


@dataclass(config=_RULES, frozen=True, kw_only=True)
class PostgresConfig:
    """`[postgres]`: where they are kept."""

    dsn: Annotated[SecretStr, passes_secretly(read_postgres_dsn)] = SecretStr(
        "postgresql://127.0.0.1:5432/postgres"
    )
    schema: Identifier = "balancesync"
    pool_size: Annotated[int, Strict(), Interval(ge=1, le=1000)] = 4
    timeout: Timeout = 30.0
    lock_timeout: Timeout = 5.0
    apply_batch: Rows = 10_000
    keep_runs_days: Days = 400

    def __post_init__(self) -> None:
        if self.schema.startswith("pg_"):
            raise Misfit("can't begin with pg_: PostgreSQL keeps such names for itself", "schema")


@dataclass(config=_RULES, frozen=True, kw_only=True)
class MappingConfig:
    """`[[mapping]]`: which keys of Redis are which rows of PostgreSQL."""

    name: Name = "balances"
    key: Annotated[Filled, passes(Template.parse)] = "balance:{user_id}"
    ignore: tuple[Filled, ...] = ()
    type: Literal["string", "hash", "json"] = "string"
    member: Annotated[str, passes(Template.parse)] = ""
    table: Annotated[str, passes(parse_table)] = "public.balances"
    mode: Literal["upsert", "update"] = "upsert"
    on_absent: Literal["keep", "delete"] = "keep"
    synced_at: Annotated[str, passes(_check_synced_at)] = "synced_at"
    tolerance: Annotated[Decimal, BeforeValidator(_tolerance)] = Decimal(0)
    columns: dict[Identifier, Annotated[str, passes(ColumnType.parse)]] = field(
        default_factory=lambda: {"user_id": "bigint", "balance": "numeric(20,2)"}
    )
    fields: dict[str, Filled] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_key()
        self._check_values()
        self._check_tolerance()
        if self.synced_at in self.columns:
            raise Misfit("can't be one of the columns: balancesync sets it", "synced_at")
        if self.on_absent == "delete" and self.mode != "upsert":
            raise Misfit('delete needs mode = "upsert": only rows of our own go', "on_absent")
        if self.on_absent == "delete" and not self.synced_at:
            raise Misfit("delete needs synced_at: it marks the rows of our own", "on_absent")

    @property
    def full_key(self) -> str:
        """The template of its keys; of a big hash its name and the template of its members."""
        return f"{self.key} {self.member}" if self.member else self.key

    def _check_key(self) -> None:
        if self.member and self.type != "hash":
            raise Misfit('goes with type = "hash" only', "member")
        if self.member and self.template.names:
            raise Misfit("must be one key without placeholders when member is set", "key")
        if self.member and not self.key_columns:
            raise Misfit('needs a placeholder, such as "{user_id}"', "member")
        if not self.key_columns:
            raise Misfit('needs a placeholder, such as "balance:{user_id}"', "key")
        for name in self.key_columns:
            if name not in self.columns:
                place = "member" if self.member else "key"
                raise Misfit(f"names {{{name}}}, which is none of the columns", place)

    def _check_values(self) -> None:
        if not self.value_columns:
            raise Misfit("needs a value column beside the key columns", "columns")
        single = self.type == "string" or bool(self.member)
        if single and len(self.value_columns) > 1:
            columns = ", ".join(self.value_columns)
            holder = "a field" if self.member else "a string"
            raise Misfit(f"{holder} holds one value, but there are {columns}", "columns")
        if single and self.fields:
            raise Misfit('goes with type = "json" or a "hash" without member', "fields")
        for column in self.fields:
            if column not in self.value_columns:
                raise Misfit("is none of the value columns", "fields", column)
        sources = list(self.field_of.values())
        for column, source in self.field_of.items():
            if sources.count(source) > 1:
                raise Misfit("is the field of another column too", "fields", column)

    def _check_tolerance(self) -> None:
        if not self.tolerance:
            return
        steps = {column: self.types[column].step for column in self.value_columns}
        if not any(steps.values()):
            raise Misfit("does nothing: no value column has a fixed scale", "tolerance")
        for column, step in steps.items():
            if step is not None and 2 * self.tolerance >= step:
                raise Misfit(f"must be less than half a step of {column}: {step / 2}", "tolerance")

    @cached_property
    def template(self) -> Template:
        """The key's form; without placeholders when `member` is set."""
        return Template.parse(self.key)

    @cached_property
    def member_template(self) -> Template | None:
        """The form of the big hash's fields; None without `member`."""
        return Template.parse(self.member) if self.member else None

    @cached_property
    def key_columns(self) -> tuple[str, ...]:
        """The columns that name a row, in the template's order."""
        return (self.member_template or self.template).names

    @cached_property
    def value_columns(self) -> tuple[str, ...]:
        """The other columns, in declared order."""
        return tuple(column for column in self.columns if column not in self.key_columns)

    @cached_property
    def types(self) -> dict[str, ColumnType]:
        """Each column's type, in declared order."""
        return {column: ColumnType.parse(text) for column, text in self.columns.items()}

    @cached_property
    def field_of(self) -> dict[str, str]:
        """The field of a hash or object that each value column is read from."""
        return {column: self.fields.get(column, column) for column in self.value_columns}

    @cached_property
    def table_name(self) -> tuple[str | None, str]:
        """The table as (schema, or None to leave it to the search path, name)."""
        return parse_table(self.table)


@dataclass(config=_RULES, frozen=True, kw_only=True)
class JobConfig:
    """One line of `[schedule.jobs]`."""

    cron: Annotated[str, passes(parse_cron)]
    job: Literal["sync", "verify"] = "sync"

    @cached_property
    def fields(self) -> CronFields:
        """When the job fires, in `schedule.timezone`."""
        return parse_cron(self.cron)


@dataclass(config=_RULES, frozen=True, kw_only=True)
class ScheduleConfig:
    """`[schedule]`: when the daemon runs by itself."""

    timezone: Annotated[str, passes(check_timezone)] = "UTC"
    on_start: Switch = True
    min_interval: Annotated[int, Strict(), Interval(ge=0, le=31_536_000)] = 0
    jobs: dict[Name, JobConfig] = field(
        default_factory=lambda: {
            "hourly": JobConfig(cron="0 * * * *"),
            "daily": JobConfig(cron="0 2 * * *"),
        }
    )


@dataclass(config=_RULES, frozen=True, kw_only=True)
class RetryConfig:
    """`[retry]`: what an error in the middle of a run leads to."""

    attempts: Annotated[int, Strict(), Interval(ge=1, le=1000)] = 5
    initial: Timeout = 1.0
    maximum: Timeout = 60.0

    def __post_init__(self) -> None:
        if self.maximum < self.initial:
            raise Misfit("must not be less than initial", "maximum")


@dataclass(config=_RULES, frozen=True, kw_only=True)
class GuardConfig:
    """`[guard]`: when a run is refused. Shares are 0 to 1."""

    max_loss: Share = 0.5
    max_change: Share = 1.0
    max_rejects: Share = 0.1


@dataclass(config=_RULES, frozen=True, kw_only=True)
class LiveConfig:
    """`[live]`: following changes between the runs."""

    enabled: Switch = False
    flush_interval: Annotated[float, Strict(), Interval(ge=0.01, le=60)] = 0.25
    max_pending: Annotated[int, Strict(), Interval(ge=1, le=1_000_000_000)] = 2_000_000
    rescan_interval: Annotated[int, Strict(), Interval(ge=0, le=86_400)] = 300


@dataclass(config=_RULES, frozen=True, kw_only=True)
class HistoryConfig:
    """`[history]`: keeping every change."""

    enabled: Switch = False
    keep_days: Days = 90


@dataclass(config=_RULES, frozen=True, kw_only=True)
class PruneConfig:
    """`[prune]`: whether idle balances may leave Redis."""

    enabled: Switch = False


@dataclass(config=_RULES, frozen=True, kw_only=True)
class HttpConfig:
    """`[http]`: the daemon's API."""

    host: Filled = "127.0.0.1"
    port: Annotated[int, Strict(), Interval(ge=1, le=65_535)] = 8000
    token: Annotated[SecretStr, passes_secretly(_check_token)] = SecretStr("")

    def __post_init__(self) -> None:
        if not self.is_loopback and not self.token.get_secret_value():
            raise Misfit("is needed when http.host is not loopback", "token")

    @property
    def is_loopback(self) -> bool:
        """True if nothing but this machine can reach the host listened on."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(config=_RULES, frozen=True, kw_only=True)
class LogConfig:
    """`[log]`."""

    level: Annotated[
        Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_lower)
    ] = "info"
    format: Literal["auto", "console", "json"] = "auto"


@dataclass(config=_RULES, frozen=True, kw_only=True)
class Config:
    """All of `config.toml`."""

    redis: RedisConfig = field(default_factory=RedisConfig)
    postgres: PostgresConfig = field(default_factory=PostgresConfig)
    mapping: tuple[MappingConfig, ...] = field(default_factory=lambda: (MappingConfig(),))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    retry: RetryConfig = field(default_factory=RetryConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    live: LiveConfig = field(default_factory=LiveConfig)
    history: HistoryConfig = field(default_factory=HistoryConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if not self.mapping:
            raise Misfit("must have at least one [[mapping]]", "mapping")
        for each in self.mapping:
            _check_own_schema(each, self.postgres.schema)
        for first, second in combinations(self.mapping, 2):
            if first.name == second.name:
                raise Misfit(f'has two mappings called "{first.name}"', "mapping")
            if first.table_name == second.table_name:
                _check_shared_table(first, second)


def _check_own_schema(mapping: MappingConfig, own: str) -> None:
    schema, name = mapping.table_name
    if schema != own:
        return
    table = ".".join('"' + each.replace('"', '""') + '"' for each in (own, name))
    raise Misfit(
        f'has "{mapping.name}" with the table {mapping.table}, in postgres.schema, which belongs to'
        f" balancesync alone and is dropped with it; if that table is there, ALTER TABLE {table}"
        f' SET SCHEMA public; then write table = "public.{name}"',
        "mapping",
    )


def _check_shared_table(first: MappingConfig, second: MappingConfig) -> None:
    both = f'has "{first.name}" and "{second.name}" on one table, which'
    if not first.mode == second.mode == "update":
        raise Misfit(f'{both} needs mode = "update" in both', "mapping")
    keys = ({column: one.types[column] for column in one.key_columns} for one in (first, second))
    if next(keys) != next(keys):
        raise Misfit(f"{both} needs the same key columns in both", "mapping")
    for one, other in ((first, second), (second, first)):
        shared = {*one.value_columns} & {*other.value_columns, other.synced_at}
        if shared:
            raise Misfit(f"{both} would both write {min(shared)}", "mapping")


def load(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Config:
    """Read the configuration from `path`, else `$BALANCESYNC_CONFIG`, else `./config.toml`.

    A file that is asked for must be there; without `./config.toml` the defaults and the environment
    are all there is, as in a container. Raises ConfigError: one line with file and key.
    """
    chosen = path or (Path(environ[FILE_VARIABLE]) if environ.get(FILE_VARIABLE) else None)
    if chosen is None and DEFAULT_FILE.exists():
        chosen = DEFAULT_FILE
    return settings.read(Config, chosen, environ)
