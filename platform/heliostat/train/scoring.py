"""Checkpoints scored beside the run that writes them: the scores rank them, they do not steer it.

The asynchronous validation of Ray Train wants checkpoints that Ray keeps; these are the run's own.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import ray

from heliostat import pools, storage
from heliostat.data import stream
from heliostat.data.manifest import Manifest
from heliostat.spec import RunSpec
from heliostat.train import checkpoint
from heliostat.train.checkpoint import Corrupt

POLL_SECONDS = 2.0
RANKED_BY = "loss"


@dataclass(frozen=True)
class Scorer:
    """Scores the checkpoints of the run `name` on the validation split, the newest first."""

    run: RunSpec
    manifest: Manifest
    name: str

    def follow(self) -> None:
        """Score what is committed, for ever."""
        while True:
            if not self.score_next():
                time.sleep(POLL_SECONDS)

    def score_next(self) -> bool:
        """Score a checkpoint; False if every one has its score."""
        store = storage.connect(self.run.root)
        waiting = [one for one in checkpoint.find(store, self.name) if one.awaits_score]
        if not waiting:
            return False
        found = waiting[0]
        # PyTorch takes seconds to import, for which the driver need not wait before the run ends.
        import safetensors.torch

        from heliostat import evaluate
        from heliostat.train.reader import read_weights

        try:
            weights = safetensors.torch.save(read_weights(store, found.key).tensors)
        except Corrupt as error:
            print(f"passing over checkpoint {found.key}: {error}", flush=True)
            checkpoint.revoke(store, found.key)
            return True
        predictor = evaluate.make_predictor(
            self.run.model, self.manifest.features, self.manifest.output, weights
        )
        rows = stream.read_split(store, self.manifest, "validation", self.run.evaluate.batch)
        metrics = evaluate.score(predictor, rows).metrics
        checkpoint.record_score(store, found.key, metrics[RANKED_BY])
        shown = "  ".join(f"{name} {value:,.4g}" for name, value in metrics.items())
        print(f"checkpoint of step {found.step:,}: validation {shown}", flush=True)
        return True

    def find_best(self) -> str | None:
        """The key of the checkpoint with the lowest loss, once each has its score."""
        store, best = storage.connect(self.run.root), None
        scored = True
        while scored:  # a score that cannot be read is thrown away, to be made anew
            while self.score_next():
                pass
            best = checkpoint.find_best(store, self.name, "lower")
            scored = any(one.awaits_score for one in checkpoint.find(store, self.name))
        return best


@contextlib.contextmanager
def beside(scorer: Scorer) -> Iterator[None]:
    """Within, an actor scores beside the run. What it does not get to is left to `find_best`."""
    body = ray.remote(Scorer).options(
        num_cpus=1, resources=pools.ask("data"), max_restarts=-1, max_task_retries=-1
    )
    actor = body.remote(scorer.run, scorer.manifest, scorer.name)
    actor.follow.remote()
    try:
        yield
    finally:
        ray.kill(actor)
