"""Headless Chromium, and the steps that the test and the screenshots share."""

from __future__ import annotations

import shutil
from contextlib import contextmanager


def executable():
    """Path of a Chromium on this machine; None without one."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def browser():
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's sandbox does not work for root, as in most containers. Only the page of a server here is opened.
        opened = playwright.chromium.launch(executable_path=executable(), args=["--no-sandbox"])
        yield opened
        opened.close()


def ask(page, text, tokens, budget=5):
    """Send a prompt as a user of the keyboard does, and wait for the whole answer.

    Args:
        budget: steps of the slider after the exact model.
    """
    page.get_by_label("Most new tokens").fill(str(tokens))
    slider = page.get_by_role("slider")
    slider.press("Home")
    for _ in range(budget):
        slider.press("ArrowRight")
    page.get_by_role("textbox", name="Prompt").fill(text)
    page.keyboard.press("Enter")
    finished(page, "The answer is complete")


def finished(page, text):
    """Wait until the status begins with a text."""
    from playwright.sync_api import expect

    expect(page.get_by_role("status")).to_contain_text(text, timeout=300_000)
