"""A program that is called, listens and speaks as `vllm serve` does, with transformers inside.

It knows nothing of Heliostat: it reads a Hugging Face directory and answers over a Unix socket.
What it has of vLLM is what its HTTP API documents: streams of token ids, log probabilities as
`token_id:N`, those of a prompt, forced tokens, /health, and /metrics with the requests that run.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

Document = dict[str, Any]


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--uds", required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--max-num-seqs", type=int, required=True)
    for name in ("dtype", "max-logprobs", "generation-config", "load-format", "uvicorn-log-level"):
        parser.add_argument(f"--{name}", required=True)
    return parser.parse_args(arguments)


class Model:
    """`running` are the texts that are continued now."""

    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import LlamaForCausalLM

        torch.set_num_threads(1)
        self.llama: Any = LlamaForCausalLM.from_pretrained(options.model).float().eval()
        self.context, self.running = options.max_model_len, 0
        self.room = asyncio.Semaphore(options.max_num_seqs)

    @torch.inference_mode()
    def tell(self, tokens: list[int]) -> torch.Tensor:
        """The log probabilities (tokens, vocabulary) of what follows each."""
        logits: torch.Tensor = self.llama(torch.tensor([tokens])).logits[0]
        return logits.log_softmax(1)

    def choose(self, logprobs: torch.Tensor, body: Document, random: torch.Generator) -> int:
        scores = logprobs.clone()
        if allowed := body.get("allowed_token_ids"):
            scores[[i for i in range(len(scores)) if i not in allowed]] = -torch.inf
        if not body["temperature"]:
            return int(scores.argmax())
        weights = (scores / body["temperature"]).softmax(0)
        if body.get("top_k"):
            weights[weights < weights.topk(body["top_k"]).values[-1]] = 0
        return int(torch.multinomial(weights, 1, generator=random))

    async def write(self, body: Document) -> AsyncIterator[tuple[int, torch.Tensor, str | None]]:
        """Each next token, the log probabilities it was chosen by, and why it is the last one."""
        tokens, random = list(body["prompt"]), torch.Generator()
        if body.get("seed") is not None:
            random.manual_seed(body["seed"])
        async with self.room:
            self.running += 1
            try:
                for left in reversed(range(body["max_tokens"])):
                    logprobs = self.tell(tokens)[-1]
                    token = self.choose(logprobs, body, random)
                    tokens.append(token)
                    ends = token in body.get("stop_token_ids", ())
                    yield token, logprobs, "stop" if ends else None if left else "length"
                    if ends:
                        return
                    await asyncio.sleep(0)
            finally:
                self.running -= 1


def list_top(logprobs: torch.Tensor, chosen: int, count: int) -> Iterator[tuple[str, float]]:
    """The chosen token first, wherever it stands, as vLLM has it."""
    for token in dict.fromkeys([chosen, *logprobs.topk(count).indices.tolist()]):
        yield f"token_id:{token}", float(logprobs[token])


def describe(token: int, logprobs: torch.Tensor, finish: str | None, body: Document) -> Document:
    told = None
    if body.get("logprobs") is not None:
        told = {
            "tokens": [f"token_id:{token}"],
            "token_logprobs": [float(logprobs[token])],
            "top_logprobs": [dict(list_top(logprobs, token, body["logprobs"]))],
        }
    return {
        "index": 0,
        "text": "",
        "token_ids": [token],
        "logprobs": told,
        "finish_reason": finish,
    }


def build_app(model: Model) -> Starlette:
    async def complete(request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {os.environ['VLLM_API_KEY']}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        body = await request.json()
        if len(body["prompt"]) + body["max_tokens"] > model.context:
            return JSONResponse({"error": {"message": "too long", "code": 400}}, 400)
        if body.get("stream"):
            return StreamingResponse(stream(body), media_type="text/event-stream")
        (choice,) = [describe(*one, body) async for one in model.write(body)]
        if body.get("prompt_logprobs") is not None:
            told = model.tell(body["prompt"])
            choice["prompt_logprobs"] = [None] + [
                {str(token): {"logprob": float(told[place][token]), "rank": 1}}
                for place, token in enumerate(body["prompt"][1:])
            ]
        return JSONResponse({"choices": [choice]})

    async def stream(body: Document) -> AsyncIterator[bytes]:
        async for one in model.write(body):
            yield b"data: " + json.dumps({"choices": [describe(*one, body)]}).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

    async def count(request: Request) -> Response:
        return PlainTextResponse(f"vllm:num_requests_running {model.running}\n")

    async def answer_health(request: Request) -> Response:
        return Response()

    return Starlette(
        routes=[
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/health", answer_health),
            Route("/metrics", count),
        ]
    )


def main(arguments: list[str]) -> None:
    options = read_arguments(arguments)
    print(f"vLLM stand-in, process {os.getpid()}", flush=True)
    app = build_app(Model(options))
    uvicorn.run(app, uds=options.uds, log_level=options.uvicorn_log_level)


if __name__ == "__main__":
    main(sys.argv[1:])
