"""Put the figures of benchmarks/results/ into docs/benchmarks.md, between its markers.

python benchmarks/make_docs.py            rewrite the page
python benchmarks/make_docs.py --check    exit 1 if the page does not show the latest results
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import common
from sections_compare import compare
from sections_decisions import decisions
from sections_models import (
    amortised,
    digits,
    discrete,
    draw,
    frames,
    music,
    particles,
    pendulum,
    shapes,
    topics,
)
from sections_networks import network_times
from sections_server import continual, experts, server, server_scale, snep
from sections_tables import classification, memory, outputs, speed, streaming, uci

PAGE = common.ROOT / "docs" / "benchmarks.md"
BLOCK = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "uci": uci,
    "speed": speed,
    "memory": memory,
    "classification": classification,
    "streaming": streaming,
    "server": server,
    "server_scale": server_scale,
    "experts": experts,
    "amortised": amortised,
    "amortised_particles": particles,
    "continual": continual,
    "decisions": decisions,
    "outputs": outputs,
    "snep": snep,
    "amortised_music": music,
    "amortised_nottingham": music,
    "amortised_digits": digits,
    "amortised_draw": draw,
    "amortised_discrete": discrete,
    "amortised_frames": frames,
    "amortised_pendulum": pendulum,
    "amortised_shapes": shapes,
    "amortised_topics": topics,
    "compare": compare,
    "network_times": network_times,
}


def render(page: str) -> str:
    """The page with every block replaced by its results, or by "Not run yet."."""

    def block(match: re.Match[str]) -> str:
        path = common.RESULTS / f"{match[2]}.json"
        text = SECTIONS[match[2]](json.loads(path.read_text())) if path.exists() else "Not run yet."
        return f"{match[1]}{text}\n{match[3]}"

    return BLOCK.sub(block, page)


def main() -> int:
    """Rewrite or check the page."""
    page = PAGE.read_text()
    fresh = render(page)
    if "--check" in sys.argv[1:]:
        if fresh != page:
            print("docs/benchmarks.md does not show benchmarks/results: run python benchmarks/make_docs.py")
        return int(fresh != page)
    PAGE.write_text(fresh)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
