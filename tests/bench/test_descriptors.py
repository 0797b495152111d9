"""Machine code whose tensor cores read from addresses that do not derive from the base of shared memory."""

import pytest

from bench.descriptors import find_lost_descriptors

BASE = ["UMOV UR4, 0x400", "ULEA UR4, UR5, UR4, 0x18"]
READ = "HGMMA.64x16x16.F32 R88, R96, gdesc[UR8].tnspB, R88"  # of B, with its descriptor in UR10 and UR11
CODE = {
    "derived": ["USHF.R.U32.HI UR10, URZ, 0x4, UR4", READ],
    "derived in another register": ["UMOV UR6, UR4", "UIADD3 UR10, UP0, UR6, 0x20, URZ", READ],
    "derived and spilled": ["LDL R6, [R1]", "R2UR UR10, R6", READ],
    "one path": ["@P0 BRA `(.L_x_1)", "UMOV UR10, UR4", ".L_x_1:", READ],
    "both paths": ["UMOV UR10, UR4", "@P0 BRA `(.L_x_1)", "UIADD3 UR10, UR4, 0x20, URZ", ".L_x_1:", READ],
    "never written": ["UIADD3 UR10, UP0, UR10, 0x20, URZ", READ],
    "something else": ["UMOV UR10, UR4", "ULDC.64 UR10, c[0x0][0x278]", "UIADD3 UR10, UP0, UR10, 0x20, URZ", READ],
    "overwritten by a wide load": ["IMAD.U32 R6, RZ, RZ, UR4", "LDSM.16.M88.4 R4, [R0]", "R2UR UR10, R6", READ],
    "only where a predicate holds": ["@P0 UMOV UR10, UR4", READ],
    "A too": ["UMOV UR10, UR4", "HGMMA.64x128x16.F32 R24, gdesc[UR8], RZ, !UPT"],
}


@pytest.mark.parametrize("name", CODE)
def test_lost_descriptors(name):
    lines = [*BASE, *CODE[name]]
    sass = "\n".join(x if x.endswith(":") else f"        /*{16 * i:04x}*/    {x} ;" for i, x in enumerate(lines))
    right = name.startswith("derived") or name == "both paths"
    assert len(find_lost_descriptors(sass)) == (0 if right else 1)
