"""Special tokens, prompts, the parts of a text, and ids that something else generated."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from orpheus.settings import SpeakingSettings, UserError
from orpheus.tokens import (
    TOKEN_NAMES,
    codes_to_ids,
    ids_to_codes,
    prompt_ids,
    read_speech_ids,
    read_texts,
    read_tokens,
    split_text,
    whole_frames,
)


def test_true_orpheus_ids():
    """A tokenizer with Orpheus's names at Orpheus's places gives the ids of its published table."""
    vocabulary = {f"word{n}": n for n in range(128_256)} | {
        f"<custom_token_{n}>": 128_256 + n for n in range(28_684)
    }
    del vocabulary["word128000"], vocabulary["word128009"]
    vocabulary |= {"<|begin_of_text|>": 128_000, "<|eot_id|>": 128_009}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="word0"))
    ids = read_speech_ids(PreTrainedTokenizerFast(tokenizer_object=words))
    assert ids._asdict() == {
        "bos": 128_000, "eot": 128_009, "sos": 128_257, "eos": 128_258, "soh": 128_259,
        "eoh": 128_260, "soa": 128_261, "eoa": 128_262, "pad": 128_263, "audio": 128_266,
        "codebook_size": 4096,
    }  # fmt: skip


def test_tokenizer_without_orpheus_tokens_is_refused(tokenizer):
    with pytest.raises(UserError, match="no token <custom_token_28681>"):
        read_speech_ids(tokenizer, 4096)


def test_codes_round_trip_with_the_extremes(ids):
    codes = np.random.default_rng(1).integers(0, ids.codebook_size, (50, 7))
    codes[0], codes[1] = 0, ids.codebook_size - 1
    assert (ids_to_codes(codes_to_ids(codes, ids), ids) == codes).all()


def test_an_id_of_a_wrong_slot_is_named_with_its_position(ids):
    speech = codes_to_ids(np.zeros((3, 7), int), ids)
    speech[9], speech[10] = speech[10], speech[9]
    with pytest.raises(UserError, match=r"position 9 \(frame 1, slot 2\) belongs in slot 3"):
        ids_to_codes(speech, ids)
    speech[3] = ids.eos
    with pytest.raises(UserError, match=r"position 3 \(frame 0, slot 3\) is not an audio id"):
        ids_to_codes(speech, ids)
    with pytest.raises(UserError, match="20 audio ids are not whole frames"):
        ids_to_codes(speech[:20], ids)


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


def frames_one_by_one(speech, ids):
    """An independent whole_frames, which reads id by id and starts again at each id of slot 0."""
    frames, frame, left_out = [], [], []
    for position, number in enumerate(speech):
        slot, code = divmod(number - ids.audio, ids.codebook_size)
        if slot != len(frame):  # not the id that comes next, so this frame is not whole
            left_out += [position for position, _ in frame]
            frame = []
        if slot == len(frame):
            frame.append((position, code))
        else:
            left_out.append(position)
        if len(frame) == 7:
            frames.append([code for _, code in frame])
            frame = []
    return frames, sorted(left_out + [position for position, _ in frame])


def test_every_whole_frame_of_unconstrained_ids_is_decoded(ids):
    """Among ids that are missing, doubled or foreign, the same frames are found as one by one."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        codes = rng.integers(0, ids.codebook_size, (rng.integers(0, 9), 7))
        speech = codes_to_ids(codes, ids).tolist()
        for _ in range(rng.integers(0, 4)):
            position = int(rng.integers(0, len(speech) + 1))
            kind = rng.integers(0, 3)
            if kind == 0:
                del speech[position : position + 1]
            else:
                foreign = int(rng.integers(0, ids.audio + 8 * ids.codebook_size))
                doubled = kind == 1 and speech
                speech.insert(position, speech[position - 1] if doubled else foreign)
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
    positions = "10, 11, 26, 27, 28"
    left_out = f"left out 5 ids that belong to no whole frame, at positions {positions}\n"
    assert capsys.readouterr().out == f"{path}: {left_out}"


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
    left_out = "left out 2 ids that belong to no whole frame, at positions 10, 11\n"
    assert left_out in capsys.readouterr().out
    path.write_text("<custom_token_99999999999>" * 7)
    with pytest.raises(UserError, match="no whole frame"):
        read_tokens(path)


def split(text, seconds, pace=None, language="en"):
    return split_text(text, SpeakingSettings(max_seconds=seconds, language=language), pace)


