"""`w4a16 isa`: the hot loop of a kernel, compiled here for a GPU that need not be here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .errors import BadInput, explain_mismatch

console = Console()


def isa(
    kernel: Annotated[str, typer.Option(help="The kernel's stem, such as triton_prefill.")],
    device: Annotated[str, typer.Option(help="A known GPU, such as gfx1151 or sm90.")],
    m: Annotated[int, typer.Option(help="Rows of x: tokens in this call.")] = 2048,
    n: Annotated[int, typer.Option(help="Out features (experts: of the first GEMM).")] = 4096,
    k: Annotated[int, typer.Option(help="In features (experts: hidden).")] = 4096,
    group: Annotated[int, typer.Option(help="Columns that share a scale; -1 for whole rows.")] = 128,
    act: Annotated[str, typer.Option(help="bf16 or fp16")] = "bf16",
    asym: Annotated[bool, typer.Option("--asym/--sym", help="With zero points, or without.")] = False,
    experts: Annotated[int, typer.Option(help="Experts of the layer; 0 for a linear layer.")] = 0,
    top_k: Annotated[int, typer.Option(help="Experts a token goes to.")] = 0,
    tile: Annotated[
        list[str] | None, typer.Option(help="Change fields of the tile: block_m=64,warps=8. Repeat to compare tiles.")
    ] = None,
    opcodes: Annotated[bool, typer.Option("--opcodes", help="Also count each opcode of the loop.")] = False,
    asm: Annotated[bool, typer.Option("--asm", help="Print the machine code.")] = False,
) -> None:
    """Compile a kernel for a GPU that is not here; count the instructions, registers and spills of its hot loop."""
    from .codegen.cases import compiled_stems
    from .codegen.golden import tile_text
    from .codegen.isa import read_isa
    from .codegen.report import Column, isa_table, opcode_table
    from .codegen.stems import compile_stem
    from .device import known_device
    from .problem import Problem
    from .tuning.table import tile_for
    from .tuning.tiles import why_illegal

    if kernel not in compiled_stems():
        wanted = ", ".join(compiled_stems())
        raise BadInput(explain_mismatch("--kernel", got=kernel, wanted=wanted, then="Name one."))
    group = k if group == -1 else group
    problem = Problem(m=m, n=n, k=k, group=group, act=act, has_zeros=asym, experts=experts, top_k=top_k)
    where = known_device(device)
    default = tile_for(kernel, problem, where)
    columns = []
    for fields in tile or [""]:
        wanted_tile = changed(default, fields)
        if (why := why_illegal(kernel, wanted_tile, problem, where)) is not None:
            raise BadInput(f"{kernel}, m={m} n={n} k={k}, {tile_text(wanted_tile)}: {why}. Change --tile or the sizes.")
        for code in compile_stem(kernel, problem, where, wanted_tile):
            title = "\n".join([code.name, *fields.split(",")])
            columns.append(Column(title=title, reading=read_isa(code)))
            if asm:
                typer.echo(code.machine_code)
    if asm:
        return
    zeros = "asymmetric" if asym else "symmetric"
    typer.echo(f"{kernel} on {where.arch}: {problem.op} m={m} n={n} k={k} group={group} {act} {zeros}")
    typer.echo(f"tile of the tuning table: {tile_text(default)}")
    console.print(isa_table(columns))
    if opcodes:
        console.print(opcode_table(columns))


def changed(tile: Any, fields: str) -> Any:
    """`tile` with the fields of "name=value,..." replaced, each read as the type it has now."""
    changes = {}
    for item in filter(None, fields.split(",")):
        name, _, value = item.partition("=")
        if not hasattr(tile, name):
            wanted = ", ".join(vars(tile)) if tile is not None else "none: this kernel has no tile"
            raise BadInput(explain_mismatch("--tile field", got=name, wanted=wanted, then="Correct the option."))
        now = getattr(tile, name)
        try:
            changes[name] = value in ("1", "true", "True") if isinstance(now, bool) else type(now)(value)
        except ValueError:
            wanted = f"a value such as {now!r}, and commas between fields"
            got = f"{name}={value}"
            raise BadInput(explain_mismatch("--tile", got=got, wanted=wanted, then="Correct the option.")) from None
    return replace(tile, **changes) if changes else tile


def isa_golden(
    device: Annotated[list[str] | None, typer.Option(help="GPUs to compile for; default those recorded.")] = None,
    folder: Annotated[Path, typer.Option(help="The folder of the recorded readings.")] = Path("golden/isa"),
    update: Annotated[bool, typer.Option("--update", help="Record what is found instead of comparing.")] = False,
) -> None:
    """Compile every kernel that production can choose, and compare its hot loop with the recorded one."""
    from .codegen import golden
    from .codegen.cases import Place
    from .device import known_device

    changed, compiled = 0, set[Place]()
    for name in device or golden.DEVICES:
        path, found = golden.path_of(folder, name), golden.record(known_device(name), compiled)
        if update:
            golden.write(found, path)
            console.print(f"{path}: {len(found)} kernels recorded")
            continue
        if not path.is_file():
            raise BadInput(f"{path}: got no such file, wanted the recorded readings. Record them with --update.")
        sentences = golden.differences(golden.load(path), found)
        changed += len(sentences)
        console.print(f"{path}: {len(found)} kernels, {len(sentences)} differ")
        for sentence in sentences:
            typer.echo(f"  {sentence}")
    if changed:
        raise typer.Exit(1)
