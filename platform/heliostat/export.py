"""A published model as files that other libraries load without this one."""

import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
from tokenizers import Tokenizer
from torch import Tensor

from heliostat import registry, spec
from heliostat.data import features
from heliostat.data.features import BlockFeatures
from heliostat.data.tokens import read_stored
from heliostat.errors import HeliostatError
from heliostat.models import gpt, pretrained
from heliostat.origin import CONFIG, WEIGHTS
from heliostat.registry import Version
from heliostat.signature import Blocks
from heliostat.spec import GptSpec
from heliostat.storage import Store


def export_hf(store: Store, version: Version, target: Store) -> list[str]:
    """Write `version` to `target` as a directory that Hugging Face's transformers loads.

    Returns the keys, which are overwritten where they exist.

    Raises:
        HeliostatError: the version is not of kind gpt, or its weights or its tokenizer are not
            those that were stored.
    """
    model = spec.parse(version.spec, origin=version.ref).model
    if not isinstance(model, GptSpec):
        raise HeliostatError(
            f"{version.ref} is of kind {model.kind}: --to hf takes versions of kind gpt"
        )
    known = features.features_from_json(version.features)
    blocks = features.input_of(known)
    assert isinstance(known, BlockFeatures)
    assert isinstance(blocks, Blocks)
    tokenizer = read_stored(store, version.features["tokenizer"])
    weights = safetensors.torch.load(registry.load_weights(store, version))
    files = to_hf_files(model, blocks, weights, tokenizer, known.chat_template)
    for key, data in files.items():
        target.write(key, data)
    return list(files)


def to_hf_files(
    model: GptSpec,
    blocks: Blocks,
    weights: Mapping[str, Tensor],
    tokenizer: bytes,
    chat_template: str = "",
) -> dict[str, bytes]:
    """The files of a LlamaForCausalLM directory by name; `tokenizer` is a tokenizer.json.

    A `chat_template`, if there is one, sets the beginning token that it names itself.

    The config.json comes last: a directory that has one is complete.
    """
    end = Tokenizer.from_buffer(tokenizer).id_to_token(blocks.end)
    # transformers refuses weights that do not say which framework wrote them.
    tensors = safetensors.torch.save(pretrained.to_hf(model, weights), {"format": "pt"})
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "model_max_length": blocks.length,
        "clean_up_tokenization_spaces": False,
    } | ({"chat_template": chat_template} if chat_template else {})
    dtype = str(weights["embed.weight"].dtype).removeprefix("torch.")
    return {
        WEIGHTS: tensors,
        pretrained.TOKENIZER: tokenizer,
        "tokenizer_config.json": _to_json(tokenizer_config),
        "special_tokens_map.json": _to_json({"eos_token": end}),
        CONFIG: _to_json(_describe(model, blocks) | {"dtype": dtype}),
    }


def _describe(model: GptSpec, blocks: Blocks) -> dict[str, Any]:
    """The config.json; `pretrained.describe_hf` is its inverse."""
    scaling = model.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": blocks.vocab,
        "hidden_size": model.width,
        "intermediate_size": gpt.ffn_width(model),
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads,
        "head_dim": model.width // model.heads,
        "hidden_act": "silu",
        "max_position_embeddings": blocks.length,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_positions,
        },
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": model.tied,
        "bos_token_id": None,
        "eos_token_id": blocks.end,
    }


def _to_json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=2).encode()
