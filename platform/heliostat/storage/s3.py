"""Objects in a bucket: requests that outlast faults, and what a refusal means to the user."""

import contextlib
import dataclasses
import functools
import io
import logging
import os
import random
import secrets
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from botocore import exceptions as aws

from heliostat.errors import HeliostatError
from heliostat.storage.entry import Conflict, Entry, Missing, check_key

CHUNK_BYTES = 1024 * 1024
PART_BYTES = 16 * CHUNK_BYTES
MAX_PARTS = 10_000
PARALLEL_PARTS = 4
WRITER = "heliostat-writer"
CHATTY = ("botocore.credentials", "botocore.configprovider")  # at INFO, in the log of every job
CHANCE = random.SystemRandom()  # not the shared generator, which a training run seeds

ABSENT = {"NoSuchKey", "NotFound", "404", "NoSuchUpload"}
LOST = {"PreconditionFailed", "412"}
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
BODYLESS = {"400", "403"}  # the codes of a HEAD, whose refusal has no body to give a reason
PASSING_STATUS = {429, 500, 502, 503, 504}
PASSING = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
}
CUT = (aws.ConnectionError, aws.HTTPClientError, aws.IncompleteReadError)
PROOF = {  # what an answer must hold: a body that was cut to nothing parses as an empty answer
    "list_objects_v2": "IsTruncated",
    "create_multipart_upload": "UploadId",
    "complete_multipart_upload": "ETag",
}

LOG_IN = "the credentials have expired or cannot be fetched: log in again (`aws sso login`)"
NO_KEYS = (
    "no credentials were found: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "or give the machine a role"
)
PROFILE = "the AWS configuration cannot be used: correct AWS_PROFILE or the files in ~/.aws"
REGION = "the bucket lives in another region: set AWS_REGION to the region of the bucket"
UNREACHED = (
    "{endpoint} gave no whole answer: check that the server runs and can be reached, and that "
    "AWS_ENDPOINT_URL is right"
)
ADVICE = {  # by error code of the server or by exception of botocore: what is wrong, what to change
    **dict.fromkeys([*EXPIRED, "InvalidToken"], LOG_IN),
    **dict.fromkeys(["CredentialRetrievalError", "TokenRetrievalError", "SSOError"], LOG_IN),
    **dict.fromkeys(["NoCredentialsError", "PartialCredentialsError"], NO_KEYS),
    **dict.fromkeys(["ProfileNotFound", "ConfigParseError", "InvalidConfigError"], PROFILE),
    **dict.fromkeys(["PermanentRedirect", "301", "AuthorizationHeaderMalformed"], REGION),
    **dict.fromkeys((kind.__name__ for kind in CUT), UNREACHED),
    **dict.fromkeys(
        BODYLESS,
        "refused without a reason: check that the credentials are right, not expired and may "
        "read this bucket, and that AWS_REGION is the region of the bucket",
    ),
    "AccessDenied": "these credentials may not do this: they need s3:ListBucket, s3:GetObject, "
    "s3:PutObject, s3:DeleteObject and s3:AbortMultipartUpload on this bucket",
    "FlexibleChecksumError": "the bytes differ from the checksum that {endpoint} keeps: read "
    "again, and if it stays so write the object again",
    "InvalidAccessKeyId": "{endpoint} does not know this access key: check AWS_ACCESS_KEY_ID or "
    "AWS_PROFILE, and that AWS_ENDPOINT_URL is the server that issued it",
    "InvalidRange": "the object ends before these bytes: it is not the one that was expected",
    "KeyTooLongError": "the key has more than 1,024 bytes: shorten it",
    "NoSuchBucket": "the bucket does not exist: correct its name, or create it with "
    "`aws s3 mb s3://BUCKET`",
    "NotImplemented": "{endpoint} lacks this part of S3: use a server with conditional writes "
    "and multipart uploads, such as AWS S3",
    "RequestTimeTooSkewed": "the clock of this machine is off by more than 15 minutes: set it "
    "(`timedatectl set-ntp true`)",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key: check "
    "AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
}


@dataclass(frozen=True)
class Retry:
    """How often a request is sent and how long it waits; the defaults outlast a 30 s outage."""

    attempts: int = 13
    base_seconds: float = 0.1
    cap_seconds: float = 10.0
    connect_timeout_seconds: float = 5.0
    read_timeout_seconds: float = 20.0

    def pauses(self) -> Iterator[float]:
        """Seconds to wait before each repetition: doubled, capped, the upper half is chance."""
        for repetition in range(self.attempts - 1):
            longest = min(self.cap_seconds, self.base_seconds * 2**repetition)
            yield longest * CHANCE.uniform(0.5, 1)


QUICK = Retry(attempts=2, base_seconds=0.2, connect_timeout_seconds=2, read_timeout_seconds=3)


