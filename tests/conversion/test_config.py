"""config.json and the recipe's section `model`: transformers' own files survive the round trip, and fields that would
change the model are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.messages import assert_facts, user_error
from transformers import AutoConfig, GPT2Config, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from megatron_prealign.conversion.config import huggingface_config, model_values, section_of
from megatron_prealign.errors import UserError
from megatron_prealign.recipe import ModelSection

SHAPE = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, initializer_range=0.01),
    "llama3": LlamaConfig(**SHAPE, head_dim=12, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama_linear": LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}, attention_dropout=0.1
    ),
    "mistral": MistralConfig(**SHAPE, head_dim=8, sliding_window=64),
    "mistral_without_window": MistralConfig(**SHAPE, head_dim=8, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen3": Qwen3Config(**SHAPE, head_dim=10),
    "gpt2": GPT2Config(
        n_layer=3, n_embd=32, n_head=4, n_inner=48, n_positions=64, vocab_size=40, bos_token_id=1, eos_token_id=2
    ),
}


def saved(config: PretrainedConfig, directory: Path) -> dict[str, Any]:
    """config.json as transformers writes it."""
    config.save_pretrained(directory)
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


def compared_fields(config: PretrainedConfig) -> dict[str, Any]:
    """All fields except paths, versions and the id that starts a text."""
    return {
        key: value
        for key, value in config.to_dict().items()
        # Texts start with the end-of-document id, whatever the original had.
        if key not in ("_name_or_path", "transformers_version", "architectures", "dtype", "bos_token_id")
    }


def round_trip(values: dict[str, Any], directory: Path) -> PretrainedConfig:
    """Config loaded by transformers from values of the recipe's section."""
    config = huggingface_config(section_of(values), vocab_size=40, seq_length=64, dtype="float32", eod_id=2)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return AutoConfig.from_pretrained(directory)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_config_survives_the_round_trip(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    values = model_values(saved(config, tmp_path), "config.json")
    assert values["family"] == config.model_type
    assert values["vocab_size"] == 40
    assert compared_fields(round_trip(values, tmp_path)) == compared_fields(config)


def test_published_formats_are_read() -> None:
    """Fields as Llama 2, Llama 3.1, Mistral 7B and GPT-2 were published with, which newer versions do not write."""
    llama2 = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    }
    values = model_values(llama2, "config.json")
    assert "rope_scaling" not in values
    assert section_of(values).head_dim == 128
    # Old and new name of one field, as in files written between two versions.
    llama3 = {**LLAMA3, "type": "llama3"}
    del llama3["rope_theta"]
    values = model_values({**llama2, "rope_scaling": llama3, "rope_theta": 500000.0}, "config.json")
    assert values["rotary_base"] == 500000.0
    assert values["rope_scaling"]["factor"] == 32.0
    older = {"type": "linear", "factor": 2.0}
    assert model_values({**llama2, "rope_scaling": older}, "config.json")["rope_scaling"]["rope_type"] == "linear"
    mistral = {**llama2, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 4096}
    del mistral["pretraining_tp"]
    assert model_values(mistral, "config.json")["sliding_window"] == 4096
    gpt2 = {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    }
    values = model_values(gpt2, "config.json")
    assert values["share_embeddings_and_output_weights"]
    assert section_of(values).mlp_width == 3072


CHANGES = [
    ("llama", {"hidden_act": "gelu"}, ("hidden_act is 'gelu'", "'silu'")),
    ("llama", {"attention_bias": True}, ("attention_bias is True", "False")),
    ("llama", {"mlp_bias": True}, ("mlp_bias is True", "False")),
    ("llama", {"pretraining_tp": 2}, ("pretraining_tp is 2", "only 1")),
    (
        "llama",
        {"quantization_config": {"bits": 4}},
        ("unknown", "quantization_config", "LlamaForCausalLM", "--ignore-config-field"),
    ),
    ("llama", {"embedding_multiplier": 2, "auto_map": {}}, ("unknown", "auto_map, embedding_multiplier")),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ("rope scaling", "'yarn'", "llama3")),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, ("no fields", "rope_theta, factor")),
    (
        "llama",
        {"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}},
        ("rope_parameters", "partial_rotary_factor", "'default'"),
    ),
    ("llama", {"rope_parameters": [1]}, ("rope_parameters is [1]", "object")),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": -1.0}}, ("model.rope_scaling.factor", "-1.0")),
    ("llama", {"model_type": "bert"}, ("model_type is 'bert'", "'llama'", "LlamaForCausalLM")),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, ("LlamaForSequenceClass", "GPT2LMHeadModel")),
    # transformers 5 uses the older field, which would be lost here.
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ("contradict", "rope_parameters", "rope_scaling")),
    ("llama", {"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 5e5}, ("contradict", "rope_theta")),
    ("llama", {"rope_parameters": {"rope_theta": True}}, ("rope_theta True", "no fields")),
    ("llama", {"rope_parameters": {"rope_theta": 10**400}}, ("numbers for rope_theta",)),
    ("llama", {"rms_norm_eps": 10**400}, ("rms_norm_eps", "expected a number")),
    ("llama", {"hidden_act": None}, ("hidden_act is None", "'silu'")),
    ("llama", {"hidden_size": None}, ("missing hidden_size",)),
    ("llama", {"hidden_size": "32"}, ("hidden_size is '32'", "integer")),
    ("llama", {"num_hidden_layers": 10**9}, ("1,000,000,000 layers", "10,000")),
    ("llama", {"rms_norm_eps": None}, ("rms_norm_eps is None", "a number")),
    ("llama", {"rms_norm_eps": True}, ("rms_norm_eps is True", "a number")),
    ("llama", {"num_key_value_heads": 3}, ("model.num_query_groups is num_key_value_heads",)),
    ("llama", {"model_type": "mistral"}, ("model_type is 'mistral'", "'llama'", "LlamaForCausalLM")),
    ("mistral", {"attention_bias": True}, ("unknown", "attention_bias", "MistralForCausalLM")),
    ("qwen2", {"use_sliding_window": True}, ("use_sliding_window is True", "False")),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, ("layer_types has sliding_attention",)),
    ("qwen3", {"attention_bias": True}, ("attention_bias is True",)),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ("scale_attn_by_inverse_layer_idx is True",)),
    # transformers takes null for false: attention that is not scaled.
    ("gpt2", {"scale_attn_weights": None}, ("scale_attn_weights is None", "True")),
    ("gpt2", {"activation_function": "relu"}, ("activation_function is 'relu'", "'gelu_new'")),
    ("gpt2", {"resid_pdrop": 0.0}, ("model.hidden_dropout", "embd_pdrop is 0.1", "resid_pdrop is 0.0")),
    ("gpt2", {"add_cross_attention": True}, ("add_cross_attention is True",)),
]


