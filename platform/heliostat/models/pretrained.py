"""Weights from elsewhere: `model.init` into a built network, and Hugging Face's names and keys."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from heliostat.errors import HeliostatError
from heliostat.models import encoder, gpt
from heliostat.origin import CONFIG, find_weights, read_object
from heliostat.signature import Blocks, Signature, Text
from heliostat.spec import EncoderSpec, GptSpec, ModelSpec
from heliostat.storage import Store, connect

TOKENIZER = "tokenizer.json"
SHOWN = 3

Tensors = dict[str, Tensor]
Names = dict[str, tuple[str, ...]]

# Our names to Hugging Face's; several of theirs are rows of one of ours, in this order.
LLAMA: Names = {
    "embed.weight": ("model.embed_tokens.weight",),
    "norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
}
LLAMA_LAYER: Names = {
    "attention_norm.weight": ("input_layernorm.weight",),
    "attention.qkv.weight": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    "attention.out.weight": ("self_attn.o_proj.weight",),
    "ffn_norm.weight": ("post_attention_layernorm.weight",),
    "ffn.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "ffn.down.weight": ("mlp.down_proj.weight",),
}
BERT: Names = {
    "tokens.weight": ("embeddings.word_embeddings.weight",),
    "positions.weight": ("embeddings.position_embeddings.weight",),
    "segments.weight": ("embeddings.token_type_embeddings.weight",),
    **{f"norm.{kind}": (f"embeddings.LayerNorm.{kind}",) for kind in ("weight", "bias")},
}
BERT_LAYER: Names = {
    f"{ours}.{kind}": tuple(f"{their}.{kind}" for their in theirs)
    for ours, theirs in {
        "attention.qkv": tuple(f"attention.self.{part}" for part in ("query", "key", "value")),
        "attention.out": ("attention.output.dense",),
        "attention_norm": ("attention.output.LayerNorm",),
        "up": ("intermediate.dense",),
        "down": ("output.dense",),
        "ffn_norm": ("output.LayerNorm",),
    }.items()
    for kind in ("weight", "bias")
}
# What a checkpoint may hold beside: constants, and heads for the tasks it was trained on.
BESIDE = (".rotary_emb.inv_freq", "embeddings.position_ids")
BARE_LLAMA = ("embed_tokens.", "layers.", "norm.")
OLD_ENDINGS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
HF_STEMS = ("model.layers.", "model.embed_tokens.", "bert.", "embeddings.", "encoder.layer.")
BERT_HEADS = ("pooler.", "cls.", "classifier.", "qa_outputs.")


def load_pretrained(network: nn.Module, spec: ModelSpec, signature: Signature) -> None:
    """Put the weights at `spec.init` into `network`, built of `spec` for `signature`.

    A .safetensors file, or a directory with a model.safetensors alone, holds the network's own
    names. Beside a config.json the weights are Hugging Face's: Llama's for gpt, BERT's for encoder,
    whose head keeps what it has.

    Raises:
        HeliostatError: there are no weights, they are not the network's, or the config.json asks
            for another model section; the sentence says what to write.
    """
    assert spec.init is not None
    store = connect(spec.init)
    if spec.init.endswith(".safetensors") or store.stat(CONFIG) is None:
        _load(network, _read_tensors(spec.init), spec.init)
        return
    config = read_object(store, CONFIG)
    refuse_other_config(spec, config, spec.init)
    _refuse_other_vocabulary(signature, config, spec.init)
    tensors = from_hf(spec, _read_tensors(spec.init), spec.init)
    _load(network, network.state_dict() | tensors, spec.init)


def describe_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model section that a Hugging Face config.json asks for, every key that it decides.

    Raises:
        HeliostatError: an architecture, or an option of it, that no family here has.
    """
    kind = config.get("model_type")
    if kind not in _DESCRIBE:
        raise HeliostatError(
            f"config.json has model_type {kind!r}: weights of {', '.join(_DESCRIBE)} are read"
        )
    if config.get("quantization_config"):
        raise HeliostatError(
            "config.json has a quantization_config: give the weights before they were quantised"
        )
    try:
        return _DESCRIBE[kind](config)
    except KeyError as error:
        raise HeliostatError(f"config.json has no {error.args[0]}: it is not {kind}'s") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise HeliostatError(f"config.json has values that are not {kind}'s: {error}") from error


