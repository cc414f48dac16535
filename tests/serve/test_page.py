"""The page at `/`, in headless Chromium against the real endpoint."""

import os
import re
import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect, sync_playwright

from lorafleet.composition import METHODS
from serve.page_routes import FOLDER, MEDIA_TYPES

pytestmark = pytest.mark.integration

QUESTION = "The man turned on the faucet. What happened as a RESULT? As a result, the water"
PATIENCE_MS = 60_000
Opened = Callable[..., Page]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no Chromium here: apt-get install chromium, or name one in CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(fleet, chromium: Browser) -> Iterator[Opened]:
    """Opens the page; afterwards nothing may be in the console, and no other host may have been asked."""
    url = fleet[0]
    contexts: list[BrowserContext] = []
    told: list[str] = []
    foreign: list[str] = []

    def watch(route: Route) -> None:
        if route.request.url.startswith(url):
            route.continue_()
        else:
            foreign.append(route.request.url)
            route.abort()

    def open_page(fragment: str = "", **context) -> Page:
        contexts.append(chromium.new_context(**context))
        contexts[-1].route("**/*", watch)
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.goto(f"{url}/{fragment}")
        expect(page.locator(".cards li")).to_have_count(3)
        return page

    expect.set_options(timeout=PATIENCE_MS)
    yield open_page
    for context in contexts:
        context.close()
    # Chromium itself notes every answer that is not 200; whether one was expected, the tests say.
    assert [text for text in told if "the server responded with a status of" not in text] == []
    assert foreign == []


def ask(
    page: Page, methods: tuple[str, ...] = ("base", "linear", "cat"), sent_as: str = "completion", weigher: str = "nucleus"
) -> None:
    page.get_by_label("Your question").fill(QUESTION)
    page.get_by_label("Weighed by").select_option(weigher)
    page.get_by_label("Sent as").select_option(sent_as)
    for box in page.locator("#methods input").all():
        box.set_checked(box.get_attribute("value") in methods)
    page.get_by_label("Tokens at most").fill("8")
    page.get_by_role("button", name="Ask").click()


def test_a_question_shows_why_and_streams_one_answer_a_method(opened, http):
    page = opened()
    ask(page)
    expect(page.locator("#status")).to_have_text("Done")
    by_nucleus = {"weigher": "nucleus", "p": 0.9, "top_k": 100}
    routed = http.post("/v1/route", json={"input": QUESTION, **by_nucleus}).json()

    rows = page.locator("table.weights tbody tr")
    expect(rows).to_have_count(len(routed["shares"]))
    for row, (task, share) in zip(rows.all(), routed["shares"].items(), strict=True):
        weight = f"{routed['weights'][task]:.3f}" if task in routed["weights"] else "cut"
        assert row.inner_text().split() == [task, f"{share:.3f}", weight]
    assert routed["neighbours"][0]["task"] in page.locator(".neighbours li").first.inner_text()
    assert page.locator(".row-text").first.text_content() == routed["neighbours"][0]["text"]

    answers = page.get_by_role("article")
    assert [heading.inner_text() for heading in answers.get_by_role("heading").all()] == ["base model", "linear", "cat"]
    wishes = [{"model": "base"}, *({"composition": {"method": method, **by_nucleus}} for method in ("linear", "cat"))]
    for answer, wish in zip(answers.all(), wishes, strict=True):
        body = {"prompt": QUESTION, "max_tokens": 8, "temperature": 0, **wish}
        whole = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
        assert answer.locator(".text").text_content().strip() == whole.strip() != ""
        assert re.search(r"first token \d+ ms", answer.inner_text())
        assert re.search(r"\d tokens?", answer.inner_text())
        assert answer.locator("dt").all_text_contents()[-1] == "total"
    assert answers.first.locator(".made").inner_text() == "no adapter"
    label = answers.last.get_by_role("img").get_attribute("aria-label")
    assert all(task in label for task in routed["weights"])

    card = page.locator(".cards li", has_text="copa")
    card.get_by_text("Card").click()
    for fact in ("rank 4", "alpha", "rows", "trained", "base", "steps"):
        expect(card).to_contain_text(fact)
    colours = {
        page.locator(selector, has_text="copa").first.evaluate("node => getComputedStyle(node, '::before').backgroundColor")
        for selector in (".weights .task", ".neighbours .task", ".cards .task")
    }
    assert len(colours) == 1


def test_the_cut_moves_with_p_and_a_link_repeats_the_question(opened):
    page = opened()
    with page.expect_request("**/v1/chat/completions"):
        ask(page, methods=("selection",), sent_as="chat")
    expect(page.locator("#status")).to_have_text("Done")
    assert page.get_by_role("article").locator(".text").inner_text() != "(no text)"
    page.get_by_label("Nucleus p").fill("1")
    expect(page.locator("tbody:not(.beyond) tr")).to_have_count(3)
    page.get_by_label("Nucleus p").fill("0.05")
    expect(page.locator("tbody:not(.beyond) tr")).to_have_count(1)
    expect(page.locator(".weights caption")).to_contain_text("1 of 3 tasks")
    assert "p = 0.05" in page.locator("#weights").get_by_role("img").get_attribute("aria-label")

    again = opened(f"#{page.url.partition('#')[2]}")
    expect(again.locator("tbody:not(.beyond) tr")).to_have_count(1)
    assert again.get_by_label("Your question").input_value() == QUESTION
    assert again.get_by_label("Sent as").input_value() == "chat"
    assert again.locator("#methods :checked").get_attribute("value") == "selection"
    assert again.get_by_role("article").count() == 0


