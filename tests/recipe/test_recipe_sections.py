"""Each field of each section: which values are invalid, and that the error names field, value and expectation."""

import re
from typing import Any

import pytest
from support.messages import user_error

from megatron_prealign.recipe import (
    AlignmentGuardSection,
    AlignmentSection,
    AlignmentWatchSection,
    CheckpointSection,
    CodeSwitchSection,
    DataSection,
    DataSource,
    DictionarySection,
    LoggingSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    ParallelText,
    RecipeValueError,
    TrainingSection,
    ValidationSource,
)

EN = DataSource(path="en", language="en")
# Section -> class and its required fields.
SECTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "model": (ModelSection, {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4}),
    "data": (DataSection, {"tokenizer": "tok", "sources": [EN], "seq_length": 16}),
    "optimizer": (OptimizerSection, {"lr": 0.001}),
    "training": (TrainingSection, {"seed": 1, "micro_batch_size": 2, "global_batch_size": 4, "train_iters": 3}),
    "logging": (LoggingSection, {"run_dir": "run"}),
    "parallel": (ParallelSection, {}),
    "checkpoint": (CheckpointSection, {}),
    "dictionary": (DictionarySection, {"table": "t"}),
    "alignment": (AlignmentSection, {"train_iters": 5, "words_per_step": 8, "lr": 0.001}),
    "alignment_guard": (AlignmentGuardSection, {}),
    "code_switch": (CodeSwitchSection, {"ratio": 0.05}),
    "alignment_watch": (AlignmentWatchSection, {"interval": 10}),
}
POSITIVE = "expected a positive"
NULL_OR_POSITIVE = "null or a positive"
NON_NEGATIVE = "non-negative"
NAN = float("nan")

