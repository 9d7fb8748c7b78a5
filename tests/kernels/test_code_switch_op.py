"""The custom op, the checks of its inputs, and tests that need a GPU."""

import numpy as np
import pytest
import torch
from support.code_switch_cases import DEVICE, Case, Implementation, edge, mixed_case
from support.messages import user_error

from megatron_prealign.kernels import CodeSwitchBatch, build_ngram_table, code_switch, code_switch_reference


@pytest.mark.parametrize("seed", [0, 1, 1 << 63, (1 << 64) - 1])
def test_the_op_equals_the_reference_and_has_fake_shapes(seed: int) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    case = mixed_case().but(seed=seed, device=DEVICE, eod_id=None)
    arguments = case.arguments()
    output = code_switch(**arguments)
    expected = code_switch_reference(**arguments)
    assert all(one is other is None or torch.equal(one, other) for one, other in zip(output, expected, strict=True))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        table = arguments["table"]._replace(
            **{
                name: mode.from_tensor(each)
                for name, each in arguments["table"]._asdict().items()
                if torch.is_tensor(each)
            }
        )
        rows = [None if each is None else mode.from_tensor(each) for each in arguments["batch"]]
        thresholds = mode.from_tensor(arguments["thresholds"])
        shapes = code_switch(CodeSwitchBatch(*rows), table, thresholds, arguments["settings"])
    for one, other in zip(output, shapes, strict=True):
        assert one is other is None or (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def test_torch_compile_sees_one_graph() -> None:
    arguments = mixed_case().but(device=DEVICE).arguments()

    def switch_and_count(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = code_switch(**{**arguments, "batch": arguments["batch"]._replace(tokens=tokens)})
        return output.tokens + 1, output.counts.sum(0)

    compiled = torch.compile(switch_and_count, backend="eager", fullgraph=True)
    tokens = arguments["batch"].tokens
    for one, other in zip(compiled(tokens), switch_and_count(tokens), strict=True):
        assert torch.equal(one, other)


def test_the_op_passes_opcheck() -> None:
    from megatron_prealign.kernels.code_switch import _code_switch_op, _pack_settings, _pack_table

    for reset in (False, True):
        case = mixed_case().but(device=DEVICE, seed=(1 << 64) - 3, label_mode="mix", mask_eod=True, reset_at_eod=reset)
        arguments = case.but(eod_id=0).arguments()
        batch, table = arguments["batch"]._replace(word_starts=None), arguments["table"]
        packed = (table.tensors, _pack_table(table), _pack_settings(arguments["settings"]))
        torch.library.opcheck(
            _code_switch_op,
            (*batch, arguments["thresholds"], *packed),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def large_case(rows: int, sequence: int) -> Case:
    """All options turned on, documents of all lengths, words that grow and shrink."""
    generator = np.random.default_rng(5)
    tokens = generator.choice(
        [0, 1, 2, 3, 11, 12, 13], (rows, sequence + 50), p=[0.002, 0.3, 0.2, 0.1, 0.2, 0.1, 0.098]
    )
    starts = generator.random(tokens.shape) < 0.05
    return edge(
        tokens.tolist(),
        (9, 18, 18),
        word_starts=starts.tolist(),
        sequence_length=sequence,
        label_mode="mix",
        eod_id=0,
        mask_eod=True,
        reset_at_eod=True,
        thresholds=[[0, 1 << 31]] * 2,
        sample_id=list(range(rows)),
        device=DEVICE,
    )


@pytest.mark.parametrize(
    ("rows", "sequence"), [(8, 4096), (256, 4096), (2, 131_072)] if torch.cuda.is_available() else [(2, 700)]
)
def test_batches_as_in_training_equal_the_reference(rows: int, sequence: int) -> None:
    arguments = large_case(rows, sequence).arguments()
    output, expected = code_switch(**arguments), code_switch_reference(**arguments)
    assert int(expected.counts[:, 2].min()) > sequence // 50
    for one, other in zip(output, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@needs_gpu
def test_addresses_beyond_32_bits() -> None:
    """4,096 sequences of 131,072 tokens: the labels alone are 4 GiB."""
    rows, sequence = 4096, 131_072
    few = large_case(4, sequence).arguments()
    batch = few["batch"]
    repeated = CodeSwitchBatch(
        tokens=batch.tokens.repeat(rows // 4, 1),
        language=batch.language.new_zeros(rows),
        sample_id=torch.arange(rows, device=DEVICE),
        word_starts=batch.word_starts.repeat(rows // 4, 1),
    )
    output = code_switch(**{**few, "batch": repeated})
    last = {**few, "batch": batch._replace(sample_id=torch.arange(rows - 4, rows, device=DEVICE))}
    for one, other in zip(output, code_switch_reference(**last), strict=True):
        assert torch.equal(one[-4:], other)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("sequence", [4096, 131_072])
def test_a_cuda_graph_replays_with_new_tokens(sequence: int) -> None:
    generator = np.random.default_rng(0)
    case = edge([[1, 2]], (8, 18), sequence_length=sequence, thresholds=[[0, 1 << 31]] * 2, device="cuda")
    arguments = {**case.but(rows=[[1] * (sequence + 1)]).arguments()}
    code_switch(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = code_switch(**arguments)
    for _ in range(3):
        arguments["batch"].tokens.copy_(torch.from_numpy(generator.integers(1, 20, (1, sequence + 1))))
        graph.replay()
        expected = code_switch_reference(**arguments)
        assert all(one is other is None or torch.equal(one, other) for one, other in zip(output, expected, strict=True))


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"tokens": torch.zeros(2, 3, dtype=torch.int64)}, ("tokens", "torch.int64 [2, 3]", "4 or more")),
        ({"tokens": torch.zeros(2, 4)}, ("tokens", "torch.float32", "int32 or int64")),
        ({"tokens": torch.zeros(4, dtype=torch.int64)}, ("tokens", "torch.int64 [4]")),
        ({"tokens": torch.zeros(2, 8, dtype=torch.int64)[:, ::2]}, ("tokens", "[8, 2]", "contiguous")),
        ({"tokens": torch.zeros(2, 4, dtype=torch.int64, device="meta")}, ("tokens is on meta", DEVICE)),
        ({"tokens": torch.zeros(2, (1 << 22) + 1, dtype=torch.int32)}, ("tokens", 4194305, 4194304)),
        ({"language": torch.zeros(3, dtype=torch.int64)}, ("language", "torch.int64 [3]", "int64 [2]")),
        ({"language": torch.zeros(2)}, ("language", "torch.float32", "int64 [2]")),
        ({"sample_id": torch.zeros(2, dtype=torch.int32)}, ("sample_id", "torch.int32", "int64 [2]")),
        ({"thresholds": torch.zeros(3, dtype=torch.int64)}, ("thresholds", "torch.int64 [3]", "int64 [2, 2]")),
        ({"tokens": torch.zeros(2, 4, dtype=torch.int16)}, ("tokens", "torch.int16", "int32 or int64")),
        ({"language": torch.zeros(2, dtype=torch.int32)}, ("language", "torch.int32", "int64 [2]")),
        ({"sample_id": torch.zeros(3, dtype=torch.int64)}, ("sample_id", "torch.int64 [3]", "int64 [2]")),
        ({"thresholds": torch.zeros(2, 2, dtype=torch.int32)}, ("thresholds", "torch.int32", "int64 [2, 2]")),
        ({"word_starts": torch.zeros(2, 5, dtype=torch.bool)}, ("word_starts", "torch.bool [2, 5]", "bool [2, 4]")),
        ({"word_starts": torch.zeros(2, 8, dtype=torch.bool)[:, ::2]}, ("word_starts", "[8, 2]", "contiguous")),
        ({"word_starts": torch.zeros(2, 4)}, ("word_starts", "torch.float32 [2, 4]", "bool [2, 4]")),
    ],
)
def test_wrong_inputs_are_refused(implementation: Implementation, changes: dict, facts: tuple) -> None:
    if "word_starts" not in changes and next(iter(changes.values())).device.type == "cpu":
        changes = {name: each.to(DEVICE) if each.is_contiguous() else each for name, each in changes.items()}
    arguments = edge([[1, 2, 3, 4]] * 2, device=DEVICE).arguments()
    for refuses in (code_switch_reference, code_switch):
        with user_error(*facts, kind=ValueError):
            other = {name: each for name, each in changes.items() if name == "thresholds"}
            batch = arguments["batch"]._replace(**{name: each for name, each in changes.items() if name not in other})
            refuses(**{**arguments, **other, "batch": batch})


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"seed": 1 << 64}, ("seed is 18446744073709551616",)),
        ({"seed": -1}, ("seed is -1",)),
        ({"label_mode": "input-only"}, ("label_mode", "'input-only'", "input_only, codeswitch")),
        ({"sequence_length": 0}, ("sequence_length is 0",)),
        ({"pad_id": -1}, ("pad_id is -1",)),
        ({"sequence_length": (1 << 22) + 1}, ("sequence_length", 4194305, "1 to 4194304")),
        ({"pad_id": 21}, ("pad_id is 21", "below 21")),
        ({"reset_at_eod": True}, ("eod_id is None", "reset_at_eod")),
        ({"pad_id": 99}, ("pad_id is 99", "below 21")),
        ({"mask_eod": True}, ("eod_id is None", "mask_eod")),
        ({"vocab_size": 22}, ("vocabulary of 21", "vocab_size = 22")),
        ({"eod_id": 1}, ("eod_id is 1", "forbidden tokens [0]")),
    ],
)
def test_wrong_settings_are_refused(changes: dict, facts: tuple) -> None:
    with user_error(*facts, kind=ValueError):
        code_switch(**edge([[1, 2, 3, 4]] * 2, **changes, device=DEVICE).arguments())


def test_a_table_of_too_many_languages_for_the_thresholds() -> None:
    arguments = edge([[1, 2]], device=DEVICE).arguments()
    wide = build_ngram_table(**edge([[1, 2]], weights=(0.0, 1.0, 1.0)).dictionary.arrays(), device=DEVICE)
    with user_error("thresholds", "torch.int64 [2, 2]", "int64 [3, 3]", kind=ValueError):
        code_switch(**{**arguments, "table": wide})
