"""Converts between the recipe's section `model` and transformers' config.json. Imports no torch.

Reading is strict: an unknown field may change the computation, and the result would silently be a different model. So
unknown fields are refused by name.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any, get_type_hints

from megatron_prealign.conversion.families import FAMILIES
from megatron_prealign.conversion.family import Family
from megatron_prealign.errors import UserError
from megatron_prealign.recipe import ModelSection, RecipeValueError, RopeScaling

# Fields of any model that do not affect its computation.
_IGNORED = frozenset(
    {
        "_name_or_path",
        "_attn_implementation_autoset",
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "label2id",
        "model_type",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "pad_token_id",
        "prefix",
        "problem_type",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "use_bfloat16",
        "use_cache",
        "vocab_size",
        "architectures",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        # Generation settings, which older versions stored here.
        "bad_words_ids",
        "begin_suppress_tokens",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    }
)
# Fields that are read in addition to a family's own.
_READ = frozenset(
    {"architectures", "layer_types", "model_type", "rope_parameters", "rope_scaling", "rope_theta", "vocab_size"}
)
# Fixed for every family, since none has an encoder or adapters.
_FIXED = {"is_encoder_decoder": False, "is_decoder": False, "add_cross_attention": False, "pruned_heads": {}}
# Fields where null means the same in config.json and in the recipe: derived from other fields, or none.
_NULLABLE = {"num_key_value_heads", "head_dim", "n_inner", "sliding_window", "pretraining_tp"}
# Limits of counts and ids. Larger values come from corrupt files, and would only be noticed after hours.
_MAX_INT = 2**31
_MAX_LAYERS = 10_000
_FIELD_TYPES: dict[str, type] = {
    name: next((kind for kind in (bool, int) if kind.__name__ in str(hint)), float)
    for name, hint in get_type_hints(ModelSection).items()
}
_TYPE_NAMES = {bool: "true or false", int: "a positive integer", float: "a number"}
_ROPE_FIELDS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}


def huggingface_config(
    model: ModelSection,
    *,
    vocab_size: int,
    seq_length: int,
    dtype: str,
    eod_id: int | None,
) -> dict[str, Any]:
    """Content of config.json for a model.

    Args:
        vocab_size: Number of ids, without padding.
        seq_length: Sequence length of training; the context length, unless the model sets another.
        dtype: Dtype of the weights: `float32`, `bfloat16` or `float16`.
        eod_id: The end-of-document id; None if unknown. A text also starts with it, as every document in training.
    """
    family = FAMILIES[model.family]
    values = asdict(model) | {
        "num_query_groups": model.query_groups,
        "ffn_hidden_size": model.mlp_width,
        "kv_channels": model.head_dim,
        "max_position_embeddings": model.max_position_embeddings or seq_length,
    }
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    config |= {hf: values[mcore] for hf, mcore in family.fields.items()}
    config |= family.fixed
    if family.rope:
        # The format of older versions, which newer versions also read.
        config["rope_theta"] = float(model.rotary_base)
        config["rope_scaling"] = _hf_rope_scaling(model.rope_scaling)
    config |= {
        "vocab_size": vocab_size,
        "bos_token_id": eod_id,
        "eos_token_id": eod_id,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    return config


def _hf_rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    fields = _ROPE_FIELDS[scaling.rope_type]
    return {"rope_type": scaling.rope_type} | {key: value for key, value in asdict(scaling).items() if key in fields}


def family_of(config: Mapping[str, Any], name: str) -> Family:
    """The table for a config.json.

    Args:
        name: Name of the file in messages.

    Raises:
        UserError: unsupported architecture.
    """
    model_type, architectures = config.get("model_type"), config.get("architectures")
    family = next((each for each in FAMILIES.values() if each.model_type == model_type), None)
    classes = architectures if isinstance(architectures, list) else [] if architectures is None else [architectures]
    by_class = next((each for each in FAMILIES.values() if classes and classes[0] == each.architecture), None)
    if by_class is not None and by_class is not family:
        got = f"is {model_type!r}" if "model_type" in config else "is missing"
        raise UserError(
            f"{name}: model_type {got}, expected {by_class.model_type!r} for architecture {by_class.architecture}; fix "
            "the file or copy it again"
        )
    # Files saved from the base model, without an output layer, name that class or none.
    fits = family is not None and (not classes or classes[0] in (family.architecture, _base_class(family)))
    if family is None or not fits:
        got = classes[0] if classes else "(none)"
        got = got if family is not None else f"{got} with model_type {model_type!r}"
        supported = ", ".join(each.architecture for each in FAMILIES.values())
        raise UserError(f"{name}: unsupported architecture {got}, expected one of {supported}")
    return family


def _base_class(family: Family) -> str:
    return family.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel") + "Model"


def model_values(config: Mapping[str, Any], name: str, *, ignore: Collection[str] = ()) -> dict[str, Any]:
    """Values of the recipe's section `model` for a config.json; fields at their defaults are left out.

    Args:
        config: Content of the file.
        name: Name of the file in messages.
        ignore: Fields that the user declares harmless.

    Raises:
        UserError: unsupported architecture, or fields that are missing, of the wrong type, or change the computation in
            an unsupported way; all of them are listed.
    """
    family = family_of(config, name)
    _check_ignored(config, family, ignore, name)
    problems = _find_problems(config, family, set(ignore))
    if problems:
        raise UserError(f"{name}: {'; '.join(problems)}")
    values: dict[str, Any] = {"family": family.name}
    source: dict[str, str] = {}
    for hf, mcore in family.fields.items():
        value = config.get(hf, family.defaults.get(hf))
        source.setdefault(mcore, hf)
        if values.setdefault(mcore, value) != value:
            raise UserError(
                f"{name}: conflicting values for model.{mcore}: {hf} is {value}, {source[mcore]} is {values[mcore]}; "
                "set "
                "both to the same value"
            )
    values["vocab_size"] = config["vocab_size"]
    if family.rope:
        base, scaling = _mcore_rope(config, family, name)
        values |= {"rotary_base": base, "rope_scaling": None if scaling is None else asdict(scaling)}
    values = {key: value for key, value in values.items() if value is not None}
    if values["num_layers"] > _MAX_LAYERS:
        raise UserError(f"{name}: got {values['num_layers']:,} layers, expected at most {_MAX_LAYERS:,}")
    _check_values(values, name)
    return values


def section_of(values: Mapping[str, Any]) -> ModelSection:
    """Builds the section `model` of a recipe from plain values, as in state.json.

    Raises:
        RecipeValueError: a value is invalid.
        TypeError: a field is unknown or missing.
    """
    scaling = values.get("rope_scaling")
    return ModelSection(**{**values, "rope_scaling": None if scaling is None else RopeScaling(**scaling)})


def _check_ignored(config: Mapping[str, Any], family: Family, ignore: Collection[str], name: str) -> None:
    absent = sorted(set(ignore) - config.keys())
    if absent:
        raise UserError(f"{name}: --ignore-config-field {', '.join(absent)} not found in this file; remove it")
    read = sorted(set(ignore) & (_READ | family.fields.keys()))
    if read:
        raise UserError(
            f"{name}: --ignore-config-field {', '.join(read)} defines the model; only fields that do not affect the "
            "computation can be ignored"
        )


def _find_problems(config: Mapping[str, Any], family: Family, ignore: set[str]) -> list[str]:
    problems = []
    missing = sorted(name for name in family.required if config.get(name) is None)
    if missing:
        problems.append(f"missing {', '.join(missing)}")
    fixed = {**_FIXED, **family.fixed}
    known = _IGNORED | family.ignored | family.fields.keys() | fixed.keys() | {"layer_types"} | ignore
    unknown = sorted(key for key in config if key not in known)
    if unknown:
        problems.append(
            f"unknown fields for {family.architecture}: {', '.join(unknown)} (may change the computation; if not, use "
            "--ignore-config-field)"
        )
    problems += [
        f"{key} is {config[key]!r}, only {value!r} is supported"
        for key, value in fixed.items()
        if key in config and key not in ignore and not _is_fixed(config[key], value, nullable=key in _NULLABLE)
    ]
    layer_types = config.get("layer_types") or ["full_attention"]
    used = {str(each) for each in (layer_types if isinstance(layer_types, list) else [layer_types])}
    allowed = {"full_attention", "sliding_attention"} if "sliding_window" in family.fields else {"full_attention"}
    if not used <= allowed:
        others = ", ".join(sorted(used - allowed))
        problems.append(f"layer_types has {others}, only full_attention is supported")
    types = {hf: _FIELD_TYPES[mcore] for hf, mcore in family.fields.items()} | {"vocab_size": int}
    problems += [
        f"{key} is {config[key]!r}, expected {_TYPE_NAMES[expected]}"
        for key, expected in types.items()
        if key in config and key not in missing and not _has_type(config[key], expected, nullable=key in _NULLABLE)
    ]
    return problems


def _is_fixed(value: Any, expected: Any, *, nullable: bool) -> bool:
    # transformers takes null for false, so it is wrong for a flag that must be true.
    return nullable or not expected if value is None else bool(value == expected)


def _has_type(value: Any, expected: type, *, nullable: bool) -> bool:
    if value is None:
        return nullable
    if expected is float:
        return _is_number(value)
    if expected is bool:
        return isinstance(value, bool)
    return type(value) is int and 0 < value <= _MAX_INT


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        # An integer of hundreds of digits.
        return False


def _mcore_rope(config: Mapping[str, Any], family: Family, name: str) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling; newer files have both in `rope_parameters`."""
    base = config.get("rope_theta", family.defaults["rope_theta"])
    objects = {key: config.get(key) for key in ("rope_parameters", "rope_scaling")}
    parsed = [_parse_rope(value, base, key, name) for key, value in objects.items() if value not in (None, {})]
    bases = {value.get("rope_theta", base) for value in objects.values() if value}
    if len(set(parsed)) > 1 or ("rope_theta" in config and bases - {base}):
        raise UserError(
            f"{name}: rope_parameters, rope_scaling and rope_theta contradict each other, and versions of transformers "
            "differ in which one they use; remove the unintended ones"
        )
    return parsed[0] if parsed else _parse_rope({}, base, "rope_scaling", name)


