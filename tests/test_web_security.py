"""What the API does with clients that mean no good, or don't know what they do."""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Sequence
from io import BytesIO
from time import perf_counter
from typing import Any, Final
from uuid import uuid4

import aiohttp
import asyncpg
import pytest
from daemon_site import PREFIX, Site
from redis.asyncio import Redis

from balancesync import listener, web

TOKEN = "correct-horse"
SECRET = [
    ("POST", f"{PREFIX}/force-sync"),
    ("DELETE", f"{PREFIX}/clear-cache"),
    ("DELETE", f"{PREFIX}/runs/{uuid4()}"),
    ("GET", f"{PREFIX}/balances/balances/1"),
    ("GET", f"{PREFIX}/balances/nonsense"),
    ("GET", f"{PREFIX}/rejects"),
    ("HEAD", f"{PREFIX}/rejects"),
]
OPEN = ["/status", "/schedule", "/stats", "/runs", "/health"]
PROBES = ["/livez", "/readyz", "/health", "/metrics", f"{PREFIX}/health"]


@pytest.fixture
async def site(postgres_dsn: str, redis_url: str) -> AsyncIterator[Site]:
    """A site without a token, on loopback."""
    async with Site.on(postgres_dsn, redis_url) as made:
        yield made


@pytest.fixture
async def guarded(postgres_dsn: str, redis_url: str) -> AsyncIterator[Site]:
    """A site with a token."""
    async with Site.on(postgres_dsn, redis_url, http={"token": TOKEN}) as made:
        yield made


async def connect(site: Site) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A bare connection to the site."""
    return await asyncio.open_connection("127.0.0.1", site.config.http.port)


async def send(site: Site, raw: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the first answer to these bytes."""
    reader, writer = await connect(site)
    try:
        writer.write(raw)
        async with asyncio.timeout(10):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head[1:-2])
            body = await reader.readexactly(int(headers.get("content-length", 0)))
    finally:
        writer.close()
    return int(head[0].split()[1]), headers, body


def error_code(body: bytes) -> str:
    """The code of an error, which has just that and a message."""
    document = json.loads(body)
    assert set(document) == {"error"}
    assert set(document["error"]) == {"code", "message"}
    assert "Traceback" not in document["error"]["message"]
    return str(document["error"]["code"])


# --- the token ------------------------------------------------------------------------------------


BAD_TOKENS: Final[Sequence[str | None]] = [
    *(None, "", TOKEN, "Bearer", "Bearer ", f"Basic {TOKEN}", f"Bearer {TOKEN}x"),
    *(
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN.upper()}",
        "Bearer \udcff\udcfe",
        f"Bearer{TOKEN}",
    ),
]


async def test_a_bad_token(guarded: Site) -> None:
    for header in BAD_TOKENS:
        headers = b""
        if header is not None:
            headers = b"Authorization: " + header.encode(errors="surrogateescape") + b"\r\n"
        for method, path in SECRET:
            raw = f"{method} {path} HTTP/1.1\r\nHost: x\r\n".encode() + headers + b"\r\n"
            status, answered, body = (
                await send(guarded, raw) if method != "HEAD" else await _head(guarded, raw)
            )
            assert (status, answered["www-authenticate"]) == (401, "bearer")
            if method != "HEAD":
                assert error_code(body) == "unauthorized"
                assert TOKEN.encode() not in body
        assert guarded.runner.current is None


async def _head(site: Site, raw: bytes) -> tuple[int, dict[str, str], bytes]:
    reader, writer = await connect(site)
    writer.write(raw)
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    writer.close()
    return int(head[0].split()[1]), dict(x.lower().split(": ", 1) for x in head[1:-2]), b""


BEARERS: Final[Sequence[str]] = ["Bearer", "bearer", "BEARER"]


async def test_the_right_token(guarded: Site) -> None:
    for word in BEARERS:
        headers = {"Authorization": f"{word} {TOKEN}", "Host": "balances.example.com"}
        for method, path in SECRET:
            async with guarded.client.request(method, path, headers=headers) as answer:
                assert answer.status not in (401, 403), path
        # The rest needs none.
        for path in OPEN:
            assert (await guarded.ask(path))[0] == 200


