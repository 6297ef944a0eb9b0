"""A finished run to a version in the registry, with what it scored on the validation split."""

from heliostat import registry, spec, storage
from heliostat.archive import store_code
from heliostat.data import features, stream
from heliostat.data.manifest import Manifest
from heliostat.signature import output_to_json
from heliostat.spec import RunSpec
from heliostat.train.launch import Result


def publish(run: RunSpec, manifest: Manifest, result: Result) -> registry.Version:
    """Register the weights of `result`; the same result published again is the same version.

    Raises:
        HeliostatError: the weights are not finite, or the bucket cannot be written.
    """
    store = storage.connect(run.root)
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
        metrics={**result.metrics, **_validate(run, manifest, result)},
    )
    return registry.publish(store, draft, result.weights)


def _validate(run: RunSpec, manifest: Manifest, result: Result) -> dict[str, float]:
    if not manifest.rows.get("validation"):
        return {}
    from heliostat import evaluate  # brings PyTorch, for which a run that begins need not wait

    predictor = evaluate.make_predictor(
        run.model, manifest.features, manifest.output, result.weights
    )
    store = storage.connect(run.root)
    batches = stream.read_split(store, manifest, "validation", run.evaluate.batch)
    scores = evaluate.score(predictor, batches)
    return {f"validation_{name}": value for name, value in scores.metrics.items()}
