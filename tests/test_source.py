import asyncio
import contextlib
import re
import shutil
import ssl
import subprocess
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from itertools import chain
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
import redis as blocking
from proxy import Proxy
from pydantic import SecretStr
from redis.asyncio import Redis

from balancesync.access import parse
from balancesync.config import RedisConfig
from balancesync.connection import connect, connected, pack
from balancesync.embedded import RedisServer
from balancesync.errors import (
    BalanceSyncError,
    ConfigError,
    MappingFailed,
    RedisUnavailable,
    RightMissing,
)
from balancesync.errors import SourceChanged as Changed
from balancesync.model import RawBatch, RawValue, WrongType
from balancesync.nodes import Identity
from balancesync.reading import LONGEST_VALUE, Reading, Strings
from balancesync.source import Source

BALANCES = Reading("string", match=b"balance:*")
ACCOUNTS = Reading("hash", match=b"account:*", fields=(b"amount", b"currency", b"note"))
BIG = Reading("hash", member_key=b"big")

PrivateRedis = Callable[..., RedisServer]


def source_of(url: str, **settings: object) -> Source:
    return Source(RedisConfig(url=SecretStr(url), **settings))  # type: ignore[arg-type] # test's own


async def fill(redis: Redis, count: int) -> dict[bytes, RawValue]:
    keys = {b"balance:%d" % number: b"%d.25" % number for number in range(count)}
    await redis.mset({**keys})
    return {**keys}


async def read(
    source: Source, reading: Reading, identity: Identity | None = None
) -> tuple[dict[bytes, RawValue], list[RawBatch]]:
    async with aclosing(source.scan(reading, identity=identity)) as found:
        batches = [batch async for batch in found]
    for batch in batches:
        assert len(batch.keys) == len(batch.values) <= batch.scanned
    pairs = (zip(batch.keys, batch.values, strict=True) for batch in batches)
    return dict(chain.from_iterable(pairs)), batches


@pytest.fixture
async def source(redis_url: str) -> AsyncIterator[Source]:
    async with source_of(redis_url, scan_count=100) as source:
        yield source


def without_secret(error: BalanceSyncError, secret: str) -> str:
    assert secret not in str(error)
    assert "\n" not in str(error)
    return str(error)


async def test_scan_reads_every_key(redis_url: str, redis: Redis) -> None:
    expected = await fill(redis, 20_000)
    await redis.mset({f"cache:{number}": "x" for number in range(500)})
    async with source_of(redis_url) as source:
        found, batches = await read(source, BALANCES)
    assert found == expected
    assert sum(batch.scanned for batch in batches) >= 20_000
    assert max(len(batch.keys) for batch in batches) < 2_000


@pytest.mark.parametrize("scan_count", [1, 2, 3, 10, 99, 1000, 1_000_000])
async def test_no_size_of_page_loses_a_key(redis_url: str, redis: Redis, scan_count: int) -> None:
    expected = await fill(redis, 1_203)
    async with source_of(redis_url, scan_count=scan_count) as source:
        found, _ = await read(source, Reading("json"))
    assert found == expected


async def test_scan_of_nothing(source: Source) -> None:
    for reading in (BALANCES, ACCOUNTS, BIG):
        assert await read(source, reading) == ({}, [])


async def test_keys_left_out_count_as_scanned(source: Source, redis: Redis) -> None:
    expected = await fill(redis, 1_000)
    pages: list[bytes] = []

    def select(keys: list[bytes]) -> list[bytes]:
        pages.extend(keys)
        return [key for key in keys if key.endswith(b"7")]

    found, batches = await read(source, Reading("string", select=select))
    assert found == {key: value for key, value in expected.items() if key.endswith(b"7")}
    assert sum(batch.scanned for batch in batches) == len(pages) >= 1_000


async def test_pages_without_a_wanted_key_count_too(source: Source, redis: Redis) -> None:
    await fill(redis, 1_000)
    found, batches = await read(source, Reading("string", select=lambda keys: []))
    assert found == {}
    assert sum(batch.scanned for batch in batches) >= 1_000


