"""config.json of transformers from the recipe's section `model`, and back. Imports no torch.

Reading is strict: a field that no table knows may change the maths, and then the model would be another one without
anybody noticing. So what is not known is refused by name.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any, get_type_hints

from megatron_prealign.conversion.families import FAMILIES
from megatron_prealign.conversion.family import Family
from megatron_prealign.errors import UserError
from megatron_prealign.recipe import ModelSection, RecipeValueError, RopeScaling

# Fields of any model that say nothing about its maths.
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
        # How older versions kept the settings of generation.
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
# Fields beside a family's own that are read.
_READ = frozenset(
    {"architectures", "layer_types", "model_type", "rope_parameters", "rope_scaling", "rope_theta", "vocab_size"}
)
# What every family but one with an encoder or adapters has.
_FIXED = {"is_encoder_decoder": False, "is_decoder": False, "add_cross_attention": False, "pruned_heads": {}}
# Where their null means what ours does: derived from other fields, or none.
_NULLABLE = {"num_key_value_heads", "head_dim", "n_inner", "sliding_window", "pretraining_tp"}
# Of a field that counts something, and of ids. Larger ones come from damaged files, and would take hours to find out.
_MOST = 2**31
_MOST_LAYERS = 10_000
_KINDS: dict[str, type] = {
    name: next((kind for kind in (bool, int) if kind.__name__ in str(hint)), float)
    for name, hint in get_type_hints(ModelSection).items()
}
_KIND_NAMES = {bool: "true or false", int: "a whole number above 0", float: "a number"}
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
    bos_id: int | None = None,
) -> dict[str, Any]:
    """The content of config.json for a model.

    Args:
        vocab_size: True number of ids.
        seq_length: Tokens of a training sample: the context, unless the model names another.
        dtype: Of the weights, `float32`, `bfloat16` or `float16`.
        eod_id: The end-of-document id; None if nobody knows it.
        bos_id: What a text starts with; None for `eod_id`, which is what documents begin after.
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
        # The form of older versions, which newer ones read too.
        config["rope_theta"] = float(model.rotary_base)
        config["rope_scaling"] = _hf_rope_scaling(model.rope_scaling)
    config |= {
        "vocab_size": vocab_size,
        "bos_token_id": eod_id if bos_id is None else bos_id,
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
        name: What messages call the file.

    Raises:
        UserError: no table is for this architecture.
    """
    kind, named = config.get("model_type"), config.get("architectures")
    family = next((each for each in FAMILIES.values() if each.model_type == kind), None)
    known = ", ".join(each.architecture for each in FAMILIES.values())
    classes = named if isinstance(named, list) else [] if named is None else [named]
    by_class = next((each for each in FAMILIES.values() if classes and classes[0] == each.architecture), None)
    if by_class is not None and by_class is not family:
        got = f"is {kind!r}" if "model_type" in config else "is missing"
        raise UserError(
            f"{name}: model_type {got}, expected {by_class.model_type!r}, as the architecture is "
            f"{by_class.architecture}; copy the file again, or mend it"
        )
    # Files of the bare model, without an output layer, name that class or none.
    fits = family is not None and (not classes or classes[0] in (family.architecture, _bare(family)))
    if family is None or not fits:
        got = classes[0] if classes else "not named"
        got = got if family is not None else f"{got} and the model_type {kind!r}"
        raise UserError(f"{name}: the architecture is {got}, which cannot be converted; expected one of {known}")
    return family


def _bare(family: Family) -> str:
    return family.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel") + "Model"


def model_values(config: Mapping[str, Any], name: str, *, ignore: Collection[str] = ()) -> dict[str, Any]:
    """The values of the recipe's section `model` for a config.json; fields at their defaults are left out.

    Args:
        config: The file's content.
        name: What messages call it.
        ignore: Fields that the user vouches for.

    Raises:
        UserError: an unknown architecture, a field that is missing, of the wrong kind, or changes the maths in a way
            that is not built in; all of them are named.
    """
    family = family_of(config, name)
    _check_ignored(config, family, ignore, name)
    problems = _find_problems(config, family, set(ignore))
    if problems:
        raise UserError(f"{name}: {'; '.join(problems)}")
    values: dict[str, Any] = {"family": family.name}
    for hf, mcore in family.fields.items():
        value = config.get(hf, family.defaults.get(hf))
        if values.setdefault(mcore, value) != value:
            raise UserError(f"{name}: {hf} is {value}, another field says {values[mcore]}; only one value can be had")
    values["vocab_size"] = config["vocab_size"]
    if family.rope:
        base, scaling = _mcore_rope(config, family, name)
        values |= {"rotary_base": base, "rope_scaling": None if scaling is None else asdict(scaling)}
    values = {key: value for key, value in values.items() if value is not None}
    if values["num_layers"] > _MOST_LAYERS:
        raise UserError(f"{name}: it has {values['num_layers']:,} layers, expected at most {_MOST_LAYERS:,}")
    _check_values(values, name)
    return values


def section_of(values: Mapping[str, Any]) -> ModelSection:
    """The section of a recipe from its plain values, as in state.json.

    Raises:
        RecipeValueError: a value cannot work.
        TypeError: a field is unknown or missing.
    """
    scaling = values.get("rope_scaling")
    return ModelSection(**{**values, "rope_scaling": None if scaling is None else RopeScaling(**scaling)})


def _check_ignored(config: Mapping[str, Any], family: Family, ignore: Collection[str], name: str) -> None:
    absent = sorted(set(ignore) - config.keys())
    if absent:
        raise UserError(f"{name}: --ignore-config-field names {', '.join(absent)}, which is not in it; leave it out")
    read = sorted(set(ignore) & (_READ | family.fields.keys()))
    if read:
        raise UserError(
            f"{name}: --ignore-config-field names {', '.join(read)}, which the model is made by; only fields that "
            "change no maths can be ignored"
        )


def _find_problems(config: Mapping[str, Any], family: Family, ignore: set[str]) -> list[str]:
    problems = []
    missing = sorted(name for name in family.needed if config.get(name) is None)
    if missing:
        problems.append(f"{', '.join(missing)} missing")
    fixed = {**_FIXED, **family.fixed}
    known = _IGNORED | family.ignored | family.fields.keys() | fixed.keys() | {"layer_types"} | ignore
    unknown = sorted(key for key in config if key not in known)
    if unknown:
        problems.append(
            f"{', '.join(unknown)} not known for {family.architecture}: it may change the maths and is not built in "
            "(if it does not, name it with --ignore-config-field)"
        )
    problems += [
        f"{key} is {config[key]!r}, only {value!r} is built in"
        for key, value in fixed.items()
        if key in config and key not in ignore and not _is_fixed(config[key], value, nullable=key in _NULLABLE)
    ]
    given = config.get("layer_types") or ["full_attention"]
    kinds = {str(kind) for kind in (given if isinstance(given, list) else [given])}
    allowed = {"full_attention", "sliding_attention"} if "sliding_window" in family.fields else {"full_attention"}
    if not kinds <= allowed:
        others = ", ".join(sorted(kinds - allowed))
        problems.append(f"layer_types has {others}, only full_attention is built in")
    kinds_of_fields = {hf: _KINDS[mcore] for hf, mcore in family.fields.items()} | {"vocab_size": int}
    problems += [
        f"{key} is {config[key]!r}, expected {_KIND_NAMES[kind]}"
        for key, kind in kinds_of_fields.items()
        if key in config and key not in missing and not _is_kind(config[key], kind, nullable=key in _NULLABLE)
    ]
    return problems


def _is_fixed(value: Any, expected: Any, *, nullable: bool) -> bool:
    # Null is as good as false: for a switch that has to be on it says the opposite.
    return nullable or not expected if value is None else bool(value == expected)


def _is_kind(value: Any, kind: type, *, nullable: bool) -> bool:
    if value is None:
        return nullable
    if kind is float:
        return _is_number(value)
    if kind is bool:
        return isinstance(value, bool)
    return type(value) is int and 0 < value <= _MOST


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        # A whole number of hundreds of digits.
        return False


def _mcore_rope(config: Mapping[str, Any], family: Family, name: str) -> tuple[float, RopeScaling | None]:
    """Base and stretching; newer files keep both in `rope_parameters`."""
    base = config.get("rope_theta", family.defaults["rope_theta"])
    given = {key: config.get(key) for key in ("rope_parameters", "rope_scaling")}
    found = [_rope_form(form, base, key, name) for key, form in given.items() if form not in (None, {})]
    bases = {form.get("rope_theta", base) for form in given.values() if form}
    if len(set(found)) > 1 or ("rope_theta" in config and bases - {base}):
        raise UserError(
            f"{name}: rope_parameters, rope_scaling and rope_theta contradict each other, and versions of transformers "
            "differ in which they take; remove those that are not meant"
        )
    return found[0] if found else _rope_form({}, base, "rope_scaling", name)


def _rope_form(form: Any, base: Any, key: str, name: str) -> tuple[float, RopeScaling | None]:
    if not isinstance(form, Mapping):
        raise UserError(f"{name}: {key} is {form!r}, expected an object or null")
    fields = dict(form)
    base = fields.pop("rope_theta", base)
    # `type` is the older name, and some files have both.
    old, kind = fields.pop("type", None), fields.pop("rope_type", None)
    kind = kind or old or "default"
    if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
        raise UserError(f"{name}: rope scaling of type {kind!r} is not built in; expected {', '.join(_ROPE_FIELDS)}")
    unknown = sorted(fields.keys() - _ROPE_FIELDS[kind])
    if unknown == ["original_max_position_embeddings"] and kind == "linear":
        unknown = []
    lacking = sorted(_ROPE_FIELDS[kind] - fields.keys())
    if unknown:
        raise UserError(f"{name}: {key} has {', '.join(unknown)}, which is not built in for rope scaling {kind!r}")
    if lacking or not _is_number(base) or not all(_is_number(value) for value in fields.values()):
        raise UserError(
            f"{name}: rope scaling {kind!r} with base {base!r} has {fields or 'no fields'}, expected numbers for "
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
        # Recipes have other names for the same things.
        hf = {mcore: field for field, mcore in FAMILIES[values["family"]].fields.items() if field != mcore}
        named = [field for field in re.findall(r"model\.(\w+)", str(error)) if field in hf]
        called = ", ".join(f"model.{field} is {hf[field]} in config.json" for field in dict.fromkeys(named))
        raise UserError(f"{name}: as a recipe, {error}{f' ({called})' if called else ''}") from error