def test_long_text_is_split_at_sentences_then_at_words_then_anywhere():
    text = "Dr. Smith paid 3.50 in the U.S.A. <laugh> Did he? Yes, e.g. today! " + "word " * 30
    parts = split(text, 6)
    assert " ".join(parts) == " ".join(text.split())
    assert parts[:2] == ["Dr. Smith paid 3.50 in the U.S.A. <laugh> Did he?", "Yes, e.g. today!"]
    assert [len(part) for part in parts[2:]] == [59, 59, 29]
    assert split(" short.  one ", 6) == ["short. one"]
    assert split("one. " + "x" * 99, 6) == ["one.", "x" * 60, "x" * 39]
    assert len(split("one." + " ?" * 40, 6)) == 1  # the rest is nothing to speak
    assert len(split("ก็" * 40, 6)) == 2 and all(p[0] == "ก" for p in split("ก็" * 39, 2.5))


@pytest.mark.parametrize(
    ("sentences", "language", "most"),
    [
        ("今天天气很好。我们去公园吧！你说呢？", "zh", 66),
        ("今日はいい天気ですね。公園に行きましょう！", "ja", 66),
        ("今天天气很好，我们去公园吧", "en", 66),
        ("今天天气很好我们去公园吧", "zh", 66),
        ("오늘은 날씨가 좋네요. 공원에 갑시다! ", "ko", 90),
        ("Τι κάνεις; Είμαι καλά. ", "el", 200),
    ],
)
def test_text_of_any_language_fits_max_seconds(sentences, language, most):
    """At 0.3 s for a character of Chinese, Japanese or Korean, or 1.4 times the voice's pace."""
    text = (sentences * 28).strip()
    for pace, longest in ((None, most), (0.5, 28)):
        parts = split(text, 20, pace, language)
        assert "".join(parts) == text if " " not in text else " ".join(parts) == text
        assert longest / 2 < max(map(len, parts)) <= longest
        if not pace and "好我" not in text:  # which has no mark at all
            assert all(part[-1] in "。！？!.，;" for part in parts[:-1])


def test_texts_of_a_file(tmp_path, capsys):
    path = tmp_path / "book.txt"
    path.write_text("one two\nthree\n")
    assert read_texts(path) == ["one two", "three"]
    assert f"{path}: 2 lines" in capsys.readouterr().out
    path.write_text("\ufeff\r\none two\r\nthree\r\n \t\r\n\r\nfour\r\n\r\n", "utf-8")
    assert [text.split() for text in read_texts(path)] == [["one", "two", "three"], ["four"]]
    assert f"{path}: 2 paragraphs" in capsys.readouterr().out
    path.write_text("\n \n")
    with pytest.raises(UserError, match="the text is empty"):
        read_texts(path)
    with pytest.raises(UserError, match="a table"):
        read_texts(tmp_path / "metadata.csv")


def test_ids_as_other_programs_print_them(tmp_path):
    """vLLM's outputs, llama.cpp's server and its streams, transformers' tensors, NumPy's arrays."""
    names = [10 + 4096 * slot + slot for slot in range(7)]
    ids, path = [n + 128_256 for n in names], tmp_path / "printed"
    escaped = "".join(f'data: {{"content":"\\u003ccustom_token_{n}\\u003E"}}\n\n' for n in names)
    chunks = "".join(f'data: {{"index":0,"tokens":[{n}],"stop":false,"tps":9.5}}\n' for n in ids)
    forms = [
        f"CompletionOutput(index=0, text='', token_ids={tuple(ids)}, cumulative_logprob=None)",
        f"token_ids=array('l', {ids}), finish_reason=None",
        f"tensor([[128000, 9906,\n  128257, {', '.join(map(str, ids))}]], device='cuda:0')",
        "[" + " ".join(map(str, ids)) + "]",
        json.dumps({"prompt_token_ids": [1, 2], "tokens": [ids], "tokens_predicted": 7}),
        ", ".join(map(str, ids)),
        escaped,
        chunks,
    ]
    for form in forms:
        path.write_text(form)
        assert read_tokens(path).tolist() == [list(range(7))], form
    for form in ("tensor([[128266, ..., 128270]])", "hello", "1.5 2.5"):
        path.write_text(form)
        with pytest.raises(UserError, match="neither"):
            read_tokens(path)


def test_audio_tokens_out_of_order_are_refused():
    class Tokenizer:
        name_or_path = "mine"

        def get_vocab(self):
            names = [*TOKEN_NAMES.values(), f"<custom_token_{9 + 7 * 4096}>"]
            return {name: n for n, name in enumerate(names)}

    with pytest.raises(UserError, match="mine: its audio tokens are not in order"):
        read_speech_ids(Tokenizer())
