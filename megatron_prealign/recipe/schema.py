"""JSON schema of a recipe, which editors use to complete and check YAML."""

import json
from typing import Any

from megatron_prealign.recipe.describe import one_line


def recipe_schema() -> str:
    """Returns the schema as JSON text (draft 2020-12).

    No section or field is required, because a recipe may be split over several files. `pretrain --validate` checks the
    complete recipe.
    """
    from megatron_prealign.recipe.load import recipe_parser

    schema = json.loads(recipe_parser("pretrain").get_completion_script("jsonschema"))
    schema["title"] = "megatron-prealign recipe"
    schema["description"] = "Recipe of a megatron-prealign run. Sections may be split over several files."
    _without_required(schema, schema["$defs"])
    _tidy(schema)
    return json.dumps(schema, indent=2, ensure_ascii=False)


def _without_required(section: dict[str, Any], definitions: dict[str, Any]) -> None:
    """Makes all fields of a section and of the sections in it optional. Items of lists keep their required fields."""
    section.pop("required", None)
    for field in section.get("properties", {}).values():
        for choice in (field, *field.get("anyOf", [])):
            name = choice.get("$ref", "").removeprefix("#/$defs/")
            _without_required(definitions[name] if name else choice, definitions)


def _tidy(part: Any) -> None:
    """Puts every description on one line."""
    if isinstance(part, list):
        for each in part:
            _tidy(each)
    elif isinstance(part, dict):
        if isinstance(part.get("description"), str):
            part["description"] = one_line(part["description"])
        for each in part.values():
            _tidy(each)
