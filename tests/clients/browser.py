"""The page in a headless Chromium: typed on, seen growing, stopped, a blank filled, an error shown.

python browser.py URL MODE FOLDER: MODE is "text" (a chat model) or "blanks"; screenshots are kept.
Needs selenium, and chromium and chromedriver on the PATH.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

PATIENCE_S = 120.0
SIZES = {"desktop": (1280, 540), "phone": (390, 844)}
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def main(url: str, mode: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        browser = started(profile)
        try:
            page = Page(browser, url)
            checks = CHECKS[mode]
            for check in checks:
                check(page)
                print(f"page: {check.__name__.replace('_', ' ')}")
            photograph(browser, folder, mode)
            logged = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
            assert all("400" in entry["message"] for entry in logged), logged
            assert page.requested_elsewhere() == [], page.requested_elsewhere()
        finally:
            browser.quit()
    print(f"page ({mode}): {len(checks)} checks passed")


def started(profile: str) -> Any:
    """Raises where there is no Chromium."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium and driver, "chromium and chromedriver are not on the PATH"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(driver))


class Page:
    """What a person sees and does."""

    def __init__(self, browser: Any, url: str) -> None:
        self.browser, self.url = browser, url
        browser.set_window_size(*SIZES["desktop"])
        browser.get(url)
        self.until(lambda: self["state"].text == "ready")
        self.until(lambda: self["name"].text != "bminf")

    def __getitem__(self, name: str) -> Any:
        return self.browser.find_element(By.ID, name)

    @property
    def output(self) -> str:
        return str(self["output"].text)

    def until(self, is_so: Callable[[], Any]) -> Any:
        end_s = time.monotonic() + PATIENCE_S
        while not (found := is_so()):
            assert time.monotonic() < end_s, f"not so on the page: {self.output!r}"
            time.sleep(0.02)
        return found

    def type(self, text: str, tokens: int = 12) -> None:
        for name, value in (("prompt", text), ("tokens", str(tokens)), ("temperature", "0")):
            self[name].clear()
            self[name].send_keys(value)

    def is_idle(self) -> bool:
        return bool(self["start"].is_enabled())

    def running(self) -> int:
        script = (
            "return fetch('plan').then((reply) => reply.json()).then((told) => told.queue.running)"
        )
        return int(self.browser.execute_script(script))

    def requested_elsewhere(self) -> list[str]:
        script = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
        return [
            name for name in self.browser.execute_script(script) if not name.startswith(self.url)
        ]


# ---- checks --------------------------------------------------------------------------------------


def text_is_written_on_and_grows(page: Page) -> None:
    page.type("The capital of France is", 24)
    page["prompt"].send_keys(Keys.CONTROL, Keys.ENTER)
    seen: set[str] = set()
    page.until(lambda: seen.add(page.output) or (page.is_idle() and len(page.output) > 30))
    assert "Paris" in page.output and len(seen) > 4, seen


def escape_stops_and_frees_the_row(page: Page) -> None:
    page.type("Once upon a time", 200)
    page["start"].click()
    page.until(lambda: len(page.output) > 25)
    page["prompt"].send_keys(Keys.ESCAPE)
    page.until(page.is_idle)
    page.until(lambda: page.running() == 0)
    stopped = page.output
    time.sleep(0.3)
    assert page.output == stopped and len(stopped) < 600


def a_chat_remembers_what_was_said(page: Page) -> None:
    page["chat"].click()
    page.type("What is the capital of France?", 16)
    page["start"].click()
    page.until(lambda: page.is_idle() and "Paris" in page.output)
    page.type("What did I ask you?", 16)
    page["start"].click()
    page.until(
        lambda: (
            page.is_idle() and len(page.browser.find_elements(By.CSS_SELECTOR, "#output p")) == 4
        )
    )


def the_keyboard_is_enough(page: Page) -> None:
    page["chat"].send_keys(Keys.ARROW_LEFT)
    assert page["write"].get_attribute("aria-selected") == "true"
    assert page.browser.switch_to.active_element == page["write"]


def an_error_is_shown(page: Page) -> None:
    page.type("word " * 3000)
    page["start"].click()
    page.until(lambda: "prompt is too long" in page["error"].text)


def the_plan_is_drawn(page: Page) -> None:
    cells = page.browser.find_elements(By.CSS_SELECTOR, "#blocks i")
    streamed = page.browser.find_elements(By.CSS_SELECTOR, "#blocks i.streamed")
    assert cells and 0 < len(streamed) < len(cells)
    assert f"{len(streamed)} are streamed" in page["blocks"].get_attribute("aria-label")


def the_speed_is_shown(page: Page) -> None:
    page["clear"].click()
    page.type("Once upon a time", 100)
    page["start"].click()
    page.until(lambda: float(page["speeds"].text.split()[1]) > 0 and len(page.output) > 150)


def blanks_are_filled(page: Page) -> None:
    page["fill"].click()
    page.type("now [MASK] is a [MASK]", 4)
    page["start"].click()
    page.until(page.is_idle)
    assert len(page.browser.find_elements(By.TAG_NAME, "mark")) == 2
    assert page.output.startswith("now ") and "[MASK]" not in page.output


def what_a_model_cannot_do_is_disabled(page: Page) -> None:
    assert not page["chat"].is_enabled() and page["fill"].is_enabled()


CHECKS = {
    "text": (
        text_is_written_on_and_grows, escape_stops_and_frees_the_row,
        a_chat_remembers_what_was_said, the_keyboard_is_enough, an_error_is_shown,
        the_plan_is_drawn, the_speed_is_shown,
    ),
    "blanks": (what_a_model_cannot_do_is_disabled, blanks_are_filled),
}  # fmt: skip


def photograph(browser: Any, folder: Path, mode: str) -> None:
    """Light and dark, wide and narrow."""
    for size, (width, height) in SIZES.items():
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone",
        })  # fmt: skip
        for scheme in ("light", "dark"):
            feature = {"name": "prefers-color-scheme", "value": scheme}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
            wide = browser.execute_script("return document.documentElement.scrollWidth")
            assert wide <= width, f"it is {wide} wide on a {size}"
            browser.save_screenshot(str(folder / f"{mode}-{size}-{scheme}.png"))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
