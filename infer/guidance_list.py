"""Every guidance there is: a file `guide_NAME.py` in this folder is found by its name. Imports no torch."""

from importlib import import_module
from pathlib import Path

from motionlora.infer.guidance import GuidanceSettings


def guidance_names() -> tuple[str, ...]:
    """The NAMEs, `none` first."""
    names = {path.stem.removeprefix("guide_") for path in Path(__file__).parent.glob("guide_*.py")}
    return ("none", *sorted(names - {"none"}))


def guidance_class(name: str) -> type[GuidanceSettings]:
    """The one guidance that `guide_NAME.py` defines.

    Raises:
        TypeError: it defines none or several.
    """
    module = import_module(f"motionlora.infer.guide_{name}")
    own = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
    found = [value for value in own if issubclass(value, GuidanceSettings)]
    if len(found) != 1:
        raise TypeError(f"guide_{name}.py defines {len(found)} subclasses of GuidanceSettings: it should define one.")
    return found[0]


def guidance_table(steps: int, blocks: int) -> str:
    """Name, cost, needs, what it does and where it is from, a line each; costs as of a walk with two passes a step."""
    plain = 2 * steps
    lines = [
        f"Costs of {steps} steps with classifier-free guidance by a model of {blocks} blocks, at the defaults,",
        "in brackets beside a plain walk's.",
        "",
        f"{'name':<12}{'forwards':>16}{'gradients':>11}  {'needs':<11}what it does",
    ]
    for name in guidance_names():
        cls = guidance_class(name)
        guidance = cls()
        forwards, gradients = guidance.forwards(steps, 2, blocks), guidance.gradients(steps, blocks)
        needs = "reference" if cls.needs_reference else "nothing"
        summary = (cls.__doc__ or "").splitlines()[0]
        source = f" ({cls.paper})" if cls.paper else ""
        cost = f"{forwards:.4g} ({forwards / plain:.2f}x)"
        lines.append(f"{name:<12}{cost:>16}{gradients:>11.4g}  {needs:<11}{summary}{source}")
    return "\n".join(lines)
