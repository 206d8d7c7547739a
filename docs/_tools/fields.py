"""An extension of griffe: signatures and tables say what their names stand for.

Documented fields, and parameters that are documented together, get the types and defaults that the code gives them. A
name for types or words, such as ``LowRank`` or ``Compress``, becomes these; a default that is a private constant
becomes its value.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import griffe


class FieldTypes(griffe.Extension):
    """Spell annotations and defaults out, and read the annotation of each field for the table of parameters."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Go through all classes and functions of a package once it is loaded."""
        _visit(pkg)


def _visit(parent: griffe.Object) -> None:
    for member in parent.members.values():
        if member.is_alias:
            continue
        if member.is_function:
            for parameter in member.parameters:
                parameter.annotation = _spelled(parameter.annotation)
                parameter.default = _spelled(parameter.default)
            _told(member)
        if member.is_attribute:
            member.annotation = _spelled(member.annotation)
        if member.is_module or member.is_class:
            _visit(member)
        if member.is_class:
            _told(member)


def _spelled(part: Any) -> Any:
    if isinstance(part, list):
        return [_spelled(each) for each in part]
    if isinstance(part, griffe.ExprName):
        value = _value(part)
        is_choice = isinstance(value, griffe.ExprBinOp) or str(value).startswith("Literal[")
        return _spelled(value) if is_choice or (value and part.name.startswith("_")) else part
    if isinstance(part, griffe.ExprSubscript):
        return replace(part, slice=_spelled(part.slice))
    if isinstance(part, griffe.Expr):
        return replace(part, **{each.name: _spelled(getattr(part, each.name)) for each in fields(part)})
    return part


def _value(name: griffe.ExprName) -> Any:
    """Return what a module of the package gives a name, or None."""
    try:
        return name.parent.modules_collection[name.canonical_path].value
    except (AttributeError, KeyError):
        return None


def _told(owner: griffe.Class | griffe.Function) -> None:
    """Give what is documented, some parameters together, the type and the default that each has."""
    if owner.docstring is None:
        return
    for section in owner.docstring.parsed:
        if section.kind is not griffe.DocstringSectionKind.parameters:
            continue
        for told in section.value:
            if told.name in owner.parameters:
                own = owner.parameters[told.name]
                told.annotation, told.value = own.annotation, own.default
            elif told.name in owner.members:
                own = owner.members[told.name]
                told.annotation, told.value = own.annotation, own.value