async def test_two_tokens_are_none(guarded: Site) -> None:
    twice = f"Authorization: Bearer {TOKEN}\r\n" * 2
    raw = f"GET {PREFIX}/rejects HTTP/1.1\r\nHost: x\r\n{twice}\r\n".encode()
    assert (await send(guarded, raw))[0] in (400, 401)


async def test_rows_are_shown_to_those_with_the_token_alone(guarded: Site, redis: Redis) -> None:
    await redis.set("balance:1", "31337")
    async with guarded.client.get(f"{PREFIX}/events") as answer:
        run = await guarded.sync(mode="dry_run")
        seen = b""
        while b"event: run_finished" not in seen or not seen.endswith(b"\n\n"):
            seen += await answer.content.readany()
    assert b"31337" not in seen
    assert b'"inserted":1' in seen
    shown = [
        json.dumps(await guarded.ask(path)) for path in (f"/runs/{run.id}", "/runs", "/status")
    ]
    assert not any("31337" in text for text in shown)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert "31337" in json.dumps(await guarded.ask(f"/runs/{run.id}", headers=headers))


# --- Host and Origin ------------------------------------------------------------------------------


FOREIGN_HOSTS: Final[Sequence[str]] = [
    *("evil.example.com", "127.0.0.1.example.com", "localhost.example.com", "127.0.0.2", ""),
    *("[::2]", "localhost:8000:1", "localhost:x", "127.1", "user@localhost", "localhost."),
]


async def test_a_foreign_host_without_a_token(site: Site) -> None:
    for host in FOREIGN_HOSTS:
        for path in (f"{PREFIX}/status", f"{PREFIX}/rejects", "/", "/openapi.json", "/nothing"):
            status, _, body = await send(
                site, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
            )
            assert (status, error_code(body)) in ((403, "foreign_host"), (400, "bad_request"))
        for path in PROBES:
            if host:
                raw = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
                assert (await send(site, raw))[0] in (200, 400)


async def test_the_host_that_is_listened_on_is_no_foreign_one(
    postgres_dsn: str, redis_url: str
) -> None:
    async with (
        Site.on(postgres_dsn, redis_url, http={"host": "127.0.0.2"}) as site,
        aiohttp.ClientSession(site.web.address) as client,
    ):
        async with client.get(f"{PREFIX}/status") as answer:
            assert answer.status == 200
        async with client.get("/", headers={"Host": "127.0.0.3"}) as answer:
            said = (await answer.json())["error"]["message"]
    assert said == "without http.token only Host localhost, 127.0.0.1, [::1] or 127.0.0.2 is served"


async def test_no_host_and_two_hosts_without_a_token(site: Site) -> None:
    for hosts in ("", "Host: localhost\r\nHost: evil.example.com\r\n"):
        raw = f"GET {PREFIX}/status HTTP/1.0\r\n{hosts}\r\n".encode()
        assert (await send(site, raw))[0] in (400, 403)


OWN_HOSTS: Final[Sequence[str]] = [
    "localhost",
    "LocalHost:8000",
    "127.0.0.1:1",
    "[::1]",
    "[::1]:80",
]


async def test_hosts_of_this_machine(site: Site) -> None:
    for host in OWN_HOSTS:
        raw = f"GET {PREFIX}/status HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        assert (await send(site, raw))[0] == 200


FOREIGN_ORIGINS: Final[Sequence[str]] = [
    *("https://evil.example.com", "null", "http://localhost", "http://localhost:8001", ""),
    *("http://localhost:8000.example.com", "file://", "http://127.0.0.1:8000"),
]


async def test_a_foreign_origin(site: Site, guarded: Site) -> None:
    for origin in FOREIGN_ORIGINS:
        for each in (site, guarded):
            headers = {
                "Host": "localhost:8000",
                "Origin": origin,
                "Authorization": f"Bearer {TOKEN}",
            }
            for method, path in [*SECRET[:2], ("GET", f"{PREFIX}/status")]:
                async with each.client.request(method, path, headers=headers) as answer:
                    assert (answer.status, error_code(await answer.read())) == (
                        403,
                        "foreign_origin",
                    )
            assert each.runner.current is None


SCHEMES: Final[Sequence[str]] = ["http", "https"]


