"""What became of the rows: a report, a refusal, or the manifest of a version."""

import json
from collections import Counter
from dataclasses import replace
from typing import Any

from heliostat.data.manifest import REPORTED, SPLITS, Manifest, content_version, shard_from_json
from heliostat.data.measure import settle_features, settle_numbers, unigram_nats
from heliostat.data.pipeline import Outcome
from heliostat.data.raw import Layout, Source, Survey, TableLayout
from heliostat.errors import HeliostatError, printable
from heliostat.signature import Classes, NextToken, Numbers, Output
from heliostat.spec import RunSpec
from heliostat.storage import Store


def make_report(source: Source, survey: Survey, outcomes: list[Outcome]) -> dict[str, Any]:
    """What was read and what could not be used."""
    kept = sum(outcome["read"] for outcome in outcomes if "shard" in outcome)
    rejected = [outcome for outcome in outcomes if "bad" in outcome]
    bad = sum((Counter(outcome["bad"]) for outcome in rejected), Counter[str]())
    return {
        "source": source.uri,
        "format": source.form,
        "format_reason": source.reason,
        "objects": len(source.entries),
        "objects_ignored": source.ignored,
        "rows_read": kept + bad.total(),
        "rows_bad": bad.total(),
        "problems": dict(bad),
        "examples": [example for outcome in rejected for example in outcome["examples"]],
        "rows_by_split": _count_splits(outcomes),
        "rows_by_class": _count_classes(survey, outcomes),
    }


def _count_splits(outcomes: list[Outcome]) -> dict[str, int]:
    shards = [outcome["shard"] for outcome in outcomes if "shard" in outcome]
    return {
        split: sum(shard["rows"] for shard in shards if shard["split"] == split) for split in SPLITS
    }


def _count_classes(survey: Survey, outcomes: list[Outcome]) -> dict[str, dict[str, int]]:
    counts = {label: dict.fromkeys(SPLITS, 0) for label in survey.labels}
    for outcome in outcomes:
        for label, rows in outcome.get("labels", {}).items():
            counts[survey.labels[int(label)]][outcome["shard"]["split"]] += rows
    return counts


def refuse(store: Store, spec: RunSpec, report: dict[str, Any], key: str) -> None:
    """Refuse data with too many bad rows, whose report then lies at `key`, or without a use."""
    if report["rows_bad"] > spec.data.max_bad_rows:
        store.write(key, to_bytes(report))
        examples = report["examples"]
        named = "; ".join(f"{row}: {problem}" for row, problem in examples[:3])
        share = "all" if len(examples) == report["rows_bad"] else f"the first {len(examples):,}"
        raise HeliostatError(
            f"{report['rows_bad']:,} of {report['rows_read']:,} rows under {report['source']} "
            f"cannot be used and data.max_bad_rows is {spec.data.max_bad_rows}: {named} "
            f"({share} are named in {store.uri}/{key})"
        )
    unseen = [label for label, rows in report["rows_by_class"].items() if not any(rows.values())]
    if unseen:
        raise HeliostatError(
            f"the class {unseen[0]!r} under {report['source']} has no row that can be used: "
            "mend or remove it"
        )
    if not report["rows_by_split"]["train"]:
        raise HeliostatError(
            f"of {report['rows_read']:,} rows under {report['source']} none fell into the training "
            "split: give more rows, or lower data.split.validation and data.split.test"
        )


def assemble(
    spec: RunSpec, source: Source, survey: Survey, outcomes: list[Outcome], report: dict[str, Any]
) -> Manifest:
    written = [outcome for outcome in outcomes if "shard" in outcome]
    shards = tuple(shard_from_json(outcome["shard"]) for outcome in written)
    statistics = [outcome["statistics"] for outcome in written if outcome["statistics"]]
    features, notes = settle_features(survey.layout, statistics, spec.data)
    nats = unigram_nats(survey.layout, statistics)
    output, label_notes = _settle_output(survey, written, report)
    notes += label_notes
    for note in notes:
        print(printable(note), flush=True)
    unversioned = Manifest(
        name=spec.name,
        version="",
        source=source.uri,
        format=source.form,
        schema=written[0]["schema"],
        output=output,
        rows=report["rows_by_split"],
        features=features,
        shards=shards,
        spec=spec.data.model_dump(mode="json"),
        report={name: report[name] for name in REPORTED}
        | {"notes": [*survey.notes, *notes]}
        | ({"unigram_nats": nats} if nats is not None else {}),
    )
    return replace(unversioned, version=content_version(unversioned))


def _settle_output(
    survey: Survey, written: list[Outcome], report: dict[str, Any]
) -> tuple[Output, list[str]]:
    if targets := survey.layout.targets:
        output, notes = settle_numbers(targets, [o["targets"] for o in written if o["targets"]])
        if len(notes) == len(targets):
            _refuse_likes_alone(survey.layout, output)
        return output, notes
    unseen = [label for label, rows in report["rows_by_class"].items() if not rows["train"]]
    notes = [f"classes without a training row: {', '.join(unseen)}"] if unseen else []
    if not survey.labels:
        return NextToken(), notes
    return Classes(survey.labels), notes


def _refuse_likes_alone(layout: Layout, output: Numbers) -> None:
    """Of rows that all say the same of users and items, a model learns to say it of all."""
    if isinstance(layout, TableLayout) and "id" in layout.kinds.values():
        raise HeliostatError(
            f"the label {', '.join(output.names)} is {output.mean[0]:g} in all training rows, so "
            "no item can be put above another: add rows of what was seen and not taken, with "
            "another label"
        )


def to_bytes(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, indent=1).encode()
