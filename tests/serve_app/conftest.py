"""Services for tests: in their own process, and on a real Ray; and the stores that they run on."""

import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from in_process import Running, running_service
from stores import Stores, postgres, s3, stores_of

from serve_app.testing import RayService


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    with s3() as url:
        yield url


@pytest.fixture(scope="module", params=["local", "cloud"])
def stores(request: pytest.FixtureRequest) -> Stores:
    """SQLite and a folder; PostgreSQL and S3."""
    return stores_of(request.param, request)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--stores", choices=["local", "cloud"], default="local", help="Where a service on a real Ray keeps its jobs."
    )


@pytest.fixture(scope="module")
def ray_service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayService]:
    """The service on a real Ray, on the stores that the command line names."""
    given = stores_of(request.config.getoption("--stores", "local"), request).args

    def change(config: dict[str, Any]) -> None:
        config["applications"][0]["args"].update(given)

    with RayService(tmp_path_factory.mktemp("service"), change) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(request: pytest.FixtureRequest) -> AsyncIterator[Running]:
    """On SQLite and a folder; test modules that have the fixture `stores` run on both kinds."""
    data = Path(tempfile.mkdtemp(prefix="viewmesh-test-"))
    given = request.getfixturevalue("stores").args if "stores" in request.fixturenames else {}
    async with running_service(data, **given) as value:
        yield value
    shutil.rmtree(data, ignore_errors=True)


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[..., Any]:
    """A service of the test's own, with arguments of its own."""
    return lambda **args: running_service(tmp_path / "data", **args)
