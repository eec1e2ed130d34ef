"""START HERE. The Serve application: `import_path: serve_app.app:build`.

    client ──HTTP──> Router ──> job database <── Conductor ──> Preprocessor, Nvdiffrec, Trellis, Exporter

`build` only names the deployments; nothing heavy is imported until their constructors run on the nodes that do
the work.
(No `from __future__ import annotations` here: Ray reads the annotation of `args` to know that it is a model.)
"""

from ray.serve import Application

from serve_app.settings import AppArgs


def build(args: AppArgs) -> Application:
    """The graph. Raises pydantic's ValidationError for unknown keys; a running version then stays in place."""
    from serve_app.router import Router

    return Router.bind(args.model_dump(mode="json"), build_conductor(args))


def build_conductor(args: AppArgs) -> Application:
    """The graph behind the Router."""
    from deployments.exporter import Exporter
    from deployments.preprocessor import Preprocessor
    from serve_app.conductor import Conductor
    from serve_app.models import workers

    store = args.artifacts_url()
    if args.fake:
        stage = args.fake.stage()
        preprocessor = Preprocessor.bind(store, "deployments.fakes:FakePreparer", stage)
        exporter = Exporter.bind(store, "deployments.fakes:FakeWriter", stage)
    else:
        preprocessor = Preprocessor.bind(store, "deployments.adapters.prepare:LibraryPreparer", {})
        exporter = Exporter.bind(store, "deployments.adapters.export:LibraryWriter", {})
    return Conductor.bind(args.model_dump(mode="json"), preprocessor, exporter, workers(args))
