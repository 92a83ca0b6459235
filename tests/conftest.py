"""Tests import ``oracle`` by name: pyproject.toml puts ``tests/`` on the path. Nothing is shared here on purpose."""
