"""A vLLM as a process beside a replica.

It comes from an environment of its own, listens on a socket in a folder that only its user may
enter, and ends with the replica.
"""

import http.client
import json
import logging
import math
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from heliostat.errors import HeliostatError
from heliostat.serve import leash
from heliostat.serve.asking import MAX_LOGPROBS
from heliostat.serve.remote import PATH
from heliostat.spec import VllmSpec

logger = logging.getLogger(__name__)

START_SECONDS = 1800.0  # of large weights, and of what is compiled for them
POLL_SECONDS = 0.2
ASK_SECONDS = 120.0
PULSE_SECONDS = 5.0
SILENCE_SECONDS = 60.0  # without an answer to whether it is well
KEPT_LINES = 2000
# What it sees of the replica's environment: nothing of Ray, of the bucket or of this Python.
PASSED = re.compile(
    r"PATH|HOME|USER|LANG|LC_\w+|TMPDIR|TZ|LD_LIBRARY_PATH|(VLLM|CUDA|NVIDIA|NCCL|HIP|ROCR|XDG)_\w+"
)
QUIET = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}
CAUSE = re.compile(r"\b\w*(?:Error|Exception): .*")


@dataclass(frozen=True)
class Launch:
    """How a vLLM is started, for texts of `context` tokens, `streams` at once on `gpus` GPUs.

    `folder` has the weights and the socket; `key` is what it wants of who asks there.
    """

    folder: str
    settings: VllmSpec
    context: int
    streams: int
    gpus: int = 0
    key: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)

    @property
    def layout(self) -> str:
        return f"{self.folder}/model"

    @property
    def socket(self) -> str:
        return f"{self.folder}/socket"

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    @property
    def command(self) -> list[str]:
        """What the user gives comes first, so that nothing of it replaces what is needed."""
        settings = self.settings
        share = settings.memory_share
        return [
            settings.program,
            "serve",
            self.layout,
            *settings.arguments,
            *("--uds", self.socket),
            *("--dtype", settings.dtype),
            *("--max-model-len", str(self.context)),
            *("--max-num-seqs", str(self.streams)),
            *("--max-logprobs", str(MAX_LOGPROBS)),
            *("--generation-config", "vllm"),
            *("--load-format", "safetensors"),
            *("--uvicorn-log-level", "warning"),
            *(("--tensor-parallel-size", str(self.gpus)) if self.gpus > 1 else ()),
            *(("--gpu-memory-utilization", f"{share:g}") if share else ()),
        ]

    def make_environment(self, around: Mapping[str, str]) -> dict[str, str]:
        passed = {name: value for name, value in around.items() if PASSED.fullmatch(name)}
        return {**passed, **QUIET, "VLLM_API_KEY": self.key}


@dataclass
class Pulse:
    """When it last said that it is well, in monotonic seconds."""

    heard: float = math.inf


class Server:
    """A vLLM that runs as long as this object is held, and not longer than this process."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.pulse = Pulse()
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", leash.__file__, launch.folder, *launch.command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=launch.make_environment(os.environ),
            start_new_session=True,
        )
        assert self.process.stdin
        assert self.process.stdout
        self._reader = threading.Thread(
            target=_keep_lines, args=(self.process.stdout, self._lines), daemon=True
        )
        self._reader.start()
        self._release = weakref.finalize(self, self.process.stdin.close)

    def check(self) -> None:
        """Raises HeliostatError: it has ended, for the reason that it told, or hangs."""
        status = self.process.poll()
        if status is not None:
            self._reader.join(1)
            raise HeliostatError(f"vLLM ended with status {status}: {find_cause(self._lines)}")
        if time.monotonic() - self.pulse.heard > SILENCE_SECONDS:
            raise HeliostatError(f"vLLM has not said for {SILENCE_SECONDS:g} s that it is well")

    def await_ready(self, seconds: float = START_SECONDS) -> None:
        """Raises HeliostatError: it ends, or does not answer in time."""
        deadline = time.monotonic() + seconds
        while not is_well(self.launch):
            self.check()
            if time.monotonic() > deadline:
                raise HeliostatError(f"vLLM does not answer after {seconds:g} s")
            time.sleep(POLL_SECONDS)
        self.pulse.heard = time.monotonic()
        listening = (self.launch, self.process, self.pulse)
        threading.Thread(target=_listen, args=listening, daemon=True).start()

    def measure(self, tokens: Sequence[int]) -> float:
        """The log probability of `tokens`, at least two, after the first of them.

        Raises:
            HeliostatError: it does not answer.
        """
        *prompt, last = tokens
        body = {
            "prompt": prompt,
            "max_tokens": 1,
            "ignore_eos": True,
            "temperature": 0,
            "allowed_token_ids": [last],
            "logprobs": 0,
            "prompt_logprobs": 0,
        }
        choice = self._ask(body)["choices"][0]
        told = [one[str(token)]["logprob"] for one, token in _pair(choice, prompt)]
        return math.fsum([*told, *choice["logprobs"]["token_logprobs"]])

    def end(self) -> None:
        """End it and wait until it is gone with its folder."""
        self._release()
        self.process.wait()

    def _ask(self, body: Mapping[str, Any]) -> Any:
        try:
            status, answer = exchange(self.launch, "POST", PATH, json.dumps(body).encode())
        except (OSError, http.client.HTTPException) as error:
            self.check()
            raise HeliostatError(f"vLLM does not answer: {error}") from error
        if status != 200:
            raise HeliostatError(f"vLLM answers {status}: {answer[:400].decode(errors='replace')}")
        return json.loads(answer)


def exchange(launch: Launch, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
    """The status and the body of its answer."""
    connection = _SocketConnection(launch.socket, ASK_SECONDS)
    headers = {**launch.headers, "content-type": "application/json"}
    with closing(connection):
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()


def is_well(launch: Launch) -> bool:
    try:
        return exchange(launch, "GET", "/health", None)[0] == 200
    except (OSError, http.client.HTTPException):
        return False


class _SocketConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("vllm", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def find_cause(lines: Iterable[str]) -> str:
    """The first error among them, which later ones only follow from; else the last line."""
    last = "it said nothing"
    for line in lines:
        if cause := CAUSE.search(line):
            return cause[0][:400]
        last = line.strip()[:400] or last
    return last


def _pair(choice: Mapping[str, Any], prompt: Sequence[int]) -> Iterator[tuple[Any, int]]:
    """What is told of each token of the prompt but the first, of which nothing is."""
    return zip(choice["prompt_logprobs"][1:], prompt[1:], strict=True)


def _listen(launch: Launch, process: "subprocess.Popen[bytes]", pulse: Pulse) -> None:
    while process.poll() is None:
        if is_well(launch):
            pulse.heard = time.monotonic()
        time.sleep(PULSE_SECONDS)


def _keep_lines(output: Any, lines: "deque[str]") -> None:
    for line in output:
        text = line.decode(errors="replace").rstrip().rpartition("\r")[2]
        lines.append(text)
        logger.info("vLLM: %s", text)
