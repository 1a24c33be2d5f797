"""python -m orpheus.evaluate: a whole run of it with mock judges, and a person's mistakes."""

import json

import pytest
from conftest import ROOT, one_line
from test_scoring import mock_judges

import orpheus.evaluate
import orpheus.scoring
import orpheus.speakers
from orpheus.runs import SAVED_CONFIG, SAVED_REPORT
from orpheus.settings import read_settings
from orpheus.speakers import Corpus, Line, list_recorded


@pytest.fixture
def few_texts(tmp_path, monkeypatch):
    path = tmp_path / "general.txt"
    path.write_text("# numbers\nseven two\n# questions\nnine?\n")
    monkeypatch.setattr(orpheus.speakers, "TEXTS", path)


def evaluate(monkeypatch, *words):
    words = ["--max_seconds", "0.3", "--seeds", "2", *map(str, words)]
    monkeypatch.setattr("sys.argv", ["evaluate", *words])
    orpheus.evaluate.main()


def test_the_table_of_a_run(adapter, few_texts, monkeypatch, capsys):
    mos = [{"ovrl_mos": 3.0}]
    _, calls = mock_judges(monkeypatch, wer=[0.25] * 30, embed=[[1.0, 0.0]] * 30, mos=mos * 30)
    (held_out,) = json.loads((adapter / SAVED_REPORT).read_text())["held_out_texts"]
    evaluate(monkeypatch, "--model", adapter)
    results = json.loads((adapter / "evaluation/table.json").read_text())
    rows = {(row["texts"], row["speaker"]): row for row in results["rows"]}
    assert {name: row["sounds"] for name, row in rows.items()} == {
        ("held-out", "recordings"): 1,
        ("held-out", "codec"): 1,
        ("held-out", "base"): 2,
        ("held-out", "fine-tune"): 2,
        ("general", "base"): 4,
        ("general", "fine-tune"): 4,
    }
    names = ["wer", "cer", "likeness", "mos"]
    for (_, speaker), row in rows.items():
        ended = ["ended"] if speaker in ("base", "fine-tune") else []
        assert [*row["figures"]] == [*names, *ended, "pace", "silence"]
    assert len(calls["wer"]) == 14 and len(calls["embed"]) == 14 + 15  # references: 16 - 1
    table = (adapter / "evaluation/table.md").read_text()
    assert "| held-out | fine-tune | 2 | 25.0 (25.0 to 25.0) → 25.0 |" in table
    assert "Not computed: distillmos (pip install distillmos)." in table
    assert table in capsys.readouterr().out
    texts = (adapter / "evaluation/texts.txt").read_text()
    assert texts == f"{held_out}\nseven two\nnine?\n"


def test_other_models_and_wavs_and_a_table_of_texts(adapter, few_texts, tmp_path, monkeypatch):
    monkeypatch.setattr(orpheus.scoring, "find_spec", lambda name: None)
    (tmp_path / "lines.csv").write_text("file_name,text\nnumbers/001.flac,seven\n")
    (tmp_path / "numbers").symlink_to(ROOT / "data/numbers")
    wavs = tmp_path / "wavs"
    out = ["--out", tmp_path / "table"]
    words = ["--model", adapter, "--file", tmp_path / "lines.csv", *out]
    evaluate(monkeypatch, *words)
    wavs.mkdir()
    (wav, *_) = (tmp_path / "table").rglob("*.wav")
    (wavs / "001.wav").write_bytes(wav.read_bytes())
    evaluate(monkeypatch, *words, "--model", "data/demo/base", "--wavs", wavs, "--voice", "slt")
    results = json.loads((tmp_path / "table/table.json").read_text())
    found = [(row["texts"], row["speaker"], row["sounds"]) for row in results["rows"]]
    speakers = {"recordings": 1, "codec": 1, "base": 2, "fine-tune": 2, "data/demo/base": 2}
    assert found == [("given", name, n) for name, n in (speakers | {str(wavs): 1}).items()]
    assert "ended" not in results["rows"][-1]["figures"]
    assert "likeness" in results["notes"][-1]
    assert not (adapter / "evaluation").exists()


def test_recordings_codec_and_another_voice_are_rows(codec):
    clips = sorted((ROOT / "data/numbers").glob("*.flac"))[:3]
    lines = [Line("one", "held-out", clips[0]), Line("general", "numbers")]
    corpus = Corpus(others={"me": [Line("two", "held-out", clip) for clip in clips[1:]]})
    settings = read_settings("data/demo/config.json")
    speakers = list_recorded(lines, corpus, settings, codec)
    names = [(speaker.name, speaker.count) for speaker in speakers]
    assert names == [("recordings", 1), ("codec", 1), ("another voice: me", 1)]
    assert [[sound.line.text for sound in speaker.sounds] for speaker in speakers] == [
        ["one"],
        ["one"],
        ["two"],
    ]
    assert list_recorded(lines[1:], corpus, settings, codec) == []


def test_what_is_not_there_is_said(adapter, few_texts, monkeypatch, capsys):
    """A run of an older version, whose dataset is gone, with no judge, in another language."""
    monkeypatch.setattr(orpheus.scoring, "find_spec", lambda name: None)
    for name, key in ((SAVED_REPORT, "held_out_texts"), (SAVED_CONFIG, "dataset")):
        values = json.loads((adapter / name).read_text())
        values |= {"dataset": "/nowhere/at/all"} if key == "dataset" else {}
        values = {k: v for k, v in values.items() if k != "held_out_texts"}
        (adapter / name).write_text(json.dumps(values))
    evaluate(monkeypatch, "--model", adapter)
    printed = capsys.readouterr().out
    assert "The run's recordings cannot be read: /nowhere/at/all: no such folder" in printed
    assert "No recording is held out" in printed and "| general | fine-tune | 4 |" in printed
    line = one_line_of(monkeypatch, "--model", adapter, "--language", "de")
    assert "no texts to say; give some with --file" in line


def one_line_of(monkeypatch, *words):
    return one_line(orpheus.evaluate.main, monkeypatch, *words)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--model", ""], "--model is empty"),
        (["--seeds", "0"], "--seeds must be 1 or more"),
        (["--texts", "x"], "argument --texts: invalid int value: 'x'"),
        (["--best_of", "2"], "unrecognized arguments: --best_of"),
        (["--model", "tests/nothing_here"], "tests/nothing_here: no such folder"),
        (["--model", "{}", "--voice", "me"], "--voice me: "),
        (["--model", "{}", "--wavs", "{}"], "no 001.wav …, one for each line of"),
        (["--model", "{}", "--file", "none.csv"], "none.csv: cannot be read"),
    ],
)
def test_mistakes_are_one_line(words, line, adapter, monkeypatch):
    words = [str(adapter) if word == "{}" else word for word in words]
    assert line in one_line_of(monkeypatch, *words)
