"""Command lines: settings as options; what infer.py, orpheus.page and orpheus.merge share."""

import argparse
import json
import textwrap
from pathlib import Path
from typing import get_args

from orpheus.clips import read_manifest
from orpheus.hub import absolute_path_or_hub_id
from orpheus.settings import (
    PARTS,
    RUN_KEYS,
    Settings,
    UserError,
    read_settings,
    read_text,
)


def describe_keys() -> str:
    """Return all keys by part, with meaning and default, for --help."""
    lines = []
    for part in PARTS:
        lines += [f"\n{part.__doc__.lower()}:"]
        for name, field in part.model_fields.items():
            default = json.dumps(field.default, ensure_ascii=False)
            words = f"  --{name:32}{field.description} (default: {default})"
            lines += textwrap.wrap(words, 100, subsequent_indent=" " * 36, break_on_hyphens=False)
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line, without the usage, and no option is abbreviated."""

    def __init__(self, description: str, **keys):
        keys |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(description=description, **keys)

    def error(self, message: str):
        raise UserError(f"command line: {message}")

    def add_run_options(self, keys=RUN_KEYS) -> None:
        """Adds --voice, --config, and settings that replace those of the run."""
        self.add_argument("--voice", metavar="NAME", help="voice name (the adapter's first)")
        self.add_argument(
            "--config", metavar="FILE", help="a file of settings, in place of config.json"
        )
        for name in keys:
            field = Settings.model_fields[name]
            switch = field.annotation is bool
            kind = {"action": "store_const", "const": "true"} if switch else {"metavar": "…"}
            words = f"{field.description} (the run's)"
            self.add_argument(f"--{name}", help=words, **kind)

    def add_scoring_options(self) -> None:
        words = "print scores by every judge that is installed"
        self.add_argument("--score", action="store_true", help=words)
        self.add_whisper_option()

    def add_whisper_option(self) -> None:
        words = "faster-whisper's model: its size or folder (base)"
        self.add_argument("--whisper", metavar="…", help=words)

    def parse_options(self) -> argparse.Namespace:
        """The command line; `UserError` for an empty value, and for mistakes in --config's file."""
        arguments = self.parse_args()
        for name, value in vars(arguments).items():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and name != "texts" and not text.strip():
                    remedy = "give a value, or leave it out"
                    raise UserError(f"command line: --{name} is empty; {remedy}")
        if getattr(arguments, "whisper", None) and not getattr(arguments, "score", True):
            raise UserError("command line: --whisper needs --score")
        if arguments.config:
            read_settings(arguments.config)
        return arguments


def read_command_line(description: str) -> Settings:
    """--config FILE, and any key as --key value, of finetune.py and data/prepare.py."""
    usage = "%(prog)s [-h] [--config FILE] [--key value …]"
    parser = Parser(description, epilog=describe_keys(), usage=usage)
    parser.add_argument(
        "--config", metavar="FILE", help="a file of settings, in place of config.json"
    )
    known, rest = parser.parse_known_args()
    words = [part for word in rest for part in (word.split("=", 1) if word[:2] == "--" else [word])]
    overrides = {}
    while words:
        name = words.pop(0)
        bare = not words or words[0].startswith("--")  # a switch, as --overwrite
        field = Settings.model_fields.get(name[2:])
        switch = field is None or bool in (field.annotation, *get_args(field.annotation))
        if not name.startswith("--") or (bare and not switch):
            remedy = "write keys as --key value, such as --dataset my_voice"
            raise UserError(f"command line: {name}: {remedy}")
        overrides[name[2:]] = "true" if bare else words.pop(0)
    return read_settings(known.config, overrides)


def overrides(arguments: argparse.Namespace) -> dict[str, str]:
    """The settings of a run that the command line gives, as `load_run_info` takes them."""
    given = {name: getattr(arguments, name, None) for name in RUN_KEYS}
    given = {name: value for name, value in given.items() if value is not None}
    return given | ({"codec": absolute_path_or_hub_id(given["codec"])} if "codec" in given else {})


# Reads a table with columns of the usual names, and recordings in any folder.
ANY_TABLE = dict.fromkeys(("audio_column", "text_column", "voice_column"), "null")
ANY_TABLE |= {"absolute_paths": "true"}


def read_texts(texts: list[str], file: str | None) -> tuple[list[str], list[Path]]:
    """(texts to speak, the recordings of each) of the command line or a file.

    A .csv or .tsv is a table of recordings and texts; any other file has a text on each line, and
    no recordings. `UserError` for an empty text.
    """
    recordings, source = [], file or "command line"
    suffix = Path(source).suffix.lower() if file else ""
    if suffix in (".json", ".jsonl", ".parquet"):
        raise UserError(f"{source}: give a metadata.csv, or a .txt of one text a line")
    if suffix in (".csv", ".tsv"):
        clips = list(read_manifest(Path(source), read_settings(overrides=ANY_TABLE)))
        for clip in clips:
            if clip.error or not (clip.text and clip.audio):
                fault = clip.error or "it needs a text and a file_name, columns of the first line"
                raise UserError(f"{Path(source).with_name(clip.source)}: {fault}")
        texts, recordings = [clip.text for clip in clips], [clip.audio for clip in clips]
    elif file:
        texts = [line for line in read_text(source).splitlines() if line.strip()]
    if not texts or not all(text.strip() for text in texts):
        raise UserError(f"{source}: the text is empty; give some to say")
    return texts, recordings
