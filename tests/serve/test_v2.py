"""The Open Inference Protocol: what its own client sends is answered as offline, for every kind."""

import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from heliostat.data.encoding import stack_series
from heliostat.evaluate import predict
from heliostat.serve.protocol import MAX_INSTANCES
from serving import EVERY, LABELS, LIMITS, Client, listen, make_app

HEADER = "inference-header-content-length"
RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (3, 4, 4, 1)).astype(np.uint8)
PHOTOS = (RANDOM.random((2, 8, 8, 3)) * 255).astype(np.float32)
WAVES = RANDOM.random((2, 5, 2)).astype(np.float32)
WORDS = np.array(["the quick fox", "ein Hund, groß"], object)
AGES, JOBS = np.array([41.0, np.nan]), np.array(["cook", "pilot"], object)
USERS = np.array(["1", "7"], object)
PEOPLE = {"age": AGES, "job": JOBS}
TABLE = {"numbers": AGES[:, np.newaxis], "x.job": JOBS}

# The tensors of a request by model, and the columns that are the same offline.
REQUESTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "shapes": ({"image": PIXELS}, {"image": PIXELS}),
    "photos": ({"image": PHOTOS}, {"image": PHOTOS}),
    "people": (PEOPLE, TABLE),
    "signs": (PEOPLE, TABLE),
    "prices": (PEOPLE, TABLE),
    "sounds": ({"series": WAVES}, {"series": stack_series(list(WAVES))}),
    "mails": ({"text": WORDS}, {"text": WORDS}),
    "tweets": ({"text": WORDS}, {"text": WORDS}),
    "ratings": (
        {"user": USERS, "item": np.array(["b", "a"], object), "age": np.array([20.0, 30.0])},
        {
            "x.user": USERS,
            "x.item": np.array(["b", "a"], object),
            "numbers": np.array([[20.0], [30]]),
        },
    ),
}


@pytest.fixture(scope="module")
def client() -> Client:
    return Client(make_app(EVERY, LIMITS))


@pytest.fixture(scope="module")
def triton() -> Iterator[InferenceServerClient]:
    with listen(make_app(EVERY, LIMITS)) as address, InferenceServerClient(address) as found:
        yield found


def make_inputs(
    metadata: dict[str, Any], tensors: dict[str, Any], binary: bool
) -> list[InferInput]:
    datatypes = {slot["name"]: slot["datatype"] for slot in metadata["inputs"]}
    inputs = []
    for name, values in tensors.items():
        datatype = "FP32" if values.dtype == np.float32 else datatypes[name]
        tensor = InferInput(name, list(values.shape), datatype)
        tensor.set_data_from_numpy(values, binary_data=binary)
        inputs.append(tensor)
    return inputs


def expected(name: str) -> np.ndarray[Any, Any]:
    return predict(EVERY[name].predictor, REQUESTS[name][1])


# The client writes NaN as JSON, which is none: of these it can only send the bytes.
WITH_NAN = {"people", "signs", "prices"}


@pytest.mark.parametrize(
    ("name", "binary"),
    [(name, True) for name in REQUESTS]
    + [(name, False) for name in REQUESTS if name not in WITH_NAN],
)
def test_its_client_gets_the_offline_predictions(
    triton: InferenceServerClient, name: str, binary: bool
) -> None:
    metadata = triton.get_model_metadata(name)
    inputs = make_inputs(metadata, REQUESTS[name][0], binary)
    outputs = [
        InferRequestedOutput(slot["name"], binary_data=binary) for slot in metadata["outputs"]
    ]
    for wanted in (outputs, None):
        answer = triton.infer(name, inputs, "3", outputs=wanted, request_id="mine")
        assert answer.get_response()["id"] == "mine"
        got = {slot["name"]: answer.as_numpy(slot["name"]) for slot in metadata["outputs"]}
        if "probabilities" in got:
            assert np.array_equal(got["probabilities"], expected(name))
            labels = EVERY[name].version.output["labels"]
            best = [labels[place].encode() for place in expected(name).argmax(axis=1)]
            assert [np.asarray(text).astype(bytes).item() for text in got["class"]] == best
        else:
            assert np.array_equal(np.stack([got["low"], got["high"]], axis=1), expected(name))


def test_the_metadata_is_the_signature(client: Client) -> None:
    answer = client.get("/v2/models/photos/versions/3").json()
    assert answer == {
        "name": "photos",
        "versions": ["3"],
        "platform": "heliostat",
        "inputs": [{"name": "image", "datatype": "UINT8", "shape": [-1, 8, 8, 3]}],
        "outputs": [
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, len(LABELS)]},
            {"name": "class", "datatype": "BYTES", "shape": [-1]},
        ],
    }
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data", "classification"]