async def test_other_types_are_named(source: Source, redis: Redis) -> None:
    expected = await fill(redis, 300)
    await redis.rpush("balance:list", "1")
    await redis.sadd("balance:set", "1")
    await redis.zadd("balance:zset", {"1": 1})
    await redis.hset("balance:hash", "a", "1")
    await redis.xadd("balance:stream", {"a": "1"})
    found, _ = await read(source, BALANCES)
    wrong = {
        b"balance:%b" % t.encode(): WrongType(t) for t in ["list", "set", "zset", "hash", "stream"]
    }
    assert found == expected | wrong


async def test_a_key_gone_or_replaced_between_scan_and_read(
    source: Source, redis_url: str, redis: Redis
) -> None:
    expected = await fill(redis, 300)
    with blocking.Redis.from_url(redis_url) as other:

        def select(keys: list[bytes]) -> list[bytes]:
            if b"balance:7" in keys:
                other.delete("balance:7")
            if b"balance:8" in keys:
                other.delete("balance:8")
                other.rpush("balance:8", "1")
            return keys

        found, _ = await read(source, Reading("string", select=select))
    assert found == expected | {b"balance:7": None, b"balance:8": WrongType("list")}


async def test_a_key_made_anew_after_it_was_read_is_read_again(
    redis_url: str, redis: Redis
) -> None:
    await redis.set("back", "12")
    await redis.rpush("other", "1")
    address, access = parse(redis_url, timeout=5, clustered=False)
    connection = await connect(address, access)
    # As MGET found them a moment ago: none was a string.
    values: list[RawValue] = [None, None, None]
    await Strings(connection, 100).settle([b"back", b"gone", b"other"], values, [0, 1, 2])
    assert values == [b"12", None, WrongType("list")]
    await connection.close()


async def test_a_listener_rests_until_he_asks_or_the_rest_is_over(
    redis_url: str, redis: Redis
) -> None:
    address, access = parse(redis_url, timeout=5, clustered=False)
    for rest_s, unasked in ((3600.0, []), (0.02, [b"1"])):
        heard: list[bytes] = []
        async with connected(address, access) as connection, asyncio.timeout(10):
            connection.listen(heard.append, rest_s)
            await connection.send(pack((b"SUBSCRIBE", b"news")))
            assert await redis.publish("news", "1") == 1
            # It was sent before this is answered.
            await redis.ping()
            while len(heard) < len(unasked):  # noqa: ASYNC110  # nobody tells when a rest is over
                await asyncio.sleep(0.005)
            assert heard == unasked
            await connection.send(pack((b"PING",)))
            assert heard == [b"1"]


async def test_hashes(source: Source, redis_url: str, redis: Redis) -> None:
    expected: dict[bytes, RawValue] = {}
    for number in range(700):
        await redis.hset(f"account:{number}", mapping={"amount": number, "currency": "EUR"})
        expected[b"account:%d" % number] = [b"%d" % number, b"EUR", None]
    await redis.hset("account:bare", "other", "1")
    await redis.set("account:string", "1")
    await redis.rpush("account:list", "1")
    expected |= {
        b"account:bare": [None, None, None],
        b"account:string": WrongType("string"),
        b"account:list": WrongType("list"),
        b"account:5": None,
    }
    with blocking.Redis.from_url(redis_url) as other:

        def select(keys: list[bytes]) -> list[bytes]:
            other.delete("account:5")
            return keys

        reading = Reading("hash", ACCOUNTS.match, ACCOUNTS.fields, select=select)
        assert (await source.fetch(reading, [b"account:5"])).values == [[b"5", b"EUR", None]]
        found, _ = await read(source, reading)
    assert found == {key: value for key, value in expected.items() if key in found}
    assert expected.keys() - found.keys() <= {b"account:5"}


@pytest.mark.parametrize("count", [3, 5_000])
async def test_the_fields_of_a_big_hash(source: Source, redis: Redis, count: int) -> None:
    fields = {b"%d" % number: b"%d.5" % number for number in range(count)}
    await redis.hset("big", items=[*chain.from_iterable(fields.items())])
    assert (await read(source, BIG))[0] == fields
    odd = Reading("hash", b"*1", member_key=b"big", select=lambda keys: keys[::2])
    found, batches = await read(source, odd)
    assert found.items() <= {k: v for k, v in fields.items() if k.endswith(b"1")}.items()
    scanned = sum(batch.scanned for batch in batches)
    assert scanned >= sum(key.endswith(b"1") for key in fields)
    assert len(found) == sum(len(batch.keys) for batch in batches) >= scanned // 2


