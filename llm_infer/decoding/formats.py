"""Regular expressions for the string formats of JSON schema: every text that they match is valid."""

from __future__ import annotations


def _date() -> str:
    """Writes valid dates of the years 0001 to 9999, with February 29 only in leap years."""
    fours = "(?:0[48]|[2468][048]|[13579][26])"  # two digits divisible by four, without 00
    leap = f"(?:[0-9]{{2}}{fours}|{fours}00)"
    year = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
    long = "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    short = "(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    return rf"(?:{year}-(?:{long}|{short}|02-(?:0[1-9]|1[0-9]|2[0-8]))|{leap}-02-29)"


def _ipv6() -> str:
    """Writes eight groups, or fewer with `::` for those left out."""
    group = "[0-9A-Fa-f]{1,4}"
    forms = [f"(?:{group}:){{7}}{group}"]
    for before in range(7):
        head = f"(?:{group}:){{{before - 1}}}{group}" if before else ""
        after = 6 - before
        forms.append(f"{head}::(?:(?:{group}:){{0,{after - 1}}}{group})?" if after else f"{head}::")
    return f"(?:{'|'.join(forms)})"


_DATE = _date()
# There is no second 60: which minutes have one is not regular, and Python's datetime refuses it.
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = "[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*"
_LAST_LABEL = "[A-Za-z][A-Za-z0-9]*(?:-[A-Za-z0-9]+)*"
_HOST = rf"(?:{_LABEL}\.)*{_LAST_LABEL}"
_SHORT = "[A-Za-z0-9](?:-?[A-Za-z0-9]){0,30}"
_ATOM = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]"
_PORT = "(?:[0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3})"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_CLOCK = "T(?:[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?|[0-9]+M(?:[0-9]+S)?|[0-9]+S)"
_DAYS = "(?:[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?|[0-9]+M(?:[0-9]+D)?|[0-9]+D)"
_PATH = "(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})"

PATTERNS: dict[str, tuple[str, ...]] = {
    "date": (f"^{_DATE}$",),
    "time": (f"^{_TIME}$",),
    "date-time": (f"^{_DATE}T{_TIME}$",),
    "duration": (f"^P(?:{_DAYS}(?:{_CLOCK})?|{_CLOCK}|[0-9]+W)$",),
    "hostname": (f"^{_HOST}$", r"^[^.]{1,63}(?:\.[^.]{1,63})*$", "^.{1,253}$"),
    # The parts are bounded, as llguidance gives up on an intersection that would bound the whole.
    "email": (rf"^{_ATOM}{{1,32}}(?:\.{_ATOM}{{1,15}}){{0,2}}@(?:{_SHORT}\.){{1,2}}[A-Za-z]{{2,24}}$",),
    "ipv4": (rf"^(?:{_BYTE}\.){{3}}{_BYTE}$",),
    "ipv6": (f"^{_ipv6()}$",),
    "uuid": ("^[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$",),
    "uri": (
        rf"^[A-Za-z][A-Za-z0-9+.-]*:(?://{_HOST}(?::{_PORT})?(?:/{_PATH}*)*|{_PATH}+(?:/{_PATH}*)*)"
        rf"(?:\?(?:{_PATH}|[/?])*)?(?:#(?:{_PATH}|[/?])*)?$",
    ),
}
"""Expressions by format; a text of the format matches all of them."""
