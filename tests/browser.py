"""The built site, served from this process, and a Chromium without a window."""

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--disable-dev-shm-usage",
)
BROWSERS, DRIVERS = ("chromium", "chromium-browser"), ("chromedriver",)


def programs() -> tuple[str | None, str | None]:
    """Paths of a Chromium and of its driver, None where there is none."""
    return tuple(
        next(filter(None, map(shutil.which, names)), None) for names in (BROWSERS, DRIVERS)
    )


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *told: Any) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Address of a folder."""
    handler = functools.partial(Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A browser that reaches nothing but this machine, and remembers what its console said."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    browser, driver = programs()
    options.binary_location = str(browser)
    nowhere = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    for flag in (*FLAGS, f"--user-data-dir={profile}", nowhere):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    page = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(driver)))
    try:
        yield page
    finally:
        page.quit()


def resized(page: Any, width: int, height: int = 900) -> None:
    """A viewport of that many pixels, as a phone or a screen has it."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def darkened(page: Any, dark: bool) -> None:
    """What the reader's system prefers."""
    value = "dark" if dark else "light"
    features = [{"name": "prefers-color-scheme", "value": value}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
