"""orpheus/verdict.py: what to do before training, or that the data is ready for it."""

import re
from collections import Counter

import pytest
from clip_folders import rows_of, settings

from orpheus.audio import Sound
from orpheus.doctor import Measures, Report
from orpheus.verdict import give_verdict, warn_of_few_clips

SOURCE = "(Orpheus's README: good results from about 50 of a voice, the best from 300)"


def report_of(findings=(), steps=20, **clips):
    """A report on clips of six seconds, so many of each voice.

    `findings` are (name, first, last) of the clips that have one.
    """
    names = [voice for voice, count in clips.items() for _ in range(count)]
    measures = [
        Measures(f"row {n}", "" if voice == "unnamed" else voice, "text", Sound(seconds=6.0))
        for n, voice in enumerate(names)
    ]
    found = {
        name: [clip.describe() for clip in measures[first:last]] for name, first, last in findings
    }
    counts = {"clips": len(measures), "steps_per_epoch": steps}
    return Report("x", measures=measures, findings=found, **counts)


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


def test_clips_with_important_findings_are_counted_once():
    findings = [("digits", 0, 9), ("pace", 8, 20), ("quiet", 19, 30), ("no_highs", 0, 300)]
    line = verdict_of(report_of(findings, anna=300))
    assert line.endswith(": ready to train; 30 to look at (pace, quiet, digits)")
    line = verdict_of(report_of([*findings, ("long", 30, 31)], anna=300))
    assert line.endswith("; before you train, look at 31 with findings (pace, quiet, digits, long)")
    report = report_of(findings, anna=300)
    report.measures = report.measures[20:]  # of the clips that are left out, none is counted
    assert "; 10 to look at (quiet)" in verdict_of(report)


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
