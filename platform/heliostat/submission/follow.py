"""A job watched until it ends: its lines as they come, and why it waits when none do."""

import asyncio
import time
from collections.abc import Callable

import aiohttp

from heliostat.errors import HeliostatError
from heliostat.submission.jobs import Jobs, JobState
from heliostat.submission.reason import explain, is_waiting

Say = Callable[[str], None]
LOOK_SECONDS = 1.0
SILENT_SECONDS = 10.0
LOST_SECONDS = 60.0
# The cluster lets a stopped job end for 30 s (RAY_JOB_STOP_WAIT_TIME_S), then kills it.
STOP_SECONDS = 45.0


class Watch:
    """One job: `show` gets what it prints, `say` what there is to say of it."""

    def __init__(self, jobs: Jobs, job: str, show: Say, say: Say) -> None:
        self._jobs, self._job, self._show, self._say = jobs, job, show, say
        self._heard = time.monotonic()
        self._shown = 0
        self._reason = ""

    def run(self) -> JobState:
        """Follow it to its end, from its first line on.

        Raises:
            HeliostatError: the cluster has been away for LOST_SECONDS.
            KeyboardInterrupt: Ctrl-C; the job goes on.
        """
        return asyncio.run(self._follow())

    async def _follow(self) -> JobState:
        reasons = asyncio.create_task(self._tell_reasons())
        try:
            lost_at: float | None = None
            while True:
                try:
                    await self._tail()
                    state = await asyncio.to_thread(self._jobs.require, self._job)
                except (HeliostatError, RuntimeError, aiohttp.ClientError) as error:
                    lost_at = lost_at or time.monotonic()
                    if time.monotonic() - lost_at > LOST_SECONDS:
                        raise HeliostatError(
                            f"the cluster has not answered for {LOST_SECONDS:.0f} s, and job "
                            f"{self._job} may still run: look with `heliostat jobs`"
                        ) from error
                else:
                    lost_at = None
                    if state.has_ended:
                        return state
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            reasons.cancel()

    async def _tail(self) -> None:
        """All lines of the job; those that were shown before the connection broke only once."""
        skip = self._shown
        async for text in self._jobs.client.tail_job_logs(self._job):
            self._heard = time.monotonic()
            new = text[skip:]
            skip = max(0, skip - len(text))
            if new:
                self._shown += len(new)
                self._show(new)

    async def _tell_reasons(self) -> None:
        """Whenever nothing was printed for a while: what it waits for, if that is new."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if time.monotonic() - self._heard < SILENT_SECONDS:
                continue
            self._heard = time.monotonic()
            try:
                state = await asyncio.to_thread(self._jobs.require, self._job)
                situation = await asyncio.to_thread(self._jobs.observe, state)
            except (HeliostatError, RuntimeError):
                continue
            reason = "; ".join(explain(situation)) if is_waiting(situation) else ""
            if reason and reason != self._reason:
                self._say(f"waiting: {reason}")
            self._reason = reason


def stop(jobs: Jobs, job: str, seconds: float = STOP_SECONDS) -> JobState:
    """Ask a job to end and wait until it has, or `seconds` have passed."""
    state = jobs.require(job)
    if state.has_ended:
        return state
    jobs.stop(job)
    deadline = time.monotonic() + seconds
    while not (state := jobs.require(job)).has_ended and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS / 2)
    return state
