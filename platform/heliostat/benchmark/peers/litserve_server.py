"""LitServe: `python litserve_server.py MODEL PORT`, in an environment without Heliostat."""

import sys

import litserve
import numpy as np
import torch

PROCESSES = 2
MAX_BATCH, BATCH_SECONDS = 32, 0.005


class Classifier(litserve.LitAPI):
    def __init__(self, model: str) -> None:
        super().__init__(max_batch_size=MAX_BATCH, batch_timeout=BATCH_SECONDS)
        self.path = model

    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        self.model = torch.jit.load(self.path)

    def decode_request(self, request: dict) -> np.ndarray:
        return np.array(request["instances"], np.float32)

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(inputs)

    def predict(self, pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self.model(torch.from_numpy(pixels)).numpy()

    def unbatch(self, rows: np.ndarray) -> list[np.ndarray]:
        return list(rows)

    def encode_response(self, row: np.ndarray) -> dict:
        return {"predictions": [row.tolist()]}


def main(model: str, port: str) -> None:
    server = litserve.LitServer(
        Classifier(model), accelerator="cpu", workers_per_device=PROCESSES, fast_queue=True
    )
    server.run(
        host="127.0.0.1",
        port=int(port),
        num_api_servers=PROCESSES,
        generate_client_file=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
