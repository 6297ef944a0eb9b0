"""Texts continued by a server that speaks vLLM's protocol on a socket: tokens in, tokens out."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import aiohttp
import orjson

from heliostat.serve.engine.ask import Ask
from heliostat.serve.engine.engine import Made
from heliostat.serve.engine.runner import Answer, Failed, Heard
from heliostat.serve.engine.sampler import Token
from heliostat.serve.engine.scheduler import Full
from heliostat.serve.replies import Refusal

logger = logging.getLogger(__name__)

PATH = "/v1/completions"
URL = f"http://vllm{PATH}"  # the host is nobody: what is asked stands at the socket
EVENT = b"data: {"
TOKEN = "token_id:"
MAX_EVENT_BYTES = 2**20
SEEDS = 2**63
FOREVER = aiohttp.ClientTimeout(total=None)  # a request has its end from the door


class Relayed(Answer):
    """An answer that comes from elsewhere: who leaves it breaks the connections it comes by."""

    task: "asyncio.Task[None] | None" = None

    def leave(self) -> None:
        super().leave()
        if self.task:
            self.task.cancel()


class Remote:
    """Continues up to `slots` texts at once by the server on `socket`, others wait there.

    `check` raises HeliostatError if the server has ended.
    """

    def __init__(
        self,
        socket: str,
        headers: Mapping[str, str],
        check: Callable[[], None],
        *,
        size: int,
        context: int,
        slots: int,
        max_waiting: int,
    ) -> None:
        self.size, self.context, self.max_waiting, self.check = size, context, max_waiting, check
        self._socket, self._headers = socket, headers
        self._slots, self._inside = slots, 0

    def start(self, asks: Sequence[Ask]) -> Answer:
        """Begin to answer; called in the event loop that will await the answer.

        Raises:
            Full: too many wait already.
        """
        if max(0, self._inside - self._slots) + len(asks) > self.max_waiting:
            raise Full
        self._inside += len(asks)
        answer = Relayed(asks)
        answer.task = asyncio.ensure_future(self._follow(answer))
        answer.task.add_done_callback(lambda task: self._end(len(asks)))
        return answer

    def _end(self, count: int) -> None:
        self._inside -= count

    async def _follow(self, answer: Relayed) -> None:
        try:
            connector = aiohttp.UnixConnector(self._socket, limit=0)
            async with (
                aiohttp.ClientSession(
                    connector=connector,
                    headers=self._headers,
                    timeout=FOREVER,
                    read_bufsize=MAX_EVENT_BYTES,
                ) as http,
                asyncio.TaskGroup() as group,
            ):
                for stream in answer.streams:
                    group.create_task(read_stream(http, stream))
        except* (aiohttp.ClientError, OSError) as errors:
            logger.error("vLLM broke off: %s", errors.exceptions[0])
            answer.fail(Refusal(503, "the engine of this model broke off, retry later"))
        except* Exception as errors:
            logger.error("vLLM is not understood", exc_info=errors.exceptions[0])
            answer.fail(Failed())


async def read_stream(http: aiohttp.ClientSession, stream: Heard) -> None:
    """Let the server continue one text, token by token, to its end or until nobody wants more.

    Raises:
        Failed: the server refuses it, or ends it before its end.
        ClientError: the connection is broken.
    """
    async with http.post(URL, json=write_ask(stream.ask)) as response:
        if response.status != 200:
            raise Failed(f"{response.status}: {(await response.text())[:400]}")
        async for line in response.content:
            if stream.left or stream.finish:
                return
            if line.startswith(EVENT):
                for token in read_tokens(orjson.loads(line[len(EVENT) - 1 :]), stream.ask):
                    stream.made.append(token.id)
                    stream.answer.add(Made(stream, token, stream.finish))
    if not stream.finish:
        raise Failed(f"it ended after {len(stream.made)} tokens")


def write_ask(ask: Ask) -> dict[str, Any]:
    """The body of a request for a stream of token ids; what ends a text stands in the ask alone."""
    sampling = ask.sampling
    return {
        "prompt": ask.prompt,
        "max_tokens": ask.max_tokens,
        "stop_token_ids": sorted(ask.ends),
        "ignore_eos": True,
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "repetition_penalty": sampling.repetition_penalty,
        "seed": None if sampling.seed is None else sampling.seed % SEEDS,
        "logprobs": sampling.logprobs,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
        "stream": True,
    }


def read_tokens(event: Mapping[str, Any], ask: Ask) -> Iterator[Token]:
    """The tokens of one event.

    Raises:
        Failed: it is an error.
    """
    if "choices" not in event:
        raise Failed(str(event.get("error"))[:400])
    for choice in event["choices"]:
        told = choice.get("logprobs")
        for place, token in enumerate(choice.get("token_ids") or ()):
            if ask.sampling.logprobs is None:
                yield Token(token)
            else:
                top = rank(told["top_logprobs"][place])[: ask.sampling.logprobs]
                yield Token(token, told["token_logprobs"][place], top)


def rank(logprobs: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    """Tokens with their log probabilities, the likeliest first."""
    pairs = ((int(name.removeprefix(TOKEN)), logprob) for name, logprob in logprobs.items())
    return tuple(sorted(pairs, key=lambda pair: -pair[1]))
