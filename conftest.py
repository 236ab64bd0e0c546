"""Glue: loads the fixtures that the suite in ``perf/`` stands on. The plugin itself comes in by its entry point."""

pytest_plugins = ["fixtures.workloads", "fixtures.bare"]
