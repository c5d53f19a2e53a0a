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
from typing import Any

_MOST_PROTOCOL = 5
_MOST_STEPS = 2**22  # 160,000 tensors, or a list of 4 million numbers; 5 seconds at most
_MOST_BYTES = 2**26
_MOST_KEY_BITS = 64
_MOST_KEY_ITEMS = 16
_PLAIN_KEYS = {type(None), bool, float, str, bytes}


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
        self._read = file.read
        self.readline, self.seek, self.tell = file.readline, file.seek, file.tell

    def read(self, count: int | None = -1, /) -> bytes:
        if count is not None and count > _MOST_BYTES:
            raise ValueError(f"one value of {count} bytes")
        return self._read(count)


def unpickle(
    stream: Stream,
    constants: Mapping[str, object],
    functions: Mapping[str, Callable[[tuple[object, ...]], object]],
    persistent_load: Callable[[object], object],
) -> object:
    """The object that one pickle describes; the stream stands behind it.

    constants: dotted name -> what it stands for.
    functions: dotted name -> a function of ours, given the arguments, of any types, as one tuple.
    persistent_load: a function of ours that makes something of a persistent id.
    Raises ValueError where it is no pickle, or one that does what no real file does.
    """
    machine = _Machine(constants, functions, persistent_load)
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
        functions: Mapping[str, Callable[[tuple[object, ...]], object]],
        persistent_load: Callable[[object], object],
    ) -> None:
        self._constants, self._functions = constants, functions
        self._persistent_load = persistent_load
        self._stack: list[object] = []
        self._marks: list[list[object]] = []  # the stacks below each mark
        self._memo: dict[int, object] = {}
        self._steps = 0

    def run(self, stream: Stream) -> object:
        while True:
            code = stream.read(1)
            if code == b".":
                return self._stack.pop()
            if code not in _INSTRUCTIONS:
                raise ValueError("no pickle, or one that ends early")
            self._spend(1)
            read_argument, instruction = _INSTRUCTIONS[code]
            instruction(self, read_argument(stream) if read_argument else None)

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > _MOST_STEPS:
            raise ValueError(f"a pickle of more than {_MOST_STEPS} steps")

    # The stack and the memo.

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _mark(self, _: Any) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _above_mark(self) -> list[object]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _pop(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._above_mark()

    def _pop_mark(self, _: Any) -> None:
        self._above_mark()

    def _duplicate(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def _put(self, index: Any) -> None:
        self._memo[int(index)] = self._stack[-1]

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, index: Any) -> None:
        self._stack.append(self._memo[int(index)])

    def _ignore(self, _: Any) -> None:
        """FRAME says how much follows, READONLY_BUFFER how it may be used: nothing to us."""

    def _protocol(self, version: Any) -> None:
        if version > _MOST_PROTOCOL:
            raise ValueError(f"pickle protocol {version}")

    # Containers.

    def _tuple(self, _: Any) -> None:
        items = self._above_mark()
        self._stack.append(tuple(items))

    def _short_tuple(self, length: int) -> None:
        if len(self._stack) < length:
            raise ValueError("a tuple of more than there is")
        items = self._stack[-length:]
        self._stack[-length:] = [tuple(items)]

    def _list(self, _: Any) -> None:
        items = self._above_mark()
        self._stack.append(items)

    def _dict(self, _: Any) -> None:
        items = self._above_mark()
        made: dict[object, object] = {}
        _set_items(made, items)
        self._stack.append(made)

    def _frozenset(self, _: Any) -> None:
        items = self._above_mark()
        self._stack.append(frozenset(key_of(item) for item in items))

    def _append(self, _: Any) -> None:
        item = self._stack.pop()
        _extend(self._stack[-1], [item])

    def _appends(self, _: Any) -> None:
        items = self._above_mark()
        _extend(self._stack[-1], items)

    def _set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        _set_items(self._stack[-1], [key, value])

    def _set_items(self, _: Any) -> None:
        items = self._above_mark()
        _set_items(self._stack[-1], items)

    def _add_items(self, _: Any) -> None:
        items = self._above_mark()
        _add(self._stack[-1], items)

    # Names, and what is made with them.

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("a name that is no text")
        self._global(f"{module}.{name}")

    def _global(self, name: Any) -> None:
        self._stack.append(self._constants.get(name, Placeholder(name)))

    def _extension(self, code: Any) -> None:
        self._stack.append(Placeholder(f"copyreg extension {code}"))

    def _next_buffer(self, _: Any) -> None:
        self._stack.append(Placeholder("out-of-band buffer"))

    def _reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(function) is not Placeholder or type(arguments) is not tuple:
            raise ValueError(f"a call of a {type(function).__name__}")
        self._spend(sum(len(a) for a in arguments if type(a) in _COPIED))
        known = self._functions.get(function.name)
        self._stack.append(function.made() if known is None else known(arguments))

    def _new(self, num_arguments: int) -> None:
        for _ in range(num_arguments):
            self._stack.pop()
        made = self._stack.pop()
        if not isinstance(made, Placeholder):
            raise ValueError(f"an object of the class {type(made).__name__}")
        self._stack.append(made.made())

    def _instance(self, name: Any) -> None:
        self._above_mark()
        self._stack.append(Placeholder(name).made())

    def _object(self, _: Any) -> None:
        items = self._above_mark()
        if not isinstance(items[0], Placeholder):
            raise ValueError(f"an object of the class {type(items[0]).__name__}")
        self._stack.append(items[0].made())

    def _build(self, _: Any) -> None:
        self._stack.pop()
        made = self._stack[-1]
        if type(made) is not OrderedDict and not isinstance(made, Placeholder):
            # torch's state dicts carry `_metadata` so; of anything else it may change the values.
            self._stack[-1] = Placeholder(f"a {type(made).__name__} with a state of its own")

    def _persistent_text(self, text: Any) -> None:
        self._stack.append(self._persistent_load(text))

    def _persistent(self, _: Any) -> None:
        self._stack.append(self._persistent_load(self._stack.pop()))


def key_of(value: object) -> object:
    """`value` as it may be a key or an item of a set.

    Only what is hashed in no time may: a tuple of tuples can take exponential time, and long
    tuples and integers are hashed anew each time. Another key is a placeholder.
    """
    if type(value) is tuple and len(value) <= _MOST_KEY_ITEMS and all(map(_is_plain_key, value)):
        return value
    if _is_plain_key(value) or isinstance(value, Placeholder):
        return value
    return Placeholder(f"a key that is a {type(value).__name__}")


def _is_plain_key(value: object) -> bool:
    if type(value) is int:
        return value.bit_length() <= _MOST_KEY_BITS
    return type(value) in _PLAIN_KEYS


# A Placeholder that is given items was a list, dict or set of a class of its own; they go with it.


def _extend(target: object, items: list[object]) -> None:
    if type(target) is list:
        target.extend(items)
    elif not isinstance(target, Placeholder):
        raise ValueError(f"items for a {type(target).__name__}")


def _set_items(target: object, items: list[object]) -> None:
    if len(items) % 2:
        raise ValueError("a key with no value")
    if type(target) is dict or type(target) is OrderedDict:
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key_of(key)] = value
    elif not isinstance(target, Placeholder):
        raise ValueError(f"keys for a {type(target).__name__}")


