"""What is asked of the engine: a prompt to continue, how far, and how tokens are chosen."""

from dataclasses import dataclass

COLD = 1e-6  # a temperature below this leaves only the likeliest token


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, in this order; the defaults change nothing.

    Logits of tokens that were seen are divided (below 0: multiplied) by `repetition_penalty`
    (Keskar et al. 2019), then all are divided by `temperature`; of the `top_k` likeliest those are
    kept that make up `top_p` (Holtzman et al. 2020). `top_k` 0 keeps all. `logprobs` is how many
    alternatives are told beside a token's own log probability, which is that of the model itself.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logprobs: int | None = None

    @property
    def filters(self) -> bool:
        """Whether only some of the tokens may be chosen."""
        return self.top_k > 0 or self.top_p < 1

    @property
    def greedy(self) -> bool:
        return self.temperature < COLD


@dataclass(frozen=True)
class Ask:
    """Continue `prompt` by at most `max_tokens` tokens, up to one of `ends`, which is the last."""

    prompt: tuple[int, ...]
    max_tokens: int
    ends: frozenset[int] = frozenset()
    sampling: Sampling = Sampling()

    @property
    def tokens(self) -> int:
        """The most that it comes to."""
        return len(self.prompt) + self.max_tokens
