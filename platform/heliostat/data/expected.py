"""What a spec alone says of the rows that its data will have, before any is prepared."""

from dataclasses import dataclass

from heliostat.data.features import token_type
from heliostat.data.manifest import Manifest
from heliostat.errors import HeliostatError
from heliostat.signature import Blocks, Classes, NextToken, Numbers, Signature, Vector
from heliostat.spec import RunSpec


@dataclass(frozen=True)
class Rows:
    """Rows of the training split: what each is, how many, and bytes of one as it is stored.

    `count` is None where nothing says it.
    """

    signature: Signature
    count: int | None
    row_bytes: float


def read_rows(manifest: Manifest) -> Rows:
    """Those of a data set that is prepared."""
    shards = manifest.shards_of("train")
    rows = sum(shard.rows for shard in shards)
    return Rows(manifest.signature, rows, sum(shard.bytes for shard in shards) / max(rows, 1))


def expect_rows(spec: RunSpec) -> Rows:
    """Those that will be prepared, where the spec settles their shape.

    Raises:
        HeliostatError: it depends on the data.
    """
    if spec.model.kind == "gpt":
        text = spec.data.text
        size = text.block * token_type(text.vocab)().itemsize
        return Rows(Signature(Blocks(text.block, text.vocab, 0), NextToken()), None, size)
    if of := spec.data.synthetic:
        names = tuple(f"y{place}" for place in range(of.outputs))
        zeros = (0.0,) * of.outputs
        is_class = spec.data.task == "classification"
        output = Classes(("0", "1")) if is_class else Numbers(names, zeros, zeros)
        share = 1 - spec.data.split.validation - spec.data.split.test
        return Rows(Signature(Vector(of.inputs), output), round(of.rows * share), 8.0 * of.inputs)
    raise HeliostatError(
        f"what a row of {spec.data.source} is depends on the data: prepare it first, with "
        "jobs/prepare.py, where this command can read the manifest"
    )
