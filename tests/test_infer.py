"""infer.py: ids, slots, codec, settings, speaking, and a person's mistakes."""

import itertools
import json
import os
import random
import re
import resource
import shutil
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import one_line, script
from snac import SNAC

import infer
import orpheus.codec
import orpheus.options
from orpheus.audio import audio_file, read_audio
from orpheus.codec import LOOKAHEAD, encode
from orpheus.generation import SlotProcessor, generate
from orpheus.hub import fetch
from orpheus.models import load_model, load_tokenizer
from orpheus.options import read_texts
from orpheus.run_info import load_run_info
from orpheus.runs import SAVED_CONFIG, SAVED_REPORT
from orpheus.settings import RUN_KEYS, UserError, read_settings
from orpheus.tokens import (
    FRAME_SAMPLES,
    SpeechIds,
    codes_to_ids,
    ids_to_codes,
    prompt_ids,
    read_speech_ids,
    read_tokens,
    whole_frames,
)


def test_true_orpheus_ids():
    """A tokenizer with Orpheus's names at Orpheus's places gives the ids of its published table."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"word{n}": n for n in range(128_256)} | {
        f"<custom_token_{n}>": 128_256 + n for n in range(28_684)
    }
    del vocabulary["word128000"], vocabulary["word128009"]
    vocabulary |= {"<|begin_of_text|>": 128_000, "<|eot_id|>": 128_009}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token="word0"))
    ids = read_speech_ids(PreTrainedTokenizerFast(tokenizer_object=whole))
    assert ids._asdict() == {
        "bos": 128_000, "eot": 128_009, "sos": 128_257, "eos": 128_258, "soh": 128_259,
        "eoh": 128_260, "soa": 128_261, "eoa": 128_262, "pad": 128_263, "audio": 128_266,
        "codebook_size": 4096,
    }  # fmt: skip


def test_tokenizer_without_orpheus_tokens_is_refused(tokenizer):
    with pytest.raises(UserError, match="no token <custom_token_28681>"):
        read_speech_ids(tokenizer, 4096)


def literal_ids(first, second, third, audio, size):
    """The layout, written down frame by frame as Orpheus's own trainer does."""
    out = []
    for i in range(len(first)):
        out.append(audio + first[i])
        out.append(audio + second[2 * i] + size)
        out.append(audio + third[4 * i] + 2 * size)
        out.append(audio + third[4 * i + 1] + 3 * size)
        out.append(audio + second[2 * i + 1] + 4 * size)
        out.append(audio + third[4 * i + 2] + 5 * size)
        out.append(audio + third[4 * i + 3] + 6 * size)
    return out


class LevelsCodec:
    """Stands where SNAC stands, to see what reaches it and to give out known levels."""

    def __init__(self, levels):
        self.levels = levels

    def parameters(self):
        yield torch.zeros(1)

    def encoder(self, audio):
        return audio[..., ::512]

    def quantizer(self, latents):
        assert latents.shape[-1] == self.levels[2].shape[-1]  # the zeros' are cut off
        return latents, self.levels

    def decode(self, levels):
        self.decoded = levels
        return torch.zeros(1, 1, 1)


def test_layout_equals_the_literal_loop():
    draw = np.random.default_rng(0)
    first, second, third = (draw.integers(0, 4096, 13 * n) for n in (1, 2, 4))
    first[0], third[5], second[1] = 0, 4095, 0
    codec = LevelsCodec([torch.from_numpy(x)[None] for x in (first, second, third)])
    codes = encode(codec, [np.zeros(13 * FRAME_SAMPLES, np.float32)])[0]
    ids = SpeechIds(*range(8), 0, 128_266, 4096)
    assert codes_to_ids(codes, ids).tolist() == literal_ids(first, second, third, 128_266, 4096)
    orpheus.codec.decode(codec, codes)
    for level, expected in zip(codec.decoded, (first, second, third), strict=True):
        assert level[0].tolist() == expected.tolist()


