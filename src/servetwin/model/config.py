"""A `config.json` that says where a missing or wrong key stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from servetwin.errors import InputError


@dataclass(frozen=True, slots=True)
class Config:
    """Read access to one Hugging Face configuration; `where` names the file or model in errors."""

    values: Mapping[str, object]
    where: str

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def int(self, *keys: str, default: int | None = None) -> int:
        """The first of `keys` that is set; `default` when none is (InputError when there is no default either). It must
        be at least 1, or 0 where that is the default."""
        least = 0 if default == 0 else 1
        for key in keys:
            value = self.values.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                allowed = f">= {least}"
                raise InputError("must be a whole number", where=self.where, field=key, found=value, allowed=allowed)
            return value
        if default is None:
            raise InputError(
                "the model configuration lacks a key that its model_type needs",
                where=self.where,
                field=keys[0],
                allowed=" or ".join(keys),
            )
        return default

    def flag(self, *keys: str, default: bool = False) -> bool:
        for key in keys:
            value = self.values.get(key)
            if value is not None:
                if not isinstance(value, bool):
                    raise InputError("must be true or false", where=self.where, field=key, found=value)
                return value
        return default

    def text(self, key: str, default: str = "") -> str:
        value = self.values.get(key)
        return value if isinstance(value, str) else default

    def list(self, key: str) -> list[object]:
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list | tuple):
            raise InputError("must be a list", where=self.where, field=key, found=value)
        return list(value)

    def within(self, key: str) -> Mapping[str, object]:
        value = self.values.get(key)
        return value if isinstance(value, Mapping) else {}
