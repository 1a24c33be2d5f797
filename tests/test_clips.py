"""orpheus/clips.py: the forms of data that people have, what they are read as, what is refused."""

import itertools
import json
import os
import unicodedata
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pandas
import pytest
import soundfile
from clip_folders import folder_of, noise, parquet_with_bytes, rows_of, settings, two_clips
from datasets import Audio, Dataset, DatasetDict

import orpheus.codec
from orpheus.audio import measure_clip
from orpheus.clips import read_clips
from orpheus.settings import UserError
from orpheus.tokens import codes_to_ids, prompt_ids

datasets.disable_progress_bars()


def read(dataset, **keys):
    """(clips, note) of a dataset."""
    clips = read_clips(settings(dataset, **keys))
    found = list(clips)
    assert clips.count in (None, len(found)) or keys.get("limit")
    return found, clips.note or ""


def texts(dataset, **keys):
    return [str(clip.error or clip.text) for clip in read(dataset, **keys)[0]]


def pairs(dataset, **keys):
    """(voice, text) of each clip."""
    return [(clip.voice, clip.text) for clip in read(dataset, **keys)[0]]


def table(folder, text, name="metadata.csv", sounds=("a.wav", "b.wav"), encoding="utf-8"):
    """A table, and empty files in place of recordings."""
    for path in (folder / sound for sound in (name, *sounds)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / name).write_bytes(text.encode(encoding))
    return folder


def refusal(dataset, **keys):
    with pytest.raises(UserError) as caught:
        read(dataset, **keys)
    line = str(caught.value)
    assert "\n" not in line and Path(dataset).name in line
    return line


def to_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(rows).to_parquet(path)


# ---------------------------------------------------------------- csv, tsv, LJSpeech


@pytest.mark.parametrize(
    "text",
    [
        "file_name,text,voice\na.wav,one,x\nb.wav,two,y\n",
        "File_Name, Text, Voice\na.wav, one, x\nb.wav, two, y\n",
        "File Name;Text;Voice\r\na.wav;one;x\r\nb.wav;two;y\r\n",
        "file-name\tTEXT\tvoice\na.wav\tone\tx\nb.wav\ttwo\ty",
        "audio_file|text|speaker_name\na.wav|one|x\nb.wav|two|y\n",
        '"file_name","text","voice"\n"a.wav","one","x"\n"b.wav","two","y"\n',
        "\n\nfile_name,text,voice,,\na.wav,one,x,,\nb.wav,two,y,,\n",
        "\ufefffile_name;notes, and more;text;speaker\na.wav;;one;x\nb.wav;;two;y\n",
        "wav,transcript,spk_id\n.\\a.wav,one,x\n.\\b.wav,two,y\n",
    ],
)
def test_separators_and_headers(text, tmp_path):
    clips, _ = read(table(tmp_path, text))
    assert [(c.audio, c.text, c.voice) for c in clips] == [
        (tmp_path / "a.wav", "one", "x"),
        (tmp_path / "b.wav", "two", "y"),
    ]


@pytest.mark.parametrize(
    "text, line",
    [
        (
            "a.wav,one\nb.wav,two",
            "no header with known columns in the first line (a.wav,one); add one such as",
        ),
        (
            "clip;words spoken\na.wav;one",
            "there are: clip, words spoken; name it with --text_column",
        ),
        ("utterance,mood\none,sad", "no column is known to hold the audio"),
        ("", "no rows in it"),
        ("file_name,text", "no rows in it"),
        ("file_name,text,Text\na.wav,one,two", "two columns are named text"),
        ('file_name,text\na.wav,"one" two, three\n', "line 2: not a csv table"),
        ('file_name,text\na.wav,"one\nb.wav,two, three"\n', "line 2: a quote that opens"),
        ("file_name,text\na.wav," + "x" * 131_073, "line 2: not a csv table: field larger"),
        ("a|hello my dear friend|anna\nb|hello again|ben", "add a header line such as"),
        ("a|one|x|english\nb|two|y|english", "4 columns and no header"),
    ],
)
def test_tables_that_are_refused(text, line, tmp_path):
    assert line in refusal(table(tmp_path, text))


def test_another_encoding(tmp_path):
    text = "file_name,text\na.wav,fünf"
    assert "UTF-16; save it as UTF-8" in refusal(table(tmp_path, text, encoding="utf-16"))
    assert "cannot be read as UTF-8" in refusal(table(tmp_path, text, encoding="latin-1"))


