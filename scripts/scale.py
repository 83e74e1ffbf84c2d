"""How many machines for 1, 10, 100 million users? Simulate, and draw docs/images/scale.svg.

python scripts/scale.py run     simulate every config of configs/simulation/ into docs/results/bench/scale.json
python scripts/scale.py draw    draw the picture and print the table from docs/results/bench/scale.json
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from proper.files import read_json, write_json, write_text
from proper.reports import charts
from proper.reports.charts import TICKS, canvas, color

ROOT = Path(__file__).parents[1]
CONFIGS, RESULT, PICTURE = (
    ROOT / "configs" / "simulation",
    ROOT / "docs/results/bench/scale.json",
    ROOT / "docs/images/scale.svg",
)
USERS = (1_000_000, 10_000_000, 100_000_000)
NAMES = {"two-cores": "two cores, 220 M parameters (costs measured)", "gpu": "GPU, 8 B parameters (costs assumed)"}


def run() -> None:
    """Simulate every config with every number of users."""
    from proper.simulation.simulate import load_simulation, simulate

    found: dict[str, list[dict[str, Any]]] = {}
    for name in NAMES:
        config, costs = load_simulation(CONFIGS / f"{name}.yaml")
        for users in USERS:
            result = simulate(config.model_copy(update={"users": users}), costs)
            for side in ("with_affinity", "without_affinity"):
                del result[side]["by_hour"]
            found.setdefault(name, []).append(result)
            write_json(RESULT, {"schema": 1, "runs": found}, shared=True)


def picture(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return the SVG: machines over users, both logarithmic, a line per config."""
    with canvas("Machines by number of users", 640, (300, TICKS), left=56) as drawing:
        axes = drawing.axes
        for place, (name, title) in enumerate(NAMES.items()):
            x = [math.log10(result["setting"]["users"]) for result in runs[name]]
            machines = [result["size"]["machines"] for result in runs[name]]
            y = [math.log10(count) for count in machines]
            axes.plot(x, y, color=color(place), linewidth=2, marker=charts.marker(place))
            for at, count in enumerate(machines):
                axes.annotate(f"{count:,}", (x[at], y[at]), (0, 9), textcoords="offset points", ha="center")
            axes.annotate(title, (0.02, 0.94 - 0.08 * place), xycoords="axes fraction", color=color(place))
        axes.set_xticks([6, 7, 8], ["1 million", "10 million", "100 million"])
        axes.set_yticks(range(5), ["1", "10", "100", "1,000", "10,000"])
        axes.set_xlim(5.8, 8.2)
        axes.set_ylim(0, 4.6)
        charts.titles(axes, up="machines: replicas and fit workers", across="users")
    return drawing.file


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table of docs/how-to/scale.md."""
    lines = [
        "| machine | users | replicas | fit workers | first token, p95 at the peak | without affinity "
        "| adapter in a slot | without affinity | stored | price of a month per million users |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in NAMES:
        for result in runs[name]:
            near, far = result["with_affinity"], result["without_affinity"]
            lines.append(
                f"| {name} | {result['setting']['users'] / 1e6:,.0f} M | {result['replicas']:,} "
                f"| {result['refits']['workers']:,} | {near['peak_first_token_p95']:.2f} s "
                f"| {far['peak_first_token_p95']:.2f} s | {near['hit_rate']:.1%} | {far['hit_rate']:.1%} "
                f"| {result['size']['storage_bytes'] / 1e12:,.1f} TB "
                f"| {result['size']['price_month_per_million_users']:,.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "draw"])
    if parser.parse_args().command == "run":
        run()
        return
    runs = read_json(RESULT)["runs"]
    write_text(PICTURE, picture(runs), shared=True)
    print(table(runs))


if __name__ == "__main__":
    main()