# Section, field, invalid value, part of the expectation in the message.
INVALID: list[tuple[str, str, Any, str]] = [
    *[
        ("model", field, value, POSITIVE)
        for field in ("num_layers", "hidden_size", "num_attention_heads", "make_vocab_size_divisible_by")
        for value in (0, -4)
    ],
    *[
        ("model", field, value, NULL_OR_POSITIVE)
        for field in ("num_query_groups", "ffn_hidden_size", "kv_channels", "max_position_embeddings", "vocab_size")
        for value in (0, -2)
    ],
    *[
        ("model", field, 0, POSITIVE)
        for field in ("rotary_base", "layernorm_epsilon", "init_method_std", "recompute_num_layers")
    ],
    ("model", "hidden_size", 30, "model.num_attention_heads (4), or set model.kv_channels"),
    ("model", "num_query_groups", 3, "a divisor of model.num_attention_heads (4)"),
    ("model", "num_query_groups", 8, "a divisor of model.num_attention_heads (4)"),
    ("model", "hidden_dropout", 1.0, "[0, 1)"),
    ("model", "attention_dropout", -0.1, "[0, 1)"),
    ("data", "seq_length", 0, POSITIVE),
    ("data", "validation_fraction", 1.0, "[0, 1)"),
    ("data", "validation_fraction", -0.1, "[0, 1)"),
    ("optimizer", "lr", 0.0, POSITIVE),
    ("optimizer", "lr", NAN, POSITIVE),
    ("optimizer", "min_lr", 0.002, "optimizer.lr (0.001)"),
    ("optimizer", "min_lr", -1.0, "optimizer.lr (0.001)"),
    ("optimizer", "lr_warmup_iters", -1, NON_NEGATIVE),
    ("optimizer", "weight_decay", -0.1, NON_NEGATIVE),
    ("optimizer", "clip_grad", -1.0, NON_NEGATIVE),
    ("optimizer", "adam_beta1", 1.0, "[0, 1)"),
    ("optimizer", "adam_beta2", -0.1, "[0, 1)"),
    ("optimizer", "adam_eps", 0.0, POSITIVE),
    *[
        ("training", field, 0, POSITIVE)
        for field in ("micro_batch_size", "global_batch_size", "eval_samples", "retrieval_words", "retrieval_sentences")
    ],
    ("training", "train_iters", 0, NULL_OR_POSITIVE),
    ("training", "eval_interval", 0, NULL_OR_POSITIVE),
    *[("training", "exit_after_minutes", value, POSITIVE) for value in (0.0, -1.0, NAN)],
    ("training", "seed", -1, "2^63 - 1"),
    ("training", "seed", 2**63, "2^63 - 1"),
    ("training", "garbage_collection_interval", -1, NON_NEGATIVE),
    ("logging", "log_interval", 0, POSITIVE),
    ("parallel", "tensor_model_parallel_size", 0, POSITIVE),
    ("parallel", "pipeline_model_parallel_size", -1, POSITIVE),
    ("parallel", "virtual_pipeline_model_parallel_size", 1, "null or at least 2"),
    ("parallel", "virtual_pipeline_model_parallel_size", 2, "parallel.pipeline_model_parallel_size is 1"),
    ("parallel", "sequence_parallel", True, "parallel.tensor_model_parallel_size is 1"),
    (
        "parallel",
        "overlap_param_gather",
        True,
        "parallel.use_distributed_optimizer and parallel.overlap_grad_reduce",
    ),
    ("parallel", "distributed_timeout_minutes", 0.0, POSITIVE),
    ("checkpoint", "save_interval", 0, NULL_OR_POSITIVE),
    ("checkpoint", "keep", 0, POSITIVE),
    ("checkpoint", "keep_every", 0, NULL_OR_POSITIVE),
    ("checkpoint", "keep_best", " ", "null or the name of a metric"),
    ("checkpoint", "load_parts", "all", "checkpoint.load"),
    *[("checkpoint", "timeout_minutes", value, POSITIVE) for value in (0.0, NAN)],
    ("dictionary", "held_out_fraction", 1.0, "[0, 1)"),
    ("dictionary", "held_out_fraction", -0.1, "[0, 1)"),
    *[("alignment", "words_per_step", value, "at least 2") for value in (1, 0, -2)],
    ("alignment", "max_word_tokens", 0, POSITIVE),
    *[("alignment", field, 0.0, POSITIVE) for field in ("lr", "temperature")],
    *[
        ("alignment", field, -1, NON_NEGATIVE)
        for field in ("train_iters", "alpha", "lm_weight", "gamma", "lm_global_batch_size", "lr_warmup_iters")
    ],
    *[
        ("alignment", field, value, NULL_OR_POSITIVE)
        for field in ("lm_micro_batch_size", "word_micro_batch_size", "projection_size")
        for value in (0, -1)
    ],
    ("alignment", "min_lr", -1.0, "alignment.lr (0.001)"),
    ("alignment", "min_lr", 0.002, "alignment.lr (0.001)"),
    ("alignment", "lr_decay_style", "exponential", "one of constant, linear, cosine"),
    ("alignment", "stop_at_p_at_1", 0.0, "(0, 1]"),
    ("alignment", "stop_at_p_at_1", 1.1, "(0, 1]"),
    ("alignment", "layers", [1, 1], "duplicate"),
    ("alignment", "layers", [], "at least one layer, or all"),
    *[("alignment", "languages_per_group", value, "null or at least 2") for value in (1, 0, -3)],
    *[("alignment", "frequency_exponent", value, NON_NEGATIVE) for value in (-0.5, NAN)],
    *[("alignment_guard", "interval", value, POSITIVE) for value in (0, -1)],
    *[("alignment_guard", "floor", value, "(0, 1]") for value in (0.0, 1.01, -0.5, NAN)],
    ("code_switch", "ratio", 1.5, "[0, 1]"),
    ("code_switch", "ratio", -0.1, "[0, 1]"),
    ("code_switch", "source_languages", ["en", "de", "en"], "duplicate"),
    ("code_switch", "min_word_length", 0, POSITIVE),
    ("code_switch", "max_word_length", 0, "null or at least code_switch.min_word_length (1)"),
    ("code_switch", "lookahead", -1, "null or a non-negative"),
    ("alignment_watch", "interval", 0, POSITIVE),
    ("alignment_watch", "words", -1, POSITIVE),
    ("alignment_watch", "groups", "all", "one of held_out, trained"),
]


