"""The recurrent network: a GRU or an LSTM over a series of numbers or tokens, and a linear head.

Shapes: N rows, T steps, C channels, D directions, H width of the cell.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pack_padded_sequence

from heliostat.models.dropout import Dropout
from heliostat.models.example import is_hollow
from heliostat.signature import Series, Signature, Text
from heliostat.spec import RnnSpec

_CELLS: dict[str, type[nn.GRU] | type[nn.LSTM]] = {"gru": nn.GRU, "lstm": nn.LSTM}


def build_rnn(spec: RnnSpec, signature: Signature, width: int) -> nn.Module:
    """`spec.layers` of cells, the last valid state of the last one, dropout, `width` outputs.

    Tokens are embedded in `spec.width` numbers. Dropout stands before the head alone: between
    layers PyTorch's cells would draw it by place in the batch instead of by sample.
    """
    assert isinstance(signature.input, Series | Text)
    return Recurrent(spec, signature.input, width)


class Recurrent(nn.Module):
    """Takes a series and its lengths; what stands after a row's length is never read."""

    def __init__(self, spec: RnnSpec, of: Series | Text, width: int) -> None:
        super().__init__()
        channels = spec.width if isinstance(of, Text) else of.channels
        self.embedding = nn.Embedding(of.vocab, channels) if isinstance(of, Text) else nn.Identity()
        self.cells = _CELLS[spec.cell](
            channels, spec.width, spec.layers, batch_first=True, bidirectional=spec.bidirectional
        )
        self.directions = 2 if spec.bidirectional else 1
        self.dropout = Dropout(spec.dropout)
        self.head = nn.Linear(self.directions * spec.width, width)

    def forward(self, x_NT: Tensor, lengths_N: Tensor) -> Tensor:
        """`x_NT` holds tokens, int64 (N, T), or numbers, float32 (N, T, C); returns (N, width)."""
        rows = len(x_NT)
        x_NTC, lengths = _fill(self.embedding(x_NT), _to_host(lengths_N, x_NT.shape[1]))
        packed = pack_padded_sequence(x_NTC, lengths, batch_first=True, enforce_sorted=False)
        _, states = self.cells(packed)
        hidden = states[0] if isinstance(states, tuple) else states
        last_NDH = hidden[-self.directions :].transpose(0, 1)[:rows]
        outputs: Tensor = self.head(self.dropout(last_NDH.flatten(1)))
        return outputs


def _fill(x_NTC: Tensor, lengths_N: Tensor) -> tuple[Tensor, Tensor]:
    """At least one row of at least one step, which packing needs; what is added is zero.

    A batch without rows thus runs through every weight: all ranks exchange the same gradients.
    """
    rows, steps = (max(1 - size, 0) for size in x_NTC.shape[:2])
    lengths = pad(lengths_N, (0, rows)).clamp(min=1)
    return pad(x_NTC, (0, 0, 0, steps, 0, rows)), lengths


def _to_host(lengths_N: Tensor, steps: int) -> Tensor:
    """Lengths where packing reads them; where they have no values, all are `steps`."""
    if is_hollow(lengths_N):
        return torch.full(lengths_N.shape, steps, device="cpu")
    return lengths_N.cpu()