async def test_our_own_origin(guarded: Site) -> None:
    for scheme in SCHEMES:
        headers = {"Host": "balances.example.com", "Origin": f"{scheme}://balances.example.com"}
        assert (await guarded.ask("/status", headers=headers))[0] == 200


# --- bodies, headers, paths -----------------------------------------------------------------------


async def test_a_10_mb_body(site: Site) -> None:
    for method, path in [("POST", "/force-sync"), ("DELETE", "/clear-cache"), ("GET", "/status")]:
        code, document = await site.ask(path, method, data=BytesIO(b"x" * 10_000_000))
        assert (code, document["error"]["code"]) == (413, "too_large")

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(160):
            yield b"x" * 65_536

    code, document = await site.ask("/force-sync", "POST", data=chunks())
    assert (code, document["error"]["code"]) == (413, "too_large")
    assert site.runner.current is None
    # Announced alone, it isn't even sent.
    raw = f"POST {PREFIX}/force-sync HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000000\r\n"
    status, _, body = await send(site, f"{raw}Expect: 100-continue\r\n\r\n".encode())
    assert (status, error_code(body)) == (413, "too_large")


async def test_a_body_that_says_something_is_not_ignored(site: Site) -> None:
    for body in (b'{"dry_run": true}', b"dry_run=true", b"x" * 65_536):
        code, document = await site.ask("/force-sync", "POST", data=body)
        assert (code, document["error"]["code"]) == (422, "no_body")
    for body in (b"", b"{}", b" null\n"):
        assert (await site.ask("/force-sync", "POST", data=body))[0] == 202


async def test_a_body_is_asked_for_when_the_client_waits_for_that(site: Site) -> None:
    reader, writer = await connect(site)
    head = f"POST {PREFIX}/force-sync HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
    writer.write(f"{head}Expect: 100-continue\r\n\r\n".encode())
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"{}")
    assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 202 ")
    writer.close()


async def test_a_body_that_never_ends(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_BODY_S", 0.1)
    raw = f"POST {PREFIX}/force-sync HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nx"
    status, headers, body = await send(site, raw.encode())
    assert (status, error_code(body), headers["connection"]) == (408, "slow_body", "close")
    assert site.runner.current is None


NO_HTTP: Final[Sequence[bytes]] = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
    b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n",
    b"\x00" * 100 + b"\r\n\r\n",
]


