"""One balance by HTTP: from Redis, else from PostgreSQL, printed alike by both."""

import asyncio
import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from io import BytesIO
from time import perf_counter
from typing import Any
from urllib.parse import quote, urlsplit

import asyncpg
import pytest
from daemon_site import Site
from proxy import Proxy
from redis.asyncio import Redis
from yarl import URL

from balancesync.batches import Batches
from balancesync.columns import ColumnType
from balancesync.embedded import PostgresServer
from balancesync.printing import printer, value_text
from balancesync.values import Fit, ValueColumn

NUMBERS = (
    *("0", "-0", "-0.00", "7", "007", "-7", "1.5", "-1.50", "12345.10", "1e2", "150e-2", "0.5"),
    *("1E+3", "99.9900", "-0.5", "0.000", "32767", "9007199254740993", "123456789012345678.99"),
)
TEXTS = ("", "plain", "a\tb", "line\nfeed", "back\\slash", "\\N", "\\n", "\r", "ünï", "'; --")
VALUES: dict[str, tuple[str, ...]] = {
    "smallint": NUMBERS,
    "integer": NUMBERS,
    "bigint": (*NUMBERS, "9223372036854775807", "-9223372036854775808"),
    "numeric": (*NUMBERS, "1e-20", "1e1100", "-1e-1200", "0.1000", "000.10"),
    "numeric(20,2)": NUMBERS,
    "numeric(5,5)": ("0", "0.1", "0.00001", "-0.12345"),
    "numeric(6,0)": NUMBERS,
    "text": TEXTS,
    "varchar(12)": (*TEXTS, "ü" * 12),
    "uuid": ("0123ABCD-0123-abcd-ef01-0123456789ab", "00000000-0000-0000-0000-000000000000"),
    "boolean": ("true", "false", "t", "f", "1", "0"),
    "timestamptz": (
        *("2026-01-31T02:03:04Z", "2026-01-31 02:03:04.500+02:00", "0044-03-15T12:00:00Z"),
        *("9999-12-31T23:59:59.999999Z", "2026-06-01T00:00:00.000100-0130"),
    ),
}
STRING = {"name": "plain"}
WALLETS = {
    "name": "wallets",
    "key": "wallet:{owner}|{currency}",
    "type": "hash",
    "table": "wallets",
    "columns": {
        "owner": "text",
        "currency": "varchar(3)",
        "amount": "numeric(10,3)",
        "active": "boolean",
        "seen": "timestamptz",
        "note": "text",
    },
}


def some_numbers(seed: int) -> list[str]:
    """Texts of numbers of all sizes and forms."""
    dice = random.Random(seed)  # noqa: S311  # no secret: the same each time
    digits = ["".join(dice.choices("0123456789", k=dice.randint(1, 12))) for _ in range(4000)]
    signs = dice.choices(("", "-"), k=2000)
    powers = dice.choices(("", "", "", "e1", "e-1", "E+02"), k=2000)
    parts = zip(signs, digits[:2000], digits[2000:], powers, strict=True)
    return [f"{s}{w}.{p[: dice.randint(1, 5)]}{e}" for s, w, p, e in parts]


@pytest.mark.parametrize("kind", VALUES)
async def test_python_prints_as_postgres_does(pg: asyncpg.Connection, kind: str) -> None:
    column = ColumnType.parse(kind)
    rule = ValueColumn("v", column, Decimal(0))
    texts = [*VALUES[kind], *(some_numbers(7) if VALUES[kind][0] == "0" else ())]
    fits = [fit for text in texts if isinstance(fit := rule.parse(text.encode()), Fit)]
    fields = [fit.copy for fit in fits] + [rb"\N"]
    assert len(fields) >= 3
    await pg.execute(f"CREATE TABLE shown (n serial, v {kind})")
    # Whatever the session thinks of time.
    await pg.execute("SET timezone = 'Asia/Kathmandu'; SET datestyle = 'German'")
    copied = BytesIO(b"".join(field + b"\n" for field in fields))
    await pg.copy_to_table("shown", source=copied, columns=["v"])
    rows = await pg.fetch(f"SELECT {value_text('v', column)} AS text FROM shown ORDER BY n")
    assert [printer(column)(field) for field in fields] == [row["text"] for row in rows]


async def test_infinite_times_of_others_are_printed_too(pg: asyncpg.Connection) -> None:
    text = value_text("v", ColumnType.parse("timestamptz"))
    sql = f"SELECT {text} FROM (VALUES ('-infinity'::timestamptz)) AS s (v)"
    assert await pg.fetchval(sql) == "-infinity"


