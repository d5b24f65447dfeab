"""Attributes that cannot be changed, as a change would not do what it looks like."""

from __future__ import annotations

from typing import Any, Generic, TypeVar, overload

__all__ = ["Fixed"]

T = TypeVar("T")


class Fixed(Generic[T]):
    """An attribute that is set once; setting it again is an AttributeError that ends with `instead`, what to do::

    class Rule:
        model = Fixed[nn.Module]("make a new rule")
    """

    def __init__(self, instead: str) -> None:
        self.instead = instead

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, obj: None, owner: type | None = None) -> Fixed[T]: ...
    @overload
    def __get__(self, obj: object, owner: type | None = None) -> T: ...
    def __get__(self, obj: Any, owner: type | None = None) -> Any:
        if obj is None:
            return self
        try:
            return obj.__dict__[self.name]
        except KeyError:
            raise AttributeError(f"{type(obj).__name__}.{self.name} is not set yet") from None

    def __set__(self, obj: Any, value: T) -> None:
        if self.name in obj.__dict__:
            raise AttributeError(f"{type(obj).__name__}.{self.name} cannot be changed: {self.instead}")
        obj.__dict__[self.name] = value
