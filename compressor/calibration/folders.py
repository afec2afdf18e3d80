"""Where the files that travel with the package stand: calibration sets and recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from compressor.errors import UserError


def data_folder(kind: Literal["calibration", "recipes"]) -> Path:
    """Return the folder of the packaged ``kind``: inside an installed wheel, or at the top of a checkout.

    Raises:
        UserError: neither is there (an incomplete installation).
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "data" / kind, package.parent / kind):
        if folder.is_dir():
            return folder
    raise UserError(f"the folder {kind!r} that belongs to compressor is missing", fix="install compressor again")
