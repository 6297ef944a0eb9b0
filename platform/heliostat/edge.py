"""The edge: what may reach the replicas from outside, as the configuration of one HAProxy."""

import json
import shlex
from dataclasses import dataclass

MIB = 2**20
LOOPBACK_HOST = "127.0.0.1"
METHODS = ("GET", "HEAD", "POST")
PATHS = ("/healthz", "/openapi.json", "/v2")
PREFIXES = ("/v1/", "/v2/")
# Percent signs hide slashes and dots; a colon is all that clients of ours encode.
PLAIN_PATH = "^(/([A-Za-z0-9._~:@-]|%3[Aa])+)+/?$"
PLAIN_HOST = r"^[A-Za-z0-9._:\[\]-]{1,255}$"
# What Ray Serve obeys, whoever sends it, and what tells where a request came from. Serve takes an
# underscore for a hyphen in some of these names, so no name with one passes.
CONTROL_HEADERS = (
    "x-request-",
    "x-session-id",
    "x-serve-",
    "serve-",
    "ray-",
    "x-forwarded-",
    "forwarded",
    "x-real-ip",
    "upgrade",
    "http2-settings",
)
# There clients read `error` as a text. Elsewhere it is an object, which these two make of it.
BELOW_V2 = "{ path /v2 } || { path_beg /v2/ }"
OPEN = "%[var(txn.flat,0),bool,iif(,'{\"message\": ')]"
CLOSE = "%[var(txn.flat,0),bool,iif(,})]"
# What HAProxy answers by itself, and what stands in place of an answer that is not ours.
ERRORS = {
    400: ("bad_request", "this is not a well-formed HTTP request"),
    401: ("unauthorized", "send an API key"),
    403: ("forbidden", "this is not allowed"),
    404: ("not_found", "there is no such route"),
    405: ("method_not_allowed", f"only {', '.join(METHODS)} are answered"),
    408: ("timeout", "the request did not arrive whole in time"),
    409: ("conflict", "the same request is being answered"),
    413: ("body_too_large", "the body is too large"),
    414: ("bad_request", "the URL is too long"),
    415: ("unsupported_media_type", "this content type is not read"),
    422: ("invalid_value", "the model cannot take this"),
    431: ("bad_request", "the headers are too long"),
    429: ("overloaded", "too many requests are waiting already, retry later"),
    500: ("internal_error", "the server failed"),
    501: ("not_implemented", "this part of HTTP is not spoken here"),
    502: ("unavailable", "the model server broke off, retry later"),
    503: ("unavailable", "no model server is there, retry later"),
    504: ("unavailable", "the model server did not answer in time"),
}
HEADERS = {
    405: {"allow": ", ".join(METHODS)},
    429: {"retry-after": "1"},
    503: {"retry-after": "1"},
}
KEPT_BUFFERS = 64
# A body that is large, or may become so.
UPLOAD = "long || chunked || METH_POST !sized"
# The codes for which HAProxy lets `http-error` replace its own page.
OWN_ERRORS = (400, 401, 403, 404, 405, 408, 413, 422, 429, 500, 501, 502, 503, 504)


@dataclass(frozen=True)
class Limits:
    """What one client may take: bytes, characters, seconds and how many at once.

    A body is held here until it is whole; those above `small_body_bytes`, or of unknown length,
    are uploads, of which only `max_uploads` are held at once, as each may take memory up to
    `max_body_bytes`.
    """

    max_body_bytes: int = 16 * MIB
    small_body_bytes: int = MIB // 4
    max_header_bytes: int = 8192
    max_url_chars: int = 2048
    header_timeout_s: int = 10
    body_timeout_s: int = 30
    client_timeout_s: int = 30
    upstream_timeout_s: int = 3600
    drain_s: int = 30
    max_uploads: int = 64
    max_requests: int = 1024
    max_connections: int = 2048
    max_connections_per_source: int = 1024


@dataclass(frozen=True)
class Edge:
    """Where the edge listens, by which certificate, and the port on loopback that it asks.

    `certificate` is a PEM file with the chain and the key; the key may also stand in a file of the
    same name that ends in `.key`. What listens on `spare_port` is asked while the other is away.
    """

    port: int
    upstream_port: int
    host: str = LOOPBACK_HOST
    certificate: str | None = None
    limits: Limits = Limits()
    spare_port: int | None = None

    @property
    def url(self) -> str:
        """How a program on this machine calls it."""
        host = LOOPBACK_HOST if self.host in ("0.0.0.0", "::") else self.host
        shown = f"[{host}]" if ":" in host else host
        return f"{'https' if self.certificate else 'http'}://{shown}:{self.port}"


