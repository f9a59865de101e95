"""A process that lets everything else go first, for calls that take long."""

import os
import pickle
import threading
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from .decoding import SECONDS

# Light, as the process imports it before it steps back: what it computes with, it imports with its first call.


class Aside:
    """Runs one call at a time, in a process that the first one starts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: Connection | None = None

    def __call__(self, packed: bytes) -> Any:
        """
        What a pickled `(function, arguments, keywords)` gives.

        Raises:
            RuntimeError: If that fails, with its reason.
            OSError, EOFError: If the process was killed, as when memory runs out; the next call starts another one.
        """
        with self._lock:
            if self._connection is None:
                context = get_context("forkserver")
                self._connection, other = context.Pipe()
                with other:
                    context.Process(target=_serve, args=(other,), daemon=True).start()
            try:
                self._connection.send_bytes(packed)
                found, error, seconds = pickle.loads(self._connection.recv_bytes())
            except (OSError, EOFError):
                self.close()
                raise
        SECONDS.get([]).append(seconds)
        if error is not None:
            raise RuntimeError(error)
        return found

    def close(self) -> None:
        """Ends the process once it has done what it does."""
        if self._connection:
            self._connection.close()
            self._connection = None


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