def build(section: str, **fields: Any) -> Any:
    kind, required = SECTIONS[section]
    return kind(**{**required, **fields})


@pytest.mark.parametrize("section", SECTIONS)
def test_required_fields_are_enough(section: str) -> None:
    build(section)


@pytest.mark.parametrize(
    ("section", "field", "value", "expected"), INVALID, ids=[f"{row[0]}.{row[1]}={row[2]}" for row in INVALID]
)
def test_error_names_field_value_and_expectation(section: str, field: str, value: Any, expected: str) -> None:
    with user_error(expected, kind=RecipeValueError) as caught:
        build(section, **{field: value})
    text = str(caught.value)
    assert text.startswith(f"{section}.{field} is {value}, ")
    # The fields are also there as data, for commands with other names for them.
    error = caught.value
    assert isinstance(error, RecipeValueError) and error.fields[0] == f"{section}.{field}"
    if section in ("model", "code_switch", "parallel"):
        assert set(error.fields) == set(re.findall(rf"\b{section}\.\w+", text))


@pytest.mark.parametrize(
    ("layers", "facts"),
    [
        *[
            (text, (f"alignment.layers is {text!r}", "all", "[0, 12, 24]", '"8-16"', "{0: 1, 12: 2}"))
            for text in ("some", "", "3", "5-2", "-2-3", "2-")
        ],
        ({}, ("alignment.layers is empty", "at least one layer")),
        *[({0: 1.0, 3: weight}, (f"alignment.layers.3 is {weight}", "positive")) for weight in (0.0, -1.0, NAN)],
    ],
)
def test_invalid_layers(layers: Any, facts: tuple[str, ...]) -> None:
    with user_error(*facts, kind=RecipeValueError):
        build("alignment", layers=layers)


@pytest.mark.parametrize(
    ("layers", "weights"),
    [
        ("all", [1 / 6] * 6),
        ([0, 5, 2], [1 / 3, 0.0, 1 / 3, 0.0, 0.0, 1 / 3]),
        ([4], [0.0, 0.0, 0.0, 0.0, 1.0, 0.0]),
        ("2-4", [0.0, 0.0, 1 / 3, 1 / 3, 1 / 3, 0.0]),
        ("0 - 5", [1 / 6] * 6),
        ("3-3", [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]),
        ({0: 1.0, 4: 3.0}, [0.25, 0.0, 0.0, 0.0, 0.75, 0.0]),
        ({5: 0.1}, [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]),
    ],
)
def test_weights_of_layers_sum_to_one(layers: Any, weights: list[float]) -> None:
    # Exact up to the rounding of one division.
    assert build("alignment", layers=layers).layer_weights(4) == pytest.approx(weights, rel=1e-15)


@pytest.mark.parametrize(
    ("layers", "missing"),
    [([0, 6], "6"), ([-1], "-1"), ("4-7", "6, 7"), ({6: 1.0}, "6"), ({-1: 1.0, 2: 1.0}, "-1")],
)
def test_layers_that_the_model_does_not_have(layers: Any, missing: str) -> None:
    with user_error(f"alignment.layers is {layers}", f"layer {missing},", "0 to 5", kind=RecipeValueError):
        build("alignment", layers=layers).layer_weights(4)


@pytest.mark.parametrize("freeze", ["lower", "upper"])
def test_frozen_blocks_have_no_optimizer_to_keep(freeze: str) -> None:
    with user_error("alignment.keep_optimizer is true", f"alignment.freeze {freeze}", kind=RecipeValueError):
        build("alignment", freeze=freeze, keep_optimizer=True)
    build("alignment", freeze=freeze)
    build("alignment", freeze="none", keep_optimizer=True)


@pytest.mark.parametrize("weight", [0.0, -1.0, NAN])
def test_language_weights_are_positive(weight: float) -> None:
    with user_error(f"alignment.language_weights.de is {weight}", "positive", kind=RecipeValueError):
        build("alignment", languages_per_group=2, language_weights={"en": 1.0, "de": weight})