def test_health_and_readiness(triton: InferenceServerClient) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("shapes")
    assert triton.is_model_ready("shapes", "3")
    assert not triton.is_model_ready("shapes", "4")
    assert not triton.is_model_ready("other")


def test_the_client_shows_the_sentence_of_an_error(triton: InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match=r"^\[404\] there is no such model$"):
        triton.get_model_metadata("other")


ASKED: list[dict[str, Any]] = [
    {"request_id": "mine", "timeout": 60_000_000},
    {"timeout": 0, "priority": 0, "sequence_id": 0, "sequence_start": True},
    {"sequence_id": "", "sequence_end": True},
    {"parameters": {"tenant": "observatory", "trace": 7, "is_test": True, "share": 0.5}},
]


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_what_a_client_asks_of_a_request_leaves_its_answer_as_it_is(
    triton: InferenceServerClient, asked: dict[str, Any]
) -> None:
    inputs = make_inputs(triton.get_model_metadata("shapes"), REQUESTS["shapes"][0], True)
    answer = triton.infer("shapes", inputs, **asked)
    assert np.array_equal(answer.as_numpy("probabilities"), expected("shapes"))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"timeout": 1}, r"^\[408\] no answer within 1e-06 s$"),
        ({"timeout": -1}, r"^\[422\] parameters\.timeout: "),
        ({"timeout": 0.5}, r"^\[422\] parameters\.timeout: "),
        ({"timeout": 2**64}, r"^\[422\] parameters\.timeout: "),
        ({"priority": 1}, r"^\[422\] parameters\.priority: .* one queue: it must be 0"),
        ({"sequence_id": 5, "sequence_start": True}, r"^\[422\] parameters\.sequence_id: .* state"),
        ({"sequence_id": "mine"}, r"^\[422\] parameters\.sequence_id: .* state"),
    ],
)
def test_what_no_model_here_can_do_is_refused_in_a_sentence(
    triton: InferenceServerClient, asked: dict[str, Any], said: str
) -> None:
    inputs = make_inputs(triton.get_model_metadata("shapes"), REQUESTS["shapes"][0], True)
    with pytest.raises(InferenceServerException, match=said):
        triton.infer("shapes", inputs, **asked)


def test_shared_memory_is_refused_in_a_sentence(triton: InferenceServerClient) -> None:
    inputs = make_inputs(triton.get_model_metadata("shapes"), REQUESTS["shapes"][0], True)
    output = InferRequestedOutput("probabilities")
    output.set_shared_memory("region", 64)
    said = r"^\[422\] outputs\[0\]\.parameters\.shared_memory_region: .* data itself"
    with pytest.raises(InferenceServerException, match=said):
        triton.infer("shapes", inputs, outputs=[output])
    inputs[0].set_shared_memory("region", 16)
    with pytest.raises(InferenceServerException, match=said.replace("outputs", "inputs")):
        triton.infer("shapes", inputs)


def test_own_parameters_of_a_tensor_mean_nothing(client: Client) -> None:
    plain = client.post("/v2/models/shapes/infer", json=image())
    marked = client.post("/v2/models/shapes/infer", json=image(parameters={"content_type": "np"}))
    assert plain.status_code == marked.status_code == 200
    assert plain.json()["outputs"] == marked.json()["outputs"]


def test_a_client_can_only_shorten_its_time(triton: InferenceServerClient) -> None:
    inputs = make_inputs(triton.get_model_metadata("shapes"), REQUESTS["shapes"][0], True)
    short = {"x-timeout-seconds": "0.000001"}
    with pytest.raises(InferenceServerException, match="no answer within 1e-06 s"):
        triton.infer("shapes", inputs, headers=short, timeout=60_000_000)


def test_the_most_probable_classes(triton: InferenceServerClient) -> None:
    inputs = make_inputs(triton.get_model_metadata("shapes"), REQUESTS["shapes"][0], True)
    wanted = InferRequestedOutput("probabilities", class_count=2)
    rows = triton.infer("shapes", inputs, outputs=[wanted]).as_numpy("probabilities")
    for row, values in zip(rows, expected("shapes"), strict=True):
        best = np.argsort(-values)[:2]
        assert [text.decode().split(":")[1:] for text in row] == [[str(i), LABELS[i]] for i in best]


def send(client: Client, name: str, document: object, raw: bytes = b"") -> Any:
    header = json.dumps(document).encode()
    headers = {HEADER: str(len(header))} if raw else {"content-type": "application/json"}
    return client.post(f"/v2/models/{name}/infer", content=header + raw, headers=headers)


def image(**changes: Any) -> dict[str, Any]:
    part = {"name": "image", "shape": [1, 4, 4, 1], "datatype": "UINT8", "data": [7] * 16}
    return {"inputs": [{**part, **changes}]}


