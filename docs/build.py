"""Builds the site: the pages of docs/, README and its neighbours, and references made from the code.

Everything is staged in build/docs and given to Sphinx from there, because half of the pages lie outside docs/ or are
generated. Every warning is an error; links between pages are checked on the way.

    python docs/build.py [OUTPUT]
"""

import io
import os
import posixpath
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

from sphinx.cmd.build import main as sphinx

DOCS = Path(__file__).parent
ROOT = DOCS.parent
STAGED = ROOT / "build" / "docs"
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/english_clone/README.md": "examples/english_clone.md",
    "examples/english_german/README.md": "examples/english_german.md",
    "examples/eight_languages/README.md": "examples/eight_languages.md",
}
"""Path in the repository -> path on the site, of pages that are not in docs/."""
CONTENTS = {
    "Guides": [
        "getting_started",
        "data",
        "datasets",
        "dictionaries",
        "training",
        "alignment",
        "code_switching",
        "checkpoints",
        "conversion",
        "study",
    ],
    "Examples": ["examples/english_clone", "examples/english_german", "examples/eight_languages"],
    "Reference": ["reference/commands", "reference/recipe", "reference/api"],
    "Project": ["benchmarks/README", "architecture", "contributing", "changelog"],
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")


def main(output: Path) -> int:
    """Stages the pages and runs Sphinx; returns its exit status."""
    shutil.rmtree(STAGED, ignore_errors=True)
    shutil.copytree(DOCS, STAGED, ignore=shutil.ignore_patterns("build.py", "__pycache__"))
    for page in DOCS.rglob("*.md"):
        _stage(page.relative_to(ROOT).as_posix(), page.relative_to(DOCS).as_posix())
    for source, page in OUTSIDE.items():
        _stage(source, page)
    with (STAGED / "index.md").open("a", encoding="utf-8") as index:
        for title, pages in CONTENTS.items():
            index.write("\n".join(["", "```{toctree}", ":hidden:", f":caption: {title}", "", *pages, "```", ""]))
    _write("reference/commands.md", _commands())
    _write("reference/recipe.md", _recipe())
    packages = [path for path in sorted((ROOT / "megatron_prealign").iterdir()) if (path / "__init__.py").exists()]
    packages.append(ROOT / "kernels")
    for package in packages:
        _write(f"api/{package.name}.md", _api(package))
    names = [f"../api/{package.name}" for package in packages]
    _write("reference/api.md", ["# Python API", "", "```{toctree}", ":maxdepth: 1", "", *names, "```"])
    return sphinx(["-b", "html", "-W", "--keep-going", "-q", "-j", "auto", str(STAGED), str(output)])


def _stage(source: str, page: str) -> None:
    """Copies a page of the repository, its links turned into links of the site; source files lose theirs."""

    def replace(match: re.Match[str]) -> str:
        mark, text, link, anchor = match[1], match[2], match[3], match[4] or ""
        if not link or "://" in link:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        if (ROOT / target / "README.md").exists():
            target += "/README.md"
        if not (ROOT / target).exists():
            raise SystemExit(f"{source}: no such file: {link}")
        if target not in OUTSIDE and not target.startswith("docs/"):
            return text
        uri = OUTSIDE.get(target, target.removeprefix("docs/"))
        return f"{mark}[{text}]({posixpath.relpath(uri, posixpath.dirname(page) or '.')}{anchor})"

    _write(page, [_LINK.sub(replace, (ROOT / source).read_text(encoding="utf-8"))])


def _write(page: str, lines: list[str] | Iterator[str]) -> None:
    path = STAGED / page
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _api(package: Path) -> Iterator[str]:
    """One section for each module; members without a docstring are left out.

    A package's own section has no members: they are documented in the modules that define them.
    """
    name = f"megatron_prealign.{package.name}"
    yield f"# {package.name}"
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        module = ".".join([name, *(part for part in parts if part != "__init__")])
        title = f"\n## {module.removeprefix(name + '.')}\n" if parts != ("__init__",) else ""
        members = "" if path.name == "__init__.py" else "\n   :members:"
        yield f"{title}\n```{{eval-rst}}\n.. automodule:: {module}{members}\n```"


def _commands() -> Iterator[str]:
    from megatron_prealign.cli.main import COMMANDS

    yield "# Commands\n\nWhat `--help` prints."
    for command, (module, _) in COMMANDS.items():
        yield f"\n## {command}\n\n```text\n{_help(module)}\n```"
        for action in getattr(import_module(module), "ACTIONS", {}):
            yield f"\n### {command} {action}\n\n```text\n{_help(module, action)}\n```"


def _help(module: str, *arguments: str) -> str:
    text = io.StringIO()
    with redirect_stdout(text), suppress(SystemExit):
        import_module(module).main([*arguments, "--help"])
    return text.getvalue().strip()


def _recipe() -> Iterator[str]:
    from megatron_prealign.recipe.describe import one_line, section_of
    from megatron_prealign.recipe.recipe import Recipe

    yield "# Recipe\n\nSections and fields. The option of `section.some_field` is `--section.some-field`."
    for name, hint in get_type_hints(Recipe).items():
        section = section_of(hint)
        if section is None:
            continue
        yield f"\n## {name}\n\n{one_line(section.__doc__ or '')}\n"
        yield from _fields(section)


def _fields(section: type, prefix: str = "") -> Iterator[str]:
    from megatron_prealign.recipe.describe import section_of, walk, yaml_syntax

    for path, field in walk(section, prefix):
        default = "required" if field.required else f"default `{_yaml(field.default)}`"
        yield f"`{path}` `{yaml_syntax(field)}`, {default}\n: {field.help}\n"
        item = section_of(field.type)
        if field.is_list and item is not None:
            yield from _fields(item, f"{path}[].")


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value) or '""'


if __name__ == "__main__":
    os.environ["COLUMNS"] = "86"  # the width of a page of the theme
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "site"))
