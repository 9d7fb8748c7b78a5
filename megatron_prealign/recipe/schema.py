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
    for part in (schema, *schema["properties"].values(), *_optional_sections(schema)):
        part.pop("required", None)
    _tidy(schema)
    return json.dumps(schema, indent=2, ensure_ascii=False)


def _optional_sections(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Definitions of the sections that may be null."""
    names = [
        choice["$ref"].removeprefix("#/$defs/")
        for section in schema["properties"].values()
        for choice in section.get("anyOf", [])
        if "$ref" in choice
    ]
    return [schema["$defs"][name] for name in names]


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
