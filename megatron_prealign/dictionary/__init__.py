"""Builds translation tables from word lists: cleaning, groups, case variants, coverage, reports."""
