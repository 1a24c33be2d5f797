"""orpheus/doctor.py: findings, what is printed, the picture, the verdict."""

import json
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from clip_folders import folder_of, noise, rows_of, settings
from conftest import ROOT

from orpheus.audio import Sound
from orpheus.clips import read_clips
from orpheus.doctor import (
    COLUMNS,
    FINDINGS,
    MeasuredClips,
    Report,
    draw_report,
    find_markup,
    give_verdict,
    warn_of_few_clips,
    what_is_meant,
)
from orpheus.rows import make_rows
from orpheus.settings import UserError, read_settings


def test_the_doctor_finds_what_is_planted(tmp_path, tokenizer):
    """One clip of every finding among forty sound ones; nothing is found in those."""
    draw = np.random.default_rng(0)

    def clip(name, seconds=1.5, level=0.1, text="one two three four five", **how):
        rate, channels = how.pop("rate", 24_000), how.pop("channels", 1)
        audio = draw.normal(0, level, (int(seconds * rate), channels)) + how.pop("offset", 0)
        audio = np.pad(audio, ((0, int(how.pop("tail", 0) * rate)), (0, 0)))
        soundfile.write(tmp_path / name, np.clip(audio, -1, 1), rate)
        rows.append((name, text, "me"))

    rows = []
    for n in range(40):
        text = " ".join(draw.permutation(["one", "two", "three", "four", "five"])) + " a" * n
        clip(f"{n:02}.wav", seconds=len(text) / 15 * draw.uniform(0.9, 1.1), text=text)
    clip("short.wav", 0.3, text="hi there")
    clip("long.wav", 21, text="a long one " * 28)
    clip("silence.wav", tail=2, text="now wait for it to end")
    clip("clipped.wav", level=0.9, text="this one is too loud by far")
    clip("quiet.wav", level=0.005, text="this one can hardly be heard")
    clip("offset.wav", offset=0.1, text="this one is not in the middle")
    clip("no_highs.wav", rate=22_050, text="this one lacks its highest tones")
    clip("narrow.wav", rate=11_025, text="this one is a telephone line")
    clip("narrower.wav", rate=8_000, text="this one is an older telephone")
    clip("stereo.wav", channels=2, text="this one has two channels")
    clip("cancelling.wav", channels=2, text="these two channels are opposed")
    sound, rate = soundfile.read(tmp_path / "cancelling.wav")
    soundfile.write(tmp_path / "cancelling.wav", np.stack([sound[:, 0], -sound[:, 0]], 1), rate)
    clip("digits.wav", text="this one costs 99 cents at most")
    clip("markup.wav", text="this one ends with a laugh (laughs)")
    clip("link.wav", text="see https://example.org for more")
    clip("pace.wav", 0.6, text="a text that is much longer than what is spoken " * 3)
    clip("same_text.wav", text=rows[0][1], seconds=len(rows[0][1]) / 15)
    (tmp_path / "same_sound.wav").write_bytes((tmp_path / "07.wav").read_bytes())
    rows.append(("same_sound.wav", rows[7][1] + "!", "me"))
    clip("rare_tag.wav", text="this one ends with a laugh <laugh>")
    clip("alphabet.wav", text="and this one is named საქართველო")
    for n in range(10):
        clip(f"{40 + n}.wav", text=f"this one <sigh> is the same as {'x' * n}")
    folder_of(tmp_path, rows)
    _, report = rows_of(tmp_path, tokenizer, max_length=4000)
    assert report.tags == {"<sigh>": 10, "<laugh>": 1}
    assert report.pieces == dict.fromkeys("აევთლორსქ", 3)
    named = {
        name: [rows[int(re.search(r"row (\d+):", clip)[1]) - 2][0][:-4] for clip in clips]
        for name, clips in report.findings.items()
    }
    assert set(named) == set(FINDINGS)
    assert named["narrow"] == ["narrower", "narrow"]  # the worst comes first
    assert report.findings["markup"][0].endswith(": (laughs) → <laugh>")
    assert report.prompts[0].startswith("<custom_token_3><|begin_of_text|>me: ")
    for name, clips in named.items():
        assert {"unspeakable": "link", "loudness": "quiet"}.get(name, name) in clips, (name, clips)
        sound = [clip for clip in clips if clip.isdigit()]
        assert not sound, (name, sound)
    _, report = rows_of(tmp_path, tokenizer, max_length=4000, leave_out='["pace", "long"]')
    assert len(report.measures) == len(rows) - len(set(named["pace"]) | set(named["long"]))
    with pytest.raises(UserError, match=r"no finding is named 'pase'; there are .*, pace,"):
        rows_of(tmp_path, tokenizer, leave_out='["pase"]')