async def test_a_big_hash_of_another_type(source: Source, redis: Redis) -> None:
    await redis.rpush("big", "1")
    with pytest.raises(MappingFailed, match=r"the big hash big in Redis at .* holds a list"):
        await read(source, BIG)
    with pytest.raises(MappingFailed, match="holds a list"):
        await source.fetch(BIG, [b"1"])
    with pytest.raises(MappingFailed, match="holds a list"):
        await source.exists(BIG, [b"1"])


async def test_long_values_are_cut_and_never_pile_up(redis_url: str, redis: Redis) -> None:
    megabyte = b"7" * 1_000_000
    for number in range(150):
        await redis.set(f"balance:{number}", megabyte)
    async with source_of(redis_url) as source:
        tracemalloc.start()
        async with aclosing(source.scan(BALANCES)) as batches:
            seen: dict[bytes, RawValue] = {}
            async for batch in batches:
                assert len(batch.keys) < 100
                seen |= zip(batch.keys, batch.values, strict=True)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(seen) == 150
    assert set(seen.values()) == {megabyte[: LONGEST_VALUE + 1]}
    # 150 cut values are 10 MB; what is read ahead and thrown away comes on top.
    assert peak < 45_000_000


async def test_long_fields_are_cut(source: Source, redis: Redis) -> None:
    await redis.hset("account:1", mapping={"amount": "1", "note": "x" * 200_000})
    await redis.hset("big", mapping={"1": "x" * 200_000, "2": "2"})
    cut = b"x" * (LONGEST_VALUE + 1)
    assert (await read(source, ACCOUNTS))[0] == {b"account:1": [b"1", None, cut]}
    assert (await read(source, BIG))[0] == {b"1": cut, b"2": b"2"}
    assert (await source.fetch(BIG, [b"2", b"1"])).values == [b"2", cut]


async def test_a_limit_spreads_the_reading(redis_url: str, redis: Redis) -> None:
    expected = await fill(redis, 300)
    async with source_of(redis_url, max_keys_per_second=1_000) as source:
        loop = asyncio.get_running_loop()
        start = loop.time()
        found, batches = await read(source, BALANCES)
    assert found == expected
    # Pages of a tenth of a second each, and no wait after the last.
    assert loop.time() - start >= 0.19
    assert len(batches) >= 3


async def test_leaving_a_scan_early_leaves_nothing_behind(
    source: Source, redis_url: str, redis: Redis
) -> None:
    await fill(redis, 5_000)
    before = asyncio.all_tasks()
    async with aclosing(source.scan(BALANCES)) as batches:
        async for _ in batches:
            break
    assert asyncio.all_tasks() == before
    # Redis is through with a closed connection before it serves the next one.
    async with Redis.from_url(redis_url) as later:
        names = [client["name"] for client in await later.client_list()]
    assert "balancesync" not in names


async def test_a_fault_of_the_selection_ends_the_scan(source: Source, redis: Redis) -> None:
    await fill(redis, 5_000)

    def select(keys: list[bytes]) -> list[bytes]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await read(source, Reading("string", select=select))


@pytest.mark.parametrize("empty", [False, True], ids=["full", "empty"])
@pytest.mark.parametrize("reading", [BALANCES, Reading("hash", b"balance:*", (b"a",))])
async def test_a_server_restarted_in_mid_scan(
    private_redis: PrivateRedis, empty: bool, reading: Reading
) -> None:
    server = private_redis({"appendonly": "yes", "appendfsync": "always"})
    async with Redis.from_url(server.url) as redis:
        await fill(redis, 20_000)
    async with source_of(server.url, scan_count=100) as source:
        first = await source.identity()
        batches = source.scan(reading)
        await anext(batches)
        server.kill()
        if empty:
            server.settings["appendonly"] = "no"
        server.start()
        with pytest.raises(Changed, match="closed the connection in mid-run"):
            async for _ in batches:
                pass
        # The source itself goes on, and knows that it is another server.
        with pytest.raises(Changed, match="was restarted"):
            await read(source, reading, first)
        second = await source.identity()
        assert second.run_id != first.run_id
        assert second.dbsize == (0 if empty else 20_000)
        found, _ = await read(source, reading, second)
        assert len(found) == second.dbsize


