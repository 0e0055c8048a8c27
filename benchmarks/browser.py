"""A Chromium that opens a page again and again: when each load was first painted, and its bytes."""

import shutil
from typing import Any, Final

from playwright.async_api import Browser, Page, async_playwright

from balancesync.errors import BalanceSyncError

_NAMES: Final = ("chromium", "chromium-browser", "google-chrome", "chrome")
_PAINTED_MS: Final = (
    "new Promise(done => new PerformanceObserver(found => done(found.getEntries()[0].startTime))"
    ".observe({type: 'paint', buffered: true}))"
)
_BYTES: Final = (
    "['navigation', 'resource'].flatMap(kind => performance.getEntriesByType(kind))"
    ".reduce((sum, entry) => sum + entry.transferSize, 0)"
)


def chromium() -> str | None:
    """The path of this machine's Chromium, if it has one."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


async def paints(page: str, bare: str, complete: str, loads: int) -> dict[str, Any]:
    """Open two URLs in turn, in one warm Chromium: when each was first painted, in ms.

    Each load is a session of its own, with an empty cache. `bytes` are those of each load of
    `page` once its element `complete` is there: with headers, as they were sent.
    """
    path = chromium()
    if path is None:
        raise BalanceSyncError("no Chromium on this machine")
    found: dict[str, Any] = {"page": [], "bare": [], "bytes": []}
    async with async_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = await playwright.chromium.launch(executable_path=path, args=flags)
        # The first loads of a browser find nothing warm.
        await _opened(browser, page)
        for _ in range(loads):
            tab, painted = await _opened(browser, bare)
            found["bare"].append(painted)
            await tab.context.close()
            tab, painted = await _opened(browser, page)
            found["page"].append(painted)
            await tab.wait_for_selector(complete)
            found["bytes"].append(await tab.evaluate(_BYTES))
            await tab.context.close()
        await browser.close()
    return found


async def _opened(browser: Browser, url: str) -> tuple[Page, float]:
    context = await browser.new_context(viewport={"width": 1280, "height": 900})
    tab = await context.new_page()
    await tab.goto(url)
    return tab, float(await tab.evaluate(_PAINTED_MS))