def test_the_endpoints_own_weights_are_shown_where_nothing_else_is_wished(opened, http):
    page = opened()
    expect(page.get_by_label("Weighed by")).to_have_value("own")
    expect(page.get_by_label("Nucleus p")).to_be_disabled()
    with page.expect_request("**/v1/completions") as asked:
        ask(page, methods=("cat",), weigher="own")
    expect(page.locator("#status")).to_have_text("Done")
    assert asked.value.post_data_json["composition"] == {"method": "cat", "top_k": 100}
    routed = http.post("/v1/route", json={"input": QUESTION}).json()
    lines = {task: (f"{routed['shares'].get(task, 0):.3f}", f"{weight:.3f}") for task, weight in routed["weights"].items()}
    rows = [row.inner_text().split() for row in page.locator("table.weights tbody:not(.beyond) tr").all()]
    assert {task: (share, weight) for task, share, weight in rows} == lines
    expect(page.locator(".weights caption")).to_contain_text(f"Weighed by joint: {len(lines)} of 3 tasks take part")


def test_weights_set_by_hand_are_those_of_the_answer(opened):
    page = opened()
    page.get_by_label("Set by hand").check()
    page.get_by_label("wnli", exact=True).fill("0.75")
    page.get_by_label("copa", exact=True).fill("0.25")
    with page.expect_request("**/v1/completions") as asked:
        ask(page, methods=("cat",))
    expect(page.locator("#status")).to_have_text("Done")

    assert asked.value.post_data_json["composition"] == {"method": "cat", "weights": {"wnli": 0.75, "copa": 0.25}}
    assert "wnli 0.75" in page.get_by_role("article").get_by_role("img").get_attribute("aria-label")


def test_the_keyboard_is_enough_and_the_focus_is_seen(opened):
    page = opened()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the question")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Your question")).to_be_focused()
    page.keyboard.type(QUESTION)
    focused = []
    for _ in range(24):
        page.keyboard.press("Tab")
        focused.append(page.evaluate("() => document.activeElement.id || document.activeElement.value"))
        # A pill's box is unseen, and its label has the ring.
        ring = "node => getComputedStyle(node.closest('#methods label') ?? node).outlineStyle"
        assert page.locator(":focus").evaluate(ring) != "none", focused[-1]
        if focused[-1] == "ask":
            break
    assert {"base", "linear", "weigher", "k", "max", "temperature", "format", "ask"} <= set(focused)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_have_text("Done")


def test_stop_ends_the_streams_and_an_error_is_said_where_it_happened(opened):
    page = opened()
    page.get_by_label("Your question").fill(QUESTION)
    page.get_by_label("Tokens at most").fill("64")
    page.get_by_role("button", name="Ask").click()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#status")).to_have_text("Stopped")
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    expect(page.locator(".streaming")).to_have_count(0)

    page.get_by_label("Tokens at most").fill("65")
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("article").first.get_by_role("alert")).to_have_text(re.compile("max_tokens is 65.*at most 64"))
    expect(page.locator("#status")).to_have_text("Not every answer came")


def test_what_the_server_says_is_text_and_the_key_goes_with_every_request(opened):
    page = opened()
    answer = '{"error": {"message": "<img src=x onerror=alert(1)> is no key", "type": "", "param": null, "code": null}}'
    page.route("**/v1/route", lambda route: route.fulfill(status=401, body=answer, content_type="application/json"))
    with page.expect_request("**/v1/route"):
        ask(page, methods=("base",))
    expect(page.locator("#neighbours").get_by_role("alert")).to_have_text("<img src=x onerror=alert(1)> is no key")
    assert page.locator("main img").count() == 0

    page.unroute("**/v1/route")
    page.get_by_label("API key", exact=True).last.fill("sk-fleet")
    page.keyboard.press("Enter")
    with page.expect_request("**/v1/route") as asked:
        ask(page, methods=("base",))
    assert asked.value.headers["authorization"] == "Bearer sk-fleet"
    assert page.evaluate("() => [sessionStorage.length, Object.values(localStorage).includes('sk-fleet')]") == [1, False]
    assert "sk-fleet" not in page.url


def test_phones_dark_rooms_and_who_wants_no_motion(opened):
    page = opened(
        viewport={"width": 360, "height": 740},
        color_scheme="dark",
        reduced_motion="reduce",
        has_touch=True,
    )
    ask(page)
    expect(page.locator("#status")).to_have_text("Done")
    background = "() => getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    assert page.evaluate("() => document.documentElement.scrollWidth") == 360
    for summary in page.locator("details summary").all():
        summary.click()
    assert page.evaluate("() => document.documentElement.scrollWidth") == 360
    theme = page.get_by_role("button", name="Theme")
    theme.click()
    assert page.evaluate(background) != dark
    page.reload()
    assert page.evaluate(background) != dark
    theme.click()
    assert page.evaluate(background) == dark
    assert page.locator(".streaming").count() == 0


def test_the_methods_are_all_that_there_are():
    offered = re.findall(r'type="checkbox" value="(\w+)"', (FOLDER / "index.html").read_text())
    assert sorted(offered) == sorted([*METHODS, "base"])


def test_files_come_with_their_type_a_strict_policy_and_a_tag(http):
    names = sorted(path.name for path in FOLDER.iterdir())
    for path in ("/", *(f"/page/{name}" for name in names)):
        answer = http.get(path)
        assert answer.status_code == 200, path
        media_type = MEDIA_TYPES[".html" if path == "/" else f".{path.rsplit('.', 1)[1]}"]
        assert answer.headers["Content-Type"].startswith(media_type)
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        again = http.get(path, headers={"If-None-Match": answer.headers["ETag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert http.get("/page/..%2fgateway.py").status_code == http.get("/page/gateway.py").status_code == 404
