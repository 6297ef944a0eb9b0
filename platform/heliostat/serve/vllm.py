"""vLLM in place of the engine: it gets a version's export to serve, and proves that it does so.

Prompts, templates, limits and texts stay those of this package: it is sent tokens and sends tokens.
"""

import math
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from heliostat import examples, storage
from heliostat.data.features import TOKENS, BlockFeatures, features_from_json
from heliostat.data.shards import to_columns
from heliostat.errors import HeliostatError
from heliostat.export import export_hf
from heliostat.registry import Version
from heliostat.serve.language import Language, Room, make_language
from heliostat.serve.remote import Remote
from heliostat.serve.vllm_server import Launch, Server
from heliostat.spec import VllmSpec
from heliostat.storage import Store

ROUNDED_RTOL = 0.02  # of the loss of a text, where numbers have 8 or 11 bits


def load_vllm(
    store: Store, version: Version, room: Room, settings: VllmSpec, gpus: int = 0
) -> Language:
    """Start a vLLM with a version of kind gpt and let it answer the version's examples.

    Raises:
        HeliostatError: vLLM is not there or ends, the version is of another kind or damaged, or it
            makes of its examples something else than when it was published.
    """
    features = features_from_json(version.features)
    assert isinstance(features, BlockFeatures)
    check_settings(version, settings, room.context, features.length)
    folder = tempfile.mkdtemp(prefix="heliostat-vllm-")
    launch = Launch(folder, settings, room.context or features.length, room.streams, gpus)
    try:
        export_hf(store, version, storage.connect(launch.layout))
        server = Server(launch)
    except BaseException:
        shutil.rmtree(folder)
        raise
    try:
        server.await_ready()
        check_examples(store, version, features, server)
        runner = Remote(
            launch.socket,
            launch.headers,
            server.check,
            size=version.weights_bytes,
            context=launch.context,
            slots=room.streams,
            max_waiting=room.waiting,
        )
        return make_language(store, version, runner)
    except BaseException:
        server.end()
        raise


def check_settings(version: Version, settings: VllmSpec, context: int | None, length: int) -> None:
    """Raises HeliostatError: there is no such program here, or the context is too long for it."""
    if shutil.which(settings.program) is None:
        raise HeliostatError(
            f"deploy.engine is vllm, and {settings.program} is no program on node "
            f"{socket.gethostname()}: make vLLM's environment there (`make vllm`) and say where by "
            "deploy.vllm.program, or leave deploy.engine out"
        )
    if context and context > length:
        raise HeliostatError(
            f"deploy.max_context is {context:,}, and vLLM takes at most the {length:,} tokens of "
            f"the blocks that {version.ref} was trained on"
        )


def check_examples(store: Store, version: Version, features: BlockFeatures, server: Server) -> None:
    """Let it measure the blocks that were kept as examples, or two tokens if there are none.

    Raises:
        HeliostatError: their loss is another one than when the version was published.
    """
    rows, expected = examples.read(store, version)
    if rows is None or server.launch.context < features.length:
        if not math.isfinite(server.measure([0, 0])):
            raise HeliostatError(f"{version.ref} does not continue a text: it computes no numbers")
        return
    blocks = to_columns(features, rows)[TOKENS].tolist()
    loss = measure_loss(server, list(split_documents(blocks, features.end)))
    found = np.full(expected.shape, loss, np.float32)
    is_exact = server.launch.settings.dtype == "float32"  # auto rounds what was trained so
    examples.compare(version, found, expected, examples.RTOL if is_exact else ROUNDED_RTOL)


def split_documents(blocks: Iterable[Sequence[int]], end: int) -> Iterator[list[int]]:
    """The documents of packed blocks, for a token sees its own alone; without those of one."""
    for block in blocks:
        document: list[int] = []
        for token in block:
            document.append(token)
            if token == end:
                yield from [document] * (len(document) > 1)
                document = []
        yield from [document] * (len(document) > 1)


def measure_loss(server: Server, documents: Sequence[Sequence[int]]) -> float:
    """The mean over all tokens that follow one, in nats."""
    told = math.fsum(server.measure(document) for document in documents)
    return -told / sum(len(document) - 1 for document in documents)
