"""python -m orpheus.evaluate: figures against plain accounts, the page in a browser, mistakes."""

import base64
import dataclasses
import io
import json
import os
import shutil
import subprocess
import threading
import time

import numpy as np
import pytest
import soundfile
from clip_folders import folder_of, noise
from conftest import change, one_line

import orpheus.evaluate
import orpheus.scoring
from orpheus.audio import read_audio
from orpheus.evaluate import Line, Sound, bootstrap, general_texts, make_table, read_corpus, spread
from orpheus.runs import SAVED_CONFIG, SAVED_REPORT
from orpheus.voice import load_voice

TEXTS = ["one", "two three", "one", "four five six", "two three"]


def evaluate(monkeypatch, *words):
    """Run the command with texts of 0.3 s; return what is in its page."""
    words = ["--max_seconds", "0.3", "--temperature", "5", *map(str, words)]
    monkeypatch.setattr("sys.argv", ["evaluate", *words])
    orpheus.evaluate.main()


def read_page(path):
    page = path.read_text().split('id="data">')[1].split("</script>")[0]
    return json.loads(page)


@pytest.fixture
def few_texts(tmp_path, monkeypatch):
    path = tmp_path / "general.txt"
    path.write_text("# numbers\nseven two\n# questions\nnine?\n")
    monkeypatch.setattr(orpheus.evaluate, "TEXTS", path)


@pytest.fixture
def no_judges(monkeypatch):
    monkeypatch.setattr(orpheus.scoring, "find_spec", lambda name: None)


# ---------------------------------------------------------------- figures


def test_the_bootstrap_equals_a_loop_over_drawn_texts():
    """Against lists in Python: whole texts are drawn, each with the values of all its seeds."""
    values, weights = np.array([0.0, 0.5, 0.25, 1.0, 0.75]), np.array([1.0, 2.0, 1.0, 3.0, 2.0])
    texts, means = sorted(set(TEXTS)), []
    for drawn in np.random.default_rng(0).integers(3, size=(2000, 3)):
        sounds = [n for t in drawn for n, text in enumerate(TEXTS) if text == texts[t]]
        total = sum(weights[n] * values[n] for n in sounds)
        means.append(total / sum(weights[n] for n in sounds))
    mean, low, high = bootstrap(values, weights, TEXTS)
    assert mean == pytest.approx((0 + 1 + 0.25 + 3 + 1.5) / 9)
    assert [low, high] == pytest.approx([np.quantile(means, 0.025), np.quantile(means, 0.975)])
    assert low < mean < high


def test_the_interval_of_means_of_normal_values_is_the_textbook_one():
    values = np.random.default_rng(1).normal(3, 2, 400)
    mean, low, high = bootstrap(values, np.ones(400), [str(n) for n in range(400)])
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert [low, high] == pytest.approx([mean - half, mean + half], abs=0.1 * half)


def test_more_seeds_of_the_same_sounds_do_not_narrow_the_interval():
    values, texts = np.random.default_rng(2).random(20), [str(n) for n in range(20)]
    once = bootstrap(values, np.ones(20), texts)
    assert bootstrap(np.tile(values, 3), np.ones(60), texts * 3) == pytest.approx(once)


def sound(speaker, text, kind="held-out", **scores):
    return Sound(speaker, Line(text, kind), np.zeros(2048, "f4"), scores=scores)


def test_the_table_weighs_words_and_leaves_out_scores_that_nobody_has():
    sounds = [
        sound("tuned", "what is it", "general", wer=0.2, ended=1.0),
        sound("codec", "a b", wer=0.1),
        sound("tuned", "one", wer=1.0, ended=1.0),
        sound("tuned", "two three <sigh> four", wer=0.0, ended=0.0),
    ]
    table = make_table(sounds)
    assert table[0] == ["texts", "speaker", "sounds", "word errors, %", "ended, %"]
    assert table[1] == ["held-out", "codec", "1", "10.0 (10.0 to 10.0)", ""]
    assert table[2][:3] == ["held-out", "tuned", "2"]
    assert table[2][3].startswith("25.0 (") and table[2][4].startswith("50 (")
    assert table[3][:3] == ["general", "tuned", "1"]


# ---------------------------------------------------------------- texts


