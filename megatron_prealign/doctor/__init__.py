"""Checks an installation part by part, in child processes that cannot crash or hang the command."""