def test_language_weights_need_something_to_draw() -> None:
    with user_error("alignment.language_weights is {'en': 1.0}", "two languages", kind=RecipeValueError):
        build("alignment", languages_per_group=2, language_weights={"en": 1.0})
    unequal = {"en": 1.0, "de": 2.0}
    facts = (f"alignment.language_weights is {unequal}", "equal weights", "alignment.languages_per_group is null")
    with user_error(*facts, kind=RecipeValueError):
        build("alignment", language_weights=unequal)
    build("alignment", languages_per_group=2, language_weights=unequal)
    # Selects among the languages of the table.
    build("alignment", language_weights={"en": 2.0, "de": 2.0})


@pytest.mark.parametrize(("iters", "tokens"), [(None, None), (3, 100)])
def test_exactly_one_length_of_training(iters: int | None, tokens: int | None) -> None:
    with user_error(f"train_iters {iters}", f"train_tokens {tokens}", "exactly one", kind=RecipeValueError):
        build("training", train_iters=iters, train_tokens=tokens)
    assert build("training", train_iters=None, train_tokens=100).train_tokens == 100


def test_train_tokens_must_be_positive() -> None:
    with user_error("training.train_tokens is 0", NULL_OR_POSITIVE, kind=RecipeValueError):
        build("training", train_iters=None, train_tokens=0)


def test_sources_are_unique_and_have_weight() -> None:
    with user_error("data.sources is empty", "at least one", kind=RecipeValueError):
        build("data", sources=[])
    with user_error("data.sources is ['en', 'en']", "duplicate", kind=RecipeValueError):
        build("data", sources=[EN, EN])
    with user_error("data.sources[en].weight is 0.0", "positive", kind=RecipeValueError):
        DataSource(path="en", language="en", weight=0.0)


def test_validation_languages_are_unique() -> None:
    twice = [ValidationSource(path="a", language="de"), ValidationSource(path="b", language="de")]
    with user_error("data.validation is ['de', 'de']", "duplicate languages", kind=RecipeValueError):
        build("data", validation=twice)


@pytest.mark.parametrize(
    ("languages", "facts"),
    [
        (["en"], ("['en']", "two different languages")),
        (["en", "de", "fr"], ("['en', 'de', 'fr']", "two different languages")),
        (["en", "en"], ("['en', 'en']", "two different languages")),
        (["en", "d e"], ("'d e'", "data.parallel_text[1].languages")),
    ],
)
def test_parallel_text_has_two_languages(languages: list[str], facts: tuple[str, ...]) -> None:
    good = ParallelText(source="a", target="b", languages=["en", "de"])
    with user_error("data.parallel_text[1].languages", *facts, kind=RecipeValueError):
        build("data", parallel_text=[good, ParallelText(source="a", target="b", languages=languages)])


def test_parallel_text_has_two_datasets() -> None:
    with user_error("data.parallel_text[0].target is a", "another dataset", kind=RecipeValueError):
        build("data", parallel_text=[ParallelText(source="a", target="a")])
    assert build("data", parallel_text=[ParallelText(source="a", target="b")]).parallel_text[0].languages is None


def test_languages_are_in_order_of_first_mention() -> None:
    sources = [DataSource(path="1", language="fr"), EN, DataSource(path="3", language="fr")]
    section = build("data", sources=sources, validation=[ValidationSource(path="4", language="de")])
    assert section.languages == ["fr", "en", "de"]


