"""Speaks with Orpheus or a fine-tune of it: text → wav; ids → wav; recording → codec → wav.

python infer.py "Hello there"                                 # the run of config.json
python infer.py "Hello there" --model outputs/numbers --voice slt --out hello.wav
python infer.py --file book.txt --out book/                   # book/001.wav, book/002.wav, …
python infer.py "Hello there" --stream --out - | aplay        # played while it is generated
python infer.py --wav recording.flac --out decoded.wav        # what the codec alone does to it
python infer.py --tokens ids.txt --out ids.wav                # ids from another program

Settings for speaking are those of the run; --config and the options go over them.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path

from orpheus.settings import Parser, SpeakingSettings, UserError, run

STREAM_TARGETS = ("-", "pcm")  # names of --out that write to standard output


def read_options() -> tuple[argparse.Namespace, dict]:
    """Return the command line, and the settings that it and --config give."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT", help="what to say; each text becomes a wav")
    words = "a text file: its paragraphs if empty lines separate any, else each line, become wavs"
    add("--file", metavar="FILE", help=words)
    add("--wav", metavar="FILE", help="a recording to encode and decode instead")
    add("--tokens", metavar="FILE", help="a file of ids to decode instead, as any program prints")
    words = "adapter, checkpoint, merged folder or hub id (config.json's run)"
    add("--model", metavar="…", help=words)
    add("--voice", metavar="NAME", help="voice name (the adapter's first)")
    words = "wav, or folder for several texts (out.wav, out/); streams also: -, pcm"
    add("--out", metavar="…", help=words)
    add("--stream", action="store_true", help="write the audio while it is generated")
    options, given = parser.parse("codec", *SpeakingSettings.model_fields)
    inputs = [options.texts, options.file, options.wav, options.tokens]
    if sum(map(bool, inputs)) != 1:
        raise UserError("command line: give one of: texts, --file, --tokens, --wav")
    return options, given


def output_paths(options: argparse.Namespace, count: int) -> list[Path]:
    """Return the file of each text: --out, or numbered wavs in it."""
    several = bool(options.file) or count > 1
    out = Path(options.out or ("out" if several else "out.wav"))
    if several and (out.suffix.lower() in (".wav", ".flac") or options.out == "-"):
        raise UserError(f"--out {out}: several texts need a folder, such as --out out/, or pcm")
    if several and options.out != "pcm":
        return [out / f"{n:03}.wav" for n in range(1, count + 1)]
    return [out] * count


def decode_input(options: argparse.Namespace, given: dict):
    """Return as Speech what the codec makes of a recording, or of ids from another program."""
    from orpheus import audio, codec, files, models, tokens, voice

    settings, tokenizer = options.settings, None
    if options.model or files.is_model(Path(settings.output_dir)):
        found = voice.find_voice(options.model or settings.output_dir, given, files.TOKENIZER_FILES)
        settings, tokenizer = found.settings, models.load_tokenizer(found.folder)
    snac = codec.load_codec(settings.codec, models.device())
    if options.wav:
        codes, end = codec.encode(snac, [audio.read_audio(Path(options.wav))[0]])[0], "encoded"
    else:
        codes, end = tokens.read_tokens(Path(options.tokens), tokenizer, snac.codebook_size), "read"
    part = voice.Utterance("", [], 0, codes=codes, end=f"{end} and decoded")
    return voice.Speech("", [part], codec.decode_stream(snac, codes, settings.seed))


def write_speech(speeches, path: Path, stream: bool) -> None:
    """Write the next speech, and print a line. The file is opened first: it may not be writable."""
    from orpheus import audio, tokens, voice

    started, length, first = time.perf_counter(), 0, 0
    with (audio.streamed_audio if stream else audio.audio_file)(path) as write:
        speech = next(speeches)
        for piece in speech.pieces:
            write(piece)
            first = first or time.perf_counter() - started
            length += len(piece)
    seconds, spent = length / tokens.SAMPLE_RATE, time.perf_counter() - started
    message = f"{path}  {seconds:.2f} s of audio in {spent:.2f} s, {voice.format_end(speech.parts)}"
    if stream:
        message += f"; first audio after {first:.2f} s, real-time factor {spent / seconds:.2f}"
    print(message, flush=True)


def main() -> None:
    options, given = read_options()
    piped = options.out in STREAM_TARGETS
    with contextlib.redirect_stdout(sys.stderr if piped else sys.stdout):
        from orpheus import tokens, voice

        texts = tokens.read_texts(Path(options.file)) if options.file else options.texts or [""]
        paths, stream = output_paths(options, len(texts)), options.stream or piped
        if options.wav or options.tokens:
            speeches = iter([decode_input(options, given)])
        else:
            given |= {"voice": options.voice} if options.voice else {}
            model = options.model or voice.default_model(options.settings)
            speeches = voice.load_voice(model, **given).speak(texts, stream)
        for path in paths:
            write_speech(speeches, path, stream)


if __name__ == "__main__":
    run(main)
