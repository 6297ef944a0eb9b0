"""What leaves for transformers gives the same there, and comes back bit for bit."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as algorithms
from torch import Tensor, nn

from drafting import draft
from heliostat import export, registry, storage
from heliostat.data import features
from heliostat.data.tokens import describe_tokenizer, read_tokenizer
from heliostat.errors import HeliostatError
from heliostat.models import build
from heliostat.models.pretrained import load_pretrained
from heliostat.signature import Blocks, NextToken, Signature
from heliostat.spec import GptSpec, dump, parse
from heliostat.storage import Store
from writing import SPECS

os.environ["HF_HUB_OFFLINE"] = "1"

TEXTS = ["a field of mirrors turns many rays to one tower", "rays, mirrors, tower"] * 4
END = "<|end|>"


def learn_tokenizer() -> bytes:
    tokenizer = Tokenizer(algorithms.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    written: str = tokenizer.to_str()
    return written.encode()


TOKENIZER = learn_tokenizer()
IDS = Tokenizer.from_buffer(TOKENIZER).get_vocab()
VOCAB = len(IDS)
BLOCKS = Blocks(24, VOCAB, IDS[END])
SIGNATURE = Signature(BLOCKS, NextToken())


def build_loud(spec: GptSpec) -> nn.Module:
    torch.manual_seed(0)
    network = build(spec, SIGNATURE).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim == 2 else 1.0)
    return network


def write(spec: GptSpec, weights: dict[str, Tensor], folder: Path) -> None:
    for name, data in export.to_hf_files(spec, BLOCKS, weights, TOKENIZER).items():
        (folder / name).write_bytes(data)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@torch.inference_mode()
def test_transformers_gives_the_same_logits(tmp_path: Path, spec: GptSpec) -> None:
    from transformers import LlamaForCausalLM

    network = build_loud(spec)
    write(spec, network.state_dict(), tmp_path)
    llama: Any
    llama, told = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    tokens = torch.randint(BLOCKS.end + 1, VOCAB, (3, BLOCKS.length))
    ours = network(tokens)
    assert ours.std() > 1
    assert (llama(tokens).logits - ours).abs().max() < 1e-4


def test_transformers_reads_texts_alike_and_stops_at_the_end(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    write(SPECS["tied"], build_loud(SPECS["tied"]).state_dict(), tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, " Ünïcode \n\t" + END):
        assert theirs(text)["input_ids"] == Tokenizer.from_buffer(TOKENIZER).encode(text).ids
        assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token_id == BLOCKS.end
    assert LlamaForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == BLOCKS.end


def test_transformers_writes_a_chat_as_where_the_template_came_from(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    template = "\n{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    before, after = tmp_path / "before", tmp_path / "after"
    for folder in (before, after):
        folder.mkdir()
        write(SPECS["tied"], build_loud(SPECS["tied"]).state_dict(), folder)
    told = json.loads((before / "tokenizer_config.json").read_text())
    told |= {"chat_template": template, "bos_token": END}
    (before / "tokenizer_config.json").write_text(json.dumps(told))
    data, beside = read_tokenizer(str(before))
    kept = describe_tokenizer(data, beside, "before").chat_template
    weights = build_loud(SPECS["tied"]).state_dict()
    for name, file in export.to_hf_files(SPECS["tied"], BLOCKS, weights, data, kept).items():
        (after / name).write_bytes(file)
    chat = [{"role": "user", "content": "rays?"}]
    theirs, ours = (
        AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, tokenize=False)
        for folder in (before, after)
    )
    assert ours == theirs == f"\n{END}user: rays?\n"


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_what_was_exported_comes_back_bit_for_bit(tmp_path: Path, spec: GptSpec) -> None:
    weights = build_loud(spec).state_dict()
    write(spec, weights, tmp_path)
    spec = spec.model_copy(update={"init": str(tmp_path)})
    network = build(spec, SIGNATURE)
    load_pretrained(network, spec, SIGNATURE)
    assert network.state_dict().keys() == weights.keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, weights[name])
    files = export.to_hf_files(spec, BLOCKS, network.state_dict(), TOKENIZER)
    tensors = safetensors.torch.load(files["model.safetensors"])
    assert sum(map(Tensor.numel, tensors.values())) == sum(map(Tensor.numel, weights.values()))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return storage.connect(str(tmp_path / "bucket"))


def publish(store: Store, model: dict[str, Any], weights: dict[str, Tensor]) -> registry.Version:
    """A version as a finished run leaves it, with its tokenizer."""
    sha256 = hashlib.sha256(TOKENIZER).hexdigest()
    store.write(f"blobs/{sha256}", TOKENIZER)
    seen = features.BlockFeatures(BLOCKS.length, VOCAB, BLOCKS.end, sha256, (1,) * VOCAB)
    spec = parse({"name": "rays", "data": {"source": "s3://raw/rays"}, "model": model})
    made = draft("rays", seen, NextToken(), spec=dump(spec), metrics={"loss": 2.5})
    return registry.publish(store, made, safetensors.torch.save(weights))


def test_the_command_writes_a_published_version(tmp_path: Path, store: Store) -> None:
    from transformers import LlamaForCausalLM

    spec = SPECS["grouped, untied"]
    weights = build_loud(spec).state_dict()
    publish(store, spec.model_dump(), weights)
    command = [sys.executable, "-m", "heliostat.cli", "export", "rays:1", "--root", store.uri]
    command += ["--to", "hf", str(tmp_path / "llama")]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert told.stdout.splitlines()[-1] == str(tmp_path / "llama")
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    assert torch.equal(llama.get_input_embeddings().weight, weights["embed.weight"])


def test_a_version_of_another_kind_is_refused(store: Store) -> None:
    version = publish(store, {"kind": "mlp"}, {"w": torch.zeros(1)})
    with pytest.raises(HeliostatError, match=r"rays:1 is of kind mlp: --to hf takes .* kind gpt"):
        export.export_hf(store, version, store)


def test_another_tokenizer_than_the_published_one_is_refused(store: Store) -> None:
    spec = SPECS["tied"]
    version = publish(store, spec.model_dump(), build_loud(spec).state_dict())
    store.write(f"blobs/{version.features['tokenizer']}", b"{}")
    with pytest.raises(HeliostatError, match="not the tokenizer that was stored"):
        export.export_hf(store, version, store)
