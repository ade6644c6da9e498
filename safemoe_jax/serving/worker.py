"""The engine works in a thread of its own; coroutines hand it requests and await its events."""

import asyncio
import threading
from collections.abc import Callable

from safemoe_jax.inference.engine import Engine, Event, Request


class EngineFailed(RuntimeError):
    """The engine's thread has ended by an error, which `Worker.close` raises."""


class Worker:
    """Runs an engine for the coroutines of one event loop."""

    def __init__(self, work: Callable[[Callable[[Engine], None]], None]) -> None:
        """Nothing runs yet.

        Args:
          work: called in the thread: makes the engine, and calls what it is given with it.
        """
        self._work = work
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._wake = threading.Condition()
        self._arrived: list[Request] = []
        self._closing = False
        self._queues: dict[Request, asyncio.Queue[Event | None]] = {}  # the event loop's alone
        self._error: BaseException | None = None

    async def start(self) -> None:
        """Starts the thread and waits until the engine is there, or has `failed`."""
        self._loop, self._ready = asyncio.get_running_loop(), asyncio.Event()
        self._thread.start()
        await self._ready.wait()

    @property
    def outstanding(self) -> int:
        """Requests whose answers have not ended."""
        return len(self._queues)

    @property
    def failed(self) -> bool:
        return self._error is not None

    def submit(self, request: Request, events: asyncio.Queue[Event | None]) -> None:
        """Hands a request over; its events come to the queue, None where the engine failed."""
        self.check()
        self._queues[request] = events
        with self._wake:
            self._arrived.append(request)
            self._wake.notify()

    def drop(self, request: Request) -> None:
        """Nobody wants the rest of this answer; nothing happens where it has ended."""
        request.over = True
        self._queues.pop(request, None)

    async def close(self) -> None:
        """Drops what still runs and ends the thread; raises what ended it before, if anything."""
        for request in list(self._queues):
            self.drop(request)
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)
        if self._error:
            raise self._error

    def check(self) -> None:
        """Raises EngineFailed where the engine has ended by an error."""
        if self._error:
            raise EngineFailed("the engine has failed; restart the server")

    def _run(self) -> None:
        try:
            self._work(self._serve)
        except BaseException as error:  # whatever it is, who waits must hear of it
            self._loop.call_soon_threadsafe(self._fail, error)

    def _serve(self, engine: Engine) -> None:
        self._loop.call_soon_threadsafe(self._ready.set)
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._arrived or engine.busy or self._closing)
                arrived, self._arrived = self._arrived, []
                if self._closing and not arrived and not engine.busy:
                    return
            for request in arrived:
                engine.submit(request)
            if events := engine.step():
                self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            queue = self._queues.get(event.request)
            if queue is None:
                continue  # dropped meanwhile
            if event.finish:
                del self._queues[event.request]
            queue.put_nowait(event)

    def _fail(self, error: BaseException) -> None:
        self._error = error
        self._ready.set()
        for queue in self._queues.values():
            queue.put_nowait(None)
        self._queues.clear()