async def test_a_balance_from_redis(postgres_dsn: str, redis_url: str, redis: Redis) -> None:
    await redis.mset({"balance:1": "1234.5", "balance:2": "12"})
    async with Site.on(postgres_dsn, redis_url, STRING) as site:
        before = datetime.now(UTC) - timedelta(milliseconds=1)
        status, found = await site.ask("/balances/plain/1")
        assert status == 200
        assert before <= datetime.fromisoformat(found.pop("as_of")) <= datetime.now(UTC)
        assert found == {
            "mapping": "plain",
            "key": {"user_id": "1"},
            "values": {"balance": "1234.50"},
            "source": "redis",
        }
        # It is read each time anew.
        await redis.set("balance:1", "99")
        assert (await site.ask("/balances/plain/1"))[1]["values"] == {"balance": "99.00"}


@pytest.mark.parametrize("lost", ["down", "key gone", "rejected", "another type"])
async def test_a_balance_from_postgres(
    postgres_dsn: str, redis_url: str, redis: Redis, pg: asyncpg.Connection, lost: str
) -> None:
    await redis.set("balance:1", "1234.5")
    async with (
        Proxy(urlsplit(redis_url).port or 0) as proxy,
        Site.on(postgres_dsn, f"redis://127.0.0.1:{proxy.port}", STRING) as site,
    ):
        await site.sync()
        match lost:
            case "down":
                await proxy.refuse()
            case "rejected":
                await redis.set("balance:1", "plenty")
            case _:
                await redis.delete("balance:1")
        if lost == "another type":
            await redis.lpush("balance:1", "12")
        status, found = await site.ask("/balances/plain/1")
    synced_at = await pg.fetchval("SELECT synced_at FROM balances")
    assert (status, found["source"], found["values"]) == (200, "postgres", {"balance": "1234.50"})
    as_of = datetime.fromisoformat(found["as_of"])
    assert abs(as_of - synced_at) < timedelta(milliseconds=1)


async def test_neither_has_it(postgres_dsn: str, redis_url: str, redis: Redis) -> None:
    await redis.set("balance:2", "no number")
    async with Site.on(postgres_dsn, redis_url, STRING) as site:
        # Before a first run there isn't even a table.
        answers = [await site.ask(f"/balances/plain/{key}") for key in ("1", "2")]
        await site.sync()
        answers += [await site.ask(f"/balances/plain/{key}") for key in ("1", "2")]
    assert [status for status, _ in answers] == [404] * 4
    for _, document in answers:
        assert document["error"]["code"] == "not_found"
    assert "Redis has no such key, and PostgreSQL has no row" in answers[2][1]["error"]["message"]
    assert "rejected as not_a_number" in answers[3][1]["error"]["message"]


async def test_without_synced_at_it_is_as_of_the_last_success(
    postgres_dsn: str, redis_url: str, redis: Redis
) -> None:
    await redis.set("balance:1", "1")
    async with Site.on(postgres_dsn, redis_url, {"synced_at": ""}) as site:
        run = await site.sync()
        await redis.delete("balance:1")
        _, found = await site.ask("/balances/balances/1")
    assert run.finished_at is not None
    as_of = datetime.fromisoformat(found["as_of"])
    assert abs(as_of - run.finished_at) < timedelta(milliseconds=1)


