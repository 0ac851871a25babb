"""The work of a compiled program, read in its text: collectives, and bytes to and from HBM.

A TPU program is scheduled: its entry computation lists the instructions in order, and the layout of
an array says whether it lies in on-chip memory (``S(n)``) or in HBM. Branches of a conditional are
computations of their own. So the work of every step and the work of some steps can be told apart.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

KINDS = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
# Names for values that lie elsewhere, and the ends of instructions that `-start` began.
_MOVE_NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
                 "conditional", "partition-id", "replica-id"}  # fmt: skip
_PARTS = {"slice", "dynamic-slice", "slice-start"}


@dataclass(frozen=True)
class Array:
    """The type of an array in the text."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """The number of bytes, without the padding of tiles."""
        bits = re.search(r"\d+", self.dtype)
        return math.ceil(self.elements * int(bits[0]) / 8) if bits else self.elements


@dataclass(frozen=True)
class Instruction:
    """One line of a computation in the text."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def kind(self) -> str | None:
        """The kind of collective, or None; the end of an asynchronous one counts as none."""
        kind = self.opcode.removesuffix("-start")
        return kind if kind in KINDS else None

    def called(self, *attributes: str) -> list[str]:
        """Computations that are named by attributes; by default by all attributes."""
        keys = "|".join(attributes) or r"calls|to_apply|body|condition|\w+_computations?"
        found = re.findall(rf"\b(?:{keys})=(%[\w.\-]+|{{[^}}]*}})", self.attributes)
        return [name for group in found for name in re.findall(r"%([\w.\-]+)", group)]


@dataclass(frozen=True)
class Collective:
    """A collective with its results."""

    kind: str
    arrays: tuple[Array, ...]
    awaited: tuple[bool, ...]
    """For each array whether a later collective of the step depends on it. Sums within a network
    are awaited, by the gradients at the latest; the gradients' own sums are not."""
    group_size: int | None
    """Devices that take part together; None for all."""
    in_branch: bool
    backward: bool
    name: str
    """The operation's path through the Python program: the first one's, where XLA merged some."""

    def bytes(self, *, awaited: bool | None = None) -> int:
        """The bytes of all arrays, or of those that are awaited, or of those that are not."""
        chosen = zip(self.arrays, self.awaited)
        return sum(a.bytes for a, waits in chosen if awaited in (None, waits))


