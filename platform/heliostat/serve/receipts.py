"""Answers kept under idempotency keys, as pure bookkeeping: who asks again gets what was answered.

A request is claimed by whoever answers it, so that nobody else does meanwhile; a claim that is not
renewed ends, for its holder is gone. What is kept is bounded in time and in bytes.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

KEPT_SECONDS = 3600.0
CLAIM_SECONDS = 15.0
MAX_ANSWER_BYTES = 2**20
MAX_BYTES = 64 * 2**20
ENTRY_BYTES = 1024  # what an entry takes beside its answer, at most


@dataclass(frozen=True)
class Question:
    """What was asked: the id of an API key, the name it gave, and a hash of all that counts."""

    owner: str
    name: str
    digest: bytes


@dataclass(frozen=True)
class Receipt:
    """The answer of `model`:`version`, as it was sent."""

    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    model: str
    version: int

    @property
    def size(self) -> int:
        headers = sum(len(name) + len(value) for name, value in self.headers)
        return headers + len(self.body)


# It is the asker's to answer; somebody answers it now; the name stands for another question.
Standing = Receipt | Literal["yours", "busy", "other"]


@dataclass
class Entry:
    digest: bytes
    claimant: str
    until: float
    receipt: Receipt | None = None

    @property
    def size(self) -> int:
        return ENTRY_BYTES + (self.receipt.size if self.receipt else 0)


@dataclass
class Receipts:
    """`clock` is monotonic, in seconds. Where bytes run short, who has most of them loses first."""

    clock: Callable[[], float]
    max_bytes: int = MAX_BYTES
    size: int = 0
    _owners: dict[str, OrderedDict[str, Entry]] = field(default_factory=dict)
    _sizes: dict[str, int] = field(default_factory=dict)

    def claim(self, question: Question, claimant: str) -> Standing:
        """How it stands; `yours` until CLAIM_SECONDS later, and again by a claim of the same."""
        entry = self._find(question)
        if entry is None:
            self._put(question, Entry(question.digest, claimant, self.clock() + CLAIM_SECONDS))
            return "yours"
        if entry.digest != question.digest:
            return "other"
        if entry.receipt:
            return entry.receipt
        if entry.claimant != claimant:
            return "busy"
        entry.until = self.clock() + CLAIM_SECONDS
        return "yours"

    def settle(self, question: Question, claimant: str, receipt: Receipt | None) -> None:
        """Keep the answer, or give the claim up; nothing if it is no longer the claimant's."""
        entry = self._find(question)
        if entry is None or entry.receipt or entry.claimant != claimant:
            return
        self._drop(question.owner, question.name)
        if receipt and receipt.size <= MAX_ANSWER_BYTES:
            until = self.clock() + KEPT_SECONDS
            self._put(question, Entry(question.digest, claimant, until, receipt))

    def _find(self, question: Question) -> Entry | None:
        """The entry of this name, once those that are over at the old end are gone."""
        names = self._owners.get(question.owner, OrderedDict())
        while names and names[first := next(iter(names))].until <= self.clock():
            self._drop(question.owner, first)
        entry = names.get(question.name)
        if entry and entry.until <= self.clock():
            self._drop(question.owner, question.name)
            return None
        return entry

    def _put(self, question: Question, entry: Entry) -> None:
        owner = question.owner
        self._owners.setdefault(owner, OrderedDict())[question.name] = entry
        self._count(owner, entry.size)
        while self.size > self.max_bytes:
            richest = max(self._sizes, key=self._sizes.__getitem__)
            self._drop(richest, next(iter(self._owners[richest])))

    def _drop(self, owner: str, name: str) -> None:
        entry = self._owners[owner].pop(name)
        self._count(owner, -entry.size)
        if not self._owners[owner]:
            del self._owners[owner], self._sizes[owner]

    def _count(self, owner: str, size: int) -> None:
        self._sizes[owner] = self._sizes.get(owner, 0) + size
        self.size += size
