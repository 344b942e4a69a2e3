"""Placeholder until the table of settings lands."""


def budget() -> int:
    return 256 << 20
