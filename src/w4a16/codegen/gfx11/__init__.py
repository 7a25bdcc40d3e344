"""gfx11 on a CPU: runs the machine code Triton emits for RDNA3 and RDNA3.5 (wave32), in numpy.

    program.py   assembly text to instructions, descriptor and kernel arguments
    table.py     mnemonic -> what it does; the entries stand in scalar, vector, half, packed, compare, lanes, matrix,
                 global_memory, ds and control
    state.py     registers of the waves that run together
    memory.py lds.py              memories that check each access
    machine.py   runs a grid;  launch.py   runs a compiled Launch on its tensors

It is functional: no time, no caches, no hazards of s_waitcnt, no denormal or rounding modes, no f64, no wave64. WMMA,
FMA and dot products round once from float64, which is not bit for bit what the hardware does. What it does not know it
refuses, and it faults where hardware would compute something else: out of bounds, LDS races between barriers, LDS and
scratch read before they were written, WMMA operands that are not replicated, barriers that some waves miss.
"""