QUOTES = {  # a table: its texts
    # a quote that opens in one row and closes in a later one
    'path\tsentence\tup\na.wav\t"We are late,\t2\nb.wav\tsaid\t0\nc.wav\tthe boy."\t2\n': [
        '"We are late,',
        "said",
        'the boy."',
    ],
    'sentence\tpath\n"We are late,\ta.wav\nsaid the boy."\tb.wav\n': [
        '"We are late,',
        'said the boy."',
    ],
    'file_name;text\na.wav;"We are late\nb.wav;said the boy."\n': [
        '"We are late',
        'said the boy."',
    ],
    'id,text\na,"We are late\nb,said the boy."\n': ['"We are late', 'said the boy."'],
    # a quote that closes within a text, or never; cells that are quoted as a whole
    'path\tsentence\na.wav\t"Late?" he said.\nb.wav\t"He said ""no"""\n': [
        '"Late?" he said.',
        'He said "no"',
    ],
    'path,sentence\na.wav,"Late\nb.wav,two\n': ['"Late', "two"],
    # quotes of csv
    'path,text\na.wav,"one,\ntwo, three"\nb.wav,"a ""b"" c"\n': ["one,\ntwo, three", 'a "b" c'],
    'text,path\n"one\ntwo",a.wav\n': ["one\ntwo"],
}


@pytest.mark.parametrize("text", QUOTES)
def test_quotes_swallow_no_rows(text, tmp_path):
    clips, note = read(table(tmp_path, text, "list.tsv") / "list.tsv")
    assert [clip.text for clip in clips] == QUOTES[text]
    assert ("ordinary characters" in note) == (not text.startswith(("path,text", "text,path")))


def test_lines_are_counted_from_the_first(tmp_path):
    table(tmp_path, '\n\nfile_name,text\na.wav,"one\ntwo"\n../b.wav,three\na.wav,x,y\n')
    (_, outside, surplus), _ = read(tmp_path)
    assert outside.source == "metadata.csv row 6" and "outside the dataset's" in str(outside.error)
    assert surplus.source == "metadata.csv row 7" and "more columns" in str(surplus.error)


@pytest.mark.parametrize(
    "name, file",
    [
        ("a1", "wavs/a1.wav"),
        ("a1", "wav/a1.WAV"),
        ("a1.wav", "audio/a1.wav"),
        ("a1.mp3", "clips/a1.flac"),
        ("a1.wav", "a1.WAV"),
        ("a.1", "wavs/a.1.wav"),
        ("wavs/a1", "wavs/a1.flac"),
        ("cafe\u0301", "wavs/caf\u00e9.wav"),
    ],
)
def test_id_and_text_find_their_file(name, file, tmp_path):
    table(tmp_path, f"{name}|one, two\n{name}|three", sounds=[file])
    clips, _ = read(tmp_path)
    assert [c.audio.is_file() and c.text for c in clips] == ["one, two", "three"], clips


def test_the_third_column_of_ljspeech(tmp_path):
    table(tmp_path, "a | Dr. Who was 9 | Doctor Who was nine\nb|He left.|\nb|He left.|He left.\n")
    clips, note = read(tmp_path)
    assert [clip.text for clip in clips] == ["Doctor Who was nine", "He left.", "He left."]
    assert note == "metadata.csv has no header; its third column holds the texts"
    assert texts(tmp_path, text_column="text")[0] == "Dr. Who was 9"
    table(tmp_path, "a|hello my dear friend|anna\nb|good day to you|anna\n")
    assert texts(tmp_path, text_column="text") == ["hello my dear friend", "good day to you"]
    table(tmp_path, "a|one day|\nb|two days|\n")
    assert texts(tmp_path) == ["one day", "two days"]
    table(tmp_path, "b|two\na\nb|one|two|three\na|text|four\n")
    assert texts(tmp_path)[0] == "two" and "more columns" in texts(tmp_path)[2]


# ---------------------------------------------------------------- columns


def test_columns_of_voices(tmp_path):
    names = "speaker voice source speaker_id speaker_name spk_id client_id speakerID speaker_ids "
    names += "Speaker spk narrator reader_id voice_name SpeakerLabel"
    for name in names.split():
        folder_of(tmp_path, [("a.wav", "one", "7"), ("b.wav", "two", "y")], ("path", "text", name))
        assert [clip.voice for clip in read(tmp_path)[0]] == ["7", "y"], name


