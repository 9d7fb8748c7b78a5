"""`megatron-prealign generate`: continues prompts with a trained model."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_prealign.cli.options import parse_options
from megatron_prealign.errors import UserError
from megatron_prealign.generation.stream import StreamDecoder
from megatron_prealign.progress import Progress
from megatron_prealign.recipe.describe import PathText
from megatron_prealign.resources import use_huge_pages

if TYPE_CHECKING:
    import torch

    from megatron_prealign.generation.sample import Completion


# A byte-level model may write any of these, which terminals obey.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Generates text with a trained model, in one process; each text is a prompt and its continuation.

    A checkpoint is loaded as the model that `convert to-hf` would write; nothing is written to disk. The same options
    give the same text.
    """

    checkpoint: PathText
    """Checkpoint, or a checkpoint directory or run directory, whose newest checkpoint is used; or a Hugging Face model
    directory."""
    prompt: list[str] = field(default_factory=list)
    """Texts to continue; by default, the lines of standard input."""
    max_new_tokens: int = 64
    """Maximum number of tokens to generate."""
    temperature: float = 0.8
    """Divisor of the logits: lower is less random, 0 takes the most probable token (greedy)."""
    top_k: int = 50
    """Draw from the K most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Draw from the most probable tokens whose probabilities sum up to this value."""
    num_samples: int = 1
    """Number of texts of each prompt."""
    seed: int = 0
    """Random seed of the first text of each prompt; the following ones use the next seeds."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on; auto uses CUDA if a GPU is available."""
    output: PathText | None = None
    """JSON Lines file to write instead of printing: prompt, text, completion, numbers of tokens, finish_reason."""
    overwrite: bool = False
    """Replace an existing output file."""


def main(argv: Sequence[str]) -> int:
    """Runs `megatron-prealign generate` with the arguments `argv`."""
    options = parse_options(GenerateOptions, "generate", argv)
    texts = _prompts(options.prompt)
    use_huge_pages()

    from megatron_prealign.files.directories import check_output_file
    from megatron_prealign.generation.load import load_model
    from megatron_prealign.generation.sample import SamplingSettings, encode_prompts, generate

    settings = SamplingSettings(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        num_samples=options.num_samples,
        seed=options.seed,
    )
    check_output_file(options.output, overwrite=options.overwrite)
    loaded = load_model(options.checkpoint, _device(options.device))
    _inform(f"model       {loaded.path}, context {loaded.context_length:,} tokens")
    prompts = encode_prompts(loaded, texts, settings.max_new_tokens)
    for note in (note for prompt in prompts for note in prompt.notes):
        _inform(f"note: {note}")
    if options.output is None:
        screen = _Screen(len(texts), settings.num_samples, loaded.decode)
        for completion in generate(loaded, prompts, settings, screen.show):
            screen.finish(completion.text)
        return 0
    total = sum(prompt.max_new_tokens for prompt in prompts) * settings.num_samples
    with Progress("generate", total, unit="tokens") as progress:
        completions = list(generate(loaded, prompts, settings, lambda ids: progress.update()))
    _write(completions, Path(options.output))
    return 0


def _prompts(given: list[str]) -> list[str]:
    """The prompts of the options, or the lines of standard input.

    Raises:
        UserError: there are none, or they are not UTF-8.
    """
    if given:
        for text in given:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise UserError(f"--prompt {text!r} is not UTF-8; check the encoding of the terminal") from None
        return given
    if sys.stdin.isatty():
        raise UserError("--prompt is required, or prompts on standard input, one per line")
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"prompts on standard input are not UTF-8 (byte {error.start:,}); convert them") from None
    if not text:
        raise UserError("standard input is empty; use --prompt TEXT, or write prompts to standard input, one per line")
    # Not splitlines(), which also splits at U+2028, form feeds and others.
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _device(name: str) -> "torch.device":
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device is cuda, but torch finds no GPU; use --device cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def _inform(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Screen:
    """Prints texts to standard output, on a terminal while they are generated, with headings on standard error."""

    def __init__(self, prompts: int, samples: int, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._stream = StreamDecoder(decode)
        self._headings = [
            f"prompt {prompt} of {prompts}, sample {sample} of {samples}:"
            for prompt in range(1, prompts + 1)
            for sample in range(1, samples + 1)
        ]
        self._with_headings = len(self._headings) > 1
        self._terminal = sys.stdout.isatty()
        self._has_begun = False
        self._shown: list[str] = []

    def show(self, ids: Sequence[int]) -> None:
        """Shows an unfinished text, given by all its tokens so far, on a terminal."""
        if not self._terminal:
            return
        added = _CONTROL.sub("\ufffd", self._stream.new_text(ids))
        if added:
            self._begin()
            print(added, end="", flush=True)
            self._shown.append(added)

    def finish(self, text: str) -> None:
        """Prints the rest of a text."""
        if self._terminal:
            text = _CONTROL.sub("\ufffd", text)
        self._begin()
        shown = "".join(self._shown)
        # Bytes that are no character may change the characters before them.
        print(text.removeprefix(shown) if text.startswith(shown) else f"\n{text}", flush=True)
        self._has_begun, self._shown, self._stream = False, [], StreamDecoder(self._decode)

    def _begin(self) -> None:
        if not self._has_begun and self._with_headings:
            _inform(self._headings.pop(0))
        self._has_begun = True


def _write(completions: Sequence["Completion"], output: Path) -> None:
    import json

    from megatron_prealign.files.atomic import write_atomically
    from megatron_prealign.files.directories import writing

    lines = [json.dumps(asdict(completion), ensure_ascii=False) + "\n" for completion in completions]
    with writing(output), write_atomically(output) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    print(f"wrote {output}")
