"""Speaks with Orpheus or a fine-tune of it: text → wav; ids → wav; recording → codec → wav.

python infer.py "Hello there"                                 # the run of config.json
python infer.py "Hello there" --model outputs/numbers --voice slt --out hello.wav
python infer.py --file lines.txt --out lines/                 # lines/001.wav, lines/002.wav, …
python infer.py --wav recording.flac --out heard.wav          # what the codec alone does to it
python infer.py --tokens ids.txt --out ids.wav                # ids that something else made
python infer.py "Hello there" --stream --out - | aplay         # heard while it is made
python infer.py --file lines.txt --page out --model outputs/a --model outputs/b --blind
python infer.py --merge merged                                # adapter and base as one 16-bit model
"""

import argparse
import contextlib
import csv
import io
import sys
from pathlib import Path
from typing import Any

from orpheus.audio import read_audio
from orpheus.codec import decode, encode, load_codec
from orpheus.generation import STREAM_TARGETS, save_speech, speak
from orpheus.merge import merge
from orpheus.models import MODEL_FILES, TOKENIZER_FILES, device, load_tokenizer
from orpheus.page import make_page
from orpheus.runs import RunInfo, choose_voice, load_run, load_run_info, overrides
from orpheus.scoring import Utterance, load_judges
from orpheus.settings import (
    RUN_KEYS,
    Parser,
    Settings,
    UserError,
    check_strings,
    read_settings,
    read_text,
    run,
)
from orpheus.tokens import read_tokens

# What each way of calling infer.py takes, besides --model and --config.
SAYING = {"voice", "out", "stream", "score", "whisper", *RUN_KEYS}
TAKES = {
    "texts": SAYING,
    "file": SAYING,
    "page": {"voice", "score", "whisper", "blind", *RUN_KEYS},
    "wav": {"out", "codec", "seed"},
    "tokens": {"out", "codec", "seed"},
    "merge": {"voice", "codec"},
}
NEEDS = {"whisper": "score", "blind": "page"}
SWITCHES = {
    "stream": "let it be heard while it is made",
    "score": "tell how well it came out, by every judge that is installed",
    "blind": "of a --page: hide which sound is whose",
}


def read_arguments() -> argparse.Namespace:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="settings that go over config.json's")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="what to say, a wav each")
    for name, words in {
        "file": "texts, one a line; or a metadata.csv, whose recordings are then compared with",
        "tokens": "a file of ids to decode instead",
        "wav": "a recording to encode and decode instead",
        "whisper": "faster-whisper's model for --score: its size or folder (base)",
        "page": "folder for an index.html to listen to, instead of wavs",
        "voice": "voice name (the adapter's first)",
        "merge": "new folder for the adapter merged into its base, in 16 bits",
        "out": "wav, or folder for several (out.wav, out/); streams: also -, pcm",
    }.items():
        parser.add_argument(f"--{name}", metavar="…", help=words)
    for name in RUN_KEYS:
        field = Settings.model_fields[name]
        kind = {"action": "store_const", "const": "true"} if field.annotation is bool else {}
        words = f"{field.description} (the run's)"
        parser.add_argument(f"--{name}", help=words, **kind or {"metavar": "…"})
    words = "adapter, checkpoint, merged folder or hub id (config.json's run); of a --page several"
    parser.add_argument("--model", metavar="…", action="append", help=words)
    for name, words in SWITCHES.items():
        parser.add_argument(f"--{name}", action="store_true", help=words)
    arguments = parser.parse_args()
    check_options({name: value for name, value in vars(arguments).items() if value or value == ""})
    return arguments


def check_options(given: dict[str, Any]) -> None:
    """`UserError` for options that do not go together: nothing that is asked for is ignored."""
    for name, value in given.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and name != "texts" and not text.strip():
                raise UserError(f"command line: --{name} is empty; give a value, or leave it out")
        check_strings(name if name == "texts" else f"--{name}", value, "command line")
    asked = [name for name in ("texts", "file", "tokens", "wav", "merge") if name in given]
    if len(asked) != 1:
        raise UserError("command line: give one of: texts, --file, --tokens, --wav, --merge")
    for name, other in NEEDS.items():
        if name in given and other not in given:
            raise UserError(f"command line: --{name} needs --{other}")
    way = "page" if "page" in given and asked[0] in ("texts", "file") else asked[0]
    for name in given:
        if name not in {asked[0], way, "model", "config", *TAKES[way]}:
            label = "texts" if way == "texts" else f"--{way}"
            raise UserError(f"command line: --{name} does nothing with {label}; leave it out")
    if len(given.get("model", [])) > 1 and way != "page":
        raise UserError("command line: only a --page takes several --model")


