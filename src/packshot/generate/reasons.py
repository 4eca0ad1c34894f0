"""What each reason code of a certificate means to the person who looks at the picture.

The words of a check stand in its row of ``config.verify``, those of a mask's doubt in ``imaging.mask_doubt``. Reports,
log lines and the page of the server read them here.
"""

from __future__ import annotations

from collections.abc import Iterable

from packshot.config.verify import CHECKS
from packshot.imaging.mask_doubt import REMEDIES

STANDARD_MISSED = "standard_missed"

REASONS: dict[str, str] = {
    **REMEDIES,
    **{code: row.fault for code, row in CHECKS.items()},
    STANDARD_MISSED: "the file that is handed over does not keep output.standard",
}


def explained(codes: Iterable[str]) -> str:
    """Codes with their words; a code of another version stands alone."""
    return "; ".join(f"{code} ({REASONS[code]})" if code in REASONS else code for code in codes)
