"""What a primary's INFO says, as `continuity` judges it; what it leaves out is None, never 0."""

import time
from typing import Final

from balancesync.continuity import Primary

_NO_HISTORY: Final = "0" * 40
# From 7 on each subcommand is counted alone; before, any CONFIG may have been CONFIG RESETSTAT.
_TELLS_RESETS: Final = 7
_EMPTYING: Final = ("flushall", "flushdb", "cluster|flushslot")
_COUNTERS: Final = (
    "total_commands_processed",
    "total_connections_received",
    "total_net_input_bytes",
)
# What each of these brings is one key at the most.
_MAKES_ONE: Final = """
    set setnx setex psetex getset append setrange setbit bitfield bitop incr incrby incrbyfloat decr
    decrby hset hsetnx hmset hincrby hincrbyfloat hsetex lpush rpush lmove rpoplpush blmove
    brpoplpush linsert sadd smove sunionstore sinterstore sdiffstore zadd zincrby zunionstore
    zinterstore zdiffstore zrangestore xadd xgroup|create pfadd pfmerge geoadd georadius
    geosearchstore sort copy restore rename renamenx json.set json.numincrby"""
# These bring none; the commands of scripts are counted themselves.
_MAKES_NONE: Final = """
    get mget getrange substr strlen getdel getex exists type ttl pttl expiretime pexpiretime expire
    pexpire expireat pexpireat persist touch del unlink delifeq delex dbsize keys scan randomkey
    dump hget hmget hgetall hkeys hvals hlen hexists hstrlen hscan hrandfield hdel hgetdel hgetex
    hexpire hpexpire hexpireat hpexpireat hpersist httl hpttl lrange llen lindex lpos lpop rpop lrem
    lset ltrim smembers sismember smismember scard srandmember spop srem sscan sinter sunion sdiff
    sintercard zscore zmscore zrange zrangebyscore zrevrange zrevrangebyscore zrank zrevrank zcard
    zcount zlexcount zrem zpopmin zpopmax zscan zremrangebyrank zremrangebyscore zremrangebylex xlen
    xrange xrevrange xread xreadgroup xack xdel xtrim xpending xclaim xautoclaim bitcount bitpos
    getbit bitfield_ro pfcount geopos geodist geohash geosearch sort_ro json.get json.mget json.type
    json.del ping echo hello auth select quit reset info time role lastsave save bgsave bgrewriteaof
    shutdown monitor multi exec discard watch unwatch wait waitaof readonly readwrite asking
    subscribe unsubscribe psubscribe punsubscribe ssubscribe sunsubscribe publish spublish eval
    evalsha eval_ro evalsha_ro fcall fcall_ro lolwut replconf psync sync failover replicaof slaveof
    client config command acl cluster latency memory slowlog commandlog object pubsub script
    function module xinfo"""

# These change something whenever they succeed.
_CHANGES: Final = """
    set setex psetex getset incr incrby incrbyfloat decr decrby hset hmset hincrby hincrbyfloat
    mset"""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ONE, _NONE, _SURE = _words(_MAKES_ONE), _words(_MAKES_NONE), _words(_CHANGES)


def read_primary(
    address: str,
    database: int,
    dbsize: int,
    *,
    info: dict[str, str],
    stats: dict[str, str],
    node: str | None,
) -> Primary:
    """A primary from the replies to INFO, INFO commandstats and DBSIZE; `node` is its id in a
    cluster. Gives what `info` says at this moment: without the server's clock, ours stands in."""
    uptime_s, time_us = _number(info, "uptime_in_seconds"), _number(info, "server_time_usec")
    now_s = time.time() if time_us is None else float(time_us // 1_000_000)
    past = info.get("master_replid2") or None
    counted = any(name.startswith("cmdstat_") for name in stats)
    return Primary(
        address=address,
        database=database,
        keys=dbsize,
        node=node,
        run_id=info.get("run_id") or None,
        started=None if uptime_s is None else now_s - uptime_s,
        clocked=time_us is not None,
        uptime_s=uptime_s,
        history=info.get("master_replid") or None,
        offset=_number(info, "master_repl_offset"),
        past=None if past == _NO_HISTORY else past,
        past_offset=_number(info, "second_repl_offset"),
        flushes=sum(_calls(stats, name) for name in _EMPTYING) if counted else None,
        swaps=_calls(stats, "swapdb") if counted else None,
        reset=_last_reset(info, stats) if counted else None,
        counters=tuple(int(info[name]) for name in _COUNTERS if info.get(name)),
        all_keys=_all_keys(info, dbsize),
        loaded=_loaded(info),
        created=_most_created(stats) if counted else None,
        writes=sum(_calls(stats, name) for name in _SURE) if counted else None,
        changes=_changes(info),
        base_bytes=_number(info, "aof_base_size"),
        is_unsaved=_number(info, "rdb_saves") == 0,
    )


def _number(info: dict[str, str], name: str) -> int | None:
    text = info.get(name, "")
    return int(text) if text.lstrip("-").isdigit() else None


def _calls(stats: dict[str, str], command: str) -> int:
    calls = stats.get(f"cmdstat_{command}", "").partition(",")[0]
    return int(calls.partition("=")[2] or 0)


def _last_reset(info: dict[str, str], stats: dict[str, str]) -> str | None:
    # It's counted right after it has reset all counts: how long it took tells one from another.
    if found := stats.get("cmdstat_config|resetstat"):
        return ",".join(found.split(",")[:2])
    release = info.get("redis_version", "").partition(".")[0]
    tells = release.isdigit() and int(release) >= _TELLS_RESETS
    return "" if tells or "cmdstat_config" not in stats else None


def _all_keys(info: dict[str, str], dbsize: int) -> int | None:
    found = [value for name, value in info.items() if name[:2] == "db" and name[2:].isdigit()]
    # An empty server has no such line, nor has a service that leaves them out.
    if dbsize and not found:
        return None
    return sum(int(value.partition(",")[0].partition("=")[2]) for value in found)


def _loaded(info: dict[str, str]) -> int | None:
    loaded = _number(info, "rdb_last_load_keys_loaded")
    # What follows the base in an append-only file may have taken them away again.
    if loaded is None or info.get("aof_enabled") != "0":
        return None
    return loaded + (_number(info, "rdb_last_load_keys_expired") or 0)


def _most_created(stats: dict[str, str]) -> int | None:
    created = 0
    for name in stats:
        command = name.removeprefix("cmdstat_")
        if command in _ONE:
            created += _calls(stats, command)
        elif command not in _NONE and command.partition("|")[0] not in _NONE:
            return None
    return created


def _changes(info: dict[str, str]) -> int | None:
    # What was rewritten isn't replayed, and so not counted again.
    rewritten = _number(info, "aof_rewrites")
    if info.get("aof_enabled") != "1" or rewritten != 0:
        return None
    return _number(info, "rdb_changes_since_last_save")
