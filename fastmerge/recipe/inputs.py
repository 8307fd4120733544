"""Which of the models a method combines, in which order, and how many it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastmerge.errors import RecipeError
from fastmerge.recipe.parameters import Setting
from fastmerge.recipe.references import ModelRef
from fastmerge.registry import MethodSpec


@dataclass(frozen=True)
class ModelInput:
    """One model of a recipe. place is `models[i]`, or `base_model` where it is named only there."""

    ref: ModelRef
    parameters: Mapping[str, Setting]
    place: str


def operand_order(spec: MethodSpec, n_inputs: int, base: int | None) -> list[int]:
    """Return the indices of the inputs that the method combines, in the order it sees them.

    Where the base is an operand, all inputs as written, but a required base first. Otherwise the
    inputs that are not the base, as written.
    """
    others = [i for i in range(n_inputs) if i != base]
    if not spec.base_is_operand or base is None:
        return others
    return [base, *others] if spec.base == "required" else list(range(n_inputs))


def check_inputs(
    spec: MethodSpec, n_operands: int, has_base: bool, labels: Sequence[str] = ()
) -> None:
    """Raise RecipeError where a method lacks its base, or takes another number of operands."""
    if spec.base == "required" and not has_base:
        raise RecipeError(
            f"method {spec.name} needs a base; set base_model to the model it starts from"
        )
    least, most = spec.n_inputs
    if n_operands >= least and (most is None or n_operands <= most):
        return
    if most is None:
        wanted = f"at least {least}"
    else:
        wanted = f"exactly {least}" if least == most else f"{least} to {most}"
    plural = "model" if (least if most is None else most) == 1 else "models"
    base = ""
    if has_base:
        base = " (the base included)" if spec.base_is_operand else " other than the base"
    listed = f": {', '.join(labels)}" if labels else ""
    raise RecipeError(f"method {spec.name} takes {wanted} {plural}{base}, got {n_operands}{listed}")