def test_which_of_several_columns(tmp_path):
    names = (
        "id",
        "path",
        "text",
        "speaker_gender",
        "source",
        "speaker_id",
        "speaker_name",
        "audio",
    )
    rows = [("1", "x", "one", "f", "x.mp3", "3", "anna", "a.wav")]
    clips, note = read(table(folder_of(tmp_path, rows, names), "", "a.wav", ()))
    assert clips[0].audio == tmp_path / "a.wav" and clips[0].voice == "anna"
    assert note == "column speaker_name has the voices"


def test_columns_of_audio_and_text(tmp_path):
    sounds = "audio file_name audio_file audio_filepath file filename wav path audio_path"
    said = "text sentence transcript transcription text_normalized normalized normalized_text"
    for names in itertools.product(sounds.split(), said.split()):
        assert texts(folder_of(tmp_path, [("a.wav", "one")], names)) == ["one"], names


def test_columns_can_be_named(tmp_path):
    folder_of(tmp_path, [("a.wav", "one", "no", "x")], ("sound", "said", "text", "who"))
    names = {"audio_column": "Sound", "text_column": "said", "voice_column": "who"}
    assert pairs(tmp_path, **names) == [("x", "one")]
    line = refusal(tmp_path, **names | {"text_column": "spoke"})
    assert "no column spoke; there are: said, sound, text, who" in line


# ---------------------------------------------------------------- voices in the texts


@pytest.mark.parametrize(
    "given, voice, wanted",
    [
        # all begin with a voice: that is the voice, whatever --voice says
        (["tara: one day", "leo: two: three", "leo: four"], None, "tara leo leo"),
        (["tara: one day", "leo: two: three", "leo: four"], "zoe", "tara leo leo"),
        # the row's own voice is taken off, in any of them
        (["tara: one day", "two days", "Tara: four"], "tara", "tara - Tara"),
        # what merely contains a colon stays
        (["Note: this", "one day", "At 10:30 we left: all of us"], None, "- - -"),
        (["Note: this", "tara: one day", "two"], "tara", "- tara -"),
        (["He said: no", "She said: yes"], None, "- -"),
        (["Mary Ann: no", "Mary Ann: yes", "Mary Ann: well"], None, "Mary_Ann Mary_Ann Mary_Ann"),
        (["http://a.b", "10:30"], None, "- -"),
        ([f"w{n}: one day" for n in range(20)], None, "- " * 20),  # headwords
    ],
)
def test_voices_before_the_texts(given, voice, wanted, tmp_path):
    rows = [{"path": "a.wav", "text": text} for text in given]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    clips, note = read(tmp_path / "list.jsonl", voice=voice or "null")
    for clip, text, name in zip(clips, given, wanted.split(), strict=True):
        assert clip.text.strip() == (text if name == "-" else text.split(": ", 1)[1])
        assert clip.voice == (None if name == "-" or voice == "tara" else name.replace("_", " "))
    assert bool(note) == (wanted.strip(" -") != "")


def test_a_row_s_own_voice_before_its_text(tmp_path):
    rows = [("a.wav", "tara: one: two", "tara"), ("b.wav", "leo: three", "tara")]
    clips, note = read(folder_of(tmp_path, rows))
    assert [c.text.strip() for c in clips] == ["one: two", "leo: three"] and "taken off" in note


# ---------------------------------------------------------------- parts of recordings, samples


@pytest.mark.parametrize(
    "names, times, wanted",
    [
        ("offset duration", (1.5, 2), (1.5, 2)),
        ("start end", ("1.5", "3.5"), (1.5, 2)),
        ("start_time end_time", ("0:01.5", "0:03.5"), (1.5, 2)),
        ("start_ms end_ms", (1500, 3500), (1.5, 2)),
        ("duration words_per_minute", (2, 3), (0, None)),
        ("start duration", (None, None), (0, None)),
        ("start end", (3, 2), "end comes before start"),
        ("start end", ("x", 2), "start is 'x', not seconds"),
    ],
)
def test_a_part_of_a_recording(names, times, wanted, tmp_path):
    row = {"audio_filepath": "a.wav", "text": "one"} | dict(zip(names.split(), times, strict=True))
    (tmp_path / "manifest.json").write_text(json.dumps(row) + "\n" + json.dumps(row))
    (clip, _), note = read(tmp_path / "manifest.json")
    if isinstance(wanted, str):
        assert wanted in str(clip.error)
    else:
        assert (clip.start, clip.duration) == pytest.approx(wanted)
        assert ("begin in their recordings" in note) == ("start" in names or "offset" in names)


