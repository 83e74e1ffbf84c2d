"""Synthetic demo data with planted structure: population, group and individual user behaviour."""

from __future__ import annotations

from proper.data.demo.generate import demo_config, demo_run, write_demo
from proper.data.demo.users import DemoSettings

__all__ = ["DemoSettings", "demo_config", "demo_run", "write_demo"]
