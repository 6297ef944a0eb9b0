"""Training on a real cluster: any worker count, killed workers, damaged checkpoints, bad data."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import safetensors.numpy
import safetensors.torch
from ray.util.state import list_actors
from ray.util.state.common import ActorState

from datasets import store_images
from heliostat import evaluate, spec, storage
from heliostat.data import stream
from heliostat.data.manifest import Manifest
from heliostat.errors import HeliostatError
from heliostat.local import Cluster
from heliostat.plan import calibration
from heliostat.spec import RunSpec
from heliostat.storage import Store
from heliostat.train import checkpoint
from heliostat.train.launch import Result, train
from heliostat.train.reader import read_weights

pytestmark = pytest.mark.cluster
ROWS = {"train": 150, "validation": 20, "test": 20}


@pytest.fixture
def store(cluster: Any, request: pytest.FixtureRequest) -> Store:
    ray.init(ignore_reinit_error=True, logging_level="ERROR", log_to_driver=False)
    return storage.connect(f"{cluster.root}/{request.node.name.replace('[', '-').rstrip(']')}")


def make_run(store: Store, **train_section: Any) -> RunSpec:
    document = {
        "name": "tiny",
        "root": store.uri,
        "data": {"source": "unused"},
        "model": {"kind": "mlp", "hidden": [8]},
        "train": {"workers": 2, "global_batch": 32, "epochs": 4, **train_section},
    }
    return spec.parse(document)


def make_data(store: Store, rows: dict[str, int] = ROWS) -> Manifest:
    return store_images(store, rows)


def weights(result: Result) -> np.ndarray:
    tensors = safetensors.numpy.load(result.weights)
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def test_what_a_run_took_is_kept_with_what_was_planned_and_corrects_the_next(
    store: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = make_data(store)
    document = spec.dump(make_run(store, workers=1))
    document["model"]["hidden"] = [512, 512]  # its checkpoint is more than what describes it
    run = spec.parse(document)
    first = train(run, manifest)
    assert "\nplan: " in capfd.readouterr().out
    (hardware,) = {entry.key.split("/")[1] for entry in store.list("calibration/")}
    (record,) = calibration.load(store, hardware)
    assert record.run == first.run
    assert record.steps == first.step
    for taken in (record.planned, record.measured):
        assert min(asdict(taken).values()) > 0
    assert 1 <= record.measured.checkpoint_bytes / record.planned.checkpoint_bytes < 1.1
    assert 0.5 < record.measured.memory_bytes / record.planned.memory_bytes < 2
    again = run.train.model_copy(update={"seed": 2})
    train(run.model_copy(update={"train": again}), manifest)
    assert "by 1 run on this hardware), 20 steps in " in capfd.readouterr().out
    assert len(calibration.load(store, hardware)) == 2


@pytest.mark.faults
def test_a_run_that_cannot_fit_is_refused_and_leaves_no_worker(
    store: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    """Beside its start: 2 million rows at once in flight are more than the machine has."""
    manifest = make_data(store)
    model = {"kind": "mlp", "hidden": [4096] * 8}
    document = spec.dump(make_run(store, global_batch=2**21, workers=1))
    with pytest.raises(
        HeliostatError, match=r"GiB for each: it would fit with train\.micro_batch="
    ):
        train(spec.parse({**document, "model": model}), manifest)
    assert not list(store.list("calibration/"))
    assert not [one for one in list_actors() if "Train" in one.class_name and one.state == "ALIVE"]


def test_any_worker_count_trains_the_same_model(store: Store) -> None:
    manifest = make_data(store)
    one = train(make_run(store, workers=1, run="one"), manifest)
    two = train(make_run(store, workers=2, run="two"), manifest)
    assert one.step == two.step == 4 * 5
    np.testing.assert_allclose(weights(one), weights(two), atol=1e-6)


@pytest.mark.faults
def test_a_killed_worker_costs_no_step(store: Store, wait_until: Callable[..., None]) -> None:
    manifest = make_data(store, {"train": 6000})
    settings: dict[str, Any] = {"epochs": 1, "global_batch": 8, "checkpoint_steps": 50}
    undisturbed = train(make_run(store, run="calm", **settings), manifest)

    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(train, make_run(store, run="killed", **settings), manifest)
        wait_until(lambda: checkpoint.committed(store, "killed") or pending.done(), 120)
        victim = find_worker()
        victim.kill()
        newest = checkpoint.find(store, "killed")[0]
        assert newest.step < undisturbed.step
        result = pending.result()
    assert not victim.is_running()
    assert result.step == undisturbed.step == 750
    np.testing.assert_array_equal(weights(result), weights(undisturbed))


@pytest.mark.faults
def test_workers_on_two_nodes_train_the_same_model(
    cluster: Cluster, store: Store, join_node: Callable[[int], str], wait_until: Callable[..., None]
) -> None:
    manifest = make_data(store)
    alone = train(make_run(store, workers=1, run="alone"), manifest)
    cpus = cluster.state.bounds.logical_cpus
    join_node(cpus - 1)
    wait_until(lambda: ray.cluster_resources()["CPU"] == 2 * cpus - 1, 60)
    earlier = {worker.actor_id for worker in list_workers()}
    # All but one of the CPUs of one node and all of the other: a worker fits on each.
    both = train(make_run(store, workers=2, cpus_per_worker=cpus - 1, run="both"), manifest)
    workers = [worker for worker in list_workers() if worker.actor_id not in earlier]
    assert len(workers) == len({worker.node_id for worker in workers}) == 2
    np.testing.assert_allclose(weights(alone), weights(both), atol=1e-6)


def list_workers() -> list[ActorState]:
    """Of all runs on this cluster so far."""
    filters = [("class_name", "=", "RayTrainWorker")]
    return list(list_actors(filters=filters, limit=1000))


def test_a_run_is_steered_by_its_validations_alike_on_one_worker_and_two(store: Store) -> None:
    manifest = make_data(store)
    # Nothing improves on the first validation by so much.
    stop = {"patience": 2, "min_delta": 100.0}
    schedule = {"kind": "plateau", "patience": 1}
    settings = {"validate_steps": 5, "ema": 0.9, "stop": stop, "schedule": schedule}
    one = train(make_run(store, workers=1, run="one", **settings), manifest)
    two = train(make_run(store, workers=2, run="two", **settings), manifest)
    assert one.step == two.step == 15
    np.testing.assert_allclose(weights(one), weights(two), atol=1e-6)


def test_the_best_of_the_checkpoints_scored_beside_a_run_is_what_it_gives(store: Store) -> None:
    manifest = make_data(store)
    wild = {"kind": "sgd", "lr": 3.0}
    settings = {"checkpoint_steps": 2, "validate_async": True, "optimizer": wild}
    run = make_run(store, run="beside", **settings)
    result = train(run, manifest)
    assert result.step == 20
    losses = {}
    for found in checkpoint.find(store, "beside"):
        tensors = safetensors.torch.save(read_weights(store, found.key).tensors)
        predictor = evaluate.make_predictor(run.model, manifest.features, manifest.output, tensors)
        rows = stream.read_split(store, manifest, "validation", 64)
        losses[evaluate.score(predictor, rows).metrics["loss"]] = tensors
    assert len(losses) >= run.train.keep_checkpoints
    assert result.weights == losses[min(losses)]
    assert train(run, manifest) == result


def test_a_validation_without_rows_is_refused(store: Store) -> None:
    manifest = make_data(store, {"train": 150, "validation": 0})
    for key, value in {"validate_steps": 5, "validate_async": True}.items():
        with pytest.raises(HeliostatError, match=r"the validation split, which has no rows"):
            train(make_run(store, **{key: value}), manifest)


def find_worker() -> psutil.Process:
    """A process in which a rank trains."""
    actors = list_actors(filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")])
    return psutil.Process(actors[0].pid)


@pytest.mark.faults
def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before(store: Store) -> None:
    manifest = make_data(store)
    run = make_run(store, run="torn", checkpoint_steps=5)
    first = train(run, manifest)
    newest, before = checkpoint.committed(store, "torn")
    files = [entry.key for entry in store.list(f"{newest}/") if "safetensors" in entry.key]
    store.write(files[0], store.read(files[0])[:-1])
    again = train(run, manifest)
    assert before not in checkpoint.committed(store, "torn")[:1]
    np.testing.assert_array_equal(weights(again), weights(first))


@pytest.mark.faults
def test_a_run_whose_best_checkpoint_is_damaged_gives_the_next_best(store: Store) -> None:
    manifest = make_data(store)
    run = make_run(store, run="torn", validate_steps=5, keep_checkpoints=4)
    first = train(run, manifest)
    middle = next(one.key for one in checkpoint.find(store, "torn") if one.step == 10)
    checkpoint.record_score(store, middle, -1.0)
    file = next(one.key for one in store.list(f"{middle}/") if "safetensors" in one.key)
    store.write(file, store.read(file)[:-1])
    store.delete("runs/torn/result.json")  # as if it had been killed before it could write that
    with pytest.raises(HeliostatError, match="ended without a result: submit the job again"):
        train(run, manifest)
    assert train(run, manifest) == first
    assert middle not in checkpoint.committed(store, "torn")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("left", "section"), [(0.0, {}), (0.5, {"stop": {"tokens": 450}})], ids=["empty", "cut, early"]
)
def test_a_run_goes_on_from_its_checkpoints_whatever_became_of_all_else(
    store: Store, left: float, section: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = make_data(store)
    run = make_run(store, run="torn", checkpoint_steps=5, **section)
    first = train(run, manifest)
    assert first.step == (15 if section else 20)

    def damage() -> set[str]:
        beside = [one for one in store.list("runs/torn/") if "/checkpoints/" not in one.key]
        for entry in beside:
            store.write(entry.key, store.read(entry.key)[: int(entry.size * left)])
        return {entry.key.split("/")[2] for entry in beside}

    assert damage() >= {"run.json", "lease.json", "fence", "result.json"}
    assert train(run, manifest) == first  # with no step left to make
    damage()
    checkpoint.discard(store, checkpoint.committed(store, "torn")[0])
    with pytest.raises(HeliostatError, match=r"run torn was .*\(train\.epochs: 4 -> 5\)"):
        train(make_run(store, run="torn", checkpoint_steps=5, epochs=5, **section), manifest)
    again = train(run, manifest)
    found = checkpoint.find(store, "torn")
    assert [(one.step, one.fence) for one in found] == [(first.step, 2), (first.step - 5, 1)]
    assert "run.json is damaged" in capfd.readouterr().out
    np.testing.assert_array_equal(weights(again), weights(first))


def flip(data: bytes) -> bytes:
    return data[:40] + bytes([data[40] ^ 1]) + data[41:]


@pytest.mark.faults
@pytest.mark.parametrize(
    "damage",
    [flip, lambda data: b"", lambda data: data[: len(data) // 2], None],
    ids=["flip", "empty", "cut", "gone"],
)
def test_damaged_data_ends_the_run_in_a_sentence_that_names_the_shard(
    store: Store, damage: Callable[[bytes], bytes] | None
) -> None:
    """`check_shards` refuses these before a worker starts; here they happen after that check."""
    manifest = make_data(store)
    key = manifest.shards_of("train")[0].key
    if damage is None:
        store.delete(key)
    else:
        store.write(key, damage(store.read(key)))
    with pytest.raises(HeliostatError, match=key.rpartition("/")[2]):
        train(make_run(store, max_failures=1), manifest)


@pytest.mark.faults
def test_a_loss_that_diverges_ends_the_run_in_a_sentence(store: Store) -> None:
    optimizer = {"kind": "sgd", "lr": 1e30}
    with pytest.raises(HeliostatError, match=r"not finite|the loss became"):
        train(make_run(store, optimizer=optimizer, max_failures=1), make_data(store))
    assert checkpoint.committed(store, "tiny") == []


def test_workers_that_leave_no_cpu_for_reading_are_refused_with_the_numbers(
    cluster: Cluster, store: Store
) -> None:
    cpus = cluster.state.bounds.logical_cpus
    sentence = rf"train\.workers={cpus} x 1 CPU take {cpus} of the {cpus} CPUs"
    with pytest.raises(HeliostatError, match=sentence):
        train(make_run(store, workers=cpus, global_batch=cpus), make_data(store))


def test_a_run_name_taken_by_another_run_is_refused(store: Store) -> None:
    manifest = make_data(store)
    done = train(make_run(store, run="mine", epochs=1), manifest)
    assert train(make_run(store, run="mine", epochs=1), manifest) == done
    with pytest.raises(HeliostatError, match=r"run mine was .* \(train.epochs: 1 -> 2\)"):
        train(make_run(store, run="mine", epochs=2), manifest)
    other = replace(manifest, name="other")
    with pytest.raises(HeliostatError, match=r"\(data: "):
        train(make_run(store, run="mine", epochs=1), other)
