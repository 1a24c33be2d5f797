"""Build the demo from nothing but Debian's flite: sample clips, tiny SNAC codec, tiny Llama base.

python data/demo/make_demo.py                                 # everything: 90 minutes on two cores
python data/demo/make_demo.py --stage train                   # one stage; a killed one goes on
DEMO_WORK=/tmp/work python data/demo/make_demo.py             # codes and checkpoints elsewhere

To make a demo of your own, change VOICES, WORDS and `say_word`. Seeds are fixed, so the clips come
out the same; floating point differs from machine to machine, so codebooks and weights come out
alike, not bit by bit. Stages: numbers, codec, encode, train (decoder and base in parallel).
"""

import argparse
import copy
import csv
import functools
import json
import os
import random
import subprocess
import sys
import tempfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

DEMO = Path(__file__).resolve().parent
sys.path.insert(0, str(DEMO.parents[1]))
from orpheus.codec import encode, load_codec  # noqa: E402
from orpheus.files import atomic_file  # noqa: E402
from orpheus.tokens import (  # noqa: E402
    FRAME_SAMPLES,
    SAMPLE_RATE,
    codes_to_ids,
    prompt_ids,
    read_speech_ids,
    slots_to_levels,
)

NUMBERS = DEMO.parent / "numbers"
WORK = Path(os.environ.get("DEMO_WORK", DEMO / "work"))
RATE, FRAME = SAMPLE_RATE, FRAME_SAMPLES  # Hz, samples
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

# name: (flite's voice, how much its formants and pitch are raised). The base learns the first three
# to speak them, and disguises of theirs to learn what may differ from voice to voice. slt is the
# new voice: the codec hears it, the base never does.
VOICES = {name: (name, 1.0) for name in ("rms", "awb", "kal16", "slt")}
NEW = "slt"
RAISED = (0.86, 0.93, 1.07, 1.14, 1.22)
VOICES |= {
    f"{name}{raised}": (name, raised) for name in ("rms", "awb", "kal16") for raised in RAISED
}
CLIPS = 500  # of each voice

# Sees no further than the full-size codec, in encoding (LOOKAHEAD) and in decoding.
CODEC = {
    "sampling_rate": RATE,
    "encoder_dim": 8,
    "encoder_rates": [4, 4, 2, 16],
    "decoder_dim": 256,
    "decoder_rates": [8, 4, 2, 2, 4],
    "attn_window_size": None,
    "codebook_size": 256,
    "codebook_dim": 8,
    "vq_strides": [4, 2, 1],
    "noise": False,
    "depthwise": False,  # quicker than depthwise on a CPU
}


# ---------------------------------------------------------------- clips


def held_out(text: str) -> bool:
    """Whether a string is kept for testing: an eighth of those of three words and more."""
    return text.count(" ") >= 2 and zlib.crc32(text.encode()) % 8 == 0


def draw_texts(seed: int, count: int, lengths: tuple[int, int], testing: bool) -> list[str]:
    """`count` random strings of number words, all of them held out, or none."""
    rng, texts = random.Random(seed), []
    while len(texts) < count:
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(*lengths)))
        if held_out(text) == testing and not (testing and text in texts):
            texts.append(text)
    return texts


def training_texts(seed: int, count: int, lengths=(1, 6)) -> list[str]:
    return draw_texts(seed, count, lengths, testing=False)


def test_texts(seed: int, count: int, lengths=(3, 6)) -> list[str]:
    """Held-out strings, all different, for tests and benchmarks."""
    return draw_texts(seed, count, lengths, testing=True)


def speak(voice: str, text: str) -> np.ndarray:
    """(samples,) float32 at 24 kHz: the words one after the other, as a speaking clock says them.

    Each word was said once, alone, and fills whole frames: its codes are the same wherever it
    stands, which a base of four million parameters can learn in minutes.
    """
    return np.concatenate([say_word(voice, word) for word in text.split()])


@functools.cache
def say_word(voice: str, word: str) -> np.ndarray:
    """(frames x 2,048,) float32: flite's wav of one word, trimmed, with an RMS of 0.1."""
    import soundfile
    import soxr

    flite, raised = VOICES[voice]
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        command = ["flite", "-voice", flite, "-t", word, "-o", file.name]
        subprocess.run([*command, "--setf", f"duration_stretch={raised}"], check=True)
        audio, rate = soundfile.read(file.name, dtype="float32")
    # taken as if recorded `raised` times faster, which moves pitch and formants up alike
    audio = trim(soxr.resample(audio, rate * raised, RATE))
    audio = np.pad(audio, (0, -len(audio) % FRAME))
    return np.clip(audio, -0.99, 0.99).astype(np.float32)


