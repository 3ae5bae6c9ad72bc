"""The page in real headless Chromium."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from tests.runtime.serving.paused_slots import PausedSlots
from tests.shadowllm.serve.browser import ask, browser, executable, finished
from tests.shadowllm.serve.conftest import running

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
# Counts the colours of the picture, which are nearly those of the style.
COLOURS = """canvas => {
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data, found = {};
  for (let i = 0; i < data.length; i += 4) {
    const colour = [data[i], data[i + 1], data[i + 2], data[i + 3]].join();
    found[colour] = (found[colour] || 0) + 1;
  }
  return Object.values(found).filter(count => count > 100).length;
}"""


@pytest.fixture(scope="module")
def chromium():
    pytest.importorskip("playwright", reason="the page is not driven (pip install playwright)")
    if executable() is None:
        pytest.skip("the page is not driven, because there is no Chromium")
    with browser() as opened:
        yield opened


@contextmanager
def opened(chromium, server, expected=()):
    """The page of a server. At the end, its errors are those that are expected."""
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    problems = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(server.url)
    page.get_by_text("layers, each with 4 heads and").wait_for()
    yield page
    page.close()
    assert len(problems) == len(expected)
    assert all(words in problem for words, problem in zip(expected, problems, strict=True))


@pytest.fixture
def page(chromium, server):
    with opened(chromium, server) as found:
        assert found.get_by_text("3 layers, each with 4 heads and 88 neurons").count() == 1
        yield found


def send(page, text):
    """Send a prompt; return the body of the request."""
    page.get_by_role("textbox", name="Prompt").fill(text)
    with page.expect_request("**/v1/chat/completions") as sent:
        page.keyboard.press("Enter")
    return sent.value.post_data_json


def shown(page):
    """The messages that the page shows, in the form of a request."""
    items = page.locator("#messages li:not(.dense)").all()
    return [
        {"role": item.get_attribute("class"), "content": item.locator("p").evaluate("text => text.textContent")}
        for item in items
    ]


def test_a_chat_with_the_picture_of_each_token(page, server):
    attack = "<img src=x onerror=alert(1)>"
    ask(page, attack, 12)
    assert page.get_by_label("Messages").get_by_text(attack).count() == 1
    assert page.locator("img").count() == 0
    options = page.get_by_role("option")
    count = options.count()
    assert 2 <= count <= 12
    assert "10% of neurons and heads" in page.locator("#budget-text").inner_text()
    # The second token is chosen. Its step computed 9 of 88 neurons, and one head of 4, in two of the three layers.
    summary = page.locator("#summary")
    assert f"Token 2 of {count}" in summary.inner_text()
    assert "50% of the heads and 40% of the neurons in full" in summary.inner_text()
    assert page.locator("canvas").evaluate(COLOURS) >= 2
    page.get_by_text("As a table").click()
    rows = page.locator("#table tr").all_inner_texts()
    assert [row.split("\t") for row in rows] == [
        ["0", "4 of 4", "88 of 88"],
        ["1", "1 of 4", "9 of 88"],
        ["2", "1 of 4", "9 of 88"],
    ]
    # By keyboard: the first token is dense, and the arrows stay inside the text.
    page.get_by_role("listbox").press("Home")
    page.keyboard.press("ArrowLeft")
    assert "everything in full" in summary.inner_text()
    assert page.get_by_role("listbox").get_attribute("aria-activedescendant") == "token-0"
    options.last.click()
    assert options.last.get_attribute("aria-selected") == "true"
    assert f"Token {count} of {count}" in summary.inner_text()
    # The measurement beside the dense model.
    assert "tokens per second" in page.locator("#speed").inner_text()
    page.get_by_role("button", name="Compare with dense").click()
    finished(page, "The dense answer is complete")
    assert "tokens per second" in page.locator("#dense-speed").inner_text()
    page.get_by_role("button", name="New chat").click()
    assert page.get_by_role("listitem").count() == 0
    assert server.is_idle()


def test_exact_is_all_in_full(page):
    ask(page, "Hello", 5, budget=0)
    page.get_by_role("listbox").press("End")
    assert "100% of the heads and 100% of the neurons in full" in page.locator("#summary").inner_text()


def test_stop_ends_an_answer(page, server):
    page.get_by_label("Most new tokens").fill("60")
    page.get_by_role("textbox", name="Prompt").fill("Hi")
    page.evaluate("""() => {
      document.getElementById("send").click();
      setTimeout(() => document.getElementById("stop").click(), 1);
    }""")
    page.get_by_text("Stopped").wait_for()
    assert page.get_by_role("button", name="Send").is_enabled()
    assert server.is_idle()


def test_a_stopped_answer_is_sent_as_it_is_shown(chromium, bundle):
    from playwright.sync_api import expect

    with running(bundle(), PausedSlots(bundle(), 1)) as server, opened(chromium, server) as page:
        send(page, "Hi")
        expect(page.locator("li.assistant p")).not_to_be_empty()  # the first token; the second one waits
        page.get_by_role("button", name="Stop").click()
        finished(page, "Stopped")
        server.session.go.set()
        before = shown(page)
        assert [message["role"] for message in before] == ["user", "assistant"]
        assert before[0]["content"] == "Hi"
        assert before[1]["content"]
        assert page.get_by_role("option").count() == 1
        body = send(page, "So")
        finished(page, "The answer is complete")
        assert body["messages"] == [*before, {"role": "user", "content": "So"}]
        assert shown(page)[:3] == body["messages"]
        assert server.is_idle()


def test_a_prompt_that_failed_goes_back_into_the_box(chromium, server):
    with opened(chromium, server, ["the server responded with a status of 400"] * 2) as page:
        too_long = "x" * 70
        send(page, too_long)
        finished(page, "Error: the prompt has")
        assert shown(page) == []
        box = page.get_by_role("textbox", name="Prompt")
        assert box.input_value() == too_long
        assert page.get_by_role("button", name="Compare with dense").is_disabled()
        page.get_by_label("Most new tokens").fill("4")
        send(page, "Hi")
        finished(page, "The answer is complete")
        before = shown(page)
        send(page, too_long)
        finished(page, "Error: the prompt has")
        assert shown(page) == before
        # The comparison is that of the prompt before.
        with page.expect_request("**/v1/chat/completions") as sent:
            page.get_by_role("button", name="Compare with dense").click()
        assert sent.value.post_data_json["messages"] == before[:1]
        finished(page, "The dense answer is complete")
        assert send(page, "So")["messages"] == [*before, {"role": "user", "content": "So"}]
        finished(page, "The answer is complete")


def test_a_relu_model_has_a_budget_of_heads_only(chromium, bundle):
    with running(bundle("llama-relu", kind="relu")) as server, opened(chromium, server) as page:
        assert page.locator("#budget-text").inner_text() == "10% of heads, and all neurons that fire"
        page.get_by_label("Most new tokens").fill("4")
        assert send(page, "Hi")["sparsity"] == {"heads": 0.1}
        finished(page, "The answer is complete")
        page.get_by_role("slider").press("Home")
        assert send(page, "So")["sparsity"] == "exact"
        finished(page, "The answer is complete")


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_width_and_scheme(page, width, scheme):
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(brightness) > 3 * 128) == (scheme == "light")
    for label in page.locator("input:visible, textarea:visible").all():
        assert label.evaluate("field => field.labels.length") == 1
