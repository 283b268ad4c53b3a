"""`hogwild view`: the page of a trace, as HTML and in a real browser."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hogwild_ext import cli, trace, viewer
from models import tiny_model
from scripted import PROMPTS, VOCABULARY, Script, random_lines, team
from traces import HOSTILE, Line, shown, simulate, write

LAYOUTS = ("combined", "contiguous", "interleaved")


class Scripts(html.parser.HTMLParser):
    """What a browser would take for elements of a page, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += data


def page_of(lines: list[Line]) -> str:
    return viewer.page(trace.Trace(lines[0], lines[1:]))


def embedded(text: str) -> Any:
    """The lines within a page. Its numbers would be floats there, and a seed has too many digits
    for those: it is text."""
    first, *others = json.loads(Scripts(text).scripts[0])
    return [{**first, "seed": int(first["seed"])}, *others]


# ---- the file ------------------------------------------------------------------------------------


def test_the_trace_is_within_the_page_as_it_is(seed: int) -> None:
    lines = simulate(seed, words=HOSTILE)
    lines[0]["problem"] = "".join(HOSTILE) + "\ud800 {trace} {policy} </SCRIPT >"
    text = page_of(lines)
    assert embedded(text) == lines
    assert text.encode("utf-8")  # half a surrogate pair is escaped too


def test_a_seed_has_all_its_digits() -> None:
    lines = simulate(1, steps=3)
    lines[0]["seed"] = 2**63 - 1
    assert '"seed":"9223372036854775807"' in page_of(lines)


def test_no_text_of_a_model_is_markup(seed: int) -> None:
    harmless = simulate(seed, words=["a"])
    hostile = simulate(seed, words=HOSTILE)
    names = ["<script>", "</script><img src=x>", "<!--"]
    renamed = simulate(seed, names, words=HOSTILE)
    page = page_of(hostile)
    assert Scripts(page).tags == Scripts(page_of(harmless)).tags
    assert Scripts(page_of(renamed)).tags == Scripts(page).tags
    data = page.split('type="application/json" id="trace">')[1].split("</script>")[0]
    assert not set("<>&\u2028\u2029") & set(data)


def test_the_page_links_to_nothing(seed: int) -> None:
    lines = simulate(seed)
    text = page_of(lines)
    assert Scripts(text).links == ["data:,"]
    assert "@import" not in text and "url(" not in text
    assert "default-src 'none'" in text
    assert "{policy}" not in text.split("</head>")[0]


def test_what_is_unknown_is_left_out(tmp_path: Path) -> None:
    """Kinds and fields; what JSON does not have could stand there, and nesting without an end."""
    lines = simulate(1, steps=3)
    deep: Any = float("nan")
    for _ in range(300):
        deep = [deep]
    more = [{**line, "more": deep} for line in lines]
    file = write(tmp_path / "run.jsonl", [*more[:-1], {"kind": "weather", "is": deep}, more[-1]])
    assert embedded(viewer.page(trace.read(file))) == lines


def test_the_page_is_as_large_as_the_trace(tmp_path: Path) -> None:
    """It has what workers saw as the trace has it: as differences."""
    names = [f"Worker {i}" for i in range(24)]
    lines = simulate(1, names, steps=60, words=[" a"], extras=0, version=1)
    read = trace.read(write(tmp_path / "run.jsonl", lines))
    assert len(viewer.page(read)) < len(page_of(lines[:1])) + sum(
        len(json.dumps(line)) for line in read.lines
    )


def test_text_has_contrast_in_both_themes() -> None:
    template = (Path(viewer.__file__).parent / "viewer.html").read_text("utf-8")
    for theme in re.findall(r":root[^{]*\{([^}]*--w7[^}]*)\}", template):
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", theme))
        assert {f"w{i}" for i in range(8)} < colours.keys()
        for name in ("ink", "soft", *(f"w{i}" for i in range(8))):
            for background in ("page", "sheet", "lane"):
                assert contrast(colours[name], colours[background]) >= 4.5, (name, background)


def contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_writes_the_page_beside_the_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = simulate(1, steps=5)
    file = write(tmp_path / "run.jsonl", lines)
    assert cli.main(["view", str(file)]) == 0
    page = tmp_path / "run.html"
    assert embedded(page.read_text("utf-8")) == lines
    said = capsys.readouterr()
    assert said.out == ""
    assert str(page) in said.err and page.as_uri() in said.err and "5 steps" in said.err
    assert "cut off" not in said.err

    other = tmp_path / "a b.html"
    assert cli.main(["view", str(file), "-o", str(other)]) == 0
    assert other.read_bytes() == page.read_bytes()


@pytest.mark.parametrize("where", [3, 40, -1])
def test_a_trace_that_was_cut_off_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: int
) -> None:
    lines = simulate(1, steps=5)
    file = write(tmp_path / "run.jsonl", lines)
    content = file.read_bytes()
    start = content.rindex(b"\n", 0, -1) + 1  # of the last line
    file.write_bytes(content[: start + where] if where > 0 else content[:start])
    assert cli.main(["view", str(file)]) == 0
    assert embedded((tmp_path / "run.html").read_text("utf-8")) == lines[:-1]
    assert "the run was cut off, or is still going on" in capsys.readouterr().err


RUN = {
    "kind": "run", "version": 2, "hogwild_ext": "9.9", "problem": "p", "layout": "combined",
    "workers": ["Alice"], "seed": 1, "max_steps": 1, "segments": ["prompt"], "model": None,
    "bytes_per_token": 8,
}  # fmt: skip
HEADER = json.dumps(RUN).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a trace"),
        (b"hello\n", "expected a trace"),
        (b"\x89PNG\r\n\x1a\n", "expected a trace"),
        (b'{"kind": "token"}\n', "expected a trace"),
        (json.dumps({**RUN, "version": 3}).encode(), "version 1 or 2, got int 3"),
        (HEADER + b"\n{]\n{}\n", "line 2 is broken"),
        (HEADER + b"\n\xff\n{}\n", "line 2 is broken"),
        (HEADER + b'\n{"kind": "token"}', "line 2 is broken: token without paragraph, "),
        (HEADER + b'\n{"kind":"truncate", "time":1, "step":NaN, "segment":0, "length":0}', "nan"),
        (b'{"kind": "run", "version": 1}', "run without bytes_per_token"),
    ],
)  # fmt: skip
def test_what_is_no_trace_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    file = tmp_path / "run.jsonl"
    file.write_bytes(content)
    assert_error(capsys, ["view", str(file)], message)
    assert not (tmp_path / "run.html").exists()


def test_files_that_cannot_be_used_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "run.jsonl", simulate(1, steps=2))
    before = file.read_bytes()
    assert_error(capsys, ["view", str(tmp_path / "none.jsonl")], "there is no file")
    assert_error(capsys, ["view", str(tmp_path)], "expected a trace, got the folder")
    assert_error(capsys, ["view", "."], "expected a trace, got the folder .")
    assert_error(capsys, ["view", str(file), "-o", str(file)], "another file than the trace")
    nowhere = str(tmp_path / "nowhere" / "page.html")
    assert_error(capsys, ["view", str(file), "-o", nowhere], "cannot write")
    assert_error(capsys, ["view", str(file), "-o", str(tmp_path)], "cannot write")
    html_trace = write(tmp_path / "run.html", simulate(1, steps=2))
    assert_error(capsys, ["view", str(html_trace)], "another file than the trace")
    (tmp_path / "link.html").symlink_to(file)
    assert_error(capsys, ["view", str(file), "-o", str(tmp_path / "link.html")], "another file")
    assert file.read_bytes() == before


