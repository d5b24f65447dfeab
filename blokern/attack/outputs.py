"""What a model returns, and the logits in it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

__all__ = ["logits_of"]


def logits_of(output: object) -> Tensor:
    """The logits in a model's output: a tensor itself, or its ``.logits`` or ``["logits"]``.

    TypeError for anything else. A tuple is refused too: which of its parts are the logits, only the caller knows::

        logits = logits_of(model(x))
        assert logits.shape[0] == len(x)
    """
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if isinstance(found, Tensor):
        return found
    part = f"[{next(iter(output), 'logits')!r}]" if isinstance(output, Mapping) else "[0]"
    raise TypeError(
        f"model must return its logits, a tensor, or an object that has them as .logits or ['logits'], "
        f"got {_described(output)}; wrap it in an nn.Module whose forward returns them, such as self.model(x){part}"
    )


def _described(output: object) -> str:
    kind = type(output).__name__
    if isinstance(output, Mapping):
        return f"a {kind} with {', '.join(map(repr, output)) or 'nothing'}"
    if isinstance(output, tuple | list):
        return f"a {kind} of {', '.join(type(part).__name__ for part in output) or 'nothing'}"
    return kind