@pytest.mark.parametrize(("name", "change", "facts"), CHANGES)
def test_another_model_is_refused(tmp_path: Path, name: str, change: dict[str, Any], facts: tuple[str, ...]) -> None:
    config = {"architectures": ["LlamaForCausalLM"]} if name == "llama" else {}
    config |= {**saved(CONFIGS[name], tmp_path), **config, **change}
    with user_error(*facts) as caught:
        model_values(config, "config.json")
    assert str(caught.value).startswith("config.json: ")


def test_a_missing_model_type(tmp_path: Path) -> None:
    config = saved(CONFIGS["llama"], tmp_path) | {"architectures": ["LlamaForCausalLM"]}
    del config["model_type"]
    with user_error("model_type is missing", "'llama'", "LlamaForCausalLM"):
        model_values(config, "config.json")


@pytest.mark.parametrize(
    ("name", "fact"),
    [("hiden_act", "not found"), ("hidden_size", "defines the model"), ("vocab_size", "defines the model")],
)
def test_fields_that_cannot_be_ignored(tmp_path: Path, name: str, fact: str) -> None:
    with user_error("config.json", f"--ignore-config-field {name}", fact):
        model_values(saved(CONFIGS["llama"], tmp_path), "config.json", ignore=[name])


def test_an_ignored_field_is_skipped(tmp_path: Path) -> None:
    config = {**saved(CONFIGS["llama"], tmp_path), "embedding_multiplier": 1, "mlp_bias": True}
    values = model_values(config, "config.json", ignore=["embedding_multiplier", "mlp_bias"])
    assert values["family"] == "llama"


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"family": "gpt2", "num_query_groups": 2}, ("model.num_query_groups is 2", "null", "gpt2")),
        ({"family": "qwen2", "kv_channels": 6}, ("model.kv_channels is 6", "null", "qwen2")),
        ({"sliding_window": 8}, ("model.sliding_window is 8", "null", "mistral", "llama")),
        (
            {"family": "gpt2", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            ("model.rope_scaling is set", "null", "gpt2"),
        ),
    ],
)
def test_a_recipe_refuses_models_that_no_other_software_supports(
    fields: dict[str, Any], facts: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match="model") as caught:
        section_of({"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, **fields})
    assert_facts(str(caught.value), *facts)


def test_the_context_length_is_the_training_sequence_length_unless_the_model_sets_one() -> None:
    model = ModelSection(num_layers=1, hidden_size=8, num_attention_heads=2)
    config = huggingface_config(model, vocab_size=10, seq_length=24, dtype="bfloat16", eod_id=3)
    assert (config["max_position_embeddings"], config["bos_token_id"], config["eos_token_id"]) == (24, 3, 3)
    # Written explicitly, so that they do not depend on the reader's defaults.
    assert (config["hidden_act"], config["attention_bias"], config["mlp_bias"]) == ("silu", False, False)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**40) | st.just(10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = sorted({key for config in CONFIGS.values() for key in config.to_dict()} | {"rope_scaling", "type"})


@pytest.mark.slow
@settings(max_examples=300)
@given(
    name=st.sampled_from(sorted(CONFIGS)),
    changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4),
    rope=st.dictionaries(st.sampled_from(sorted(LLAMA3)), JSON, max_size=4),
)
def test_any_value_is_read_or_a_user_error(name: str, changes: dict[str, Any], rope: dict[str, Any]) -> None:
    try:
        values = model_values({**CONFIGS[name].to_dict(), "rope_parameters": rope, **changes}, "config.json")
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert section_of(values).num_layers > 0