def test_samples_that_are_decoded_already(tmp_path):
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, 8000)
    whole, rate = {"array": sound.tolist(), "sampling_rate": 16_000}, {"sr": 16_000}
    rows = [
        {"audio": whole, "text": "dict"},
        {"audio": sound.tolist(), "text": "list"} | rate,
        {"audio": (sound * 32768).astype(int).tolist(), "text": "int16"} | rate,
        {"audio": np.stack([sound, sound]).tolist(), "text": "stereo"} | rate,
    ]
    chosen = settings(tmp_path)
    for n, row in enumerate(rows):
        (tmp_path / f"{n}.jsonl").write_text(json.dumps(row))
        to_parquet(tmp_path / f"{n}.parquet", {name: [value] for name, value in row.items()})
        for kind in ("jsonl", "parquet"):
            (clip,), _ = read(tmp_path / f"{n}.{kind}")
            _, measured = measure_clip(clip.audio, chosen)
            assert (measured.rate, measured.seconds) == (16_000, 0.5), clip.text
            assert measured.level == pytest.approx(20 * np.log10(sound.std()), abs=0.5)
    (tmp_path / "a.jsonl").write_text(json.dumps({"audio": [0.1] * 99, "text": "one"}))
    assert texts(tmp_path / "a.jsonl") == ["samples without their rate; add a column sampling_rate"]


# ---------------------------------------------------------------- what datasets reads


@pytest.fixture(scope="module")
def hub_folders(tmp_path_factory):
    """Folders as `hf download` leaves them: splits; two configs."""
    home = tmp_path_factory.mktemp("hub")
    two_clips(home)
    sound = {"bytes": (home / "a.wav").read_bytes(), "path": "a.wav"}

    def write(path, *words):
        rows = Dataset.from_dict({"audio": [sound] * len(words), "text": words})
        path.parent.mkdir(parents=True, exist_ok=True)
        rows.cast_column("audio", Audio(decode=False)).to_parquet(path)

    write(home / "splits/data/train-00000-of-00002.parquet", "one", "two")
    write(home / "splits/data/train-00001-of-00002.parquet", "three", "four")
    write(home / "splits/data/validation-00000-of-00001.parquet", "five")
    write(home / "splits/data/test-00000-of-00001.parquet", "six")
    readme = "---\nconfigs:\n"
    for name in ("de", "en"):
        write(home / f"configs/{name}/train-0.parquet", f"{name} one")
        write(home / f"configs/{name}/test-0.parquet", f"{name} two")
        readme += f"- config_name: {name}\n  data_files:\n"
        for split in ("train", "test"):
            readme += f"  - split: {split}\n    path: {name}/{split}-*\n"
    (home / "configs/README.md").write_text(readme + "---\n")
    return home


def test_splits_of_a_downloaded_folder(hub_folders):
    folder = hub_folders / "splits"
    assert texts(folder) == ["one", "two", "three", "four"]
    assert texts(folder, dataset_split="test") == ["six"]
    assert texts(folder, dataset_split="train[1:3]") == ["two", "three"]
    assert texts(folder, dataset_split="train[1:3]", limit=1) == ["two"]
    assert texts(folder, dataset_split="train[-25%:]") == ["four"]
    assert read(folder)[0][0].audio.startswith(b"RIFF")
    assert "no split dev; there are: train, validation, test" in refusal(
        folder, dataset_split="dev"
    )
    assert "dataset_split cannot be train[x]" in refusal(folder, dataset_split="train[x]")


def test_configs_of_a_downloaded_folder(hub_folders):
    folder = hub_folders / "configs"
    assert texts(folder, dataset_config="en") == ["en one"]
    assert texts(folder, dataset_config="en", dataset_split="test") == ["en two"]
    assert "['de', 'en']; set --dataset_config" in refusal(folder)
    assert "'fr' not found. Available: ['de', 'en']; set" in refusal(folder, dataset_config="fr")


