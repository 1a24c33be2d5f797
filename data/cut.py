"""Long recordings of one voice → a dataset: clips, their texts, and what was rejected.

    python data/cut.py chapter1.mp3 chapter2.flac --out my_voice --voice anna
    python data/cut.py chapter1.mp3 --out my_voice --text book.txt  # what was read aloud
    python data/prepare.py my_voice                                 # then: the doctor's report

It finds speech (Silero), transcribes it (faster-whisper), cuts at pauses between sentences, and
writes 24 kHz FLAC clips at one level. Killed at any moment, the same command goes on where it was.
"""

import argparse
import csv
import hashlib
import itertools
import json
import re
import sys
import time
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from orpheus.audio import audio_file
from orpheus.clips import check_text
from orpheus.files import atomic_file, make_folder, write_text
from orpheus.recording import (
    SPEECH_RATE,
    align,
    check_recording,
    choose_gain,
    detect_speech,
    letters,
    load_whisper,
    measure_level,
    read_spans,
    transcribe,
)
from orpheus.segment import Segment, choose_cuts, find_speech, make_windows, reject_odd_pace
from orpheus.settings import Parser, UserError, read_json, read_text, run
from orpheus.tokens import SAMPLE_RATE

COLUMNS = ("file_name", "text", "voice", "source", "start", "end", "cer")
REJECTED_COLUMNS = ("source", "start", "end", "reason", "cer", "text", "heard")
STATE = ".cut"  # in the folder: the command it comes from, words heard so far, finished recordings
PACKAGES = ("faster_whisper", "num2words", "pyloudnorm", "rapidfuzz")
PICTURE_ROWS, ROW_SECONDS = 6, 30


def read_options() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("recordings", nargs="+", type=Path, help="wav, flac, mp3, ogg or opus")
    parser.add_argument("--out", required=True, type=Path, help="folder for the dataset")
    parser.add_argument("--text", type=Path, help="what was read aloud; default: Whisper's words")
    parser.add_argument("--voice", default="", help="name of the voice, for the prompt")
    parser.add_argument("--language", help="ISO code, as en or it; default: Whisper tells")
    parser.add_argument("--whisper", default="small", help="size or folder of a Whisper model")
    help_text = "reject clips whose heard and given letters differ by more (default: 0.1)"
    parser.add_argument("--max_cer", default=0.1, type=float, help=help_text)
    options = parser.parse_args()
    if not 0 <= options.max_cer <= 1:
        raise UserError(f"--max_cer is {options.max_cer}; give a share from 0 to 1")
    if options.language and not re.fullmatch("[a-z]{2,3}", options.language):
        raise UserError(f"--language is {options.language!r}; give an ISO code, as en")
    check_text(options.voice, "--voice", is_voice=True)
    return options


def check_packages() -> None:
    if missing := [name for name in PACKAGES if not find_spec(name)]:
        remedy = "`make cut`, or pip install -r requirements/cut.txt"
        raise UserError(f"cut.py needs {', '.join(missing)}: {remedy}")


def check_recordings(paths: list[Path]) -> dict[str, tuple[Path, float]]:
    """{name of its clips: (path, seconds)} of every recording; names are unique."""
    recordings = {}
    for path in paths:
        name = stem = re.sub(r"\W+", "_", path.stem).strip("_") or "recording"
        if any(path.resolve() == other.resolve() for other, _ in recordings.values()):
            raise UserError(f"{path} is given twice; give each recording once")
        while name.lower() in map(str.lower, recordings):
            name = f"{stem}_{len(recordings) + 1}"
        recordings[name] = path, check_recording(path)
    return recordings


