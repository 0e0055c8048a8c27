"""A managed service: a real server behind a front that hides what INFO says and refuses commands.

    async with Service(server.port, hidden={"run_id"}, refused={"CONFIG", "CLIENT TRACKING"}) as it:
        Source(RedisConfig(url=SecretStr(it.url)))

It speaks RESP2 and RESP3, understands each command and each reply, and keeps their order.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable
from typing import Any, Self

import hiredis

HOST = "127.0.0.1"
_CHUNK = 65_536


class Service:
    """Listens on `port`, a free one.

    `hidden` are fields of INFO that are left out, `sections` whole ones, by their names in lower
    case; `fixed` are fields that always have this value. `refused` are commands, or commands with
    their first argument, that are answered as a service answers what it doesn't know.
    """

    def __init__(
        self,
        server_port: int,
        *,
        hidden: Iterable[str] = (),
        sections: Iterable[str] = (),
        refused: Iterable[str] = (),
        fixed: dict[str, str] | None = None,
    ) -> None:
        self.server_port = server_port
        self.hidden = set(hidden)
        self.sections = set(sections)
        self.refused = set(refused)
        self.fixed = fixed or {}
        self.port = 0
        self._listener: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        """Of database 0."""
        return f"redis://{HOST}:{self.port}/0"

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._serve, HOST, self.port)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._listener is not None
        self._listener.close()
        self.drop()
        await self._listener.wait_closed()

    def drop(self) -> None:
        """Close every connection."""
        for writer in [*self._writers]:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        # Either side may end at any time.
        with contextlib.suppress(OSError):
            answers, server = await asyncio.open_connection(HOST, self.server_port)
            self._writers.add(server)
            # What each reply to come answers: a command, or what is said in its place.
            expected: deque[tuple[str, bytes | None]] = deque()
            pumps = [
                asyncio.create_task(self._take_commands(reader, server, writer, expected)),
                asyncio.create_task(self._give_replies(answers, writer, expected)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            server.transport.abort()
            self._writers.discard(server)
        writer.transport.abort()
        self._writers.discard(writer)

    async def _take_commands(
        self,
        reader: asyncio.StreamReader,
        server: asyncio.StreamWriter,
        writer: asyncio.StreamWriter,
        expected: deque[tuple[str, bytes | None]],
    ) -> None:
        parser = hiredis.Reader(notEnoughData=Ellipsis)
        while chunk := await reader.read(_CHUNK):
            parser.feed(chunk)
            while (words := parser.gets()) is not Ellipsis:
                name = words[0].decode().upper()
                more = f"{name} {words[1].decode(errors='replace').upper()}" if words[1:] else name
                if {name, more} & self.refused:
                    said = f"-ERR unknown command '{more.lower().replace(' ', '|')}'\r\n".encode()
                    expected.append((name, said))
                    _say_in_turn(writer, expected)
                else:
                    expected.append((name, None))
                    server.write(_packed(words))

    async def _give_replies(
        self,
        answers: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        expected: deque[tuple[str, bytes | None]],
    ) -> None:
        parser = hiredis.Reader(notEnoughData=Ellipsis)
        while chunk := await answers.read(_CHUNK):
            parser.feed(chunk)
            while (reply := parser.gets()) is not Ellipsis:
                is_push = isinstance(reply, hiredis.PushNotification)
                if is_push or (isinstance(reply, list) and reply and reply[0] == b"message"):
                    writer.write(_packed(reply))
                    continue
                name, _ = expected.popleft()
                if name == "INFO" and isinstance(reply, bytes):
                    reply = self._censored(reply.decode()).encode()
                writer.write(_packed(reply))
                _say_in_turn(writer, expected)

    def _censored(self, info: str) -> str:
        kept, section = [], ""
        for line in info.splitlines():
            if line.startswith("#"):
                section = line.strip("# ").lower()
            name = line.partition(":")[0]
            if line.startswith("#") or (section not in self.sections and name not in self.hidden):
                kept.append(f"{name}:{self.fixed[name]}" if name in self.fixed else line)
        return "\r\n".join(kept) + "\r\n"


def _say_in_turn(writer: asyncio.StreamWriter, expected: deque[tuple[str, bytes | None]]) -> None:
    while expected and expected[0][1] is not None:
        _, said = expected.popleft()
        assert said is not None
        writer.write(said)


def _packed(reply: Any) -> bytes:
    if isinstance(reply, dict):
        pairs = [each for pair in reply.items() for each in pair]
        return b"%%%d\r\n" % len(reply) + b"".join(map(_packed, pairs))
    if isinstance(reply, hiredis.PushNotification):
        return b">%d\r\n" % len(reply) + b"".join(map(_packed, reply))
    if isinstance(reply, list):
        return b"*%d\r\n" % len(reply) + b"".join(map(_packed, reply))
    if isinstance(reply, hiredis.ReplyError):
        return f"-{reply}\r\n".encode()
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    if reply is None:
        return b"$-1\r\n"
    return b"$%d\r\n%b\r\n" % (len(reply), reply)
