"""Command lines: settings as options; what infer.py, orpheus.page and orpheus.merge share."""

import argparse
from pathlib import Path

import orpheus.settings
from orpheus.clips import read_clips
from orpheus.hub import absolute_path_or_hub_id
from orpheus.settings import (
    RUN_KEYS,
    Settings,
    UserError,
    read_settings,
    read_text,
)


class Parser(orpheus.settings.Parser):
    """Options that infer.py and the page share."""

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
        """The command line, with mistakes in --config's file."""
        arguments = self.parse()[0]
        if getattr(arguments, "whisper", None) and not getattr(arguments, "score", True):
            raise UserError("command line: --whisper needs --score")
        if arguments.config:
            read_settings(arguments.config)
        return arguments


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
        clips = list(read_clips(read_settings(None, ANY_TABLE | {"dataset": source})))
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
