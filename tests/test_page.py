"""The page of `griffin serve`, in a real browser, before a server whose answers are known."""

from __future__ import annotations

import base64
import codecs
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from page_server import CHANGED, FULL, LAYERS, MODEL, NOTHING, PAGE, PRUNED, PageServer, answer, flocking

PROMPT = "Explain to a fisherman how the tides work, and what the moon has to do with it."
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
FOCUSED = "document.activeElement.id || document.activeElement.textContent"


@pytest.fixture
def server() -> Iterator[PageServer]:
    with PageServer() as started:
        yield started


@contextmanager
def opened(browser: Any, url: str, *, refused: bool = False, **options: Any) -> Iterator[Any]:
    """The page, which may say nothing on the console and ask no other host.

    Args:
        refused: the browser itself writes a line for every request that failed, which is then allowed.
    """
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
    page = context.new_page()
    page.set_default_timeout(15_000)
    told: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: request.url.startswith(url) or told.append(request.url))
    page.goto(url)
    try:
        yield page
    finally:
        context.close()
    assert [line for line in told if not (refused and line.startswith("Failed to load resource"))] == []


def said(page: Any, selector: str, pattern: str, timeout_s: float = 15) -> None:
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_text(re.compile(pattern), timeout=1000 * timeout_s)


def generate(page: Any, prompt: str = PROMPT, until: str = "^Done$", timeout_s: float = 15) -> None:
    page.fill("#prompt", prompt)
    page.click("#generate")
    said(page, "#status", until, timeout_s)


def pixels(page: Any, canvas: str = "#heat") -> list[int]:
    return page.locator(canvas).evaluate(  # type: ignore[no-any-return]
        """canvas => {
            const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d");
            copy.drawImage(canvas, 0, 0);
            return [...copy.getImageData(0, 0, canvas.width, canvas.height).data];
        }"""
    )


def marks(page: Any) -> list[bool]:
    code = "text => [...text.children].map(token => token.localName === 'mark')"
    return page.locator("#griffin .text").evaluate(code)  # type: ignore[no-any-return]


def streamed_tokens(stream: str) -> list[str]:
    """The tokens of an answer as it was sent."""
    lines = [line.removeprefix("data:").strip() for line in stream.splitlines() if line.startswith("data:")]
    assert lines[-1] == "[DONE]"
    choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
    logprobs = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    return [
        token
        for info in logprobs
        for token in info.get("tokens", [str(part["bytes"]) for part in info.get("content", [])])
    ]


def check_answers(page: Any, timeout_s: float = 15) -> None:
    """Both ways of asking, at density 0.3: what is shown is what any server of this API has sent."""
    for kind, prompt, layer in (("Chat", PROMPT, 1), ("Plain text", "The tides come and go twice a day, because", 2)):
        page.get_by_text(kind, exact=True).click()
        page.locator("#density").fill("0.3")
        page.locator("#length").fill("24")
        streams: list[Any] = []
        page.on(
            "response", lambda response, streams=streams: streams.append(response) if "comp" in response.url else None
        )
        generate(page, prompt, timeout_s=timeout_s)
        answers = streams[:2]
        assert [sent.request.post_data_json["griffin"]["density"] for sent in answers] == [1, 0.3]
        assert [sent.request.post_data_json["temperature"] for sent in answers] == [0, 0]
        full, griffin = (streamed_tokens(sent.text()) for sent in answers)
        expected = [index >= len(full) or full[index] != token for index, token in enumerate(griffin)]
        assert marks(page) == expected
        for side, tokens in (("#full", full), ("#griffin", griffin)):
            assert 0 < len(tokens) <= 24
            assert page.locator(f"{side} .count").inner_text() == str(len(tokens))
            assert float(page.locator(f"{side} .speed").inner_text()) > 0
            assert re.fullmatch(r"\d+\.\d\d s", page.locator(f"{side} .first-token").inner_text())
        position = expected.index(True) + 1 if True in expected else len(griffin) + 1 if griffin != full else None
        line = page.locator("#difference").inner_text()
        assert line.startswith(f"First differs at token {position}" if position else f"Same {len(full)} token")
        drawn = pixels(page)
        assert len({tuple(drawn[at : at + 4]) for at in range(0, len(drawn), 4)}) > 10
        page.locator("#layer").fill(str(layer))
        said(page, "#layer-shown", rf"^{layer} \(")
        page.locator(f'#heat[aria-label*="in layer {layer} "]').wait_for()
        assert pixels(page) != drawn
        assert page.locator("#error").inner_text() == ""


