"""How one deployment calls another while a request waits."""

import asyncio
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from serve.errors import awaited

TRIES = 3


def over_grpc(handle: DeploymentHandle) -> DeploymentHandle:
    """The same handle, with calls that go from replica to replica by gRPC.

    That is quicker by a third or more than Serve's usual calls, which are tasks of Ray's actors. The servers for it run in
    every replica anyway, and by Ray's source ask for its token. Serve has an environment variable for it, which the process
    that deploys has to have before it imports Serve, and every node; this option is what that variable is the default of.

    An answer is to be waited for before it is passed on to another deployment: where the replica that owes it dies, Serve's
    router tries again and again to read it, and says nothing.
    """
    return handle.options(_by_reference=False)


async def answered(call: Callable[[], DeploymentResponse[Any]], tries: int = TRIES) -> Any:
    """The answer to a call, which is called off where nobody waits for it any more.

    Args:
        tries: how often it is made, each time that the replica which had it has died; it waits for the next one. More than
            once only what changes nothing, and harms no replica.

    Raises:
        RayActorError: so have all those that had it.
    """
    while True:
        response = call()
        try:
            return await awaited(response)
        except asyncio.CancelledError:
            response.cancel()
            raise
        except RayActorError:
            tries -= 1
            if not tries:
                raise