def refuse_other_config(spec: ModelSpec, config: Mapping[str, Any], origin: str) -> None:
    """Raises HeliostatError, with the keys to change, unless `spec` is what `config` describes."""
    wanted = describe_hf(config)
    given = _resolve(spec)
    differing = [key for key in wanted if given.get(key) != wanted[key]]
    if differing:
        there = ", ".join(f"{key} {wanted[key]} (given {given.get(key)})" for key in differing)
        write = " ".join(shlex.quote(f"model.{key}={json.dumps(wanted[key])}") for key in differing)
        raise HeliostatError(f"the weights at {origin} are of another model, {there}: set {write}")


def hf_names(spec: GptSpec | EncoderSpec) -> Names:
    """Hugging Face's names for each parameter that a network of `spec` shares with theirs."""
    top, layer, stem = (
        (LLAMA, LLAMA_LAYER, "model.layers")
        if isinstance(spec, GptSpec)
        else (BERT, BERT_LAYER, "encoder.layer")
    )
    tied = isinstance(spec, GptSpec) and spec.tied
    names = {ours: theirs for ours, theirs in top.items() if not (tied and ours == "head.weight")}
    for number in range(spec.layers):
        for ours, theirs in layer.items():
            names[f"layers.{number}.{ours}"] = tuple(f"{stem}.{number}.{name}" for name in theirs)
    return names


def from_hf(spec: ModelSpec, tensors: Mapping[str, Tensor], origin: str) -> Tensors:
    """Hugging Face's tensors under our names.

    Raises:
        HeliostatError: one is missing, there is one that no part of the network takes, or those
            that belong together have other shapes.
    """
    assert isinstance(spec, GptSpec | EncoderSpec)
    tensors = {_modernise(name): tensor for name, tensor in tensors.items()}
    names = hf_names(spec)
    needed = {name for theirs in names.values() for name in theirs}
    ignored = ("lm_head.",) if isinstance(spec, GptSpec) else BERT_HEADS
    unknown = {
        name
        for name in tensors.keys() - needed
        if not (name.endswith(BESIDE) or name.startswith(ignored))
    }
    _refuse(origin, [f"{name} is missing" for name in sorted(needed - tensors.keys())])
    _refuse(origin, [f"{name} has no place in the network" for name in sorted(unknown)])
    return {ours: _join(theirs, tensors, origin) for ours, theirs in names.items()}


def _modernise(name: str) -> str:
    """The name that a parameter has in a model with a head, as transformers writes it today."""
    name = name.removeprefix("bert.")
    if name.startswith(BARE_LLAMA):
        return f"model.{name}"
    for old, new in OLD_ENDINGS.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def to_hf(spec: GptSpec, weights: Mapping[str, Tensor]) -> Tensors:
    """The inverse of `from_hf`, bit for bit."""
    kv_rows = (spec.kv_heads or spec.heads) * (spec.width // spec.heads)
    tensors: Tensors = {}
    for ours, theirs in hf_names(spec).items():
        whole = weights[ours]
        rows = [spec.width, kv_rows, kv_rows] if len(theirs) == 3 else len(whole) // len(theirs)
        parts = torch.split(whole, rows)
        tensors |= zip(theirs, (part.contiguous() for part in parts), strict=True)
    return tensors


def _describe_llama(config: Mapping[str, Any]) -> dict[str, Any]:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    rope = {
        "original_max_position_embeddings": config.get("original_max_position_embeddings")
        or config.get("max_position_embeddings"),
        "rope_theta": config.get("rope_theta", 10_000.0),
        **(config.get("rope_scaling") or {}),
        **(config.get("rope_parameters") or {}),
    }
    only = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": width // heads,
    }
    _refuse_options(config, only)
    _refuse_options(rope, {"partial_rotary_factor": 1.0})
    return {
        "kind": "gpt",
        "layers": config["num_hidden_layers"],
        "width": width,
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "ffn": config["intermediate_size"],
        "rope_theta": rope["rope_theta"],
        "rope_scaling": _describe_scaling(rope),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "tied": config.get("tie_word_embeddings", False),
    }


def _describe_mistral(config: Mapping[str, Any]) -> dict[str, Any]:
    """A Llama, unless a token looks back no further than a window."""
    _refuse_options(config, {"sliding_window": None})
    return _describe_llama(config)