def test_answers_and_picture(browser: Any, server: PageServer) -> None:
    with opened(browser, server.url) as page:
        check_answers(page)


def test_the_text_is_whole_and_is_text_alone(browser: Any, server: PageServer) -> None:
    with opened(browser, server.url) as page:
        for kind in ("Chat", "Plain text"):
            page.get_by_text(kind, exact=True).click()
            generate(page)
            for side, tokens in (("#full", FULL), ("#griffin", PRUNED)):
                text = page.locator(f"{side} .text")
                decoder = codecs.getincrementaldecoder("utf-8")()
                cut = [decoder.decode(token) for token in tokens]
                assert text.evaluate("text => [...text.children].map(e => e.textContent)") == ["The", *cut[1:]]
                assert text.text_content() == b"".join(tokens).decode().lstrip()
                assert set(text.evaluate("text => [...text.querySelectorAll('*')].map(e => e.localName)")) <= {
                    "span",
                    "mark",
                }
            assert [index for index, marked in enumerate(marks(page)) if marked] == sorted(CHANGED)
            assert page.locator("mark").all_text_contents() == [CHANGED[index].decode() for index in sorted(CHANGED)]
            said(page, "#difference", f"^First differs at token 5; {len(CHANGED)} of 24 tokens differ$")
        assert page.locator("mark.first").count() == 1
        assert page.locator("mark.first").text_content() == " water"
        line = "mark => getComputedStyle(mark).textDecorationLine"
        assert all(mark.evaluate(line) == "underline" for mark in page.locator("mark").all())
        assert page.locator("mark.break").all_text_contents() == ["\n"]
        body = server.answered()[0].body
        assert body["model"] == MODEL
        assert body["messages"] == [{"role": "user", "content": PROMPT}]
        assert (body["stream"], body["logprobs"], body["max_tokens"]) == (True, True, 128)
        body = server.answered()[2].body
        assert (body["prompt"], body["logprobs"]) == (PROMPT, 0)


def test_the_same_answer_and_one_that_ends_early(browser: Any, server: PageServer) -> None:
    with opened(browser, server.url) as page:
        page.locator("#density").fill("0.95")
        generate(page)
        said(page, "#difference", "^Same 24 tokens$")
        assert page.locator("mark").count() == 0
        page.locator("#density").fill("0.2")
        generate(page)
        said(page, "#difference", f"^First differs at token {len(answer(0.2, 99)) + 1}, where GRIFFIN's answer ends$")
        page.locator("#length").fill("3")
        page.locator("#temperature").fill("0.7")
        page.locator("#density").fill("0.5")
        generate(page)
        said(page, "#difference", "^Same 3 tokens; above temperature 0 ")
        page.locator("#length").fill("128")
        generate(page, NOTHING)
        said(
            page, "#difference", "^First differs at token 1, where the full model's answer ends; 24 of 24 tokens differ"
        )
        assert page.locator("#ratio").inner_text() == ""
        page.locator("#density").fill("0.95")
        generate(page, NOTHING)
        said(page, "#difference", "^Both answers are empty")
        assert page.locator("#difference").is_visible()
        assert page.locator(".speed").all_inner_texts() == 2 * ["\N{EN DASH}"]
        assert page.locator("#ratio").inner_text() == ""
        assert [request.body["temperature"] for request in server.answered()[:6]] == [0, 0, 0, 0, 0.7, 0.7]
        assert [request.body["griffin"]["density"] for request in server.answered()[:6]] == [1, 0.95, 1, 0.2, 1, 0.5]


