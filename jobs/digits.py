"""Put scikit-learn's 1,797 handwritten digits where a spec expects its raw images.

python jobs/digits.py jobs/specs/digits.yaml
"""

from heliostat.data.digits import upload_digits
from heliostat.job import run
from heliostat.spec import load
from heliostat.storage import connect


def main(path: str, *overrides: str) -> None:
    source = load(path, overrides).data.source
    print(f"{upload_digits(connect(source)):,} images")
    print(source)


if __name__ == "__main__":
    run(main)
