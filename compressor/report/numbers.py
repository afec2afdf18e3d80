"""Numbers as a person reads them: sane precision, units, no exponent where none is needed. Bytes are decimal."""

from __future__ import annotations

import math

NBSP = "\u00a0"
MINUS = "\u2212"
ABSENT = "\u2013"


def significant(value: float | None, digits: int = 4) -> str:
    """``12.34``, ``1,234``, ``0.001234``, ``1.23e-9``; ``∞`` for an overflow and a dash for what was not measured."""
    if value is None:
        return ABSENT
    if math.isnan(value):
        return "not a number"
    sign = MINUS if value < 0 else ""
    value = abs(value)
    if math.isinf(value):
        return f"{sign}\u221e"
    if value == 0:
        return "0"
    exponent = int(f"{value:.{digits - 1}e}".split("e")[1])  # of the rounded number: 9.996 has one digit more
    if not -4 <= exponent < 9:
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        return f"{sign}{mantissa}e{int(power)}"
    return f"{sign}{value:,.{max(0, digits - 1 - exponent)}f}"


def bytes_text(count: int | None) -> str:
    """``812 B``, ``28.4 MB``, ``1.02 GB``: powers of ten, three digits."""
    if count is None:
        return ABSENT
    if abs(count) < 1000:
        return f"{count}{NBSP}B"
    return f"{_scaled(count, 3)[0]}{NBSP}{_scaled(count, 3)[1]}B"


def tick_bytes(count: float) -> str:
    """``1.25 MB``, ``2 GB``: no more digits than a tick needs."""
    power = next((power for power in range(4) if abs(count) < 1000 ** (power + 1) * 0.9999), 4)
    return f"{count / 1000**power:.6g}{NBSP}{('', 'k', 'M', 'G', 'T')[power]}B"


def parameters_text(count: int) -> str:
    """``14.2 M``, ``656 k``, ``7.62 G``."""
    return str(count) if abs(count) < 1000 else NBSP.join(_scaled(count, 3))


def _scaled(count: int, digits: int) -> tuple[str, str]:
    power = next((power for power in (1, 2, 3) if abs(count) < 999.5 * 1000**power), 4)
    scaled = count / 1000**power
    exponent = int(f"{scaled:.{digits - 1}e}".split("e")[1])  # of the rounded number: 9.996 has one digit more
    return f"{scaled:.{max(0, digits - 1 - exponent)}f}", "kMGT"[power - 1]


def percent(fraction: float | None, digits: int = 1) -> str:
    """``0.523`` -> ``52.3 %``; fractions too small for ``digits`` keep two significant ones."""
    if fraction is None or math.isnan(fraction):
        return ABSENT
    value = 100 * fraction
    if math.isinf(value):
        return f"\u221e{NBSP}%"
    if value != 0 and abs(value) < 10**-digits:
        return f"{significant(value, 2)}{NBSP}%"
    return f"{value:,.{digits}f}{NBSP}%".replace("-", MINUS)


def share(fraction: float) -> str:
    """A part of a whole: ``18.1 %``, ``< 0.1 %``."""
    return f"<{NBSP}0.1{NBSP}%" if 0 < fraction < 0.001 else percent(fraction)


def change(value: float, reference: float) -> str:
    """Relative change in words: ``+14.6 %``, ``±0.0 %``; a factor from fivefold on, ``x 7.3``."""
    if not (math.isfinite(value) and math.isfinite(reference)) or reference == 0:
        return ABSENT
    ratio = value / reference
    if ratio >= 5:
        return f"\u00d7{NBSP}{significant(ratio, 2)}"
    size = f"{abs(ratio - 1) * 100:.1f}"
    sign = "\u00b1" if float(size) == 0 else "+" if ratio >= 1 else MINUS
    return f"{sign}{size}{NBSP}%"


def duration(seconds: float) -> str:
    """``0.42 s``, ``17.3 s``, ``2 min 05 s``, ``1 h 02 min``."""
    if seconds < 99.95:
        return f"{significant(seconds, 2 if seconds < 1 else 3)}{NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min {rest:02d}{NBSP}s"
    return f"{minutes // 60}{NBSP}h {minutes % 60:02d}{NBSP}min"