def open_folder(options, recordings: dict, script: str | None) -> None:
    """Makes the folder, or checks that it holds the beginnings of the same command."""
    keys = ("voice", "language", "whisper", "max_cer")
    origin = {f"--{key}": getattr(options, key) for key in keys}
    origin["--text"] = script and hashlib.sha256(script.encode()).hexdigest()
    origin["recordings"] = [[name, p.stat().st_size] for name, (p, _) in recordings.items()]
    out, path = options.out, options.out / STATE / "origin.json"
    remedy = "give --out a new folder"
    if path.is_file() and len(list(path.parent.iterdir())) > 1:  # something was heard already
        earlier = read_json(path)
        if changed := [key for key in origin if earlier.get(key) != origin[key]]:
            raise UserError(f"{out} was cut with other {', '.join(changed)}; {remedy}")
    elif (
        out.exists()
        and not path.is_file()
        and (not out.is_dir() or {p.name for p in out.iterdir()} - {STATE})
    ):
        raise UserError(f"{out} was not made by cut.py; {remedy}")
    make_folder(str(out / STATE), "out")
    write_text(path, json.dumps(origin))


def load_tools(options):
    """(detect, listen): the probabilities of speech in a sound, and the words in it."""
    from faster_whisper.vad import get_vad_model

    return get_vad_model(), load_whisper(options.whisper, options.language)


def cut_recording(name: str, path: Path, seconds: float, options, script, tools, bar) -> dict:
    """Cuts a recording into clips; returns its level and segments, once they are saved, too."""
    detect, listen = tools
    loudness, peak = measure_level(path)
    gain = choose_gain(loudness, peak)
    speech = find_speech(*detect_speech(path, seconds, detect))
    saved = options.out / STATE / f"{name}.jsonl"
    windows = make_windows(speech)
    language, heard = transcribe(path, windows, listen, options.language, saved, bar)
    given = None if script is None else align(heard, script, language or "en")
    segments = choose_cuts(speech, heard, given, options.max_cer, language or "en")
    segments = reject_odd_pace(segments)
    write_clips(name, path, segments, gain, options.out)
    result = {"source": path.name, "seconds": seconds, "loudness": loudness, "gain": gain}
    result |= {"speech": float(np.diff(speech).sum()), "language": language, "segments": segments}
    write_text(options.out / STATE / f"{name}.json", json.dumps(result))
    return result


def load_finished(name: str, out: Path) -> dict | None:
    """What `cut_recording` returned for a recording that an earlier run finished."""
    path = out / STATE / f"{name}.json"
    if not path.is_file():
        return None
    result = read_json(path)
    return result | {"segments": [Segment(*fields) for fields in result["segments"]]}


def write_clips(name: str, path: Path, segments: list[Segment], gain: float, out: Path) -> None:
    spans = [(segment.start, segment.end) for segment in segments if not segment.reason]
    for n, audio in enumerate(read_spans(path, SAMPLE_RATE, spans), 1):
        with audio_file(out / clip_file(name, n)) as write:
            write(audio * gain)


def clip_file(name: str, number: int) -> str:
    """The file of a recording's clip in the dataset's folder."""
    return f"clips/{name}_{number:04}.flac"


