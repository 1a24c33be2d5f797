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
import dataclasses
import sys
from itertools import zip_longest
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

from orpheus.comparison import CODEC, make_rows, save_table
from orpheus.files import make_folder, write_text
from orpheus.hub import MODEL_FILES, fetch
from orpheus.options import Parser, overrides, read_texts
from orpheus.output import MANIFEST, record_files, save_card
from orpheus.settings import RUN_KEYS, UserError, read_text, run
from orpheus.speakers import (
    Corpus,
    Line,
    Speaker,
    decoded,
    read_corpus,
    read_general,
    read_wavs,
    recorded,
    spoken,
    spread,
)


def choose_lines(info, voice, arguments, notes: list[str]) -> tuple[list[Line], Corpus]:
    """The lines to say, and the corpus; `notes` gets what it lacks.

    Texts of --file take the place of the others.
    """
    corpus = Corpus()
    if info.home:
        try:
            corpus = read_corpus(info, voice)
        except UserError as error:
            notes.append(f"The run's recordings cannot be read: {error}.")
    if arguments.file:
        texts, recordings = read_texts([], arguments.file)
        corpus.references = corpus.references or recordings
        return [Line(t, "given", r) for t, r in zip_longest(texts, recordings)], corpus
    held_out = spread(corpus.held_out, arguments.texts)
    if not any(line.recording for line in held_out):
        notes.append("No recording is held out: there is no row of recordings, and no floor.")
    if (language := info.settings.language) == "en":
        return held_out + read_general(corpus.tags), corpus
    notes.append(f"The general texts are English, the voice's language is {language}: left out.")
    return held_out, corpus


def list_recorded(lines, corpus: Corpus, settings, codec) -> list[Speaker]:
    """Speakers without a model: the recordings, the same through the codec, and another voice."""
    recordings = [line for line in lines if line.recording]
    if not recordings:
        return []
    count = len(recordings)
    speakers = [
        Speaker("recordings", count, recorded(recordings, settings)),
        Speaker(CODEC, count, decoded(recordings, settings, codec)),
    ]
    if corpus.others:
        name, others = next(iter(corpus.others.items()))
        others = [line._replace(kind=recordings[0].kind) for line in spread(others, count)]
        speakers.append(Speaker(f"another voice: {name}", len(others), recorded(others, settings)))
    return speakers


def list_models(info, voice, lines, codec, arguments, out: Path, notes: list[str]) -> list[Speaker]:
    """Speakers of the lines: the base, the models of --model, and the folders of --wavs."""
    from orpheus.run_info import choose_voice, load_run_info

    models = [("fine-tune" if info.home else str(info.folder), info, voice)]
    if info.home:
        try:
            base = fetch(info.settings.model, MODEL_FILES)
            models.insert(0, ("base", dataclasses.replace(info, folder=base), voice))
        except UserError as error:
            notes.append(f"There is no row of the base: {error}.")
    for model in (arguments.model or ())[1:]:
        other = load_run_info(model, overrides(arguments), config=arguments.config)
        other.settings = other.settings.replace(best_of=1)
        models.append((model, other, choose_voice(arguments.voice or voice, other)))
    speakers = []
    for name, model, model_voice in models:
        sounds = spoken(model, model_voice, lines, arguments.seeds, codec, out / "spoken")
        speakers.append(Speaker(name, len(lines) * arguments.seeds, sounds))
    for folder in arguments.wavs or ():
        count = sum((Path(folder) / f"{n + 1:03}.wav").is_file() for n in range(len(lines)))
        if not count:
            raise UserError(f"{folder}: no 001.wav …, one for each line of {out / 'texts.txt'}")
        speakers.append(Speaker(folder, count, read_wavs(lines, Path(folder))))
    return speakers


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
    in_run = info.home and out == info.home / "evaluation" and (info.home / MANIFEST).is_file()
    if in_run:
        record_files(info.home, out.name)
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
    if in_run:
        save_card(info.settings.replace(output_dir=str(info.home)))  # with the table in it
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
