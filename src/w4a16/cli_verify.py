"""`w4a16 verify`: executes kernels' machine code for gfx11 in an emulator and compares with the reference."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

console = Console()


def verify(
    device: Annotated[str, typer.Option(help="A gfx11 GPU: gfx1100, gfx1151, ...")] = "gfx1151",
    kernel: Annotated[list[str] | None, typer.Option(help="A kernel's stem; may be repeated. Default all.")] = None,
    m: Annotated[list[int] | None, typer.Option(help="Rows of x; may be repeated. Default: a kernel's own.")] = None,
    mutate: Annotated[int, typer.Option(help="Change so many single instructions of a kernel; count the noticed.")] = 0,
    seed: Annotated[int, typer.Option(help="Which changes --mutate makes.")] = 0,
) -> None:
    """Compile every kernel for a gfx11 GPU, execute its machine code here, compare with the reference."""
    import triton

    from .codegen.mutate import mutation_check
    from .codegen.verify import Outcome, verify
    from .device import known_device

    where, done = known_device(device), 0

    def show(outcome: Outcome) -> None:
        nonlocal done
        done += 1
        check, p = outcome.check, outcome.check.problem
        what = f"m={p.m} n={p.n} k={p.k} group={p.group} {p.act} {'asym' if p.has_zeros else 'sym'}"
        what += f" experts={p.experts} top_k={p.top_k}" if p.experts else ""
        tile = " ".join(f"{name}={value}" for name, value in vars(check.tile).items())
        result = f"{outcome.error:.1e} of {check.bound:.0e}" if outcome.failure is None else outcome.failure
        verdict = "ok  " if outcome.passed else "FAIL"
        typer.echo(f"{verdict} {check.stem}  {what}  {tile}  {outcome.executed} instructions  {result}")

    if mutate:
        raise typer.Exit(mutation_check(where, kernel or ["triton_prefill"], mutate, seed, typer.echo))
    outcomes = verify(where, kernel or [], tuple(m or ()), show)
    failed = [outcome for outcome in outcomes if not outcome.passed]
    executed = sum(outcome.executed for outcome in outcomes)
    console.print(
        f"{where.arch}, Triton {triton.__version__}: {len(outcomes) - len(failed)} of {len(outcomes)} checks passed, "
        f"{executed:,} wave-instructions executed"
    )
    if failed or not outcomes:
        raise typer.Exit(1)
