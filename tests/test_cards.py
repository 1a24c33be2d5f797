"""orpheus/cards.py: what a card says of data, evaluation, licence and settings."""

import shutil

import pytest
from conftest import change
from huggingface_hub import ModelCard

from orpheus.cards import base_licence, card_sections, describe_data, find_sample, model_card
from orpheus.runs import SAVED_CONFIG, SAVED_REPORT
from orpheus.settings import UserError, read_settings


def settings_of(adapter, **changes):
    return read_settings(adapter / SAVED_CONFIG, changes, saved=True)


def test_the_data_in_short(adapter):
    keys = {"tags": {"<laugh>": 12, "<sigh>": 3}, "reasons": {"too long": 2}, "held_out": 4}
    change(adapter / SAVED_REPORT, **keys, findings={"digits": ["a: …", "b: …"]})
    assert describe_data(adapter).splitlines() == [
        "16 clips, 0.009 hours of numbers; voices: slt (16 clips); 4 clips held out.",
        "- Left out: 2 too long",
        "- Emotion tags: 12 <laugh>, 3 <sigh>",
        "- Findings: 2 digits",
    ]
    change(adapter / SAVED_REPORT, voices=None)
    with pytest.raises(UserError, match=f"{SAVED_REPORT}: does not load"):
        describe_data(adapter)


def test_a_card_has_what_is_there(adapter):
    settings = settings_of(adapter)
    titles = [section.split("\n")[0] for section in card_sections(adapter, settings)]
    assert titles == ["## Data", "## Scores", "## Settings"]
    (adapter / "evaluation").mkdir()
    (adapter / "evaluation/table.md").write_text("# Evaluation of me, voice slt\n\n| a |\n")
    (adapter / "checks.csv").unlink()
    sections = card_sections(adapter, settings_of(adapter, model="unsloth/orpheus-3b-0.1-ft"))
    assert sections[1] == "## Evaluation of me, voice slt\n\n| a |"
    assert sections[2].startswith("## Licence\n\nOf the base: apache-2.0, on top of Llama 3.2")
    card = ModelCard(model_card(settings, "me", "peft", "\n\n".join(sections)))
    assert card.data.pipeline_tag == "text-to-speech" and "## Settings" in card.text


def test_the_licence_of_a_base_on_this_machine_is_that_of_its_card(adapter, tmp_path):
    assert base_licence(settings_of(adapter)) is None
    base = shutil.copytree("data/demo/base", tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: llama3.2\n---\n# A base\n")
    assert base_licence(settings_of(adapter, model=str(base))) == "llama3.2"


def test_the_sample_is_the_last_checks_first(adapter):
    assert find_sample(adapter).relative_to(adapter).as_posix() == "samples/step-000004/01.wav"
    shutil.rmtree(adapter / "samples")
    assert find_sample(adapter) is None
