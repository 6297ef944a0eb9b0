"""Ask every node of the cluster what is wrong with it; the job fails where something is.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- \\
    python jobs/check.py s3://heliostat pairs=512 disk_gib=50
"""

from heliostat.cli.check import render
from heliostat.cluster.preflight.limits import Limits
from heliostat.cluster.preflight.survey import check, print_line
from heliostat.job import run
from heliostat.spec import parse_options


def main(root: str, *overrides: str) -> int:
    report = check(root, parse_options(Limits, overrides), print_line)
    print(render(report))
    return report.status


if __name__ == "__main__":
    run(main)
