"""The page at `/` in a real browser (Debian's chromium; skipped where there is none)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtrec_ray.serving.settings import ServingSettings
from tests import tiny
from tests.net import free_port

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.browser]
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def url(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A fused service with texts and a category, over HTTP."""
    from ray import serve

    from serve_apps.recommend import Args, build

    folder = tmp_path_factory.mktemp("page")
    tiny.write_shop(folder)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    options = {"Ingress": {"ray_actor_options": {"num_cpus": 0.1}}}
    patient = ServingSettings(deadline_ms=60_000)  # a busy machine degrades nothing
    serve.run(build(Args(run=str(folder), options=options, fused=True, serving=patient)), name="page", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_somebody_looks_at_a_user_adds_an_event_and_sees_the_answer_change(url: str, tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(url)
        page.get_by_label("User", exact=True).fill("u1")
        page.get_by_role("button", name="Recommend").click()
        rows = page.locator("#list tbody tr")
        rows.first.wait_for(timeout=30_000)
        assert rows.count() == 10 and "because of" in page.locator("#list").inner_text()
        assert page.locator("#list thead").inner_text().split()[-3:] == ["retrieval", "click", "rating"]
        page.locator("#history tbody tr").first.wait_for()
        page.locator("#profile .bar").first.wait_for()
        first = rows.first.locator("td").nth(1).inner_text().split("\n")[0]
        rows.first.get_by_role("button", name="similar to").click()
        page.locator("#similar tbody tr").first.wait_for()
        rows.first.get_by_role("button", name="add an event").click()
        page.get_by_role("button", name="Add", exact=True).click()
        page.get_by_text("The event is kept").wait_for(timeout=30_000)
        assert first in page.locator("#history tbody tr").first.inner_text()
        assert first not in [r.locator("td").nth(1).inner_text().split("\n")[0] for r in rows.all()]  # it is seen now
        page.get_by_label("Only").select_option(label="genre: even")
        page.get_by_role("button", name="Recommend").click()
        page.get_by_text("items in").wait_for(timeout=30_000)
        page.wait_for_timeout(500)
        titles = [r.locator("td").nth(1).inner_text().split("\n")[0] for r in rows.all()]
        assert titles and all(t == "Thing new" or int(t.split()[1]) % 2 == 0 for t in titles)
        page.get_by_role("textbox", name="Text").fill("Thing 7, odd")
        page.get_by_role("button", name="Search").click()
        page.locator("#found tbody tr").first.wait_for()
        assert "Thing 7" in page.locator("#found tbody tr").first.inner_text()
        assert (
            "/recommend" in page.locator("#service").inner_text()
            and "no answer was degraded" in page.locator("#service").inner_text()
        )
        page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
        page.get_by_label("User", exact=True).fill("<img src=x onerror=alert(1)>")
        page.get_by_role("button", name="Recommend").click()
        page.get_by_text("degraded: no_history").wait_for()
        page.get_by_label("How many").fill("1000000000000000000000")
        page.evaluate("document.getElementById('who').noValidate = true")
        page.get_by_role("button", name="Recommend").click()
        page.get_by_text("422").wait_for()
        assert [e for e in errors if "422" not in e] == []
        browser.close()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_every_control_has_a_name_and_a_phone_scrolls_in_one_direction_only(url: str) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 360, "height": 740})
        page.goto(f"{url}/?user=u2")
        page.locator("#list tbody tr").first.wait_for(timeout=30_000)
        unnamed = page.evaluate(
            "[...document.querySelectorAll('input,select,button')].filter(e => !e.closest('label') && !e.textContent.trim()"
            " && !e.getAttribute('aria-label')).map(e => e.outerHTML)"
        )
        assert unnamed == [] and page.evaluate("document.documentElement.scrollWidth") <= 360
        browser.close()
