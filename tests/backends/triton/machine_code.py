"""What the assembler made of a kernel: uniform registers that are read before anything has set them.

The assembler of CUDA 12.8, which Triton 3.6 and 3.7 bring along, gets this wrong in two ways that were seen on a device
as wrong results. Where two tiles of different swizzle share one shared-memory address, a product's matrix descriptor is
built from a register that nothing has written: sums over 16 of 64 keys. And where two loops use one tile whose address
is not a constant, the descriptors that both need are built ahead of the first loop only, so that the second reads
whatever was there when the first was skipped.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton

UNSET = -1
"""In place of the instruction that wrote a register: none."""
Writers = dict[int, frozenset[int]]
"""For uniform registers the instructions that may have written them last."""


class Instruction(NamedTuple):
    """One machine instruction; `branches` are the numbers of those it may jump to."""

    text: str
    operation: str
    operands: list[str]
    predicated: bool
    branches: list[int]

    @property
    def writes(self) -> list[int]:
        """Uniform registers."""
        match = re.fullmatch(r"UR(\d+)", self.operands[0])
        if match is None or "SETP" in self.operation:
            return []
        width = 4 if ".128" in self.operation else 2 if ".64" in self.operation or "WIDE" in self.operation else 1
        return [int(match[1]) + i for i in range(width)]

    @property
    def reads(self) -> set[int]:
        """Uniform registers that it names; the upper half of a pair is not told apart."""
        sources = self.operands[1:] if self.writes else self.operands
        return {int(source) for source in re.findall(r"\bUR(\d+)\b", ",".join(sources))}

    @property
    def descriptors(self) -> list[int]:
        """Uniform registers that hold the matrix descriptors of a product: two of each operand in shared memory."""
        match = re.search(r"gdesc\[UR(\d+)\]", self.text)
        if match is None:
            return []
        left_in_registers = re.fullmatch(r"R\d+", self.operands[1]) is not None
        return [int(match[1]) + i for i in range(2 if left_in_registers else 0, 4)]

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow."""
        kind = self.operation.split(".")[0]
        jumps = kind in ("EXIT", "RET", "BRX") or (kind == "BRA" and self.operands[0].startswith("`"))
        return self.predicated or not jumps


def disassembled(listing: str) -> list[Instruction]:
    """The instructions of a listing of nvdisasm."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        line = " ".join(re.sub(r"/\*[0-9a-f]*\*/", "", line).split())
        label = re.match(r"(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(lines)
        elif line.endswith(";"):
            lines.append(line.removesuffix(";").strip())
    found = []
    for line in lines:
        predicate = re.match(r"@!?U?P\w+ ", line)
        text = line[predicate.end() :] if predicate else line
        operation, _, rest = text.partition(" ")
        jumps = operation.startswith(("BRA", "BRX"))
        branches = [labels[label] for label in re.findall(r"\.L_x_\d+", rest)] if jumps else []
        operands = [x.strip() for x in rest.split(",")]
        found.append(Instruction(text, operation, operands, predicate is not None, branches))
    return found


def writers_before(code: list[Instruction], registers: set[int]) -> list[Writers | None]:
    """Which instructions may have written the registers last, before each instruction that can be reached."""
    before: list[Writers | None] = [None] * len(code)
    before[0] = dict.fromkeys(registers, frozenset([UNSET]))
    waiting = {0}
    while waiting:
        at = min(waiting)
        waiting.remove(at)
        now = before[at]
        assert now is not None
        kept = now if code[at].predicated else {}
        after = now | {r: kept.get(r, frozenset()) | {at} for r in code[at].writes if r in registers}
        for then in code[at].branches + [at + 1] * (code[at].goes_on and at + 1 < len(code)):
            known = before[then]
            merged = after if known is None else {r: known[r] | after[r] for r in registers}
            if merged != known:
                before[then] = merged
                waiting.add(then)
    return before


def unset_descriptors(code: list[Instruction]) -> list[str]:
    """Products of which a matrix descriptor is not the same instruction's result whichever way led there, or goes back
    to a register that nothing has written on some path; and those that no path leads to."""
    registers = {register for instruction in code for register in instruction.descriptors}
    while sources := {r for x in code if registers.intersection(x.writes) for r in x.reads} - registers:
        registers |= sources
    if not registers:
        return []
    before = writers_before(code, registers)
    unset = {
        at
        for at, (instruction, writers) in enumerate(zip(code, before, strict=True))
        if writers and registers.intersection(instruction.writes)
        if any(UNSET in writers[r] for r in _inputs(instruction))
    }
    found = []
    for instruction, writers in zip(code, before, strict=True):
        if instruction.descriptors:
            origins = [writers[r] for r in instruction.descriptors] if writers else []
            if not origins or any(UNSET in of or of & unset or len(_computed(code, of)) > 1 for of in origins):
                found.append(instruction.text)
    return found


def _computed(code: list[Instruction], writers: frozenset[int]) -> list[int]:
    """Of some writers those that do not put back what was kept in another register meanwhile."""
    return [at for at in writers if not code[at].operation.startswith("R2UR")]


def _inputs(instruction: Instruction) -> set[int]:
    """What a result depends on; copies of a register that is not live yet are made around calls."""
    return instruction.reads if instruction.writes and instruction.operation != "UMOV" else set()


def unset_arithmetic(code: list[Instruction]) -> list[str]:
    """Arithmetic on uniform registers that nothing above it has written.

    Copies of a register that is not live yet are saved and restored around calls; only arithmetic counts.
    """
    written: set[int] = set()
    suspicious = []
    for instruction in code:
        read = instruction.reads
        if instruction.operation.startswith("U") and instruction.operation != "UMOV" and read - written:
            suspicious.append(instruction.text)
            written |= read
        written.update(instruction.writes)
    return suspicious


def unset_uniform_registers(kernel: Any) -> list[str]:
    """Instructions of a compiled kernel that read a uniform register which may be unset there."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        listing = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    code = disassembled(listing)
    return unset_arithmetic(code) + unset_descriptors(code)
