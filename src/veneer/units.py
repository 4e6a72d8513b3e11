"""Counts, sizes and times as people read them; the tables, the report and the command line share them."""


def count(number: int) -> str:
    """
    >>> count(1234567)
    '1,234,567'
    """
    return f"{number:,}"


def share(part: int, whole: int) -> str:
    """A percentage with three digits that matter; a model without parameters has none.

    >>> share(147456, 22860290), share(7, 7), share(1, 0)
    ('0.645%', '100%', '-')
    """
    return f"{100 * part / whole:.3g}%" if whole else "-"


def size(number: int) -> str:
    """Bytes in decimal units, as file managers and download pages count them.

    >>> size(512), size(295952), size(1_500_000), size(2_340_000_000)
    ('512 B', '296 kB', '1.5 MB', '2.34 GB')
    """
    value = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        # 999.5 would round to "1e+03 kB": it belongs to the next unit.
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def duration(seconds: float) -> str:
    """
    >>> duration(0.84), duration(42.2), duration(200), duration(7384)
    ('0.8 s', '42 s', '3 min 20 s', '2 h 03 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