def test_codes_round_trip_with_the_extremes(ids):
    codes = np.random.default_rng(1).integers(0, ids.codebook_size, (50, 7))
    codes[0], codes[1] = 0, ids.codebook_size - 1
    assert (ids_to_codes(codes_to_ids(codes, ids), ids) == codes).all()


def test_a_wrong_slot_is_told_by_place(ids):
    speech = codes_to_ids(np.zeros((3, 7), int), ids)
    speech[9], speech[10] = speech[10], speech[9]
    with pytest.raises(UserError, match=r"position 9 \(frame 1, slot 2\) belongs in slot 3"):
        ids_to_codes(speech, ids)
    speech[3] = ids.eos
    with pytest.raises(UserError, match=r"position 3 \(frame 0, slot 3\) is no audio id"):
        ids_to_codes(speech, ids)
    with pytest.raises(UserError, match="20 audio ids are no whole frames"):
        ids_to_codes(speech[:20], ids)


def test_encode_is_the_same_alone_and_in_any_batch(codec):
    draw = np.random.default_rng(2)
    lengths = [1, 2047, 2048, 2049, 30_000, 61_440]
    clips = [draw.normal(0, 0.1, n).astype(np.float32) for n in lengths]
    alone = [encode(codec, [clip])[0] for clip in clips]
    assert [len(codes) for codes in alone] == [1, 1, 1, 2, 15, 30]
    random.Random(0).shuffle(order := list(range(len(clips))))
    together = encode(codec, [clips[n] for n in order])
    for n, codes in zip(order, together, strict=True):
        assert (codes == alone[n]).all(), lengths[n]


def test_the_encoder_sees_as_far_as_encode_adds_zeros():
    """In the full size and the demo's: the samples behind a frame that its codes depend on."""
    for folder, ahead in ("tests/snac_24khz", 4757), ("data/demo/codec", 3888):
        encoder = SNAC.from_config(f"{folder}/config.json").encoder
        audio = torch.randn(1, 1, 7 * FRAME_SAMPLES, requires_grad=True)
        latents = encoder(audio)[..., : 4 * 3]  # three frames
        (slope,) = torch.autograd.grad(latents.square().sum(), audio)
        assert int(slope.nonzero()[-1, 2]) + 1 - 3 * FRAME_SAMPLES == ahead
        assert ahead <= LOOKAHEAD


def test_a_codec_for_speaking_is_snac_bit_for_bit(codec):
    """Weight norm folded, activations in place."""
    plain = SNAC.from_pretrained("data/demo/codec").eval()
    audio = torch.randn(1, 1, 4 * FRAME_SAMPLES) / 10
    with torch.inference_mode():
        levels = plain.encode(audio)
        assert all(a.equal(b) for a, b in zip(codec.encode(audio), levels, strict=True))
        assert codec.decode(levels).equal(plain.decode(levels))


def test_decode_gives_whole_frames_and_repeats(codec):
    codes = np.random.default_rng(3).integers(0, codec.codebook_size, (5, 7))
    audio = orpheus.codec.decode(codec, codes)
    assert audio.shape == (5 * FRAME_SAMPLES,)
    assert (audio == orpheus.codec.decode(codec, codes)).all()


def test_prompt(tokenizer, ids):
    prompt = prompt_ids(tokenizer, ids, "  seven\n two ", "slt")
    words = tokenizer("slt: seven two", add_special_tokens=False)["input_ids"]
    assert prompt == [ids.soh, ids.bos, *words, ids.eot, ids.eoh, ids.soa, ids.sos]
    without = prompt_ids(tokenizer, ids, "seven two")
    assert tokenizer.decode(without[2:-4]) == "seven two"
    with pytest.raises(UserError, match="empty"):
        prompt_ids(tokenizer, ids, " \n")