async def interrupted(source: Source, act: Callable[[], object]) -> None:
    """Scan, and in the middle do `act`."""
    batches = source.scan(BALANCES)
    await anext(batches)
    await asyncio.to_thread(act)
    async for _ in batches:
        pass


async def test_what_breaks_a_scan_in_two(private_redis: PrivateRedis) -> None:
    server = private_redis()
    with blocking.Redis.from_url(server.url) as other:
        other.mset({f"balance:{number}": "1" for number in range(5_000)})
        async with source_of(server.url, scan_count=100) as source:
            assert (await source.fetch(BALANCES, [b"balance:1"])).values == [b"1"]
            with pytest.raises(Changed, match="closed the connection in mid-run"):
                await interrupted(source, lambda: other.client_kill_filter(_type="normal"))
            await source.ping()
            with pytest.raises(Changed, match="SWAPDB"):
                await interrupted(source, lambda: other.swapdb(3, 4))

            def leave_and_return() -> None:
                other.replicaof("127.0.0.1", "1")
                other.replicaof("NO", "ONE")

            with pytest.raises(Changed, match="began a new history"):
                await interrupted(source, leave_and_return)
            with pytest.raises(RedisUnavailable, match="is a replica; only a primary is read"):
                await interrupted(source, lambda: other.replicaof("127.0.0.1", "1"))
            # So it is from the start, and on a connection that was made when it still was one.
            with pytest.raises(RedisUnavailable, match="is a replica"):
                await source.fetch(BALANCES, [b"balance:1"])
            with pytest.raises(RedisUnavailable, match="is a replica"):
                await read(source, BALANCES)
            with pytest.raises(RedisUnavailable, match="is a replica"):
                await source.identity()


async def test_a_server_that_hangs(private_redis: PrivateRedis) -> None:
    server = private_redis()
    with blocking.Redis.from_url(server.url) as other:
        other.mset({f"balance:{number}": "1" for number in range(5_000)})
    async with source_of(server.url, scan_count=100, timeout=0.3) as source:
        with pytest.raises(RedisUnavailable, match=r"within redis\.timeout = 0\.3 s"):
            await interrupted(source, server.suspend)
        with pytest.raises(RedisUnavailable, match=r"within redis\.timeout = 0\.3 s"):
            await source.ping()
        server.resume()
        assert len((await read(source, BALANCES))[0]) == 5_000


async def test_a_slow_reader_is_no_hanging_server(redis_url: str, redis: Redis) -> None:
    expected = await fill(redis, 3_000)
    pages = 0

    def select(keys: list[bytes]) -> list[bytes]:
        nonlocal pages
        pages += 1
        if pages == 10:
            time.sleep(0.3)  # nothing is read meanwhile, though the next page is asked for
        return keys

    found: set[bytes] = set()
    async with (
        source_of(redis_url, timeout=0.1, scan_count=100) as source,
        aclosing(source.scan(Reading("string", select=select))) as batches,
    ):
        async for batch in batches:
            if not found:
                await asyncio.sleep(0.3)
            found.update(batch.keys)
    assert found == expected.keys()


async def test_a_scan_may_take_longer_than_a_reply(redis_url: str, redis: Redis) -> None:
    expected = await fill(redis, 8_000)
    async with source_of(redis_url, timeout=0.1, scan_count=1) as source:
        loop = asyncio.get_running_loop()
        start = loop.time()
        assert (await read(source, BALANCES))[0] == expected
        assert loop.time() - start > 0.2