def test_splits_and_configs_of_our_own_forms(tmp_path):
    for name in ("de/train", "de/test", "en/train"):
        table(tmp_path / name, f"file_name,text\na.wav,{name} one\nb.wav,{name} two\n")
    table(tmp_path / "tables", "path\tsentence\nc.mp3\tone\n", "train.tsv", ["clips/c.mp3"])
    table(tmp_path / "tables", "path\tsentence\nc.mp3\ttwo\n", "test.tsv")
    de = {"dataset_config": "de"}
    table(tmp_path / "data/test", "file_name,text\na.wav,three\n")
    assert texts(tmp_path, dataset_split="test") == ["three"]
    assert texts(tmp_path, **de) == ["de/train one", "de/train two"]
    assert texts(tmp_path, **de, dataset_split="test[1:]") == ["de/test two"]
    assert texts(tmp_path / "en", dataset_split="train[:50%]") == ["en/train one"]
    assert texts(tmp_path / "tables", dataset_split="test") == ["two"]
    (clip,), _ = read(tmp_path / "tables")
    assert clip.audio == tmp_path / "tables/clips/c.mp3"
    assert "no configuration fr" in refusal(tmp_path, dataset_config="fr")
    assert "no split test" in refusal(tmp_path / "en", dataset_split="test")
    assert "no split dev" in refusal(tmp_path / "en/train", dataset_split="dev")


def test_save_to_disk(tmp_path):
    two_clips(tmp_path)
    rows = {"audio": [str(tmp_path / "a.wav")] * 2, "text": ["one", "two"], "speaker": ["x", "y"]}
    rows = Dataset.from_dict(rows).cast_column("audio", Audio(decode=False))
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "parts")
    assert pairs(tmp_path / "one", absolute_paths=True) == [("x", "one"), ("y", "two")]
    assert pairs(tmp_path / "parts", dataset_split="test", absolute_paths=True) == [("y", "two")]
    assert "no split dev; there are: train, test" in refusal(
        tmp_path / "parts", dataset_split="dev"
    )


def test_json(tmp_path):
    rows = [{"audio": "a.wav", "text": "2020-01-01"}, {"audio": "b.wav", "text": 7, "voice": "x"}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    assert texts(tmp_path / "a.json") == ["2020-01-01", "7"]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    assert pairs(tmp_path) == [(None, "2020-01-01"), ("x", "7")]
    for text, line in (
        ("[1]\n", "row 1: not an object"),
        ("\n\n{", "row 3: not an object"),
        ("7", "row 1"),
    ):
        (tmp_path / "b.jsonl").write_text(text)
        assert line in refusal(tmp_path / "b.jsonl")


def test_parquet_that_cannot_be_read(tmp_path):
    rows = {"audio": ["a.wav"] * 500, "text": [f"text {n} " + "x" * 99 for n in range(500)]}
    path = tmp_path / "damaged/a.parquet"
    path.parent.mkdir()
    pandas.DataFrame(rows).to_parquet(path, compression=None, row_group_size=100)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 9000] = bytes(9000)
    path.write_bytes(data)
    assert "damaged: cannot be read: " in refusal(path.parent)
    path.write_bytes(b"PAR1")
    assert "cannot be read: Parquet file size is 4 bytes" in refusal(path)
    to_parquet(tmp_path / "empty/a.parquet", {"audio": [], "text": []})
    assert "no rows in it" in refusal(tmp_path / "empty")
    to_parquet(tmp_path / "other/a.parquet", {"audio": ["a.wav"], "text": ["one"]})
    to_parquet(tmp_path / "other/b.parquet", {"audio": ["a.wav"], "said": ["one"]})
    assert "columns differ from those of a.parquet: said, text" in refusal(tmp_path / "other")


