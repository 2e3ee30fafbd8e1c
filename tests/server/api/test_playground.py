"""The playground: its page as the gateway serves it, and in a browser, where it does what it promises."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import openai
import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

import tiny
from reference import Model
from served import served
from serving import ENGINE, engine_environment, gateway, get_json
from trimtab_processors.pack import Pack
from trimtab_server.api.playground import page as html_of_the_page

SECONDS = 60
CLOSE = 2e-3
"""Log-probabilities of the engine and of the reference agree within this."""
PHONE = {"width": 360, "height": 740}
MARKUP = "<b>keeps</b> secrets <img src=x>"
STRENGTH = 3.0


# The page as it is served


class Blocks(HTMLParser):
    """The inline scripts and styles of a page, and what it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self.loaded: list[str] = []
        self._open: str | None = None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self._open = tag if tag in self.texts else None
        self.loaded += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        if self._open is not None:
            self.texts[self._open].append(data)

    def handle_endtag(self, tag):
        self._open = None


def policy(response) -> dict[str, str]:
    """The Content-Security-Policy, by directive."""
    parts = response.headers["content-security-policy"].split("; ")
    return dict(part.split(" ", 1) for part in parts)


def test_the_page_needs_no_key_and_what_it_asks_does(start, tmp_path):
    (tmp_path / "keys").write_text("key\n")
    client = start(api_keys_file="keys").client
    assert client.get("/").text == html_of_the_page()
    assert client.get("/").headers["content-type"] == "text/html; charset=utf-8"
    assert client.head("/").status_code == 200
    assert client.get("/v1/controls").status_code == 401


def test_the_policy_allows_what_stands_in_the_page_and_nothing_else(start):
    response = start().client.get("/")
    allowed, blocks = policy(response), Blocks(response.text)
    assert allowed["default-src"] == "'none'"
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (text,) = blocks.texts[tag]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert allowed[directive] == f"'sha256-{digest}'"
    assert allowed["connect-src"] == "'self'"
    assert allowed["frame-ancestors"] == allowed["form-action"] == allowed["base-uri"] == "'none'"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"


def test_the_page_loads_nothing_and_makes_no_markup_of_text():
    assert [place for place in Blocks(html_of_the_page()).loaded if not place.startswith("data:")] == []
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", html_of_the_page())


@pytest.mark.parametrize("models", [["m"], ["m", "n"]], ids=["one model", "two"])
def test_where_it_is_switched_off_there_is_nothing(start, models):
    """Nor does a replica answer in its place."""
    gateway = start(playground=False, models={name: {"model": "."} for name in models})
    response = gateway.client.get("/")
    assert response.status_code == 404
    assert gateway.error(response)["code"] == "not_found"
    assert "content-security-policy" not in response.headers


# In a browser


@pytest.fixture(scope="module")
def chromium():
    """The system's Chromium, without a window."""
    found = shutil.which("chromium")
    if found is None:
        missing = "there is no chromium on this machine"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        expect.set_options(timeout=SECONDS * 1000)
        browser = playwright.chromium.launch(executable_path=found, args=sandbox)
        yield browser
        browser.close()


