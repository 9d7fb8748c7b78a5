"""Commands that take a recipe: `--config FILE`, any field of it as an option, and options of their own."""

from collections.abc import Iterator, Sequence
from typing import TypeVar, get_type_hints

from megatron_prealign.cli import help
from megatron_prealign.cli.options import build_options, option_name, read_options, unknown_argument, with_underscores
from megatron_prealign.errors import UserError
from megatron_prealign.recipe.describe import FieldDescription, describe, section_of, walk
from megatron_prealign.recipe.load import load_recipe
from megatron_prealign.recipe.recipe import Recipe

Options = TypeVar("Options")

_CONFIG_ROWS = (
    ("--config FILE", "Read fields from a YAML file; of several files and options the later one wins."),
    ("--SECTION.FIELD VALUE", "Set a field of the recipe: --optimizer.lr 3e-4."),
    ("--print-config", "Print the recipe with all its fields and exit."),
    ("--help SECTION", "List the fields of a section (--help all: of every section)."),
)


def parse_recipe(command: str, options: type[Options], argv: Sequence[str]) -> tuple[Recipe, Options]:
    """The recipe and the command's own options, or prints the help and exits with status 0.

    Raises:
        UserError: a missing file, an unknown key or option, a wrong type or values that do not fit together.
    """
    parsed, rest = parse_recipe_arguments(command, options, argv)
    return load_recipe(rest, command), parsed


def parse_recipe_arguments(command: str, options: type[Options], argv: Sequence[str]) -> tuple[Options, list[str]]:
    """The command's own options, and the arguments that `load_recipe` takes.

    Raises:
        UserError: an unknown option, or one of the command's own has a wrong value.
    """
    for number, argument in enumerate(argv):
        if argument in ("-h", "--help"):
            topic = argv[number + 1] if number + 1 < len(argv) else ""
            print(_help(command, options, topic))
            raise SystemExit(0)
    values, extras = read_options(options, command, argv)
    rest = list(_checked(command, with_underscores(extras), [option_name(name) for name in describe(options)]))
    return build_options(options, command, values), rest


def _checked(command: str, arguments: Sequence[str], own: Sequence[str]) -> Iterator[str]:
    """The arguments, each option known and a bare one of a field that is true or false given its value."""
    known = dict(walk(Recipe))
    takes_value = False
    for number, argument in enumerate(arguments):
        name, equals, _ = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            if not takes_value:
                raise UserError(
                    f"unexpected argument {argument!r}; did you mean --config {argument}? See megatron-prealign "
                    f"{command} --help"
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
    """Whether the name is an entry of a mapping (`code_switch.language_weights.de`) or adds to a list (`sources+`)."""
    base = name.removesuffix("+")
    while base:
        if base in known and base != name:
            return known[base].is_list or "NAME=" in known[base].metavar
        base = base.rpartition(".")[0]
    return False


def _help(command: str, options: type, topic: str) -> str:
    hints = get_type_hints(Recipe)
    sections = {name: kind for name, hint in hints.items() if (kind := section_of(hint)) is not None}
    if topic in sections:
        return _section(topic, sections[topic])
    described = describe(options)
    rows = [
        (option_name(name) + ("" if field.type is bool else f" {field.metavar}"), help.with_default(field))
        for name, field in described.items()
    ]
    parts = [
        help.usage(command, ["--config FILE", "[--SECTION.FIELD VALUE ...]", "[options]"]),
        help.paragraph(options.__doc__ or ""),
        help.rows("options", [*rows, *_CONFIG_ROWS]),
        help.rows("sections of the recipe", ((name, field.help) for name, field in describe(Recipe).items())),
    ]
    if topic == "all":
        parts += [_section(name, kind) for name, kind in sections.items()]
    return "\n\n".join(parts)


def _section(name: str, kind: type) -> str:
    """The fields of a section."""
    needed: list[help.Row] = []
    rest: list[help.Row] = []
    for path, field in walk(kind, f"{name}."):
        row = (f"{option_name(path)} {field.metavar}{'...' if field.is_list else ''}", help.with_default(field))
        (needed if field.required else rest).append(row)
    parts = [
        f"{name}: {help.paragraph(kind.__doc__ or '')}",
        help.rows("required", needed),
        help.rows("optional", rest),
    ]
    return "\n\n".join(part for part in parts if part)
