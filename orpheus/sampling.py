"""Constrained sampling of one batch, frame by frame."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache, StaticCache

from orpheus.scoring import BY_ITSELF, CUT_OFF, Utterance
from orpheus.settings import Settings, UserError
from orpheus.tokens import SLOTS, SpeechIds


def make_slot_logits(model, ids: SpeechIds) -> Callable:
    """Returns a function (hidden, slot) → logits of the slot's codes and of the end token.

    From (rows, width) to float32 (rows, codebook_size + 1). A plain linear head is multiplied by
    those columns only: 4,097 of Orpheus's 156,940.
    """
    head, size, end = model.get_output_embeddings(), ids.codebook_size, slice(ids.eos, ids.eos + 1)
    plain = type(head) is torch.nn.Linear and head.bias is None  # else quantised or wrapped

    def slot_logits(hidden: torch.Tensor, slot: int) -> torch.Tensor:
        codes = slice(ids.audio + slot * size, ids.audio + (slot + 1) * size)
        if plain:
            parts = [torch.nn.functional.linear(hidden, head.weight[s]) for s in (codes, end)]
        else:
            logits = head(hidden)
            parts = [logits[:, s] for s in (codes, end)]
        return torch.cat(parts, dim=-1).float()

    return slot_logits


def sample_codes(
    logits: torch.Tensor, seen_mask: torch.Tensor, settings: Settings, uniforms: torch.Tensor
) -> torch.Tensor:
    """Samples by inverting the cumulative distribution, so that equal uniforms give equal codes.

    Args:
        logits: (rows, choices).
        seen_mask: (rows, choices), True where repetition_penalty applies.
        uniforms: (rows,) random numbers in [0, 1).

    Returns:
        (rows,) indices of the choices.
    """
    if (penalty := settings.repetition_penalty) != 1:
        penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
        logits = torch.where(seen_mask, penalized, logits)
    if settings.temperature == 0:
        return logits.argmax(-1)
    probs, order = (logits / settings.temperature).softmax(-1).sort(descending=True)
    probs.masked_fill_(probs.cumsum(-1) - probs >= settings.top_p, 0)
    cumulative = probs.cumsum(-1)
    index = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    index = index.minimum((probs > 0).sum(-1, keepdim=True) - 1)  # rounding may step past the last
    return order.gather(-1, index)[:, 0]


@dataclass
class Batch:
    """Utterances that are generated together, and the tensors that change from frame to frame."""

    rows: list[Utterance]
    tokens: torch.Tensor  # (rows, n) to be read next: the prompts, padded on the left, then n = 1
    positions: torch.Tensor  # (rows, n) of these tokens
    mask: torch.Tensor  # (rows, length), False for padding
    uniforms: torch.Tensor  # (rows, frames, 7) random numbers in [0, 1)
    seen_mask: torch.Tensor  # (rows, 7, codebook_size + 1), True for codes a slot has had before
    cache: Cache

    def endings(self, codes: torch.Tensor) -> list[str]:
        """How each row ends, given its code of slot 0, (rows,); empty for a row that goes on."""
        end_code, ends = self.seen_mask.shape[-1] - 1, []
        for row, code in zip(self.rows, codes.tolist(), strict=True):
            cut_off = CUT_OFF if len(row.frames) == row.max_frames else ""
            ends.append(row.end or (BY_ITSELF if code == end_code else cut_off))
        return ends

    def drop_ended(self) -> None:
        keep = [n for n, row in enumerate(self.rows) if not row.end]
        if len(keep) < len(self.rows):
            self.rows = [self.rows[n] for n in keep]
            for name in ("tokens", "positions", "mask", "uniforms", "seen_mask"):
                setattr(self, name, getattr(self, name)[keep])
            self.cache.batch_select_indices(keep)


def start_batch(model, rows: list[Utterance], ids: SpeechIds, seed: int, static: bool) -> Batch:
    """Prepares a batch with a dynamic or a static cache.

    A row's random numbers depend on `seed` and its `candidate` alone, not on the rest of the batch.
    """
    frames = max(row.max_frames for row in rows) + 1  # one more for the end token
    prompts = [torch.tensor(row.prompt) for row in rows]
    tokens = pad_sequence(prompts, batch_first=True, padding_side="left")
    length = tokens.shape[1] + frames * SLOTS
    padding = torch.tensor([[tokens.shape[1] - len(prompt)] for prompt in prompts])
    positions = (torch.arange(tokens.shape[1]) - padding).clamp(min=0)
    generators = [np.random.default_rng([seed, row.candidate]) for row in rows]
    uniforms = np.stack([g.random((frames, SLOTS), dtype=np.float32) for g in generators])
    seen_mask = torch.zeros(len(rows), SLOTS, ids.codebook_size + 1, dtype=torch.bool)
    tensors = tokens, positions, torch.arange(length) >= padding, torch.from_numpy(uniforms)
    cache = StaticCache(model.config, length) if static else DynamicCache(config=model.config)
    return Batch(rows, *(tensor.to(model.device) for tensor in (*tensors, seen_mask)), cache)


def make_frame_step(model, batch: Batch, ids: SpeechIds, settings: Settings) -> Callable:
    """Returns a function (tokens, positions, uniforms) → (codes, tokens, positions).

    It samples one frame for each row of the batch: from (rows, n) tokens to read, their positions
    and (rows, 7) uniforms to (rows, 7) codes, and (rows, 1) tokens and positions to read next.
    With a dynamic cache it stops after slot 0 if all rows end there. With a static one it never
    waits for the codes, so that it can be captured in a CUDA graph.
    """
    decoder, slot_logits = model.get_decoder(), make_slot_logits(model, ids)
    size, static = ids.codebook_size, isinstance(batch.cache, StaticCache)

    def step(tokens, positions, uniforms):
        codes, first = [], tokens.shape[1] > 1  # the prompt
        for slot in range(SLOTS):
            inputs = {"input_ids": tokens, "position_ids": positions, "attention_mask": batch.mask}
            outputs = decoder(**inputs, past_key_values=batch.cache, use_cache=True)
            logits = slot_logits(outputs.last_hidden_state[:, -1], slot)
            if first and slot == 0 and not torch.isfinite(logits).all():
                raise UserError("the model computes NaN: its weights are damaged, or it diverged")
            if first or slot > 0:
                logits[:, size] = float("-inf")  # an end comes between two frames
            sampled = sample_codes(logits, batch.seen_mask[:, slot], settings, uniforms[:, slot])
            codes.append(sampled)
            if slot == 0 and not static and all(batch.endings(sampled)):
                break
            batch.seen_mask[:, slot].scatter_(1, sampled[:, None], True)
            tokens, positions = sampled[:, None] + ids.audio + slot * size, positions[:, -1:] + 1
        return torch.stack(codes, 1), tokens, positions

    return step


def speak_frames(
    model, rows: list[Utterance], ids: SpeechIds, settings: Settings, static: bool | None = None
) -> Iterator[None]:
    """Generates `rows` as one batch; yields after each frame that rows have received.

    A row whose `end` is set leaves the batch. With a static cache (the default on a GPU) it stays
    in the batch and is ignored, so that shapes stay static.
    """
    static = torch.cuda.is_available() if static is None else static
    batch = start_batch(model, rows, ids, settings.seed, static)
    step = make_frame_step(model, batch, ids, settings)
    for frame in range(batch.uniforms.shape[1]):
        if all(row.end for row in batch.rows):
            return
        if not static:
            batch.drop_ended()
        inputs = batch.tokens, batch.positions, batch.uniforms[:, frame]
        with torch.no_grad():
            codes, batch.tokens, batch.positions = step(*inputs)
        ends = batch.endings(codes[:, 0])
        for row, row.end, frame_codes in zip(batch.rows, ends, codes.cpu().numpy(), strict=True):
            if not row.end:
                row.frames.append(frame_codes)
        if not all(row.end for row in batch.rows):
            yield