async def test_what_is_no_http(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    for raw in NO_HTTP:
        status, headers, body = await send(site, raw)
        assert (status, error_code(body)) == (400, "bad_request")
        assert headers["content-type"] == "application/json"
        # A port scan doesn't fill the log.
        assert capsys.readouterr().err == ""


NO_PATHS: Final[Sequence[str]] = [
    *("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//", "/sync-management", "/livez/"),
    *("/SYNC-MANAGEMENT/status", f"{PREFIX}/status/", f"{PREFIX}//status", "/static/x", "*"),
    *(f"{PREFIX}%2Fstatus", f"{PREFIX}/./status", f"{PREFIX}/balances", f"{PREFIX}/runs/%00"),
    *(f"{PREFIX}/balances/../rejects", f"{PREFIX}/balances//1", f"{PREFIX}/balances/x%2F1/1"),
]


async def test_paths_that_are_none(site: Site) -> None:
    for target in NO_PATHS:
        status, headers, body = await send(
            site, f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        )
        assert (status, error_code(body)) in ((404, "not_found"), (400, "bad_request"))
        assert headers["content-type"] == "application/json"


NO_METHODS: Final[Sequence[str]] = ["POST", "PUT", "PATCH", "OPTIONS", "TRACE", "FOO", "DELETE"]


async def test_methods_that_are_none(site: Site) -> None:
    for method in NO_METHODS:
        raw = f"{method} {PREFIX}/status HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        status, headers, body = await send(site, raw)
        if method == "FOO" and status == 400:
            return
        assert (status, error_code(body), headers["allow"]) == (405, "method_not_allowed", "get")


async def test_every_answer_has_the_headers_of_caution(site: Site) -> None:
    for path in ("/", "/livez", "/metrics", "/nothing", f"{PREFIX}/status", f"{PREFIX}/events"):
        async with site.client.get(path) as answer:
            headers = answer.headers
            assert headers["X-Content-Type-Options"] == "nosniff"
            # The page itself may be kept, but is asked for anew each time.
            assert headers["Cache-Control"] == ("no-cache" if path == "/" else "no-store")
            assert headers["Content-Security-Policy"].startswith("default-src 'none'")
            assert headers["Server"] == "balancesync"
            assert "Access-Control-Allow-Origin" not in headers


async def test_a_bug_shows_nothing_of_itself(
    site: Site, pg: asyncpg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    # A time that is none: the program can't know of that.
    await pg.execute("ALTER TABLE balancesync.rejects ALTER first_seen TYPE text")
    await pg.execute(
        "INSERT INTO balancesync.rejects"
        " VALUES ('balances', 'h', 'k', 'v', 'residue', 'd', 'x', now(), NULL, gen_random_uuid())"
    )
    code, document = await site.ask("/rejects")
    assert code == 500
    assert document["error"] == {
        "code": "internal_error",
        "message": "a bug; the log of balancesync says more",
    }
    # Whatever form the log has: people's lines are folded, those of programs escape the quotes.
    said = re.sub(r"\s+", " ", "".join(capsys.readouterr()).replace("\\", ""))
    assert "'str' object has no attribute" in said
    assert (await site.ask("/status"))[0] in (200, 500)


# --- slow and silent clients ----------------------------------------------------------------------


def open_files() -> int:
    """How many files and sockets this process has open."""
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drop silent clients after half a second."""
    monkeypatch.setattr(listener, "_PATIENCE_S", 0.5)
    monkeypatch.setattr(listener, "_SWEEP_S", 0.1)


@pytest.mark.usefixtures("impatient")
async def test_200_clients_that_open_and_say_nothing(postgres_dsn: str, redis_url: str) -> None:
    async with Site.on(postgres_dsn, redis_url) as site:
        await site.ask("/status")
        before = open_files()
        silent = [await connect(site) for _ in range(100)]
        # The other half begins a request, and never ends it.
        half = [await connect(site) for _ in range(100)]
        for _, writer in half:
            writer.write(b"GET /livez HTTP/1.1\r\nHost: local")
        began = perf_counter()
        assert (await site.ask("/status"))[0] == 200
        assert perf_counter() - began < 1
        async with asyncio.timeout(10):
            for reader, writer in silent + half:
                # Reset or closed: either way it's over.
                with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                    await reader.readexactly(1)
                writer.close()
        assert (await site.ask("/status"))[0] == 200
        async with asyncio.timeout(5):
            while open_files() > before:  # noqa: ASYNC110  # the kernel tells of no event
                await asyncio.sleep(0.01)


@pytest.mark.usefixtures("impatient")
async def test_a_connection_that_has_spoken_is_kept(postgres_dsn: str, redis_url: str) -> None:
    async with Site.on(postgres_dsn, redis_url) as site:
        reader, writer = await connect(site)
        for _ in range(2):
            writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            await reader.readexactly(len(b'{"status":"alive"}'))
            await asyncio.sleep(0.8)
        writer.close()


@pytest.mark.usefixtures("impatient")
async def test_a_client_that_never_reads_is_dropped(postgres_dsn: str, redis_url: str) -> None:
    async with Site.on(postgres_dsn, redis_url) as site:
        _, writer = await asyncio.open_connection("127.0.0.1", site.config.http.port, limit=1024)
        async with asyncio.timeout(15):
            with pytest.raises(ConnectionError):
                await _ask_for_ever(writer)
        assert (await site.ask("/status"))[0] == 200
        writer.close()


async def _ask_for_ever(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.001)


async def test_more_clients_than_there_is_room_for(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "_MOST_CONNECTIONS", 20)
    silent = [await connect(site) for _ in range(30)]
    # Those that came first have made room, and whoever has something to say is heard.
    assert (await site.ask("/status"))[0] == 200
    with pytest.raises(ConnectionError):
        await _expect_end(silent[0])
    for _, writer in silent:
        writer.close()


async def _expect_end(stream: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> Any:
    async with asyncio.timeout(5):
        if not await stream[0].read(1):
            raise ConnectionResetError