class Tab:
    """The playground in a browser's tab."""

    def __init__(self, browser: Browser, url: str, **options) -> None:
        self._context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.page: Page = self._context.new_page()
        self.page.set_default_timeout(SECONDS * 1000)
        self.errors: list[str] = []
        self.refused: list[int] = []
        """Statuses of answers that are no success, of which the browser itself writes into the console."""
        self.sent: list[dict] = []
        """Bodies of the page's generating requests."""
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._note)
        self.page.goto(url)

    def _hear(self, message) -> None:
        status = re.match(r"Failed to load resource: .* status of (\d+)", message.text)
        if status:
            self.refused.append(int(status[1]))
        elif message.type in ("error", "warning"):
            self.errors.append(message.text)

    def _note(self, request) -> None:
        if request.method == "POST":
            self.sent.append(request.post_data_json)

    def field(self, label: str) -> Locator:
        return self.page.get_by_label(label, exact=True)

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def order(self, **fake) -> None:
        """What the fake replicas are to do."""

        def add(route: Route) -> None:
            route.continue_(post_data=json.dumps({**route.request.post_data_json, "fake": fake}))

        self.page.route("**/v1/chat/completions", add)

    def ask(self, prompt: str = "Tell me a story.", *, tokens: int = 24, models: str = "a") -> None:
        """Fill in the form, run it, and wait for the end."""
        self.page.get_by_text("More", exact=True).click()
        self.field("Max tokens").fill(str(tokens))
        for box in self.page.locator("#models input:enabled").all():
            box.set_checked(box.input_value() in models)
        self.field("Prompt").fill(prompt)
        self.run()

    def run(self) -> None:
        self.button("Run").click()
        self.finish()

    def finish(self) -> None:
        """Wait until every stream has ended."""
        expect(self.page.locator(".side").first).to_be_visible()
        expect(self.page.locator("[aria-busy=true]")).to_have_count(0)

    def side(self, model: str, which: str = "with control") -> Locator:
        return self.page.get_by_role("region", name=f"{model} {which}", exact=True)

    def text(self, model: str, which: str) -> str:
        """What stands there, without the tokens that have no text."""
        kept = "node => [...node.childNodes].filter(n => !n.classList?.contains('silent'))"
        said = self.side(model, which).locator(".text")
        return said.evaluate(f"node => ({kept})(node).map(n => n.textContent).join('')")

    def tokens(self, model: str = "a") -> Locator:
        return self.side(model).locator(".token")

    @property
    def details(self) -> Locator:
        return self.page.get_by_role("tooltip")

    def width(self) -> int:
        """How wide the page is, whatever can be seen of it."""
        return self.page.evaluate("document.documentElement.scrollWidth")

    def close(self) -> None:
        self._context.close()
        assert self.errors == []


@pytest.fixture
def open_tab(chromium):
    """Open the playground; no test may leave an error in the console."""
    tabs = []

    def open_tab(url: str, **options) -> Tab:
        tabs.append(Tab(chromium, url, **options))
        return tabs[-1]

    yield open_tab
    for tab in tabs:
        tab.close()


# Before replicas that have no model, and do as they are told


@pytest.fixture(scope="module")
def described_pack(pack, tmp_path_factory) -> Path:
    """A pack whose description looks like markup."""
    directory = tmp_path_factory.mktemp("described") / "pack"
    shutil.copytree(pack, directory)
    Pack(name="inside", strength=0.5, description=MARKUP).save(directory)
    return directory


@pytest.fixture(scope="module")
def fake(described_pack, tmp_path_factory):
    """A gateway with a model that offers a control, and one that does not."""
    models = {"m": {}, "bare": {"controls": []}}
    with served(
        tmp_path_factory.mktemp("fake"), models=models, controls={"inside": str(described_pack)}
    ) as gateway:
        yield gateway.wait_until_ready()


def test_a_wrong_key_is_said_at_its_field_and_the_right_one_stays_in_the_tab(open_tab, tmp_path):
    (tmp_path / "keys").write_text("sesame\n")
    with served(tmp_path, api_keys_file="keys") as gateway:
        tab = open_tab(gateway.wait_until_ready().url)
        expect(tab.field("API key")).to_be_focused()
        tab.field("API key").fill("open")
        tab.page.keyboard.press("Enter")
        expect(tab.page.get_by_role("alert").first).to_contain_text("not accepted: A valid API key is needed")
        expect(tab.field("API key")).to_have_attribute("aria-invalid", "true")
        tab.field("API key").fill("sesame")
        tab.button("Use this key").click()
        expect(tab.field("Prompt")).to_be_visible()
        tab.page.reload()
        expect(tab.field("Prompt")).to_be_visible()
        kept = tab.page.evaluate("[JSON.stringify(sessionStorage), localStorage.length, document.cookie]")
        assert kept == ['{"trimtab-key":"sesame"}', 0, ""]
        assert set(tab.refused) == {401}