def test_the_figures_move_while_it_streams(browser: Any, server: PageServer) -> None:
    server.delay_s = 0.1
    with opened(browser, server.url, reduced_motion="reduce") as page:
        page.locator("#status").evaluate(
            """status => {
                window.said = [];
                new MutationObserver(() => said.push(status.textContent)).observe(status, {childList: true});
            }"""
        )
        generate(page, until="^The full model answers$")
        said(page, "#full .count", "^[2-9]$")
        said(page, "#full .speed", r"^\d+\.\d$")
        assert page.locator("#griffin .count").inner_text() == "\N{EN DASH}"
        caret = "getComputedStyle(document.querySelector('#full .text'), '::after').animationName"
        assert page.evaluate(caret) == "none"
        said(page, "#griffin .count", "^[4-9]$")
        said(page, "#difference", "^Same [1-4] tokens so far$|^First differs at token 5; 1 of ")
        said(page, "#status", "^Done$")
        assert page.locator("#full .speed").inner_text() == "20.0"  # the server's own figure
        assert page.locator("#ratio").inner_text() == "1.48 times the full model's speed"
        assert page.evaluate("said") == ["The full model answers", "GRIFFIN answers", "Drawing the picture", "Done"]
        assert page.locator(":is([aria-live], [role=status], [role=alert]) .text").count() == 0


@pytest.mark.parametrize("order", ["turns", "together"])
def test_one_after_the_other_or_both_at_once(browser: Any, server: PageServer, order: str) -> None:
    server.delay_s = 0.02
    with opened(browser, server.url) as page:
        assert page.locator("#order").input_value() == "turns"
        page.locator("#order").select_option(order)
        assert page.locator("#sharing").is_visible() == (order == "together")
        generate(page)
        earlier, later = server.answered()
        picture = server.pictures()[0]
        assert earlier.ended is not None
        assert later.ended is not None
        assert (later.began < earlier.ended) == (order == "together")
        assert picture.began > max(earlier.ended, later.ended)
        assert (page.locator("#ratio").inner_text() == "") == (order == "together")
        assert [index for index, marked in enumerate(marks(page)) if marked] == sorted(CHANGED)


@pytest.mark.parametrize("way", ["button", "key", "together"])
def test_stop_ends_the_requests(browser: Any, server: PageServer, way: str) -> None:
    server.delay_s = 0.3
    with opened(browser, server.url) as page:
        page.locator("#order").select_option("together" if way == "together" else "turns")
        page.fill("#prompt", PROMPT)
        page.click("#generate")
        said(page, "#full .count", "^[2-9]$")
        assert page.locator("#generate").is_disabled()
        assert page.evaluate(FOCUSED) == "stop"
        if way == "button":
            page.click("#stop")
        else:
            page.keyboard.press("Escape")
        said(page, "#status", "^Stopped$")
        count = page.locator("#full .count").inner_text()
        page.wait_for_timeout(1000)  # the server sees it at the next event that it cannot send
        assert page.locator("#full .count").inner_text() == count
        requests = server.answered()
        assert len(requests) == (2 if way == "together" else 1)
        assert all(request.aborted and request.sent < len(FULL) for request in requests)
        assert server.pictures() == []
        assert page.locator("#error").inner_text() == ""
        assert page.evaluate(FOCUSED) == "generate"
        server.delay_s = 0.0
        generate(page)
        assert page.locator("#full .count").inner_text() == str(len(FULL))


def test_a_refusal_is_one_line(browser: Any, server: PageServer) -> None:
    server.refusal = (400, "density must be above 0, not <b>0</b>")
    with opened(browser, server.url, refused=True) as page:
        page.fill("#prompt", PROMPT)
        page.click("#generate")
        said(page, "[role=alert]", "^density must be above 0, not <b>0</b>$")
        assert len(server.answered()) == 1
        assert page.locator("#generate").is_enabled()
        server.refusal = None
        generate(page)
        assert page.locator("[role=alert]").inner_text() == ""