def test_the_console(tmp_path, tokenizer, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n in range(6):
        noise(tmp_path / f"{n}.wav", 1.0, rate=22_050, seed=n)
    soundfile.write(tmp_path / "4.wav", np.zeros(9999), 24_000)
    noise(tmp_path / "long.wav", 3.0)
    names = [f"{n}.wav" for n in range(6)] + ["long.wav"]
    folder_of(tmp_path, [(name, f"text {name} 1 <sigh> —", "anna") for name in names])
    root = ROOT
    config = {"codec": root / "data/demo/codec", "max_length": 200, "output_dir": "out"}
    overrides = {"dataset": ".", "cache_dir": "null", **{k: str(v) for k, v in config.items()}}
    chosen = read_settings(root / "data/demo/config.json", overrides)
    *_, report = make_rows(read_clips(chosen), chosen, tokenizer)
    report.print_summary(chosen)
    lines = capsys.readouterr().out.splitlines()
    counts = "5 of 7 clips, 0.1 min, voice anna; 2 left out (1 silent, 1 too long)"
    assert lines[0] == f"data     .: {counts}: out/data_report.json"
    assert [line.split()[1] for line in lines[1:]] == ["digits,", "rare_tag,", "alphabet,"]
    report.print_summary(chosen, full=True)
    printed = capsys.readouterr().out
    assert "rows     " in printed and "batches  " in printed and "no_highs" in printed
    assert "tags     <sigh> 5\n" in printed and "pieces   — 3\n" in printed
    assert "silent throughout" in printed and "find a better source" not in printed
    report.save(tmp_path / "out")
    saved = json.loads((tmp_path / "out/data_report.json").read_text())
    assert saved["reasons"] == {"silent": 1, "too long": 1} and "split" not in saved


def test_a_share_that_is_kept_is_printed_only_if_it_is_less_than_all(capsys):
    report = Report("x", measures=measured([one("a", "", "t")]))
    report.lengths = [100] * 50
    report.print_rows(settings("x"))
    assert "99 %" not in capsys.readouterr().out
    report.lengths = [100] * 199 + [500]
    report.print_rows(settings("x"))
    assert "max_length 100 would keep 99 %" in capsys.readouterr().out


def test_a_picture_of_a_voice_that_looks_like_a_formula(tmp_path):
    measures = [one("a", "$\\frac$", "text", sound=Sound(seconds=1.0))]
    report = Report("a$b$_^", measures=measured(measures))
    draw_report(report, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size


def test_the_summary_counts_clips_without_a_voice_name():
    clips = [
        one("a", "tom", "one"),
        one("b", "", "two"),
        one("c", "tom", "six"),
    ]
    report = Report("x", clips=3, measures=measured(clips))
    assert report.summary().endswith(", voice tom, 1 without a voice name")
    report.measures = measured(clips[::2])
    assert report.summary().endswith(", voice tom")


SOURCE = "(Orpheus's README: good results from about 50 of a voice, the best from 300)"


def one(source, voice, text, sound=Sound()):  # noqa: B008
    return SimpleNamespace(source=source, voice=voice, text=text, sound=sound)


def measured(measures):
    """The measures of clips as make_rows hands them to the report."""
    rows = [{"tokens": 0} | vars(clip) | clip.sound._asdict() for clip in measures]
    return MeasuredClips(pa.Table.from_pylist(rows, pa.schema(COLUMNS)))


def report_of(steps=20, **clips):
    """A report on clips of six seconds, so many of each voice."""
    names = [voice for voice, count in clips.items() for _ in range(count)]
    measures = [
        one(f"row {n}", "" if voice == "unnamed" else voice, "text", sound=Sound(seconds=6.0))
        for n, voice in enumerate(names)
    ]
    return Report("x", clips=len(measures), measures=measured(measures), steps_per_epoch=steps)


def verdict_of(report, **keys):
    return give_verdict(report, settings("x", **{"max_steps": "-1", "num_train_epochs": 3, **keys}))


@pytest.mark.parametrize(
    ("clips", "line"),
    [
        ({"anna": 300}, "30.0 min of anna, 20 steps a pass: ready to train"),
        (
            {"anna": 50},
            "5.0 min of anna, 20 steps a pass: ready to train; 300 clips of a voice would be best",
        ),
        (
            {"anna": 49},
            "4.9 min of anna, 20 steps a pass; before you train, get more: anna has 49 clips "
            + SOURCE,
        ),
        (
            {"unnamed": 1},
            "0.1 min without a voice name, 20 steps a pass; before you train, get more: the voice "
            f"without a name has 1 clip {SOURCE}",
        ),
        (
            {"anna": 300, "ben": 40, "eve": 20},
            "30.0 min of anna, 4.0 min of ben, 2.0 min of eve, 20 steps a pass; before you train, "
            f"get more: 2 of 3 voices have under 50 clips, eve has only 20 clips {SOURCE}",
        ),
        (
            {"a": 50, "b": 60, "c": 70, "d": 80, "e": 90},
            "5 voices of 5.0 min or more, 20 steps a pass: ready to train; 300 clips of a voice "
            "would be best",
        ),
    ],
)
def test_the_verdict_follows_from_the_smallest_voice(clips, line, capsys):
    report = report_of(**clips)
    assert verdict_of(report) == line
    warn_of_few_clips(report)
    printed = capsys.readouterr().out
    assert printed == (f"warning  {line.split('get more: ')[1]}\n" if "get more" in line else "")


def test_clips_with_important_findings_are_counted_once(tokenizer):
    """Of the clips that are left out, none is counted."""

    def report_on(digits, pairs):
        texts = [f"{(n % digits and 'a') or 1} text" for n in range(60)]
        measures = [
            one(
                f"row {n}",
                "anna",
                f"{text} {'*' if n < pairs else 'x'}",
                sound=Sound(str(n), seconds=6.0),
            )
            for n, text in enumerate(texts)
        ]
        report = Report("x", clips=60, measures=measured(measures), steps_per_epoch=20)
        report.add_findings(["unspeakable"] if pairs > 50 else [], tokenizer)
        return report

    report = report_on(20, 2)  # rows 0, 20 and 40 have digits, rows 0 and 1 a symbol
    assert report.suspects == 4 and report.important == {"digits": 3, "unspeakable": 2}
    line = verdict_of(report)
    assert "; 4 to look at (digits, unspeakable)" in line
    report = report_on(7, 2)
    assert "look at 10 with findings (digits, unspeakable)" in verdict_of(report)
    report = report_on(7, 56)
    assert report.important == {"digits": 1} and len(report.measures) == 4


def test_clips_that_were_not_meant_to_be_left_out_come_first():
    report = report_of(anna=300)
    report.clips = 400
    report.reasons = Counter({"same sound": 60, "too long": 40})  # same_sound is in leave_out
    assert verdict_of(report).endswith(": ready to train")
    report.reasons["silent"] = 1
    assert verdict_of(report).endswith("; before you train, see why 41 of 400 clips are left out")


def test_passes_are_advised_where_a_run_would_have_few_steps():
    report = report_of(anna=300, steps=8)
    advice = " with --num_train_epochs 7 or more (3 would be 24 steps)"
    assert verdict_of(report).endswith(f"ready to train{advice}")
    assert verdict_of(report, num_train_epochs=7).endswith("ready to train")
    assert verdict_of(report, max_steps=20).endswith("ready to train")


def test_the_demo_is_ready_and_its_runs_do_not_warn(tokenizer, capsys):
    _, report = rows_of("data/numbers", tokenizer)
    line = give_verdict(report, settings("data/numbers"))
    assert re.fullmatch(r"2\.9 min of slt, 47 steps a pass: ready to train; 300 clips .*", line)
    warn_of_few_clips(report)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "text, markup, meant",
    [
        ("well (laughs) yes", "(laughs)", "<laugh>"),
        ("[laughs] yes", "[laughs]", "<laugh>"),
        ("<laughs softly> yes", "<laughs softly>", "<laugh>"),
        ("<laugh/> yes", "<laugh/>", "<laugh>"),
        ("<Laugh> yes", "<Laugh>", "<laugh>"),
        ("yes *heavy sigh*", "*heavy sigh*", "<sigh>"),
        ("(softly chuckling) yes", "(softly chuckling)", "<chuckle>"),
        ("{gasps} yes", "{gasps}", "<gasp>"),
        ("fish &amp; chips", "&amp;", "&"),
        ("it&#39;s", "&#39;", "'"),
        ("an <i>old", "<i>", ""),
        ("old<br>", "<br>", ""),
        ('<break time="1s"/> yes', '<break time="1s"/>', ""),
        ("[music] yes", "[music]", ""),
        ("(applause)", "(applause)", ""),
    ],
)
def test_markup_that_is_neither_a_tag_nor_speech(text, markup, meant):
    assert find_markup(text) == [markup] and what_is_meant(markup) == meant


@pytest.mark.parametrize(
    "text",
    ["<laugh> yes", "<sneeze> yes", "he (my brother) left", "AT&T and R&D", "a < b, b > c"],
)
def test_tags_and_speech_are_no_markup(text):
    assert find_markup(text) == []