@dataclass(frozen=True)
class Refusal:
    """A request that fits `condition`, in HAProxy's words, is answered here."""

    condition: str
    status: int
    message: str = ""


def render(edge: Edge) -> str:
    """The configuration of HAProxy 2.8 for `edge`."""
    limits = edge.limits
    return "\n".join(
        [
            *_section("global", _list_globals(limits)),
            *_section("defaults", _list_defaults(limits)),
            *_section("frontend edge", _list_frontend(edge)),
            *_section("backend models", _list_models(edge)),
            *_section("backend uploads", _list_uploads(edge)),
        ]
    )


def list_refusals(limits: Limits) -> list[Refusal]:
    """What is decided by the head of a request alone, in this order."""
    return [
        Refusal("!HTTP_1.0 { req.fhdr_cnt(host) eq 0 }", 400, "the Host header is missing"),
        Refusal("{ req.fhdr_cnt(host) gt 1 }", 400, "there are several Host headers"),
        Refusal(
            f"{{ req.fhdr_cnt(host) eq 1 }} !{{ req.fhdr(host) -m reg '{PLAIN_HOST}' }}",
            400,
            "the Host header names no host",
        ),
        Refusal(f"!{{ method {' '.join(METHODS)} }}", 405),
        Refusal("{ req.hdr(upgrade) -m sub -i websocket }", 400, "WebSockets are not spoken here"),
        Refusal(
            f"{{ url_len gt {limits.max_url_chars} }}",
            414,
            f"the URL has more than {limits.max_url_chars:,} characters",
        ),
        Refusal(f"!{{ path -m reg '{PLAIN_PATH}' }}", 404),
        Refusal("{ path_sub /. }", 404),
        Refusal(f"!{{ path {' '.join(PATHS)} }} !{{ path_beg {' '.join(PREFIXES)} }}", 404),
        Refusal(
            f"{{ req.hdrs,length gt {limits.max_header_bytes} }}",
            431,
            f"the headers have more than {limits.max_header_bytes:,} bytes",
        ),
        _too_large(limits),
    ]


def _list_globals(limits: Limits) -> list[str]:
    # A body is whole before a replica hears of it, so it must fit into one buffer; the memory is
    # taken as bytes arrive. Freed buffers are kept, or each request would map its own anew.
    buffer_bytes = limits.max_body_bytes + limits.max_header_bytes + 65_536
    return [
        f"maxconn {limits.max_connections}",
        "nbthread 2",
        f"hard-stop-after {limits.drain_s}s",
        f"tune.bufsize {buffer_bytes}",
        f"tune.memory.hot-size {KEPT_BUFFERS * buffer_bytes}",
        "tune.http.maxhdr 64",
        # Else that of a buffer, and clients hang up on what is above 2^24 - 1 (RFC 9113, 6.5.2).
        "tune.h2.max-frame-size 16384",
        "ssl-default-bind-options ssl-min-ver TLSv1.2",
    ]


def _list_defaults(limits: Limits) -> list[str]:
    return [
        "mode http",
        f"timeout http-request {limits.header_timeout_s}s",
        f"timeout client {limits.client_timeout_s}s",
        f"timeout http-keep-alive {limits.client_timeout_s}s",
        f"timeout server {limits.upstream_timeout_s}s",
        "timeout connect 1s",
        "timeout queue 1s",
        "timeout check 1s",
        "option abortonclose",
        "option http-no-delay",
        # Where an idle connection breaks as it is used, HAProxy hangs up without an answer: a
        # client's first request is not given one that may.
        "http-reuse safe",
        # Each retry waits a second, so the few in which Serve starts its proxy anew cost patience.
        # What was sent is not sent again: for that HAProxy would copy a whole buffer per request.
        "retries 8",
        "retry-on conn-failure",
        *(f"http-error {_answer(status)}" for status in OWN_ERRORS),
    ]


def _list_frontend(edge: Edge) -> list[str]:
    limits = edge.limits
    return [
        f"bind {_render_bind(edge)}",
        "option disable-h2-upgrade",
        "unique-id-format %[uuid,regsub(-,,g)]",
        "stick-table type ipv6 size 100k expire 30s store conn_cur",
        "tcp-request connection track-sc0 src",
        "tcp-request connection reject if "
        f"{{ sc0_conn_cur gt {limits.max_connections_per_source} }}",
        f"http-request set-var(txn.flat) bool(true) if {BELOW_V2}",
        *map(_refuse, list_refusals(limits)),
        "http-request set-header host heliostat",
        "http-request del-header _ -m sub",
        *(f"http-request del-header {name} -m beg" for name in CONTROL_HEADERS),
        "http-request set-header x-forwarded-for %[src]",
        "http-request set-header x-request-id %[unique-id]",
        "acl sized req.hdr(content-length) -m found",
        f"acl long req.hdr_val(content-length) gt {limits.small_body_bytes}",
        "acl chunked req.hdr(transfer-encoding) -m found",
        f"http-request wait-for-body time {limits.body_timeout_s}s unless {UPLOAD}",
        f"use_backend uploads if {UPLOAD}",
        "default_backend models",
        *_list_foreign_errors(),
        "http-response del-header server",
        "http-response set-header x-request-id %[unique-id]",
    ]


