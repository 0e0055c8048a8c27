"""Who may ask what: the token, or without one a name of this machine; nothing from other sites.

Without a token a page from anywhere could have a browser here ask, and by a name of its own that
leads to 127.0.0.1 (DNS rebinding) even read the answer. So Host and Origin are judged.
"""

import hmac
import re
from typing import Final

from aiohttp import web

from balancesync.config import HttpConfig
from balancesync.listener import HttpProblem

_LOOPBACK: Final = ("localhost", "127.0.0.1", "[::1]")
_BEARER: Final = "bearer "


class Gate:
    """Judges requests by their headers."""

    def __init__(self, config: HttpConfig) -> None:
        self._token = config.token.get_secret_value().encode()
        # Without a token http.host is an address of this machine, too, which no rebinding can name.
        own = f"[{config.host}]" if ":" in config.host else config.host
        self._names = tuple(dict.fromkeys((*_LOOPBACK, own.lower())))
        names = "|".join(map(re.escape, self._names))
        self._own = re.compile(rf"({names})(:[0-9]{{1,5}})?", re.IGNORECASE)

    def check_origin(self, request: web.BaseRequest) -> None:
        """Refuse what was asked under a foreign name or from a foreign page."""
        hosts = request.headers.getall("Host", [])
        host = hosts[0] if len(hosts) == 1 else ""
        if not self._token and not self._own.fullmatch(host):
            names = f"{', '.join(self._names[:-1])} or {self._names[-1]}"
            raise HttpProblem(
                403, "foreign_host", f"without http.token only Host {names} is served"
            )
        own = (f"http://{host}".lower(), f"https://{host}".lower())
        if any(origin.lower() not in own for origin in request.headers.getall("Origin", [])):
            raise HttpProblem(403, "foreign_origin", "pages of other sites are not served")

    def is_authorised(self, request: web.BaseRequest) -> bool:
        """Whether the token is right, or none is needed; takes the same time for any wrong one."""
        given = request.headers.getall("Authorization", [])
        words = given[0] if len(given) == 1 else ""
        bearer = words[len(_BEARER) :].strip() if words[: len(_BEARER)].lower() == _BEARER else ""
        same = hmac.compare_digest(bearer.encode(errors="surrogateescape"), self._token)
        return same or not self._token

    def check_token(self, request: web.BaseRequest) -> None:
        """Refuse whoever lacks the token."""
        if not self.is_authorised(request):
            raise HttpProblem(
                401,
                "unauthorized",
                "this needs http.token: Authorization: Bearer TOKEN",
                {"WWW-Authenticate": "Bearer"},
            )