AGE = {"name": "age", "shape": [1], "datatype": "FP64", "data": [41]}
JOB = {"name": "job", "shape": [1], "datatype": "BYTES", "data": ["cook"]}


@pytest.mark.parametrize(
    ("name", "document", "field"),
    [
        ("shapes", [], "body"),
        ("shapes", {}, "inputs"),
        ("shapes", {"inputs": []}, "inputs"),
        ("shapes", {**image(), "extra": 1}, "extra"),
        ("shapes", {**image(), "parameters": {"priority": 3}}, "parameters.priority"),
        ("shapes", image(shape=[2, 4, 4, 1]), "inputs[0].data"),
        ("shapes", image(shape=[-1, 4, 4, 1]), "inputs[0].shape[0]"),
        ("shapes", image(shape=[2**40, 4, 4, 1]), "inputs[0].shape[0]"),
        ("shapes", image(shape=[2**31, 2**31, 2**31]), "inputs[0].data"),
        ("shapes", image(shape=["1", 4, 4, 1]), "inputs[0].shape[0]"),
        ("shapes", image(shape=[16]), "inputs[0].shape"),
        ("shapes", image(shape=[0, 4, 4, 1], data=[]), "inputs[0].shape"),
        ("shapes", image(shape=[1] * 9), "inputs[0].shape"),
        ("shapes", image(datatype="BOOL"), "inputs[0].datatype"),
        ("shapes", image(datatype="BYTES", data=["a"] * 16), "inputs[0].datatype"),
        ("shapes", image(data=[256] * 16), "inputs[0].data"),
        ("shapes", image(data=[True] * 16), "inputs[0].data"),
        ("shapes", image(data=[0.5] * 16), "inputs[0].data"),
        ("shapes", image(data=None), "inputs[0].data"),
        ("shapes", image(datatype="FP32", data=[0.5] * 15 + [-1]), "inputs[0].data[0, 3, 3, 0]"),
        ("shapes", image(datatype="FP32", data=[1e39] * 16), "inputs[0].data"),
        ("shapes", image(name="pixels"), "inputs[0].name"),
        ("shapes", {"inputs": image()["inputs"] * 2}, "inputs[1].name"),
        ("shapes", {**image(), "outputs": [{"name": "logits"}]}, "outputs[0].name"),
        ("shapes", {**image(), "outputs": [{"name": "class"}] * 2}, "outputs[1].name"),
        ("shapes", image(parameters={"binary_data_size": 16}), "inputs[0].data"),
        (
            "shapes",
            image(data=None, parameters={"binary_data_size": 16}),
            "inputs[0].parameters.binary_data_size",
        ),
        (
            "shapes",
            image(data=None, parameters={"binary_data_size": -1}),
            "inputs[0].parameters.binary_data_size",
        ),
        ("people", {"inputs": [AGE, {**JOB, "shape": [2], "data": ["a", "b"]}]}, "inputs[1].shape"),
        ("people", {"inputs": [{**AGE, "data": [1e300]}]}, "inputs[0].data[0]"),
        ("people", {"inputs": [{**JOB, "data": [7]}]}, "inputs[0].data[0]"),
        ("people", {"inputs": [{**JOB, "datatype": "INT8", "data": [7]}]}, "inputs[0].datatype"),
        ("ratings", {"inputs": [{**JOB, "name": "user"}]}, "inputs"),
        ("mails", {"inputs": [{**JOB, "name": "text", "data": [" "]}]}, "inputs[0].data[0]"),
        (
            "sounds",
            {"inputs": [{**AGE, "name": "series", "shape": [1, 7, 2], "data": [0] * 14}]},
            "inputs[0].shape",
        ),
        (
            "sounds",
            {"inputs": [{**AGE, "name": "series", "shape": [1, 0, 2], "data": []}]},
            "inputs[0].shape",
        ),
    ],
)
def test_what_the_model_cannot_take_is_422_and_names_the_field(
    client: Client, name: str, document: object, field: str
) -> None:
    response = send(client, name, document)
    assert response.status_code == 422, response.text
    assert response.json()["field"] == field
    assert isinstance(response.json()["error"], str)


