"""Continues prompts with a loaded model: greedy or by sampling, reproducible with a seed."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_prealign.errors import UserError
from megatron_prealign.generation.load import LoadedModel
from megatron_prealign.text import plural

_SHOWN = 40


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How tokens are drawn. The names are those of the options and of transformers.

    Raises:
        UserError: a value is out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.8
    """0 takes the most probable token (greedy)."""
    top_k: int = 50
    """0 for all tokens."""
    top_p: float = 1.0
    seed: int = 0
    num_samples: int = 1
    """Sample i is drawn with seed + i, so it does not depend on the number of samples."""

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens > 0, "a positive integer"),
            "temperature": (self.temperature >= 0 and math.isfinite(self.temperature), "a non-negative number"),
            "top_k": (self.top_k >= 0, "a non-negative integer"),
            "top_p": (0 < self.top_p <= 1, "a number above 0 and at most 1"),
            # Seeds of 64 bits; that of the last sample is larger.
            "seed": (0 <= self.seed < 2**63, "an integer from 0 to 2^63 - 1"),
            "num_samples": (self.num_samples > 0, "a positive integer"),
        }
        for name, (valid, expected) in checks.items():
            if not valid:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected {expected}")
        if self.temperature == 0 and self.num_samples > 1:
            raise UserError(
                f"--num-samples is {self.num_samples} with --temperature 0, which gives one completion; "
                "raise --temperature or remove --num-samples"
            )


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids."""

    text: str
    ids: list[int]
    max_new_tokens: int
    """Tokens that may follow: at most what the context leaves."""
    notes: list[str]
    """Warnings for the user."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One continuation of a prompt."""

    prompt: str
    sample: int
    """Number of the sample of this prompt, from 0."""
    seed: int
    text: str
    """Decoded prompt and completion."""
    completion: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: Literal["stop", "length"]
    """stop: the model ended the document; length: the maximum number of tokens or the context was reached."""


def encode_prompts(loaded: LoadedModel, texts: Sequence[str], max_new_tokens: int) -> list[Prompt]:
    """Encodes and checks all prompts, before any token is generated.

    Raises:
        UserError: a prompt is longer than the context, or has no token that the model knows.
    """
    return [_encode(loaded, text, max_new_tokens) for text in texts]


def _encode(loaded: LoadedModel, text: str, max_new_tokens: int) -> Prompt:
    tokenizer, context = loaded.tokenizer, loaded.context_length
    name = f"prompt {text[:_SHOWN] + ('...' if len(text) > _SHOWN else '')!r}"
    ids = list(tokenizer(text).input_ids)
    if not ids:
        # Documents follow an end-of-document token in training.
        start = loaded.model.generation_config.bos_token_id
        if start is None:
            raise UserError(f"{name} is empty, and the model in {loaded.path} has no token to start with")
        ids = [start]
    if len(ids) >= context:
        raise UserError(
            f"{name} has {plural(len(ids), 'token')}, expected fewer than the model's context of {context:,}; shorten "
            "it"
        )
    if max(ids) >= loaded.vocab_size:
        raise UserError(
            f"{name} has token id {max(ids):,}, but the model in {loaded.path} has {loaded.vocab_size:,} embedding "
            "rows; use the model's own tokenizer"
        )
    notes = _notes_on_unknown_tokens(loaded, name, ids)
    available = context - len(ids)
    if available < max_new_tokens:
        notes.append(f"{name}: at most {plural(available, 'token')} can follow in the model's context of {context:,}")
    return Prompt(text, ids, min(max_new_tokens, available), notes)


def _notes_on_unknown_tokens(loaded: LoadedModel, name: str, ids: Sequence[int]) -> list[str]:
    """Note on tokens that the model has never seen as text; GPT-2's unknown token is its end-of-document token."""
    tokenizer = loaded.tokenizer
    if tokenizer.unk_token_id is None or tokenizer.unk_token_id in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        return []
    words = [number for number in ids if number not in (tokenizer.eos_token_id, tokenizer.bos_token_id)]
    unknown = words.count(tokenizer.unk_token_id)
    if unknown and unknown == len(words):
        raise UserError(f"{name} has only tokens that the tokenizer of {loaded.path} does not know; use other words")
    return [f"{name}: unknown to the tokenizer: {unknown} of {plural(len(words), 'token')}"] if unknown else []


def generate(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    settings: SamplingSettings,
    on_token: Callable[[Sequence[int]], object] = lambda ids: None,
) -> Iterator[Completion]:
    """Yields `num_samples` completions of each prompt. A completion depends only on its prompt, the settings and the
    number of its sample.

    Args:
        on_token: Called after each new token with all token ids so far, those of the prompt included.
    """
    for prompt in prompts:
        for sample in range(settings.num_samples):
            yield _generate(loaded, prompt, sample, settings, on_token)


def _generate(
    loaded: LoadedModel,
    prompt: Prompt,
    sample: int,
    settings: SamplingSettings,
    on_token: Callable[[Sequence[int]], object],
) -> Completion:
    model = loaded.model
    ids = torch.tensor([prompt.ids], device=model.device)
    eos = model.generation_config.eos_token_id
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    seed = settings.seed + sample
    torch.manual_seed(seed)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=prompt.max_new_tokens,
        # A single sequence has no padding; without a value transformers logs a warning.
        pad_token_id=ends[0] if ends else 0,
        streamer=_Streamer(on_token),
        **_sampling_options(settings),
    )[0].tolist()
    text = loaded.decode(output)
    # The last characters of the prompt may change with the tokens that follow.
    common = os.path.commonprefix([loaded.decode(prompt.ids), text])
    return Completion(
        prompt=prompt.text,
        sample=sample,
        seed=seed,
        text=text,
        completion=text[len(common) :],
        prompt_tokens=len(prompt.ids),
        completion_tokens=len(output) - len(prompt.ids),
        finish_reason="stop" if output[-1] in ends else "length",
    )


def _sampling_options(settings: SamplingSettings) -> dict[str, Any]:
    """Options of transformers' `generate`; all are set, since a model directory may have defaults of its own."""
    greedy = settings.temperature == 0
    return {
        "do_sample": not greedy,
        "num_beams": 1,
        # transformers warns of other values than these if it does not sample.
        "temperature": 1.0 if greedy else settings.temperature,
        "top_k": 50 if greedy else settings.top_k,
        "top_p": 1.0 if greedy else settings.top_p,
    }


class _Streamer:
    """Streamer for transformers' `generate`, which passes the prompt first and then each new token."""

    def __init__(self, on_token: Callable[[Sequence[int]], object]) -> None:
        self._on_token = on_token
        self._ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        is_prompt = not self._ids
        self._ids += value.flatten().tolist()
        if not is_prompt:
            self._on_token(self._ids)

    def end(self) -> None:
        pass
