"""The thread that owns the model: requests come and go between two steps of the decode loop.

    event loop ──jobs──▶ between steps: admit, cancel, put an adapter on ──▶ step ──one wake-up a step──▶ event loop

The queue of jobs wakes the thread when nothing is running; while something is, it looks once a step. Answers go back
the same way: whatever a step gave to whichever requests is handed over in one call. Whatever goes wrong in a step ends
the requests that it concerns and no others. `Answers` turns what the decode loop made into what a client is told.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch

from mmrl_ray.errors import ProcessError, ServingError
from mmrl_ray.experience.carriers import Completion, EncodedPrompt, FinishReason, SamplingParams
from mmrl_ray.policy.generation.base import Event, Failure, GroupOutput
from mmrl_ray.policy.generation.queue import GroupBook
from mmrl_ray.policy.tokens import TokenBytes
from mmrl_ray.serving.protocols import Choice, Delta, ServedFinishReason, TokenInfo

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Ticket:
    """One request on its way: filled by the event loop, answered by the thread."""

    prompt: EncodedPrompt
    n: int
    sampling: SamplingParams
    adapter: str | None
    streams: bool
    loop: asyncio.AbstractEventLoop
    caller: str | None
    on_start: Callable[[], object]
    """Called by the thread when the first token is there."""
    news: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when one of the next three changed; they belong to the event loop."""
    events: list[Event] = field(default_factory=list)
    output: GroupOutput | None = None
    error: Exception | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.output is not None or self.error is not None

    def read(self) -> list[Event]:
        """What has come since the last call."""
        events, self.events = self.events, []
        if not self.ended:
            self.news.clear()
        return events


@dataclass(slots=True, eq=False)
class _Running:
    """What the thread knows of a ticket."""

    ticket: Ticket
    unfinished: int
    started: bool = False


@dataclass(slots=True, eq=False)
class _News:
    """What one step brought a ticket."""

    ticket: Ticket
    events: list[Event] = field(default_factory=list)
    output: GroupOutput | None = None
    error: Exception | None = None


