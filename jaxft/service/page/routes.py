"""The page itself, and all routes that it has beside OpenAI's."""

import importlib.metadata
import secrets

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route, Router

from jaxft.reporting.pages import render
from jaxft.service.page import exports, links, previews, views

# Nothing but what this page brings runs or is fetched: neither what users wrote into names and
# messages, nor other sites' files.
_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def page(request: Request) -> Response:
    """Sends the page; it holds no data, and asks for a token itself."""
    nonce = secrets.token_urlsafe(18)
    version = importlib.metadata.version("jaxft")
    text = render("service/page.html", title="Fine-tuning", nonce=nonce, version=version)
    headers = {
        "content-security-policy": _POLICY.format(nonce=nonce),
        "cache-control": "no-store",
        "referrer-policy": "no-referrer",
    }
    return Response(text, media_type="text/html", headers=headers)


_OWN = [
    Route("/jobs", views.list_jobs),
    Route("/jobs/{job}", views.retrieve_job),
    Route("/jobs/{job}/charts", views.list_charts),
    Route("/jobs/{job}/report", views.open_report, methods=["POST"]),
    Route("/models", views.list_models),
    Route("/previews", previews.create_preview, methods=["POST"]),
    Route("/previews/{preview}", previews.retrieve_preview),
    Route("/exports", exports.create_export, methods=["POST"]),
    Route("/exports", exports.retrieve_export),
]
ROUTES = [
    Route("/", page),
    Route(f"{links.PREFIX}{{key}}", links.follow),
    Mount("/v1/jaxft", app=Router(_OWN, redirect_slashes=False)),
]
