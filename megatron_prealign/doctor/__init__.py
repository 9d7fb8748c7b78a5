"""Checks an installation part by part, in child processes so that a crash or hang cannot affect the command."""
