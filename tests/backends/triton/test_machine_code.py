"""The check of what the assembler made, on listings cut from what it made."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from machine_code import disassembled, unset_arithmetic, unset_descriptors

TWO_LOOPS = """
        /*0000*/               S2UR UR13, SR_CgaCtaId ;
        /*0010*/               UIADD3.64 UR28, UR13, 0x4, URZ ;
        /*0020*/               UIADD3.64 UR30, UR13, 0x8, URZ ;
        /*0030*/               UIADD3.64 UR18, UR28, 0x2, URZ ;
        /*0040*/          @!P0 BRA `(.L_x_12) ;
        /*0050*/               UIADD3.64 UR16, UR28, 0x2, URZ ;
.L_x_15:
        /*0060*/               HGMMA.64x64x16.F32.BF16 R24, gdesc[UR16], R24 ;
        /*0070*/           @P1 BRA `(.L_x_15) ;
.L_x_12:
{ahead}
.L_x_19:
        /*0080*/               HGMMA.64x64x16.F32.BF16 R24, gdesc[UR16], R24 ;
        /*0090*/               HGMMA.64x64x16.F32.BF16 R56, R100, gdesc[UR16].tnspB, R56, gsb0 ;
        /*00a0*/               BRA P2, `(.L_x_19) ;
        /*00b0*/               EXIT ;
"""


def test_a_descriptor_built_for_the_first_loop_only() -> None:
    code = disassembled(TWO_LOOPS.replace("{ahead}", ""))
    assert unset_descriptors(code) == ["HGMMA.64x64x16.F32.BF16 R24, gdesc[UR16], R24"]
    assert not unset_arithmetic(code), "nothing is wrong in the order in which it is written"


def test_a_descriptor_left_over_from_something_else() -> None:
    before = TWO_LOOPS.replace("{ahead}", "").replace(
        "S2UR UR13, SR_CgaCtaId ;", "S2UR UR13, SR_CgaCtaId ;\n UIADD3.64 UR16, UR13, 0x4, URZ ;"
    )
    assert len(unset_descriptors(disassembled(before))) == 1


def test_descriptors_built_for_both() -> None:
    ahead = "        /*0074*/               UIADD3.64 UR16, UR28, 0x2, URZ ;"
    assert not unset_descriptors(disassembled(TWO_LOOPS.replace("{ahead}", ahead)))


def test_a_predicated_write_is_not_enough() -> None:
    ahead = "        /*0074*/          @UP0 UIADD3.64 UR16, UR28, 0x2, URZ ;"
    assert len(unset_descriptors(disassembled(TWO_LOOPS.replace("{ahead}", ahead)))) == 1


def test_a_descriptor_made_of_what_the_first_loop_left() -> None:
    first_only = TWO_LOOPS.replace("UIADD3.64 UR16, UR28, 0x2", "UIADD3.64 UR20, UR28, 0x2")
    first_only = first_only.replace("gdesc[UR16], R24 ;", "gdesc[UR28], R24 ;", 1)
    ahead = "        /*0074*/               UIADD3.64 UR16, UR20, 0x2, URZ ;"
    assert len(unset_descriptors(disassembled(first_only.replace("{ahead}", ahead)))) == 1


def test_a_comparison_writes_no_register() -> None:
    code = TWO_LOOPS.replace("{ahead}", "        /*0074*/               UISETP.GE.AND UP0, UPT, UR16, UR17, UPT ;")
    assert len(unset_descriptors(disassembled(code))) == 1


def test_a_product_that_no_path_leads_to() -> None:
    code = TWO_LOOPS.replace("{ahead}", "        /*0074*/               EXIT ;")
    assert len(unset_descriptors(disassembled(code.replace("@!P0 BRA `(.L_x_12)", "NOP")))) == 2


def test_arithmetic_on_what_nothing_has_written() -> None:
    code = disassembled("/*0000*/ UIADD3 UR8, UR9, 0x2, URZ ;\n/*0010*/ UMOV UR4, UR5 ;\n/*0020*/ EXIT ;")
    assert unset_arithmetic(code) == ["UIADD3 UR8, UR9, 0x2, URZ"]
