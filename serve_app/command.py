"""The `viewmesh` command: the library's commands, the service's, and the weights'."""

from serve_app import cli as service
from viewmesh.cli import app
from viewmesh.weights.cli import app as weights

app.command()(service.serve)
app.command()(service.submit)
app.add_typer(service.config, name="config")
app.add_typer(weights, name="weights")


def main() -> None:
    app()
