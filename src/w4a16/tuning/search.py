"""`w4a16 tune`: times tiles of one kernel on the device at hand and proposes rows. Nothing here runs in production."""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..bench.cases import shapes_of
from ..bench.providers import PROVIDERS, problem_of, repacked
from ..bench.run import BOUNDS, random_weight
from ..bench.timer import copies_for, time_calls
from ..device import Device, current_device, this_machine
from ..dispatch import launcher
from ..dispatch_table import TABLE
from ..errors import BadInput, W4A16Error, explain_mismatch
from ..layouts import PackedWeight, pack
from ..problem import ACT_DTYPES, Problem
from ..roofline.model import weight_bytes
from ..weight import QuantizedWeight
from .table import as_run, covering_row
from .tiles import TILES, why_illegal


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One tile at one problem: its median time over rounds, or the sentence for why it has none."""

    problem: Problem
    tile: Any
    seconds: float
    refused: str | None = None


def tiles_of(stem: str, grid: str) -> Iterator[Any]:
    """Tiles from "block_m=64,128 block_n=64 ...": every combination. Raises BadInput for a field the tile lacks."""
    kind = TILES[stem]
    names = [field.name for field in fields(kind)]
    choices: dict[str, list[Any]] = {}
    for item in grid.split():
        name, _, values = item.partition("=")
        if name not in names:
            then = "Correct the grid."
            raise BadInput(explain_mismatch(f"tile field of {stem}", got=name, wanted=", ".join(names), then=then))
        choices[name] = [_value(text) for text in values.split(",")]
    for combination in itertools.product(*choices.values()):
        yield kind(**dict(zip(choices, combination, strict=True)))


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.lstrip("-").isdigit() else text


def search(stem: str, weight: QuantizedWeight, m: int, act: str, tiles: Sequence[Any], rounds: int) -> list[Timed]:
    """Every tile checked against fp32 and timed, interleaved with dense BLAS; best first, BLAS with tile None."""
    where, device = weight.codes.device, current_device(weight.codes.device)
    x = torch.randn(m, weight.k, device=where).to(ACT_DTYPES[act])
    problem = problem_of(weight, x)
    packed = pack(weight, layout=_layout(stem), act=x.dtype)
    copies = repacked(packed, copies_for(weight_bytes(problem)))
    wanted = x.float() @ weight.dequantize(torch.float32).t()
    timed, calls = [], {}
    for tile in tiles:
        given = as_run(tile, problem, device)
        call = _call(stem, x, copies, given)
        refused = why_illegal(stem, given, problem, device) or _why_wrong(call, wanted, BOUNDS[act])
        if refused:
            timed.append(Timed(problem=problem, tile=tile, seconds=float("inf"), refused=refused))
        else:
            calls[repr(tile)] = call
    dense = PROVIDERS["cublas"].prepare(weight, x.dtype, 2)
    calls["None"] = lambda copy: dense[copy % 2](x)
    seconds = time_calls(calls, dict.fromkeys(calls, len(copies)), where, rounds)
    by_name = {repr(tile): tile for tile in (*tiles, None)}
    timed += [Timed(problem=problem, tile=by_name[k], seconds=statistics.median(v)) for k, v in seconds.items()]
    return sorted(timed, key=lambda t: t.seconds)


def _layout(stem: str) -> str:
    return next(row.layouts[0] for row in TABLE if row.stem == stem)


def _call(stem: str, x: Tensor, copies: Sequence[PackedWeight], tile: Any) -> Callable[[int], Tensor]:
    launch = launcher(stem)

    def call(copy: int) -> Tensor:
        out = x.new_empty((x.shape[0], copies[0].n))
        launch(out=out, x=x, weight=copies[copy], bias=None, tile=tile)
        return out

    return call


def _why_wrong(call: Callable[[int], Tensor], wanted: Tensor, bound: float) -> str | None:
    try:
        got = call(0)
    except Exception as error:  # the compiler's, of any kind: this tile is out, the search goes on
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    error_rms = float((got.float() - wanted).norm() / wanted.norm())
    return None if error_rms <= bound else f"wrong: relative RMS {error_rms:.1e}, bound {bound:.0e}"


def precompile(stem: str, problems: Sequence[Problem], device: Device, tiles: Sequence[Any]) -> None:
    """Compiles every tile in processes of their own, into Triton's cache: a GPU machine's cores would else idle."""
    given = [(p, as_run(tile, p, device)) for p in problems for tile in tiles]
    work = [(stem, p, device, tile) for p, tile in given if why_illegal(stem, tile, p, device) is None]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        list(pool.map(_compile_one, work))


def _compile_one(work: tuple[str, Problem, Device, Any]) -> None:
    from ..codegen.stems import compile_stem

    try:
        compile_stem(*work)
    except Exception:  # `search` meets it again, and says it
        return


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="w4a16 tune", description="Time tiles of a kernel here; propose rows.")
    stems = sorted(TILES.keys() - {"dense_resident"})  # BLAS itself, which every tile is compared with
    p.add_argument("--kernel", required=True, choices=stems, help="the kernel's stem")
    p.add_argument("--grid", required=True, help='fields and values: "block_m=64,128 block_n=128 warps=4,8 ..."')
    p.add_argument("--shapes", default="8b", help="as in `w4a16 bench`")
    p.add_argument("--group", type=int, help="columns a scale, in place of the shape's own")
    p.add_argument("--batches", default="1,16,128,1024", help="row counts M, comma-separated")
    p.add_argument("--act", default="bf16", choices=("bf16", "fp16"))
    p.add_argument("--zeros", default="sym", choices=("sym", "asym"))
    p.add_argument("--device", default=this_machine().type, help="cuda, cuda:1 ...")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--best", type=int, default=5, help="tiles to print at each point")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        _tune(options)
    except W4A16Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _tune(options: argparse.Namespace) -> None:
    where, tiles = torch.device(options.device), list(tiles_of(options.kernel, options.grid))
    batches = [int(m) for m in options.batches.split(",")]
    torch.manual_seed(0)
    asym, here = options.zeros == "asym", current_device(where)
    shapes = [replace(shape, group=options.group or shape.group) for shape in shapes_of(options.shapes)]
    problems = {
        shape: [Problem(m=m, n=shape.n, k=shape.k, group=shape.group, act=options.act, has_zeros=asym) for m in batches]
        for shape in shapes
    }
    precompile(options.kernel, list(itertools.chain.from_iterable(problems.values())), here, tiles)
    for shape, its in problems.items():
        weight = random_weight(shape, act=options.act, has_zeros=asym, device=where)
        for problem in its:
            row = covering_row(options.kernel, problem, here)
            today = None if row is None else row.tile
            tried = tiles if row is None else list(dict.fromkeys([today, *tiles]))
            found = search(options.kernel, weight, problem.m, options.act, tried, options.rounds)
            _print(found, today, options.best)


def _print(found: Sequence[Timed], today: Any, best: int) -> None:
    """The best tiles of a point, as rows of a table would have them, and the one that the table has today."""
    p, blas = found[0].problem, next(t.seconds for t in found if t.tile is None)
    refused = [t for t in found if t.refused]
    print(f"# {p.n}x{p.k} group {p.group} M={p.m} {p.act}: BLAS {blas * 1e6:.1f} us, {len(refused)} tiles refused")
    timed = [t for t in found if t.tile is not None and not t.refused]
    for t in [t for place, t in enumerate(timed) if place < best or t.tile == today]:
        tile = ", ".join(f"{k} = {_toml(v)}" for k, v in vars(t.tile).items())
        mark = "  today's" if t.tile == today else ""
        print(f"#   {t.seconds * 1e6:9.1f} us, {blas / t.seconds:5.2f} x BLAS  {{ {tile} }}{mark}")
    for why in sorted({t.refused for t in refused if t.refused}):
        print(f"#   refused: {why}")
    sys.stdout.flush()


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


if __name__ == "__main__":
    sys.exit(main())
