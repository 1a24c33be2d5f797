"""The listening page: in a browser, as data, and the mistakes of its command line."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
from conftest import one_line

import orpheus.page
import orpheus.run_info
import orpheus.scoring

SHORT = ["--codec", "data/demo/codec", "--max_seconds", "0.9"]


@pytest.fixture
def listening_page(tmp_path, monkeypatch):
    """page(*words): index.html of two lines, one of them hostile, with recordings."""
    text = '<script>alert(1)</script> & "seven" </section>'
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, np.sin(np.arange(12_000) / 20), 24_000)
    rows = f'file_name,text\na.wav,"{text.replace(chr(34), chr(34) * 2)}"\nb.wav,two\n'
    (tmp_path / "lines.csv").write_text(rows)

    def page(*words):
        words = [tmp_path / "lines.csv", "--out", tmp_path / "page", "--score", *SHORT, *words]
        monkeypatch.setattr(sys, "argv", ["page", *map(str, words)])
        orpheus.page.main()
        return text, (tmp_path / "page/index.html").read_text()

    monkeypatch.setattr(orpheus.scoring, "find_spec", lambda name: None)
    return page


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
FLAGS += " --disable-background-networking --disable-component-update"
FLAGS += " --autoplay-policy=no-user-gesture-required --remote-debugging-pipe"
LOADED = "document.readyState === 'complete' && document.querySelectorAll('audio').length"
PLAY = """(async () => {
  for (const button of document.querySelectorAll("figcaption button")) button.click();
  const played = [];
  for (const audio of document.querySelectorAll("audio")) {
    await audio.play();
    await new Promise((resolve) => (audio.onended = resolve));
    played.push([audio.duration, audio.currentTime]);
  }
  const texts = (tag) => [...document.querySelectorAll(tag)].map((e) => e.textContent);
  const images = [...document.images].map((image) => image.naturalHeight);
  return { played, images, lines: texts("h2"), names: texts("figcaption"), scores: texts("p") };
})()"""


def in_browser(folder, url, expression):
    """What JavaScript answers on a page in headless Chromium, asked through its debugging pipe."""
    (their_in, our_out), (our_in, their_out) = os.pipe(), os.pipe()
    flags = f"{FLAGS} --user-data-dir={folder / 'profile'} {url}"
    command = f"exec {CHROMIUM} {flags} 3<&{their_in} 4>&{their_out}"
    browser = subprocess.Popen(
        ["bash", "-c", command], pass_fds=(their_in, their_out), stderr=subprocess.DEVNULL
    )
    os.close(their_in), os.close(their_out)
    replies = os.fdopen(our_in, "rb", buffering=0)

    def ask(method, session=None, **parameters):
        message = {"id": 1, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        os.write(our_out, json.dumps(message).encode() + b"\0")
        while True:
            raw = b"".join(iter(lambda: replies.read(1), b"\0"))
            if "id" in (reply := json.loads(raw)):
                return reply.get("result", {})

    try:
        pages = []
        while not pages:
            pages = [t for t in ask("Target.getTargets")["targetInfos"] if t["url"] == url]
        found = pages[0]["targetId"]
        session = ask("Target.attachToTarget", targetId=found, flatten=True)["sessionId"]
        asked = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        loaded = asked | {"expression": LOADED}
        while not ask("Runtime.evaluate", session, **loaded).get("result", {}).get("value"):
            time.sleep(0.2)
        return ask("Runtime.evaluate", session, **asked)["result"]["value"]
    finally:
        browser.kill()
        browser.wait()
        os.close(our_out), replies.close()


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here (apt-get install chromium)")
@pytest.mark.parametrize("blind", [False, True])
def test_a_page_plays_in_a_browser(tmp_path, listening_page, blind):
    text, _ = listening_page("--model", "data/demo/base", *["--blind"] * blind)
    url = (tmp_path / "page/index.html").as_uri()
    before = in_browser(tmp_path, url, "document.body.innerText")
    assert ("recording" not in before) == blind and ("silence" not in before) == blind
    seen = in_browser(tmp_path, url, PLAY)
    assert seen["images"] == [80] * 4
    assert all(length == at > 0 for length, at in seen["played"]), seen
    assert len(seen["played"]) == 4 and [0.5, 0.5] in seen["played"]
    assert seen["lines"] == [text, "two"]
    assert sorted(seen["names"]) == ["data/demo/base"] * 2 + ["recording"] * 2
    assert sum(words.startswith("silence 0.") for words in seen["scores"]) == 4


def test_a_page_holds_all_and_no_text_is_markup(tmp_path, listening_page):
    text, page = listening_page("--model", "data/demo/base", "--model", "data/demo/base/")
    assert "<script>alert" not in page and "https://" not in page
    data = json.loads(re.search(r'id="page">(.*?)</script>', page, re.S)[1])
    assert data["lines"][0]["text"] == text
    assert data["columns"] == ["recording", "data/demo/base", "data/demo/base/"]
    cells = data["lines"][1]["cells"]
    wav = base64.b64decode(cells[0]["audio"].removeprefix("data:audio/wav;base64,"))
    assert soundfile.info(io.BytesIO(wav)).frames == 12_000
    assert cells[1]["audio"] == cells[2]["audio"] and cells[1]["scores"].startswith("silence")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "the following arguments are required: FILE"),
        ([""], "--file is empty"),
        (["{}", "--out", ""], "--out is empty"),
        (["{}", "--model", " "], "--model is empty"),
        (["{}", "--whisper", "base"], "--whisper needs --score"),
        (["{}", "--stream"], "unrecognized arguments: --stream"),
        (["{}", "--config", "none.json"], "none.json: cannot be read"),
        (["{}", "--model", "tests/nothing_here"], "tests/nothing_here: no such folder"),
        (["none.txt"], "none.txt: cannot be read"),
        (["lines.jsonl"], "lines.jsonl: give a metadata.csv"),
    ],
)
def test_mistakes_of_the_page_are_one_line(words, line, tmp_path, monkeypatch):
    lines = tmp_path / "lines.txt"
    lines.write_text("hi\n")
    words = ["--out", tmp_path / "page", *(str(lines) if word == "{}" else word for word in words)]
    assert line in one_line(orpheus.page.main, monkeypatch, *words)
    assert not list(tmp_path.glob("page/*"))


def test_a_page_that_cannot_be_written_is_reported_before_speaking(tmp_path, monkeypatch):
    monkeypatch.setattr(orpheus.run_info, "load_run", lambda info: pytest.fail("loaded"))
    (tmp_path / "file").write_text("")
    (tmp_path / "lines.txt").write_text("hi\n")
    words = [tmp_path / "lines.txt", "--model", "data/demo/base", *SHORT]
    line = one_line(orpheus.page.main, monkeypatch, *words, "--out", tmp_path / "file/page")
    assert "file/page/index.html: cannot be written" in line
