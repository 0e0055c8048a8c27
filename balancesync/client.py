"""Asking a running daemon over its own HTTP API, as the commands do."""

import json
from collections.abc import AsyncGenerator
from typing import Final

import aiohttp

from balancesync.config import HttpConfig
from balancesync.documents import Document
from balancesync.errors import BalanceSyncError, DaemonUnavailable, RunFailed, why_unreachable

_PREFIX: Final = "/sync-management"
# A daemon on this machine answers at once, or isn't there.
_ANSWER_S: Final = 5.0
# An event may hold the rows of a dry run, and stands on one line.
_LONGEST_LINE: Final = 1 << 24
_EVERYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # asked, not listened on


class Client:
    """The daemon that the configuration names."""

    def __init__(self, config: HttpConfig) -> None:
        host = _EVERYWHERE.get(config.host, config.host)
        self.address = f"[{host}]:{config.port}" if ":" in host else f"{host}:{config.port}"
        token = config.token.get_secret_value()
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    async def get(self, path: str) -> Document:
        """The document at a path below the prefix, whatever its status says of health.

        Raises DaemonUnavailable if nobody answers, RunFailed with what the daemon objects to.
        """
        return await self._ask("GET", path)

    async def delete(self, path: str) -> Document:
        """The answer to DELETE; raises as `get` does."""
        return await self._ask("DELETE", path)

    async def events(self) -> AsyncGenerator[tuple[str, Document], None]:
        """The daemon's events as (kind, document), until it ends; raises DaemonUnavailable."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_ANSWER_S)
        async with self._session(timeout) as session:
            try:
                async with session.get(f"{_PREFIX}/events") as answer:
                    await _check(answer)
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
                async with session.request(method, f"{_PREFIX}{path}") as answer:
                    return await _check(answer)
            except (TimeoutError, aiohttp.ClientError) as error:
                raise self._unavailable(error) from error

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
            f"no daemon answers at {self.address}: {said}; start one with `balancesync run`, or set"
            " http.host and http.port to where it listens"
        )


async def _check(answer: aiohttp.ClientResponse) -> Document:
    if answer.content_type != "application/json":
        if answer.ok:
            return {}
        raise RunFailed(f"the daemon answers {answer.status} {answer.reason}")
    document: Document = await answer.json()
    # A run has an error too, a text; that of a request is an object.
    if isinstance(document.get("error"), dict):
        raise RunFailed(f"the daemon says: {document['error']['message']}")
    return document