def _add(target: object, items: list[object]) -> None:
    if type(target) is set:
        target.update(key_of(item) for item in items)
    elif not isinstance(target, Placeholder):
        raise ValueError(f"members for a {type(target).__name__}")


def _line(stream: Stream) -> str:
    # Not pickletools' reader of lines: it undoes escapes, and warns of those that are none.
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise ValueError("a line that does not end")
    return line[:-1].decode()


def _dotted(stream: Stream) -> str:
    return f"{_line(stream)}.{_line(stream)}"


def _quoted(stream: Stream) -> str:
    """A text of protocol 0, with its escapes left as they are: no name we look for has any."""
    return _line(stream).strip()[1:-1]


_COPIED = {list, tuple, set, frozenset, str, bytes, bytearray}
_LITERALS = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    "STRING",
)
_BY_NAME: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(_LITERALS, _Machine._push),
    "NONE": lambda machine, _: machine._push(None),
    "NEWTRUE": lambda machine, _: machine._push(True),
    "NEWFALSE": lambda machine, _: machine._push(False),
    "EMPTY_TUPLE": lambda machine, _: machine._push(()),
    "EMPTY_LIST": lambda machine, _: machine._push([]),
    "EMPTY_DICT": lambda machine, _: machine._push({}),
    "EMPTY_SET": lambda machine, _: machine._push(set()),
    "PROTO": _Machine._protocol,
    "FRAME": _Machine._ignore,
    "READONLY_BUFFER": _Machine._ignore,
    "MARK": _Machine._mark,
    "POP": _Machine._pop,
    "POP_MARK": _Machine._pop_mark,
    "DUP": _Machine._duplicate,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine._put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine._get),
    "MEMOIZE": _Machine._memoize,
    "TUPLE": _Machine._tuple,
    "TUPLE1": lambda machine, _: machine._short_tuple(1),
    "TUPLE2": lambda machine, _: machine._short_tuple(2),
    "TUPLE3": lambda machine, _: machine._short_tuple(3),
    "LIST": _Machine._list,
    "DICT": _Machine._dict,
    "FROZENSET": _Machine._frozenset,
    "APPEND": _Machine._append,
    "APPENDS": _Machine._appends,
    "SETITEM": _Machine._set_item,
    "SETITEMS": _Machine._set_items,
    "ADDITEMS": _Machine._add_items,
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global,
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), _Machine._extension),
    "NEXT_BUFFER": _Machine._next_buffer,
    "REDUCE": _Machine._reduce,
    "NEWOBJ": lambda machine, _: machine._new(1),
    "NEWOBJ_EX": lambda machine, _: machine._new(2),
    "INST": _Machine._instance,
    "OBJ": _Machine._object,
    "BUILD": _Machine._build,
    "PERSID": _Machine._persistent_text,
    "BINPERSID": _Machine._persistent,
}


_READERS = {"GLOBAL": _dotted, "INST": _dotted, "PERSID": _line, "STRING": _quoted}


def _argument_reader(opcode: pickletools.OpcodeInfo) -> Callable[[Any], Any] | None:
    default = None if opcode.arg is None else opcode.arg.reader
    return _READERS.get(opcode.name, default)


_INSTRUCTIONS = {
    opcode.code.encode("latin-1"): (_argument_reader(opcode), _BY_NAME[opcode.name])
    for opcode in pickletools.opcodes
    if opcode.name != "STOP"
}
