"""Word lists to a table of translations: cleaning, groups, case variants, coverage, reports."""
