"""Pickles read as data: plain containers come out, and nothing is ever imported or called.

A pickle is a program for a small stack machine, and Python's own machine lets it name any function
and call it. This one runs the same instructions, but a name becomes a Placeholder, an inert word,
and whatever is done to a Placeholder (called, built, given a state or items) gives a Placeholder or
leaves one. The exceptions are functions of ours that the caller lists by name. Values are only
looked at if their type is exactly one of the plain ones, so no method of theirs can be ours to run.

Source of the instructions: CPython's pickletools, protocols 0 to 5; its readers of arguments are
used, they make numbers, texts and bytes only.
"""

from __future__ import annotations

import io
import mmap
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

_MAX_PROTOCOL = 5
_MAX_STEPS = 2**22  # 160,000 tensors, or a list of 4 million numbers; 5 seconds at most
_MAX_BYTES = 2**26
_MAX_KEY_BITS = 64
_MAX_KEY_ITEMS = 16
_PLAIN_KEYS = {type(None), bool, float, str, bytes}

Function = Callable[[tuple[object, ...]], object]


@dataclass(frozen=True, eq=False)
class Placeholder:
    """Something that a pickle names or makes and that is not read: a word, and no more.

    name: dotted, as in the file; that of an object ends in "()".
    """

    name: str

    def made(self) -> Placeholder:
        """What comes of calling it."""
        return self if self.name.endswith("()") else Placeholder(f"{self.name}()")


class Stream:
    """A file of which at most 64 MiB are read at once."""

    def __init__(self, file: io.BytesIO | mmap.mmap) -> None:
        self.read_any = file.read
        self.readline, self.seek, self.tell = file.readline, file.seek, file.tell

    def read(self, count: int | None = -1, /) -> bytes:
        if count is not None and count > _MAX_BYTES:
            raise ValueError(f"one value of {count} bytes")
        return self.read_any(count)


def unpickle(
    stream: Stream,
    constants: Mapping[str, object],
    functions: Mapping[str, Function],
    persistent_load: Callable[[object], object],
) -> object:
    """The object that one pickle describes; the stream stands behind it.

    constants: dotted name -> what it stands for.
    functions: dotted name -> a function of ours, given the arguments, of any types, as one tuple;
    beside those that give plain containers.
    persistent_load: a function of ours that makes something of a persistent id.
    Raises ValueError where it is no pickle, or one that does what no real file does.
    """
    machine = _Machine(constants, {**_CONTAINERS, **functions}, persistent_load)
    try:
        return machine.run(stream)
    except (IndexError, KeyError, OverflowError) as error:
        # An empty stack or a memo that was never written.
        raise ValueError(f"no valid pickle ({type(error).__name__} {error})") from error


