"""Prepare a data set: raw objects to shuffled, checksummed shards and the manifest that names them.

A survey looks at every object and settles sizes, columns and labels. Then one Ray Data pipeline
reads and cleans the rows, sorts them by a hash of their ids and writes a shard per range of it.
"""

import json
from dataclasses import asdict, replace
from typing import Any

from heliostat.data import text
from heliostat.data.manifest import SPLITS, Manifest, check_shards, data_key, load_manifest
from heliostat.data.pipeline import FORMS, MIB, learn, quiet_ray_data, take_survey, write_shards
from heliostat.data.raw import Source, Survey, find_source
from heliostat.data.report import assemble, make_report, refuse, to_bytes
from heliostat.data.waiting import say_if_waiting
from heliostat.errors import HeliostatError, printable
from heliostat.signature import Classes, Numbers, Output
from heliostat.spec import DataSpec, RunSpec, digest
from heliostat.storage import Missing, Store, connect, probe

CODE_FORMAT = 5


def prepare(spec: RunSpec) -> Manifest:
    """Turn the raw objects of `spec.data` into a version of the data set `spec.name`.

    The same objects and the same `spec.data` give the same version, and nothing is written then.

    Raises:
        HeliostatError: the source is empty, mixed, has one class, or more rows that cannot be
            used than `data.max_bad_rows`; or the root cannot be written.
    """
    store = connect(spec.root)
    probe(store)
    source = find_source(spec.data)
    _check_apart(source, store)
    _check_task(source.form, spec.data)
    print(printable(f"{source.uri}: {source.form} - {source.reason}"), flush=True)
    fingerprint = _fingerprint(source, spec.data)
    if manifest := _find_prepared(store, spec.name, fingerprint):
        print(f"already prepared: {manifest.name}@{manifest.version}", flush=True)
        return manifest
    say_if_waiting(cpus=1)
    with quiet_ray_data():
        taken = _order_labels(take_survey(source, spec.data), spec.data.positive)
        survey = learn(store, source, taken, spec.data)
        outcomes = write_shards(store, source, survey, spec)
    report = make_report(source, survey, outcomes)
    refuse(store, spec, report, data_key(spec.name, "inputs", f"{fingerprint}.refused.json"))
    manifest = assemble(spec, source, survey, outcomes, report)
    _publish(store, manifest, report | {"notes": manifest.report["notes"]}, fingerprint)
    return manifest


def require_prepared(spec: RunSpec) -> Manifest:
    """The version that `prepare` made of the objects that are there now; shards are not checked.

    Raises:
        HeliostatError: these objects were not prepared with this `spec.data`.
    """
    store, source = connect(spec.root), find_source(spec.data)
    try:
        return _load_pointed(store, spec.name, _fingerprint(source, spec.data))
    except Missing as error:
        raise HeliostatError(
            f"{source.uri} was not prepared as {spec.name} with this data section, or was "
            "changed since: run the prepare job first"
        ) from error


def summarise(manifest: Manifest) -> str:
    """What was prepared, as lines for a terminal."""
    lines = [f"{'split':<12}{'rows':>12}{'shards':>8}{'MiB':>10}"]
    for split in SPLITS:
        shards = manifest.shards_of(split)
        size = sum(shard.bytes for shard in shards) / MIB
        lines.append(f"{split:<12}{manifest.rows[split]:>12,}{len(shards):>8,}{size:>10.1f}")
    report = manifest.report
    lines.append(_describe_output(manifest.output))
    lines.append(f"{report['rows_bad']:,} bad rows of {report['rows_read']:,}")
    return printable("\n".join(lines))


def _describe_output(output: Output) -> str:
    match output:
        case Classes(labels):
            line = f"{len(labels)} classes: {', '.join(labels[:20])}" + ", ..." * (len(labels) > 20)
            return f"{line}; {labels[1]} is the positive one" if len(labels) == 2 else line
        case Numbers(names):
            return f"{len(names)} numbers: {', '.join(names[:20])}" + ", ..." * (len(names) > 20)
        case _:
            return "the next token"


def _order_labels(survey: Survey, positive: str | None) -> Survey:
    """Of two classes the one that is sought comes last."""
    if positive is None:
        return survey
    if len(survey.labels) != 2 or positive not in survey.labels:
        found = f"the classes {', '.join(survey.labels[:20])}" if survey.labels else "no classes"
        raise HeliostatError(
            f"data.positive is {positive!r}, but the data has {found}: it is one of two classes"
        )
    return replace(survey, labels=tuple(sorted(survey.labels, key=positive.__eq__)))


def _check_apart(source: Source, store: Store) -> None:
    if f"{store.uri}/".startswith(f"{source.uri}/"):
        raise HeliostatError(
            f"root {store.uri} lies inside data.source {source.uri}, so prepared data would "
            "be read as raw data: choose another root, or a source beside it"
        )


def _check_task(form: str, data: DataSpec) -> None:
    tasks = FORMS[form].tasks
    if data.task not in ("auto", *tasks):
        hint = ": a table is given as CSV or Parquet, .jsonl is read as texts"
        raise HeliostatError(
            f"data.task is {data.task}, but the labels of {form} are for {' or '.join(tasks)}"
            + hint * (form == "text")
        )


def _fingerprint(source: Source, data: DataSpec) -> str:
    """The same for the same objects, the same data section and the same code."""
    listing = [[entry.key, entry.size, entry.etag] for entry in source.entries]
    parts = [CODE_FORMAT, data.model_dump(mode="json"), listing]
    if len(ids := [name for name, kind in data.columns.items() if kind == "id"]) > 1:
        parts.append(ids)  # the first is the user
    if source.form == "text" and data.text.tokenizer:
        parts.append(asdict(text.read_vocabulary(data.text.tokenizer)[1]))
    return digest(parts)


def _find_prepared(store: Store, name: str, fingerprint: str) -> Manifest | None:
    try:
        manifest = _load_pointed(store, name, fingerprint)
        check_shards(store, manifest)
    except HeliostatError:
        return None
    return manifest


def _load_pointed(store: Store, name: str, fingerprint: str) -> Manifest:
    """The version that these inputs were prepared to; Missing if no sound pointer names one."""
    key = data_key(name, "inputs", f"{fingerprint}.json")
    try:
        version = str(json.loads(store.read(key))["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise Missing(f"{store.uri}/{key} names no version") from error
    return load_manifest(store, name, version)


def _publish(store: Store, manifest: Manifest, report: dict[str, Any], fingerprint: str) -> None:
    """Write what is not there yet, the manifest after all that it names."""
    folder = data_key(manifest.name, manifest.version)
    if not _is_published(store, manifest):
        store.write(f"{folder}/report.json", to_bytes(report))
        store.write(f"{folder}/manifest.json", to_bytes(manifest.to_json()))
    pointer = to_bytes({"version": manifest.version})
    store.write(data_key(manifest.name, "inputs", f"{fingerprint}.json"), pointer)


def _is_published(store: Store, manifest: Manifest) -> bool:
    try:
        check_shards(store, load_manifest(store, manifest.name, manifest.version))
    except HeliostatError:
        return False
    return True
