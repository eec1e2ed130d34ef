"""The `viewmesh` command: the library's commands, the service's, and the weights'."""

from serve_app import cli as service
from viewmesh import cli as library
from viewmesh import runtime
from viewmesh.cli import app
from viewmesh.weights.cli import app as weights

app.registered_commands = [c for c in app.registered_commands if c.callback is not library.doctor]
app.command()(service.doctor)  # the library's, and that of a cluster
app.command()(service.serve)
app.command()(service.submit)
app.command()(service.fetch)
app.add_typer(service.config, name="config")
app.add_typer(weights, name="weights")


def main() -> None:
    runtime.prepare()
    app()