class _Machine:
    """Stack, marks and memo of one pickle.

    steps: instructions and copied items so far. They are bounded because a few instructions could
    otherwise ask for any amount of work: copy a list of a million, a million times.
    """

    def __init__(
        self,
        constants: Mapping[str, object],
        functions: Mapping[str, Function],
        persistent_load: Callable[[object], object],
    ) -> None:
        self.constants, self.functions = constants, functions
        self.persistent_load = persistent_load
        self.stack: list[object] = []
        self.marks: list[list[object]] = []  # the stacks below each mark
        self.memo: dict[object, object] = {}
        self.steps = 0

    def run(self, stream: Stream) -> object:
        next_byte = stream.read_any
        while (code := next_byte(1)) != b".":
            if code not in _INSTRUCTIONS:
                raise ValueError("no pickle, or one that ends early")
            self.steps += 1
            if self.steps > _MAX_STEPS:
                raise ValueError(f"a pickle of more than {_MAX_STEPS} steps")
            make, read_argument, act = _INSTRUCTIONS[code]
            argument = read_argument(stream) if read_argument else None
            if act is not None:
                act(self, argument)
            else:
                self.stack.append(make() if make else argument)
        return self.stack.pop()

    def push(self, value: object) -> None:
        self.stack.append(value)

    def mark(self, _: object) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def above_mark(self) -> list[object]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def pop(self, count: int) -> list[object]:
        """The last `count` items, in the order in which they were pushed."""
        if len(self.stack) < count:
            raise ValueError("fewer items than an instruction needs")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def extension(self, code: int) -> None:
        self.stack.append(Placeholder(f"copyreg extension {code}"))

    def put(self, key: object) -> None:
        self.memo[key] = self.stack[-1]

    def get(self, key: object) -> None:
        self.stack.append(self.memo[key])

    def discard(self, _: object) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.above_mark()

    def protocol(self, version: int) -> None:
        if version > _MAX_PROTOCOL:
            raise ValueError(f"pickle protocol {version}")

    def fill(self, items: list[object], *kinds: type) -> None:
        """Put items into the container on the stack, which must be of one of the kinds.

        A Placeholder was a container of a class of its own; the items go with it.
        """
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            return
        if type(target) not in kinds:
            raise ValueError(f"items for a {type(target).__name__}")
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(map(key_of, items))
        elif isinstance(target, dict):
            if len(items) % 2:
                raise ValueError("a key with no value")
            target.update(zip(map(key_of, items[::2]), items[1::2], strict=True))

    def name(self, module: object, name: object) -> None:
        if type(name) is not str or type(module) is not str:
            raise ValueError("a name that is no text")
        dotted = f"{module}.{name}"
        self.stack.append(self.constants.get(dotted, Placeholder(dotted)))

    def call(self, function: object, arguments: object) -> None:
        if type(function) is not Placeholder or type(arguments) is not tuple:
            raise ValueError(f"a call of a {type(function).__name__}")
        self.steps += sum([len(a) for a in arguments if type(a) in _COPIED])
        known = self.functions.get(function.name)
        self.stack.append(function.made() if known is None else known(arguments))

    def make(self, kind: object) -> None:
        """An object of a class, with whatever arguments."""
        if not isinstance(kind, Placeholder):
            raise ValueError(f"an object of the class {type(kind).__name__}")
        self.stack.append(kind.made())

    def build(self, _: object) -> None:
        self.stack.pop()
        made = self.stack[-1]
        if type(made) is not OrderedDict and not isinstance(made, Placeholder):
            # torch's state dicts carry `_metadata` so; of anything else it may change the values.
            self.stack[-1] = Placeholder(f"a {type(made).__name__} with a state of its own")


def _make_dict(machine: _Machine, _: object) -> None:
    items = machine.above_mark()
    machine.push({})
    machine.fill(items, dict)


def _make_instance(machine: _Machine, names: tuple[str, str]) -> None:
    machine.above_mark()
    machine.make(Placeholder(".".join(names)))


def key_of(value: object) -> object:
    """`value` as it may be a key or an item of a set.

    Only what is hashed in no time may: a tuple of tuples can take exponential time, and long
    tuples and integers are hashed anew each time. Another key is a placeholder.
    """
    if type(value) is tuple and len(value) <= _MAX_KEY_ITEMS and all(map(_is_plain_key, value)):
        return value
    if _is_plain_key(value) or isinstance(value, Placeholder):
        return value
    return Placeholder(f"a key that is a {type(value).__name__}")


def _is_plain_key(value: object) -> bool:
    if type(value) is int:
        return value.bit_length() <= _MAX_KEY_BITS
    return type(value) in _PLAIN_KEYS


# Containers and bytes, for which protocol 2, torch's default, has no instructions.


def items_of(arguments: tuple[object, ...]) -> list[object]:
    """The items of the one list or tuple that is the argument; none is an empty one."""
    if not arguments:
        return []
    if len(arguments) != 1 or not isinstance(arguments[0], list | tuple):
        raise ValueError("a container made of something else than a list")
    return list(arguments[0])


def _ordered_dict(arguments: tuple[object, ...]) -> object:
    made: OrderedDict[object, object] = OrderedDict()
    for pair in arguments and items_of(arguments):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError("an OrderedDict of something else than pairs")
        made[key_of(pair[0])] = pair[1]
    return made


