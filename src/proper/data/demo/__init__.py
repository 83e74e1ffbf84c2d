"""Demo data with a planted structure: what everybody shares, what a group shares, what only one person does.

Knows nothing about models, training or how a run is evaluated.
"""

from __future__ import annotations

from proper.data.demo.generate import demo_config, write_demo
from proper.data.demo.settings import DemoSettings

__all__ = ["DemoSettings", "demo_config", "write_demo"]
