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

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from orpheus.batching import (
    make_row,
    row_text,
    slots_used,
    split_prompt,
    split_rows,
    steps_per_epoch,
)
from orpheus.clips import Clip, Clips, printable, read_clips
from orpheus.doctor import Measures, Report, check_leave_out, draw_report
from orpheus.files import make_folder
from orpheus.options import read_command_line
from orpheus.runs import SAVED_CONFIG, SAVED_REPORT
from orpheus.settings import Settings, UserError, run
from orpheus.tokens import SLOTS, SpeechIds, prompt_ids, read_speech_ids
from orpheus.verdict import give_verdict

# orpheus.encoding and orpheus.models import torch, which takes seconds: they are imported once the
# settings are read and checked.


def make_rows(
    clips: Clips, settings: Settings, tokenizer, codec=None
) -> tuple[list[dict], list[dict], Report]:
    """Makes the rows that a run trains on, those that it holds out, and the report on the data.

    A row has `input_ids` and `labels`, (tokens,) int64, its `text` and its `voice`. A clip that
    cannot be used is left out, and the report names it. `codec` is settings.codec, if it is loaded
    already. Raises `UserError` where no row is left, or for a broken dataset, codec or tokenizer.
    """
    from orpheus.encoding import encode_clips, read_codebook_size

    check_leave_out(settings)
    ids = read_speech_ids(tokenizer, read_codebook_size(settings.codec))
    rows, report = [], Report(printable(settings.dataset), note=clips.note)
    for clip, encoded in encode_clips(clips, settings, ids, tokenizer, codec):
        report.clips += 1
        try:
            row, measures, length = build_row(clip, encoded, tokenizer, ids, settings)
        except UserError as error:
            report.add_left_out(clip.source, error)
            continue
        report.cached += encoded.cached
        if check_length(row, measures, length, report, ids, settings.max_length):
            report.measures.append(measures)
            rows.append(row)
    if rows:
        kept = report.add_findings(settings.leave_out, tokenizer)
        rows = [row for row, keep in zip(rows, kept, strict=True) if keep]
    check_any_left(rows, report, settings)
    report.digest = digest_rows(rows)
    train, held_out = split_rows(rows, settings)
    report.held_out = len(held_out)
    report.held_out_texts = sorted({row["text"] for row in held_out})
    lengths = [len(row["input_ids"]) for row in train]
    report.slots_used = slots_used(lengths, settings)
    report.steps_per_epoch = steps_per_epoch(lengths, settings)
    return train, held_out, report


def build_row(
    clip: Clip, encoded, tokenizer, ids: SpeechIds, settings: Settings
) -> tuple[dict, Measures, int]:
    """The row of an `EncodedClip`, its measures, and its length in tokens before it may be cut.

    Raises the `UserError` that may be in a clip's place.
    """
    if isinstance(encoded, UserError):
        raise encoded
    text, voice = row_text(clip, settings)
    row = encoded.row
    if row:
        length = len(row["input_ids"])
        spoken, voice = split_prompt(encoded.prompt, voice)
        text = text.removeprefix(f"{voice}: ") or spoken
    else:
        prompt = prompt_ids(tokenizer, ids, text, voice)
        length = len(prompt) + SLOTS * encoded.sound.frames + 2
        row = make_row(prompt, encoded.codes, ids, settings)
    measures = Measures(clip.source, voice, text, encoded.sound, len(row["input_ids"]))
    return row | {"text": text, "voice": voice}, measures, length


def check_length(
    row: dict, measures: Measures, length: int, report: Report, ids: SpeechIds, max_length: int
) -> bool:
    """Whether a row is trained on. One that is cut or dropped for its length is reported."""
    report.lengths.append(length)
    if length <= max_length:
        return True
    # A truncated row has no end token. A prompt may fill it by itself: then there is no speech.
    truncated = ids.eos not in row["input_ids"] and row["input_ids"][-1] != ids.sos
    clips = report.truncated if truncated else report.dropped
    clips.append(f"{measures.source}: {length:,} tokens, {measures.sound.seconds:.1f} s")
    if not truncated:
        report.reasons["too long"] += 1
    return truncated


def check_any_left(rows: list[dict], report: Report, settings: Settings) -> None:
    """`UserError` where every clip was left out, with the reason of the first."""
    if rows:
        return
    first = (report.left_out + report.dropped + ["no clips"])[0]
    remedy = "see data/README.md"
    if report.dropped and not report.left_out:
        remedy = f"raise max_length, which is {settings.max_length}"
    fault = f"no rows left of {report.clips} clips; the first: {first}"
    raise UserError(f"{settings.dataset}: {fault}; {remedy}")


def digest_rows(rows: list[dict]) -> str:
    """SHA-256 over the rows' ids and labels: a resumed run has to have the same ones."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row["input_ids"].tobytes() + row["labels"].tobytes())
    return digest.hexdigest()


def main() -> None:
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--dataset")
    settings = read_command_line(__doc__)
    clips = read_clips(settings)
    make_folder(settings.output_dir, "output_dir")
    from orpheus.hub import TOKENIZER_FILES, fetch
    from orpheus.models import load_tokenizer

    tokenizer = load_tokenizer(fetch(settings.model, TOKENIZER_FILES))
    *_, report = make_rows(clips, settings, tokenizer)
    report.print_summary(settings, full=True)
    out = Path(settings.output_dir)
    if (out / SAVED_CONFIG).is_file():  # the report of a run names its voices: keep it
        out /= "doctor"
    report.save(out)
    draw_report(report, out / "data_report.png")
    print(f"report   {out / SAVED_REPORT} and data_report.png beside it")
    print(f"verdict  {give_verdict(report, settings)}")


if __name__ == "__main__":
    run(main)
