"""The rules of the code, checked on its text: imports point one way, files and functions are short, tests mirror it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "megatron_prealign"
# An import may go up this list, never down. `docs/architecture.md` has the same table with what each is for.
LAYERS = (
    ("errors", "interrupts", "progress", "resources", "page", "text", "languages"),
    ("files",),
    ("recipe",),
    ("doctor",),
    ("runtime",),
    ("kernels",),
    ("model",),
    ("tokenizer",),
    ("corpus",),
    ("data",),
    ("preprocess",),
    ("dictionary",),
    ("checkpoint",),
    ("conversion",),
    ("generation",),
    ("alignment",),
    ("code_switch",),
    ("training",),
    ("evaluation",),
    ("run",),
    ("study",),
    ("benchmark",),
    ("cli",),
    ("tools",),
)
LONGEST_FILE = 500
LONGEST_FUNCTION = 80
# Of Megatron-Core, whose private names move from version to version.
MAY_USE_PRIVATE_NAMES = ("megatron_prealign/runtime/", "megatron_prealign/checkpoint/sharded/")


def sources() -> list[Path]:
    """Every module of the package, the two directories that lie beside it included."""
    return sorted(path for directory in (PACKAGE, ROOT / "kernels", ROOT / "tools") for path in directory.rglob("*.py"))


def layer_of(module: str) -> int | None:
    """Number of the layer of `megatron_prealign.X...`; None for the package itself."""
    parts = module.split(".")
    if len(parts) < 2 or parts[1].startswith("__"):
        return None
    return next(number for number, names in enumerate(LAYERS) if parts[1] in names)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "megatron_prealign" else ("megatron_prealign", *parts))


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of every import of ours in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "megatron_prealign":
            for name in node.names:
                # `from megatron_prealign import page` imports a module.
                yield node.lineno, f"{node.module}.{name.name}" if node.module == "megatron_prealign" else node.module
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, each.name) for each in node.names if each.name.startswith("megatron_prealign"))


def test_imports_point_up_the_table() -> None:
    wrong = []
    for path in sources():
        own = layer_of(module_of(path))
        for line, module in imports_of(path):
            other = layer_of(module)
            if own is not None and other is not None and other > own:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_kernels_import_nothing_of_the_package() -> None:
    wrong = [
        f"{path.name}:{line} imports {module}"
        for path in (ROOT / "kernels").glob("*.py")
        for line, module in imports_of(path)
        if not module.startswith("megatron_prealign.kernels")
    ]
    assert not wrong, "\n".join(wrong)


def test_every_package_is_in_the_table_and_nothing_else() -> None:
    found = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    found |= {path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")} | {"kernels", "tools"}
    assert found == {name for layer in LAYERS for name in layer}


def test_the_documented_table_is_this_one() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`[\w/.]+`(?:, )?)+) \|", text, flags=re.MULTILINE)
    documented = [tuple(re.sub(r"\.py$|/$", "", name) for name in re.findall(r"`([\w/.]+)`", row)) for row in rows]
    assert documented == list(LAYERS)


@pytest.mark.parametrize("directory", ["megatron_prealign", "kernels", "tools", "tests", "examples"])
def test_files_and_functions_are_short(directory: str) -> None:
    wrong = []
    for path in sorted((ROOT / directory).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = text.count("\n")
        if lines > LONGEST_FILE:
            wrong.append(f"{path.relative_to(ROOT)} has {lines} lines, expected at most {LONGEST_FILE}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > LONGEST_FUNCTION:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {length} lines")
    assert not wrong, "\n".join(wrong)


def test_private_names_of_megatron_core_stay_in_two_places() -> None:
    wrong = []
    for path in sources():
        place = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron."):
                private = [each.name for each in node.names if each.name.startswith("_")]
                if private and not place.startswith(MAY_USE_PRIVATE_NAMES):
                    wrong.append(f"{place}:{node.lineno} imports {', '.join(private)}")
    assert not wrong, "\n".join(wrong)


def test_the_tests_mirror_the_package() -> None:
    """A directory of tests for each package that has code, and none without."""
    packages = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    packages = {each for each in packages if each != "."} | {"kernels"}
    tested = {path.parent.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    # What a user runs, not a package.
    beside = {".", "examples"}
    parts_of_others = {
        # Declarations that the tests of the package around them go through one by one.
        "conversion/families",
        "dictionary/formats",
    }
    assert tested - packages - beside == set()
    assert packages - tested - parts_of_others == set()
