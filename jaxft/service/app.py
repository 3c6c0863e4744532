"""The server's application: all routes behind the gate."""

import importlib.metadata
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route, Router

from jaxft.service import completions, files, jobs, models, oldest
from jaxft.service.answers import Answers
from jaxft.service.feeds import Feeds
from jaxft.service.gate import Gate
from jaxft.service.page import routes as page
from jaxft.service.page.exports import Exports
from jaxft.service.page.links import Links
from jaxft.service.state import Service


async def health(request: Request) -> Response:
    """Says that the server answers."""
    return JSONResponse({"status": "ok", "version": importlib.metadata.version("jaxft")})


def make_app(
    service: Service, *, hosts: tuple[str, ...] = (), needs_token: bool = False, **state: Any
) -> Gate:
    """Returns the application.

    Args:
      service: Its database and files.
      hosts: Names that it may be addressed by; empty: any.
      needs_token: Whether nobody is let in where there is no token.
      state: Further parts that routes find in `request.app.state`, such as the `generator`.
    """
    routes = [*files.ROUTES, *jobs.ROUTES, *models.ROUTES, *oldest.ROUTES]
    routes += completions.ROUTES
    api = Router(routes, redirect_slashes=False)
    router = Router(
        [Route("/health", health), *page.ROUTES, Mount("/v1", app=api)], redirect_slashes=False
    )
    app = Gate(router, service=service, hosts=hosts, needs_token=needs_token)
    app.state.models = models.Models(service)
    app.state.answers, app.state.feeds = Answers(service.database), Feeds(service)
    app.state.links, app.state.exports = Links(), Exports(service)
    vars(app.state).update(state)
    return app