def write_table(path: Path, columns: tuple, rows: list[dict]) -> None:
    with atomic_file(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def write_tables(results: dict[str, dict], voice: str, out: Path) -> None:
    """metadata.csv of the clips and rejected.csv of the rest, as far as recordings are done."""
    kept, rejected = [], []
    for name, result in results.items():
        numbers = itertools.count(1)
        for segment in result["segments"]:
            row = {"voice": voice, "source": result["source"], **segment._asdict()}
            row |= {k: round(v, 4) for k, v in row.items() if isinstance(v, float)}
            if segment.reason:
                rejected.append(row)
            else:
                kept.append(row | {"file_name": clip_file(name, next(numbers))})
    write_table(out / "metadata.csv", COLUMNS, kept)
    write_table(out / "rejected.csv", REJECTED_COLUMNS, rejected)


def draw_cuts(path: Path, result: dict, out: Path) -> None:
    """The waveform of a recording's first minutes: clips green with their texts, the rest red."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # a text may hold $
    rows = min(PICTURE_ROWS, int(result["seconds"] // ROW_SECONDS) + 1)
    figure = Figure(figsize=(16, 1.8 * rows), layout="constrained")
    axes = figure.subplots(rows, squeeze=False)[:, 0]
    spans = [(ROW_SECONDS * n, ROW_SECONDS * (n + 1)) for n in range(rows)]
    sounds = read_spans(path, SPEECH_RATE, spans)
    for axis, (first, last), audio in zip(axes, spans, sounds, strict=True):
        peaks = np.pad(audio, (0, -len(audio) % 160)).reshape(-1, 160) * result["gain"]
        times = first + np.arange(len(peaks)) / 100
        axis.fill_between(times, peaks.min(axis=1), peaks.max(axis=1), color="0.3", linewidth=0)
        axis.set(xlim=(first, last), ylim=(-1, 1.5), yticks=[])
        for segment in result["segments"]:
            if segment.end < first or segment.start > last:
                continue
            color = "tab:red" if segment.reason else "tab:green"
            axis.axvspan(segment.start, segment.end, color=color, alpha=0.25)
            label = segment.reason or segment.text
            room = int((min(segment.end, last) - max(segment.start, first)) * 7)
            axis.text(max(segment.start, first) + 0.1, 1.1, label[:room], fontsize=8, clip_on=True)
    axes[0].set_title(f"{result['source']}: clips green, rejected red")
    axes[-1].set_xlabel("seconds")
    with atomic_file(out / "cuts.png") as part:
        figure.savefig(part, dpi=80, format="png")


def print_summary(results: list[dict], out: Path, spent: float) -> None:
    for result in results:
        kept = [segment for segment in result["segments"] if not segment.reason]
        level = f"{result['loudness']:.1f} LUFS, gain {20 * np.log10(result['gain']):+.1f} dB"
        heard = f"{result['speech'] / 60:.1f} of {result['seconds'] / 60:.1f} minutes are speech"
        print(f"{result['source']}: {level}, {result['language']}, {heard}, {len(kept)} clips")
    lengths = defaultdict(list)  # seconds of the segments, by reason to reject them
    for segment in (segment for result in results for segment in result["segments"]):
        lengths[segment.reason].append(segment.end - segment.start)
    kept = lengths.pop("", [])
    rejected = sorted(lengths.items(), key=lambda item: -len(item[1]))
    if not kept:
        reason = rejected[0][0] if rejected else "no speech"
        raise UserError(f"{out}: no clip could be kept: {reason}; see rejected.csv there")
    hours = sum(result["seconds"] for result in results) / 3600
    mean = f"{min(kept):.1f} to {max(kept):.1f} s, {np.mean(kept):.1f} on average"
    print(f"kept     {sum(kept) / 3600:.3f} of {hours:.3f} hours: {len(kept)} clips, {mean}")
    for reason, lost in rejected:
        print(f"rejected {len(lost)} ({sum(lost):.0f} s): {reason}")
    print(f"time     {spent:.0f} s, {3600 * hours / spent:.1f} × real time")
    files = f"{out}/metadata.csv, rejected.csv, cuts.png"
    print(f"wrote    {files}; next: python data/prepare.py {out}")


def cut_all(recordings: dict, options, script: str | None) -> dict[str, dict]:
    """Cuts the recordings, except those that an earlier run finished; returns all results."""
    from tqdm import tqdm

    results, tools, done = {}, None, 0.0
    total = sum(seconds for _, seconds in recordings.values()) / 3600
    form = "{l_bar}{bar}| {n:.2f} of {total:.2f} hours [{elapsed}<{remaining}]"
    with tqdm(total=total, bar_format=form, disable=None) as bar:
        for name, (path, seconds) in recordings.items():

            def show(at, start=done):
                bar.update(start + at / 3600 - bar.n)

            results[name] = load_finished(name, options.out)
            if results[name] is None:
                tools = tools or load_tools(options)
                results[name] = cut_recording(name, path, seconds, options, script, tools, show)
            show(seconds)
            done += seconds / 3600
            write_tables(results, options.voice, options.out)
    return results


def main() -> None:
    options = read_options()
    check_packages()
    script = read_text(options.text) if options.text else None
    if script is not None and not letters(script):
        raise UserError(f"{options.text}: no words in it")
    recordings = check_recordings(options.recordings)
    open_folder(options, recordings, script)
    begun = time.monotonic()
    results = list(cut_all(recordings, options, script).values())
    draw_cuts(options.recordings[0], results[0], options.out)
    print_summary(results, options.out, time.monotonic() - begun)


if __name__ == "__main__":
    run(main)
