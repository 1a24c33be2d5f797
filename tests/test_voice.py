"""Voice: its codes against a plain loop, batches, streams, candidates, and what is loaded."""

import shutil

import numpy as np
import pytest
import torch
from conftest import change, over_nf4
from running import same_file
from speaking import demo_settings, random_model, say
from transformers import generation

import orpheus.voice
from orpheus.models import load_model
from orpheus.runs import SAVED_CONFIG, SAVED_REPORT
from orpheus.scoring import BY_ITSELF, CUT_OFF
from orpheus.settings import UserError
from orpheus.tokens import codes_to_ids, ids_to_codes
from orpheus.voice import SlotSampler, Utterance, Voice, find_voice, load_voice, sample_codes

TEXTS = ["seven", "one two three four", "nine zero two", "four four eight"]


@pytest.fixture(scope="session")
def model(ids):
    """In double precision, so that rounding in batches of other sizes decides no close call."""
    return random_model(ids).double()


@pytest.fixture
def voice(model, tokenizer, codec):
    """voice(**settings) of a random model."""
    return lambda **settings: Voice(model, tokenizer, codec, demo_settings(**settings), "rms")


def generate(voice, texts=TEXTS):
    """(how each text ended, its codes), generated in one batch."""
    parts = [part for text in texts for part in voice.make_parts(text)]
    voice.generate(parts)
    return [(part.end, part.codes.tolist()) for part in parts]


def count_codes_of_a_plain_sampler(voice, text, end, codes):
    """Draws every code anew: from one whole forward pass, without a cache, in NumPy's arithmetic.

    Asserts that it is as probable as the one given, unless the random number is at a border.
    """
    (part,), ids, settings = voice.make_parts(text), voice.ids, voice.settings
    speech = codes_to_ids(codes, ids).tolist() + [ids.eos] * (end == BY_ITSELF)
    with torch.no_grad():
        logits = voice.model(torch.tensor([part.prompt + speech])).logits[0].double().numpy()
    uniforms = np.random.default_rng([settings.seed, 0]).random(len(speech) + 7, np.float32)
    size, penalty = ids.codebook_size, settings.repetition_penalty
    for n, token in enumerate(speech):
        scores, first = logits[len(part.prompt) - 1 + n], ids.audio + n % 7 * size
        scores = np.append(scores[first : first + size], scores[ids.eos])
        if n % 7 or not n:
            scores[size] = -np.inf
        seen = {code - first for code in speech[n % 7 : n : 7]}
        for code in seen:
            scores[code] *= penalty if scores[code] < 0 else 1 / penalty
        given = size if token == ids.eos else token - first
        if settings.temperature == 0:
            assert scores[given] > scores.max() - 1e-4, n
            continue
        probs = np.exp((scores - scores.max()) / settings.temperature)
        given = probs[given] / probs.sum()
        probs = -np.sort(-probs / probs.sum())
        probs = probs[np.cumsum(probs) - probs < settings.top_p]
        borders, near = np.cumsum(probs) / probs.sum(), uniforms[n] + np.array([-1e-5, 1e-5])
        chosen = probs[np.searchsorted(borders, near.clip(0, 1 - 1e-9))]
        assert abs(chosen - given).min() < 1e-6, n  # another code may be as probable
    return len(speech)


# ---------------------------------------------------------------- codes


@pytest.mark.parametrize("temperature", [0, 0.6, 1.2])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_codes_are_those_of_a_plain_sampler_in_any_batch(voice, temperature, penalty):
    keys = {"temperature": temperature, "repetition_penalty": penalty, "max_seconds": 1.5}
    ends, count = set(), 0
    for seed in range(5):
        speaker = voice(seed=seed, **keys)
        spoken = generate(speaker)
        ends |= {end for end, _ in spoken}
        for text, (end, codes) in zip(TEXTS, spoken, strict=True):
            count += count_codes_of_a_plain_sampler(speaker, text, end, codes)
        assert generate(speaker, TEXTS[2:3]) == spoken[2:3]
        assert generate(speaker, TEXTS[:2]) == spoken[:2]
    assert count > 500 and (temperature == 0 or ends == {BY_ITSELF, CUT_OFF})


def test_a_static_cache_and_the_models_own_generation_config_change_nothing(voice, model, caplog):
    speaker = voice(temperature=0.9, max_seconds=1.1)
    expected = generate(speaker)
    own = {"do_sample": True, "temperature": 2.0, "top_k": 3, "top_p": 0.1, "max_length": 5}
    before, model.generation_config = (
        model.generation_config,
        generation.GenerationConfig(**own, repetition_penalty=3.0, eos_token_id=[7, 9]),
    )
    try:
        assert generate(speaker) == expected
        assert generate(speaker.replace(cache_implementation="static")) == expected
    finally:
        model.generation_config = before
    assert not caplog.records


