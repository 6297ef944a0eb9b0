"""Versions for benchmarks: any network, published as if a run had trained it."""

from hashlib import sha256

import safetensors.torch
from torch import nn

from heliostat import registry
from heliostat.data.features import Features, features_to_json
from heliostat.registry import Draft, Version
from heliostat.signature import Output, output_to_json
from heliostat.spec import ModelSpec, dump, parse
from heliostat.storage import Store


def publish(
    store: Store,
    name: str,
    model: ModelSpec,
    features: Features,
    output: Output,
    network: nn.Module,
) -> Version:
    document = {"name": name, "data": {"source": "s3://none"}, "model": model.model_dump()}
    draft = Draft(
        name=name,
        output=output_to_json(output),
        features=features_to_json(features),
        spec=dump(parse(document)),
        data_name="none",
        data_version=sha256(b"").hexdigest()[:16],
        run="none",
        step=0,
        code="",
        metrics={},
    )
    return registry.publish(store, draft, safetensors.torch.save(network.state_dict()))
