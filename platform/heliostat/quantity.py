"""Numbers with their units, as people read them."""


def as_quantity(value: float, unit: str) -> str:
    """`1.5 GiB`, `2 GB/s`, `3.1 PFLOP`: bytes that are kept by 1024, rates by 1000."""
    base, infix = (1024, "i") if unit == "B" else (1000, "")
    prefixes = ("", "K", "M", "G", "T", "P", "E", "Z")
    place = 0
    while value >= 999.5 and place < len(prefixes) - 1:
        value, place = value / base, place + 1
    prefix = prefixes[place] + (infix if place else "")
    return f"{value:,.3g} {prefix}{unit}"


def as_seconds(value: float) -> str:
    return f"{value:,.2f} s" if value >= 0.9995 else f"{1000 * value:,.3g} ms"
