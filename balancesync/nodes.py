"""What a Redis says about itself: who it is, which slots it serves, and how safe its data is.

The rights it takes: INFO, DBSIZE, and in a cluster CLUSTER SLOTS and CLUSTER NODES. CLIENT INFO,
and CONFIG GET for `facts_of`, may be forbidden.
"""

from binascii import crc_hqx
from dataclasses import dataclass, replace
from typing import Any, Final

import hiredis

from balancesync.access import Access, Address
from balancesync.connection import Connection, connected, pack
from balancesync.continuity import Primary, Sighting, starts_alike
from balancesync.errors import ConfigError, RedisUnavailable, RightMissing, SourceChanged
from balancesync.primaries import read_primary

ALL_SLOTS: Final = 16_384


@dataclass(frozen=True, slots=True)
class Node:
    """One primary as it was at one moment.

    `client` is our connection and its database, None if the user may not ask. `slots` is every
    primary and its slots as this node sees them, empty outside a cluster; `epoch` is new after each
    change of its own, `moving` tells of one under way. `server` is redis or valkey, `info` all that
    INFO says.
    """

    address: Address
    primary: Primary
    slots: tuple[str, ...]
    epoch: str
    moving: bool
    client: str | None
    server: str
    version: str
    dbsize: int
    info: dict[str, str]

    @property
    def run_id(self) -> str | None:
        """New with each start of the server; None if it doesn't say."""
        return self.primary.run_id

    @property
    def release(self) -> tuple[int, ...]:
        """The version of Redis that it is compatible with, as numbers."""
        words = self.info.get("redis_version", "0").split(".")
        return tuple(int(word) for word in words if word.isdigit())

    def check_same(self, after: "Node") -> None:
        """Raise SourceChanged unless `after` is the same server, untouched, on the same connection.

        A SWAPDB, or slots that move, would carry keys past a scan that ends in good order.
        """
        reason, then, now = None, self.primary, after.primary
        if then.run_id != now.run_id or starts_alike(then, now) is False:
            reason = "was restarted"
        elif then.history != now.history:
            reason = "began a new history of replication"
        elif self.client != after.client:
            reason = "was reached over another connection"
        elif then.swaps != now.swaps:
            reason = "had databases swapped by SWAPDB"
        elif (self.slots, self.epoch) != (after.slots, after.epoch):
            reason = "and its cluster shared out their slots anew"
        if reason:
            raise SourceChanged(f"Redis at {self.address} {reason} in mid-run")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who Redis is at a moment: its primaries, in the order of their addresses."""

    nodes: tuple[Node, ...]

    @property
    def address(self) -> str:
        """Of its first primary, with the number of the others."""
        others = len(self.nodes) - 1
        return f"{self.nodes[0].address}{f' and {others} more' if others else ''}"

    @property
    def run_id(self) -> str | None:
        """New whenever a server was started again; a cluster's are joined by commas."""
        return self.sighting.run_id

    @property
    def run_ids(self) -> set[str | None]:
        """Each primary's."""
        return {node.run_id for node in self.nodes}

    @property
    def sighting(self) -> Sighting:
        """What `continuity` is to judge by."""
        return Sighting(tuple(node.primary for node in self.nodes))

    @property
    def server(self) -> str:
        """Either redis or valkey."""
        return self.nodes[0].server

    @property
    def version(self) -> str:
        """The oldest of its primaries' versions."""
        return min(self.nodes, key=lambda node: node.release).version

    @property
    def dbsize(self) -> int:
        """The keys of all primaries, of every kind."""
        return sum(node.dbsize for node in self.nodes)

    def check(self, node: Node) -> None:
        """Raise SourceChanged unless `node` is one of these primaries, untouched since."""
        for earlier in self.nodes:
            if earlier.run_id == node.run_id and (
                earlier.run_id or earlier.address == node.address
            ):
                # Whichever connection it was asked over.
                replace(earlier, client=node.client).check_same(node)
                return
        raise SourceChanged(f"Redis at {node.address} was restarted or replaced")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the primaries are; of a cluster, also which of them owns each slot."""

    addresses: tuple[Address, ...]
    owners: tuple[Address, ...] = ()

    def owner(self, key: bytes) -> Address:
        """The primary that `key` is on."""
        return self.owners[key_slot(key)] if self.owners else self.addresses[0]

    def holders(self, member_key: bytes | None) -> tuple[Address, ...]:
        """Those that hold a part of the keys; with `member_key`, of this key's fields."""
        return self.addresses if member_key is None else (self.owner(member_key),)

    def divide(self, keys: list[bytes], member_key: bytes | None) -> dict[Address, list[int]]:
        """The places in `keys` (with `member_key`, fields) of those that each primary holds."""
        if not self.owners or member_key is not None:
            return {address: [*range(len(keys))] for address in self.holders(member_key)}
        places: dict[Address, list[int]] = {}
        for at, key in enumerate(keys):
            places.setdefault(self.owner(key), []).append(at)
        return places


