"""SNAC: slots and levels, batches, streams, each against SNAC itself or the whole."""

import json
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, change, cut
from snac import SNAC

import orpheus.codec
from orpheus.codec import CONTEXT, LOOKAHEAD, decode, decode_stream, encode, load_codec
from orpheus.settings import UserError
from orpheus.tokens import FRAME_SAMPLES, SpeechIds, codes_to_ids


class LevelsCodec:
    """A stand-in for SNAC that records what it decodes and encodes everything to given levels."""

    def __init__(self, levels):
        self.levels = levels

    def parameters(self):
        yield torch.zeros(1)

    def encoder(self, audio):
        return audio[..., ::512]

    def quantizer(self, latents):
        assert latents.shape[-1] == self.levels[2].shape[-1]  # without those of the zeros
        return latents, self.levels

    def decode(self, levels):
        self.decoded = levels
        return torch.zeros(1, 1, 1)


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


def test_layout_equals_the_literal_loop():
    rng = np.random.default_rng(0)
    first, second, third = (rng.integers(0, 4096, 13 * n) for n in (1, 2, 4))
    first[0], third[5], second[1] = 0, 4095, 0
    codec = LevelsCodec([torch.from_numpy(x)[None] for x in (first, second, third)])
    codes = encode(codec, [np.zeros(13 * FRAME_SAMPLES, np.float32)])[0]
    ids = SpeechIds(*range(8), 0, 128_266, 4096)
    assert codes_to_ids(codes, ids).tolist() == literal_ids(first, second, third, 128_266, 4096)
    decode(codec, codes)
    for level, expected in zip(codec.decoded, (first, second, third), strict=True):
        assert level[0].tolist() == expected.tolist()


def test_encode_is_the_same_alone_and_in_any_batch(codec):
    rng = np.random.default_rng(2)
    lengths = [1, 2047, 2048, 2049, 30_000, 61_440]
    clips = [rng.normal(0, 0.1, n).astype(np.float32) for n in lengths]
    alone = [encode(codec, [clip])[0] for clip in clips]
    assert [len(codes) for codes in alone] == [1, 1, 1, 2, 15, 30]
    random.Random(0).shuffle(order := list(range(len(clips))))
    together = encode(codec, [clips[n] for n in order])
    for n, codes in zip(order, together, strict=True):
        assert (codes == alone[n]).all(), lengths[n]


def test_encode_adds_as_many_zeros_as_the_encoder_looks_ahead():
    """The samples after a frame that its codes depend on, in the full size and in the demo's."""
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
    audio = decode(codec, codes)
    assert audio.shape == (5 * FRAME_SAMPLES,)
    assert (audio == decode(codec, codes)).all()


def noisy_codec():
    """SNAC's shape with random weights, with the noise blocks that the full-size decoder has."""
    torch.manual_seed(0)
    config = json.loads((ROOT / "data/demo/codec/config.json").read_text())
    return SNAC(**config | {"noise": True, "decoder_dim": 32}).eval()


def test_every_frame_comes_once_in_every_chunking():
    """A codec whose samples are the number of their frame shows each once and in order."""

    class NumberingCodec:
        def parameters(self):
            yield torch.zeros(1)

        def decode(self, levels):  # the coarse code, over the frame's samples
            return levels[0].repeat_interleave(FRAME_SAMPLES, dim=-1)[:, None].float()

    for length in range(1, 41):
        codes = np.zeros((length, 7), dtype=np.int64)
        codes[:, 0] = np.arange(length)
        for size in range(1, 42):
            pieces = list(decode_stream(NumberingCodec(), iter(codes), size=size))
            numbers = np.concatenate(pieces)[::FRAME_SAMPLES]
            assert numbers.tolist() == list(range(length)), (length, size)
            assert sum(map(len, pieces)) == length * FRAME_SAMPLES


def test_a_piece_is_decoded_as_soon_as_its_context_is_known(codec):
    taken = []

    def frames():
        for n in range(20):
            taken.append(n)
            yield np.zeros(7, np.int64)

    next(decode_stream(codec, frames()))
    assert len(taken) == 4 + CONTEXT


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 12, 40])
def test_a_stream_equals_the_whole(codec, length):
    """Up to float32's last digit, since torch's order of summation depends on the length."""
    codes = np.random.default_rng(length).integers(0, codec.codebook_size, (length, 7))
    whole = decode(codec, codes)
    for size in (1, 4, 9):
        pieces = np.concatenate(list(decode_stream(codec, iter(codes), size=size)))
        assert pieces.shape == whole.shape and abs(pieces - whole).max() < 1e-6, size


