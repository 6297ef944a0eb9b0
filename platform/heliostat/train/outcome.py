"""A finished run to a version in the registry, with what it scored on the validation split."""

from heliostat import registry, spec, storage
from heliostat.archive import store_code
from heliostat.data import features, stream
from heliostat.data.manifest import Manifest
from heliostat.data.shards import read_group
from heliostat.signature import output_to_json
from heliostat.spec import RunSpec
from heliostat.train.launch import Result


def publish(run: RunSpec, manifest: Manifest, result: Result) -> registry.Version:
    """Register the weights of `result`; the same result published again is the same version.

    Raises:
        HeliostatError: the weights are not finite, or the bucket cannot be written.
    """
    from heliostat import evaluate, examples  # bring PyTorch: a run that begins need not wait

    store = storage.connect(run.root)
    predictor = evaluate.make_predictor(
        run.model, manifest.features, manifest.output, result.weights
    )
    metrics = dict(result.metrics)
    if manifest.rows.get("validation"):
        batches = stream.read_split(store, manifest, "validation", run.evaluate.batch)
        scores = evaluate.score(predictor, batches)
        metrics |= {f"validation_{name}": value for name, value in scores.metrics.items()}
    draft = registry.Draft(
        name=run.name,
        output=output_to_json(manifest.output),
        features=features.features_to_json(manifest.features),
        spec=spec.dump(run),
        data_name=manifest.name,
        data_version=manifest.version,
        run=result.run,
        step=result.step,
        code=store_code(store),
        metrics=metrics,
    )
    version = registry.publish(store, draft, result.weights)
    first, *_ = manifest.shards_of("train")
    examples.record(store, version, predictor, read_group(store, first, 0))
    return version
