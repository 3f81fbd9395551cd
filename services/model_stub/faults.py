"""The failures that the stub can simulate (`--fail`)."""

from dataclasses import dataclass, field

import grpc

HELP = (
    "a failure to show; repeatable. code=NAME[@SHARE]: that share of calls ends with the status; "
    "hang[@SHARE]: calls never answered; missing[@SHARE]: answers left out; "
    "range[@SHARE]: answers with level 9; scramble: answers in scrambled order; poison=TEXT: a batch "
    "in which a company or title contains TEXT is refused; poison-named=TEXT: the same, and the refusal "
    "names the index"
)


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Simulated failures. Shares are probabilities from 0 to 1, drawn for each call or each answer."""

    codes: tuple[tuple[grpc.StatusCode, float], ...] = ()
    hang_share: float = 0.0
    missing_share: float = 0.0
    out_of_range_share: float = 0.0
    scramble: bool = False
    poison: tuple[str, ...] = field(default=())
    poison_named: tuple[str, ...] = field(default=())


def parse_faults(specs: tuple[str, ...]) -> Faults:
    """Parse the values of `--fail`. Raises ValueError with a sentence for the user."""
    codes: list[tuple[grpc.StatusCode, float]] = []
    shares = {"hang": 0.0, "missing": 0.0, "range": 0.0}
    texts: dict[str, list[str]] = {"poison": [], "poison-named": []}
    scramble = False
    for spec in specs:
        kind, _, value = spec.partition("=")
        name, _, share = (value if kind == "code" else kind).partition("@")
        if kind == "code" and name in grpc.StatusCode.__members__:
            codes.append((grpc.StatusCode[name], _share(share, spec)))
        elif kind in texts and value:
            texts[kind].append(value)
        elif spec == "scramble":
            scramble = True
        elif name in shares and not value:
            shares[name] = _share(share, spec)
        else:
            message = f"--fail {spec!r} is not one of: code=NAME[@SHARE], hang[@SHARE], missing[@SHARE], "
            raise ValueError(message + "range[@SHARE], scramble, poison=TEXT, poison-named=TEXT")
    return Faults(
        codes=tuple(codes),
        hang_share=shares["hang"],
        missing_share=shares["missing"],
        out_of_range_share=shares["range"],
        scramble=scramble,
        poison=tuple(texts["poison"]),
        poison_named=tuple(texts["poison-named"]),
    )


def _share(text: str, spec: str) -> float:
    try:
        share = float(text) if text else 1.0
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        message = f"--fail {spec!r}: the share must be from 0 to 1"
        raise ValueError(message)
    return share