class DecodeThread:
    """Runs a decoder in a thread of its own.

    It alone has `threads` of PyTorch's; all others of its process have one. OpenMP gives each thread that computes with
    several a team of its own, and once there are more in all than cores, those that wait for their part of the next
    product go to sleep instead of looking out for it: a caption took 380 ms on two cores where it takes 317.
    """

    def __init__(self, make_decoder: Callable[[], GroupBook], threads: int = 1) -> None:
        """`make_decoder` is called again when a decoder is beyond repair."""
        self._threads = threads
        self.decoder = make_decoder()
        self.tokens = 0
        """Sampled since the start."""
        self.failed = 0
        """Requests that an error in the model ended."""
        self.healthy = True
        """False once the accelerator reported an error that only a new process gets rid of, the process that has the
        model is gone, or the thread ended."""
        self._make_decoder = make_decoder
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._running: dict[int, _Running] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the step that it is in; requests that are left get an error."""
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def call(self, job: Callable[[], T]) -> Future[T]:
        """Runs `job` between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(job())
            except Exception as error:  # noqa: BLE001 - the caller's affair, not the thread's
                future.set_exception(error)

        if not self._post(run):
            future.set_exception(_closed())
        return future

    def submit(self, ticket: Ticket) -> None:
        """Lets `ticket` start at the next step that has rows for it; a ServingError where the thread has ended."""
        if not self._post(lambda: self._admit(ticket)):
            raise _closed()

    def cancel(self, ticket: Ticket) -> None:
        """Frees the rows of a ticket that was submitted, before the next step."""
        self._post(lambda: self._cancel(ticket))

    def _post(self, job: Callable[[], None]) -> bool:
        with self._lock:
            if not self._closed:
                self._jobs.put(job)
            return not self._closed

    # -- in the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        while True:
            try:
                if not self._do_jobs():
                    break
                if not self.decoder.idle:
                    self._step()
            except Exception as error:
                logger.exception("the decode loop failed; it starts anew")
                self._abandon(error)
        self.healthy = False
        with self._lock:
            self._closed = True
        while not self._jobs.empty():  # nothing comes after them: who waits for one gets an answer
            job = self._jobs.get()
            if job is not None:
                job()
        self._abandon(_closed())

    def _do_jobs(self) -> bool:
        """Everything that was asked for since the last step, or the next thing where there is nothing to step."""
        try:
            job = self._jobs.get(block=self.decoder.idle)
            while job is not None:
                job()
                job = self._jobs.get(block=self.decoder.idle)
        except Empty:
            return True
        return False

    def _admit(self, ticket: Ticket) -> None:
        try:
            handle = self.decoder.admit(
                ticket.prompt,
                ticket.n,
                ticket.sampling,
                stream=ticket.streams,
                adapter=ticket.adapter,
                caller=ticket.caller,
            )
        except Exception as error:  # noqa: BLE001 - goes to whoever asked
            self._publish([_News(ticket, error=error)])
            return
        self._running[handle] = _Running(ticket, ticket.n)

    def _cancel(self, ticket: Ticket) -> None:
        handle = next((h for h, running in self._running.items() if running.ticket is ticket), None)
        if handle is not None:
            del self._running[handle]
            self.decoder.cancel(handle)

    def _step(self) -> None:
        failures: list[Failure] = []
        events = self.decoder.step(failures)
        self.tokens += len(events)
        news: dict[int, _News] = {}
        for event in events:
            running = self._running.get(event.handle)
            if running is not None:
                self._note(running, event, news)
        for handle, error in failures:
            news.pop(handle, None)
            failed = self._running.pop(handle, None)
            if failed is not None:
                news[handle] = self._failure(failed.ticket, error)
        if news:
            self._publish(list(news.values()))

    def _note(self, running: _Running, event: Event, news: dict[int, _News]) -> None:
        ticket = running.ticket
        if not running.started:
            running.started = True
            ticket.on_start()
        if ticket.streams:
            news.setdefault(event.handle, _News(ticket)).events.append(event)
        if event.finish_reason is not None:
            running.unfinished -= 1
            if running.unfinished == 0:
                del self._running[event.handle]
                news.setdefault(event.handle, _News(ticket)).output = self.decoder.take(event.handle)

    def _failure(self, ticket: Ticket, error: Exception) -> _News:
        self.failed += 1
        # After these the process's accelerator answers nothing but errors, or there is no process any more.
        if isinstance(error, ProcessError) or type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error):
            self.healthy = False
        logger.warning("a request failed in the model: %s: %s", type(error).__name__, error)
        return _News(ticket, error=error)

    def _abandon(self, error: Exception) -> None:
        """Ends everything that runs with `error`, and begins with a new decoder."""
        tickets = [running.ticket for running in self._running.values()]
        self._running = {}
        self._publish([self._failure(ticket, error) for ticket in tickets])
        self.decoder = self._make_decoder()

    def _publish(self, news: list[_News]) -> None:
        for loop in {item.ticket.loop for item in news}:
            mine = [item for item in news if item.ticket.loop is loop]
            try:
                loop.call_soon_threadsafe(_deliver, mine)
            except RuntimeError:
                logger.info("%d requests whose event loop is closed are dropped", len(mine))


def _closed() -> ServingError:
    return ServingError("the policy is shutting down; ask again")


def _deliver(news: list[_News]) -> None:
    """On the event loop."""
    for item in news:
        ticket = item.ticket
        ticket.events += item.events
        ticket.output = item.output or ticket.output
        ticket.error = item.error or ticket.error
        ticket.news.set()


class Answers:
    """Makes choices and deltas. For one thread."""

    def __init__(self, tokenizer: Any) -> None:
        self._bytes = TokenBytes(tokenizer)
        self._texts: dict[int, tuple[str, bytes]] = {}

    def choice(self, index: int, made: Completion) -> Choice:
        """A finished completion."""
        tokens = zip(made.token_ids.tolist(), made.logprobs.tolist(), strict=True)
        return Choice(index, made.text, _reason(made.finish_reason), tuple(self._token(*token) for token in tokens))

    def deltas(self, events: Sequence[Event]) -> list[Delta]:
        """What `events` add, one delta a choice."""
        by_row: dict[int, list[Event]] = {}
        for event in events:
            by_row.setdefault(event.row, []).append(event)
        return [
            Delta(
                index=row,
                text="".join(event.text for event in mine),
                tokens=tuple(self._token(event.token_id, event.logprob) for event in mine),
                finish_reason=None if mine[-1].finish_reason is None else _reason(mine[-1].finish_reason),
            )
            for row, mine in by_row.items()
        ]

    def _token(self, token: int, logprob: float) -> TokenInfo:
        known = self._texts.get(token)
        if known is None:
            data = self._bytes.of(token)
            # As OpenAI writes the bytes of a token that is part of a character.
            known = self._texts[token] = (data.decode("utf-8", "backslashreplace"), data)
        return TokenInfo(known[0], token, logprob, known[1])


def _reason(reason: FinishReason) -> ServedFinishReason:
    return "stop" if reason == "stop" else "length"