@pytest.mark.parametrize(
    ("fault", "line"),
    [("error", "^the model <b>failed</b>$"), ("drop", "^The connection .* lost"), ("end", "^The connection .* lost")],
)
def test_a_fault_amid_an_answer_is_said(browser: Any, server: PageServer, fault: str, line: str) -> None:
    server.fault, server.delay_s = fault, 0.03  # a browser may drop what came just before the connection broke
    with opened(browser, server.url, refused=True) as page:
        page.fill("#prompt", PROMPT)
        page.click("#generate")
        said(page, "[role=alert]", line)
        assert page.locator("#griffin .count").inner_text() == "2"
        said(page, "#difference", "^Same 2 tokens so far$")
        assert server.pictures() == []
        server.fault, server.delay_s = None, 0.0
        generate(page)
        said(page, "#difference", "^First differs at token 5")


def test_a_server_that_is_gone_is_said(browser: Any) -> None:
    with PageServer() as server, opened(browser, server.url, refused=True) as page:
        said(page, "#model", MODEL)
        page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
        page.fill("#prompt", PROMPT)
        page.click("#generate")
        said(page, "[role=alert]", "^The server cannot be reached")


def test_the_key_is_asked_for_and_kept_in_the_tab(browser: Any, server: PageServer) -> None:
    server.key = "open sesame"
    with opened(browser, server.url, refused=True) as page:
        said(page, "[role=alert]", "wants an API key")
        assert page.evaluate(FOCUSED) == "secret"
        assert page.locator("#secret").get_attribute("type") == "password"
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        said(page, "#model", "^No model yet$")
        page.locator("#secret").fill("open sesame")
        page.keyboard.press("Enter")
        said(page, "#model", MODEL)
        assert page.locator("#key").is_hidden()
        assert page.locator("[role=alert]").inner_text() == ""
        page.reload()
        generate(page)
        assert page.locator("#key").is_hidden()
        assert {request.headers["Authorization"] for request in server.requests} == {"Bearer open sesame"}
        assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]


def test_no_key_no_header(browser: Any, server: PageServer) -> None:
    with opened(browser, server.url) as page:
        generate(page)
        assert page.locator("#key").is_hidden()
        assert not any("Authorization" in request.headers for request in server.requests)


def test_a_model_without_chat_takes_plain_text(browser: Any, server: PageServer) -> None:
    server.chat = False
    with opened(browser, server.url) as page:
        generate(page)
        assert page.locator("input[value=chat]").is_disabled()
        assert [request.path for request in server.answered()] == 2 * ["/v1/completions"]
        assert server.pictures()[0].body["prompt"] == PROMPT


def test_by_keyboard_alone(browser: Any, server: PageServer) -> None:
    def tab_to(name: str) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            outline = "getComputedStyle(document.activeElement.matches('.segments input') ? \
                document.activeElement.nextElementSibling : document.activeElement).outlineStyle"
            assert page.evaluate(outline) == "solid", page.evaluate(FOCUSED)
            if page.evaluate(FOCUSED) == name:
                return
        pytest.fail(f"Tab does not come to {name}")

    with opened(browser, server.url) as page:
        said(page, "#model", MODEL)
        tab_to("prompt")
        page.keyboard.type("Tides are")
        tab_to("density")
        for _ in range(4):
            page.keyboard.press("ArrowLeft")
        assert page.locator("#density").get_attribute("aria-valuetext") == "30% of the FF neurons"
        assert page.locator("#density-shown").inner_text() == "30% of the FF neurons"
        page.keyboard.press("Control+Enter")
        said(page, "#status", "^Done$")
        assert server.answered()[1].body["griffin"] == {"density": 0.3}
        assert server.pictures()[0].body["layer"] == 10
        tab_to("layer")
        page.keyboard.press("ArrowRight")
        page.locator('#heat[aria-label*="in layer 11 "]').wait_for()
        tab_to("heat")
        for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowDown"):
            page.keyboard.press(key)
        said(page, "#tip", r"^token 4 “ Tides”, neuron \d+( \(expert\))?: 0\.\d{3}$")
        assert page.locator("#tip").get_attribute("aria-live") == "polite"
        tab_to("The brightest rows as a table")
        page.keyboard.press("Enter")
        assert page.locator("#rows tr").count() == 10
        assert page.locator("#tip").is_hidden()
        labels = "all => all.filter(input => !input.labels.length).map(input => input.id)"
        assert page.locator("input, select, textarea").evaluate_all(labels) == []


