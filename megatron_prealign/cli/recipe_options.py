"""Options of commands that take a recipe: `--config FILE`, any field of the recipe, and the command's own options."""

from collections.abc import Iterator, Sequence
from typing import TypeVar, get_type_hints

from megatron_prealign.cli import help
from megatron_prealign.cli.options import build_options, option_name, read_options, unknown_argument, with_underscores
from megatron_prealign.cli.suggest import suggestion
from megatron_prealign.errors import UserError
from megatron_prealign.recipe.describe import FieldDescription, describe, section_of, walk, yaml_syntax
from megatron_prealign.recipe.load import config_files, load_recipe
from megatron_prealign.recipe.paths import check_relative_paths
from megatron_prealign.recipe.recipe import Recipe

Options = TypeVar("Options")

_CONFIG_ROWS = (
    (
        "--config FILE",
        "Read recipe fields from a YAML file. Repeatable; later files and options override earlier ones.",
    ),
    ("--SECTION.FIELD VALUE", "Set a field of the recipe, such as --optimizer.lr 3e-4."),
    ("--print-config", "Print the complete recipe and exit."),
    ("--help SECTION", "Show the fields of a section; --help all shows all sections."),
)

_EXAMPLE = """\
  model: {num_layers: 12, hidden_size: 768, num_attention_heads: 12}
  data: {tokenizer: data/tokenizer, seq_length: 1024, sources: [{path: data/en, language: en}]}
  optimizer: {lr: 3.0e-4}
  training: {seed: 1, micro_batch_size: 4, global_batch_size: 32, train_iters: 1000}
  logging: {run_dir: runs/first}"""


def parse_recipe(command: str, options: type[Options], argv: Sequence[str]) -> tuple[Recipe, Options]:
    """Returns the recipe and the command's own options, or prints the help and exits with status 0.

    Raises:
        UserError: a file is missing, a key or option is unknown, a type is wrong or values are inconsistent.
    """
    parsed, rest = parse_recipe_arguments(command, options, argv)
    return open_recipe(rest, command), parsed


def open_recipe(arguments: Sequence[str], command: str) -> Recipe:
    """Loads a recipe from its arguments, and checks that its inputs are not looked for in the wrong directory.

    Raises:
        UserError: see `load_recipe` and `check_relative_paths`.
    """
    recipe = load_recipe(arguments, command)
    check_relative_paths(recipe, config_files(arguments))
    return recipe


def parse_recipe_arguments(command: str, options: type[Options], argv: Sequence[str]) -> tuple[Options, list[str]]:
    """Returns the command's own options, and the arguments for `load_recipe`.

    Raises:
        UserError: an option is unknown, or one of the command's own options has an invalid value.
    """
    for number, argument in enumerate(argv):
        if argument in ("-h", "--help"):
            topic = argv[number + 1] if number + 1 < len(argv) else ""
            print(_help(command, options, topic))
            raise SystemExit(0)
    values, extras = read_options(options, command, argv)
    names = [option_name(name) for name in describe(options)]
    recipe_arguments = list(_check_arguments(command, with_underscores(extras), names))
    return build_options(options, command, values), recipe_arguments


def _check_arguments(command: str, arguments: Sequence[str], own: Sequence[str]) -> Iterator[str]:
    """Yields the arguments after checking each option; a boolean field without a value gets `=true`."""
    known = dict(walk(Recipe))
    takes_value = False
    for number, argument in enumerate(arguments):
        name, equals, _ = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            if not takes_value:
                list_option = arguments[number - 2] if number > 1 else ""
                field = known.get(list_option.removeprefix("--"))
                if field is not None and yaml_syntax(field) != field.metavar:
                    raise UserError(
                        f"unexpected argument {argument!r}; write the value of {option_name(list_option[2:])} as "
                        f"{yaml_syntax(field)!r}"
                    )
                raise UserError(
                    f"unexpected argument {argument!r}; did you mean --config {argument}? "
                    f"See megatron-prealign {command} --help"
                )
            takes_value = False
            yield argument
            continue
        field = known.get(name)
        if field is None and name not in ("config", "print_config") and not _is_inside(name, known):
            names = ["--config", "--print-config", *own, *(option_name(each) for each in known)]
            raise unknown_argument(command, argument, names)
        following = arguments[number + 1] if number + 1 < len(arguments) else "--"
        if field is not None and field.type is bool and not equals and following.startswith("--"):
            yield f"{argument}=true"
            continue
        takes_value = not equals and name != "print_config"
        yield argument


def _is_inside(name: str, known: dict[str, FieldDescription]) -> bool:
    """Whether the name is an entry of a mapping (`code_switch.language_weights.de`) or extends a list (`sources+`)."""
    base = name.removesuffix("+")
    while base:
        if base in known and base != name:
            return known[base].is_list or "NAME=" in known[base].metavar
        base = base.rpartition(".")[0]
    return False


def _help(command: str, options: type, topic: str) -> str:
    hints = get_type_hints(Recipe)
    sections = {name: kind for name, hint in hints.items() if (kind := section_of(hint)) is not None}
    section = topic.removeprefix("--").partition(".")[0].replace("-", "_")
    if section in sections:
        return _section(section, sections[section])
    if topic and topic != "all" and not topic.startswith("-"):
        hint = suggestion(topic, sections) or f"; expected one of {', '.join(sections)}"
        raise UserError(f"--help: unknown section {topic}{hint}")
    described = describe(options)
    rows = [
        (option_name(name) + ("" if field.type is bool else f" {field.metavar}"), help.with_default(field))
        for name, field in described.items()
    ]
    parts = [
        help.usage(command, ["--config FILE", "[--SECTION.FIELD VALUE ...]", "[options]"]),
        help.paragraph(options.__doc__ or ""),
        help.rows("options", [*rows, *_CONFIG_ROWS]),
        help.rows("recipe sections", ((name, field.help) for name, field in describe(Recipe).items())),
        f"smallest recipe, run with megatron-prealign {command} --config recipe.yaml:\n{_EXAMPLE}",
    ]
    if topic == "all":
        parts += [_section(name, kind) for name, kind in sections.items()]
    return "\n\n".join(parts)


def _syntax(path: str, field: FieldDescription) -> str:
    value = yaml_syntax(field)
    return f"{option_name(path)} {value if value == field.metavar else repr(value)}"


def _section(name: str, kind: type) -> str:
    """Formats the fields of a section."""
    required: list[help.Row] = []
    optional: list[help.Row] = []
    for path, field in walk(kind, f"{name}."):
        (required if field.required else optional).append((_syntax(path, field), help.with_default(field)))
    parts = [
        f"{name}: {help.paragraph(kind.__doc__ or '')}",
        help.rows("required", required),
        help.rows("optional", optional),
    ]
    return "\n\n".join(part for part in parts if part)