@dataclass(frozen=True, slots=True)
class Facts:
    """What `check` and the metrics want to know of one primary. Sizes are bytes."""

    address: Address
    server: str
    version: str
    maxmemory: int
    maxmemory_policy: str
    used_memory: int
    evicted_keys: int
    expired_keys: int
    appendonly: bool
    last_append_ok: bool
    last_save_ok: bool
    changes_since_save: int
    save: str | None  # the save points; None if the user may not ask


def check_settled(nodes: list[Node], *, whole: bool) -> None:
    """Raise SourceChanged if slots are under way, or `nodes` aren't a `whole` cluster."""
    for node in nodes:
        if node.moving:
            raise SourceChanged(f"Redis at {node.address} is moving slots: a scan would miss keys")
        agreed = node.slots == nodes[0].slots and (not whole or len(node.slots) == len(nodes))
        if node.slots and not agreed:
            raise SourceChanged(
                f"the cluster of Redis at {node.address} doesn't agree on its slots yet"
            )


async def describe(connection: Connection, *, clustered: bool) -> Node:
    """Ask a primary who it is.

    Raises RedisUnavailable if it's loading or a replica, ConfigError if it's a Sentinel, or is in
    cluster mode and `clustered` says no, or the reverse.
    """
    commands: list[tuple[bytes, ...]] = [
        (b"INFO",),
        (b"INFO", b"commandstats"),
        (b"CLIENT", b"INFO"),
        (b"DBSIZE",),
    ]
    if clustered:
        commands.append((b"CLUSTER", b"NODES"))
    replies = await connection.pipeline(commands)
    address = connection.address
    info = _parse_info(connection.check(replies[0], b"INFO"))
    _check_mode(address, info, clustered=clustered)
    if info.get("loading") == "1":
        raise connection.explain("LOADING", b"INFO")
    _check_role(address, info)
    stats = _parse_info(connection.check(replies[1], b"INFO"))
    nodes = connection.check(replies[4], b"CLUSTER|NODES") if clustered else b""
    slots, epoch, moving, name = _parse_nodes(nodes)
    dbsize = connection.check(replies[3], b"DBSIZE")
    return Node(
        address=address,
        primary=read_primary(
            str(address), connection.database, dbsize, info=info, stats=stats, node=name
        ),
        slots=slots,
        epoch=epoch,
        moving=moving,
        client=_parse_client(replies[2]),
        server="valkey" if "valkey_version" in info else "redis",
        version=info.get("valkey_version") or info.get("redis_version", ""),
        dbsize=dbsize,
        info=info,
    )


async def check_primary(connection: Connection) -> None:
    """Ask whether it's a primary still: one that has become a replica answers on, from the past.

    A fraction of what `describe` costs, and no right beyond it, as ROLE would be. Raises
    RedisUnavailable.
    """
    info = _parse_info(await connection.call(b"INFO", b"replication"))
    _check_role(connection.address, info)


async def ask_cluster(nodes: list[Address], access: Access) -> Layout:
    """Where the primaries of a cluster are, from the first of its `nodes` that answers.

    Raises RedisUnavailable if none does or a slot is served by no primary, ConfigError if it's no
    cluster.
    """
    failure: RedisUnavailable | None = None
    for address in dict.fromkeys(nodes):
        try:
            async with connected(address, access) as connection:
                return await _layout(connection)
        except RedisUnavailable as error:
            failure = failure or error
    raise failure or RedisUnavailable()