async def test_one_failure_ends_no_others_question(private_redis: PrivateRedis) -> None:
    server = private_redis()
    async with Redis.from_url(server.url) as redis, Proxy(server.port) as proxy:
        stored = await fill(redis, 1000)
        url = f"redis://127.0.0.1:{proxy.port}/0"
        async with source_of(url, scan_count=50) as source:
            await source.identity()
            held = proxy.hold(b"PTTL")
            sampling = asyncio.create_task(source.sample(BALANCES, 1000))
            async with asyncio.timeout(10):
                await held.wait()
            await redis.execute_command("REPLICAOF", "127.0.0.1", str(server.port + 1))  # type: ignore[no-untyped-call] # so it is in redis-py
            asking = asyncio.create_task(source.identity())
            proxy.resume()
            with pytest.raises(RedisUnavailable, match="is a replica"):
                await asking
            assert not sampling.done()
            sample = await sampling
            assert set(sample.batch.keys) <= set(stored)
            assert len(sample.ttls) >= 900
            # The last to use a connection that was given up has closed it.
            with pytest.raises(RedisUnavailable, match="is a replica"):
                await source.fetch(BALANCES, [b"balance:1"])
            async with asyncio.timeout(10):
                while "balancesync" in [c["name"] for c in await redis.client_list()]:
                    await redis.ping()


async def test_a_loading_server(private_redis: PrivateRedis) -> None:
    server = private_redis({"save": "900 1", "rdbcompression": "no"})
    with blocking.Redis.from_url(server.url) as other:
        other.mset({f"balance:{number}": "1" * 1_000 for number in range(20_000)})
    server.stop()
    # It looks at its clients after each 2 MB only.
    server.settings["key-load-delay"] = "100"
    server.start(wait=False)
    loop = asyncio.get_running_loop()
    end, message = loop.time() + 20, "refused"
    async with source_of(server.url) as source:
        while "refused" in message and loop.time() < end:
            with pytest.raises(RedisUnavailable) as caught:
                await read(source, BALANCES)
            message = str(caught.value)
    assert message == f"Redis at 127.0.0.1:{server.port} is loading its data"
    server.kill()


RIGHTS = "scan mget type exists pttl ping info dbsize hmget hscan hexists"
KEYS = "~balance:* ~account:* ~big"


async def set_user(redis: Redis, *rules: str) -> None:
    command: Awaitable[object] = redis.execute_command("ACL", "SETUSER", "least", *rules)  # type: ignore[no-untyped-call] # so it is in redis-py
    await command


async def test_the_documented_rights_are_enough(redis_url: str, redis: Redis) -> None:
    await fill(redis, 300)
    await redis.hset("account:1", "amount", "1")
    await redis.hset("big", "1", "1")
    rights = [f"+{command}" for command in RIGHTS.split()]
    await set_user(redis, "reset", "on", ">x%@", *KEYS.split(), *rights)
    parts = urlsplit(redis_url)
    url = f"redis://least:{quote('x%@', safe='')}@{parts.hostname}:{parts.port}{parts.path}"
    try:
        async with source_of(url) as source:
            for reading in (BALANCES, ACCOUNTS, BIG):
                found, _ = await read(source, reading, await source.identity())
                keys = list(found)
                assert keys
                assert (await source.fetch(reading, keys)).values == list(found.values())
                assert all(await source.exists(reading, keys))
                assert len((await source.sample(reading, 10)).ttls) == min(10, len(keys))
            assert sum((await source.dbsize()).values()) == 302
            assert (await source.facts())[0].save is None
            assert await source.ping() > 0
            with pytest.raises(RightMissing, match=r"its keys|~PATTERN"):
                await source.fetch(BALANCES, [b"other"])
            await set_user(redis, "-scan")
            with pytest.raises(RightMissing, match=r"doesn't let this user run SCAN; .* \+scan"):
                await read(source, BALANCES)
            await set_user(redis, "-info")
            with pytest.raises(RightMissing, match=r"\+info.*docs/security.md"):
                await source.identity()
    finally:
        await redis.acl_deluser("least")


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("NOPERM User keyring has no permissions to run the 'mget' command", r"\+mget"),
        ("NOPERM this user has no permissions to run the 'mget' command or its sub", r"\+mget"),
        ("NOPERM No permissions to access a key", "~PATTERN"),
        ("NOPERM this user has no permissions to access one of the keys used as", "~PATTERN"),
        ("NOPERM User bob has no permissions to access the 'balance:1' key", "~PATTERN"),
        ("NOPERM The user executing the script can't run this command or subcommand", "script"),
        ("ERR ACL failure in script: User b has no permissions to run the 'set' command", r"\+set"),
    ],
)
async def test_the_right_that_is_missing_is_named(redis_url: str, said: str, right: str) -> None:
    address, access = parse(redis_url, timeout=5.0, clustered=False)
    async with connected(address, access) as connection:
        explained = connection.explain(said, b"MGET")
    assert explained.exit_code == 2
    assert re.search(right, str(explained))


