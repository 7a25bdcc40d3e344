"""Control flow, and the instructions that only matter to timing."""

from __future__ import annotations

from collections.abc import Callable

from .state import EXEC, SCC, VCC, Gang
from .table import TABLE, Array

BARRIER, END, JUMP = "s_barrier", "s_endpgm", "s_branch"

# Which waves [waves] take the branch.
BRANCHES: dict[str, Callable[[Gang], Array]] = {
    "s_cbranch_scc0": lambda gang: gang.s[SCC, :, 0] == 0,
    "s_cbranch_scc1": lambda gang: gang.s[SCC, :, 0] != 0,
    "s_cbranch_vccz": lambda gang: gang.s[VCC, :, 0] == 0,
    "s_cbranch_vccnz": lambda gang: gang.s[VCC, :, 0] != 0,
    "s_cbranch_execz": lambda gang: gang.s[EXEC, :, 0] == 0,
    "s_cbranch_execnz": lambda gang: gang.s[EXEC, :, 0] != 0,
}
CONTROL = (BARRIER, END, JUMP, *BRANCHES)

_TIMING = (
    "s_waitcnt s_waitcnt_depctr s_waitcnt_vscnt s_waitcnt_vmcnt s_waitcnt_expcnt s_waitcnt_lgkmcnt s_delay_alu s_nop "
    "s_clause s_sendmsg s_setprio s_sleep s_set_inst_prefetch_distance s_icache_inv buffer_gl0_inv buffer_gl1_inv"
)


def _nothing(_: Gang) -> None:
    pass


TABLE.update({name: lambda _: _nothing for name in _TIMING.split()})