def trim(audio: np.ndarray, keep: float = 0.03) -> np.ndarray:
    """Fade `keep` seconds of silence at both ends, cut the rest; speech gets an RMS of 0.1."""
    step, margin = RATE // 100, int(keep * RATE)
    loudness = np.sqrt((audio[: len(audio) // step * step].reshape(-1, step) ** 2).mean(axis=1))
    speech = np.flatnonzero(loudness > 0.02 * loudness.max())
    first, last = speech[0] * step, (speech[-1] + 1) * step
    audio = np.pad(audio, margin)[first : last + 2 * margin].copy()
    ramp = np.linspace(0, 1, margin, dtype=np.float32)
    audio[:margin] *= ramp
    audio[-margin:] *= ramp[::-1]
    return audio * 0.1 / np.sqrt((audio[margin:-margin] ** 2).mean())


def make_numbers() -> None:
    """Write data/numbers/: 96 clips of slt, the voice to fine-tune."""
    import soundfile

    NUMBERS.mkdir(exist_ok=True)
    with open(NUMBERS / "metadata.csv", "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["file_name", "text", "speaker"])
        for number, text in enumerate(training_texts(96, 96, (2, 6)), 1):
            name = f"{number:03}.flac"
            soundfile.write(NUMBERS / name, speak(NEW, text), RATE, subtype="PCM_16")
            rows.writerow([name, text, NEW])


# ---------------------------------------------------------------- training


def side_by_side(job, items) -> None:
    """job(item) for each, in processes of one thread: PyTorch's own threads gain little here."""
    with ProcessPoolExecutor(os.cpu_count(), initializer=use_one_thread) as pool:
        list(pool.map(job, items))


def use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def train(name: str, model, learned: list, loss_of, steps: int, rate: float, keep) -> None:
    """AdamW with warm-up and cosine; every 200 steps a checkpoint, from which a killed run goes on.

    `loss_of(rng)` draws its batch from an rng that the step seeds; `keep()` writes the artefact.
    """
    import torch
    from tqdm import tqdm

    optimizer, done = torch.optim.AdamW(learned, lr=rate, betas=(0.8, 0.99), fused=True), 0
    checkpoint, losses = WORK / f"{name}.pt", []
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        done = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    for step in (bar := tqdm(range(done, steps), name, initial=done, total=steps)):
        warm, cosine = step / 100, 0.5 + 0.5 * np.cos(np.pi * step / steps)
        optimizer.param_groups[0]["lr"] = float(rate * min(1, min(warm, cosine) + 0.005))
        optimizer.zero_grad()
        loss = loss_of(np.random.default_rng(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {np.mean(losses[-100:]):.3f}", refresh=False)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            state = {"step": step + 1, "model": model.state_dict()}
            with atomic_file(checkpoint) as part:
                torch.save(state | {"optimizer": optimizer.state_dict()}, part)
            keep()


# ---------------------------------------------------------------- codec


def spectral_loss(made, wanted):
    """Distance of two (batch, samples) on log-mel and plain spectra of five window lengths."""
    import torch
    from transformers.audio_utils import mel_filter_bank

    total = 0
    for size, bands in (2048, 120), (1024, 80), (512, 50), (256, 28), (128, 14):
        if size not in MEL:
            bank = mel_filter_bank(size // 2 + 1, bands, 0, RATE / 2, RATE, "slaney", "slaney")
            bank = torch.tensor(bank / bank.sum(axis=0), dtype=torch.float32)
            MEL[size] = (torch.hann_window(size) / size**0.5, bank)
        window, bank = MEL[size]
        both = torch.cat([made, wanted])
        spectra = torch.stft(both, size, size // 4, window=window, return_complex=True)
        spectra = (spectra.real**2 + spectra.imag**2 + 1e-9).sqrt().transpose(1, 2)
        mels = (spectra @ bank + 3e-4).log()
        total = total + (mels[: len(made)] - mels[len(made) :]).abs().mean()
        total = total + 10 * (spectra[: len(made)] - spectra[len(made) :]).abs().mean()
    return total


MEL = {}  # window length: (window, filter bank)


def segments(rng, count: int, frames: int = 6):
    """(count, 1, samples): random pieces of clips, with the zeros before and after a clip."""
    import torch

    pieces = []
    for _ in range(count):
        clip = speak(rng.choice(list(VOICES)), " ".join(rng.choice(WORDS, 3)))
        clip = np.pad(clip, (FRAME // 2, 3 * FRAME))
        start = rng.integers(len(clip) - frames * FRAME)
        pieces.append(clip[start : start + frames * FRAME])
    return torch.tensor(np.stack(pieces), dtype=torch.float32)[:, None]


def set_conv(conv, weight, bias=0.0) -> None:
    """Write a weight-normed convolution; a row of zeros becomes a gain of zero."""
    import torch

    gain = weight.flatten(1).norm(dim=1).reshape(-1, 1, 1)
    conv.parametrizations.weight.original0.data.copy_(gain)
    conv.parametrizations.weight.original1.data.copy_(weight + (gain == 0))
    conv.bias.data.copy_(torch.as_tensor(bias).expand_as(conv.bias))


def band_filters():
    """(16, 224): band-pass filters with their centres on the mel scale, 150 to 7,000 Hz."""
    import torch

    centres = 700 * np.expm1(np.linspace(np.log1p(150 / 700), np.log1p(7000 / 700), 16))
    filters = np.zeros((16, 224))
    for row, centre, width in zip(filters, centres, np.gradient(centres), strict=True):
        length = int(min(224, 1.7 * RATE / width)) // 2 * 2
        time = (np.arange(length) - length / 2 + 0.5) / RATE
        window = np.hanning(length + 2)[1:-1]
        wave = 2 * window / window.sum() * np.cos(2 * np.pi * centre * time)
        row[112 - length // 2 : 112 + length // 2] = wave
    return torch.tensor(filters, dtype=torch.float32)


def set_idle(encoder) -> None:
    """Pass the samples on, 32 to a step at 750 Hz: strides gather, residual units add nothing."""
    import torch
    from snac.layers import ResidualUnit, Snake1d

    first, *blocks, _ = encoder.block
    for module in encoder.modules():
        if isinstance(module, ResidualUnit):
            set_conv(module.block[3], torch.zeros_like(module.block[3].weight))
        if isinstance(module, Snake1d):
            module.alpha.data.fill_(1e-3)  # as good as linear
    set_conv(first, torch.eye(7)[3].expand(8, 1, 7) * torch.eye(8)[:, :1, None])
    for block, stride, known in zip(blocks, (4, 4, 2), (1, 4, 16), strict=False):
        conv = block.block[4]
        weight = torch.zeros_like(conv.weight)
        for n in range(stride * known):
            weight[n, n % known, conv.padding[0] + n // known] = 1
        set_conv(conv, weight)


def design_encoder(codec) -> None:
    """Set the encoder by hand: 16 band energies on two scales, 46.875 times a second.

    Learning as much from the wave took longer than an hour. The activation is x + sin²(ax)/a: of a
    filter and its mirror image it adds up to an energy that saturates where a says.
    """
    import torch
    import torch.nn.functional as F

    set_idle(codec.encoder)
    *_, block, last = codec.encoder.block
    filters, audio = band_filters(), segments(np.random.default_rng(1), 200)
    taps = filters.reshape(16, 7, 32).transpose(1, 2)  # (band, sample of a step, step)
    weight = torch.cat([taps, -taps]).repeat_interleave(2, 0)
    weight = torch.cat([weight, torch.zeros_like(weight)], 1)
    weight[range(32), range(32), 3] -= 1  # the unit adds its input: take it away
    set_conv(block.block[0].block[1], weight)
    set_conv(block.block[0].block[3], torch.eye(64)[:, :, None])
    waves = [F.conv1d(audio, row[None, None]).abs().numpy() for row in filters]
    loud = torch.tensor([np.quantile(wave[..., ::7], 0.9) for wave in waves])
    scales = torch.stack([0.9 / loud, 6 / loud], 1).flatten().float()  # (32,)
    block.block[3].alpha.data.copy_(scales.repeat(2)[None, :, None])
    window = torch.tensor(np.hanning(34)[1:-1] / 34, dtype=torch.float32)
    weight = torch.zeros_like(block.block[4].weight)
    weight[range(32), range(32)] = weight[range(32), range(32, 64)] = scales[:, None] * window
    set_conv(block.block[4], weight)
    identity = torch.zeros_like(last.weight)
    identity[range(32), range(32), 3] = 1
    set_conv(last, identity)
    energies = codec.encoder(audio)[:, :32]
    mean, spread = energies.mean((0, 2)), energies.std((0, 2))
    identity[range(32), range(32), 3] = 1 / spread
    set_conv(last, identity, F.pad(-mean / spread, (0, 96)))


def fit_quantizer(codec) -> None:
    """Coarse to fine: seven principal axes, k-means on the sphere, least squares to come back."""
    import torch
    import torch.nn.functional as F

    rng = np.random.default_rng(2)
    rest = torch.cat([codec.encoder(segments(rng, 8)) for _ in range(150)])
    start = rest.pow(2).mean()
    for level in codec.quantizer.quantizers:
        pooled = F.avg_pool1d(rest, level.stride)
        flat = pooled.transpose(1, 2).flatten(0, 1)
        mean = flat.mean(0)
        axes = torch.linalg.svd(flat - mean, full_matrices=False).Vh[:7]
        axes = axes * 1.2 / ((flat - mean) @ axes.T).pow(2).sum(1).mean().sqrt()
        # an eighth axis that is always 1 keeps lengths apart on the sphere
        weight, bias = F.pad(axes, (0, 0, 0, 1)), torch.cat([-axes @ mean, torch.ones(1)])
        set_conv(level.in_proj, weight[..., None], bias)
        units = F.normalize(flat @ weight.T + bias)
        book = k_means(units, len(level.codebook.weight), rng)
        level.codebook.weight.data.copy_(book)
        told = F.pad(book[(units @ book.T).argmax(1)], (0, 1), value=1.0)
        fit = torch.linalg.solve(told.T @ told + 1e-3 * torch.eye(9), told.T @ flat)
        set_conv(level.out_proj, fit[:8].T[..., None], fit[8])
        rest = rest - level(rest)[0]
        print(f"{level.stride}: {rest.pow(2).mean() / start:.0%} of the energies left untold")


def k_means(units, count: int, rng, rounds: int = 25):
    """(count, 8) centres of unit vectors, themselves of length 1."""
    import torch
    import torch.nn.functional as F

    book = units[rng.permutation(len(units))[:count]]
    for _ in range(rounds):
        likeness, code = (units @ book.T).max(1)
        sums = torch.zeros_like(book).index_add_(0, code, units)
        unused = sums.norm(dim=1) == 0
        sums[unused] = units[likeness.argsort()[: unused.sum()]]  # the worst served
        book = F.normalize(sums)
    return book


def make_codec() -> None:
    """The codec with an encoder and codebooks that are final, and a decoder that knows nothing."""
    import torch
    from snac import SNAC

    torch.manual_seed(0)
    codec = SNAC(**CODEC)
    with torch.no_grad():
        design_encoder(codec)
        fit_quantizer(codec)
    save_codec(codec)


def save_codec(codec) -> None:
    """What SNAC.from_pretrained reads, in fp16."""
    import torch

    folder = DEMO / "codec"
    weights = {name: weight.half() for name, weight in codec.state_dict().items()}
    with atomic_file(folder / "pytorch_model.bin") as part:
        torch.save(weights, part)
    (folder / "config.json").write_text(json.dumps(CODEC, indent=2) + "\n")


def encode_voice(voice: str) -> None:
    """Write work/<voice>.npz: texts, the codes of their clips end to end, the frames of each."""
    from torch import nn
    from tqdm import tqdm

    codec = load_codec(str(DEMO / "codec"))
    *blocks, filters = list(codec.encoder.block)[1:5]
    for block in [*blocks, filters]:  # units that add nothing take most of the time
        for unit in range(block is filters, 3):
            block.block[unit] = nn.Identity()
    texts = training_texts(list(VOICES).index(voice), CLIPS)
    codes = [encode(codec, [speak(voice, text)])[0] for text in tqdm(texts, voice)]
    frames = [len(code) for code in codes]
    with atomic_file(WORK / f"{voice}.npz") as part, part.open("wb") as file:
        np.savez(file, texts=texts, codes=np.concatenate(codes), frames=frames)


def load_codes(voice: str) -> list[tuple[str, np.ndarray]]:
    """[(text, codes of its clip: (frames, 7))]."""
    stored = np.load(WORK / f"{voice}.npz")
    codes = np.split(stored["codes"], np.cumsum(stored["frames"])[:-1])
    return list(zip(map(str, stored["texts"]), codes, strict=True))


def make_decoder(frames: int = 8) -> None:
    """The decoder alone, on the codes as they now are."""
    import torch
    from snac import SNAC

    codec = SNAC.from_pretrained(str(DEMO / "codec"))  # load_codec's has no weight norm
    clips = {voice: load_codes(voice) for voice in VOICES}
    shares = [
        0.01 if raised != 1 else 0.25 if voice == NEW else 0.2
        for voice, (_, raised) in VOICES.items()
    ]

    def loss_of(rng):
        sides, audio = [], []
        for voice in rng.choice(list(VOICES), 2, p=shares):
            text, codes = clips[voice][rng.integers(CLIPS)]
            first = rng.integers(max(1, len(codes) - frames + 1))
            part = codes[first : first + frames]
            piece = speak(voice, text)[first * FRAME :][: frames * FRAME]
            sides.append(np.pad(part, ((0, frames - len(part)), (0, 0)), mode="edge"))
            audio.append(np.pad(piece, (0, frames * FRAME - len(piece))))
        levels = slots_to_levels(torch.tensor(np.stack(sides)))
        latents = codec.quantizer.from_codes(levels).detach()
        return spectral_loss(codec.decoder(latents)[:, 0], torch.tensor(np.stack(audio)))

    learned = list(codec.decoder.parameters())
    train("decoder", codec, learned, loss_of, 5000, 1e-3, lambda: save_codec(codec))


# ---------------------------------------------------------------- base


def make_tokenizer():
    """Bytes and the words made of them, Llama's two marks of a text, and Orpheus's names."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # one token for a word, as Llama has: to read on is then to move by one
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merging = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" " + text for text in training_texts(0, 1000)], merging)
    names = [f"<custom_token_{n}>" for n in range(10 + 7 * CODEC["codebook_size"])]
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>", *names])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<custom_token_2>",
        pad_token="<custom_token_7>",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def new_base(tokenizer):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def save_base(model, tokenizer, rows: list, ids) -> None:
    """What from_pretrained reads, in bf16; each file is whole or not there.

    Codes that no row has get embeddings as long as the others', as in a large base: short ones
    cap what a LoRA can make of them, at a loss of two nats.
    """
    import torch

    weight = (model := copy.deepcopy(model)).get_input_embeddings().weight.data
    heard = {token for _, audio in rows for token in audio}
    every = range(ids.audio, ids.audio + 7 * ids.codebook_size)
    unheard = [token for token in every if token not in heard]
    drawn = torch.randn(len(unheard), weight.shape[1], generator=torch.Generator().manual_seed(0))
    length = weight[sorted(heard)].norm(dim=1).mean()
    weight[unheard] = torch.nn.functional.normalize(drawn) * length
    folder, part = DEMO / "base", DEMO / "base.part"
    model.to(torch.bfloat16).save_pretrained(part)
    tokenizer.save_pretrained(part)
    folder.mkdir(exist_ok=True)
    for file in part.iterdir():
        file.chmod(0o644)
        file.rename(folder / file.name)
    part.rmdir()


def make_rows(tokenizer):
    """[(prompt, audio and ends)] of all voices but the new one, by length, and the SpeechIds."""
    ids, rows = read_speech_ids(tokenizer, CODEC["codebook_size"]), []
    for voice in VOICES.keys() - {NEW}:
        for text, codes in load_codes(voice):
            prompt = prompt_ids(tokenizer, ids, text, voice)
            rows.append((prompt, [*codes_to_ids(codes, ids), ids.eos, ids.eoa]))
    return sorted(rows, key=lambda row: (len(row[0]) + len(row[1]), row)), ids


def make_base(tokens: int = 1600) -> None:
    """The base on rows of like length, `tokens` a step, loss on audio and ends alone."""
    import torch

    tokenizer = make_tokenizer()
    model, (rows, ids) = new_base(tokenizer), make_rows(tokenizer)

    def loss_of(rng):
        first = rng.integers(len(rows), size=2).max()  # long rows are the hard ones
        count = max(1, tokens // sum(map(len, rows[first])))
        near = rows[max(0, first - 10 * count) : first + 10 * count]
        batch = [near[i] for i in rng.permutation(len(near))[:count]]
        width = max(len(prompt) + len(audio) for prompt, audio in batch)
        inputs, labels = np.full((len(batch), width), ids.pad), np.full((len(batch), width), -100)
        for row, (prompt, audio) in enumerate(batch):
            inputs[row, : len(prompt) + len(audio)] = prompt + audio
            labels[row, len(prompt) : len(prompt) + len(audio)] = audio
        return model(input_ids=torch.tensor(inputs), labels=torch.tensor(labels)).loss

    def keep():
        save_base(model, tokenizer, rows, ids)

    train("base", model, list(model.parameters()), loss_of, 8000, 2e-3, keep)


# ---------------------------------------------------------------- main


def train_one(job) -> None:
    job()


def main() -> None:
    stages = {
        "numbers": make_numbers,
        "codec": make_codec,
        "encode": lambda: side_by_side(encode_voice, VOICES),
        "train": lambda: side_by_side(train_one, [make_decoder, make_base]),
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=["all", *stages], default="all")
    wanted = parser.parse_args().stage
    WORK.mkdir(parents=True, exist_ok=True)
    for name, make in stages.items():
        if wanted in ("all", name):
            make()


if __name__ == "__main__":
    main()
