"""The HTML pages of the package with recorded inputs; every name that a user chooses is hostile or very long."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_prealign.code_switch.preview import Part, Preview, PreviewSample
from megatron_prealign.code_switch.preview_page import render_page as render_preview
from megatron_prealign.dictionary.report_page import render_page as render_dictionary
from megatron_prealign.evaluation.report import write_report
from megatron_prealign.evaluation.run_record import Measurement, load_run
from megatron_prealign.recipe import CodeSwitchSection
from megatron_prealign.study.cost import Cost
from megatron_prealign.study.definition import Study, StudyRun
from megatron_prealign.study.matrix import Job
from megatron_prealign.study.output import write_results
from megatron_prealign.study.page import Origin
from megatron_prealign.study.records import JobRecord, StudyRecords
from support.study_records import class_recipe

LAYERS = 6


@dataclass(frozen=True)
class Names:
    """Every text on the pages that comes from a user."""

    runs: tuple[str, str]
    languages: tuple[str, str]
    """Of the corpus and of the translations."""
    words: tuple[str, str, str]
    path: str
    document: str


_MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>"
NAMES = Names(
    # What looks like an id, a colour or a reference of the plots' own markup must stay as it is.
    runs=(f'id="a" #0072b2 "\'>{_MARKUP} {"x" * 120}', "aligned_lr1e-3"),
    languages=(f"<b>{_MARKUP}", '"><svg onload=alert(3)>'),
    words=(f"</li>{_MARKUP}", "بيت", "w" * 90),
    path="/data/" + "very_long_directory_name/" * 8 + f"{_MARKUP}.tsv",
    document=f"The house is red. {_MARKUP} </div></figure> {'a' * 300} \u202eright to left\u202c",
)


def training_report(directory: Path) -> Path:
    """`report.html` of two runs that differ in everything the page compares."""
    runs = {name: load_run(_write_run(directory / f"run_{index}", index)) for index, name in enumerate(NAMES.runs)}
    measured = {}
    for index, (name, record) in enumerate(runs.items()):
        last = record.evaluations[-1]
        held_out = {pair: [0.5 * p for p in values] for pair, values in last.word_retrieval_p_at_1.items()}
        measured[name] = (
            record,
            Measurement(
                last.validation_loss,
                last.word_retrieval_p_at_1,
                held_out,
                4000 - index,
                60.0 + index,
                sentence_retrieval_p_at_1=held_out,
                validation_loss_words=last.validation_loss_words,
                word_shares={NAMES.languages[0]: {"trained": 0.75, "other": 0.25}},
            ),
        )
    write_report(measured, directory / "report")
    return directory / "report" / "report.html"


def _write_run(directory: Path, index: int) -> Path:
    source, target = NAMES.languages
    pairs = (f"{source}-{target}", f"{target}-{source}")
    lines: list[dict[str, Any]] = []
    for step in range(1, 9):
        phase = "alignment" if index and step <= 2 else "language_model"
        common = {"phase": phase, "step": step, "tokens": 500 * step, "seconds": 7.0 * step}
        by_layer = [min(1.0, 0.1 * step + 0.02 * layer + 0.05 * index) for layer in range(LAYERS)]
        watched = {name: [value / 2 for value in by_layer] for name in ("p_at_1", "mrr", "p_at_1_csls", "mrr_csls")}
        cosines = {"positive_cosine": by_layer, "negative_cosine": [value / 3 for value in by_layer]}
        words = dict.fromkeys(pairs, 100)
        watch = {"groups": "held_out", "words": words, "pairs": dict.fromkeys(pairs, watched | cosines)}
        lines.append({"kind": "alignment_watch", **common, **watch})
        loss = 6.0 - 0.4 * step - 0.1 * index
        train = {"phase_step": step, "loss": loss, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1e3}
        losses = {"lm_loss": None, "alignment_loss": by_layer} if phase == "alignment" else {"lm_loss": loss}
        lines.append({"kind": "train", **common, **train, **losses, "memory_gb": 0.5})
        evaluation = {
            "validation_loss": {source: loss, target: loss + 0.5},
            "validation_loss_words": {
                target: {"trained": loss, "held_out": loss + 1.0, "other": loss + 2.0},
                source: {"trained": loss, "other": loss - 1.0},
            },
            "word_retrieval_p_at_1": dict.fromkeys(pairs, by_layer),
            "word_retrieval_p_at_1_held_out": {},
        }
        lines.append({"kind": "evaluation", **common, **evaluation})
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {"data": {"train": [{"path": NAMES.path, "language": source}]}, "training": {"seed": index}}
    (directory / "recipe.yaml").write_text(json.dumps(recipe | {NAMES.words[0]: [NAMES.document][:index]}))
    (directory / "versions.json").write_text(json.dumps({"torch": NAMES.words[2]}))
    return directory


def dictionary_report(directory: Path) -> Path:
    """Dictionary report of one corpus with two target languages."""
    source, target = NAMES.languages
    pairs = [_coverage(0.9, other) for other in (target, "fr")]
    corpus = {
        **_coverage(0.95),
        "prefix": NAMES.path,
        "language": source,
        "segmenter": NAMES.words[0],
        "tokens": 236_200,
        "by_rank": [{"from": 1, "to": 100, "known": 0.93}, {"from": 101, "to": 8_132, "known": 0.4}],
        "pairs": pairs,
        "frequent_words": [
            {
                "word": word,
                "count": 1_287,
                "share": 0.1,
                "share_of_known": 0.2,
                "translations": [{"target": "de", "text": text, "probability": 0.5} for text in NAMES.words],
            }
            for word in NAMES.words
        ],
        "unknown_words": [{"word": word, "count": 1_287, "share": 0.1} for word in NAMES.words * 5],
        "samples": [
            {
                "before": NAMES.document,
                "space": " ",
                "original": NAMES.words[0],
                "switched": NAMES.words[1],
                "target": target,
                "after": NAMES.document,
            }
        ],
    }
    source_list = {"path": NAMES.path, "languages": f"{source}-{target}", "format": "tsv", "pairs": 323_020}
    report = {
        "table": {
            "languages": [source, target, "fr"],
            **{"groups": 103_543, "words": 332_379, "keys": 548_696, "candidates": 1_169_652},
            "sources": [source_list | {"title": NAMES.document, "licence": NAMES.words[0]}],
            "build": {
                "settings": {"order": NAMES.words[0]},
                "rules": {"pairs read": 323_020, "case variants without a usable translation": 42_820},
                "lines_skipped": 7,
            },
        },
        "settings": {"ratio": 0.05},
        "corpora": [corpus],
        "definitions": {"coverage": "known running words / running words", "growth": NAMES.document},
    }
    path = directory / "dictionary.html"
    path.write_text(render_dictionary(report), encoding="utf-8")
    return path


def _coverage(share: float, target: str | None = None) -> Mapping[str, Any]:
    totals = {
        **{"running_words": 162_099, "known_words": 148_720, "coverage": share, "vocabulary": 8_132},
        **{"vocabulary_coverage": share / 2, "switch_rate": share / 20, "tokens_before": 1.18, "tokens_after": 2.59},
        "growth": 0.0445,
    }
    if target is None:
        return totals
    counts = [100_000, 30_000, 10_000, 8_720, 0, 0, 0, 0]
    ambiguity = {"translations_per_word": 3.58, "ambiguous_share": 0.92, "words_by_translations": counts}
    return totals | ambiguity | {"target": target}


def switching_preview(directory: Path) -> Path:
    """Code-switching preview of one sample with words into two languages."""
    source, target = NAMES.languages
    first, second, third = NAMES.words
    parts = (
        Part(NAMES.document, NAMES.document, None, 30, 30),
        Part(f" {first}", f" {second}", target, 1, 3),
        Part(",", ",", None, 1, 1),
        Part(f" {second}", f" {third}", "ja", 1, 3),
        Part(f" {NAMES.document}", f" {NAMES.document}", None, 30, 30),
    )
    sample = PreviewSample(source, parts, (1,) * 60, (1,) * 60, (None,) * 60, (50, 40, 2, 0, 4))
    preview = Preview(
        samples=(sample, sample),
        section=CodeSwitchSection(ratio=0.1),
        ratios={target: 0.1, "ja": 0.05},
        seq_length=64,
        seed=1,
        text=SimpleNamespace(text=lambda tokens: "x"),  # type: ignore[arg-type]
    )
    path = directory / "preview.html"
    path.write_text(render_preview(preview), encoding="utf-8")
    return path


def study_results(directory: Path) -> Path:
    """`results.html` of a study of three runs, a sweep among them, of which one seed is not complete."""
    sweep = f"{NAMES.words[0][:40]} | sweep"
    runs = [
        StudyRun(name="joint", at={sweep: 0.001}),
        StudyRun(name="aligned", control="shuffled", at={sweep: 0.1}),
        StudyRun(name="shuffled_with_a_name_of_more_than_forty_characters"),
        StudyRun(name="shuffled"),
    ]
    study = Study(output=str(directory / "study"), base=[NAMES.path], seeds=[1, 2], runs=runs)
    jobs = [
        Job(run.name, seed, class_recipe(), Path(f"{NAMES.path}.yaml"), directory / f"{run.name}_{seed}")
        for seed in study.seeds
        for run in runs
    ]
    cost = Cost({"seconds": 60.0, "tokens": 4000.0}, {"memory_gb": NAMES.document})
    complete = [
        JobRecord(job, load_run(_write_run(job.directory, number % 2)), cost) for number, job in enumerate(jobs[:-1])
    ]
    records = StudyRecords(study, jobs, complete, {jobs[-1].name: f"error: {NAMES.document}"})
    origin = Origin(f"megatron-prealign study --config {NAMES.path}", NAMES.path, f"base: [{NAMES.document}]\n")
    write_results(records, directory / "study", origin)
    return directory / "study" / "results.html"


PAGES: dict[str, Callable[[Path], Path]] = {
    "training report": training_report,
    "dictionary report": dictionary_report,
    "code-switching preview": switching_preview,
    "study": study_results,
}