def test_a_seed_fixes_the_noise_of_a_stream():
    codec, codes = noisy_codec(), np.zeros((12, 7), dtype=np.int64)
    first, again, other = (
        np.concatenate(list(decode_stream(codec, codes, seed=seed))) for seed in (5, 5, 6)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_a_stream_equals_the_whole_with_equal_noise(monkeypatch):
    """To 90 dB, if a sample has the same noise in whatever piece it is decoded."""
    codec = noisy_codec()
    field = torch.randn(8, 1, 90 * FRAME_SAMPLES, generator=torch.Generator().manual_seed(0))
    piece = {}  # first sample and number of samples of what is being decoded

    def noise(shape, **_):
        steps = shape[-1]
        rate = piece["samples"] // steps  # samples for each step of this block
        start = piece["first"] // rate
        return field[len(str(rate)), :, start : start + steps][None]

    monkeypatch.setattr("snac.layers.torch.randn", noise)

    def decode_with_noise(codec, codes):
        piece["first"] = int(codes[0][0]) * FRAME_SAMPLES  # the coarse code numbers the frames
        piece["samples"] = len(codes) * FRAME_SAMPLES
        return decode(codec, codes)

    monkeypatch.setattr(orpheus.codec, "decode", decode_with_noise)
    codes = np.random.default_rng(0).integers(0, codec.codebook_size, (40, 7))
    codes[:, 0] = np.arange(40)
    whole = orpheus.codec.decode(codec, codes)
    for size in (1, 4, 9):
        pieces = np.concatenate(list(decode_stream(codec, iter(codes), size=size)))
        error = np.sqrt(((pieces - whole) ** 2).mean() / (whole**2).mean())
        assert 20 * np.log10(error + 1e-12) < -90, size
    field.neg_()
    assert abs(orpheus.codec.decode(codec, codes) - whole).max() > 1e-4  # the noise matters


BROKEN_CODECS = {
    "cut weights": (lambda d: cut(d / "pytorch_model.bin", 5000), "pytorch_model.bin: damaged"),
    "empty weights": (lambda d: cut(d / "pytorch_model.bin", 0), "pytorch_model.bin: damaged"),
    "other shapes": (lambda d: change(d / "config.json", encoder_dim=32), "of another config.json"),
    "16 kHz": (lambda d: change(d / "config.json", sampling_rate=16_000), "not SNAC at 24 kHz"),
}


@pytest.mark.parametrize("name", BROKEN_CODECS)
def test_a_broken_codec_is_named_in_one_line(name, tmp_path):
    codec = shutil.copytree(ROOT / "data/demo/codec", tmp_path / "codec")
    spoil, line = BROKEN_CODECS[name]
    spoil(codec)
    with pytest.raises(UserError, match=line) as caught:
        load_codec(str(codec))
    assert len(str(caught.value)) < 400 and "weights_only" not in str(caught.value)


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_a_malicious_codec_is_not_loaded_nor_excused(tmp_path, capsys):
    codec = shutil.copytree(ROOT / "data/demo/codec", tmp_path / "codec")
    torch.save({"x": Evil()}, codec / "pytorch_model.bin")
    with pytest.raises(UserError, match="unsafe to load") as caught:
        load_codec(str(codec))
    assert "weights_only" not in str(caught.value) and capsys.readouterr().out == ""
    (codec / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        load_codec(str(codec))


def test_the_codec_computes_in_full_precision_under_autocast(codec):
    """As during a check of a model whose own weights need it."""
    draw = np.random.default_rng(0)
    codes, audio = draw.integers(0, 256, (4, 7)), draw.normal(0, 0.1, 9000).astype(np.float32)
    torch.manual_seed(0)
    decoded, encoded = decode(codec, codes), encode(codec, [audio])[0]
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(decode(codec, codes), decoded)
        assert np.array_equal(encode(codec, [audio])[0], encoded)
