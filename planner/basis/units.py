"""Human units, used only where something is printed; everything inside is seconds and bytes."""

from __future__ import annotations

from collections.abc import Sequence


def seconds(value: float) -> str:
    """Format seconds with three significant digits.

    >>> seconds(0.0123), seconds(2.5e-05), seconds(83.0)
    ('12.3 ms', '25 µs', '83 s')
    """
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {unit}" if abs(value) < 999.5 * factor else f"{value / factor:.0f} {unit}"
    return f"{value / 1e-9:.3g} ns" if value else "0 s"


def duration(value: float) -> str:
    """Format what a person waits for with its two largest units.

    >>> duration(0.3), duration(42), duration(250), duration(3600 * 27.51)
    ('0 s', '42 s', '4 min 10 s', '27 h 30 min')
    """
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(value: float) -> str:
    """Format bytes in binary units.

    >>> size(1536), size(3 * 2**30)
    ('1.50 KiB', '3.00 GiB')
    """
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(value) >= 1024**power:
            scaled = value / 1024**power
            return f"{scaled:.2f} {unit}" if abs(scaled) < 100 else f"{scaled:.0f} {unit}"
    return f"{value:.0f} B"


def either(values: Sequence[int]) -> str:
    """Return numbers as words.

    >>> either([256]), either([128, 256, 512])
    ('256', '128, 256 or 512')
    """
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last


def samples_words(numbers: Sequence[int], tokens: Sequence[int] = ()) -> str:
    """Say how many samples, and the tokens of each; 0 where they are no sequences.

    >>> samples_words([1]), samples_words([64], [0]), samples_words([64, 256], [128, 512])
    ('1 sample', '64 samples', '64 or 256 samples of 128 or 512 tokens')
    """
    return f"{either(numbers)} sample{'s'[: list(numbers) != [1]]}" + (
        f" of {either(tokens)} tokens" if any(tokens) else ""
    )


def rate(value: float, unit: str = "sample") -> str:
    """Format units per second with three significant digits.

    >>> rate(1234.5), rate(3.14159), rate(81234, "token")
    ('1230 samples/s', '3.14 samples/s', '81200 tokens/s')
    """
    digits = f"{value:.3g}"
    return f"{float(digits):.0f} {unit}s/s" if value >= 100 else f"{digits} {unit}s/s"


def percent(fraction: float) -> str:
    """Format a fraction as per cent.

    >>> percent(0.12345)
    '12.3 %'
    """
    return f"{round(100 * fraction, 1) + 0.0:.1f} %"  # adding zero: -0.0 is printed as 0.0
