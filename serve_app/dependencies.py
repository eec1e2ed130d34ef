"""What a route is given beside its request: the service, and who calls."""

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request

from serve_app.auth import Caller

if TYPE_CHECKING:
    from serve_app.router import Service


async def service(request: Request) -> "Service":  # async: FastAPI sends plain functions through a thread
    return request.app.state.service


async def caller(request: Request) -> Caller:
    return request.state.caller


Serving = Annotated[Any, Depends(service)]
By = Annotated[Caller, Depends(caller)]
