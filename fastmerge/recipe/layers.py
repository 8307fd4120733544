"""Where in the depth of a model a tensor sits, from tensor names and config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastmerge.errors import RecipeError

_CONFIG_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


class LayerPositions:
    """The relative depth t of every tensor of a model.

    t = j / (L - 1) for a tensor of layer j of L; t = 1 where L = 1; t = 0 for tensors of no layer,
    those after the last layer included.

    `problem` says why the layers cannot be told with certainty, or is None. It is raised only when
    the t of a layer's tensor is asked for: recipes without gradients never need to know.
    """

    def __init__(
        self, layers: Mapping[str, int | None], n_layers: int, problem: str | None = None
    ) -> None:
        self.layers = layers
        self.n_layers = n_layers
        self.problem = problem

    @classmethod
    def from_names(
        cls, names: Iterable[str], config: Mapping[str, Any] | None = None
    ) -> LayerPositions:
        """Infer the layers of a model from its tensor names and config.json.

        The layer index is the first `.<int>.` of a name after what all names begin with: a wrapper
        such as `module.0.` is no layer, and `layers.3.experts.5.` is of layer 3.
        """
        parts = {name: name.split(".") for name in names}
        skip = _common_length(list(parts.values()))
        found = {name: _layer(p, skip) for name, p in parts.items()}
        if not any(found.values()):
            # All tensors are of one layer, whose index is part of what all names begin with.
            found = {name: _layer(p, 0) for name, p in parts.items()}
        counts: dict[str, int] = {}
        for layer in filter(None, found.values()):
            prefix, index = layer
            counts[prefix] = max(counts.get(prefix, 0), index + 1)
        indices = {name: layer and layer[1] for name, layer in found.items()}
        configured = _configured_layers(config or {})
        n_layers = configured or max(counts.values(), default=0)
        return cls(indices, n_layers, _find_problem(counts, configured))

    def t(self, name: str) -> float:
        """Return the relative depth, in [0, 1], of one of the names given to `from_names`.

        Raises:
            RecipeError: the tensor is of a layer, and how many layers there are would be a guess.
        """
        index = self.layers[name]
        if index is None:
            return 0.0
        if self.problem is not None:
            raise RecipeError(
                f"cannot tell the depth of {name!r} for a gradient: {self.problem}; "
                "use filters in place of the gradient"
            )
        return 1.0 if self.n_layers == 1 else index / (self.n_layers - 1)


def _common_length(names: list[list[str]]) -> int:
    """Return how many leading parts all names share."""
    if len(names) < 2:
        return 0
    # What the first and the last in sorted order share, all between them share.
    first, last = min(names), max(names)
    return next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first)
    )


def _layer(parts: list[str], skip: int) -> tuple[str, int] | None:
    for i in range(max(1, skip), len(parts) - 1):
        # More than nine digits is no layer, and Python refuses to read integers without bound.
        if parts[i].isascii() and parts[i].isdigit() and len(parts[i]) < 10:
            return ".".join(parts[:i]), int(parts[i])
    return None


def _configured_layers(config: Mapping[str, Any]) -> int | None:
    for section in (config, config.get("text_config")):
        if isinstance(section, Mapping):
            for key in _CONFIG_KEYS:
                value = section.get(key)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
    return None


def _find_problem(counts: Mapping[str, int], configured: int | None) -> str | None:
    listed = ", ".join(f"{prefix}.* has {n}" for prefix, n in sorted(counts.items()))
    if len(set(counts.values())) > 1:
        return f"the model has stacks of different numbers of layers ({listed})"
    if configured is not None and counts and configured not in counts.values():
        return f"config.json says {configured} layers, but {listed}"
    return None
