"""Speaks with Orpheus or a fine-tune of it: text → wav; ids → wav; recording → codec → wav.

python infer.py "Hello there"                                 # the run of config.json
python infer.py "Hello there" --model outputs/numbers --voice slt --out hello.wav
python infer.py --file lines.txt --out lines/                 # lines/001.wav, lines/002.wav, …
python infer.py "Hello there" --stream --out - | aplay        # played while it is generated
python infer.py --wav recording.flac --out decoded.wav        # what the codec alone does to it
python infer.py --tokens ids.txt --out ids.wav                # ids from another program
"""

import argparse
import contextlib
import sys
from pathlib import Path

from orpheus.options import Parser, overrides, read_texts
from orpheus.settings import UserError, run

INPUTS = ("texts", "file", "wav", "tokens")
DECODING = {"model", "config", "out", "codec", "seed"}  # the options of --wav and --tokens
STREAM_TARGETS = ("-", "pcm")  # names of --out that write to standard output


def read_arguments() -> argparse.Namespace:
    """The command line; `UserError` for options that do not go together."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT", help="what to say; each text becomes a wav")
    words = "texts, one a line; or a metadata.csv, with whose recordings --score compares"
    add("--file", metavar="FILE", help=words)
    add("--wav", metavar="FILE", help="a recording to encode and decode instead")
    add("--tokens", metavar="FILE", help="a file of ids to decode instead")
    words = "adapter, checkpoint, merged folder or hub id (config.json's run)"
    add("--model", metavar="…", action="append", help=words)
    words = "wav, or folder for several texts (out.wav, out/); streams also: -, pcm"
    add("--out", metavar="…", help=words)
    add("--stream", action="store_true", help="write the audio while it is generated")
    parser.add_scoring_options()
    parser.add_run_options()
    arguments = parser.parse_options()
    check_options(arguments)
    arguments.model = arguments.model[0] if arguments.model else None
    return arguments


def check_options(arguments: argparse.Namespace) -> None:
    """`UserError` for options that exclude each other, so that none is ignored."""
    given = [name for name, value in vars(arguments).items() if value]
    inputs = [name for name in INPUTS if name in given]
    if len(inputs) != 1:
        raise UserError("command line: give one of: texts, --file, --tokens, --wav")
    for name in given if inputs[0] in ("wav", "tokens") else []:
        if name not in {*inputs, *DECODING}:
            raise UserError(f"command line: --{name} does nothing with --{inputs[0]}; leave it out")
    if len(arguments.model or []) > 1:
        raise UserError("command line: only a page takes several --model: python -m orpheus.page")


def output_paths(arguments: argparse.Namespace, count: int) -> list[Path]:
    """The file of each text: --out or numbered wavs in it; `UserError` for several in one wav."""
    several = bool(arguments.file) or count > 1
    out = Path(arguments.out or ("out" if several else "out.wav"))
    if several and out.suffix.lower() in (".wav", ".flac"):
        raise UserError(f"--out {out}: several texts need a folder, such as --out {out.stem}/")
    if str(out) not in STREAM_TARGETS:
        return [out / f"{n:03}.wav" for n in range(1, count + 1)] if several else [out]
    if several and str(out) == "-":
        raise UserError("--out -: a wav holds one text; pcm takes several, and so does a folder")
    return [out] * count


def decode_input(arguments: argparse.Namespace, stream: bool, out: Path) -> None:
    """Writes what the codec makes of a recording, or of ids from another program."""
    import torch

    from orpheus.audio import read_audio
    from orpheus.codec import decode, encode, load_codec
    from orpheus.generation import save_speech
    from orpheus.hub import TOKENIZER_FILES
    from orpheus.models import device, load_tokenizer
    from orpheus.run_info import load_run_info
    from orpheus.scoring import Utterance
    from orpheus.tokens import read_tokens

    audio = read_audio(Path(arguments.wav))[0] if arguments.wav else None
    info = load_run_info(arguments.model, overrides(arguments), TOKENIZER_FILES, arguments.config)
    codec = load_codec(info.settings.codec, device())
    if audio is not None:
        codes, end = encode(codec, [audio])[0], "encoded and decoded"
    else:
        tokenizer = load_tokenizer(info.folder) if info.folder else None
        codes, end = read_tokens(Path(arguments.tokens), tokenizer, codec.codebook_size), "decoded"
    torch.manual_seed(info.settings.seed)
    utterance = Utterance("", [], 0, frames=list(codes), end=end)
    save_speech(iter([([utterance], [decode(codec, codes)])]), out, stream)


def speak_texts(arguments, stream: bool, texts: list[str], recordings, paths: list[Path]) -> None:
    """Speaks each text to its path, and scores it with --score."""
    from orpheus.codec import load_codec
    from orpheus.generation import speak
    from orpheus.models import device
    from orpheus.run_info import choose_voice, load_run, load_run_info
    from orpheus.scoring import load_judges

    judges = load_judges(arguments.whisper or "base", recordings) if arguments.score else None
    info = load_run_info(arguments.model, overrides(arguments), config=arguments.config)
    if stream and info.settings.best_of > 1:
        raise UserError("--stream plays what comes first: leave out --best_of, or set it to 1")
    voice = choose_voice(arguments.voice, info)
    codec = load_codec(info.settings.codec, device())
    model, tokenizer = load_run(info)
    options = {"pace": info.pace, "stream": stream, "judges": judges, "keep": arguments.score}
    speak(texts, paths, model, tokenizer, codec, info.settings, voice, **options)


def main() -> None:
    arguments = read_arguments()
    decoding = bool(arguments.wav or arguments.tokens)
    texts, recordings = ([], []) if decoding else read_texts(arguments.texts, arguments.file)
    paths = output_paths(arguments, 1 if decoding else len(texts))
    piped = str(paths[0]) in STREAM_TARGETS
    stream = arguments.stream or piped
    with contextlib.redirect_stdout(sys.stderr if piped else sys.stdout):
        if decoding:
            decode_input(arguments, stream, paths[0])
        else:
            speak_texts(arguments, stream, texts, recordings, paths)


if __name__ == "__main__":
    run(main)
