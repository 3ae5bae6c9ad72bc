"""Writes the screenshots of docs/serving.md: python -m tests.shadowllm.serve.screenshots BUNDLE docs/"""

from __future__ import annotations

import sys
from pathlib import Path

from shadowllm.runtime import SLOT_BACKENDS, open_slots
from tests.shadowllm.serve.browser import ask, browser, finished
from tests.shadowllm.serve.conftest import running

QUESTION = "Why is the sea salty? Answer in one sentence."


def main(bundle: Path, folder: Path) -> None:
    backend = SLOT_BACKENDS[0]
    session = open_slots(bundle, backend, 1, prepack=True)  # the dense steps are then as fast as they can be
    with (
        running(bundle, session, name="SmolLM2-135M-Instruct", prefill_chunk=256, backend=backend) as server,
        browser() as opened,
    ):
        for name, width, height, scheme in (("desktop", 1280, 900, "light"), ("phone", 390, 844, "dark")):
            page = opened.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(server.url)
            page.locator("#model", has_text="layers").wait_for()
            ask(page, QUESTION, 32)
            if name == "desktop":
                page.get_by_role("button", name="Compare with dense").click()
                finished(page, "The dense answer is complete")
            page.get_by_role("option").nth(5).click()
            page.evaluate("document.activeElement.blur()")
            page.screenshot(path=folder / f"page-{name}.png", full_page=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
