"""Scripts of the examples as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "examples"


def load_example(script: str) -> ModuleType:
    """Loads a script by its path in the examples, such as `english_clone/harvest.py`."""
    name = script.removesuffix(".py").replace("/", "_")
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / script)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    # Dataclasses look their module up.
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module
