"""An extension of griffe: the documented fields of a NamedTuple get the types that the class gives them."""

from __future__ import annotations

from typing import Any

import griffe


class FieldTypes(griffe.Extension):
    """Read the annotation of each field for the table of parameters."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Go through all classes of a package once it is loaded."""
        _visit(pkg)


def _visit(parent: griffe.Object) -> None:
    for member in parent.members.values():
        if member.is_alias:
            continue
        if member.is_class and any(str(base).startswith("NamedTuple") for base in member.bases):
            _annotate(member)
        if member.is_module or member.is_class:
            _visit(member)


def _annotate(owner: griffe.Class) -> None:
    if owner.docstring is None:
        return
    for section in owner.docstring.parsed:
        if section.kind is griffe.DocstringSectionKind.parameters:
            for field in section.value:
                if field.annotation is None and field.name in owner.members:
                    field.annotation = owner.members[field.name].annotation
