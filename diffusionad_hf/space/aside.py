"""A process that lets everything else go first, for calls that take long."""

import os
import pickle
import threading
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from .decoding import SECONDS

# Light, as the process imports it before it steps back: what it computes with, it imports with its first call.


_MOST_SECONDS = 900.0


class Busy(Exception):
    """It computes something else."""


class Aside:
    """Runs one call at a time, in a process that the first one starts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._process: BaseProcess | None = None

    def __call__(self, packed: bytes) -> Any:
        """
        What a pickled `(function, arguments, keywords)` gives.

        Raises:
            Busy: If another call is under way: nobody waits for what has stepped back.
            RuntimeError: If that fails, with its reason.
            OSError, EOFError: If the process was killed, as when memory runs out, or takes for ever; the next call
                starts another one.
        """
        if not self._lock.acquire(blocking=False):
            raise Busy
        began, seconds = time.monotonic(), None
        try:
            connection = self._connection or self._start()
            connection.send_bytes(packed)
            if not connection.poll(_MOST_SECONDS):
                raise TimeoutError
            found, error, seconds = pickle.loads(connection.recv_bytes())
        except (OSError, EOFError):
            self.close()
            raise
        finally:
            SECONDS.get([]).append(time.monotonic() - began if seconds is None else seconds)
            self._lock.release()
        if error is not None:
            raise RuntimeError(error)
        return found

    def _start(self) -> Connection:
        context = get_context("forkserver")
        connection, other = context.Pipe()
        with other:
            self._process = context.Process(target=_serve, args=(other,), daemon=True)
            self._process.start()
        self._connection = connection
        return connection

    def close(self) -> None:
        """Ends the process."""
        if self._connection and self._process:
            self._connection.close()
            self._process.kill()
        self._connection = self._process = None


def _serve(connection: Connection) -> None:
    """Computes what it is sent, until the server is gone."""
    os.nice(19)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    while True:
        try:
            packed = connection.recv_bytes()
        except (EOFError, OSError):
            return
        began, found, failure = time.process_time(), None, None
        try:
            function, arguments, keywords = pickle.loads(packed)
            found = function(*arguments, **keywords)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"[:1000]
        connection.send_bytes(pickle.dumps((found, failure, time.process_time() - began), pickle.HIGHEST_PROTOCOL))