async def test_passwords(private_redis: PrivateRedis) -> None:
    server = private_redis(password="p@ss%40:/?#w")
    async with source_of(server.url) as source:
        assert (await source.identity()).dbsize == 0
    bare = f"127.0.0.1:{server.port}"
    for url in (f"redis://:wrong-s3cret@{bare}", f"redis://nobody:wrong-s3cret@{bare}/3"):
        async with source_of(url) as source:
            with pytest.raises(ConfigError, match="rejects the user or password") as caught:
                await source.identity()
            assert bare in without_secret(caught.value, "s3cret")
    async with source_of(f"redis://{bare}") as source:
        with pytest.raises(ConfigError, match="wants a password"):
            await read(source, BALANCES)


async def test_a_password_where_none_is_set(redis_url: str) -> None:
    parts = urlsplit(redis_url)
    async with source_of(f"redis://:s3cret@{parts.hostname}:{parts.port}") as source:
        with pytest.raises(ConfigError, match="rejects the user or password") as caught:
            await source.ping()
    without_secret(caught.value, "s3cret")


async def test_other_databases_and_sockets(private_redis: PrivateRedis, tmp_path: Path) -> None:
    server = private_redis({"unixsocket": "s", "databases": "4"})
    with blocking.Redis(port=server.port, db=3) as other:
        other.set("balance:1", "3")
    socket = server.folder / "s"
    for url in (f"redis://127.0.0.1:{server.port}/3", f"unix://{socket}?db=3"):
        async with source_of(url) as source:
            assert (await read(source, BALANCES))[0] == {b"balance:1": b"3"}
            assert sum((await source.dbsize()).values()) == 1
    async with source_of(f"redis://127.0.0.1:{server.port}/4") as source:
        with pytest.raises(ConfigError, match="has no database 4"):
            await source.ping()
    async with source_of(f"unix://{tmp_path}/none") as source:
        with pytest.raises(RedisUnavailable, match="none can't be reached: no such file"):
            await source.ping()


async def test_servers_that_cannot_be_reached(private_redis: PrivateRedis) -> None:
    full = private_redis()
    cases = {
        "redis://127.0.0.1:1": "Redis at 127.0.0.1:1 can't be reached: connection refused",
        "redis://nosuch.invalid": "nosuch.invalid:6379 can't be reached: no such host",
        full.url: "maximum number of clients",
    }
    with blocking.Redis.from_url(full.url) as other:
        other.config_set("maxclients", 1)
        for url, message in cases.items():
            async with source_of(url) as source:
                with pytest.raises(RedisUnavailable, match=message):
                    await source.identity()


