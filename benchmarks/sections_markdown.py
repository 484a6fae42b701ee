"""How sections of docs/benchmarks.md show tables and machines."""

from __future__ import annotations

from typing import Any


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def where(machine: dict[str, Any]) -> str:
    """One line on the machine and the versions."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    gpu = f", {machine['gpu']}" if machine.get("gpu") else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB{gpu};"
        f" Python {machine['python']}, {versions}; commit {machine['commit']}, {machine['date']}."
    )
