"""What INFO says of a primary: as real servers say it, and with one thing less."""

from collections.abc import Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from balancesync.continuity import Primary
from balancesync.embedded import RedisServer
from balancesync.primaries import _NONE, _ONE, _SURE, read_primary

Said = dict[str, dict[str, str]]


def lines(text: bytes, **_: Any) -> dict[str, str]:
    return dict(line.split(":", 1) for line in text.decode().splitlines() if ":" in line)


async def ask(client: Redis) -> Said:
    """What INFO and INFO commandstats say, as they are."""
    client.set_response_callback("INFO", lines)  # type: ignore[arg-type]
    return {"info": await client.info(), "stats": await client.info("commandstats")}


def read(said: Said, dbsize: int = 5, /, **changed: str | None) -> Primary:
    """What is made of it, with some lines `changed` or left out."""
    both: dict[str, Any] = {}
    for section, found in said.items():
        ours = {name: value for name, value in changed.items() if section_of(name) == section}
        both[section] = {name: value for name, value in (found | ours).items() if value is not None}
    return read_primary("host:1", 0, dbsize, **both, node=None)


def section_of(name: str) -> str:
    return "stats" if name.startswith("cmdstat_") else "info"


@pytest.fixture
async def client(private_redis: Callable[..., RedisServer]) -> Any:
    """Of a server with five keys here and two in another database."""
    server = private_redis()
    async with Redis.from_url(server.url.replace("/0", "/1")) as other:
        await other.mset({"a": "1", "b": "1"})
    async with Redis.from_url(server.url, protocol=2) as made:
        await made.config_resetstat()
        for number in range(5):
            await made.set(str(number), "0")
        yield made


async def test_what_a_server_tells_is_read(client: Redis) -> None:
    said = await ask(client)
    found = read(said)
    assert (found.keys, found.all_keys, found.loaded) == (5, 7, 0)
    assert (found.flushes, found.swaps, found.created, found.writes) == (0, 0, 5, 5)
    assert (found.run_id, found.history) == (said["info"]["run_id"], said["info"]["master_replid"])
    assert (found.past, found.clocked, found.changes) == (None, True, None)
    assert len(found.counters) == 3
    assert found.reset is not None
    assert found.reset.startswith("calls=1,usec=")
    await client.flushdb()
    await client.flushall()
    await client.swapdb(0, 1)
    await client.incr("0")
    await client.get("0")
    await client.delete("0")
    found = read(await ask(client), 0)
    assert (found.flushes, found.swaps, found.all_keys) == (2, 1, 0)
    # A swap may bring any number of keys.
    assert (found.created, found.writes) == (None, 6)


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("run_id", "run_id"),
        ("uptime_in_seconds", "started"),
        ("uptime_in_seconds", "uptime_s"),
        ("master_replid", "history"),
        ("master_repl_offset", "offset"),
        ("master_replid2", "past"),
        ("second_repl_offset", "past_offset"),
        ("aof_base_size", "base_bytes"),
        ("rdb_last_load_keys_loaded", "loaded"),
        ("aof_enabled", "loaded"),
        ("aof_enabled", "changes"),
        ("aof_rewrites", "changes"),
        ("rdb_changes_since_last_save", "changes"),
    ],
)
async def test_what_it_leaves_out_is_unknown(client: Redis, line: str, field: str) -> None:
    said = await ask(client)
    said["info"] |= {"aof_base_size": "88", "master_replid2": "a" * 40}
    if field == "changes":
        said["info"]["aof_enabled"] = "1"
    assert getattr(read(said), field) is not None
    for value in (None, ""):
        assert getattr(read(said, **{line: value}), field) is None


async def test_without_statistics_nothing_counted_is_known(client: Redis) -> None:
    found = read({"info": (await ask(client))["info"], "stats": {}})
    counted = (found.flushes, found.swaps, found.reset, found.created, found.writes)
    assert counted == (None,) * 5


async def test_keys_are_unknown_where_only_dbsize_tells_of_them(client: Redis) -> None:
    said = await ask(client)
    assert read(said, db0=None, db1=None).all_keys is None
    # An empty server has no such line.
    assert read(said, 0, db0=None, db1=None).all_keys == 0


async def test_only_its_own_file_tells_how_many_keys_it_has_loaded(client: Redis) -> None:
    said = await ask(client)
    loaded = {"rdb_last_load_keys_loaded": "90", "rdb_last_load_keys_expired": "10"}
    assert read(said, **loaded).loaded == 100
    assert read(said, **loaded, aof_enabled="1").loaded is None
    for saves, is_unsaved in (("0", True), ("1", False), (None, False)):
        assert read(said, rdb_saves=saves).is_unsaved is is_unsaved
    assert read(said, aof_enabled="1", rdb_changes_since_last_save="7").changes == 7
    assert read(said, aof_enabled="1", aof_rewrites="1").changes is None


async def test_before_7_any_config_may_have_reset_the_statistics(client: Redis) -> None:
    said = await ask(client)
    fresh: dict[str, Any] = {"cmdstat_config|resetstat": None}
    asked: dict[str, Any] = fresh | {"cmdstat_config": "calls=1,usec=3"}
    assert read(said, **fresh).reset == ""
    assert read(said, **asked, redis_version="7.0.0").reset == ""
    assert read(said, **fresh, redis_version="6.2.6").reset == ""
    assert read(said, **asked, redis_version="6.2.6").reset is None
    assert read(said, **asked, redis_version=None).reset is None


async def test_a_start_is_told_by_the_servers_clock_or_by_ours(client: Redis) -> None:
    said = await ask(client)
    times = {"uptime_in_seconds": "100", "server_time_usec": "1700000000999999"}
    assert read(said, **times).started == 1_699_999_900.0
    ours = read(said, uptime_in_seconds="100", server_time_usec=None)
    assert (ours.clocked, ours.uptime_s) == (False, 100)
    real = read(said)
    assert real.started is not None
    assert ours.started is not None
    assert abs(ours.started + 100 - real.started) < 60


@pytest.mark.parametrize("command", ["mset", "eval_unknown", "module_command", "flushslot"])
async def test_a_command_that_may_bring_any_number_of_keys_leaves_it_unknown(
    client: Redis, command: str
) -> None:
    said = await ask(client)
    assert read(said, **{f"cmdstat_{command}": "calls=1,usec=3"}).created is None
    # One that brings none is no matter, nor are its subcommands.
    assert read(said, **{"cmdstat_config|get": "calls=9,usec=3"}).created == 5
    assert read(said, cmdstat_hset="calls=9,usec=3").created == 14


async def test_no_command_brings_more_keys_than_it_is_counted_for(client: Redis) -> None:
    """By what a real server says of each: only a command that may insert brings a key."""
    client.response_callbacks.pop("COMMAND")
    told = await client.execute_command("COMMAND")  # type: ignore[no-untyped-call] # redis-py
    for found in told:
        # https://redis.io/docs/latest/commands/command/
        command, specs = found[0].decode(), found[8]
        flags = {flag for spec in specs for flag in spec[spec.index(b"flags") + 1]}
        if command in _NONE:
            assert not flags & {b"OW", b"insert"}, command
        if command in _ONE:
            assert flags & {b"OW", b"insert", b"update"}, command
    assert not _ONE & _NONE
    assert not _SURE & _NONE