def test_what_a_pack_says_of_itself_is_text(open_tab, fake):
    tab = open_tab(fake.url)
    expect(tab.page.locator("#about")).to_have_text(MARKUP)
    assert tab.page.locator("#about *").count() == 0


def test_the_strength_starts_at_the_packs(open_tab, fake):
    tab = open_tab(fake.url)
    expect(tab.field("Strength")).to_have_value("0.5")
    expect(tab.field("Strength, slider")).to_have_value("0.5")


def test_a_model_that_does_not_offer_the_control_cannot_be_chosen(open_tab, fake):
    tab = open_tab(fake.url)
    expect(tab.field("m")).to_be_checked()
    expect(tab.field("bare")).to_be_disabled()


def test_a_worker_that_tells_no_tokens_is_shown_without_a_tint(open_tab, fake):
    tab = open_tab(fake.url)
    tab.ask(models="m")
    assert tab.text("m", "without control") == tab.text("m", "with control") == "t0 t1 t2 "
    assert tab.tokens("m").count() == 0
    plain, steered = tab.sent
    assert plain.pop("control") is False
    assert steered.pop("control") == {"name": "inside", "strength": 0.5}
    assert plain == steered


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stop_ends_the_streams_and_the_work(open_tab, fake, way):
    tab = open_tab(fake.url)
    tab.order(pause=0.3, tokens=1000)
    before = fake.seen("m")["aborted"]
    tab.field("Prompt").fill("hi")
    tab.button("Run").click()
    for which in ("without control", "with control"):
        expect(tab.side("m", which)).to_contain_text("t1")
    tab.button("Stop").click() if way == "button" else tab.page.keyboard.press("Escape")
    expect(tab.page.locator(".state")).to_have_text(["stopped"] * 2)
    expect(tab.button("Stop")).to_be_disabled()
    fake.wait_for(lambda: fake.seen("m")["aborted"] == before + 2)


@pytest.mark.parametrize(("when", "status"), [("before", [502, 502]), ("midway", [])])
def test_an_error_is_shown_in_the_apis_own_words(open_tab, fake, when, status):
    tab = open_tab(fake.url)
    tab.order(hang_up=when)
    tab.ask(models="m")
    for fault in tab.page.locator(".side .error").all():
        expect(fault).to_contain_text("replica of 'm'")
    assert tab.refused == status


@pytest.mark.parametrize("wrong", ["", "11", "-10.5"])
def test_a_strength_that_no_control_has_is_not_sent(open_tab, fake, wrong):
    tab = open_tab(fake.url)
    tab.field("Prompt").fill("hi")
    tab.field("Strength").fill(wrong)
    tab.button("Run").click()
    assert tab.field("Strength").evaluate("node => !node.validity.valid")
    assert tab.sent == []


def test_a_strength_beyond_the_slider_stretches_it(open_tab, fake):
    tab = open_tab(fake.url)
    tab.field("Strength").fill("7.25")
    expect(tab.field("Strength, slider")).to_have_attribute("max", "10")
    assert float(tab.field("Strength, slider").input_value()) == pytest.approx(7.25, abs=0.06)


