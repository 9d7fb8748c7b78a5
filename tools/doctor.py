"""`megatron-prealign doctor`: checks the installation and suggests fixes."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_prealign.cli.options import parse_options
from megatron_prealign.text import closing, command, plural


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Checks the installation and prints one line per part, with a fix where needed. Exit status 1 if a required part
    is broken."""

    json: bool = False
    """Print the findings as a JSON list."""


def main(argv: Sequence[str]) -> int:
    """Runs all checks; returns 1 if any failed, else 0."""
    options = parse_options(DoctorOptions, "doctor", argv)
    from megatron_prealign.doctor.checks import CHECKS, run_checks

    findings = []
    width = max(map(len, CHECKS))
    for finding in run_checks():
        findings.append(finding)
        if not options.json:
            fix = f" -> {finding.fix}" if finding.fix else ""
            print(f"{finding.status:<4}  {finding.part:<{width}}  {finding.found}{fix}", flush=True)
    failed = any(finding.status == "fail" for finding in findings)
    if options.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        count = Counter(finding.status for finding in findings)
        made = f"checked {plural(len(findings), 'part')}: " + ", ".join(f"{each} {count[each]}" for each in count)
        print(closing(made, command("doctor") if failed else command("train-tokenizer", "--help")))
    return int(failed)
