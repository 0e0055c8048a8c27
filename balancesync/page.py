"""The status page: a few files that stay as they are while the process runs.

No script is inline and nothing comes from another host, so the policy can forbid the rest:
https://developer.mozilla.org/docs/Web/HTTP/Guides/CSP. The one style sheet stands in the page, for
the first paint to depend on nothing else, and is known to the policy by its hash. Trusted Types
forbid the page's own code to make HTML of a text, such as a key's name.
"""

import gzip
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from html import escape
from importlib.resources import files
from typing import Final

from aiohttp import web

from balancesync.listener import reply_bytes

_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'sha256-{styles}'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_TYPES: Final = {"html": "text/html; charset=utf-8", "js": "text/javascript; charset=utf-8"}
INDEX: Final = "index.html"
_STYLES: Final = "app.css"
_LINK: Final = b'<link rel="stylesheet" href="static/app.css">'


@dataclass(frozen=True, slots=True)
class _File:
    """A file as it is sent: its bytes, and those of gzip, under one tag each."""

    kind: str
    body: bytes
    packed: bytes
    tag: str

    @classmethod
    def of(cls, kind: str, body: bytes) -> "_File":
        return cls(kind, body, gzip.compress(body, mtime=0), sha256(body).hexdigest()[:16])


class Page:
    """The files, by name. `facts` are what the page is told at once: attributes of its root."""

    def __init__(self, facts: Mapping[str, str]) -> None:
        folder = files("balancesync").joinpath("static")
        attributes = "".join(f' data-{name}="{escape(text)}"' for name, text in facts.items())
        styles = folder.joinpath(_STYLES).read_bytes()
        self._policy = _POLICY.format(styles=b64encode(sha256(styles).digest()).decode())
        self._files: dict[str, _File] = {}
        for file in folder.iterdir():
            kind = _TYPES.get(file.name.rpartition(".")[2])
            if kind is not None:
                body = file.read_bytes()
                if file.name == INDEX:
                    body = body.replace(b"<html", b"<html" + attributes.encode(), 1)
                    # Its first paint waits for no second answer.
                    body = body.replace(_LINK, b"<style>" + styles + b"</style>", 1)
                self._files[file.name] = _File.of(kind, body)

    @property
    def names(self) -> list[str]:
        """What the page itself asks for, by name."""
        return sorted(self._files.keys() - {INDEX})

    def answer(self, name: str, known_tag: str | None, encodings: str = "") -> web.Response | None:
        """A file; only its headers for whoever has it already; None if there's none such.

        Args:
            name: of the file.
            known_tag: the request's If-None-Match.
            encodings: its Accept-Encoding.
        """
        file = self._files.get(name)
        if file is None:
            return None
        packs = _takes_gzip(encodings)
        # Another encoding is another representation, with a tag of its own: RFC 9110, 8.8.3.3.
        tag = f'"{file.tag}-gzip"' if packs else f'"{file.tag}"'
        # Kept, but never used without asking: an upgrade must not meet an old page.
        headers = {
            "Cache-Control": "no-cache",
            "Content-Security-Policy": self._policy,
            "ETag": tag,
            "Vary": "Accept-Encoding",
        }
        if known_tag == tag:
            return reply_bytes(b"", file.kind, 304, headers)
        if packs:
            headers["Content-Encoding"] = "gzip"
        return reply_bytes(file.packed if packs else file.body, file.kind, 200, headers)


def _takes_gzip(encodings: str) -> bool:
    """Whether an Accept-Encoding names gzip, and not with the weight of what isn't wanted."""
    for each in encodings.lower().split(","):
        name, _, weight = each.partition(";")
        if name.strip() == "gzip":
            return weight.replace(" ", "").rstrip(".0") != "q="
    return False
