"""Model cards, which the hub shows as README.md: of a run's folder, and of a merged model."""

import csv
import json
import re
from pathlib import Path

from orpheus.hub import as_user_error, is_hub_id
from orpheus.runs import SAVED_REPORT
from orpheus.settings import Settings, read_json, read_text

ORPHEUS = re.compile(r"(canopylabs|unsloth)/orpheus-3b-0\.1-(ft|pretrained)")
ORPHEUS_LICENCE = "apache-2.0, on top of Llama 3.2, whose community licence also applies"


def base_name(settings: Settings) -> str:
    """The base as a model card names it: its hub id, or the name of its folder."""
    return settings.model if is_hub_id(settings.model) else Path(settings.model).name


def base_licence(settings: Settings) -> str | None:
    """The licence of the base: of an Orpheus, or as the README.md in the base's folder has it."""
    from huggingface_hub import ModelCard

    path = Path(settings.model) / "README.md"
    if not path.is_file():
        return ORPHEUS_LICENCE if ORPHEUS.fullmatch(settings.model) else None
    with as_user_error(path):
        return ModelCard.load(path).data.license


def model_card(settings: Settings, title: str, library: str, body: str) -> str:
    """README.md of a run or a merged model: metadata for the hub, a title, and `body` (Markdown).

    `library` is what loads it: "peft" or "transformers".
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        base_model=settings.model if is_hub_id(settings.model) else None,
        library_name=library,
        pipeline_tag="text-to-speech",
        tags=["orpheus"],
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{body}\n"))


def describe_data(home: Path) -> str:
    """A run's data report in short: clips, hours, voices, what was left out and found."""
    path = home / SAVED_REPORT
    report = read_json(path)
    with as_user_error(path):
        voices = ", ".join(f"{name} ({count} clips)" for name, count in report["voices"].items())
        lines = [
            f"{report['rows']} clips, {report['hours']:.3f} hours of "
            f"{Path(report['dataset']).name}; voices: {voices or 'none named'}; "
            f"{report['held_out']} clips held out."
        ]
        counts = {"Left out": report["reasons"], "Emotion tags": report.get("tags", {})}
        counts["Findings"] = {name: len(clips) for name, clips in report["findings"].items()}
    for title, values in counts.items():
        if values:
            lines.append(f"- {title}: {', '.join(f'{n} {name}' for name, n in values.items())}")
    return "\n".join(lines)


def describe_best_check(path: Path) -> str:
    """The best check of a run's checks.csv, as a table."""
    checks = list(csv.DictReader(read_text(path).splitlines()))
    with as_user_error(path):
        best = max(checks, key=lambda check: float(check["eval_score"]))
    rows = "\n".join(f"| {name} | {value} |" for name, value in best.items())
    return f"| measure, at the best check | |\n|---|---|\n{rows}"


def card_sections(home: Path, settings: Settings) -> list[str]:
    """What the cards have in common, as far as it is there.

    Data in short, the table of orpheus.evaluate, the best check, the licence of the base, settings.
    """
    sections = [f"## Data\n\n{describe_data(home)}"]
    table = home / "evaluation" / "table.md"
    if table.is_file():
        sections.append(read_text(table).replace("# Evaluation of", "## Evaluation of", 1).strip())
    if (home / "checks.csv").is_file():
        sections.append(f"## Scores\n\n{describe_best_check(home / 'checks.csv')}")
    if licence := base_licence(settings):
        sections.append(f"## Licence\n\nOf the base: {licence}.")
    values = json.dumps(settings.flat(), indent=2, ensure_ascii=False)
    return [*sections, f"## Settings\n\n```json\n{values}\n```"]


def find_sample(home: Path) -> Path | None:
    """The first sample of the last check."""
    return max(home.glob("samples/step-*/01.wav"), default=None)
