"""The recommender: embeddings of id columns, their pairwise products, and an MLP over all of it.

Shapes: N rows, K id columns, E embedding, F other features.
"""

import torch
from torch import Tensor, nn

from heliostat.models.mlp import stack_layers
from heliostat.signature import Interaction, Signature
from heliostat.spec import RecsysSpec

UNSEEN = 0
# Products of two such embeddings start far below the scale of the targets, which is 1.
EMBEDDING_STD = 0.05


def build_recsys(spec: RecsysSpec, signature: Signature, width: int) -> nn.Module:
    """`spec.interaction` mlp: an MLP over embeddings and features; dot adds products and biases."""
    assert isinstance(signature.input, Interaction)
    return {"mlp": Recommender, "dot": DotRecommender}[spec.interaction](
        spec, signature.input, width
    )


class Recommender(nn.Module):
    """An MLP over the embeddings of the ids and the other features.

    An id that was not seen in training has the embedding zero, the mean of the initial ones.
    """

    def __init__(self, spec: RecsysSpec, of: Interaction, width: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(
            _embed(size, spec.embedding, EMBEDDING_STD) for size in of.ids
        )
        inputs = len(of.ids) * spec.embedding + of.width
        self.layers = stack_layers((inputs, *spec.hidden, width), spec.dropout)

    def forward(self, ids_NK: Tensor, x_NF: Tensor) -> Tensor:
        return self.combine(ids_NK, _look_up(self.embeddings, ids_NK), x_NF)

    def combine(self, ids_NK: Tensor, e_NKE: Tensor, x_NF: Tensor) -> Tensor:
        outputs: Tensor = self.layers(torch.cat([e_NKE.flatten(1), x_NF], dim=1))
        return outputs


class DotRecommender(Recommender):
    """The MLP's outputs, a bias of each id, and the dot products of all pairs of embeddings.

    Every output weighs the terms of the dot products; the weights start at 1.
    """

    def __init__(self, spec: RecsysSpec, of: Interaction, width: int) -> None:
        super().__init__(spec, of, width)
        self.biases = nn.ModuleList(_embed(size, width, 0.0) for size in of.ids)
        self.products = nn.Linear(spec.embedding, width, bias=False)
        nn.init.ones_(self.products.weight)

    def combine(self, ids_NK: Tensor, e_NKE: Tensor, x_NF: Tensor) -> Tensor:
        products: Tensor = self.products(sum_pairs(e_NKE))
        biases = _look_up(self.biases, ids_NK).sum(dim=1)
        return super().combine(ids_NK, e_NKE, x_NF) + biases + products


def sum_pairs(e_NKE: Tensor) -> Tensor:
    """The element-wise products of all pairs out of K, summed, (N, E); Rendle 2010, lemma 3.1."""
    return (e_NKE.sum(dim=1).square() - e_NKE.square().sum(dim=1)) / 2


def _embed(size: int, width: int, std: float) -> nn.Embedding:
    table = nn.Embedding(size, width, padding_idx=UNSEEN)
    nn.init.normal_(table.weight, std=std)
    with torch.no_grad():
        table.weight[UNSEEN] = 0
    return table


def _look_up(tables: nn.ModuleList, ids_NK: Tensor) -> Tensor:
    return torch.stack([table(ids_NK[:, k]) for k, table in enumerate(tables)], dim=1)