def test_ten_thousand_frames_and_none_illegal(ids, voice):
    """Whatever the logits, ids are of their slots, and an end follows a whole frame."""
    torch.manual_seed(0)
    rows, frames, vocabulary = 600, 20, ids.audio + 7 * ids.codebook_size
    parts = [Utterance("", [0] * 3, frames, candidate=n) for n in range(rows)]
    sampler = SlotSampler(voice(temperature=1, top_p=1), parts, start=3)
    speech = torch.zeros(rows, 3, dtype=torch.long)
    for _ in range(frames * 7):
        scores = sampler(speech, torch.randn(rows, vocabulary) * 3)
        assert (scores > float("-inf")).sum() == rows
        speech = torch.cat([speech, scores.argmax(-1, keepdim=True)], dim=1)
    spoken = speech[:, 3:].reshape(-1, 7)
    whole = spoken[spoken[:, 0] != ids.eos].numpy()
    assert len(whole) > 10_000
    ids_to_codes(whole.reshape(-1), ids)  # raises for any id out of its slot
    assert (spoken[:, 1:] != ids.eos).all()
    assert not (speech[:, 3] == ids.eos).any(), "an end before the first frame"


@pytest.mark.parametrize(("temperature", "top_p", "penalty"), [(0.6, 0.8, 1.3), (1.5, 1.0, 1.0)])
def test_codes_are_distributed_as_by_transformers(temperature, top_p, penalty):
    """Over 20,000 evenly spaced uniforms, each choice comes as often as its probability says."""
    torch.manual_seed(0)
    logits, seen = torch.randn(1, 60) * 2, torch.arange(0, 60, 7)[None]
    expected = generation.RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone())
    expected = generation.TemperatureLogitsWarper(temperature)(seen, expected)
    expected = generation.TopPLogitsWarper(top_p)(seen, expected).softmax(-1)[0]
    settings = demo_settings(temperature=temperature, top_p=top_p, repetition_penalty=penalty)
    seen_mask = torch.zeros(1, 60, dtype=torch.bool).scatter_(1, seen, True)
    uniforms = torch.from_numpy((np.arange(20_000, dtype=np.float32) + 0.5) / 20_000)
    rows = logits.expand(20_000, -1), seen_mask.expand(20_000, -1)
    shares = torch.bincount(sample_codes(*rows, settings, uniforms), minlength=60) / 20_000
    assert (shares - expected).abs().max() < 3e-4
    assert (shares[expected == 0] == 0).all()


def test_texts_that_cannot_be_spoken(voice, model):
    faults = {"seven " * 3000: "no room for a frame", "?! \U0001f600": "nothing to speak"}
    for text, fault in faults.items():
        with pytest.raises(UserError, match=fault):
            voice(max_seconds=3000).say(text)
    weight = model.lm_head.weight
    before, weight.data = weight.data, torch.full_like(weight.data, float("nan"))
    try:
        for speak in (voice().say, lambda text: list(voice().stream(text))):
            with pytest.raises(UserError, match="the model computes NaN"):
                speak("seven")
    finally:
        weight.data = before


# ---------------------------------------------------------------- speech


def test_say_stream_and_speak_give_the_same_samples(voice):
    speaker = voice(temperature=0.9, max_seconds=1, speak_batch_size=2)
    text = "one two three four. three. seven eight nine. zero five."  # several parts
    alone = speaker.say(text)
    assert alone.dtype == np.float32 and len(alone) > 2048
    assert np.array_equal(np.concatenate([*speaker.stream(text)]), alone)
    assert np.array_equal(speaker.say(["nine", text])[1], alone)
    other = speaker.replace(seed=1, voice="awb")
    assert (other.name, speaker.name, other.model) == ("awb", "rms", speaker.model)
    assert not np.array_equal(other.say(text), alone)
    speeches = list(speaker.speak(["nine", text]))
    assert [len(speech.parts) for speech in speeches] == [1, 4]
    assert speeches[1].ended == all(part.end == BY_ITSELF for part in speeches[1].parts)


def test_a_stream_generates_what_is_taken_and_ends_when_it_is_left(voice, monkeypatch):
    speaker, taken = voice(temperature=0, max_seconds=3), []
    streamer = orpheus.voice.FrameStreamer
    monkeypatch.setattr(streamer, "put", lambda s, ids, put=streamer.put: taken.append(put(s, ids)))
    pieces = speaker.stream("four four eight")
    next(pieces)
    assert len(taken) < 7 * 9  # of 35 frames: four, the codec's context of three, and the next
    pieces.close()
    count = len(taken)
    assert count < 7 * 10
    assert len(speaker.say("four four eight")) > 0 and len(taken) == count


