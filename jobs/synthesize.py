"""Make the rows that a spec's data.synthetic describes, and put them where data.source points.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- \\
    python jobs/synthesize.py jobs/specs/regression_mlp.yaml data.synthetic.rows=1000
"""

from heliostat import spec
from heliostat.data.synthetic import synthesize
from heliostat.job import run


def main(path: str, *overrides: str) -> None:
    wanted = spec.load(path, overrides)
    written = synthesize(wanted.data)
    print(f"{len(written):,} objects written")
    print(wanted.data.source)


if __name__ == "__main__":
    run(main)