def test_general_texts_have_every_tag_of_the_corpus():
    lines = general_texts({"<laugh>", "<hum>"})
    assert len({line.text for line in lines}) == len(lines) > 20
    assert [line.text for line in lines if "<hum>" in line.text] == [lines[-1].text]
    assert sum("<laugh>" in line.text for line in lines) == 1
    assert not any(digit in line.text for line in lines for digit in "0123456789#")


def test_a_selection_is_spread():
    assert spread([1, 2], 3) == [1, 2]
    assert spread(list(range(10)), 3) == [0, 3, 6]


def test_the_corpus_of_a_run(adapter, tmp_path):
    """Two voices, a held-out text, and clips that were left out."""
    texts = ["seven", "two <hum> four", "nine", "one", "four", "six"]
    voices = ["slt", "slt", "rms", "slt", "slt", "slt"]
    for n in range(5):
        noise(tmp_path / f"{n}.wav", seed=n)
    names = [f"{n}.wav" for n in range(6)]  # the last does not exist, and was left out for it
    folder_of(tmp_path, zip(names, texts, voices, strict=True))
    change(adapter / SAVED_CONFIG, dataset=str(tmp_path))
    left_out = {"left_out": ["metadata.csv row 7: 5.wav does not exist"]}
    left_out |= {"dropped": ["metadata.csv row 5: 9,999 tokens, 99.0 s"]}
    change(adapter / SAVED_REPORT, held_out_texts=["two <hum> four", "six"], **left_out)
    corpus = read_corpus(load_voice(adapter))
    assert corpus.held_out == [Line("two <hum> four", "held-out", tmp_path / "1.wav")]
    assert corpus.references == [tmp_path / "0.wav", tmp_path / "4.wav"]
    assert corpus.others == [("rms", Line("nine", "held-out", tmp_path / "2.wav"))]
    assert corpus.tags == {"<hum>"}


# ---------------------------------------------------------------- whole pages


def test_the_page_of_a_run(adapter, few_texts, no_judges, monkeypatch, capsys):
    (held_out,) = json.loads((adapter / SAVED_REPORT).read_text())["held_out_texts"]
    evaluate(monkeypatch, "--model", adapter, "--seeds", "2")
    page, printed = read_page(adapter / "evaluation.html"), capsys.readouterr().out
    assert [row[:3] for row in page["table"][1:]] == [
        ["held-out", "recordings", "1"],
        ["held-out", "codec", "1"],
        ["held-out", "base", "2"],
        ["held-out", "fine-tune", "2"],
        ["general", "base", "4"],
        ["general", "fine-tune", "4"],
    ]
    assert page["table"][0][3:] == ["ended, %", "pace", "silence, s"]
    assert "Not scored: word errors (pip install faster-whisper jiwer)" in printed
    assert "| held-out | fine-tune | 2 | " in printed and "evaluation.html" in printed
    assert [line["text"] for line in page["lines"]] == [held_out, "seven two", "nine?"]
    assert [cell["name"] for cell in page["lines"][1]["cells"]] == ["base", "fine-tune"]
    voice = load_voice(adapter, max_seconds=0.3, temperature=5.0)
    spoken = {"fine-tune": voice.say("nine?")}
    base = load_voice("data/demo/base", codec="data/demo/codec", voice=voice.name)
    base.model.float()  # as in training
    spoken["base"] = dataclasses.replace(base, settings=voice.settings).say("nine?")
    for cell in page["lines"][2]["cells"]:
        raw = base64.b64decode(cell["audio"].partition(",")[2])
        audio, rate = soundfile.read(io.BytesIO(raw), dtype="float32")
        assert rate == 24_000
        assert np.abs(audio - spoken[cell["name"]]).max() < 1e-4  # 16 bits


def test_other_models_and_a_table_of_texts(adapter, no_judges, tmp_path, monkeypatch):
    rows = [("a.wav", '<script>alert(1)</script> & "seven"'), ("b.wav", "two")]
    for name, _ in rows:
        soundfile.write(tmp_path / name, np.sin(np.arange(12_000) / 20), 24_000)
    folder_of(tmp_path, rows)
    out = tmp_path / "page.html"
    words = ["--model", adapter, "--model", "data/demo/base", "--voice", "slt", "--out", out]
    evaluate(monkeypatch, *words, "--file", tmp_path / "metadata.csv", "--seeds", "1")
    found = [row[:3] for row in read_page(out)["table"][1:]]
    speakers = ["recordings", "codec", "base", "fine-tune", "data/demo/base"]
    assert found == [["given", name, "2"] for name in speakers]
    assert "<script>alert" not in out.read_text() and not (adapter / "evaluation.html").exists()