@pytest.mark.parametrize(
    ("declared", "raw", "field"),
    [
        (16, b"\0" * 15, "inputs[0].parameters.binary_data_size"),
        (16, b"\0" * 17, "body"),
        (15, b"\0" * 15, "inputs[0].parameters.binary_data_size"),
        (2**62, b"\0" * 16, "inputs[0].parameters.binary_data_size"),
    ],
)
def test_bytes_that_are_not_the_tensor(
    client: Client, declared: int, raw: bytes, field: str
) -> None:
    document = image(data=None, parameters={"binary_data_size": declared})
    response = send(client, "shapes", document, raw)
    assert (response.status_code, response.json()["field"]) == (422, field)


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack("<I", 5) + b"abc",
        struct.pack("<I", 2**32 - 1) + b"abc",
        struct.pack("<I", 1) + b"\xff",
        b"\0\0\0",
        struct.pack("<I", 1) + b"a" + struct.pack("<I", 1) + b"b",
    ],
)
def test_texts_that_are_cut_or_no_texts(client: Client, raw: bytes) -> None:
    part = {"name": "text", "shape": [1], "datatype": "BYTES"}
    document = {"inputs": [{**part, "parameters": {"binary_data_size": len(raw)}}]}
    assert send(client, "mails", document, raw).status_code == 422


@pytest.mark.parametrize("length", ["", "-1", "x", "1.0", "9" * 5000, "99999", "²"])
def test_a_header_that_is_no_length_is_400(client: Client, length: str) -> None:
    headers = {HEADER: length.encode()}
    response = client.post("/v2/models/shapes/infer", content=b"{}", headers=headers)
    assert (response.status_code, response.json()["field"]) == (400, HEADER)


def test_more_rows_than_may_come_at_once(client: Client) -> None:
    rows = MAX_INSTANCES + 1
    document = image(data=None, shape=[rows, 4, 4, 1], parameters={"binary_data_size": rows * 16})
    assert send(client, "shapes", document, bytes(rows * 16)).status_code == 422


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/shapes/versions/9", 404),
        ("GET", "/v2/models/shapes/versions/" + "9" * 5000, 404),
        ("GET", "/v2/models/shapes/versions/x/ready", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("GET", "/v2/models/shapes/infer", 405),
        ("GET", "/v2/other", 404),
    ],
)
def test_unknown_routes_and_models(client: Client, method: str, path: str, status: int) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert set(response.json()) == {"error", "type", "field", "request_id"}


def test_a_packed_body_is_415(client: Client) -> None:
    headers = {"content-encoding": "gzip"}
    response = client.post("/v2/models/shapes/infer", content=b"\x1f\x8b", headers=headers)
    assert response.status_code == 415


sizes = st.one_of(st.integers(-2, 5), st.integers(), st.floats(), st.text(max_size=2))
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3))
parts = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["image", "age", "job", "text", "series", "user", "x", 3]),
        "shape": st.one_of(
            st.sampled_from([[1, 4, 4, 1], [1], [2], [1, 3, 2]]), st.lists(sizes, max_size=5)
        ),
        "datatype": st.sampled_from(["UINT8", "FP32", "FP64", "INT64", "BYTES", "FP16", "BOOL", 1]),
        "parameters": st.one_of(
            st.fixed_dictionaries({"binary_data_size": st.integers(-1, 40)}), leaves
        ),
        "data": st.recursive(leaves, lambda inner: st.lists(inner, max_size=5), max_leaves=20),
        "extra": leaves,
    },
)
documents = st.one_of(
    st.fixed_dictionaries(
        {"inputs": st.lists(parts, max_size=3)},
        optional={
            "id": leaves,
            "outputs": st.lists(st.dictionaries(st.sampled_from(["name", "parameters"]), leaves)),
            "parameters": st.dictionaries(
                st.sampled_from(["binary_data_output", "timeout", "sequence_id", "tenant"]), leaves
            ),
        },
    ),
    leaves,
).map(lambda document: json.dumps(document).encode())
lengths = st.one_of(st.none(), st.integers(-1, 400).map(str), st.text("0123456789-+x ", max_size=6))


def check_any_request_is_answered(
    client: Client, name: str, document: bytes, raw: bytes, length: str | None
) -> None:
    whole = str(len(document)) if raw else None
    header = whole if length is None else length
    headers = {HEADER: header.encode()} if header is not None else {}
    response = client.post(f"/v2/models/{name}/infer", content=document + raw, headers=headers)
    assert response.status_code < 500, response.text
    if response.status_code != 200:
        assert isinstance(response.json()["error"], str)


requests = {
    "name": st.sampled_from(sorted(EVERY)),
    "document": documents,
    "raw": st.binary(max_size=40),
    "length": lengths,
}


@given(**requests)
@settings(max_examples=300, suppress_health_check=list(HealthCheck))
def test_no_request_makes_the_server_fail(
    client: Client, name: str, document: bytes, raw: bytes, length: str | None
) -> None:
    check_any_request_is_answered(client, name, document, raw, length)


@pytest.mark.faults
@given(**requests)
@settings(max_examples=10_000, suppress_health_check=list(HealthCheck))
def test_no_request_of_ten_thousand_makes_the_server_fail(
    client: Client, name: str, document: bytes, raw: bytes, length: str | None
) -> None:
    check_any_request_is_answered(client, name, document, raw, length)
