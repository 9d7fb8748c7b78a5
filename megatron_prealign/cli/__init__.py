"""The command line: commands, options, help and one-line errors. Does not import heavy libraries."""

from megatron_prealign.cli.main import COMMANDS as COMMANDS
from megatron_prealign.cli.main import main as main