def _list_foreign_errors() -> list[str]:
    """Errors of Serve's proxy are texts: 404 where nothing is deployed, 500 without replicas."""
    replaced = {status: 503 if status in (404, 500) else status for status in ERRORS}
    return [
        "acl json res.hdr(content-type) -m beg application/json",
        *(
            f"http-response return {_answer(ours)} if {{ status {theirs} }} !json"
            for theirs, ours in replaced.items()
        ),
        f"http-response return {_answer(502)} if {{ status ge 400 }} !json",
    ]


def _list_models(edge: Edge) -> list[str]:
    limit = edge.limits.max_requests
    return [
        _refuse(Refusal(f"{{ be_conn(models) gt {limit} }}", 429)),
        *_list_servers(edge),
    ]


def _list_servers(edge: Edge) -> list[str]:
    """Where there is nobody else to ask, patience; else the other one is asked in a second.

    A proxy that has just started knows no replicas, and says so where Serve asks it.
    """
    last = "check inter 1s fall 8 rise 1"
    if edge.spare_port is None:
        return [f"server serve {LOOPBACK_HOST}:{edge.upstream_port} {last}"]
    first = "check inter 1s fastinter 100ms fall 3 rise 1 observe layer4 error-limit 3"
    return [
        "option redispatch 1",
        "option httpchk GET /-/healthz",
        "http-check expect status 200",
        f"server serve {LOOPBACK_HOST}:{edge.upstream_port} {first} on-error mark-down",
        f"server spare {LOOPBACK_HOST}:{edge.spare_port} backup {last}",
    ]


def _list_uploads(edge: Edge) -> list[str]:
    limits = edge.limits
    return [
        _refuse(Refusal(f"{{ be_conn(uploads) gt {limits.max_uploads} }}", 429)),
        f"http-request wait-for-body time {limits.body_timeout_s}s",
        _refuse(_too_large(limits)),
        *_list_tracking_servers(edge),
    ]


def _list_tracking_servers(edge: Edge) -> list[str]:
    serve = f"server serve {LOOPBACK_HOST}:{edge.upstream_port} track models/serve"
    if edge.spare_port is None:
        return [serve]
    spare = f"server spare {LOOPBACK_HOST}:{edge.spare_port} backup track models/spare"
    return ["option redispatch 1", serve, spare]


def _too_large(limits: Limits) -> Refusal:
    """HAProxy reads a length into 32 bits; of HTTP/2 it knows the length by the header alone."""
    return Refusal(
        "{ req.hdr(content-length),length gt 9 } || "
        f"{{ req.hdr_val(content-length) gt {limits.max_body_bytes} }} || "
        f"{{ req.body_size gt {limits.max_body_bytes} }}",
        413,
        f"the body has more than {limits.max_body_bytes:,} bytes",
    )


def _refuse(refusal: Refusal) -> str:
    return f"http-request return {_answer(refusal.status, refusal.message)} if {refusal.condition}"


def _answer(status: int, message: str = "") -> str:
    """An error in the one shape of all errors, or in that of /v2, as arguments of HAProxy."""
    kind, usual = ERRORS[status]
    sentence = json.dumps(message or usual)
    rest = json.dumps({"type": kind, "field": None, "request_id": "%[unique-id]"})
    body = shlex.quote(f'{{"error": {OPEN}{sentence}, {rest[1:-1]}}}{CLOSE}')
    headers = {"x-request-id": "%[unique-id]", **HEADERS.get(status, {})}
    options = "".join(f" hdr {name} {shlex.quote(value)}" for name, value in headers.items())
    return f"status {status} content-type application/json lf-string {body}{options}"


def _render_bind(edge: Edge) -> str:
    host = f"[{edge.host}]" if ":" in edge.host else edge.host
    tls = f" ssl crt {shlex.quote(edge.certificate)} alpn h2,http/1.1" if edge.certificate else ""
    return f"{host}:{edge.port}{tls}"


def _section(title: str, lines: list[str]) -> list[str]:
    return [title, *(f"    {line}" for line in lines), ""]
