"""Sections of the config, such as `curate:` and each of `measures:`: a dataclass says which keys one may hold."""
import dataclasses
import typing

from image_text_sim_clip import Json, check_keys, check_value

Section = typing.TypeVar("Section")


def check_section(kind: type[Section], values: Json, section: str) -> Section:
    """The dataclass `kind` made of a section's `values`, its keys, types and ranges checked as those of Config are."""
    check_keys(kind, values, section + ".")
    made = kind(**values)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        check_value(field, getattr(made, field.name), section + ".")
    return made
