"""`generate`: text of checkpoints and of Hugging Face model directories."""

import copy
import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.hf_models import END, TOKENS, change_config, make_model, save_model, save_tokenizer
from support.messages import assert_facts, assert_refused, user_error
from support.workers import WorkerPool

from megatron_prealign import cli
from megatron_prealign.conversion.from_hf import from_huggingface
from megatron_prealign.generation.load import LoadedModel, load_model
from megatron_prealign.generation.sample import Completion, SamplingSettings, encode_prompts, generate
from megatron_prealign.tools.generate import _prompts, _Screen

CPU = torch.device("cpu")
PROMPTS = ["The house", "größer"]
CONTEXT = 64


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face model directory with random weights."""
    return save_model(make_model("llama"), tmp_path_factory.mktemp("generate") / "model")


@pytest.fixture(scope="module")
def checkpoint(directory: Path) -> Path:
    """The same weights as a checkpoint, with a tokenizer that is converted and not copied."""
    save_tokenizer(directory.parent / "tokenizer")
    output = directory.parent / "checkpoint"
    from_huggingface(directory, output, tokenizer=directory.parent / "tokenizer")
    return output


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    return load_model(checkpoint, CPU)


def complete(loaded: LoadedModel, prompts: list[str], **values: Any) -> list[Completion]:
    settings = SamplingSettings(**{"max_new_tokens": 8, **values})
    return list(generate(loaded, encode_prompts(loaded, prompts, settings.max_new_tokens), settings))


def mcore_argmax(checkpoint: str, ids: list[int]) -> list[int]:
    """Runs in a worker: the most probable token after each token of `ids`, by the Megatron-Core model."""
    from megatron_prealign.conversion.hidden_states import mcore_states
    from megatron_prealign.conversion.to_hf import open_checkpoint

    states = mcore_states(open_checkpoint(Path(checkpoint)), ids, torch.float32, None, leave_process_group=True)
    return states["logits"].argmax(-1).tolist()


def test_greedy_tokens_are_the_most_probable_of_the_megatron_model(
    checkpoint: Path, loaded: LoadedModel, workers: WorkerPool
) -> None:
    ids: list[int] = []
    settings = SamplingSettings(max_new_tokens=6, temperature=0)
    (prompt,) = encode_prompts(loaded, PROMPTS[:1], settings.max_new_tokens)
    (completion,) = generate(loaded, [prompt], settings, lambda tokens: ids.__setitem__(slice(None), tokens))
    assert ids[: len(prompt.ids)] == prompt.ids and len(ids) == len(prompt.ids) + completion.completion_tokens
    (expected,) = workers.run(1, mcore_argmax, str(checkpoint), ids[:-1])
    assert ids[len(prompt.ids) :] == expected[len(prompt.ids) - 1 :]
    # A model that repeats one token would match too easily.
    assert len(set(expected)) > 3


def test_a_checkpoint_gives_the_text_of_its_model_directory(loaded: LoadedModel, directory: Path) -> None:
    from_directory = load_model(directory, CPU)
    assert complete(loaded, PROMPTS, num_samples=2) == complete(from_directory, PROMPTS, num_samples=2)
    state = from_directory.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.model.state_dict().items())


def test_a_text_depends_on_its_prompt_and_its_seed_only(loaded: LoadedModel) -> None:
    texts = {(each.prompt, each.seed): each.text for each in complete(loaded, PROMPTS, num_samples=3, seed=5)}
    assert len(set(texts.values())) == 6
    assert [each.text for each in complete(loaded, PROMPTS[1:], seed=6)] == [texts[PROMPTS[1], 6]]
    for each in complete(loaded, PROMPTS, top_k=1, seed=9):
        assert [each.text] == [greedy.text for greedy in complete(loaded, [each.prompt], temperature=0)]


def test_completions(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = complete(loaded, PROMPTS[:1], temperature=0)
    assert first.text == first.prompt + first.completion and first.completion
    assert (first.prompt_tokens, first.completion_tokens, first.finish_reason) == (len(PROMPTS[0]), 8, "length")
    # The tokens are bytes.
    third = loaded.tokenizer.convert_tokens_to_ids(loaded.tokenizer.tokenize(first.text))[first.prompt_tokens + 2]
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", third)
    (stopped,) = complete(loaded, PROMPTS[:1], temperature=0)
    assert stopped.completion_tokens <= 3 and stopped.finish_reason == "stop"


def test_prompts_and_the_context(loaded: LoadedModel) -> None:
    (longest,) = encode_prompts(loaded, ["x" * (CONTEXT - 3)], 8)
    assert longest.max_new_tokens == 3
    assert_facts(longest.notes[0], 3, CONTEXT)
    (completion,) = generate(loaded, [longest], SamplingSettings(max_new_tokens=8))
    assert completion.completion_tokens <= 3
    with user_error(CONTEXT, "xxx..."):
        encode_prompts(loaded, ["short", "x" * CONTEXT], 8)
    (empty,) = encode_prompts(loaded, [""], 8)
    assert empty.ids == [TOKENS - 1] and loaded.tokenizer.decode(empty.ids) == END


def test_unknown_tokens(loaded: LoadedModel) -> None:
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.unk_token = "x"
    with_unknown = replace(loaded, tokenizer=tokenizer)
    (prompt,) = encode_prompts(with_unknown, ["axb"], 8)
    assert_facts(prompt.notes[0], "axb", "1 of 3")
    with user_error("'xx'"):
        encode_prompts(with_unknown, ["xx"], 8)


@pytest.mark.parametrize(
    ("values", "facts"),
    [
        ({"max_new_tokens": 0}, ("--max-new-tokens", 0)),
        ({"temperature": -0.5}, ("--temperature", -0.5)),
        ({"temperature": float("nan")}, ("--temperature", "nan")),
        ({"top_k": -1}, ("--top-k", -1)),
        ({"top_p": 0.0}, ("--top-p", 0.0)),
        ({"top_p": 1.5}, ("--top-p", 1.5)),
        ({"seed": -1}, ("--seed", -1)),
        ({"seed": 2**63}, ("--seed", 2**63)),
        ({"num_samples": 0}, ("--num-samples", 0)),
        ({"num_samples": 2, "temperature": 0.0}, ("--num-samples", "--temperature")),
    ],
)
def test_settings_out_of_range(values: dict[str, Any], facts: tuple[object, ...]) -> None:
    with user_error(*facts):
        SamplingSettings(**values)


def test_texts_on_stdout_and_everything_else_on_stderr(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    arguments = ["generate", "--checkpoint", str(checkpoint), "--max-new-tokens", "8", "--temperature", "0"]
    assert cli.main([*arguments, "--prompt", *PROMPTS]) == 0
    output = capsys.readouterr()
    expected = [each.text for each in complete(load_model(checkpoint, CPU), PROMPTS, temperature=0)]
    assert output.out == "".join(text + "\n" for text in expected)
    assert_facts(output.err, checkpoint, "prompt 2 of 2")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(PROMPTS).encode())))
    assert cli.main([*arguments, "--output", str(tmp_path / "texts.jsonl")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["text"] for line in lines] == expected and [line["prompt"] for line in lines] == PROMPTS
    assert_refused(
        cli.main([*arguments, "--prompt", "x", "--output", str(tmp_path / "texts.jsonl")]),
        capsys.readouterr().err.splitlines()[-1],
        "texts.jsonl",
        "--overwrite",
    )


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_standard_input_is_split_at_newlines_only(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["one\u2028two\x0cthree\x85", "", "four\rfive"]
    for last in ("", end):
        content = (end.join(lines) + last).encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert _prompts([]) == lines
    # An empty line is an empty prompt.
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(end.encode())))
    assert _prompts([]) == [""]


@pytest.mark.parametrize(
    ("content", "facts"),
    [(b"", ("standard input", "--prompt")), (b"ab\xff", ("standard input", "UTF-8", "byte 2"))],
)
def test_standard_input_that_is_no_prompt(
    content: bytes,
    facts: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert_refused(cli.main(["generate", "--checkpoint", str(tmp_path)]), capsys.readouterr().err, *facts)


def test_a_terminal_gets_no_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    text = "a\x1b[2J\nüß."
    tokens = text.encode()
    screen = _Screen(1, 2, lambda ids: bytes(ids).decode(errors="replace"))
    for _ in range(2):
        for end in range(1, len(tokens)):
            screen.show(tokens[:end])
        assert capsys.readouterr().out == "a\ufffd[2J\nüß"
        screen.finish(text)
        assert capsys.readouterr().out == ".\n"
    # A text that is not what it seemed to be is printed again.
    screen = _Screen(1, 1, lambda ids: bytes(ids).decode(errors="replace"))
    screen.show(tokens[:1])
    screen.finish("other")
    assert capsys.readouterr().out == "a\nother\n"


def test_paths_without_a_model(tmp_path: Path) -> None:
    for path in (tmp_path / "no", tmp_path):
        with user_error(path):
            load_model(path, CPU)


def test_a_model_directory_that_is_incomplete_or_diverged(directory: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(directory, tmp_path / "model"))
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name] * float("nan")}, broken / "model.safetensors", {"format": "pt"})
    with user_error(broken, name, "NaN"):
        load_model(broken, CPU)
    save_file(
        {key: each for key, each in tensors.items() if key != name}, broken / "model.safetensors", {"format": "pt"}
    )
    with user_error(broken, name):
        load_model(broken, CPU)
    change_config(broken, model_type="unknown")
    with user_error(broken):
        load_model(broken, CPU)
