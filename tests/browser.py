"""A real Chromium that looks at the status page, and what it has to say of it.

With BALANCESYNC_SCREENSHOTS naming a folder, each state that `Tab.look` is called for is kept there
as pictures: light, dark and on a phone.
"""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.async_api import Browser, ConsoleMessage, Page, ViewportSize, async_playwright

SCREENSHOTS = "BALANCESYNC_SCREENSHOTS"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_AXE = (Path(__file__).parent / "axe" / "axe.min.js").read_text()
_RULES = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice")
_PHONE: ViewportSize = {"width": 360, "height": 740}
_DESK: ViewportSize = {"width": 1280, "height": 900}
_WITHIN_MS = 20_000
_CUT = """[...document.querySelectorAll(".scroll")]
    .filter(each => each.scrollWidth > each.clientWidth).map(each => each.innerText)"""


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """The Chromium of this machine; skips where there's none."""
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    async with async_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = await playwright.chromium.launch(executable_path=path, args=flags)
        try:
            yield browser
        finally:
            await browser.close()


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a tab holds: bytes of its heap, nodes and listeners."""

    heap: int
    nodes: int
    listeners: int


class Tab:
    """One tab on the page; `said` are the messages of its console."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.said: list[str] = []
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.said.append(str(error)))

    def _hear(self, message: ConsoleMessage) -> None:
        self.said.append(f"{message.type}: {message.text}")

    async def text(self, selector: str) -> str:
        """The text of an element."""
        return await self.page.inner_text(selector)

    async def until(self, selector: str, text: str) -> None:
        """Wait until an element has this text in it."""
        found = self.page.locator(selector).filter(has_text=text).first
        try:
            await found.wait_for(timeout=_WITHIN_MS)
        except Exception as error:
            now = await self.page.locator(selector).all_inner_texts()
            raise AssertionError(f"{selector} never said {text!r}, but {now}") from error

    async def focused(self) -> str:
        """The id of the element that has the focus."""
        return str(await self.page.evaluate("document.activeElement.id"))

    async def sent(self) -> dict[str, int]:
        """The bytes of each answer that it got so far, with its headers, by URL."""
        return dict(
            await self.page.evaluate(
                "['navigation', 'resource'].flatMap(kind => performance.getEntriesByType(kind))"
                ".map(entry => [entry.name, entry.transferSize])"
            )
        )

    async def first_paint_ms(self) -> float:
        """When it first painted anything, from the start of its loading."""
        return float(await self.page.evaluate("performance.getEntriesByType('paint')[0].startTime"))

    async def footprint(self) -> Footprint:
        """What it holds now, after a garbage collection."""
        session = await self.page.context.new_cdp_session(self.page)
        try:
            await session.send("HeapProfiler.collectGarbage")
            await session.send("Performance.enable")
            found = await session.send("Performance.getMetrics")
        finally:
            await session.detach()
        values = {each["name"]: int(each["value"]) for each in found["metrics"]}
        return Footprint(values["JSHeapUsedSize"], values["Nodes"], values["JSEventListeners"])

    async def violations(self, *rules: str) -> list[str]:
        """What axe objects to: by these rules or sets of rules."""
        if not await self.page.evaluate("'axe' in window"):
            await self.page.evaluate(_AXE)
        found: dict[str, Any] = await self.page.evaluate(
            "rules => axe.run({resultTypes: ['violations'], runOnly: rules})", list(rules)
        )
        return [
            f"{each['id']}: {each['help']}: {node['target']} {node['failureSummary']}"
            for each in found["violations"]
            for node in each["nodes"]
        ]

    async def look(self, name: str, *, despite: str = "") -> None:
        """No message in the console but those with `despite`, and no objection of axe's."""
        for scheme in ("light", "dark"):
            await self._look(name, scheme)
        await self.page.emulate_media(color_scheme="light")
        unforeseen = [said for said in self.said if not despite or despite not in said]
        assert not unforeseen, "\n".join(unforeseen)

    async def _look(self, name: str, scheme: Literal["light", "dark"]) -> None:
        await self.page.emulate_media(color_scheme=scheme)
        await self.page.set_viewport_size(_PHONE)
        wide = await self.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= _PHONE["width"], f"{name}: a phone has to scroll sideways"
        cut = await self.page.evaluate(_CUT)
        assert not cut, f"{name}: on a phone these are cut at the edge: {cut}"
        await self._shoot(name, f"{scheme}-phone")
        await self.page.set_viewport_size(_DESK)
        await self._shoot(name, scheme)
        # Only colours depend on the scheme.
        found = await self.violations(*(_RULES if scheme == "light" else ("color-contrast",)))
        assert not found, f"{name}, {scheme}: " + "\n".join(found)

    async def _shoot(self, name: str, kind: str) -> None:
        folder = os.environ.get(SCREENSHOTS)
        if folder:
            await asyncio.sleep(0.3)
            path = await asyncio.to_thread(Path, folder, f"{name}-{kind}.png")
            await self.page.screenshot(path=path, full_page=True)


@asynccontextmanager
async def tab(browser: Browser, address: str) -> AsyncIterator[Tab]:
    """A tab of a session of its own, which shows the page."""
    context = await browser.new_context(viewport={"width": 1280, "height": 900})
    try:
        made = Tab(await context.new_page())
        await made.page.goto(address)
        yield made
    finally:
        await context.close()
