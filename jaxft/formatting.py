"""Numbers as a person reads them: bytes, times, counts. One spelling for each, on every page."""


def format_bytes(count: float) -> str:
    """Returns bytes of memory as three digits and a binary unit: '640 MiB', '12.3 GiB'."""
    return _scaled(count, ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")))


def format_storage(count: float) -> str:
    """Returns bytes of a disk as three digits and the decimal unit disks have: '640 MB'."""
    return _scaled(count, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")))


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    size, unit = next((pair for pair in units if value >= pair[0]), units[-1])
    number = value / size
    whole = number >= 100 or size == 1
    return f"{number:,.0f} {unit}" if whole else f"{number:.3g} {unit}"


def format_seconds(seconds: float) -> str:
    """Returns what is estimated or measured as three digits and a unit: '3.00 ms', '210 µs'."""
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= size:
            value = seconds / size
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:#.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns" if seconds else "0 s"


def format_duration(seconds: float) -> str:
    """Returns how long something has taken or will take: '0.4 s', '12 s', '3:05', '1:02:03'."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def format_count(count: float) -> str:
    """Returns '12,345' as it is, and three digits and a letter from a million on: '1.23 M'."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return f"{count:,.0f}"


def counted(number: int, noun: str) -> str:
    """Returns '1 step' or '1,200 steps'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