async def ask_sentinels(sentinels: list[Address], access: Access, service: str) -> Address:
    """Where the primary called `service` is, from the first Sentinel that knows.

    A Sentinel may want no password, or the one of redis.url; it speaks TLS if redis.url says so.
    https://redis.io/docs/latest/develop/reference/sentinel-clients/ (step 3 is `describe`).
    """
    bare = replace(access, database=0, username=None, password=None)
    command = (b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", service.encode())
    for address in sentinels:
        try:
            try:
                async with connected(address, bare) as connection:
                    found = await connection.call(*command)
            except (ConfigError, RightMissing):
                if access.password is None:
                    raise
                async with connected(address, replace(access, database=0)) as connection:
                    found = await connection.call(*command)
        except RedisUnavailable:
            continue
        if found:
            return Address(found[0].decode(), int(found[1]))
    names = ", ".join(map(str, sentinels))
    raise RedisUnavailable(f'none of the Sentinels {names} knows where "{service}" is now')


async def _layout(connection: Connection) -> Layout:
    reply = await connection.send(pack((b"CLUSTER", b"SLOTS")))
    if isinstance(reply, hiredis.ReplyError) and "cluster support disabled" in str(reply):
        raise ConfigError(
            f"Redis at {connection.address} is no node of a cluster; set redis.cluster = false"
        )
    owners: dict[int, Address] = {}
    for first, last, (host, port, *_), *_ in connection.check(reply, b"CLUSTER|SLOTS"):
        # No name, or a question mark, stands for the host that was asked.
        name = host.decode() if host and host != b"?" else connection.address.host
        owners |= dict.fromkeys(range(first, last + 1), Address(name, port))
    if len(owners) != ALL_SLOTS:
        raise RedisUnavailable(
            f"the cluster of Redis at {connection.address} serves only {len(owners):,} of its"
            f" {ALL_SLOTS:,} slots"
        )
    by_slot = tuple(owners[slot] for slot in range(ALL_SLOTS))
    return Layout(tuple(dict.fromkeys(by_slot)), by_slot)


async def facts_of(connection: Connection, node: Node) -> Facts:
    """The facts about a primary that was just described."""
    reply = await connection.send(pack((b"CONFIG", b"GET", b"save")))
    pair = [] if isinstance(reply, hiredis.ReplyError) else reply
    info = node.info

    def number(name: str) -> int:
        return int(info.get(name) or 0)

    return Facts(
        address=node.address,
        server=node.server,
        version=node.version,
        maxmemory=number("maxmemory"),
        maxmemory_policy=info.get("maxmemory_policy", ""),
        used_memory=number("used_memory"),
        evicted_keys=number("evicted_keys"),
        expired_keys=number("expired_keys"),
        appendonly=info.get("aof_enabled") == "1",
        last_append_ok=info.get("aof_last_write_status", "ok") == "ok",
        last_save_ok=info.get("rdb_last_bgsave_status", "ok") == "ok",
        changes_since_save=number("rdb_changes_since_last_save"),
        save=pair[1].decode() if len(pair) == 2 else None,
    )


def _check_mode(address: Address, info: dict[str, str], *, clustered: bool) -> None:
    # Valkey has given the name a new one.
    mode = info.get("redis_mode") or info.get("server_mode")
    if mode == "sentinel":
        raise ConfigError(
            f"Redis at {address} is a Sentinel; put it into redis.sentinel, not redis.url"
        )
    if mode == "cluster" and not clustered:
        raise ConfigError(f"Redis at {address} is a node of a cluster; set redis.cluster = true")
    if mode == "standalone" and clustered:
        raise ConfigError(f"Redis at {address} is no node of a cluster; set redis.cluster = false")


def _check_role(address: Address, info: dict[str, str]) -> None:
    if info.get("role") != "master":
        raise RedisUnavailable(f"Redis at {address} is a replica; only a primary is read")


def _parse_info(text: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in text.decode(errors="replace").splitlines())
    return {name: value for name, colon, value in lines if colon}


def _parse_client(reply: Any) -> str | None:
    if isinstance(reply, hiredis.ReplyError):
        return None
    words = dict(word.partition(b"=")[::2] for word in reply.split())
    return f"{words.get(b'id', b'').decode()} {words.get(b'db', b'').decode()}"


def _parse_nodes(text: bytes) -> tuple[tuple[str, ...], str, bool, str | None]:
    """Each primary's id and slots; of the node that was asked its configuration epoch, whether
    slots come or go there, and its id.

    https://redis.io/docs/latest/commands/cluster-nodes/
    """
    slots, epoch, moving, own = [], "", False, None
    for line in text.decode(errors="replace").splitlines():
        name, _, flags, _, _, _, age, _, *ranges = line.split()
        if "myself" in flags:
            epoch, moving, own = age, any(found.startswith("[") for found in ranges), name
        settled = [found for found in ranges if not found.startswith("[")]
        if settled:
            slots.append(" ".join((name, *settled)))
    return tuple(sorted(slots)), epoch, moving, own


def key_slot(key: bytes) -> int:
    """The slot of a cluster that a key belongs to: CRC16 of the key, or of its {hash tag}.

    https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/

    >>> key_slot(b"123456789"), key_slot(b"a{user}b") == key_slot(b"user")
    (12739, True)
    """
    _, brace, rest = key.partition(b"{")
    tag, closed, _ = rest.partition(b"}")
    return crc_hqx(tag if brace and closed and tag else key, 0) % ALL_SLOTS
