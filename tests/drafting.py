"""What tests publish: drafts and versions that are alike but for what a test says of them."""

from typing import Any

from heliostat.data.features import Features, features_to_json
from heliostat.registry import Draft, Version
from heliostat.signature import Output, output_to_json


def draft(
    name: str, features: Features | None = None, output: Output | None = None, **others: Any
) -> Draft:
    usual: dict[str, Any] = {
        "output": output_to_json(output) if output else {},
        "features": features_to_json(features) if features else {},
        "spec": {},
        "data_name": name,
        "data_version": "0" * 16,
        "run": "run",
        "step": 1,
        "code": "",
        "metrics": {},
    }
    return Draft(name=name, **usual | others)


def version(name: str, number: int, features: Features, output: Output) -> Version:
    """One whose weights are nowhere."""
    return Version(
        **vars(draft(name, features, output)),
        number=number,
        created="2026-01-01T00:00:00+00:00",
        weights_sha256="0" * 64,
        weights_bytes=0,
    )