def assert_error(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("hogwild: error: ") and said.err.count("\n") == 1
    assert message in said.err


# ---- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium. It reports what pages say on the console, and what they ask for."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: .[test]")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    chromium = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        lacking = "Chromium" if chromium is None else "chromedriver"
        pytest.skip(f"{lacking} is not here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options, webdriver.chrome.service.Service(driver))
    yield started
    started.quit()


class Page:
    """An open page, as a reader uses it."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, height: int = 820) -> None:
        self.browser = browser
        self.path = path
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.prefer()
        browser.get("about:blank")
        for kind in ("browser", "performance"):
            browser.get_log(kind)
        browser.get(path.as_uri())

    def prefer(self, **features: str) -> None:
        """What the reader's system prefers."""
        wanted = {"prefers-color-scheme": "light", "prefers-reduced-motion": "no-preference"}
        wanted |= {name.replace("_", "-"): value for name, value in features.items()}
        named = [{"name": name, "value": value} for name, value in wanted.items()]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": named})

    def js(self, code: str, *values: Any) -> Any:
        return self.browser.execute_script(code, *values)

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        for key in keys:  # several in one string: the first ones are held
            chain = ActionChains(self.browser)
            for held in key[:-1]:
                chain.key_down(held)
            chain.send_keys(key[-1])
            for held in key[:-1]:
                chain.key_up(held)
            chain.perform()

    def scrub(self, step: int) -> None:
        self.js(
            "const s = document.getElementById('scrub'); s.value = arguments[0];"
            "s.dispatchEvent(new Event('input'))",
            step,
        )

    @property
    def step(self) -> int:
        return int(self.js("return document.getElementById('scrub').value"))

    @property
    def title(self) -> str:
        return str(self.js("return document.getElementById('seen-title').textContent"))

    def texts(self) -> tuple[str, list[str]]:
        """The history and the workers' columns, as far as they are not hidden."""
        history, live = self.js(
            """
            const text = (root) => [...root.querySelectorAll(".piece:not([hidden])")]
              .map((piece) => piece.textContent).join("");
            return [text(document.getElementById("history-text")),
                    [...document.querySelectorAll(".worker .scroll")].map(text)];
            """
        )
        return history, live

    def seen(self) -> str:
        """What the panel says that a writer could see."""
        return "".join(self.all(".seen-text"))

    def all(self, selector: str) -> list[str]:
        """The texts of all such elements."""
        found: list[str] = self.js(
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)",
            selector,
        )
        return found

    def problems(self) -> list[str]:
        """Messages on the console, and what was asked for other than the page itself."""
        found = [entry["message"] for entry in self.browser.get_log("browser")]
        for entry in self.browser.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                if url not in (self.path.as_uri(), "data:,", "about:blank"):
                    found.append(url)
        return found


OpenPage = Callable[..., Page]


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[OpenPage]:
    """Opens the page of a trace; before the next, or at the end, it must have complained of
    nothing."""
    pages: list[Page] = []

    def opened(lines: list[Line], **size: int) -> Page:
        assert not pages or pages[-1].problems() == []
        path = tmp_path / f"page {len(pages)}.html"
        path.write_text(page_of(lines), encoding="utf-8")
        pages.append(Page(browser, path, **size))
        return pages[-1]

    yield opened
    if pages:
        assert pages[-1].problems() == []


WORKERS = [("Alice",), ("Alice", "Bob", "Carol"), ("Zoë <b>", *(f"Worker {i}" for i in range(7)))]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("workers", WORKERS, ids=len)
def test_every_step_shows_what_the_trace_says(
    open_page: OpenPage, seed: int, layout: str, workers: tuple[str, ...]
) -> None:
    lines = simulate(seed, workers, layout, steps=50)
    page = open_page(lines)
    last = max(line["step"] for line in lines[1:])
    assert page.step == last
    steps = [*range(1, last + 1), *random.sample(range(1, last + 1), min(last, 15)), 1, last]
    for step in steps:
        page.scrub(step)
        replayed = shown(lines, step)
        assert page.texts() == (replayed.history, replayed.live), f"step {step}"
    assert page.all(".worker h2") == list(workers)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_of_the_engine_is_shown_as_it_was(
    open_page: OpenPage,
    monkeypatch: pytest.MonkeyPatch,
    one_thread: None,
    tmp_path: Path,
    seed: int,
    layout: str,
) -> None:
    names = ["A", "B", "C"]
    Script(monkeypatch, random_lines(random.Random(seed), names, 12))
    model = tiny_model("llama", vocab_size=VOCABULARY, head_dim=16)
    prompts = dataclasses.replace(PROMPTS, closing="\nNow: \\boxed{")
    one = team(model, names, layout=layout, question_every=8, prompts=prompts)
    one.run("p", 60, snapshots=[20], trace=tmp_path / "run.jsonl")
    read = trace.read(tmp_path / "run.jsonl")
    lines = [read.header, *read.lines]
    page = open_page(lines)
    for step in range(1, max(line["step"] for line in read.lines) + 1):
        page.scrub(step)
        replayed = shown(lines, step)
        assert page.texts() == (replayed.history, replayed.live), f"step {step}"
    for kind in ("question", "conclusion", "end"):
        marks = page.js(f"return document.querySelectorAll('.mark.{kind}').length")
        assert marks == sum(line["kind"] == kind for line in read.lines)
    started = sum(line["kind"] == "start" for line in read.lines)
    assert page.js("return document.querySelectorAll('.bar').length") == started
    assert_words_are_seen_as_told(page, lines)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_word_shows_what_its_writer_could_see(
    open_page: OpenPage, seed: int, layout: str
) -> None:
    lines = simulate(seed, ("Alice", "Bob", "Carol"), layout, steps=40)
    assert_words_are_seen_as_told(open_page(lines), lines)


def test_an_old_trace_is_shown_as_a_new_one(open_page: OpenPage, tmp_path: Path) -> None:
    """And differences of views as whole ones: what is read of version 1 has those."""
    workers = ("Alice", "Bob", "Carol", "Dave")
    old, new = (simulate(5, workers, steps=50, extras=0.1, version=v) for v in (1, 2))
    read = trace.read(write(tmp_path / "old.jsonl", old))
    kinds = [line["kind"] for line in read.lines]
    assert kinds.count("change") > 10 and kinds.count("view") < 10
    page = open_page([read.header, *read.lines])
    assert_words_are_seen_as_told(page, new)


def assert_words_are_seen_as_told(page: Page, lines: list[Line]) -> None:
    """Points at every word, by an event."""
    words = page.js(
        """
        const found = [];
        for (const word of document.querySelectorAll("main .token:not([hidden])")) {
          word.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
          const who = document.querySelector("#seen-title .who").textContent;
          const when = document.getElementById("seen-when").textContent;
          const texts = [...document.querySelectorAll(".seen-text")].map((e) => e.textContent);
          found.push([who, Number(/^step (\\d+),/.exec(when)[1]), texts.join("")]);
        }
        return found;
        """
    )
    told = {step: shown(lines, step).seen for step in {step for _, step, _ in words}}
    for who, step, text in words:
        assert text == told[step][who], (who, step)
    # All the words are there that are not half a character, or an end under which nothing stands.
    expected = {(e["worker"], e["step"]) for e in lines if e["kind"] == "token" and e["text"]}
    assert {(who, step) for who, step, _ in words} >= expected


def test_the_order_of_a_view_is_named(open_page: OpenPage) -> None:
    lines = simulate(1, ("Alice", "Bob"), steps=30, words=[" a"], extras=0)
    page = open_page(lines)
    page.scrub(20)
    hover_last_word(page, 0)
    names = page.all(".crumbs bdi")
    assert names == [
        "prompt", "history", "others heading", "Bob\u2019s live paragraph", "Bob: unfinished",
        "own heading", "own paragraph",
    ]  # fmt: skip
    token = next(e for e in lines if e["kind"] == "token" and e["step"] == 20)
    counts = page.all(".crumbs .count")
    replay = trace.Replay(lines[0])
    for line in lines[1 : lines.index(token) + 1]:
        replay.apply(line)
    assert [0 if count == "empty" else int(count) for count in counts] == [
        length for _, length in replay.sees("Alice")
    ]


def hover_last_word(page: Page, worker: int) -> str:
    """Moves a real pointer onto the last word that a worker has written; returns the word."""
    from selenium.webdriver import ActionChains

    word = page.js(
        "return document.querySelectorAll('.worker')[arguments[0]].querySelector('.token.fresh')",
        worker,
    )
    assert word is not None, "no word was drawn in this step"
    ActionChains(page.browser).move_to_element(word).perform()
    return str(word.get_attribute("textContent"))


def test_a_pointer_shows_and_a_click_pins(open_page: OpenPage) -> None:
    lines = simulate(1, ("Alice", "Bob"), steps=30, words=[" word"], extras=0, paragraph=0)
    page = open_page(lines)
    page.scrub(12)
    from selenium.webdriver import ActionChains, Keys

    hover_last_word(page, 1)
    assert page.title == "What Bob could see, writing ␣word"
    assert page.seen() == shown(lines, 12).seen["Bob"]
    marked = page.js("return [...document.querySelectorAll('.frontier')].map((e) => e.innerText)")
    assert len(marked) == 1  # the last that Bob had read of Alice
    ActionChains(page.browser).click().perform()
    hover_last_word(page, 0)
    assert page.title.startswith("What Bob could see")  # pinned
    page.scrub(3)
    assert page.seen() == shown(lines, 12).seen["Bob"]
    page.press(Keys.ESCAPE)
    page.scrub(12)
    hover_last_word(page, 0)
    assert page.title.startswith("What Alice could see")


def test_the_keyboard_does_it_all(open_page: OpenPage) -> None:
    from selenium.webdriver import Keys

    lines = simulate(1, ("Alice", "Bob"), steps=30, words=[" word"], extras=0, paragraph=0.1)
    page = open_page(lines)
    page.press(Keys.HOME)
    assert page.step == 1
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert page.step == 2
    page.press(Keys.SHIFT + Keys.ARROW_RIGHT)
    assert page.step == 12
    page.press(Keys.END)
    assert page.step == 30
    commits = sorted({line["step"] for line in lines if line["kind"] == "commit"})
    page.press(Keys.HOME, "n")
    assert page.step == commits[0]
    page.press("n", "p")
    assert page.step == commits[0]

    # Tab reaches exactly one word; from there the arrows go on.
    page.press(Keys.END)
    reached = []
    for _ in range(40):
        page.press(Keys.TAB)
        reached.append(page.js("return document.activeElement.className"))
        if "token" in reached[-1].split():
            break
    assert "token" in reached[-1].split(), reached
    assert page.js("return document.querySelectorAll('.token[tabindex=\"0\"]').length") == 1
    assert page.js("return document.activeElement.getAttribute('role')") == "button"
    assert page.seen() == shown(lines, 30).seen["Alice"]
    page.press(Keys.ARROW_LEFT)
    assert page.step == 30
    assert page.seen() == shown(lines, 29).seen["Alice"]
    page.press(Keys.ARROW_DOWN)
    assert page.seen() == shown(lines, 29).seen["Bob"]
    page.press(Keys.HOME)
    assert page.seen() == shown(lines, 1).seen["Bob"]
    page.press(Keys.ENTER)
    assert page.js("return document.activeElement.getAttribute('aria-pressed')") == "true"
    page.press(Keys.ESCAPE)
    assert page.js("return document.activeElement.getAttribute('aria-pressed')") == "false"
    outline = page.js("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_the_focus_stays_on_a_word_whose_paragraph_joins_the_history(open_page: OpenPage) -> None:
    lines = simulate(1, ("Alice", "Bob"), steps=40, words=[" w"], extras=0, paragraph=0.1)
    page = open_page(lines)
    commit = next(line for line in lines if line["kind"] == "commit")["step"]
    page.scrub(commit)
    page.js("document.querySelector('#history-text .token').click()")
    page.scrub(commit - 1)
    page.scrub(commit)
    assert page.js("return document.activeElement.closest('#history-text') !== null")


def test_space_plays_and_pauses(open_page: OpenPage) -> None:
    lines = simulate(1, steps=400, extras=0)
    page = open_page(lines)
    page.press(" ")  # from the end: from the beginning
    wait_for(lambda: 2 < page.step < 300)
    assert page.js("return document.getElementById('play').textContent") == "Pause"
    page.press(" ")
    stopped = page.step
    assert stopped < 400
    pause = page.js("return new Promise((done) => setTimeout(() => done(1), 300))")
    assert pause == 1 and page.step == stopped
    assert page.texts()[1] == shown(lines, stopped).live
    page.js("const s = document.getElementById('speed'); s.value = '64'")
    page.press(" ")
    wait_for(lambda: page.step == 400)
    assert page.js("return document.getElementById('play').textContent") == "Play"


def wait_for(condition: Callable[[], bool]) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(None, 20, poll_frequency=0.02).until(lambda _: condition())


def test_hostile_text_stays_text(open_page: OpenPage, seed: int) -> None:
    markup = "".join(HOSTILE)
    lines = simulate(
        seed, ("<img src=x onerror=broken=1>", "Bob"), words=HOSTILE, problem=markup, prompt=markup
    )
    lines[0]["model"] = lines[0]["layout"] = lines[-1]["answer"] = markup
    page = open_page(lines)
    page.js("document.querySelector('main .token:not([hidden])').click()")
    assert page.js("return window.broken") is None
    assert page.js("return document.querySelectorAll('img, b, i').length") == page.js(
        "return document.querySelectorAll('.now b').length"
    )
    assert page.js("return document.getElementById('problem').textContent") == markup
    assert page.js("return document.querySelector('.answer dd').textContent") == markup
    width, wide = page.js("return [innerWidth, document.documentElement.scrollWidth]")
    assert wide <= width


def test_no_trace_that_is_read_breaks_the_page(
    open_page: OpenPage, seed: int, tmp_path: Path
) -> None:
    """Traces that a run would not write, but that are consistent: the page looks at all of them
    without a complaint, which `open_page` would tell."""
    random_ = random.Random(seed)
    shown_so_far = 0
    for attempt in range(200):
        layout = random_.choice(LAYOUTS)
        lines = simulate(attempt, ("A", "B", "C"), layout, 25, words=HOSTILE, extras=0.2)
        for _ in range(random_.randint(1, 6)):
            change_lines(random_, lines)
        try:
            read = trace.read(write(tmp_path / "run.jsonl", lines))
        except ValueError:
            continue
        shown_so_far += 1
        look_at_all(open_page([read.header, *read.lines]))
        if shown_so_far == 15:
            break
    assert shown_so_far == 15


STRANGE = [
    {"kind": "start", "worker": "A", "paragraph": 10**15, "text": ""},
    {"kind": "question", "worker": "B", "paragraph": 0, "text": "?" * 1000},
    {"kind": "conclusion", "worker": "C", "text": "\ud800", "answer": "</script>"},
    {"kind": "truncate", "segment": 1, "length": 0},
    {"kind": "truncate", "segment": 4, "length": 0},
    {"kind": "commit", "worker": "A", "paragraph": 2, "segment": 9, "into": 3, "tokens": 0,
     "text": ""},
    {"kind": "change", "places": [[1, []], [2, [1]], [8, []]]},
    {"kind": "change", "places": [[0, [0, 1, 2]]]},
    {"kind": "change", "places": []},
    {"kind": "view", "worker": "A", "segments": []},
    {"kind": "view", "worker": "B", "segments": [7]},
]  # fmt: skip


def change_lines(random_: random.Random, lines: list[Line]) -> None:
    if len(lines) < 9:
        return
    at = random_.randrange(2, len(lines) - 1)
    step = next(line["step"] for line in reversed(lines[:at]) if "step" in line)
    choice = random_.random()
    if choice < 0.6:
        lines.insert(at, {"step": step, "time": 0, **random_.choice(STRANGE)})
    elif lines[at]["kind"] in ("start", "question", "conclusion", "truncate"):
        del lines[at]
    elif choice < 0.8:
        lines[at] = {**lines[at], "time": random_.choice([0, 2**53 - 1, 1e-300])}
    else:
        del lines[at:]


def look_at_all(page: Page) -> None:
    """Steps, words, marks and keys, and a while of playing."""
    page.js(
        """
        const scrub = document.getElementById("scrub");
        for (let step = 0; step <= Number(scrub.max) + 1; step++) {
          scrub.value = step;
          scrub.dispatchEvent(new Event("input"));
        }
        for (const word of document.querySelectorAll("main .token:not([hidden])")) {
          word.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
        }
        document.querySelectorAll(".mark").forEach((mark) => mark.click());
        for (const key of ["Home", "n", "n", "p", "End", "ArrowLeft", "Escape", " "]) {
          document.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
        }
        """
    )
    page.js("return new Promise((done) => setTimeout(() => done(1), 50))")


def test_no_text_leads_outside(open_page: OpenPage) -> None:
    """The policy holds even if something did become markup."""
    lines = simulate(1, steps=2)
    page = open_page(lines)
    page.js("document.body.insertAdjacentHTML('beforeend', '<img src=http://127.0.0.1:9/x.png>')")
    wait_for(lambda: any("Content Security Policy" in problem for problem in page.problems()))


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_it_fits_the_window(open_page: OpenPage, width: int, workers: int) -> None:
    names = [f"Worker {i}" for i in range(workers)]
    lines = simulate(1, names, steps=80, words=[" a", " longer", " word", "x" * 300])
    page = open_page(lines, width=width)
    page.js("document.querySelector('.worker .token:not([hidden])')?.click()")
    assert page.js("return document.documentElement.scrollWidth") <= width
    for name in ("play", "scrub", "workers", "inspector"):
        box = page.js(f"return document.getElementById('{name}').getBoundingClientRect().toJSON()")
        assert box["left"] >= 0 and box["right"] <= width and box["width"] > 20, name


def test_light_and_dark(open_page: OpenPage) -> None:
    lines = simulate(1, steps=3)
    page = open_page(lines)

    def colours() -> list[str]:
        found: list[str] = page.js(
            "return [document.body, document.querySelector('.worker h2'),"
            " document.querySelector('.sheet')].flatMap((e) => {"
            " const s = getComputedStyle(e); return [s.color, s.backgroundColor] })"
        )
        return found

    light = colours()
    page.prefer(prefers_color_scheme="dark")
    wait_for(lambda: colours()[0] != light[0])
    dark = colours()
    assert all(a != b for a, b in zip(light, dark, strict=True) if "rgba(0, 0, 0, 0)" not in (a, b))
    page.js("document.getElementById('theme').click()")
    assert colours() == light
    page.js("document.getElementById('theme').click()")
    assert colours() == dark


def test_nothing_moves_by_itself_for_those_who_prefer_that(open_page: OpenPage) -> None:
    lines = simulate(1, ("Alice", "Bob"), steps=40, words=[" w"], extras=0, paragraph=0.1)
    page = open_page(lines)
    commit = next(line for line in lines if line["kind"] == "commit")["step"]

    def animations() -> int:
        page.scrub(commit - 1)
        page.scrub(commit)
        return int(page.js("return document.getAnimations().length"))

    assert animations() > 0
    page.prefer(prefers_reduced_motion="reduce")
    assert animations() == 0


def test_the_header_and_the_counters(open_page: OpenPage) -> None:
    lines = simulate(1, ("Alice", "Bob"), steps=40, extras=0)
    page = open_page(lines)
    facts = page.js("return document.getElementById('facts').innerText.replace(/\\s+/g, ' ')")
    for expected in ("<i>12</i>", "a final answer, by Bob", "Alice, Bob", "combined", "made up"):
        assert expected in facts
    for step in (1, 17, 40):
        page.scrub(step)
        line = next(e for e in lines if e["kind"] == "step" and e["step"] == step)
        counters = page.js("return document.getElementById('counters').textContent")
        assert f"{line['encoded_tokens']:,} tokens" in counters
        assert f"{line['committed_tokens']:,} tokens" in counters
    assert page.js("return document.getElementById('notice').hidden")


def test_a_cut_trace_says_so_on_the_page(open_page: OpenPage) -> None:
    lines = simulate(1, steps=5)
    page = open_page(lines[:-1])
    assert "cut off" in page.js("return document.getElementById('notice').innerText")
    empty = open_page(lines[:1])
    assert "no step" in empty.js("return document.getElementById('notice').innerText")


def test_questions_conclusions_and_ends_have_marks(open_page: OpenPage) -> None:
    lines = simulate(3, ("Alice", "Bob", "Carol"), steps=80, extras=0.06)
    page = open_page(lines)
    for kind in ("question", "conclusion", "end"):
        events = [line for line in lines if line["kind"] == kind]
        assert events
        assert page.js(f"return document.querySelectorAll('.mark.{kind}').length") == len(events)
    question = next(line for line in lines if line["kind"] == "question")
    page.js("document.querySelector('.mark.question').click()")
    assert page.step == question["step"]
    conclusion = next(line for line in lines if line["kind"] == "conclusion")
    page.scrub(conclusion["step"])
    boxes = page.js("return document.getElementById('workers').innerText")
    assert conclusion["text"] in boxes and f"conclusion at step {conclusion['step']}" in boxes


def test_a_heading_under_which_nothing_was_written_goes_away(open_page: OpenPage) -> None:
    row = {"worker": "A", "segment": 2, "tokens": [5, 6], "text": "A:"}
    counters = {
        "encoded_tokens": 2, "committed_tokens": 0, "copied_bytes": 0, "forward_seconds": 0.1,
        "sampling_seconds": 0,
    }  # fmt: skip
    at = {"step": 1, "time": 0.1, "worker": "A"}
    named = {**at, "paragraph": 1}
    lines = [
        {**RUN, "workers": ["A"], "segments": ["prompt", "history", "A: live, one"]},
        {"kind": "step", "step": 1, "time": 0.1, "rows": [row], **counters},
        {"kind": "start", **named, "text": "A:"},
        {"kind": "view", **at, "segments": [2]},
        {"kind": "end", **named, "token": 2, "text": "", "segment": 2},
        {"kind": "truncate", "step": 1, "time": 0.1, "segment": 2, "length": 0},
        {"kind": "stop", **at, "reason": "end", "answer": None},
    ]
    page = open_page(lines)
    assert page.texts()[1] == [""] == shown(lines, 1).live
    assert page.all(".worker header p") == ["has ended"]
    assert page.all(".worker .para") == []


def test_sizes_have_three_digits(open_page: OpenPage) -> None:
    page = open_page(simulate(1, steps=2))
    sizes = {
        0: "0 B", 999: "999 B", 46_080: "46.1 kB", 999_499: "999 kB", 999_600: "1.00 MB",
        123_456_789: "123 MB", 999_999_999: "1.00 GB", 12_345_678_901: "12.3 GB",
    }  # fmt: skip
    assert page.js("return arguments[0].map(bytes)", list(sizes)) == list(sizes.values())


def test_a_step_changes_little_of_a_long_page(open_page: OpenPage) -> None:
    """What makes 2,048 steps of 3 workers smooth: a step adds its words and rebuilds nothing."""
    lines = simulate(1, ("Alice", "Bob", "Carol"), steps=2048, extras=0)
    page = open_page(lines)
    page.scrub(1800)
    changed = page.js(
        """
        const scrub = document.getElementById("scrub"), counts = [];
        const observer = new MutationObserver(() => {});
        observer.observe(document.body, {childList: true, subtree: true});
        for (let step = 1801; step <= 2000; step++) {
          scrub.value = step;
          scrub.dispatchEvent(new Event("input"));
          const nodes = observer.takeRecords().flatMap(
            (record) => [...record.addedNodes, ...record.removedNodes]);
          counts.push(nodes.length);
        }
        return counts.sort((a, b) => a - b)[100];
        """
    )
    assert 0 < changed < 40
