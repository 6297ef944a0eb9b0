"""Run a version over every row below a prefix; without `predict.version` the newest one.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- \\
    python jobs/predict.py jobs/specs/digits.yaml predict.source=s3://heliostat/raw/new
"""

from heliostat import spec, storage
from heliostat.batch import predict_all
from heliostat.job import run


def main(path: str, *overrides: str) -> None:
    wanted = spec.load(path, overrides)
    storage.probe(storage.connect(wanted.root))
    print(predict_all(wanted))


if __name__ == "__main__":
    run(main)