def _parse_rope(value: Any, base: Any, key: str, name: str) -> tuple[float, RopeScaling | None]:
    if not isinstance(value, Mapping):
        raise UserError(f"{name}: {key} is {value!r}, expected an object or null")
    fields = dict(value)
    base = fields.pop("rope_theta", base)
    # `type` is the older name of rope_type; some files have both.
    old, kind = fields.pop("type", None), fields.pop("rope_type", None)
    kind = kind or old or "default"
    if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
        raise UserError(f"{name}: unsupported rope scaling type {kind!r}, expected {', '.join(_ROPE_FIELDS)}")
    unknown = sorted(fields.keys() - _ROPE_FIELDS[kind])
    if unknown == ["original_max_position_embeddings"] and kind == "linear":
        unknown = []
    missing = sorted(_ROPE_FIELDS[kind] - fields.keys())
    if unknown:
        raise UserError(f"{name}: {key} has {', '.join(unknown)}, which rope scaling {kind!r} does not support")
    if missing or not _is_number(base) or not all(_is_number(value) for value in fields.values()):
        raise UserError(
            f"{name}: rope scaling {kind!r} has rope_theta {base!r} and {fields or 'no fields'}, expected numbers for "
            f"{', '.join(['rope_theta', *sorted(_ROPE_FIELDS[kind])])}"
        )
    if kind == "default":
        return float(base), None
    try:
        own = {field: fields[field] for field in _ROPE_FIELDS[kind]}
        return float(base), RopeScaling(rope_type="linear" if kind == "linear" else "llama3", **own)
    except RecipeValueError as error:
        raise UserError(f"{name}: {error}") from error


def _check_values(values: Mapping[str, Any], name: str) -> None:
    try:
        section_of(values)
    except (RecipeValueError, TypeError) as error:
        # The error has the recipe's field names.
        paths = error.fields if isinstance(error, RecipeValueError) else ()
        family = FAMILIES[values["family"]]
        hf_names = {f"model.{mcore}": hf for hf, mcore in family.fields.items() if hf != mcore}
        renamed = ", ".join(f"{path} is {hf_names[path]} in config.json" for path in paths if path in hf_names)
        raise UserError(
            f"{name}: describes an unsupported model: {error}{f' ({renamed})' if renamed else ''}"
        ) from error
