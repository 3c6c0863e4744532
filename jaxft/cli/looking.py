"""Commands that look ahead of a run: data, shardings, plan, doctor."""

import argparse

from jaxft.cli.common import config_of, listed, write_json
from jaxft.errors import ConfigError

_SEARCH_ONLY = ("count", "jobs", "budget")


def data(options: argparse.Namespace) -> int:
    """Shows what the data is and what is trained; 1 if a set is refused."""
    config = config_of(options)
    from jaxft.console import log, stdout
    from jaxft.data.inspect import inspect
    from jaxft.programs.description import context_of, load_model_tokenizer
    from jaxft.programs.evaluation import named_sources
    from jaxft.workdir.source import find_source, find_start

    if config.adapter.path:
        source = find_start(config, weights=False)
    else:
        source = find_source(config.model.path, revision=config.model.revision, weights=False)
    tokenizer, _ = load_model_tokenizer(source, config.model)
    held_out = config.data.validation or config.eval.datasets or config.eval.retention
    sources = named_sources(config) if held_out else {}
    report = inspect(
        config,
        tokenizer,
        sources=sources,
        context=context_of(source),
        units=config.objective.objective.units,
        on_progress=log,
    )
    stdout.print(report)
    return 1 if any(item.refusal for item in report.sets) else 0


def shardings(options: argparse.Namespace) -> int:
    """Shows where each array would live."""
    from jaxft.compiled import layout

    config = config_of(options)

    layout.check_outputs(html=options.html, output=options.output)
    devices = None if options.devices is None else layout.cpu_devices(options.devices)
    found = layout.describe_run(config, devices=devices, compiled=options.collectives)
    layout.print_description(found)
    if options.output:
        write_json(options.output, layout.record(found))
    if options.html:
        from jaxft.compiled.layout_page import write_page

        print(f"Wrote {write_page(options.html, found)}.")
    return 0


def plan(options: argparse.Namespace) -> int:
    """Shows what a run would cost; 1 if nothing fits."""
    if options.fit:
        return _fit(options)
    if options.chip:
        raise ConfigError("--chip is for --fit; name slices with --topology.")
    topologies = listed(options.topology or [])
    if not topologies:
        raise ConfigError("Name one or more slices: --topology=v5e:4x4. See `jaxft plan --help`.")
    if options.output and not options.search:
        raise ConfigError("--output takes the config of a search; add --search.")
    if options.output and not options.output.endswith((".py", ".yaml", ".yml")):
        raise ConfigError(f"--output={options.output}: a config file ends in .py, .yaml or .yml.")
    plan = options.parser
    set_for_search = [n for n in _SEARCH_ONLY if getattr(options, n) != plan.get_default(n)]
    if set_for_search and not options.search:
        raise ConfigError(f"--{set_for_search[0]} is for a search; add --search.")
    if options.count < 1 or options.jobs < 0 or not options.budget > 0:
        raise ConfigError("--count is 1 or more, --jobs 0 or more, --budget more than 0 seconds.")
    config = config_of(options)
    from jaxft.compiled.layout import check_outputs
    from jaxft.console import log
    from jaxft.planner import command
    from jaxft.planner.topology import LOCAL, use_compiler_alone

    check_outputs(html=options.html, json=options.json, output=options.output)
    if options.output and len(topologies) > 1:
        raise ConfigError("--output takes the best of one search; name one --topology.")
    if topologies != [LOCAL]:
        use_compiler_alone()
    request = command.Request(
        topologies=topologies,
        strategies=listed(options.strategy or []),
        search=options.search,
        evaluation=not options.no_eval,
        remedies=not options.no_remedies,
        prices=options.prices,
        cache=options.cache,
        count=options.count,
        jobs=options.jobs,
        budget=options.budget,
    )
    plans, searches = command.plan(config, request, on_log=log)
    from jaxft.planner import show

    for found in searches:
        show.print_search(found)
    show.print_plans(plans)
    if options.json:
        write_json(options.json, show.record(plans, searches))
    if options.html:
        from jaxft.planner.page import write_page

        print(f"Wrote {write_page(options.html, plans, searches)}.")
    if options.output:
        print(f"Wrote {command.write_config(options.output, config, searches[0])}.")
    return 0 if plans and all(plan.fits for plan in plans) else 1


def _fit(options: argparse.Namespace) -> int:
    """Shows the smallest slices for a model; 1 if none fits, 2 if nothing could be looked at."""
    others = ("topology", "strategy", "search", "output", "html")
    unused = [name for name in others if getattr(options, name)]
    if unused:
        raise ConfigError(f"--fit looks at slices itself; leave --{unused[0]} out, or --fit.")
    options.overrides = [*options.overrides, f"--config.model.path={options.fit}"]
    config = config_of(options)
    from jaxft.compiled.layout import check_outputs
    from jaxft.console import log
    from jaxft.planner import command, show
    from jaxft.planner.topology import use_compiler_alone

    check_outputs(json=options.json)
    use_compiler_alone()
    found = command.fits(config, listed(options.chip or []), prices=options.prices, on_log=log)
    show.print_fits(options.fit, found)
    if options.json:
        write_json(options.json, show.record_fits(found))
    if any(fit.plan for fit in found):
        return 0
    return 1 if any(fit.is_known for fit in found) else 2


def doctor(options: argparse.Namespace) -> int:
    """Checks versions, devices, disk and hub."""
    named = options.config or options.overrides
    config = config_of(options, validate=False) if named else None
    from jaxft.programs.doctor import print_checks, run_doctor

    return print_checks(run_doctor(config))
