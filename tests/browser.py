"""A headless Chromium to open pages in, where there is one."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1120,900",
)  # fmt: skip


def why_not() -> str | None:
    """Why no page can be opened here, or None."""
    if not any(map(shutil.which, NAMES)):
        return "there is no Chromium here (Debian: apt install chromium chromium-driver)"
    if shutil.which("chromedriver") is None:
        return "there is no chromedriver here (Debian: apt install chromium-driver)"
    return None


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A selenium driver with a profile of its own, empty and thrown away."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = next(path for path in map(shutil.which, NAMES) if path)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


def scheme(driver: Any, name: str) -> None:
    """Show pages as to a reader whose system is light or dark."""
    features = [{"name": "prefers-color-scheme", "value": name}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def width(driver: Any, pixels: int) -> None:
    """Show pages in a window so wide; 0 for the window's own size."""
    if pixels:
        size = {"width": pixels, "height": 844, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    else:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def open_page(driver: Any, page: Path) -> list[str]:
    """Show a file; what the console said."""
    driver.get(page.as_uri())
    return [entry["message"] for entry in driver.get_log("browser")]
