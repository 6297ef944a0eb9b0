"""The model section: one typed class per family, told apart by `kind`."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from heliostat.spec.section import Positive, PositiveFloat, Section

Widths = tuple[Positive, ...]
SomeWidths = Annotated[Widths, Field(min_length=1)]
# Below 1: a layer that drops everything leaves nothing to scale up.
DropoutShare = Annotated[float, Field(ge=0, lt=1, strict=True)]
FunctionName = Annotated[str, Field(pattern=r"^\w+(\.\w+)*:\w+$")]


class FamilySpec(Section):
    """`init` is where pretrained weights come from: a directory or `s3://` prefix, or one file."""

    init: str | None = None


class ClassifierSpec(FamilySpec):
    """A family with a plain head; `bce` gives two classes one logit instead of two."""

    loss: Literal["auto", "cross_entropy", "bce"] = "auto"
    dropout: DropoutShare = 0.0


class LayersSpec(ClassifierSpec):
    """Dropout stands after each of the `hidden` layers."""

    hidden: Widths = (128, 64)

    @model_validator(mode="after")
    def _dropout_has_its_layer(self) -> Self:
        if self.dropout and not self.hidden:
            raise ValueError("dropout stands after hidden layers, and hidden names none")
        return self


class MlpSpec(LayersSpec):
    kind: Literal["mlp"]


class CnnSpec(ClassifierSpec):
    """Each of `channels` is a stage that halves the image; `hidden` are the layers after them."""

    kind: Literal["cnn"]
    block: Literal["plain", "residual"] = "plain"
    channels: SomeWidths = (32, 64)
    kernel: Positive = 3
    padding: Literal["same", "valid"] = "same"
    hidden: Widths = (128,)

    @model_validator(mode="after")
    def _residuals_keep_their_size(self) -> Self:
        if self.block == "residual" and (self.padding == "valid" or self.kernel % 2 == 0):
            raise ValueError("residual blocks need padding same and an odd kernel")
        return self


class RnnSpec(ClassifierSpec):
    kind: Literal["rnn"]
    cell: Literal["gru", "lstm"] = "gru"
    width: Positive = 128
    layers: Positive = 1
    bidirectional: bool = False


class TransformerSpec(FamilySpec):
    """`ffn` is the width of the feed-forward layer; None derives the family's usual one."""

    layers: Positive = 4
    width: Positive = 256
    heads: Positive = 4
    ffn: Positive | None = None
    dropout: DropoutShare = 0.0

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads ({self.heads})")
        return self


class EncoderSpec(TransformerSpec):
    """A bidirectional transformer in the shape of BERT; `pool` makes one vector of a text."""

    kind: Literal["encoder"]
    max_positions: Positive = 512
    segments: Positive = 2
    norm_eps: PositiveFloat = 1e-12
    pool: Literal["mean", "first"] = "mean"
    loss: Literal["auto", "cross_entropy", "bce"] = "auto"


class RopeScalingSpec(Section):
    """How Llama 3.1 and later reach beyond the `original_positions` they were first trained on."""

    factor: PositiveFloat
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_positions: Positive = 8192

    @model_validator(mode="after")
    def _frequencies_are_ordered(self) -> Self:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError("low_freq_factor must be below high_freq_factor")
        return self


class GptSpec(TransformerSpec):
    """A decoder-only transformer in the shape of Llama; `kv_heads` None means `heads`."""

    kind: Literal["gpt"]
    kv_heads: Positive | None = None
    rope_theta: PositiveFloat = 10_000.0
    rope_scaling: RopeScalingSpec | None = None
    norm_eps: PositiveFloat = 1e-5
    tied: bool = True

    @model_validator(mode="after")
    def _groups_share_the_heads(self) -> Self:
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads ({self.kv_heads})")
        if self.width // self.heads % 2:
            raise ValueError(f"width / heads is {self.width // self.heads}, it must be even")
        return self


class RecsysSpec(LayersSpec):
    """Embeddings of the id columns, their pairwise products, and an MLP over all of it."""

    kind: Literal["recsys"]
    embedding: Positive = 32
    hidden: Widths = (64, 32)
    interaction: Literal["dot", "mlp"] = "dot"


class CustomSpec(FamilySpec):
    """A model of the user's own: `module:function`, called with the signature and `options`.

    `loss` names a function (outputs, targets) -> the loss of each row, shape (N,).
    """

    kind: Literal["custom"]
    build: FunctionName
    loss: FunctionName | None = None
    options: dict[str, Any] = Field(default_factory=dict)


ModelSpec = Annotated[
    MlpSpec | CnnSpec | RnnSpec | EncoderSpec | GptSpec | RecsysSpec | CustomSpec,
    Field(discriminator="kind"),
]
