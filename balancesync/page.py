"""The status page: a few files that stay as they are while the process runs.

Nothing in them is inline and nothing comes from another host, so the policy can forbid the rest:
https://developer.mozilla.org/docs/Web/HTTP/Guides/CSP. Trusted Types forbid the page's own code to
make HTML of a text, such as a key's name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from html import escape
from importlib.resources import files
from typing import Final

from aiohttp import web

from balancesync.listener import reply_bytes

POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_TYPES: Final = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
}
INDEX: Final = "index.html"


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    kind: str
    tag: str


class Page:
    """The files, by name. `facts` are what the page is told at once: attributes of its root."""

    def __init__(self, facts: Mapping[str, str]) -> None:
        attributes = "".join(f' data-{name}="{escape(text)}"' for name, text in facts.items())
        self._files: dict[str, _File] = {}
        for file in files("balancesync").joinpath("static").iterdir():
            kind = _TYPES.get(file.name.rpartition(".")[2])
            if kind is not None:
                body = file.read_bytes()
                if file.name == INDEX:
                    body = body.replace(b"<html", b"<html" + attributes.encode(), 1)
                self._files[file.name] = _File(body, kind, f'"{sha256(body).hexdigest()[:16]}"')

    @property
    def names(self) -> list[str]:
        """What the page itself asks for, by name."""
        return sorted(self._files.keys() - {INDEX})

    def answer(self, name: str, known_tag: str | None) -> web.Response | None:
        """A file; only its headers for whoever has it already; None if there's none such."""
        file = self._files.get(name)
        if file is None:
            return None
        # Kept, but never used without asking: an upgrade must not meet an old page.
        headers = {
            "Cache-Control": "no-cache",
            "Content-Security-Policy": POLICY,
            "ETag": file.tag,
        }
        if known_tag == file.tag:
            return reply_bytes(b"", file.kind, 304, headers)
        return reply_bytes(file.body, file.kind, 200, headers)