@pytest.mark.parametrize(
    ("greeting", "error", "message"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ConfigError, "speaks another protocol"),
        (b"-DENIED Redis is running in protected mode.\r\n", ConfigError, "protected mode"),
        (b"", RedisUnavailable, "closed the connection"),
        (None, RedisUnavailable, "doesn't answer within"),
    ],
)
async def test_ports_without_a_redis(
    greeting: bytes | None, error: type[BalanceSyncError], message: str
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        if greeting is None:
            await reader.read()
        else:
            writer.write(greeting)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1")
    port = server.sockets[0].getsockname()[1]
    async with server, source_of(f"redis://127.0.0.1:{port}", timeout=0.2) as source:
        with pytest.raises(error, match=message):
            await source.identity()


async def test_tls_options(redis_url: str, tmp_path: Path) -> None:
    for option in ("ssl_ca_certs=/nowhere.pem", "ssl_no_such=1", "ssl_cert_reqs=perhaps"):
        with pytest.raises(ConfigError, match=r"redis\.url: .* ssl_ options"):
            source_of(f"rediss://127.0.0.1:6379?{option}")
    port = urlsplit(redis_url).port
    # Redis takes the beginning of TLS for a line that isn't at its end yet, or for a wrong one.
    async with source_of(f"rediss://127.0.0.1:{port}", timeout=0.2) as source:
        with pytest.raises(BalanceSyncError, match="TLS"):
            await source.ping()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate of `localhost` by nobody in particular, with its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl to make a certificate")
    path = tmp_path / "localhost.pem"
    options = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    command = [openssl, "req", "-x509", *options.split(), "-addext", "subjectAltName=DNS:localhost"]
    made = subprocess.run([*command, "-keyout", "-", "-out", "-"], check=True, capture_output=True)
    path.write_bytes(made.stdout)
    return path


async def test_tls(redis_url: str, redis: Redis, certificate: Path) -> None:
    expected = await fill(redis, 2_000)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    target = urlsplit(redis_url)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind = await asyncio.open_connection(target.hostname, target.port)
        await asyncio.gather(pump(reader, behind[1]), pump(behind[0], writer))

    # The embedded servers speak no TLS: this end does it for them.
    server = await asyncio.start_server(relay, "localhost", ssl=context)
    address = f"localhost:{server.sockets[0].getsockname()[1]}{target.path}"
    async with server:
        async with source_of(f"rediss://{address}?ssl_ca_certs={certificate}") as source:
            assert (await read(source, BALANCES))[0] == expected
        async with source_of(f"rediss://{address}") as source:
            with pytest.raises(ConfigError, match=r"the certificate .* isn't accepted: self"):
                await source.identity()
        async with source_of(f"redis://{address}") as source:
            with pytest.raises(RedisUnavailable, match="does it want TLS"):
                await source.identity()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def test_reading_keys_by_name(source: Source, redis: Redis) -> None:
    expected = await fill(redis, 2_000)
    await redis.rpush("list", "1")
    keys = [b"nothing", *expected, b"list"]
    batch = await source.fetch(BALANCES, keys)
    assert batch.keys == keys
    assert batch.values == [None, *expected.values(), WrongType("list")]
    assert batch.scanned == len(keys)
    assert await source.exists(BALANCES, keys) == [False, *[True] * 2_001]
    assert (await source.fetch(BALANCES, [])).values == []
    await redis.hset("big", mapping={"1": "1.5"})
    assert (await source.fetch(BIG, [b"2", b"1"])).values == [None, b"1.5"]
    assert await source.exists(BIG, [b"2", b"1"]) == [False, True]


async def test_reading_by_name_remembers_how_large_the_values_are(
    source: Source, redis: Redis
) -> None:
    keys = list(await fill(redis, 40))
    await source.fetch(BALANCES, keys)
    await redis.config_resetstat()
    await source.fetch(BALANCES, keys)
    # The first reading had to find out, from a few keys on.
    assert (await redis.info("commandstats"))["cmdstat_mget"]["calls"] == 1


async def test_a_sample_is_bounded_and_knows_lifetimes(source: Source, redis: Redis) -> None:
    expected = await fill(redis, 2_000)
    for key in expected:
        if key.endswith(b"7"):
            await redis.expire(key, 1_000)
    sample = await source.sample(BALANCES, 500)
    assert len(sample.batch.keys) == len(sample.ttls) == 500
    for key, value, ttl in zip(sample.batch.keys, sample.batch.values, sample.ttls, strict=True):
        assert value == expected[key]
        assert (ttl is not None and 900_000 < ttl <= 1_000_000) == key.endswith(b"7")
    everything = await source.sample(BALANCES, 10_000)
    assert set(everything.batch.keys) == expected.keys()


async def test_who_it_is_and_how_safe_its_data_is(
    source: Source, redis: Redis, redis_url: str
) -> None:
    await fill(redis, 10)
    identity = await source.identity()
    info = await redis.info()
    assert identity.run_id == info["run_id"]
    assert identity.server in ("redis", "valkey")
    assert identity.version == info.get(f"{identity.server}_version")
    assert identity.dbsize == 10
    (facts,) = await source.facts()
    assert (facts.maxmemory_policy, facts.appendonly, facts.save) == ("noeviction", False, "")
    assert facts.used_memory > 100_000
    assert facts.last_save_ok
    parts = urlsplit(redis_url)
    assert await source.dbsize() == {f"{parts.hostname}:{parts.port}": 10}
    assert 0 < await source.ping() < 5
