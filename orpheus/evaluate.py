"""Writes a table that compares a voice with its recordings, the codec, the base and other models.

python -m orpheus.evaluate --model outputs/anna                   # → outputs/anna/evaluation/
python -m orpheus.evaluate --model outputs/anna --model outputs/anna/checkpoint-100 --model merged
python -m orpheus.evaluate --model outputs/anna --wavs gguf       # 001.wav says line 1 of texts.txt
python -m orpheus.evaluate --model outputs/anna --file lines.csv  # other texts, and recordings

The texts are those that the run held out, and the general ones of orpheus/evaluation_texts.txt.
Judges that are not installed are named, and their columns are left out. What was spoken is kept: a
second call speaks only what is new.
"""

import argparse
import contextlib
import sys
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

from orpheus.comparison import make_rows, save_table
from orpheus.files import make_folder, write_text
from orpheus.options import Parser, overrides
from orpheus.settings import RUN_KEYS, UserError, read_text, run
from orpheus.speakers import Speaker, choose_lines, list_models, list_recorded


def measure_speakers(speakers: list[Speaker], pace: float | None, judges) -> list[dict]:
    """The scores of every sound, with its speaker, kind, text and seed."""
    from orpheus.scoring import measure

    scores, total = [], sum(speaker.count for speaker in speakers)
    with (
        tqdm(total=total, unit=" sounds", disable=None, leave=False) as bar,
        contextlib.redirect_stdout(DummyTqdmFile(sys.stdout)),
    ):
        for speaker in speakers:
            bar.set_description_str(speaker.name)
            for line, audio, seed, ended in speaker.sounds:
                row = {"speaker": speaker.name, "kind": line.kind, "text": line.text, "seed": seed}
                row |= {} if ended is None else {"ended": ended}
                scores.append(row | measure(audio, line.text, pace, judges))
                bar.update()
    return scores


def evaluate(arguments: argparse.Namespace) -> Path:
    """Writes the table, and returns its folder."""
    from orpheus.codec import load_codec
    from orpheus.models import device
    from orpheus.run_info import choose_voice, load_run_info
    from orpheus.scoring import find_judges

    model = arguments.model[0] if arguments.model else None
    info = load_run_info(model, overrides(arguments), config=arguments.config)
    info.settings = info.settings.replace(best_of=1)
    voice, notes = choose_voice(arguments.voice, info), []
    out = Path(arguments.out or (info.folder if info.home else Path()) / "evaluation")
    make_folder(str(out), "out")
    lines, corpus = choose_lines(info, voice, arguments, notes)
    if not lines:
        raise UserError(f"{info.folder}: no texts to say; give some with --file")
    codec = load_codec(info.settings.codec, device())
    unique = list({line.text: line for line in lines}.values())
    write_text(out / "texts.txt", "".join(f"{line.text}\n" for line in unique))
    speakers = list_recorded(lines, corpus, info.settings, codec)
    speakers += list_models(info, voice, unique, codec, arguments, out, notes)
    judges, available, missing = find_judges(arguments.whisper or "base", corpus.references)
    print(f"scores   {', '.join(available)}")
    notes += [f"Not computed: {', '.join(missing)}."] if missing else []
    scores = measure_speakers(speakers, info.pace, judges)
    results = {"model": str(info.folder), "voice": voice, "seeds": arguments.seeds}
    results |= {"notes": notes, "rows": make_rows(scores), "scores": scores}
    title = f"{info.folder.resolve().name}, voice {voice or 'without a name'}"
    save_table(out, f"Evaluation of {title}", notes, results)
    return out


def read_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    words = "run to evaluate (config.json's), then other models: checkpoints, merged folders, …"
    parser.add_argument("--model", metavar="…", action="append", help=words)
    words = "folder of wavs that another program made of texts.txt; may be given several times"
    parser.add_argument("--wavs", metavar="FOLDER", action="append", help=words)
    words = "texts, one a line, or a metadata.csv, in place of the held-out and general ones"
    parser.add_argument("--file", metavar="FILE", help=words)
    words = "held-out texts at most (50)"
    parser.add_argument("--texts", metavar="N", type=int, default=50, help=words)
    words = "how often each model says each text (3)"
    parser.add_argument("--seeds", metavar="N", type=int, default=3, help=words)
    parser.add_argument("--out", metavar="FOLDER", help="folder (the run's evaluation/)")
    parser.add_whisper_option()
    parser.add_run_options([name for name in RUN_KEYS if name != "best_of"])
    arguments = parser.parse_options()
    for name in ("texts", "seeds"):
        if getattr(arguments, name) < 1:
            raise UserError(f"command line: --{name} must be 1 or more")
    return arguments


def main() -> None:
    out = evaluate(read_arguments())
    print(read_text(out / "table.md"), end="")
    print(f"table    {out / 'table.md'}, table.json and table.png beside it")


if __name__ == "__main__":
    run(main)