def test_what_is_not_there_is_said(adapter, few_texts, no_judges, monkeypatch, capsys):
    change(adapter / SAVED_CONFIG, dataset="/nowhere/at/all")
    evaluate(monkeypatch, "--model", adapter, "--seeds", "1")
    printed = capsys.readouterr().out
    assert "The run's recordings cannot be read: /nowhere/at/all: no such folder" in printed
    assert "No recording was held out" in printed and "| general | fine-tune | 2 |" in printed
    line = one_line_of(monkeypatch, "--model", adapter, "--language", "de")
    assert "no texts in the language 'de' to say: give some with --file" in line


def one_line_of(monkeypatch, *words):
    return one_line(orpheus.evaluate.main, monkeypatch, *words)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--texts", "x"], "--texts"),
        (["--model", "tests/nothing_here"], "tests/nothing_here: no such folder"),
        (["--model", "{}", "--voice", "me"], "me: "),
        (["--model", "{}", "--file", "none.csv"], "none.csv"),
    ],
)
def test_mistakes_are_one_line(words, line, adapter, no_judges, monkeypatch):
    words = [str(adapter) if word == "{}" else word for word in words]
    assert line in one_line_of(monkeypatch, *words)


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
FLAGS += " --disable-background-networking --disable-component-update"
FLAGS += " --autoplay-policy=no-user-gesture-required --remote-debugging-pipe"
LOADED = "document.readyState === 'complete' && document.querySelectorAll('audio').length"
PLAY = """(async () => {
  for (const button of document.querySelectorAll("figcaption button")) button.click();
  const played = [];
  for (const audio of document.querySelectorAll("audio")) {
    if (!audio.readyState) await new Promise((known) => (audio.onloadedmetadata = known));
    played.push(audio.duration);
  }
  const texts = (tag) => [...document.querySelectorAll(tag)].map((e) => e.textContent);
  return { played, lines: texts("h2"), names: texts("figcaption"), cells: texts("td") };
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
    watchdog = threading.Timer(60, browser.kill)
    watchdog.start()
    replies = os.fdopen(our_in, "rb", buffering=0)

    def ask(method, session=None, **parameters):
        message = {"id": 1, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        os.write(our_out, json.dumps(message).encode() + b"\0")
        while True:
            raw = b""
            while not raw.endswith(b"\0"):
                raw += replies.read(1) or pytest.fail("the browser has ended")
            if "id" in (reply := json.loads(raw[:-1])):
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
        watchdog.cancel()
        browser.kill()
        browser.wait()
        os.close(our_out), replies.close()


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here (apt-get install chromium)")
@pytest.mark.parametrize("blind", [False, True])
def test_the_page_plays_in_a_browser(tmp_path, blind):
    hostile = '<script>alert(1)</script> & "seven" </section>'
    sounds = [sound(name, text, wer=0.5) for text in (hostile, "two") for name in ("a", "b")]
    html = orpheus.evaluate.make_page("A voice", sounds, ["A note."], blind)
    (tmp_path / "page.html").write_text(html)
    url = (tmp_path / "page.html").as_uri()
    assert ("held-out" in in_browser(tmp_path, url, "document.body.innerText")) != blind
    seen = in_browser(tmp_path, url, PLAY)
    assert seen["lines"] == [hostile, "two"]
    assert seen["played"] == pytest.approx([2048 / 24_000] * 4, abs=1e-3)
    assert sorted(seen["names"]) == ["a", "a", "b", "b"]
    assert seen["cells"][:3] == ["held-out", "a", "2"]


def test_audio_in_the_page_is_what_was_spoken():
    audio = np.random.default_rng(0).uniform(-1, 1, 3000).astype("f4")
    raw = base64.b64decode(orpheus.evaluate.encode_flac(audio).partition(",")[2])
    assert np.abs(read_audio(raw)[0] - audio).max() < 1e-4
