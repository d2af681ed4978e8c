"""The end of the demo: the table of faults and the verdict."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from examples.demo.faults import Outcome
from examples.demo.verdict import Check

__all__ = ["PHASES", "faults_table", "print_faults", "print_verdict", "row"]

PHASES = {
    "detect": "detect",
    "agree": "agree",
    "start": "start",
    "decode": "decode",
    "fetch": "fetch",
    "load": "load",
    "first_step": "first\nstep",
}
"""The coordinator's phases of a recovery, in their order, and what people call them."""


def print_faults(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Each fault in words, then steps lost and seconds by phase."""
    for outcome in outcomes:
        console.print(Text(f"{outcome.what}, at step {outcome.struck_step}:", style="bold"), soft_wrap=True)
        console.print(Text(f"  {outcome.note}"), soft_wrap=True)
    console.print()
    console.print(faults_table(outcomes))
    if any("decode" in outcome.phases for outcome in outcomes):
        console.print("decode is 0.00 where all was decoded while the workers were still starting", style="dim")


def faults_table(outcomes: Sequence[Outcome]) -> Table:
    """Made to fit into 80 columns."""
    table = Table(title="seconds by phase", title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("fault", no_wrap=True)
    for heading in ("at\nstep", "steps\nlost", *PHASES.values(), "total"):
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    for outcome in outcomes:
        table.add_row(*row(outcome))
    return table


def row(outcome: Outcome) -> list[str]:
    """
    The cells of one fault. A fault that interrupted nothing has no phases; its total is the time until the newest steps
    were protected again.
    """
    if outcome.struck_step is None:
        return [outcome.name, "never", "", *("" for _ in PHASES), ""]
    if not outcome.survived:
        return [outcome.name, str(outcome.struck_step), "all", *("" for _ in PHASES), ""]
    seconds = [f"{outcome.phases[name]:.2f}" if name in outcome.phases else "-" for name in PHASES]
    return [outcome.name, str(outcome.struck_step), str(outcome.steps_lost), *seconds, f"{outcome.total_s:.1f}"]


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
