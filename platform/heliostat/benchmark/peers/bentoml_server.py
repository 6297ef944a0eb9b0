"""BentoML: `bentoml serve bentoml_server:Classifier`, in an environment without Heliostat."""

import os

import bentoml
import numpy as np
import torch

PROCESSES = 2
MAX_BATCH = 64
MAX_LATENCY_MS = 10_000  # what would take longer is answered 503 at once


@bentoml.service(
    workers=PROCESSES, metrics={"enabled": False}, logging={"access": {"enabled": False}}
)
class Classifier:
    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.model = torch.jit.load(os.environ["BENCHMARK_MODEL"])

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=MAX_LATENCY_MS)
    def predict(self, instances: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self.model(torch.from_numpy(instances.astype(np.float32))).numpy()
