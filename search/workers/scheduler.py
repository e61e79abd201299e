"""The connection to a Dask scheduler: checked, opened, and used to reach its workers."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from distributed import Client, Security
from distributed.core import rpc

from search.errors import InputError, one_line

PATIENCE = 60  # seconds that a lost scheduler, or a paused worker, has to return
_TIMEOUT = 10  # seconds


def connect(address: str) -> Client:
    """A client of the scheduler at `address`, which comes back to a scheduler that does."""
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # errors are raised as well
    return Client(address, timeout=PATIENCE, set_as_default=False)


def check_scheduler(address: str) -> None:
    """Raise InputError where no scheduler answers at `address`."""

    async def ask() -> str:
        arguments = Security().get_connection_args("client")
        async with rpc(address, timeout=_TIMEOUT, connection_args=arguments) as there:
            return str((await there.identity())["type"])

    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    try:
        with ThreadPoolExecutor(1) as thread:  # in this one an event loop may run, as in a notebook
            found = thread.submit(asyncio.run, ask()).result()
        problem = "" if found == "Scheduler" else f"a {found.lower()} is there"
    except Exception as error:  # a bad address, a refused connection, TLS
        problem = one_line(error)
    if problem:
        raise InputError(
            f"--scheduler must be the address of a running Dask scheduler, but {address!r} is not: "
            f"{problem}; start one with dask scheduler, or leave the option out"
        )


def run_on(
    client: Client,
    function: Callable[..., Any],
    *arguments: Any,
    workers: list[str],
    timeout: float = _TIMEOUT,
) -> dict[str, Any]:
    """What `function` returns, or raises, in each of the workers, by their addresses."""
    found: dict[str, Any] = client.sync(
        client._run,
        function,
        *arguments,
        workers=workers,
        on_error="return",
        callback_timeout=timeout,
    )
    return found