def test_special_tokens_in_a_text_stay_text(tokenizer, ids):
    prompt = prompt_ids(tokenizer, ids, "a <custom_token_2> b <|eot_id|> <laugh>")
    assert ids.eos not in prompt
    assert prompt.count(ids.eot) == 1


# ---------------------------------------------------------------- speaking


def test_ten_thousand_frames_and_none_illegal(ids):
    """10⁴ constrained frames at a high temperature, drawn through the processor."""
    torch.manual_seed(0)
    processor = SlotProcessor(ids, prompt_length=3)
    vocabulary = ids.audio + 7 * ids.codebook_size
    speech = torch.zeros(600, 3, dtype=torch.long)  # 600 at once, 20 frames each
    ended = torch.zeros(600, dtype=torch.bool)
    for _ in range(20 * 7):
        scores = processor(speech, torch.randn(600, vocabulary) * 3)
        drawn = torch.multinomial(scores.softmax(-1), 1)
        ended |= (drawn == ids.eos)[:, 0]
        speech = torch.cat([speech, drawn], dim=1)
    frames = speech[:, 3:].reshape(-1, 7)
    whole = frames[frames[:, 0] != ids.eos].numpy()
    assert len(whole) > 10_000
    ids_to_codes(whole.reshape(-1), ids)  # raises for any id out of its slot
    assert (frames[:, 1:] != ids.eos).all()
    assert not (speech[:, 3] == ids.eos).any(), "an end before the first frame"


def test_generate_is_repeatable_and_says_when_cut(tokenizer, ids, codec):
    model, _ = load_model("data/demo/base")
    settings = read_settings("data/demo/config.json", {"max_seconds": "0.35"})
    settings.temperature, settings.top_p = 5.0, 1.0
    codes, ended = generate(model, tokenizer, ids, "one two three four", settings, "rms")
    again, _ = generate(model, tokenizer, ids, "one two three four", settings, "rms")
    assert codes.shape == (4, 7) and not ended
    assert (codes == again).all()
    settings.seed = 1
    other, _ = generate(model, tokenizer, ids, "one two three four", settings, "rms")
    assert not np.array_equal(codes, other)


def test_a_hot_generation_has_no_illegal_id(tokenizer, ids):
    model, _ = load_model("data/demo/base")
    hot = {"temperature": "5", "top_p": "1", "max_seconds": "3"}
    settings = read_settings("data/demo/config.json", hot)
    codes, _ = generate(model, tokenizer, ids, "nine", settings, "rms")
    assert len(codes) > 0 and 0 <= codes.min() <= codes.max() < ids.codebook_size


def test_a_gated_model_is_told_in_one_line(monkeypatch):
    import httpx
    import huggingface_hub

    def gated(*_, **__):
        answer = httpx.Response(403, request=httpx.Request("GET", "https://example.org"))
        raise huggingface_hub.errors.GatedRepoError("403", response=answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    with pytest.raises(UserError, match="some/model: gated: accept its terms"):
        fetch("some/model", ["*"])


def test_text_longer_than_the_context_is_refused(tokenizer, ids):
    model, _ = load_model("data/demo/base")
    settings = read_settings("data/demo/config.json")
    with pytest.raises(UserError, match="no room for a frame"):
        generate(model, tokenizer, ids, "seven " * 3000, settings)


# ---------------------------------------------------------------- settings


def test_settings_layers(tmp_path):
    config = tmp_path / "mine.json"
    config.write_text('{"lora_r": 8, "temperature": 1}')
    overrides = {"lora_r": "32", "sample_texts": '["a", "b"]', "limit": "null", "voice": "7"}
    settings = read_settings(config, overrides)
    assert (settings.lora_r, settings.temperature, settings.limit) == (32, 1.0, None)
    assert (settings.sample_texts, settings.voice) == (["a", "b"], "7")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"lora_r": "many"}, "lora_r"),
        ({"lora_r": True}, "lora_r"),
        ({"lora_r": 0}, "lora_r is 0: Input should be greater than 0"),
        ({"train_on": "txt"}, "train_on"),
        ({"sample_texts": "one"}, "sample_texts"),
        ({"top_p": 1.5}, "top_p"),
        ({"overwrite": 1}, "overwrite"),
    ],
)
def test_wrong_values_are_named(tmp_path, values, line):
    config = tmp_path / "mine.json"
    config.write_text(json.dumps(values))
    with pytest.raises(UserError, match=line) as caught:
        read_settings(config)
    assert "mine.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff", '{"lora_r": 8,}'])