def _explain(error: Exception, doing: str, retry: Retry) -> Exception:
    """What an error of botocore means to the user; the error itself where they cannot act."""
    names = [_code(error)] if _code(error) else [kind.__name__ for kind in type(error).__mro__]
    if names[0] in LOST:
        return Conflict(doing)
    if names[0] in ABSENT:
        return Missing(f"cannot {doing}: there is no such object")
    later = "{endpoint} kept answering so: try again later" if _is_passing(error) else ""
    advice = next((ADVICE[name] for name in names if name in ADVICE), later)
    if not advice:
        return error
    return HeliostatError(f"cannot {doing}: {names[0]}: {advice.format(endpoint=_endpoint(retry))}")


def _code(error: Exception) -> str:
    return str(error.response["Error"]["Code"]) if isinstance(error, aws.ClientError) else ""


def _is_passing(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    if not isinstance(error, aws.ClientError):
        return isinstance(error, CUT)
    status = error.response["ResponseMetadata"]["HTTPStatusCode"]
    return status in PASSING_STATUS or _code(error) in PASSING


def _wait(pauses: Iterator[float]) -> bool:
    pause = next(pauses, None)
    time.sleep(pause or 0)
    return pause is not None


_building = threading.Lock()


def _client(retry: Retry) -> Any:
    """This process's client for the AWS settings of the moment; threads may share it."""
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    with _building:
        return _build_client(os.getpid(), settings, retry)


@functools.lru_cache(maxsize=8)
def _build_client(pid: int, settings: tuple[tuple[str, str], ...], retry: Retry) -> Any:
    import boto3
    from botocore.config import Config

    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    session = boto3.session.Session()
    config = Config(
        connect_timeout=retry.connect_timeout_seconds,
        read_timeout=retry.read_timeout_seconds,
        retries={"mode": "standard", "total_max_attempts": 1},
        max_pool_connections=64,
        tcp_keepalive=True,
    )
    region = dict(settings).get("AWS_REGION") or session.region_name or "us-east-1"
    try:
        return session.client("s3", region_name=region, config=config)
    except ValueError:  # botocore quotes the whole endpoint, with a password if it has one
        raise HeliostatError(
            "AWS_ENDPOINT_URL is no URL, or AWS_REGION no region: write them like http://host:8333 "
            "and us-east-1"
        ) from None


def _endpoint(retry: Retry) -> str:
    try:
        url = urlsplit(_client(retry).meta.endpoint_url)
    except aws.BotoCoreError:
        return "S3"
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]}"


def _etag(answer: dict[str, Any]) -> str:
    return str(answer["ETag"]).strip('"')


