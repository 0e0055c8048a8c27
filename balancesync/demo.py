"""`balancesync demo`: real balances from a private Redis into a private PostgreSQL, step by step.

It ends in the daemon, beside an application that moves the money about, until Ctrl-C.

The balances are those of Ethereum's genesis block of 2015: 8,893 accounts with up to 26 digits, far
beyond what 64 bits or a float hold, whose sum a single rounding would break. They lie as
`address,wei` in `data/ethereum-genesis.csv.gz`, made from the mainnet genesis state in the npm
package @ethereumjs/genesis 10.1.3 (MIT).

Every step that shows a command runs just that command, in this process and with this
configuration; whatever the environment and the current folder say is left alone.
"""

import asyncio
import csv
import gzip
import importlib.resources
import random
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from pydantic import SecretStr
from rich.text import Text

from balancesync.config import (
    Config,
    LiveConfig,
    LogConfig,
    MappingConfig,
    PostgresConfig,
    RedisConfig,
    ScheduleConfig,
)
from balancesync.daemon import reason_of
from balancesync.embedded import PostgresServer, RedisServer
from balancesync.errors import Refused, RunFailed
from balancesync.proof import SUM, TOTAL_WEI, Proof, ask_sum
from balancesync.show import ago, write
from balancesync.traffic import Balances, lose_all, put

Execute = Callable[[Sequence[str], Config], int]

_COMMAND_STYLE: Final = "cyan"
_TRANSFERS: Final = 200
_BAD: Final = {
    "0x00000000000000000000000000000000000000aa": "12.5e",
    "0x00000000000000000000000000000000000000bb": "NaN",
    "0x00000000000000000000000000000000000000cc": "0.1",
}


def run(execute: Execute, *, once: bool = False) -> int:
    """Run the demo; `execute` runs a command line with a configuration and gives its exit code.

    It ends with SIGINT or SIGTERM; `once`: after the first proof that the daemon's work is right.
    Raises EmbeddedError: there are no servers to start on this machine; RunFailed: a step ended
    otherwise than it should.
    """
    begun = time.monotonic()
    _title("Start a private PostgreSQL and a private Redis, on free ports of this machine")
    # A password each: else every user of this machine could talk to them.
    passwords = secrets.token_urlsafe(), secrets.token_urlsafe()
    try:
        with (
            PostgresServer(password=passwords[0], durable=False) as postgres,
            RedisServer(password=passwords[1]) as redis,
        ):
            write(f"PostgreSQL listens on {postgres.port}, Redis on {redis.port}: {_since(begun)}")
            config = _configure(postgres, redis)
            balances = _Demo(execute, config).tell()
            _run_daemon(config, balances, once=once)
    except KeyboardInterrupt:
        write("", "Stopped.")
    write("", Text(f"Done in {_since(begun)}. Servers and data are gone again.", "bold"))
    return 0


