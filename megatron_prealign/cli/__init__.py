"""The command line: commands, their options, help and the one line of an error. Imports nothing heavy."""

from megatron_prealign.cli.main import COMMANDS as COMMANDS
from megatron_prealign.cli.main import main as main