def read_table(path: str) -> list[dict[str, str]]:
    """Rows with a file_name and a text, separated by whatever the header is separated by."""
    text = read_text(path)
    separator = max(",;\t|", key=text.split("\n", 1)[0].count)
    table = csv.DictReader(io.StringIO(text), delimiter=separator)
    try:
        table.fieldnames = [
            name.strip().lower().replace(" ", "_") for name in table.fieldnames or ()
        ]
        rows = list(table)
    except csv.Error as error:
        raise UserError(f"{path}: not a table that can be read: {error}") from None
    if not all(row.get("file_name") and row.get("text") for row in rows):
        raise UserError(
            f"{path}: every row needs a text and a file_name, columns of the first line"
        )
    return rows


def read_texts(arguments: argparse.Namespace) -> tuple[list[str], list[Path]]:
    """(the texts to say, none of them empty; the recordings of each, where --file is a table)."""
    texts, clips, source = arguments.texts, [], arguments.file or "command line"
    kind = Path(source).suffix.lower() if arguments.file else ""
    if kind in (".json", ".jsonl", ".parquet"):
        raise UserError(f"{source}: --file takes a metadata.csv, or a .txt of one text a line")
    if kind in (".csv", ".tsv"):
        rows = read_table(source)
        texts = [row["text"] for row in rows]
        clips = [Path(source).parent / row["file_name"] for row in rows]
    elif arguments.file:
        texts = [line for line in read_text(source).splitlines() if line.strip()]
    if not texts or not all(text.strip() for text in texts):
        raise UserError(f"{source}: the text is empty; give some to say")
    return texts, clips


def decode_given(arguments: argparse.Namespace, run: RunInfo, codec, out: Path) -> None:
    """What the codec makes of a recording or of ids from elsewhere, to `out`."""
    import torch

    if arguments.wav:
        codes, how = encode(codec, [read_audio(Path(arguments.wav))[0]])[0], "encoded and decoded"
    else:
        tokenizer = load_tokenizer(run.folder) if run.folder else None
        codes, how = read_tokens(Path(arguments.tokens), tokenizer, codec.codebook_size), "decoded"
    torch.manual_seed(run.settings.seed)
    row = Utterance("", [], 0, frames=list(codes), end=how)
    save_speech(iter([([row], [decode(codec, codes)])]), out, arguments.stream)


def out_paths(arguments: argparse.Namespace, count: int) -> list[Path]:
    """Where each text goes: --out, or numbered wavs in it."""
    several = bool(arguments.file) or count > 1
    out = Path(arguments.out or ("out" if several else "out.wav"))
    if str(out) not in STREAM_TARGETS:
        return [out / f"{n:03}.wav" for n in range(1, count + 1)] if several else [out]
    if several and str(out) == "-":
        raise UserError("--out -: a wav holds one text; pcm takes several, and so does a folder")
    arguments.stream = True
    return [out] * count


def say(arguments: argparse.Namespace) -> None:
    """The texts, or what was given in their place, to --out, or all to a --page."""
    given = arguments.tokens or arguments.wav
    texts, recordings = ([], []) if given else read_texts(arguments)
    paths = out_paths(arguments, 1 if given else len(texts))
    judges = load_judges(arguments.whisper or "base", recordings) if arguments.score else None
    if arguments.page:
        make_page(Path(arguments.page), texts, recordings, arguments, judges)
        return
    model = arguments.model[0] if arguments.model else None
    patterns = TOKENIZER_FILES if given else MODEL_FILES
    run = load_run_info(model, overrides(arguments), patterns, arguments.config)
    if arguments.stream and run.settings.best_of > 1:
        raise UserError("--stream plays what comes first: leave out --best_of, or set it to 1")
    voice = choose_voice(arguments.voice, run)
    codec = load_codec(run.settings.codec, device())
    if given:
        decode_given(arguments, run, codec, paths[0])
        return
    loaded = load_run(run)
    keep = arguments.score
    more = {"pace": run.pace, "stream": arguments.stream, "judges": judges, "keep": keep}
    speak(texts, paths, *loaded, codec, run.settings, voice, **more)


def main() -> None:
    arguments = read_arguments()
    if arguments.config:
        read_settings(arguments.config)  # so that a mistake in it is found first
    piped = arguments.out in ("-", "pcm")
    with contextlib.redirect_stdout(sys.stderr if piped else sys.stdout):
        if not arguments.merge:
            say(arguments)
            return
        model = arguments.model[0] if arguments.model else None
        adapter = load_run_info(model, overrides(arguments), config=arguments.config)
        if not merge(adapter, choose_voice(arguments.voice, adapter), Path(arguments.merge)):
            sys.exit(1)


if __name__ == "__main__":
    run(main)
