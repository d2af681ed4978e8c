"""The end of the demo: the table of faults and the verdict."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from examples.demo.faults import Outcome
from examples.demo.verdict import Check

__all__ = ["PHASES", "faults_table", "print_verdict", "row"]

PHASES = {
    "detect": "detect",
    "agree": "agree",
    "start": "start",
    "decode": "decode",
    "fetch": "fetch",
    "load": "load",
    "first_step": "first step",
}
"""The coordinator's phases of a recovery, in their order, and what people call them."""


def faults_table(outcomes: Sequence[Outcome]) -> Table:
    """Each fault, steps lost, seconds by phase, total."""
    table = Table(title="What was killed, and what it cost (seconds by phase)", title_justify="left")
    table.add_column("fault", no_wrap=True)
    table.add_column("at step", justify="right")
    table.add_column("went on at", justify="right")
    table.add_column("steps lost", justify="right")
    for phase in PHASES.values():
        table.add_column(phase, justify="right")
    table.add_column("total", justify="right")
    for outcome in outcomes:
        table.add_row(*row(outcome))
    return table


def row(outcome: Outcome) -> list[str]:
    """The cells of one fault. A fault that interrupted nothing has no phases."""
    if outcome.struck_step is None:
        return [outcome.name, "never", "", "", *("" for _ in PHASES), ""]
    if not outcome.survived:
        return [outcome.name, str(outcome.struck_step), "never", "", *("" for _ in PHASES), ""]
    seconds = [f"{outcome.phases[name]:.2f}" if name in outcome.phases else "-" for name in PHASES]
    went_on = str(outcome.went_on_at) if outcome.phases else "never stopped"
    steps = [str(outcome.struck_step), went_on, str(outcome.steps_lost)]
    return [outcome.name, *steps, *seconds, f"{outcome.total_s:.1f}"]


def print_verdict(console: Console, checks: Sequence[Check], *, changed: bool) -> None:
    """Every check, then one sentence."""
    console.print()
    for check in checks:
        mark = Text("equal    ", style="green") if check.equal else Text("DIFFERENT", style="bold red")
        console.print(Text("  ").append_text(mark).append(f"  {check.text}"), highlight=False, soft_wrap=True)
    console.print()
    if not all(check.equal for check in checks):
        console.print(Text("The disturbed run is NOT the undisturbed one.", style="bold red"))
        return
    sentence = "The disturbed run ended with exactly the bits of the run that nobody disturbed."
    if changed:
        sentence = "The state restored onto another number of workers has exactly the bits of the undisturbed run."
    console.print(Text(sentence, style="bold green"))