def test_a_config_that_is_no_json_object(tmp_path, text):
    config = tmp_path / "mine.json"
    config.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"mine\.json: (not JSON|must be)"):
        read_settings(config)


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("infer.py", "--out"),
        ("-m orpheus.merge", "--codec"),
        ("-m orpheus.page", "--blind"),
        ("finetune.py", "--config"),
        ("data/prepare.py", "--config"),
    ],
)
def test_help_imports_no_heavy_library(name, option):
    """So that it answers at once: each of these takes seconds to import."""
    code, printed, times = script("-X", "importtime", *name.split(), "--help")
    assert code == 0 and option in printed
    imported = {line.split("|")[-1].strip() for line in times.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "trl", "datasets", "unsloth", "peft", "snac"}


def test_wav_and_tokens(tmp_path, ids, codec):
    recording = tmp_path / "in.wav"
    soundfile.write(recording, np.random.default_rng(4).normal(0, 0.1, (22_050, 2)), 22_050)
    words = ["--model", "data/demo/base", "--codec", "data/demo/codec"]
    code, printed, errors = script(
        "infer.py", "--wav", recording, *words, "--out", tmp_path / "heard.wav"
    )
    assert code == 0, errors
    assert "12 frames" in printed
    heard, rate = soundfile.read(tmp_path / "heard.wav", dtype="float32")
    assert (len(heard), rate) == (12 * 2048, 24_000)
    codes = encode(codec, [read_audio(recording)[0]])[0]
    assert abs(orpheus.codec.decode(codec, codes) - heard).max() < 1e-3  # 16-bit wav

    speech = [ids.sos, *codes_to_ids(codes, ids).tolist(), ids.eos, ids.eoa]
    names = "".join(f"<custom_token_{n - ids.audio + 10}>" for n in speech[1:-2])
    for n, text in enumerate([json.dumps(speech), " ".join(map(str, speech)), names]):
        (tmp_path / "ids").write_text(text)
        read = read_tokens(tmp_path / "ids", load_tokenizer("data/demo/base"), codec.codebook_size)
        assert (read == codes).all(), n
    code, _, errors = script(
        "infer.py", "--tokens", tmp_path / "ids", *words, "--out", tmp_path / "ids.wav"
    )
    assert code == 0, errors
    assert (soundfile.read(tmp_path / "ids.wav", dtype="float32")[0] == heard).all()


def test_lines_of_a_file_in_order(tmp_path, finished):
    lines = tmp_path / "lines.txt"
    lines.write_text("seven two\n\nnine\n")
    out, _ = finished
    code, printed, errors = script(
        "infer.py",
        "--file",
        lines,
        "--model",
        out,
        "--out",
        tmp_path / "said",
        "--max_seconds",
        "1",
    )
    assert code == 0, errors
    assert [line.split()[0][-7:] for line in printed.splitlines()[1:]] == ["001.wav", "002.wav"]
    assert sorted(p.name for p in (tmp_path / "said").iterdir()) == ["001.wav", "002.wav"]


