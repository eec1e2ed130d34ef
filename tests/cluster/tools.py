"""Programs that the tests of cluster/ run, where they are installed."""

import os
import shutil
import sys

PLACES = os.pathsep.join([os.environ.get("PATH", ""), f"{sys.prefix}/prometheus/usr/bin"])  # the Makefile's, too


def tool(name: str) -> str | None:
    return shutil.which(name, path=PLACES)