@pytest.mark.parametrize(
    "fields",
    [
        {"schedule": "linear"},
        {"schedule": "cosine", "final_ratio": 0.1},
        {"schedule": "linear", "schedule_tokens": 5},
        {"final_ratio": 0.1},
        {"schedule_tokens": 5},
    ],
)
def test_ratio_schedule_needs_both_fields_or_neither(fields: dict[str, Any]) -> None:
    with user_error("code_switch.schedule is ", "final_ratio", "schedule_tokens", kind=RecipeValueError):
        build("code_switch", **fields)


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"final_ratio": 2.0, "schedule_tokens": 5}, ("code_switch.final_ratio is 2.0", "[0, 1]")),
        ({"final_ratio": 0.0, "schedule_tokens": 0}, ("code_switch.schedule_tokens is 0", POSITIVE)),
    ],
)
def test_ratio_schedule_values(fields: dict[str, Any], facts: tuple[str, ...]) -> None:
    with user_error(*facts, kind=RecipeValueError):
        build("code_switch", schedule="linear", **fields)


@pytest.mark.parametrize(
    ("fields", "highest"),
    [
        ({"ratio": 0.05}, 0.05),
        ({"ratio": 0.05, "language_ratios": {"de": 0.2, "fr": 0.01}}, 0.2),
        # the ratio of a language scales with the schedule: tenfold here, and never above 1
        ({"ratio": 0.05, "final_ratio": 0.5, "language_ratios": {"de": 0.08}}, 0.8),
        ({"ratio": 0.05, "final_ratio": 0.5, "language_ratios": {"de": 0.2}}, 1.0),
        ({"ratio": 0.5, "final_ratio": 0.0, "language_ratios": {"de": 0.6}}, 0.6),
        ({"ratio": 0.0, "final_ratio": 0.1, "language_ratios": {"de": 0.3}}, 0.3),
        ({"ratio": 0.0, "language_ratios": {"de": 0.3}}, 0.3),
    ],
)
def test_highest_ratio_is_the_maximum_of_the_schedule(fields: dict[str, Any], highest: float) -> None:
    from megatron_prealign.code_switch.schedule import RatioSchedule

    moving = {"schedule": "linear", "schedule_tokens": 100} if "final_ratio" in fields else {}
    section = build("code_switch", **fields, **moving)
    reached = [RatioSchedule(section, ["de", "fr", "es"]).ratios(tokens) for tokens in range(0, 101, 10)]
    assert section.highest_ratio == pytest.approx(highest)
    assert max(map(max, reached)) == pytest.approx(highest)
    assert section.lookahead_tokens(1000) == round(highest * 1000)
    assert build("code_switch", lookahead=7).lookahead_tokens(1000) == 7


def test_language_weights_and_ratios_name_the_language() -> None:
    with user_error("code_switch.language_weights.de is 0.0", POSITIVE, kind=RecipeValueError):
        build("code_switch", language_weights={"fr": 1.0, "de": 0.0})
    with user_error("code_switch.language_ratios.de is 1.1", "[0, 1]", kind=RecipeValueError):
        build("code_switch", language_ratios={"de": 1.1})


@pytest.mark.parametrize(
    ("fields", "width"),
    [
        # 8/3 of 48 is 128 exactly; of 32 it is 85.3, rounded up to 128; GPT-2 has four times the hidden size.
        ({"hidden_size": 48}, 128),
        ({"hidden_size": 32}, 128),
        ({"hidden_size": 96}, 256),
        ({"hidden_size": 32, "family": "gpt2"}, 128),
        ({"hidden_size": 48, "family": "gpt2"}, 192),
        ({"hidden_size": 48, "ffn_hidden_size": 7}, 7),
    ],
)
def test_width_of_the_mlp(fields: dict[str, Any], width: int) -> None:
    assert build("model", **fields).mlp_width == width


def test_query_groups_and_head_dimension() -> None:
    model = build("model")
    assert (model.query_groups, model.head_dim) == (4, 8)
    # With kv_channels, the number of heads need not divide the hidden size.
    model = build("model", hidden_size=30, kv_channels=16, num_query_groups=1)
    assert (model.query_groups, model.head_dim) == (1, 16)


def test_model_parallel_size() -> None:
    parallel = build(
        "parallel",
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=3,
        virtual_pipeline_model_parallel_size=4,
    )
    assert (parallel.model_parallel_size, parallel.model_chunks) == (6, 4)
    assert build("parallel").model_chunks == 1