async def test_the_table_of_an_application(
    postgres_dsn: str, redis_url: str, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(
        "CREATE TABLE users (id serial PRIMARY KEY, telegram_id bigint UNIQUE, balance bigint,"
        " sync_at timestamp)"
    )
    await pg.execute(
        "INSERT INTO users (telegram_id, balance, sync_at)"
        " VALUES (77, 5, '2026-01-02 03:04:05'), (78, NULL, NULL)"
    )
    await redis.mset({"123": "1", "cache:1": "x"})
    users = {
        "name": "users",
        "key": "{telegram_id}",
        "ignore": ["9*"],
        "table": "users",
        "mode": "update",
        "synced_at": "sync_at",
        "columns": {"telegram_id": "bigint", "balance": "bigint"},
    }
    async with Site.on(postgres_dsn, redis_url, users) as site:
        assert (await site.ask("/balances/users/123"))[1]["source"] == "redis"
        status, found = await site.ask("/balances/users/77")
        assert (status, found["as_of"]) == (200, "2026-01-02T03:04:05.000Z")
        assert found["values"] == {"balance": "5"}
        status, found = await site.ask("/balances/users/78")
        assert (status, found["values"], found["as_of"]) == (200, {"balance": None}, None)
        assert (await site.ask("/balances/users/99"))[0] == 422
        assert (await site.ask("/balances/users/cache:1"))[0] == 422


OWNERS = ("o'brien\"; DROP TABLE wallets; --", "../../etc", "%2e%2e", "a b?c#d&e", "{0}", "ü\n€")


@pytest.fixture
async def wallets(redis: Redis) -> None:
    """A wallet of each owner, without the field note."""
    for number, owner in enumerate(OWNERS):
        fields: dict[Any, Any] = {"amount": f"{number}.5", "active": "1"}
        fields["seen"] = "2026-01-31T02:00:00+01:00"
        await redis.hset(f"wallet:{owner}|EUR", mapping=fields)


async def ask_raw(site: Site, path: str) -> tuple[int, Any]:
    """Ask for a path below the balances, percent-encoded as it is written."""
    url = URL(f"{site.web.address}/sync-management/balances/{path}", encoded=True)
    async with site.client.get(url) as answer:
        return answer.status, await answer.json()


@pytest.mark.usefixtures("wallets")
async def test_several_columns_and_hostile_texts(
    postgres_dsn: str, redis_url: str, redis: Redis, pg: asyncpg.Connection
) -> None:
    await pg.execute(
        "CREATE TABLE wallets (owner text, currency varchar(3), amount numeric(10,3),"
        " active boolean, seen timestamptz, note text, synced_at timestamptz,"
        " PRIMARY KEY (owner, currency))"
    )
    async with Site.on(postgres_dsn, redis_url, WALLETS) as site:
        for source in ("redis", "postgres"):
            for number, owner in enumerate(OWNERS):
                status, found = await ask_raw(site, f"wallets/{quote(owner, safe='')}/EUR")
                assert (status, found["source"]) == (200, source)
                assert found["key"] == {"owner": owner, "currency": "EUR"}
                assert found["values"] == {
                    "amount": f"{number}.500",
                    "active": "true",
                    "seen": "2026-01-31 01:00:00+00",
                    "note": None,
                }
            assert (await site.sync(accept_loss=True)).counts.kept == 0
            await redis.flushdb()
    assert await pg.fetchval("SELECT count(*) FROM wallets") == len(OWNERS)


@pytest.mark.usefixtures("wallets")
async def test_a_field_that_is_left_out_is_no_null_without_a_table_that_allows_it(
    postgres_dsn: str, redis_url: str
) -> None:
    async with Site.on(postgres_dsn, redis_url, WALLETS) as site:
        status, document = await ask_raw(site, "wallets/%7B0%7D/EUR")
    assert status == 404
    assert "rejected as missing_field" in document["error"]["message"]


NO_KEYS = (
    *("007", "+7", "7.0", "x", "", "7/", "7/8", "%2F", "1%00", "%ff", "9223372036854775808"),
    "1" * 3000,
)


async def test_what_is_no_key(postgres_dsn: str, redis_url: str) -> None:
    async with Site.on(postgres_dsn, redis_url, STRING) as site:
        for path in NO_KEYS:
            status, document = await ask_raw(site, f"plain/{path}")
            assert (status, document["error"]["code"]) == (422, "invalid_key"), path


async def test_json_and_member(postgres_dsn: str, redis_url: str, redis: Redis) -> None:
    await redis.set("account:7", '{"amount": 12.50, "extra": 1}')
    await redis.hset("all", mapping={"7": "99"})
    mappings: tuple[dict[str, Any], ...] = (
        {
            "name": "json",
            "key": "account:{id}",
            "type": "json",
            "table": "accounts",
            "columns": {"id": "integer", "amount": "numeric(10,2)"},
        },
        {
            "name": "member",
            "key": "all",
            "member": "{id}",
            "type": "hash",
            "table": "members",
            "columns": {"id": "integer", "amount": "bigint"},
        },
    )
    async with Site.on(postgres_dsn, redis_url, *mappings) as site:
        for _ in range(2):
            assert (await site.ask("/balances/json/7"))[1]["values"] == {"amount": "12.50"}
            assert (await site.ask("/balances/member/7"))[1]["values"] == {"amount": "99"}
            assert (await site.ask("/balances/member/8"))[0] == 404
            await site.sync()
            if site.heard:
                # The big hash becomes a string: every record is in PostgreSQL only.
                await redis.set("all", "x")
                found = (await site.ask("/balances/member/7"))[1]
                assert (found["source"], found["values"]) == ("postgres", {"amount": "99"})
                await redis.delete("all")
                await redis.hset("all", mapping={"7": "99"})


async def test_a_hanging_redis_costs_the_first_readers_a_second_and_the_others_nothing(
    postgres_dsn: str, redis_url: str, redis: Redis
) -> None:
    await redis.mset({f"balance:{n}": str(n) for n in range(50)})
    async with Proxy(urlsplit(redis_url).port or 0) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}"
        async with Site.on(postgres_dsn, url, STRING) as site:
            await site.sync()
            assert (await site.ask("/balances/plain/1"))[1]["source"] == "redis"
            proxy.stall()
            began = perf_counter()
            found = await asyncio.gather(*[site.ask(f"/balances/plain/{n}") for n in range(20)])
            first = perf_counter() - began
            assert {answer["source"] for _, answer in found} == {"postgres"}
            assert 0.9 < first < 2.5
            began = perf_counter()
            for n in range(20, 40):
                assert (await site.ask(f"/balances/plain/{n}"))[1]["source"] == "postgres"
            assert perf_counter() - began < 0.9
            proxy.resume()
            await site.probing.probe()
            assert (await site.ask("/balances/plain/1"))[1]["source"] == "redis"