def _describe_scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise HeliostatError(
            f"config.json has rotary embeddings of type {kind!r}: default and llama3 are supported"
        )
    return {
        "factor": rope["factor"],
        "low_freq_factor": rope["low_freq_factor"],
        "high_freq_factor": rope["high_freq_factor"],
        "original_positions": rope["original_max_position_embeddings"],
    }


def _describe_bert(config: Mapping[str, Any]) -> dict[str, Any]:
    only = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
    _refuse_options(config, only)
    return {
        "kind": "encoder",
        "layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "ffn": config["intermediate_size"],
        "max_positions": config["max_position_embeddings"],
        "segments": config["type_vocab_size"],
        "norm_eps": config["layer_norm_eps"],
    }


_DESCRIBE = {"llama": _describe_llama, "mistral": _describe_mistral, "bert": _describe_bert}


def _refuse_options(config: Mapping[str, Any], only: Mapping[str, Any]) -> None:
    for key, value in only.items():
        if config.get(key) not in (None, value):
            raise HeliostatError(
                f"config.json has {key} {config[key]!r}: only {value!r} is supported"
            )


def _refuse_other_vocabulary(signature: Signature, config: Mapping[str, Any], origin: str) -> None:
    assert isinstance(signature.input, Blocks | Text)
    rows, vocab = config.get("vocab_size"), signature.input.vocab
    if rows != vocab:
        raise HeliostatError(
            f"the weights at {origin} know {rows} tokens, the data has {vocab}: prepare the data "
            f"with data.text.tokenizer={origin} or, if it was, take the tokens out of the "
            "tokenizer.json there for which the weights have no row"
        )


def _resolve(spec: ModelSpec) -> dict[str, Any]:
    """The keys of a model section with what None stands for."""
    values = spec.model_dump()
    if isinstance(spec, GptSpec):
        values |= {"ffn": gpt.ffn_width(spec), "kv_heads": spec.kv_heads or spec.heads}
    if isinstance(spec, EncoderSpec):
        values |= {"ffn": encoder.ffn_width(spec)}
    return values


def _read_tensors(origin: str) -> Tensors:
    store, files = find_weights(origin)
    return {name: value for file in files for name, value in _parse(store, file).items()}


def _join(names: Sequence[str], tensors: Mapping[str, Tensor], origin: str) -> Tensor:
    try:
        return torch.cat([tensors[name] for name in names])
    except RuntimeError as error:
        shapes = [f"{name} is {tuple(tensors[name].shape)}" for name in names]
        raise HeliostatError(
            f"the weights at {origin} do not fit the network: {', '.join(shapes)}"
        ) from error


def _parse(store: Store, key: str) -> Tensors:
    try:
        return safetensors.torch.load(store.read(key))
    except safetensors.SafetensorError as error:
        raise HeliostatError(f"{store.uri}/{key} is not a safetensors file: {error}") from error
    except KeyError as error:  # the library's, of a type that torch has not
        raise HeliostatError(
            f"{store.uri}/{key} has tensors of type {error.args[0]}, which are not read: give the "
            "weights before they were quantised"
        ) from error


def _load(network: nn.Module, tensors: Tensors, origin: str) -> None:
    own = network.state_dict()
    problems = [f"{name} is missing" for name in own.keys() - tensors.keys()]
    problems += [f"{name} has no place in the network" for name in tensors.keys() - own.keys()]
    for name in own.keys() & tensors.keys():
        given, needed = tensors[name], own[name]
        if given.shape != needed.shape:
            problems.append(f"{name} is {tuple(given.shape)} and must be {tuple(needed.shape)}")
        elif given.is_floating_point() != needed.is_floating_point():
            problems.append(f"{name} holds {given.dtype} instead of {needed.dtype}")
    if any(name.startswith(HF_STEMS) for name in tensors.keys() - own.keys()):
        problems = ["they have Hugging Face's names: name the folder with their config.json"]
    _refuse(origin, sorted(problems))
    network.load_state_dict(tensors)


def _refuse(origin: str, problems: Sequence[str]) -> None:
    if problems:
        more = len(problems) - SHOWN
        raise HeliostatError(
            f"the weights at {origin} do not fit the network: {', '.join(problems[:SHOWN])}"
            + f", and {more} more" * (more > 0)
        )
