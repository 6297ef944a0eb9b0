"""The deploy section: which version answers, on how much, within which bounds."""

from typing import Annotated, Literal, Self

from pydantic import Field, StrictBool, model_validator

from heliostat.spec.section import Natural, NaturalFloat, Positive, PositiveFloat, Section


class CandidateSpec(Section):
    """A version beside the one that is served: a `canary` answers, a `shadow` is only asked.

    It gets `share` of the requests: of all of them drawn one by one, or those of the same keys
    every time (`by: key`). Where it fails or refuses, the version that is served answers; a refusal
    is a failure if that one does not refuse as well. After `min_requests` it takes over (a shadow
    does not) unless its share of failures is surely above `max_error_share` and that of the served
    one, its 95th percentile of latency above `max_latency_ratio` times that of the served one, or,
    of a shadow, its answers differ by more than `max_difference` (those that are streamed are not
    compared). It is taken back after `timeout_s` without as many requests.
    """

    mode: Literal["canary", "shadow"] = "canary"
    share: float = Field(default=0.1, gt=0, le=1)
    by: Literal["request", "key"] = "request"
    min_requests: Positive = 100
    max_error_share: float = Field(default=0.01, ge=0, lt=1)
    max_latency_ratio: PositiveFloat = 2.0
    max_difference: PositiveFloat | None = None
    timeout_s: PositiveFloat = 3600


class VllmSpec(Section):
    """vLLM as the nodes that serve have it, in an environment of its own.

    `program` is its command there. `dtype` auto is that of the weights. `memory_share` is how much
    of a GPU it takes, None leaves that to vLLM. `arguments` are put behind `vllm serve`.
    """

    program: str = "vllm"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    memory_share: Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    arguments: tuple[str, ...] = ()


class DeploySpec(Section):
    """`start_timeout_s` is long enough for an autoscaler to bring a node and set it up.

    The models that a replica holds share `max_model_mib`; one that was dropped is loaded again when
    it is asked for. `keep_previous` versions of each model stay served by their number. Replicas
    from a fewest to a most, `[0, 4]`, follow what they are asked: there are as many as have
    `target_requests` inside each on average or, if that is more, as let 95 % of the answers begin
    within `latency_target_ms`. More come after `scale_up_s` for which they were wanted, fewer (none
    too, if 0 is the fewest) after `scale_down_s`; a request that finds none waits for the first. A
    language model continues `max_streams` texts at once, each of at most `max_context` tokens
    with its prompt (None: the blocks it was trained on), and keeps memory for all of them; `engine`
    is what does so, the one of this package or a vLLM beside each replica. With `auth` only those
    with an API key are answered, the same for all models.
    """

    version: Positive | None = None
    replicas: Positive | tuple[Natural, Positive] = 1
    target_requests: Positive = 8
    latency_target_ms: PositiveFloat | None = None
    scale_up_s: PositiveFloat = 10
    scale_down_s: PositiveFloat = 300
    cpus_per_replica: PositiveFloat = 1
    gpus_per_replica: NaturalFloat = 0
    keep_previous: Natural = 1
    candidate: CandidateSpec | None = None
    start_timeout_s: PositiveFloat = 900
    max_latency_ms: PositiveFloat | None = None
    max_model_mib: PositiveFloat = 2048
    max_body_mib: PositiveFloat = 8
    max_queued_requests: Positive = 256
    request_timeout_s: PositiveFloat = 30
    max_streams: Positive = 32
    max_context: Annotated[int, Field(ge=2, strict=True)] | None = None
    engine: Literal["heliostat", "vllm"] = "heliostat"
    vllm: VllmSpec = VllmSpec()
    auth: StrictBool = True

    @model_validator(mode="after")
    def _fewest_come_first(self) -> Self:
        if isinstance(self.replicas, tuple) and self.replicas[0] > self.replicas[1]:
            raise ValueError(f"replicas go from a fewest to a most, not {list(self.replicas)}")
        return self

    @model_validator(mode="after")
    def _a_latency_is_reached_by_replicas(self) -> Self:
        if self.latency_target_ms and isinstance(self.replicas, int):
            raise ValueError(
                "latency_target_ms needs a number of replicas that can change: "
                f"give replicas=[1, {self.replicas + 1}], from a fewest to a most"
            )
        return self