def _encoded(arguments: tuple[object, ...]) -> object:
    text, encoding = (*arguments, None, None)[:2]
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes that are not written as latin-1")
    return text.encode("latin-1")


def _set(arguments: tuple[object, ...]) -> set[object]:
    return set(map(key_of, items_of(arguments)))


_CONTAINERS: dict[str, Function] = {
    "collections.OrderedDict": _ordered_dict,
    "_codecs.encode": _encoded,
    "__builtin__.set": _set,  # of Python 2
    "builtins.set": _set,
    "__builtin__.frozenset": lambda arguments: frozenset(_set(arguments)),
    "builtins.frozenset": lambda arguments: frozenset(_set(arguments)),
}
_COPIED = {list, tuple, set, frozenset, str, bytes, bytearray}


def _line(stream: Stream) -> str:
    # Not pickletools' reader of lines: it undoes escapes, and warns of those that are none.
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise ValueError("a line that does not end")
    return line[:-1].decode()


_READERS: dict[str, Callable[[Any], Any]] = {
    "GLOBAL": lambda stream: (_line(stream), _line(stream)),
    "INST": lambda stream: (_line(stream), _line(stream)),
    "PERSID": _line,
    # With its escapes left as they are: no name we look for has any.
    "STRING": lambda stream: _line(stream).strip()[1:-1],
}
_VALUES: dict[str, Callable[[], object]] = {
    "NONE": type(None),
    "NEWTRUE": partial(bool, 1),
    "NEWFALSE": bool,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
# An instruction that is neither here nor above pushes its argument.
_ACTIONS: dict[str, Callable[[_Machine, Any], object]] = {
    "PROTO": _Machine.protocol,
    # How much follows, and how it may be used.
    **dict.fromkeys(("FRAME", "READONLY_BUFFER"), lambda machine, _: None),
    "MARK": _Machine.mark,
    "POP": _Machine.discard,
    "POP_MARK": lambda machine, _: machine.above_mark(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.above_mark())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.pop(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.pop(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.pop(3))),
    "LIST": lambda machine, _: machine.push(machine.above_mark()),
    "FROZENSET": lambda machine, _: machine.push(frozenset(map(key_of, machine.above_mark()))),
    "DICT": _make_dict,
    "APPEND": lambda machine, _: machine.fill(machine.pop(1), list),
    "APPENDS": lambda machine, _: machine.fill(machine.above_mark(), list),
    "SETITEM": lambda machine, _: machine.fill(machine.pop(2), dict, OrderedDict),
    "SETITEMS": lambda machine, _: machine.fill(machine.above_mark(), dict, OrderedDict),
    "ADDITEMS": lambda machine, _: machine.fill(machine.above_mark(), set),
    "GLOBAL": lambda machine, names: machine.name(*names),
    "STACK_GLOBAL": lambda machine, _: machine.name(*machine.pop(2)),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), _Machine.extension),
    "NEXT_BUFFER": lambda machine, _: machine.push(Placeholder("out-of-band buffer")),
    "REDUCE": lambda machine, _: machine.call(*machine.pop(2)),
    "NEWOBJ": lambda machine, _: machine.make(machine.pop(2)[0]),
    "NEWOBJ_EX": lambda machine, _: machine.make(machine.pop(3)[0]),
    "INST": _make_instance,
    "OBJ": lambda machine, _: machine.make(machine.above_mark()[0]),
    "BUILD": _Machine.build,
    "PERSID": lambda machine, text: machine.push(machine.persistent_load(text)),
    "BINPERSID": lambda machine, _: machine.push(machine.persistent_load(*machine.pop(1))),
}


_INSTRUCTIONS = {
    opcode.code.encode("latin-1"): (
        _VALUES.get(opcode.name),
        _READERS.get(opcode.name, opcode.arg.reader if opcode.arg else None),
        _ACTIONS.get(opcode.name),
    )
    for opcode in pickletools.opcodes
    if opcode.name != "STOP" and opcode.proto <= _MAX_PROTOCOL
}