def test_a_hub_dataset(hub_folders, tmp_path, monkeypatch):
    """The hub is a folder here: with a limit it is streamed, else its files are downloaded."""
    asked, load = [], datasets.load_dataset_builder
    folder = {"me/speech": hub_folders / "splits", "me/loose": tmp_path}

    def load_builder(name, config=None, revision=None, **how):
        return load(str(folder.get(name, name)), config, **how)

    def download(name, **how):
        asked.append((name, how))
        if name not in folder:
            raise FileNotFoundError(name)
        return str(folder[name])

    monkeypatch.setattr(datasets, "load_dataset_builder", load_builder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert texts("me/speech", limit=3, dataset_split="train[1:]") == ["two", "three", "four"]
    assert not asked
    assert texts("me/speech", dataset_split="test") == ["six"]
    table(tmp_path, "file_name,text\na.wav,one\nb.wav,two\n")
    assert texts("me/loose", limit=1) == ["one"]  # an AudioFolder, which is never streamed
    patterns = [how["allow_patterns"] for _, how in asked]
    assert len(patterns[0]) == 2 and patterns[1] is None
    assert "cannot be read: " in refusal("me/nothing")


def test_keys_of_the_hub(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nothing")
    assert "a single audio file; set --dataset to" in refusal(noise(tmp_path / "a.wav"))


# ---------------------------------------------------------------- audio and text side by side


def test_pairs_and_their_folders(tmp_path):
    for name in ("10", "9", "._9"):
        table(tmp_path / "one/wavs", name, f"{name}.txt", [f"{name}.wav"])
    clips, note = read(tmp_path / "one")
    assert [(c.source, c.voice) for c in clips] == [("wavs/9.wav", None), ("wavs/10.wav", None)]
    assert not note
    table(tmp_path / "x/anna", "one", "001.lab", ["001.wav"])
    table(tmp_path / "x/anna", "9", "002.txt", ["002.WAV", "003.wav"])
    table(tmp_path / "x/anna", "nine", "002.normalized.txt", ())
    table(tmp_path / "x/ben/b1", "four", "1.2.txt", ["1.2.flac"])
    assert pairs(tmp_path / "x") == [
        ("anna", "one"),
        ("anna", "nine"),
        (None, None),
        ("ben", "four"),
    ]
    assert "voices (anna, ben)" in read(tmp_path / "x")[1]
    assert "003.txt: cannot be read: No such file" in texts(tmp_path / "x")[2]


@pytest.mark.parametrize(
    "names, line",
    [
        ("a.flac texts.csv", "texts.csv is its table, give that as --dataset"),
        ("de/metadata.csv en/metadata.csv de/a.wav", "de/metadata.csv is its table"),
        ("wav.scp text a.flac", "*.scp (as wav.scp)"),
        ("84/12/84_12.trans.txt 84/12/84_12_1.flac", "*.txt (as 84/12/84_12.trans.txt)"),
        ("txt/p1/p1_001.txt wav48/p1/p1_001_mic1.flac", "*.flac (as wav48/p1/p1_001_mic1.flac)"),
        ("vocal.list a.wav", "vocal.list is its table"),
        ("list.xlsx a.wav", "*.xlsx (as list.xlsx)"),
    ],
)
def test_a_folder_in_no_known_form(names, line, tmp_path):
    table(tmp_path, "", names.split()[0], names.split())
    assert line in refusal(tmp_path)


# ---------------------------------------------------------------- to rows


BAD = {  # file_name, text: what the report says
    ("gone.wav", "one"): "gone.wav does not exist",
    ("words.wav", "one"): "words.wav",
    ("nothing.wav", "one"): "nothing.wav",
    ("cut.flac", "one"): "cut.flac",
    ("folder.wav", "one"): "folder.wav is a folder",
    ("none.wav", "one"): "no samples in it",
    ("silent.wav", "one"): "silent throughout",
    ("../good.wav", "one"): "is outside the dataset's folder",
    ("..\\good.wav", "one"): "is outside the dataset's folder",
    ("/etc/hostname", "one"): "is outside the dataset's folder",
    ("https://example.org/a.wav", "one"): "does not exist",
    ("b" * 5000, "one"): "does not exist",
    ("", "one"): "no sound is named",
    (None, "one"): "no sound is named",
    (7, "one"): "no sound is named",
    ("good.wav", ""): "the text is empty",
    ("good.wav", None): "the text is empty",
    ("good.wav", float("nan")): "the text is empty",
    ("good.wav", " \t\n\u3000"): "the text is empty",
    ("good.wav", ("one",)): "holds list, not text",
    ("good.wav", True): "holds bool, not text",
    ("good.wav", "?!…"): "nothing to speak",
    ("good.wav", "\U0001f600"): "nothing to speak",
    ("good.wav", "\x1b[1mone"): "a control character: ",
}
GOOD = {  # file_name: text
    "8bit.wav": "one",
    "mp3_inside.wav": "four",
    "stereo.flac": "five",
    "na\u0131\u0308ve caf\u00e9.wav": "cafe\u0301",
    "cafe\u0301.wav": "caf\u00e9",
    "rtl.wav": "\u200f\u05e9\u05dc\u05d5\u05dd\u200f",
    "number.wav": 7,
    "emoji.wav": "\U0001f600 <laugh>",
}


def plant(folder):
    """The files that BAD and GOOD name."""
    (folder / "words.wav").write_text("no audio")
    (folder / "nothing.wav").touch()
    noise(folder / "cut.flac")
    (folder / "cut.flac").write_bytes((folder / "cut.flac").read_bytes()[:40])
    (folder / "folder.wav").mkdir()
    soundfile.write(folder / "none.wav", np.zeros(0), 24_000)
    soundfile.write(folder / "silent.wav", np.zeros(9999), 24_000)
    noise(folder / "good.wav", seed=99)
    for seed, name in enumerate(GOOD):
        how = {"format": "MP3"} if name == "mp3_inside.wav" else {}
        on_disk = unicodedata.normalize("NFC", name) if seed % 2 else name
        noise(folder / on_disk, 0.5, 24_000, 2 if "stereo" in name else 1, seed, **how)


def test_planted_faults(tmp_path, tokenizer, codec, ids):
    """Each is left out by name and reason, and every good clip gives the row it gives alone."""
    folder = tmp_path / "set"
    folder.mkdir()
    noise(tmp_path / "good.wav")
    plant(folder)
    both = itertools.zip_longest(BAD, GOOD.items())
    rows = [{"file_name": n, "text": t} for pair in both for n, t in filter(None, pair)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made, report = rows_of(folder, tokenizer)
    faults = dict(fault.split(": ", 1) for fault in report.left_out)
    wanted = iter(BAD.values())
    for n, row in enumerate(rows, 1):
        if row["file_name"] not in GOOD:
            fault = faults.pop(f"metadata.jsonl row {n}")
            assert next(wanted) in fault and "\n" not in fault, (row, fault)
    assert not faults and [row["text"] for row in made] == [str(text) for text in GOOD.values()]
    chosen = settings(folder)
    for row, name in zip(made, GOOD, strict=True):
        forms = (folder / unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
        path = next(path for path in (folder / name, *forms) if path.is_file())
        audio, _ = measure_clip(path, chosen)
        codes = codes_to_ids(orpheus.codec.encode(codec, [audio])[0], ids)
        assert (row["input_ids"][-2 - len(codes) : -2] == codes).all(), name


def test_voices_and_texts_in_prompts(tmp_path, tokenizer, ids):
    parquet_with_bytes(tmp_path)
    rows, report = rows_of(tmp_path, tokenizer)
    assert report.left_out == [] and report.voices == {"x": 1, "y": 1}
    for row, (text, voice) in zip(rows, (("one", "x"), ('two, "three" four', "y")), strict=True):
        prompt = prompt_ids(tokenizer, ids, text, voice)
        assert row["input_ids"][: len(prompt)].tolist() == prompt


def test_names_that_are_no_utf_8(tmp_path, tokenizer):
    """They are printed and saved with a question mark, and do not end the run."""
    two_clips(tmp_path, ("a.wav", "b.wav"))
    (tmp_path / "a.wav").rename(tmp_path / os.fsdecode(b"f\xfcnf.wav"))
    (tmp_path / "b.wav").rename(tmp_path / os.fsdecode(b"\xfc.wav"))
    (tmp_path / os.fsdecode(b"f\xfcnf.txt")).write_text("five")
    rows, report = rows_of(tmp_path, tokenizer)
    report.save(tmp_path / "out")
    assert len(rows) == 1 and "?.txt: cannot be read" in report.left_out[0]


def test_absolute_paths_on_request(tmp_path):
    table(tmp_path / "sounds", "")
    folder_of(tmp_path / "set", [(str(tmp_path / "sounds/a.wav"), "one", "x")])
    assert "outside the dataset's folder" in texts(tmp_path / "set")[0]
    (clip,), _ = read(tmp_path / "set", absolute_paths="true")
    assert clip.audio == tmp_path / "sounds/a.wav"