@dataclass(frozen=True)
class S3Store:
    """A bucket, or what lies below a prefix in it, with the credentials of the environment.

    The server checks a CRC-32 of all that is written. What is read is checked against it where the
    server keeps it, but for a range and for a read that was resumed after a cut.
    """

    uri: str
    retry: Retry = Retry()

    def read(self, key: str) -> bytes:
        return b"".join(self._chunks(key))

    def read_range(self, key: str, offset: int, length: int) -> bytearray:
        data, end = bytearray(length), 0
        for chunk in self._chunks(key, offset, offset + length) if length else ():
            data[end : end + len(chunk)] = chunk
            end += len(chunk)
        return data

    def open(self, key: str) -> BinaryIO:
        stream = io.BufferedReader(_Stream(self._chunks(key)), CHUNK_BYTES)
        stream.peek(1)  # that the object is missing is said here, not at the first read
        return stream

    def write(self, key: str, data: bytes) -> str:
        return _etag(self._send("put_object", check_key(key), Body=data))

    def create(self, key: str, data: bytes) -> str:
        return self._write_if(key, data, IfNoneMatch="*")

    def replace(self, key: str, data: bytes, etag: str) -> str:
        return self._write_if(key, data, IfMatch=f'"{etag}"')

    def upload(self, key: str, path: Path) -> str:
        size = path.stat().st_size
        if size <= PART_BYTES:
            return self.write(key, path.read_bytes())
        writer = secrets.token_hex(16)
        upload = self._send(
            "create_multipart_upload",
            check_key(key),
            Metadata={WRITER: writer},
            ChecksumAlgorithm="CRC32",
            ChecksumType="FULL_OBJECT",
        )["UploadId"]
        try:
            parts = {"Parts": self._upload_parts(key, path, size, upload)}
            complete = {"UploadId": upload, "MultipartUpload": parts}
            return self._send_once("complete_multipart_upload", key, writer, **complete)
        except BaseException:
            with contextlib.suppress(HeliostatError):
                quick = dataclasses.replace(self, retry=QUICK)
                quick._send("abort_multipart_upload", key, UploadId=upload)
            raise

    def stat(self, key: str) -> Entry | None:
        answer = self._head(key)
        return Entry(key, answer["ContentLength"], _etag(answer)) if answer else None

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Sorted here, because not every server sorts by key: holds all entries below `prefix`."""
        return iter(sorted(self._pages(prefix), key=lambda entry: entry.key))

    def delete(self, key: str) -> None:
        self._send("delete_object", key)

    @property
    def _place(self) -> tuple[str, str]:
        bucket, _, prefix = self.uri.removeprefix("s3://").partition("/")
        return bucket, f"{prefix}/" if prefix else ""

    def _send(self, operation: str, key: str, **arguments: Any) -> dict[str, Any]:
        """Send a request until it is answered; expired credentials are looked up anew once.

        Raises:
            Conflict: a condition does not hold.
            Missing: there is no such object.
            HeliostatError: the server refuses, or cannot be reached with all attempts.
        """
        bucket, base = self._place
        doing = f"{operation.partition('_')[0]} {self.uri}/{key}"
        named = {} if operation == "list_objects_v2" else {"Key": base + key}
        pauses, renewed = self.retry.pauses(), False
        while True:
            try:
                send = getattr(_client(self.retry), operation)
                answer: dict[str, Any] = send(Bucket=bucket, **named, **arguments)
                if PROOF.get(operation, "ResponseMetadata") in answer:
                    return answer
                raise aws.IncompleteReadError(actual_bytes=0, expected_bytes="some")
            except (aws.BotoCoreError, aws.ClientError) as error:
                if _code(error) in EXPIRED | BODYLESS and not renewed:
                    renewed = True
                    _build_client.cache_clear()
                elif not _is_passing(error) or not _wait(pauses):
                    raise _explain(error, doing, self.retry) from error

    def _send_once(self, operation: str, key: str, writer: str, **arguments: Any) -> str:
        """Send what can take effect but once: `writer` marks our own, should its answer be lost."""
        try:
            return _etag(self._send(operation, key, **arguments))
        except (Conflict, Missing):
            answer = self._head(key)
            if answer and answer["Metadata"].get(WRITER) == writer:
                return _etag(answer)
            raise

    def _write_if(self, key: str, data: bytes, **condition: str) -> str:
        writer = secrets.token_hex(16)
        body = {"Body": data, "Metadata": {WRITER: writer}}
        try:
            return self._send_once("put_object", check_key(key), writer, **body, **condition)
        except Missing as error:  # what was to be replaced is gone
            raise Conflict(f"{self.uri}/{key}") from error

    def _upload_parts(self, key: str, path: Path, size: int, upload: str) -> Any:
        part_bytes = max(PART_BYTES, -(-size // MAX_PARTS))

        def send(index: int) -> dict[str, Any]:
            with path.open("rb") as file:
                file.seek(index * part_bytes)
                data = file.read(part_bytes)
            if len(data) != min(part_bytes, size - index * part_bytes):
                raise HeliostatError(f"{path} changed while it was uploaded: upload it again")
            part = {"PartNumber": index + 1, "UploadId": upload, "Body": data}
            answer = self._send("upload_part", key, ChecksumAlgorithm="CRC32", **part)
            kept = {"ETag", "ChecksumCRC32"}
            return {"PartNumber": index + 1} | {name: answer[name] for name in kept & answer.keys()}

        with ThreadPoolExecutor(PARALLEL_PARTS) as pool:
            return [*pool.map(send, range(-(-size // part_bytes)))]

    def _head(self, key: str) -> dict[str, Any] | None:
        try:
            return self._send("head_object", key)
        except Missing:
            return None

    def _get(self, key: str, start: int, stop: int | None, **condition: str) -> dict[str, Any]:
        if stop is None:
            return self._send("get_object", key)
        answer = self._send("get_object", key, Range=f"bytes={start}-{stop - 1}", **condition)
        if answer["ContentLength"] != stop - start:
            raise HeliostatError(f"cannot get {self.uri}/{key}: it ends before byte {stop}")
        return answer

    def _chunks(self, key: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` to `stop`, resumed after a cut while the object is the same."""
        answer = first = self._get(key, start, stop)
        stop, pauses = start + first["ContentLength"], self.retry.pauses()
        while True:
            try:
                with contextlib.closing(answer["Body"]) as body:
                    while chunk := body.read(CHUNK_BYTES):
                        start, pauses = start + len(chunk), self.retry.pauses()
                        yield chunk
                return
            except (*CUT, aws.FlexibleChecksumError) as error:
                if not isinstance(error, CUT) or not _wait(pauses):
                    raise _explain(error, f"get {self.uri}/{key}", self.retry) from error
            try:
                answer = self._get(key, start, stop, IfMatch=first["ETag"])
            except Conflict as error:
                raise HeliostatError(
                    f"{self.uri}/{key} was overwritten while it was read: read it again"
                ) from error

    def _pages(self, prefix: str) -> Iterator[Entry]:
        _, base = self._place
        place, more = {"Prefix": base + prefix}, dict[str, str]()
        while True:
            page = self._send("list_objects_v2", "", **place, **more)
            for found in page.get("Contents", ()):
                yield Entry(found["Key"].removeprefix(base), found["Size"], _etag(found))
            if not page["IsTruncated"]:
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}


class _Stream(io.RawIOBase):
    """Chunks of bytes as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count
