"""Asking a running daemon over its own HTTP API, as the commands do."""

import json
from collections.abc import AsyncGenerator
from typing import Final

import aiohttp

from balancesync.config import Config
from balancesync.documents import Document
from balancesync.dsn import postgres_place
from balancesync.errors import (
    BalanceSyncError,
    DaemonUnavailable,
    RunFailed,
    Unavailable,
    why_unreachable,
)

_PREFIX: Final = "/sync-management"
# What its every answer says in the header Server.
_NAME: Final = "balancesync"
_EVENTS: Final = "text/event-stream"
# A daemon on this machine answers at once, or isn't there.
_ANSWER_S: Final = 5.0
# An event may hold the rows of a dry run, and stands on one line.
_LONGEST_LINE: Final = 1 << 24
_EVERYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # asked, not listened on


class Client:
    """The daemon of this installation, at the address that the configuration names.

    What else may answer there, be it the daemon of another database, isn't taken for it.
    """

    def __init__(self, config: Config) -> None:
        host = _EVERYWHERE.get(config.http.host, config.http.host)
        port = config.http.port
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        token = config.http.token.get_secret_value()
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._schema = config.postgres.schema
        self._database = postgres_place(config.postgres.dsn.get_secret_value())

    async def get(self, path: str) -> Document:
        """The document at a path below the prefix, whatever its status says of health.

        Raises DaemonUnavailable if the daemon doesn't answer, Unavailable if it can't ask a server,
        RunFailed with what it objects to.
        """
        return await self._ask("GET", path)

    async def delete(self, path: str) -> Document:
        """The answer to DELETE; raises as `get` does."""
        return await self._ask("DELETE", path)

    async def events(self) -> AsyncGenerator[tuple[str, Document], None]:
        """The daemon's events as (kind, document), until it ends; raises as `get` does."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_ANSWER_S)
        await self.get("/status")
        async with self._session(timeout) as session:
            try:
                async with session.get(f"{_PREFIX}/events") as answer:
                    if answer.content_type != _EVENTS:
                        await self._read(answer)
                        raise self._stranger()
                    kind = ""
                    async for raw in answer.content:
                        name, _, value = raw.decode().rstrip("\n").partition(": ")
                        if name == "event":
                            kind = value
                        elif name == "data":
                            yield kind, json.loads(value)
            except aiohttp.ClientPayloadError:
                raise DaemonUnavailable(f"the daemon at {self.address} has gone") from None
            except (TimeoutError, aiohttp.ClientError) as error:
                raise self._unavailable(error) from error

    async def _ask(self, method: str, path: str) -> Document:
        async with self._session(aiohttp.ClientTimeout(total=_ANSWER_S)) as session:
            try:
                async with session.get(f"{_PREFIX}/status") as answer:
                    status = await self._read(answer)
                self._check_place(status)
                if path == "/status":
                    return status
                async with session.request(method, f"{_PREFIX}{path}") as answer:
                    return await self._read(answer)
            except aiohttp.ClientResponseError:
                raise self._stranger() from None
            except (TimeoutError, aiohttp.ClientError) as error:
                raise self._unavailable(error) from error

    async def _read(self, answer: aiohttp.ClientResponse) -> Document:
        """The document of the daemon's own answer; raises what it says went wrong."""
        if answer.headers.get("Server") != _NAME:
            raise self._stranger()
        try:
            document = await answer.json(content_type=None)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise self._stranger()
        # A run has an error too, a text; that of a request is an object.
        problem = document.get("error")
        if isinstance(problem, dict):
            failure = Unavailable if problem["code"] == "unavailable" else RunFailed
            raise failure(f"the daemon says: {problem['message']}")
        return document

    def _check_place(self, status: Document) -> None:
        database, schema = status.get("database"), status.get("schema")
        if (database, schema) != (self._database, self._schema):
            raise DaemonUnavailable(
                f"the daemon at {self.address} is of another database, {database} with the schema"
                f" {schema}, and not of {self._database} with {self._schema}",
                "set http.host and http.port to where this one's listens, or name the database in"
                " postgres.dsn as that daemon does, if it is the same one",
            )

    def _stranger(self) -> DaemonUnavailable:
        return DaemonUnavailable(
            f"no daemon answers at {self.address}: something else listens there",
            "set http.host and http.port to where it listens",
        )

    def _session(self, timeout: aiohttp.ClientTimeout) -> aiohttp.ClientSession:
        # Not by a proxy: the daemon is a neighbour.
        return aiohttp.ClientSession(
            f"http://{self.address}",
            headers=self._headers,
            timeout=timeout,
            trust_env=False,
            read_bufsize=_LONGEST_LINE,
        )

    def _unavailable(self, error: Exception) -> BalanceSyncError:
        # The library's own words on a refused connection speak of TLS, not of a daemon.
        if isinstance(error, aiohttp.ClientConnectorError):
            said = why_unreachable(error.os_error)
        elif isinstance(error, TimeoutError):
            said = "no answer in time"
        else:
            said = (str(error).splitlines() or ["no answer"])[0]
        return DaemonUnavailable(
            f"no daemon answers at {self.address}: {said}",
            "start one with `balancesync run`, or set http.host and http.port to where it listens",
        )
