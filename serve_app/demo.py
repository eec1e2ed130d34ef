"""`make demo`: the whole of viewmesh once, on this machine: sample capture, service, HTTP, mesh, picture.

python -m serve_app.demo FOLDER [--port 8000] [--keep]
"""

import argparse
from pathlib import Path

from serve_app import cli
from viewmesh.cli import Bar, errors_as_sentences
from viewmesh.options import Options, ViewRules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the capture, the service's data and the mesh go")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--keep", action="store_true", help="leave the service running until Ctrl-C")
    args = parser.parse_args()
    with errors_as_sentences():
        demo(args.folder, args.port, keep=args.keep)


def demo(folder: Path, port: int, *, keep: bool) -> None:
    """Photograph the sample, start the service, reconstruct over HTTP, say where everything is."""
    capture, data, out = folder / "sample", folder / "data", folder / "robot"
    if not (capture / "six").exists():
        say("1/3  photographing the sample object: six views with depth")
        from viewmesh.sample.capture import write_sample

        with Bar() as bar:
            write_sample(capture, parts=("six",), progress=bar)
    say("2/3  starting the service: Ray Serve on this machine, SQLite, files")
    file = cli.write_adapted(cli.DEFAULT_CONFIG, data, port=port, host="127.0.0.1")
    cli.refuse_unfit_address(file)
    service = cli.start(file, data)
    url = f"http://127.0.0.1:{port}"
    try:
        cli.await_ready(url, service, data)
        say(f"3/3  reconstructing over HTTP; the web page is at {url}")
        files = cli.reconstruct_over_http(url, capture / "six", out, Options(seed=0, views=ViewRules(rig="canonical6")))
        say(f"mesh     {files['mesh.glb']}\npicture  {files['thumbnail.png']}")
        if keep:
            say(f"open     {url}   (Ctrl-C stops the service)")
            service.wait()
        else:
            say(f"page     viewmesh serve --data {data}   then open {url}")
    except KeyboardInterrupt:
        say("stopping")
    finally:
        cli.stop(service)


def say(text: str) -> None:
    import typer

    typer.echo(text, err=True)


if __name__ == "__main__":
    main()