def test_the_picture_tells_what_is_under_the_pointer(browser: Any, server: PageServer) -> None:
    with opened(browser, server.url) as page:
        generate(page)
        page.locator("#heat").scroll_into_view_if_needed()
        box = page.locator("#heat").bounding_box()
        words = PROMPT.split()
        across, down = box["width"] / (len(words) + 5), box["height"] / 64
        page.mouse.move(box["x"] + 5.5 * across, box["y"] + 1.5 * down)  # layer 10: rows 1, 4, 7.. flock
        picture = flocking(server.pictures()[0].body)
        shades = base64.b64decode(picture["values"])
        told = [
            f"neuron {picture['neurons'][row]}{' (expert)' if row == 1 else ''}: "
            f"{picture['scale'] * (shades[row * picture['width'] + column] / 255) ** 2:.3f}"
            for row, column in ((1, 5), (63, 0))
        ]
        said(page, "#tip", rf"^token 6 “ {words[2]}”, {re.escape(told[0])}$")
        page.mouse.move(box["x"] + 0.5 * across, box["y"] + 63.5 * down)
        said(page, "#tip", rf"^token 1 “<\|im_start\|>”, {re.escape(told[1])}$")
        page.mouse.move(0, 0)
        assert page.locator("#tip").is_hidden()
        strip = pixels(page, "#experts")
        assert [alpha > 0 for alpha in strip[3::4]] == [row % 3 == 1 for row in range(64)]
        drawn = pixels(page)
        row = 4 * (len(words) + 5)
        assert sum(drawn[row : 2 * row]) > 1.5 * sum(drawn[:row])
        assert page.locator("#layer").get_attribute("max") == str(LAYERS - 1)


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 360)])
def test_looks(browser: Any, server: PageServer, scheme: str, width: int) -> None:
    options = {"viewport": {"width": width, "height": 800}, "is_mobile": width < 600, "has_touch": width < 600}
    with opened(browser, server.url, color_scheme=scheme, **options) as page:
        assert page.evaluate(OVERFLOW) == 0
        generate(page, PROMPT + " " + 90 * "w")
        page.locator("summary").click()
        page.locator("#heat").click(position={"x": page.locator("#heat").bounding_box()["width"] - 2, "y": 9})
        assert page.locator("#tip").is_visible()
        assert page.evaluate(OVERFLOW) == 0
        inside = "all => all.map(text => text.scrollWidth - text.clientWidth)"
        assert page.locator(".text").evaluate_all(inside) == [0, 0]
        full, griffin = (page.locator(side).bounding_box() for side in ("#full", "#griffin"))
        assert (griffin["y"] >= full["y"] + full["height"]) == (width < 700)
        for part, ink in (("body", "color"), ("#generate", "color"), ("mark.first", "color")):
            colours = f"part => ['backgroundColor', '{ink}'].map(name => getComputedStyle(part)[name])"
            ground, text = (luminance(colour) for colour in page.locator(part).first.evaluate(colours))
            assert (max(ground, text) + 0.05) / (min(ground, text) + 0.05) > 4.5
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (luminance(ground) < 0.1) == (scheme == "dark")


def luminance(colour: str) -> float:
    """The relative luminance of WCAG 2."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(share * value for share, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    for path in PAGE.iterdir():
        links = re.findall(r"https?://[^\s\"']+", path.read_text())
        assert links in ([], ["http://www.w3.org/2000/svg"]), path.name
    text = (PAGE / "index.html").read_text()
    assert not re.findall(r"\son\w+=|\sstyle=|<style|<script>", text)  # the server's policy refuses them