async def test_both_servers_down(
    redis_url: str, private_postgres: Callable[..., PostgresServer]
) -> None:
    server = private_postgres()
    async with Site.on(server.dsn, "redis://127.0.0.1:1", STRING) as site:
        await site.sync()
        server.kill()
        # At first the daemon doesn't know yet, then it does.
        for _ in range(2):
            status, document = await site.ask("/balances/plain/1")
            assert (status, document["error"]["code"]) == (503, "unavailable")
            assert "PostgreSQL at" in document["error"]["message"]
            await site.probing.probe()


async def test_a_past_balance_needs_the_history(postgres_dsn: str, redis_url: str) -> None:
    async with Site.on(postgres_dsn, redis_url, STRING) as site:
        status, document = await site.ask("/balances/plain/1?as_of=2026-01-01T00:00:00Z")
    assert (status, document["error"]["code"]) == (409, "no_history")
    assert "[history]" in document["error"]["message"]


async def test_a_table_that_changes_under_the_reader(
    postgres_dsn: str, redis_url: str, redis: Redis, pg: asyncpg.Connection
) -> None:
    await redis.set("balance:1", "1")
    async with Site.on(postgres_dsn, redis_url, STRING) as site:
        await site.sync()
        await redis.delete("balance:1")
        assert (await site.ask("/balances/plain/1"))[0] == 200
        await pg.execute("ALTER TABLE balances RENAME COLUMN balance TO amount")
        for _ in range(2):
            status, document = await site.ask("/balances/plain/1")
            assert (status, document["error"]["code"]) == (503, "unavailable")
            assert 'there is no column "balance"' in document["error"]["message"]
        await pg.execute("ALTER TABLE balances RENAME COLUMN amount TO balance")
        assert (await site.ask("/balances/plain/1"))[0] == 200
        await pg.execute("DROP TABLE balances")
        for _ in range(2):
            status, document = await site.ask("/balances/plain/1")
            assert (status, document["error"]["code"]) == (404, "not_found")
            assert "PostgreSQL has no row" in document["error"]["message"]


# --- batches --------------------------------------------------------------------------------------


async def test_look_ups_that_come_together_are_made_together() -> None:
    asked: list[list[int]] = []
    begun, go = asyncio.Event(), asyncio.Event()

    async def look_up(keys: list[int]) -> Sequence[int]:
        asked.append(keys)
        begun.set()
        await go.wait()
        return [2 * key for key in keys]

    batches = Batches(look_up, limit=3)
    waiting = [asyncio.create_task(batches.ask(key, 10)) for key in (1, 2, 2, 3, 4, 5)]
    await begun.wait()
    assert asked == [[1, 2, 3]]
    # One that asks while its key is being looked up gets what is looked up later.
    waiting.append(asyncio.create_task(batches.ask(1, 10)))
    await asyncio.sleep(0)
    go.set()
    assert await asyncio.gather(*waiting) == [2, 4, 4, 6, 8, 10, 2]
    assert asked == [[1, 2, 3], [4, 5, 1]]


async def test_whoever_gives_up_waiting_cancels_nothing() -> None:
    go = asyncio.Event()

    async def look_up(keys: list[int]) -> Sequence[int]:
        await go.wait()
        return keys

    batches = Batches(look_up, limit=10)
    patient = asyncio.create_task(batches.ask(1, 10))
    with pytest.raises(TimeoutError):
        await batches.ask(1, 0.01)
    go.set()
    assert await patient == 1


async def test_what_a_look_up_raises_all_get_and_the_next_is_made() -> None:
    fails = [True]

    async def look_up(keys: list[int]) -> Sequence[int]:
        if fails.pop() if fails else False:
            raise ZeroDivisionError
        return keys

    batches = Batches(look_up, limit=10)
    both = await asyncio.gather(batches.ask(1, 5), batches.ask(2, 5), return_exceptions=True)
    assert [type(error) for error in both] == [ZeroDivisionError] * 2
    assert await batches.ask(3, 5) == 3


async def test_closing_ends_a_look_up_that_hangs() -> None:
    hangs = asyncio.Event()

    async def look_up(keys: list[int]) -> Sequence[int]:
        hangs.set()
        await asyncio.Event().wait()
        return keys

    batches = Batches(look_up, limit=10)
    asking = asyncio.create_task(batches.ask(1, 60))
    await hangs.wait()
    await batches.close()
    with pytest.raises(asyncio.CancelledError):
        await asking
