"""What a Redis server's refusals and error replies mean to us.

    what happens                                                      raised            again?
    refused, no such host, no answer in time, closed                  RedisUnavailable  yes
    LOADING BUSY MASTERDOWN READONLY CLUSTERDOWN TRYAGAIN             RedisUnavailable  yes
    MISCONF OOM NOREPLICAS, too many clients                          RedisUnavailable  yes
    MOVED ASK in a cluster                                            SourceChanged     yes
    MOVED ASK CROSSSLOT with redis.cluster = false                    ConfigError       no
    NOAUTH WRONGPASS DENIED, no such database                         ConfigError       no
    NOPERM                                                            RightMissing      no
    a certificate that isn't accepted, no TLS at the port, no Redis   ConfigError       no
    any other error reply                                             RunFailed         no

The words of an error reply are the server's own, and may be another's: only what begins them is
relied upon, and of NOPERM what stands in quotes.
"""

import re
import ssl
from typing import Final

from balancesync.access import Access, Address
from balancesync.errors import (
    BalanceSyncError,
    ConfigError,
    RedisUnavailable,
    RightMissing,
    RunFailed,
    SourceChanged,
    why_unreachable,
)

_LONGEST_QUOTE: Final = 200

# The first word of an error reply: https://github.com/redis/redis/blob/7.0/src/server.c, `shared`.
_ANSWERS: Final[dict[str, tuple[type[BalanceSyncError], str]]] = {
    "LOADING": (RedisUnavailable, "is loading its data"),
    "BUSY": (RedisUnavailable, "is busy with another client's script"),
    "MASTERDOWN": (RedisUnavailable, "is a replica that has lost its primary"),
    "READONLY": (RedisUnavailable, "is a read-only replica"),
    "CLUSTERDOWN": (RedisUnavailable, "says that its cluster is down"),
    "TRYAGAIN": (RedisUnavailable, "is moving slots to another node"),
    "MISCONF": (RedisUnavailable, "can't save to its disk and takes no writes"),
    "OOM": (RedisUnavailable, "has reached maxmemory and takes no writes"),
    "NOREPLICAS": (RedisUnavailable, "has too few replicas and takes no writes"),
    "NOAUTH": (ConfigError, "wants a password; put it into redis.url"),
    "WRONGPASS": (ConfigError, "rejects the user or password of redis.url"),
    "DENIED": (ConfigError, "is in protected mode: only its own machine may connect"),
    "CROSSSLOT": (ConfigError, "is a node of a cluster; set redis.cluster = true"),
}
_TOO_MANY: Final = "ERR max number of clients"

# "User bob has no permissions to run the 'client|info' command"; of a script, Redis says NOPERM and
# Valkey ERR, and then what its own command lacks.
# https://github.com/redis/redis/blob/7.0/src/acl.c, `getAclErrorMessage`
_IN_SCRIPT: Final = ("ACL failure in script", "The user executing the script can't")
_FORBIDDEN: Final = re.compile(r"'([\w|-]+)' command")
_OF_KEYS: Final = re.compile(r" access .*\bkeys?\b")
_WRITES: Final = ("SET", "EVAL", "HSETNX")


def explain(text: str, command: bytes, address: Address, access: Access) -> BalanceSyncError:
    """What an error reply to `command` means; see the table above."""
    code = text.partition(" ")[0]
    if code in _ANSWERS:
        error, meaning = _ANSWERS[code]
        return error(f"Redis at {address} {meaning}")
    if code in ("MOVED", "ASK"):
        if access.clustered:
            return SourceChanged(f"Redis at {address} has given slots to another node")
        return ConfigError(f"Redis at {address} {_ANSWERS['CROSSSLOT'][1]}")
    if text.startswith(_TOO_MANY):
        return RedisUnavailable(f"Redis at {address} has reached its maximum number of clients")
    name = command.decode("ascii", "replace").upper()
    if code == "NOPERM" or any(sign in text for sign in _IN_SCRIPT):
        what = _missing(text, name)
        return RightMissing(
            f"Redis at {address} doesn't let this user {what}, see docs/security.md"
        )
    # What is said to AUTH may repeat the password.
    if name == "AUTH":
        return ConfigError(f"Redis at {address} rejects the user or password of redis.url")
    if name == "SELECT":
        return ConfigError(f"Redis at {address} has no database {access.database}")
    quote = " ".join(text.split())[:_LONGEST_QUOTE]
    return RunFailed(f"Redis at {address} answers {name} with: {quote}")


def _missing(text: str, name: str) -> str:
    """The right that a NOPERM misses, and how it's given."""
    forbidden = _FORBIDDEN.search(text)
    if forbidden:
        name = forbidden[1].upper()
    elif _OF_KEYS.search(text):
        verb = "write" if name in _WRITES else "read"
        return f"{verb} the mapping's keys; ACL SETUSER ... ~PATTERN"
    elif any(sign in text for sign in _IN_SCRIPT):
        return "run a command that its script calls, and doesn't say which"
    return f"run {name.replace('|', ' ')}; ACL SETUSER ... +{name.lower()}"


def unreachable(address: Address, error: OSError) -> BalanceSyncError:
    """What it means that no connection could be made."""
    if isinstance(error, ssl.SSLCertVerificationError):
        why = error.verify_message or "it doesn't verify"
        return ConfigError(f"the certificate of Redis at {address} isn't accepted: {why}")
    if isinstance(error, ssl.SSLError):
        return ConfigError(f"Redis at {address} speaks no TLS that we accept; see redis.url")
    return RedisUnavailable(f"Redis at {address} can't be reached: {why_unreachable(error)}")