def frames_one_by_one(speech, ids):
    """An independent account of whole_frames: reads on, and begins anew at each id of slot 0."""
    frames, frame, left_out = [], [], []
    for place, number in enumerate(speech):
        slot, code = divmod(number - ids.audio, ids.codebook_size)
        if slot != len(frame):  # not the id that comes next: what was begun is no frame
            left_out += [at for at, _ in frame]
            frame = []
        if slot == len(frame):
            frame.append((place, code))
        else:
            left_out.append(place)
        if len(frame) == 7:
            frames.append([code for _, code in frame])
            frame = []
    return frames, sorted(left_out + [at for at, _ in frame])


def test_every_whole_frame_of_unconstrained_ids_is_decoded(ids):
    """Frames with ids missing, doubled, swapped or foreign: what is whole is found, as above."""
    random = np.random.default_rng(0)
    for _ in range(200):
        codes = random.integers(0, ids.codebook_size, (random.integers(0, 9), 7))
        speech = codes_to_ids(codes, ids).tolist()
        for _ in range(random.integers(0, 4)):
            at = int(random.integers(0, len(speech) + 1))
            kind = random.integers(0, 3)
            if kind == 0:
                del speech[at : at + 1]
            else:
                foreign = int(random.integers(0, ids.audio + 8 * ids.codebook_size))
                speech.insert(at, speech[at - 1] if kind == 1 and speech else foreign)
        found, left_out = whole_frames(np.array(speech, dtype=np.int64), ids)
        frames, expected = frames_one_by_one(speech, ids)
        assert found.tolist() == frames and left_out.tolist() == expected


def test_a_broken_frame_as_orpheus_writes_it(tmp_path, capsys):
    """The dump begins with tokens 4, 5, 1 and ends with 2, 6, 3; one frame stops after two ids."""
    whole = [[10 + 4096 * slot + 7 * n + slot for slot in range(7)] for n in range(3)]
    broken = [2967, 4571]
    numbers = [4, 5, 1, *whole[0], *broken, *whole[1], *whole[2], *whole[0][:3], 2, 6, 3]
    path = tmp_path / "orpheus.txt"
    path.write_text("".join(f"<custom_token_{n}>" for n in numbers))
    codes = read_tokens(path)
    assert codes.tolist() == [[7 * n + slot for slot in range(7)] for n in range(3)]
    assert "left out 5 ids that belong to no whole frame, at 10, 11, 26, 27, 28" in (
        capsys.readouterr().out
    )


