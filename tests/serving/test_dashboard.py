"""`deploy/grafana-dashboard.json`: it shows metrics that the server exports, under their names and labels."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana-dashboard.json"

if TYPE_CHECKING:
    from tests.serving.conftest import Running


def expressions() -> list[str]:
    """All queries of the dashboard."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def test_every_metric_of_the_dashboard_is_exported(server: Running) -> None:
    with server.client() as client:
        body = {"model": "tiny", "prompt": "Well?", "user": "u0", "max_tokens": 2}
        assert client.post("/v1/completions", json=body).status_code == 200
        text = client.get("/metrics").text
    labels: dict[str, set[str]] = {}
    for name, shown in re.findall(r"^(\w+)(?:\{([^}]*)\})? ", text, re.MULTILINE):
        labels.setdefault(name, set()).update(re.findall(r'(\w+)="', shown))
    asked = expressions()
    assert len(asked) > 20
    for expression in asked:
        names = re.findall(r"proper_\w+", expression)
        assert names, expression
        assert set(names) <= labels.keys(), f"not exported: {set(names) - labels.keys()}"
        for group in re.findall(r"by \(([^)]*)\)", expression):
            assert set(re.findall(r"\w+", group)) <= set.union(*(labels[name] for name in names)), expression