class Program:
    """A compiled module, read from `compiled.as_text()`."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry: dict[str, Instruction] = {}
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if start := re.match(r"(ENTRY )?%?([\w.\-]+) .*{$", line):
                current = self.computations.setdefault(start[2], {})
                self.entry = current if start[1] else self.entry
            elif found := _instruction(line):
                current[found.name] = found

    @cached_property
    def collectives(self) -> list[Collective]:
        """All collectives, in the order of the text."""
        found = []
        for outer in self.entry.values():
            for inner, in_branch in self._collectives_of(outer):
                arrays = inner.results
                if inner.opcode == "collective-permute-start":
                    arrays = arrays[1:2]  # operand, result, contexts
                name = re.search(r'op_name="([^"]*)"', inner.attributes)
                name = name[1] if name else ""
                found.append(
                    Collective(
                        inner.kind or "",
                        arrays,
                        (False,) * len(arrays) if in_branch else self._awaited(outer, len(arrays)),
                        _group_size(inner.attributes),
                        in_branch,
                        "transpose(" in name,
                        name,
                    )
                )
        return found

    def _collectives_of(
        self, instruction: Instruction, in_branch: bool = False
    ) -> Iterator[tuple[Instruction, bool]]:
        """The instruction itself, or the collectives in the computations that it calls."""
        if instruction.kind:
            yield instruction, in_branch
            return
        in_branch = in_branch or instruction.opcode == "conditional"
        for name in dict.fromkeys(instruction.called()):
            for inner in self.computations[name].values():
                yield from self._collectives_of(inner, in_branch)

    def _awaited(self, instruction: Instruction, results: int) -> tuple[bool, ...]:
        """For each result of the entry's instruction, whether a later collective depends on it."""
        instruction = self._chain(instruction)[-1]
        users = self._users[instruction.name]
        if any(u.opcode != "get-tuple-element" for u in users) or not users:
            return (self._leads[instruction.name],) * results
        waiting = {u.attributes.partition("index=")[2] for u in users if self._leads[u.name]}
        indices = {int(re.match(r"\d+", text)[0]) for text in waiting}  # pyright: ignore
        return tuple(i in indices for i in range(results))

    @cached_property
    def _users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {name: [] for name in self.entry}
        for instruction in self.entry.values():
            for operand in instruction.operands:
                users[operand].append(instruction)
        return users

    @cached_property
    def _leads(self) -> dict[str, bool]:
        """For each value of the entry, whether it leads to a collective that always runs."""
        always = {
            part.name
            for instruction in self.entry.values()
            if any(not in_branch for _, in_branch in self._collectives_of(instruction))
            for part in self._chain(instruction)
        }
        leads: dict[str, bool] = {}
        for name in reversed(self.entry):  # users come after the values that they use
            leads[name] = any(u.name in always or leads[u.name] for u in self._users[name])
        return leads

    def _chain(self, instruction: Instruction) -> list[Instruction]:
        """The instruction; for an asynchronous one its beginning, updates and end."""
        chain = [instruction]
        while chain[-1].opcode.endswith(("-start", "-update")):
            chain.append(next(u for u in self._users[chain[-1].name] if _continues(u)))
        return chain

    @property
    def hbm_bytes(self) -> int:
        """Bytes that the entry computation moves to and from HBM, without branches of conditionals.

        Counted are the distinct operands and results of every instruction that are not in on-chip
        memory. For an operand that is only sliced, the slices are counted.
        """
        if any(i.opcode == "while" for i in self.entry.values()):
            raise ValueError(
                "hbm_bytes: how often a loop runs is not in the program's text; got an entry "
                "computation with a while loop. Unroll it."
            )
        return sum(self._moved(instruction) for instruction in self.entry.values())

    @property
    def on_chip_bytes(self) -> int:
        """Bytes of all results of the entry computation that are put into on-chip memory."""
        return sum(
            array.bytes
            for instruction in self.entry.values()
            if instruction.opcode not in _MOVE_NOTHING and not _continues(instruction)
            for array in self._chain(instruction)[-1].results
            if array.on_chip
        )

    @property
    def kernels(self) -> dict[str, int]:
        """The number of runs of each kind of kernel outside of branches.

        The kinds are "fusion", other operations that XLA schedules by themselves, and hand-written
        kernels by their names.
        """
        found: dict[str, int] = {}
        for instruction in self.entry.values():
            if instruction.opcode in _MOVE_NOTHING - {"conditional"} or _continues(instruction):
                continue
            name = instruction.opcode
            if name == "custom-call":
                target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
                name = target[1] if target else name
                if name == "tpu_custom_call":
                    name = re.sub(r"\.\d+$", "", instruction.name)
            found[name] = found.get(name, 0) + 1
        return dict(sorted(found.items()))

    def _moved(self, instruction: Instruction) -> int:
        if (
            instruction.opcode in _MOVE_NOTHING
            or _continues(instruction)
            or 'custom_call_target="ConcatBitcast"' in instruction.attributes
        ):
            return 0
        # The type of a beginning repeats the operands, and an update may add more of them.
        chain = self._chain(instruction)
        results = chain[-1].results
        written = sum(a.bytes for a in results if not a.on_chip)
        operands = {o for part in chain for o in part.operands} - {part.name for part in chain}
        return written + sum(self._read(instruction, operand, results) for operand in operands)

    def _read(self, instruction: Instruction, operand: str, results: tuple[Array, ...]) -> int:
        """The bytes of an operand that come from HBM."""
        whole = sum(a.bytes for a in self.entry[operand].results if not a.on_chip)
        if instruction.opcode in _PARTS:
            return min(whole, sum(a.bytes for a in results))
        if instruction.opcode != "fusion":
            return whole
        (name,) = instruction.called("calls")
        inside = self.computations[name].values()
        places = {str(i) for i, o in enumerate(instruction.operands) if o == operand}
        parameters = {i.name for i in inside if i.opcode == "parameter" and i.attributes in places}
        users = [i for i in inside if parameters & set(i.operands)]
        if any(user.opcode not in _PARTS for user in users):
            return whole
        return min(whole, sum(a.bytes for user in users for a in user.results))


def _continues(instruction: Instruction) -> bool:
    """True if the instruction continues an asynchronous one."""
    return instruction.opcode.endswith(("-update", "-done"))


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    types, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
    # Between the parentheses of a parameter stands its number.
    attributes = rest[:end] if opcode == "parameter" else rest[end + 1 :]
    return Instruction(head[1], opcode, _arrays(types), operands, attributes)


def _closing(text: str) -> int:
    """The position of the parenthesis that closes the one at the start of the text."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"hlo: every parenthesis must close; got {text[:80]!r}. Is this HLO text?")


def _arrays(types: str) -> tuple[Array, ...]:
    found = re.findall(r"(\w+)\[([\d,]*)\](?:{([^}]*)})?", types)
    return tuple(
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), "S(" in layout)
        for dtype, shape, layout in found
    )


def _group_size(attributes: str) -> int | None:
    if listed := re.search(r"replica_groups={{([\d,]*)}", attributes):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=\w*mesh\[([^\]]*)\] *{([^}]*)}", attributes):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']*)'", mesh[2]))
    return None
