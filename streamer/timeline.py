"""The generated steps of a profile, in as many bars as a picture has room for, and their means."""

from __future__ import annotations

from typing import Any

import numpy as np

from .forecast import generated
from .profiler import PARTS

FAR = 3.0  # times the usual step: what is slower must not flatten the rest


def timeline(steps: dict[str, Any], most: int) -> dict[str, Any]:
    """Seconds by part, each value the mean of `steps_per_bar` steps; edges: step numbers."""
    chosen = generated(steps)
    per = max(1, -(-len(chosen) // most))
    starts = np.arange(0, len(chosen), per)
    sizes = np.diff([*starts, len(chosen)])
    columns = {
        part: (np.add.reduceat(np.array(steps[part])[chosen], starts) / sizes).tolist()
        if chosen
        else []
        for part in PARTS
    }
    whole = np.sum(list(columns.values()), axis=0) if chosen else np.zeros(1)
    usual = FAR * float(np.quantile(whole, 0.9))
    top = float(whole.max()) if whole.max() <= usual else usual
    return columns | {
        "steps_per_bar": per,
        "edges": [0.5, *(0.5 + np.cumsum(sizes)).tolist()],
        "shown_up_to_seconds": 1.05 * top or 1.0,
        "beyond": int((whole > 1.05 * top).sum()),
    }


def summary(document: dict[str, Any]) -> dict[str, Any]:
    """Means of a generated step, and shares that the page quotes."""
    steps, run = document["steps"], document["run"]
    chosen = generated(steps)
    parts = {part: np.array(steps[part])[chosen] for part in PARTS}
    whole = np.sum(list(parts.values()), axis=0)
    count = max(1, len(chosen))
    return {
        "step": {part: float(values.sum() / count) for part, values in parts.items()},
        "step_seconds": float(whole.sum() / count),
        "slowest_step": float(whole.max()) if len(chosen) else 0.0,
        "tokens_per_step": (run["generated_tokens"] - 1) / count,
        "bytes_per_token": document["reads"].get("generated_bytes", 0)
        / max(1, run["generated_tokens"] - 1),
        "budget_share": document["memory"]["largest_footprint"] / document["memory"]["limit"],
    }