def contrast(first: list[float], second: list[float]) -> float:
    """Of two colours, as WCAG 2 defines it."""

    def luminance(colour: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def colours(tab: Tab) -> dict[str, list[float]]:
    """The page's own colours, each channel from 0 to 1."""
    names = ["page", "card", "ink", "quiet", "error", "strong", "on-strong", "focus", "more", "less"]
    read = """names => names.map(name => {
      const value = getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim();
      const node = document.createElement('i');
      node.style.color = /^[\\d ]+$/.test(value) ? `rgb(${value})` : value;
      document.body.append(node);
      return getComputedStyle(node).color.match(/\\d+/g).map(Number);
    })"""
    found = tab.page.evaluate(read, names)
    return {name: [c / 255 for c in rgb] for name, rgb in zip(names, found, strict=True)}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_either_scheme_on_the_strongest_tint_too(open_tab, fake, scheme):
    tab = open_tab(fake.url, color_scheme=scheme)
    of = colours(tab)
    assert (sum(of["page"]) > 1.5) == (scheme == "light")
    pairs = [("ink", "page"), ("ink", "card"), ("quiet", "page"), ("quiet", "card"), ("error", "card")]
    for text, ground in [*pairs, ("on-strong", "strong")]:
        assert contrast(of[text], of[ground]) >= 4.5, (text, ground)
    for tint in ("more", "less"):
        mixed = [(a + b) / 2 for a, b in zip(of[tint], of["card"], strict=True)]
        assert contrast(of["ink"], mixed) >= 4.5, tint


def test_nothing_moves_for_those_who_want_no_motion(open_tab, fake):
    tab = open_tab(fake.url, reduced_motion="reduce")
    tab.order(pause=0.5, tokens=1000)
    tab.field("Prompt").fill("hi")
    tab.button("Run").click()
    streaming = tab.side("m").locator("[aria-busy=true]")
    assert streaming.evaluate("node => getComputedStyle(node, '::after').animationName") == "none"
    tab.page.keyboard.press("Escape")


# Before real engines, whose log-probabilities are something


@pytest.fixture(scope="module")
def targets(family, tmp_path_factory) -> dict[str, Path]:
    """Two models without a token that its tokenizer lacks: at one among logprobs vLLM's front end ends."""
    directory, tokenizer = tmp_path_factory.mktemp("targets") / "c", tiny.metaspace(700, seed=2)
    tiny.save(directory, tokenizer, tiny.gpt_neox(len(tokenizer)), seed=3)
    return {"a": family.a, "c": directory}


@pytest.fixture(scope="module")
def url(family, targets, tmp_path_factory):
    """Two models and a control."""
    directory = tmp_path_factory.mktemp("playground")
    models = {
        name: {"model": str(place), "args": ENGINE, "env": engine_environment(core)}
        for core, (name, place) in enumerate(targets.items())
    }
    config = {
        "controls": {"control": str(family.control)},
        "tables": str(directory / "tables"),
        "timeouts": {
            "probe": SECONDS
        },  # what a replica says of its tables may take a while on a busy machine
    }
    with gateway(directory, {**config, "models": models}) as url:
        yield url


@pytest.fixture
def tab(open_tab, url) -> Tab:
    tab = open_tab(url)
    tab.field("Strength").fill(str(STRENGTH))
    return tab


@pytest.fixture
def api(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def said(api, model: str, control, **options):
    """What the API says to the same prompt at once: text, and tokens."""
    options = {"temperature": 0, "max_tokens": 24, **options}
    answer = api.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Tell me a story."}],
        logprobs=True,
        top_logprobs=5,
        extra_body={"control": control, "return_token_ids": True},
        **options,
    )
    return answer.choices[0], answer.prompt_token_ids


def steered(strength: float) -> dict:
    return {"name": "control", "strength": strength}


def percent(logprob: float) -> str:
    """As the page writes it."""
    share = 100 * math.exp(logprob)
    if share < 0.01:
        return "< 0.01%"
    return f"{share:.{2 if share < 1 else 1 if share < 99.95 else 0}f}%"


@pytest.mark.engine
class TestWithEngines:
    def test_every_model_answers_without_and_with_control_side_by_side(self, tab, api):
        tab.ask(models="ac")
        for model in "ac":
            for which, control in (("without control", False), ("with control", steered(STRENGTH))):
                choice, _ = said(api, model, control)
                assert tab.text(model, which) == choice.message.content.lstrip()
            expect(tab.side(model).locator(".state")).to_contain_text("control: control=3.0 · 24 tokens")
            expect(tab.side(model, "without control").locator(".state")).to_contain_text("control: off")

    def test_the_routing_may_be_chosen(self, tab, api):
        tab.page.get_by_text("More", exact=True).click()
        tab.field("Routing").select_option("path")
        tab.page.get_by_text("More", exact=True).click()
        tab.ask(models="a")
        choice, _ = said(api, "a", steered(STRENGTH) | {"routing": "path"})
        assert tab.text("a", "with control") == choice.message.content.lstrip()
        expect(tab.side("a").locator(".state")).to_contain_text("control: control=3.0;routing=path")

    @pytest.mark.parametrize("temperature", [0, 1])
    @pytest.mark.parametrize("model", ["a", "c"])
    def test_a_tint_is_how_far_the_control_moved_the_log_probability(
        self, tab, api, targets, model, temperature
    ):
        """With control as the API says, without it as the model itself, in plain transformers."""
        tab.page.get_by_text("More", exact=True).click()
        tab.field("Temperature").fill(str(temperature))
        tab.field("Seed").fill("7")
        tab.page.get_by_text("More", exact=True).click()
        tab.ask(models=model, tokens=40)
        choice, prompt = said(api, model, steered(STRENGTH), temperature=temperature, seed=7, max_tokens=40)
        after = [token.logprob for token in choice.logprobs.content]
        target = Model(targets[model])
        before = [
            float(target.logits(prompt + choice.token_ids[:i]).log_softmax(dim=0)[token])
            for i, token in enumerate(choice.token_ids)
        ]
        shown = tab.tokens(model).evaluate_all("nodes => nodes.map(node => Number(node.dataset.change))")
        assert shown == pytest.approx([a - b for a, b in zip(after, before, strict=True)], abs=CLOSE)
        strongest = max(range(len(shown)), key=lambda i: abs(shown[i]))
        way = "up" if shown[strongest] > 0 else "down"
        expect(tab.tokens(model).nth(strongest)).to_have_class(re.compile(rf"\b{way}\b"))

    def test_a_plain_text_is_completed_and_tinted_too(self, tab):
        tab.page.get_by_text("Plain text").click()
        tab.ask("Once upon a time")
        plain, controlled, looks = *tab.sent[:2], tab.sent[2:]
        assert plain["prompt"] == controlled["prompt"] == "Once upon a time"
        assert looks
        assert tab.side("a").locator(".token[data-change]").count() == tab.tokens().count() == 24

    def test_looks_at_a_long_answer_are_few(self, tab):
        tab.ask(tokens=200)
        looks = [body for body in tab.sent if "prompt_logprobs" in body]
        assert 1 <= len(looks) <= 5
        assert tab.side("a").locator(".token[data-change]").count() == tab.tokens().count()

    def test_at_another_temperature_there_is_no_tint_and_the_page_says_why(self, tab):
        tab.page.get_by_text("More", exact=True).click()
        tab.field("Temperature").fill("0.7")
        tab.page.get_by_text("More", exact=True).click()
        tab.ask()
        expect(tab.side("a").locator(".error")).to_contain_text("temperature other than 0 or 1")
        assert tab.side("a").locator(".token[data-change]").count() == 0

    def test_pointing_at_a_token_shows_what_it_was_and_what_else_could_have_been(self, tab, api):
        tab.ask()
        choice, _ = said(api, "a", steered(STRENGTH))
        third = choice.logprobs.content[2]
        tab.tokens().nth(2).hover()
        expect(tab.details).to_be_visible()
        expect(tab.details.locator(".head")).to_contain_text("→")
        for column, title in enumerate(("Without control", "With control")):
            of = tab.details.locator(".lists > div").nth(column)
            expect(of.locator("h3")).to_have_text(title)
            expect(of.locator("li")).to_have_count(5)
        shares = tab.details.locator(".lists > div").nth(1).locator("li span:last-child").all_inner_texts()
        assert shares == [percent(each.logprob) for each in third.top_logprobs]
        tab.page.mouse.move(1, 1)
        expect(tab.details).to_be_hidden()

    def test_a_tap_does_the_same_on_a_phone_and_nothing_is_wider_than_it(self, open_tab, url):
        tab = open_tab(url, viewport=PHONE, has_touch=True)
        assert tab.width() == PHONE["width"]
        tab.ask("x" * 90, models="ac")
        tab.tokens().first.tap()
        expect(tab.details).to_be_visible()
        box = tab.details.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= PHONE["width"]
        assert tab.width() == PHONE["width"]
        tab.page.locator("h1").tap()
        expect(tab.details).to_be_hidden()

    def test_a_keyboard_is_enough(self, tab):
        keys = tab.page.keyboard
        tab.field("Prompt").focus()
        keys.type("Tell me a story.")
        keys.press("Control+Enter")
        tab.finish()
        for _ in range(20):
            if tab.page.evaluate("document.activeElement.classList.contains('token')"):
                break
            keys.press("Tab")
            ringed = "document.activeElement.closest('label') ?? document.activeElement"
            assert tab.page.evaluate(f"getComputedStyle({ringed}).outlineStyle") != "none"
        first, second, last = tab.tokens().first, tab.tokens().nth(1), tab.tokens().last
        expect(first).to_be_focused()
        expect(first).to_have_attribute("aria-describedby", "details")
        expect(tab.details).to_be_visible()
        keys.press("ArrowRight")
        expect(second).to_be_focused()
        keys.press("End")
        expect(last).to_be_focused()
        keys.press("ArrowUp")
        expect(last).not_to_be_focused()
        keys.press("Home")
        expect(first).to_be_focused()
        keys.press("Escape")
        expect(tab.details).to_be_hidden()
        expect(first).to_be_focused()

    def test_moving_the_slider_runs_the_controlled_side_again_and_no_other(self, tab, api):
        tab.ask()
        plain = tab.text("a", "without control")
        tab.sent.clear()
        tab.field("Strength, slider").focus()
        tab.page.keyboard.press("ArrowLeft")
        expect(tab.field("Strength")).to_have_value("2.9")
        expect(tab.side("a").locator(".state")).to_contain_text("control=2.9 · 24 tokens")
        asked = [body["control"] for body in tab.sent if "prompt_logprobs" not in body]
        assert asked == [steered(2.9)]
        assert tab.text("a", "with control") == said(api, "a", steered(2.9))[0].message.content.lstrip()
        assert tab.text("a", "without control") == plain

    def test_the_table_between_model_and_control_is_shown_in_shares(self, tab, url):
        mappings = get_json(f"{url}/v1/controls")["data"][0]["mappings"]
        tab.ask(models="ac")
        for model, mapping in mappings.items():
            counts = {kind: mapping[kind] for kind in ("exact", "prefix", "extension", "role", "none")}
            of = tab.page.get_by_role("region", name=f"How {model}'s tokens are mapped")
            expected = [f"{100 * n / sum(counts.values()):.1f}%" for n in counts.values() if n]
            expect(of.locator("b")).to_have_text(expected)
            widths = of.locator(".bar i").evaluate_all("ns => ns.map(n => n.getBoundingClientRect().width)")
            shares = [n / sum(counts.values()) for n in counts.values() if n]
            assert [width / sum(widths) for width in widths] == pytest.approx(shares, abs=0.01)

    def test_an_error_of_the_engine_is_shown_on_both_sides(self, tab):
        tab.ask("long " * 400)
        for fault in tab.page.locator(".side .error").all():
            expect(fault).to_contain_text("maximum context length")
        assert {*tab.refused} == {400}
