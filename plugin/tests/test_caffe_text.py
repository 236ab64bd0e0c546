"""Prototxt to messages and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("google.protobuf", reason="reading prototxt needs protobuf")

from hypothesis import given, settings
from hypothesis import strategies as st

import sparkgauge
from sparkgauge.caffe import schema, text
from sparkgauge.errors import ConfigurationError

SHIPPED = sorted((Path(sparkgauge.__file__).parent / "models" / "caffe").glob("*.prototxt"))


def values_of(field: Any, depth: int) -> st.SearchStrategy[Any]:
    """Return a strategy for one value of ``field``."""
    if field.message_type is not None:
        return messages(field.message_type, depth - 1)
    if field.enum_type is not None:
        return st.sampled_from([value.number for value in field.enum_type.values])
    kinds: dict[Any, st.SearchStrategy[Any]] = {
        field.CPPTYPE_BOOL: st.booleans(),
        field.CPPTYPE_FLOAT: st.floats(width=32, allow_nan=False),
        field.CPPTYPE_DOUBLE: st.floats(allow_nan=False),
        field.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1),
        field.CPPTYPE_UINT32: st.integers(0, 2**32 - 1),
        field.CPPTYPE_INT64: st.integers(-(2**63), 2**63 - 1),
        field.CPPTYPE_STRING: st.binary(max_size=9) if field.type == field.TYPE_BYTES else st.text(max_size=9),
    }
    return kinds[field.cpp_type]


@st.composite
def messages(draw: Any, descriptor: Any, depth: int = 4) -> Any:
    """Draw a message with any of its fields set to anything."""
    message = schema.message_class(descriptor.name)()
    fields = [field for field in descriptor.fields if depth or field.message_type is None]
    fields = [field for field in fields if field.name != "layers"]  # the old format, which the reader refuses
    some = st.lists(st.sampled_from(fields), max_size=4, unique_by=lambda one: one.name) if fields else st.just([])
    for field in draw(some):
        value = values_of(field, depth)
        if field.is_repeated:
            target = getattr(message, field.name)
            for one in draw(st.lists(value, max_size=3)):
                target.append(one)
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(draw(value))
            getattr(message, field.name).SetInParent()
        else:
            setattr(message, field.name, draw(value))
    return message


@settings(max_examples=60, deadline=None)
@given(st.one_of(messages(schema.NetParameter.DESCRIPTOR), messages(schema.SolverParameter.DESCRIPTOR)))
def test_what_is_printed_is_read_back(message: Any) -> None:
    printed = text.print_message(message)
    assert text.parse(printed, type(message)).message == message
    assert text.print_message(text.parse(printed, type(message)).message) == printed


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_read_printed_and_read(path: Path) -> None:
    kind = schema.SolverParameter if "solver" in path.stem else schema.NetParameter
    message = text.parse(path.read_text(), kind).message
    assert text.parse(text.print_message(message), kind).message == message


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="layer {}:[]\"'<>#\n name1.-", max_size=60))
def test_any_text_is_read_or_refused_with_its_place(source: str) -> None:
    try:
        text.parse(source, file="net.prototxt")
    except ConfigurationError as error:
        assert (error.where or "").startswith("net.prototxt")