def test_ids_after_an_end_token_and_garbage(tmp_path, capsys):
    """Two utterances in one file, a label of -100, and numbers that no id can be."""
    frame = [10 + 4096 * slot for slot in range(7)]
    path = tmp_path / "ids.txt"
    path.write_text("".join(f"<custom_token_{n}>" for n in [4, 5, 1, *frame, 2, 6, 3] * 2))
    assert read_tokens(path).tolist() == [[0] * 7] * 2
    assert capsys.readouterr().out == ""
    ids = [n + 128_256 for n in frame]
    path.write_text(json.dumps([128_000, 9906, 128_257, *ids, -100, 10**30, *ids, 128_258]))
    assert read_tokens(path).tolist() == [[0] * 7] * 2
    assert "left out 2 ids that belong to no whole frame, at 10, 11\n" in capsys.readouterr().out
    path.write_text("<custom_token_99999999999>" * 7)
    with pytest.raises(UserError, match="no whole frame"):
        read_tokens(path)


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path):
    """The system refuses to write more than 100 KB, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with (
            pytest.raises(UserError, match=r"a\.wav: cannot be written: the disk may be full"),
            audio_file(tmp_path / "a.wav") as write,
        ):
            for _ in range(10):
                write(np.zeros(24_000, "f4"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def bad_tokens(tmp_path, text):
    path = tmp_path / f"ids{len(list(tmp_path.iterdir()))}.txt"
    path.write_text(text)
    return ["--tokens", path, "--model", "data/demo/base", "--codec", "data/demo/codec"]


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "text.wav").write_text("no audio")
    (tmp_path / "llama").mkdir()
    shutil.copytree("data/demo/codec", tmp_path / "snac")
    (tmp_path / "snac/pytorch_model.bin").write_bytes(b"no weights")
    demo = ["--codec", "data/demo/codec", "--model", "data/demo/base"]
    cases = [
        ([""], "the text is empty"),
        (["--file", tmp_path / "empty"], "the text is empty"),
        (["--file", tmp_path / "none"], "cannot be read"),
        (["hi", "--model", tmp_path / "none"], "no such folder"),
        (["hi", "--model", "data/demo/base", "--codec", tmp_path / "none"], "no such folder"),
        (["hi", "--model", "data/demo/base", "--codec", tmp_path / "llama"], "not a SNAC codec"),
        (["hi", "--model", tmp_path / "llama", *demo[:2]], "config.json: cannot be read"),
        (["hi", "--model", "outputs/my voice"], "not a hub id"),
        (["hi", "--model", "data/demo/bas"], "no such folder"),
        (["hi", "--model", "some/model"], "no GPU for the hub's"),
        (["hi", "--model", "data/demo/base", "--codec", "some/codec"], "hub cannot be reached"),
        (["hi", *demo[2:], "--codec", tmp_path / "snac"], r"pytorch_model\.bin: not plain weights"),
        (["hi", *demo, "--max_seconds", "0.01"], "less than a frame of speech"),
        (["hi", *demo, "--temperature", "warm"], "temperature"),
        (["hi", *demo, "--out", tmp_path / "a.xyz", "--max_seconds", "0.2"], "end the name in"),
        (["--wav", tmp_path / "none.wav", *demo], "does not exist"),
        (["--wav", tmp_path / "text.wav", *demo], "not audio"),
        (bad_tokens(tmp_path, "1 2 3"), "no whole frame"),
        (bad_tokens(tmp_path, "1 2 3 4 5 6 7"), "no whole frame"),
        (bad_tokens(tmp_path, "hello"), "neither a list"),
    ]
    for words, line in cases:
        assert re.search(line, one_line(infer.main, monkeypatch, *words)), words
    code, _, errors = script("infer.py", "hi", "--model", tmp_path / "none")
    assert code == 2 and errors.count("\n") == 1 and errors.startswith("error: ")


def words_of(name):
    """An option of infer.py with a value that is right by itself."""
    values = {"best_of": "2", "seed": "1", "speak_batch_size": "2", "language": "de"}
    if name == "texts":
        return ["hello"]
    switch = name in ("stream", "score", "cuda_graph")
    return [f"--{name}"] if switch else [f"--{name}", values.get(name, "1")]


OTHERS = {"voice", "out", "stream", "score", "whisper", "model", "config", *RUN_KEYS}
INPUTS = ("texts", "file", "tokens", "wav")
DECODING = {"model", "config", "out", "codec", "seed"}


def test_every_pair_of_options_works_or_is_refused(monkeypatch):
    monkeypatch.setattr(orpheus.options, "read_settings", lambda path: read_settings())
    for first, second in itertools.combinations(INPUTS, 2):
        line = one_line(infer.read_arguments, monkeypatch, *words_of(first), *words_of(second))
        assert "give one of" in line
    for way in INPUTS:
        for names in itertools.combinations(sorted(OTHERS), 2):
            words = [*words_of(way), *words_of(names[0]), *words_of(names[1])]
            accepted = way in ("texts", "file") or {*names} <= {
                "model",
                "config",
                "out",
                "codec",
                "seed",
            }
            if accepted and ("whisper" not in names or "score" in names):
                monkeypatch.setattr(sys, "argv", ["infer.py", *words])
                infer.read_arguments()
            else:
                line = one_line(infer.read_arguments, monkeypatch, *words)
                assert any(f"--{name}" in line for name in names), words


def test_every_option_is_in_a_pair(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["infer.py", "--help"])
    with pytest.raises(SystemExit):
        infer.read_arguments()
    options = set(re.findall(r"^  --(\w+)", capsys.readouterr().out, re.M))
    assert options == OTHERS | set(INPUTS) - {"texts"}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["hi", "--out", ""], "--out is empty"),
        (["hi", "--voice", " "], "--voice is empty"),
        (["hi", "--out", "a\0b"], "--out holds a NUL byte"),
        (["h\udcff"], "not valid UTF-8"),
        (["hi", "--voice", "\udcff"], "not valid UTF-8"),
        (["hi", "--temprature", "1"], "unrecognized arguments: --temprature"),
        (["hi", "--model", "a", "--model", "b"], "only a page takes several"),
        ([], "give one of"),
        (["hi", "--model", "outputs/nothing_here"], "^outputs/nothing_here: no such folder"),
        (["hi", "--model", "tests/nothing_here"], "^tests/nothing_here: no such folder"),
        (["--merge", "merged", "--model", "a"], "a command of its own: python -m orpheus.merge"),
        (["hi", "--page=a"], "--page is a command of its own: python -m orpheus.page"),
        (["hi", "--blind"], "--blind is a command of its own: python -m orpheus.page"),
        (["hi", "--config", "none.json"], "none.json: cannot be read"),
        (["hi", "--language", "English", "--model", "data/demo/base"], "language is"),
    ],
)
def test_mistakes_of_infer(words, line, monkeypatch):
    assert re.search(line, one_line(infer.main, monkeypatch, *words)), words


@pytest.mark.parametrize("name", ["lines.jsonl", "lines.parquet"])
def test_other_tables_are_not_spoken_as_lines(name, tmp_path, monkeypatch):
    (tmp_path / name).write_text('{"file_name": "a.wav", "text": "hi"}\n')
    line = one_line(infer.main, monkeypatch, "--file", tmp_path / name)
    assert "give a metadata.csv" in line


@pytest.mark.parametrize("header", ["file_name,text", "File Name, Text", "file_name;text",
                                    "file_name\ttext", "file_name|text"])  # fmt: skip
def test_separators_of_a_table_to_speak(header, tmp_path):
    path = tmp_path / "lines.tsv"
    path.write_text(f"{header}\n{header.replace('Text', 'text')}\n")
    texts, clips = read_texts([], str(path))
    assert [text.strip() for text in texts] == ["text"] and len(clips) == 1


def test_a_pipe_is_no_list_of_texts(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in one_line(infer.main, monkeypatch, "--file", tmp_path / "pipe")


def test_a_table_with_a_cell_that_is_too_long(tmp_path, monkeypatch):
    table = tmp_path / "lines.csv"
    table.write_text("file_name,text\na.wav," + "a" * 200_000 + "\n")
    line = one_line(infer.main, monkeypatch, "--file", table)
    assert line.startswith(f"{table}: not a table") and "131072" in line


def test_infer_takes_a_config(tmp_path, monkeypatch):
    """Its speaking keys go over those of the run, the rest of which is kept."""
    config = tmp_path / "mine.json"
    config.write_text('{"temperature": 0.9, "lora_r": 3, "output_dir": "elsewhere"}')
    home = tmp_path / "run"
    home.mkdir()
    shutil.copy("data/demo/base/config.json", home)
    (home / SAVED_CONFIG).write_text('{"temperature": 0.2, "lora_r": 5, "top_p": 0.5}')
    (home / SAVED_REPORT).write_text('{"voices": {}, "seconds": 1, "characters": 1}')
    settings = load_run_info(str(home), {"seed": "4"}, config=config).settings
    assert (settings.temperature, settings.lora_r, settings.top_p) == (0.9, 5, 0.5)
    assert load_run_info(str(home), {"temperature": "0.4"}, config=config).settings.seed == 3407
    config.write_text('{"temprature": 0.9}')
    line = one_line(infer.main, monkeypatch, "hi", "--config", config)
    assert "mine.json: no key is named 'temprature'" in line
