"""Takes docs/pictures/page.png of a service: `python -m jobs.serve runs/shop` beside `python docs/pictures/page.py URL USER`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

if __name__ == "__main__":
    url, user = sys.argv[1:]
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1200, "height": 760})
        page.goto(url)
        page.fill("#user", user)
        page.keyboard.press("Enter")
        page.wait_for_selector("#list table")
        page.wait_for_timeout(1500)
        page.screenshot(path=str(Path(__file__).parent / "page.png"))
        browser.close()