def test_a_sample_of_a_check_is_what_infer_says(run_folder, tmp_path, monkeypatch):
    """Sample for sample, with the checkpoint of the same step."""
    out = tmp_path / "two.wav"
    say(monkeypatch, "two", "--model", run_folder / "checkpoint-3", "--out", out)
    assert same_file(out, run_folder / "samples/step-000003/01.wav")
    say(
        monkeypatch,
        "two",
        "--model",
        run_folder / "checkpoint-3",
        "--temperature",
        "9",
        "--out",
        out,
    )
    assert not same_file(out, run_folder / "samples/step-000003/01.wav")


# ---------------------------------------------------------------- candidates


def test_failed_candidates_end_early_and_the_best_is_kept(voice, monkeypatch, capsys):
    """The first is made to loop after six frames; the others are as without it."""
    speaker = voice(temperature=1.0, max_seconds=2, best_of=3)
    (part,) = speaker.make_parts("nine")
    parts = [orpheus.voice.dataclasses.replace(part, candidate=n) for n in range(3)]
    speaker.generate(parts)
    lengths = [len(part.codes) for part in parts]
    assert lengths[0] > 6 and len({str(part.codes) for part in parts}) == 3
    alone = generate(speaker.replace(best_of=1), ["nine"])
    assert [(parts[0].end, parts[0].codes.tolist())] == alone  # the first is the plain one

    first = parts[0].codes[:6].tolist()
    fail = lambda codes, text, pace: "loop" * (codes[:6].tolist() == first)  # noqa: E731
    monkeypatch.setattr(orpheus.voice, "detect_failure", fail)
    again = [orpheus.voice.dataclasses.replace(part, candidate=n) for n in range(3)]
    speaker.generate(again)
    assert (again[0].end, len(again[0].codes)) == ("loop", 6)
    assert [p.codes.tolist() for p in again[1:]] == [p.codes.tolist() for p in parts[1:]]
    (speech,) = speaker.speak(["nine"])
    assert speech.parts[0].candidate > 0
    assert "candidate 1, loop" in capsys.readouterr().out
    with pytest.raises(UserError, match="leave out best_of"):
        speaker.stream("nine")


# ---------------------------------------------------------------- loading


def test_a_run_speaks_over_the_weights_and_in_the_dtype_of_its_training(adapter, capsys):
    """The demo's base is stored in bfloat16; a run that says bf16 false gets fp32 on a CPU."""
    tokens = torch.arange(300)[None]
    plain = load_model(str(adapter), dtype=torch.float32)[0]
    for weights, words in (("16bit", ""), ("4bit", "; 4bit weights"), ("8bit", "; 8bit weights")):
        change(adapter / SAVED_CONFIG, weights=weights)
        voice = load_voice(adapter, temperature=0.25)
        assert f"model    {adapter}: float32{words}\n" in capsys.readouterr().out
        assert (voice.settings.temperature, voice.weights) == (0.25, weights)
        with torch.no_grad():
            logits = voice.model(input_ids=tokens).logits
            same = [float((logits - m(input_ids=tokens).logits).abs().max()) < 1e-4
                    for m in (plain, over_nf4(adapter))]  # fmt: skip
        assert same == [weights == "16bit", weights == "4bit"]
    change(adapter / SAVED_CONFIG, weights="16bit", bf16=True)
    assert load_voice(adapter).model.dtype == torch.bfloat16
    assert load_voice("data/demo/base", codec="data/demo/codec").model.dtype == torch.bfloat16


def test_settings_are_those_of_the_run_under_what_is_given(tmp_path):
    shutil.copy("data/demo/base/config.json", tmp_path)
    (tmp_path / SAVED_CONFIG).write_text('{"temperature": 0.2, "lora_r": 5, "top_p": 0.5}')
    (tmp_path / SAVED_REPORT).write_text('{"voices": {"slt": 9}, "seconds": 1, "characters": 8}')
    found = find_voice(tmp_path, {"temperature": 0.9, "seed": "4"})
    settings = found.settings
    assert (settings.temperature, settings.top_p, settings.seed) == (0.9, 0.5, 4)
    assert (found.home, found.name, found.pace) == (tmp_path, "slt", 0.125)
    change(tmp_path / SAVED_REPORT, characters=0)
    assert find_voice(tmp_path, {}).pace is None
    for wrong, line in (({"temperature": "warm"}, "temperature is"), ({"sed": 1}, "'seed'")):
        with pytest.raises(UserError, match=line):
            find_voice(tmp_path, wrong)
    with pytest.raises(UserError, match=f"voice stl: {tmp_path} was trained on slt"):
        load_voice(tmp_path, voice="stl")


def test_an_unfinished_run_names_its_checkpoint(run_copy):
    (run_copy / "adapter_config.json").unlink()
    with pytest.raises(UserError) as error:
        load_voice(run_copy)
    assert str(error.value) == (
        f"{run_copy}: no adapter or model in it; give {run_copy / 'checkpoint-3'}, or finish the "
        "run with finetune.py --resume"
    )