class _Demo:
    """The story, on servers that are up."""

    def __init__(self, execute: Execute, config: Config) -> None:
        self._execute = execute
        self._config = config
        self._balances = read_balances()

    def tell(self) -> Balances:
        """All of it; give what Redis then holds. Raises RunFailed where a step goes wrong."""
        self._load()
        self._sync_all()
        self._sync_transfers()
        self._sync_bad_records()
        self._verify()
        self._lose_redis()
        self._bring_back()
        return self._balances

    def _load(self) -> None:
        _title("Put the balances of Ethereum's genesis block into Redis, in wei")
        begun = time.monotonic()
        self._put(self._balances)
        richest = max(self._balances, key=self._balances.__getitem__)
        write(
            f"{len(self._balances):,} keys: {_since(begun)}. The largest is",
            f"  balance:{richest} = {self._balances[richest]}",
        )

    def _sync_all(self) -> None:
        _title("Copy them to PostgreSQL; the table is created")
        self._run("sync")
        self._prove_sum()

    def _sync_transfers(self) -> None:
        _title(f"Move wei between {2 * _TRANSFERS} accounts, and look before anything is written")
        self._put(self._transfer())
        self._run("sync", "--dry-run")
        _title("Write the difference, and nothing but the difference")
        self._run("sync")
        self._prove_sum()

    def _sync_bad_records(self) -> None:
        _title("Three records that are no number of wei: skipped, kept, explained")
        self._put(_BAD)
        self._run("sync")
        self._run("rejects")
        self._prove_sum()

    def _verify(self) -> None:
        _title("Compare every key of Redis with its row")
        self._run("verify")

    def _lose_redis(self) -> None:
        _title("Redis loses everything: the sync is refused (exit code 3), PostgreSQL keeps it all")
        write(Text("$ redis-cli FLUSHALL", _COMMAND_STYLE))
        asyncio.run(lose_all(self._config.redis))
        self._run("sync", expect=Refused.exit_code)
        self._prove_sum()

    def _bring_back(self) -> None:
        _title("The balances come back to Redis: that heals it, nothing is left to be accepted")
        self._put(self._balances)
        self._run("sync")
        self._prove_sum()

    def _run(self, *command: str, expect: int = 0) -> None:
        write(Text(f"$ balancesync {' '.join(command)}", _COMMAND_STYLE))
        with _undisturbed():
            code = self._execute(command, self._config)
        if code != expect:
            raise RunFailed(f"`balancesync {' '.join(command)}` ended with {code}, not {expect}")

    def _transfer(self) -> Balances:
        """Change the balances so that their total stays; give those that changed."""
        chosen = random.Random(2014).sample(sorted(self._balances), 2 * _TRANSFERS)  # noqa: S311
        for payer, payee in zip(chosen[::2], chosen[1::2], strict=True):
            amount = self._balances[payer] // 3 + 1
            self._balances[payer] -= amount
            self._balances[payee] += amount
        return {address: self._balances[address] for address in chosen}

    def _put(self, values: Mapping[str, int | str]) -> None:
        asyncio.run(put(values, self._config.redis))

    def _prove_sum(self) -> None:
        write(Text(f"$ psql -c '{SUM}'", _COMMAND_STYLE))
        count, total = asyncio.run(ask_sum(self._config))
        if total != TOTAL_WEI:
            raise RunFailed(f"the sum in PostgreSQL is {total}, not {TOTAL_WEI}")
        write(f"{count:,} rows, {total} wei: exactly what Ethereum began with")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let a command of a moment end before SIGINT or SIGTERM raises KeyboardInterrupt.

    Else it would take the signal for its own, and to the demo its end would be a failure.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        # Commands that handle SIGTERM leave it with the system's own answer, instant death.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _title(text: str) -> None:
    write("", Text(text, "bold"))


def _since(begun: float) -> str:
    return ago(time.monotonic() - begun)


def _run_daemon(config: Config, balances: Balances, *, once: bool) -> None:
    _title("The daemon, while an application moves money about; every so often a proof")
    write(Text("$ balancesync run", _COMMAND_STYLE))

    async def serve() -> None:
        await Proof(config, balances, once=once).serve()

    try:
        asyncio.run(serve())
    except ExceptionGroup as group:
        raise reason_of(group) from group


def read_balances() -> Balances:
    """The accounts of Ethereum's genesis block: wei by address."""
    packed = importlib.resources.files("balancesync") / "data" / "ethereum-genesis.csv.gz"
    lines = gzip.decompress(packed.read_bytes()).decode().splitlines()
    return {row["address"]: int(row["wei"]) for row in csv.DictReader(lines)}


def _configure(postgres: PostgresServer, redis: RedisServer) -> Config:
    balances = MappingConfig(
        key="balance:{address}",
        columns={"address": "text", "wei": "numeric(30,0)"},
    )
    return Config(
        redis=RedisConfig(url=SecretStr(redis.url)),
        postgres=PostgresConfig(dsn=SecretStr(postgres.dsn)),
        mapping=(balances,),
        schedule=ScheduleConfig(min_interval=0),
        live=LiveConfig(enabled=True),
        log=LogConfig(level="critical"),  # each step says itself what happened,
    )
