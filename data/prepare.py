"""Clips and their texts → checked rows of ids for the trainer, and a doctor's report on them.

    python data/prepare.py my_voice                      # the report on a folder; no training
    python data/prepare.py owner/name --limit 100        # on a hub dataset
    python data/prepare.py --config data/demo/config.json

Takes the same --config and keys as finetune.py, and leaves the encoded clips in `cache_dir`, so
that data can be made ready before a GPU is rented. The accepted forms are in data/README.md.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from orpheus.audio import make_folder
from orpheus.batching import make_row, slots_used, split_rows
from orpheus.clips import Clip, Clips, printable, read_clips
from orpheus.codec import CODEC_FILES
from orpheus.doctor import FINDINGS, Report, draw_report, examine
from orpheus.encoding import SOUND_TYPES, Measures, encode_clips, frames_of
from orpheus.hub import TOKENIZER_FILES, fetch
from orpheus.models import load_tokenizer
from orpheus.runs import SAVED_CONFIG, SAVED_REPORT
from orpheus.settings import Settings, UserError, check_names, read_command_line, read_json, run
from orpheus.tokens import SLOTS, prompt_ids, read_speech_ids

del SOUND_TYPES["tokens"]  # of the row, not of the sound


def make_rows(clips: Clips, settings: Settings, tokenizer, codec=None) -> tuple[list, "Report"]:
    """Rows (input_ids, labels, text) and the report. A faulty clip is left out and named.

    `codec` is settings.codec, where the caller has loaded it already.
    """
    if unknown := set(settings.leave_out) - FINDINGS.keys():
        told = f"no finding is named {min(unknown)[:80]!r}; there are {', '.join(FINDINGS)}"
        raise UserError(f"leave_out: {told}")
    config = fetch(settings.codec, CODEC_FILES) / "config.json"
    size = read_json(config).get("codebook_size")
    if not isinstance(size, int):
        raise UserError(f"{config}: no codebook_size: not a SNAC codec")
    ids = read_speech_ids(tokenizer, size)
    report, rows = Report(printable(settings.dataset), note=clips.note), []
    for clip, heard in encode_clips(clips, settings, ids, codec):
        add_row(rows, report, clip, heard, tokenizer, ids, settings)
    return finish_rows(rows, report, settings), report


def add_row(rows: list, report: "Report", clip: Clip, heard, tokenizer, ids, settings) -> None:
    """One clip's row, or the reason why there is none, into rows and report."""
    report.clips += 1
    text = " ".join((clip.text or "").split())
    voice = " ".join((clip.voice or settings.voice or "").split())
    try:
        if isinstance(heard, UserError):
            raise heard
        row = heard.row
        if row:
            text = text or tokenizer.decode(row["input_ids"][row["labels"] == -100])
        else:
            prompt = prompt_ids(tokenizer, ids, text, voice)
            row = make_row(prompt, heard.codes, ids, settings)
    except UserError as mistake:
        report.add_left_out(clip.where, str(mistake))
        return
    report.cached += heard.cached
    measures = Measures(clip.where, voice, text, **heard.sound, tokens=len(row["input_ids"]))
    length, cut = measures.tokens, ids.eos not in row["input_ids"]
    if cut or length > settings.max_length:  # what it would take: prompt, codes and two ends
        prompt = int(np.argmax(row["input_ids"] == ids.sos)) + 1
        length = max(length, prompt + SLOTS * frames_of(measures.seconds) + 2)
    report.lengths.append(length)
    if length > settings.max_length:
        kept = cut and prompt < len(row["input_ids"]) <= settings.max_length
        fault = f"{clip.where}: {length:,} tokens, {measures.seconds:.1f} s"
        (report.truncated if kept else report.dropped).append(fault)
        report.reasons["too long"] += not kept
        if not kept:
            return
    report.measures.append(measures)
    rows.append(row | {"text": text})


def finish_rows(rows: list[dict], report: "Report", settings: Settings) -> list[dict]:
    """The rows without those that `leave_out` names; the doctor's findings into the report."""
    if rows:
        found, out = examine(report.measures), np.zeros(len(rows), bool)
        for name, over in found.items():
            worst = np.argsort(-over, kind="stable")[: (over > 0).sum()]
            if len(worst):
                report.findings[name] = [report.measures[n].told() for n in worst]
            out |= (over > 0) & (name in settings.leave_out)
        for n in np.flatnonzero(out):
            names = ", ".join(name for name in settings.leave_out if found[name][n] > 0)
            report.add_left_out(report.measures[n].where, names)
        rows = [row for row, gone in zip(rows, out, strict=True) if not gone]
        report.measures = [m for m, gone in zip(report.measures, out, strict=True) if not gone]
    if not rows:
        first = (report.left_out + report.dropped + ["no clips"])[0]
        none = f"{settings.dataset}: no rows left of {report.clips} clips"
        remedy = "see data/README.md"
        if report.dropped and not report.left_out:
            remedy = f"raise max_length, which is {settings.max_length}"
        raise UserError(f"{none}; the first: {first}; {remedy}")
    whole = hashlib.sha256()
    for row in rows:
        whole.update(row["input_ids"].tobytes() + row["labels"].tobytes())
    report.digest = whole.hexdigest()
    report.split = train, held = split_rows(rows, settings)
    report.held_out = len(held)
    report.slots_used = slots_used([len(row["input_ids"]) for row in train], settings)
    return rows


def main() -> None:
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--dataset")
    settings = read_command_line(__doc__)
    check_names(settings)
    out = Path(settings.output_dir)
    clips = read_clips(settings)
    make_folder(settings.output_dir, "output_dir")
    tokenizer = load_tokenizer(fetch(settings.model, TOKENIZER_FILES))
    _, report = make_rows(clips, settings, tokenizer)
    report.tell(settings, full=True)
    if (out / SAVED_CONFIG).is_file():  # a run is there, whose report names its voices
        out /= "doctor"
    report.save(out)
    draw_report(report, out / "data_report.png")
    print(f"report   {out / SAVED_REPORT} and data_report.png beside it")


if __name__ == "__main__":
    run(main)
