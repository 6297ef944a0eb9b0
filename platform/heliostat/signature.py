"""The two ends of a network: what a row of inputs is and what is predicted of it, as values."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Vector:
    """One tensor, float32 (N, width)."""

    width: int

    def describe(self) -> str:
        return f"rows of {self.width} numbers"


@dataclass(frozen=True)
class Picture:
    """One tensor, float32 (N, channels, height, width)."""

    channels: int
    height: int
    width: int

    def describe(self) -> str:
        return f"images of {self.height}x{self.width}"


@dataclass(frozen=True)
class Series:
    """Two tensors: float32 (N, T, channels), zero after a row's end, and its lengths, int64 (N,).

    T is the length of the longest row of the batch, at most `length`.
    """

    length: int
    channels: int

    def describe(self) -> str:
        return f"sequences of {self.channels} channels"


@dataclass(frozen=True)
class Text:
    """Two tensors: token ids, int64 (N, T), and the lengths, int64 (N,); T as in `Series`.

    What stands after a row's length is token 0 and must not be looked at.
    """

    length: int
    vocab: int

    def describe(self) -> str:
        return f"texts of up to {self.length} tokens"


@dataclass(frozen=True)
class Blocks:
    """One tensor, token ids, int64 (N, length): documents one after another, each closed by `end`.

    A token may look at earlier tokens of its own document only.
    """

    length: int
    vocab: int
    end: int

    def describe(self) -> str:
        return f"blocks of {self.length} tokens"


@dataclass(frozen=True)
class Interaction:
    """Two tensors: id numbers, int64 (N, len(ids)), and float32 (N, width) of other columns.

    `ids` are the sizes of the columns' vocabularies; in each 0 is "not seen in training".
    """

    ids: tuple[int, ...]
    width: int

    def describe(self) -> str:
        return f"rows with {len(self.ids)} id columns"


Input = Vector | Picture | Series | Text | Blocks | Interaction


@dataclass(frozen=True)
class Classes:
    """One of `labels`; targets are int64 (N,)."""

    labels: tuple[str, ...]


@dataclass(frozen=True)
class Numbers:
    """Numbers, one per name; targets are float32 (N, len(names)), standardised.

    A network predicts (value - mean) / std; `mean` and `std` are those of the training split.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class NextToken:
    """The token that follows, for every position; the targets are the inputs, shifted."""


Output = Classes | Numbers | NextToken


@dataclass(frozen=True)
class Signature:
    input: Input
    output: Output


_OUTPUTS = {"classes": Classes, "numbers": Numbers, "next_token": NextToken}


def output_to_json(output: Output) -> dict[str, Any]:
    """The output as plain JSON values."""
    kind = next(kind for kind, known in _OUTPUTS.items() if isinstance(output, known))
    return {"kind": kind, **asdict(output)}


def output_from_json(document: dict[str, Any]) -> Output:
    """The inverse of `output_to_json`."""
    fields = {name: tuple(value) for name, value in document.items() if name != "kind"}
    output: Output = _OUTPUTS[document["kind"]](**fields)
    return output
