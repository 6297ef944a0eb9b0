"""Prepare the data set that a spec describes: raw objects in, shuffled and checksummed shards out.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- \\
    python jobs/prepare.py jobs/specs/digits.yaml data.shard_mib=16
"""

from time import monotonic

from heliostat.data.prepare import prepare, summarise
from heliostat.job import run
from heliostat.spec import load


def main(path: str, *overrides: str) -> None:
    started = monotonic()
    spec = load(path, overrides)
    manifest = prepare(spec)
    print(summarise(manifest))
    print(f"prepared in {monotonic() - started:.1f} s")
    print(f"{spec.root}/data/{manifest.name}/{manifest.version}")


if __name__ == "__main__":
    run(main)
