"""The command of the service: serve."""

import argparse
import importlib.util

from jaxft.cli.common import listed
from jaxft.errors import ConfigError

_NEEDED = ("starlette", "uvicorn", "sqlalchemy", "alembic", "httpx", "pydantic", "multipart")


def serve(options: argparse.Namespace) -> int:
    """Serves OpenAI's calls, or makes and drops tokens."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"`jaxft serve` needs {', '.join(missing)}: pip install 'jaxft[serve]', or in a clone "
            "pip install '.[serve]'."
        )
    from jaxft.service import server
    from jaxft.service.gate import drop_token, new_token
    from jaxft.service.settings import Settings, name_models

    names = listed(options.models or [])
    settings = Settings(
        workdir=server.workdir_of(options.workdir),
        models=name_models(names) if names else {},
        database=options.database,
        executor=options.executor,
        executor_options=tuple(options.executor_option or ()),
        device_sets=tuple(options.device_set or ()),
        topology=options.topology,
        most_jobs=options.most_jobs,
        keep_unfinished=options.keep_unfinished,
        organization=options.organization,
        webhooks=tuple(options.webhook or ()),
        webhook_secret=options.webhook_secret,
        requests_per_minute=options.requests_per_minute,
        generation={
            "dtypes": options.dtypes,
            "quantise": options.quantise,
            "idle": str(options.idle),
        },
        generate_on=options.generate_on,
    )
    if options.new_token:
        token = new_token(server.prepare(settings), options.new_token)
        print(token)
        return 0
    if options.drop_token:
        if not drop_token(server.prepare(settings), options.drop_token):
            raise ConfigError(f"There is no token called {options.drop_token!r}.")
        return 0
    server.serve(
        settings,
        host=options.host,
        port=options.port,
        hosts=tuple(options.allow_host or ()),
    )
    return 0
